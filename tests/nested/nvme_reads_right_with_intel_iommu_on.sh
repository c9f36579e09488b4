# The guest reads the assigned NVMe right with translation on, an edu assigned beside it.
. /causeway/files/lib.sh

nvme_reads_right DMA "intel_iommu=on"
