# An assigned edu, driven by the guest's own vfio, reaches exactly what the guest's tables grant. What it aims elsewhere is stopped by
# the real IOMMU and shows in the log of L1's kernel, and not in the guest's: our unit never sees that DMA.
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
edu_in_guest 2 "edu roundtrip msi" --device vfio,host="$EDU"
no_faults edu

edu_in_guest 3 "edu readonly big 'loop 20'" --device vfio,host="$EDU"

edu_in_guest 1 "edu outside" --device vfio,host="$EDU"
host_faults >faults || fail "DMA outside the mappings, and no fault in the log of L1's kernel"
cat faults
expect_line faults "DMA Write.*\[${EDU#*:}\]" "DMA Read.*\[${EDU#*:}\]"
expect "fault lines in the guest's log" "$(lines edu 'guest-fault: ')" ""

edu_in_guest 1 "edu armed" --device vfio,host="$EDU"
expect_line edu.log "armed: programmed while mapped, fired after UNMAP" "still pending when UNMAP returned"
# The bench's kernel prints at most three faults in 5 s; this one comes alone.
wait_until 10 host_faults >faults || fail "DMA after UNMAP, and no fault in the log of L1's kernel"
expect_line faults "DMA Write.*\[${EDU#*:}\]"
