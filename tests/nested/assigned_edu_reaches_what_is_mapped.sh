# An assigned edu, driven by the guest's own vfio, reaches exactly what the guest's tables grant. What it aims elsewhere is stopped by
# the real IOMMU and shows in the log of L1's kernel, and not in the guest's: our unit never sees that DMA.
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
edu_reaches_what_is_mapped "edu roundtrip msi" --device vfio,host="$EDU"
no_faults edu

edu_reaches_what_is_mapped "edu readonly big 'loop 20'" --device vfio,host="$EDU"

edu_reaches_what_is_mapped "edu outside" --device vfio,host="$EDU"
host_faults >faults || fail "DMA outside the mappings, and no fault in the log of L1's kernel"
cat faults
expect_line faults "DMA Write.*\[${EDU#*:}\]" "DMA Read.*\[${EDU#*:}\]"
expect "fault lines in the guest's log" "$(lines edu 'guest-fault: ')" ""

edu_reaches_what_is_mapped "edu armed" --device vfio,host="$EDU"
expect_line edu.log "armed: programmed while mapped, fired after UNMAP" "still pending when UNMAP returned"
host_faults >faults || fail "DMA after UNMAP, and no fault in the log of L1's kernel"
expect_line faults "DMA Write.*\[${EDU#*:}\]"
