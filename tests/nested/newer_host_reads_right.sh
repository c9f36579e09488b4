# On a host with a newer kernel and a newer emulated machine, and less memory, the guest reads the assigned NVMe right.
# host: new
# memory: 3G
. /causeway/files/lib.sh

release=$(uname -r)
[ "${release%%.*}" -ge 7 ] || fail "L1's kernel is $release"
memory=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)
[ "$memory" -gt 2500000 ] && [ "$memory" -le 3145728 ] || fail "of 3 GiB L1 has $memory KiB"
nvme_reads_right DMA "intel_iommu=on iommu.strict=1"
