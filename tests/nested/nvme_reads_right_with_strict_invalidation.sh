# The guest reads the assigned NVMe right with each unmap invalidated at once, an edu assigned beside it.
. /causeway/files/lib.sh

nvme_reads_right DMA "intel_iommu=on iommu.strict=1"
