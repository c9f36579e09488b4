# An emulated edu, driven by the guest's own vfio, reaches exactly what the guest's tables grant. What it aims elsewhere becomes a fault
# record of our unit, which the guest's driver reads and prints with the function and the address.
. /causeway/files/lib.sh

edu_in_guest 0 "edu roundtrip msi" --device edu
no_faults edu

edu_in_guest 0 "EDU_OPTIONS=--expect-fault; edu outside armed readonly" --device edu
expect_line edu.log "fault: .*DMA Write.*Request device" "fault: .*DMA Read.*Request device"
expect "faults of the host" "$(host_faults)" ""

edu_in_guest 0 "edu big 'loop 20'" --device edu
