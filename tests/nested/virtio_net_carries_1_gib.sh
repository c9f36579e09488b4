# limit: 3000
# long
# 1 GiB by virtio-net in each direction, with the right checksum, of a guest that says what it unmaps late, and does not say what it maps.
. /causeway/files/lib.sh
. /causeway/files/net-lib.sh

tap
mark
carry net 16 "intel_iommu=on iommu.strict=0" --iommu vtd,caching-mode=off --device virtio-net,tap=tap0
no_faults net
