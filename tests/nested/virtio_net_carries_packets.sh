# A virtio-net at a tap of L1, behind the unit (strict), of a guest that says what it maps and of one that does not: some MiB come, and as
# many go, with the right checksum, and nothing faults.
. /causeway/files/lib.sh
. /causeway/files/net-lib.sh

tap 2
mark
for caching in on off; do
    carry net 1 "intel_iommu=on iommu.strict=1" --iommu vtd,caching-mode=$caching --device virtio-net,tap=tap0,mac=52:54:00:12:34:56
    expect "the address" "$(lines net 'address ')" 52:54:00:12:34:56
    expect "the domain" "$(lines net 'domain ')" DMA
    no_faults net
    expect "pins that were refused, left or late" "$(($(field net.json refused) + $(field net.json left_pinned) + $(field net.json late)))" 0
done
start net "" --device virtio-net,tap=none0
expect "the status without a tap" $STATUS 4
