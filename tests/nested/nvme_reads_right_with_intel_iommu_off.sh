# The guest reads the assigned NVMe right with the guest's IOMMU driver off, an edu assigned beside it.
. /causeway/files/lib.sh

nvme_reads_right none "intel_iommu=off"
