# The guest reads the assigned NVMe right with the guest's devices in pass-through, an edu assigned beside it.
. /causeway/files/lib.sh

nvme_reads_right identity "intel_iommu=on iommu.passthrough=1"
