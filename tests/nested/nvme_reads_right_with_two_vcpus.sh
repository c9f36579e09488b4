# The guest reads the assigned NVMe right with translation on and two vCPUs, an edu assigned beside it.
. /causeway/files/lib.sh

nvme_reads_right DMA "intel_iommu=on" --cpus 2
