# An emulated edu, driven by the guest's own vfio, reaches exactly what the guest's tables grant. What it aims elsewhere becomes a fault
# record of our unit, which the guest's driver reads and prints with the function and the address.
. /causeway/files/lib.sh

edu_reaches_what_is_mapped "edu roundtrip msi" --device edu
no_faults edu

edu_reaches_what_is_mapped "EDU_OPTIONS=--expect-fault edu outside armed readonly" --device edu
expect_line edu.log "fault: .*DMA Write.*Request device" "fault: .*DMA Read.*Request device"
expect "faults of the host" "$(host_faults)" ""

edu_reaches_what_is_mapped "edu big 'loop 20'" --device edu
