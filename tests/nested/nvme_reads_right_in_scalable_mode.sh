# The guest reads the assigned NVMe right in scalable mode, through the second stage, an edu assigned beside it; and Linux did use it.
. /causeway/files/lib.sh

nvme_reads_right DMA "intel_iommu=on,sm_on" --iommu vtd,scalable=on
[ "$(field nvme.json pasid_cache)" -gt 0 ] || fail "no invalidation of an entry of the PASID table: not scalable mode"
