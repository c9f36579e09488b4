# limit: 1200
# long
# 1 GiB by virtio-net in each direction, with the right checksum, lazily and strictly unmapped.
. /causeway/files/lib.sh
. /causeway/files/net-lib.sh

tap
mark
for options in "intel_iommu=on iommu.strict=0" "intel_iommu=on iommu.strict=1"; do
    carry net 16 "$options" --device virtio-net,tap=tap0
    no_faults net
done
