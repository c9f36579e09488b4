# The guest reads the assigned NVMe right with a 39-bit unit, an edu assigned beside it.
. /causeway/files/lib.sh

nvme_reads_right DMA "intel_iommu=on" --iommu vtd,aw-bits=39
expect "the unit's width in the guest" "$(lines nvme 'width ')" 39
