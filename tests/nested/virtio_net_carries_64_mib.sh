# limit: 900
# long
# A virtio-net at a tap of L1, behind the unit (strict): 64 MiB come, and as many go, with the right checksum, and nothing faults.
. /causeway/files/lib.sh
. /causeway/files/net-lib.sh

tap
mark
carry net 1 "intel_iommu=on iommu.strict=1" --device virtio-net,tap=tap0,mac=52:54:00:12:34:56
expect "the address" "$(lines net 'address ')" 52:54:00:12:34:56
expect "the domain" "$(lines net 'domain ')" DMA
no_faults net
expect "pins that were refused, left or late" "$(($(field net.json refused) + $(field net.json left_pinned) + $(field net.json late)))" 0
