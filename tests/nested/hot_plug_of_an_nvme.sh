#!/bin/sh
# An assigned NVMe comes while the guest runs, reads right behind the IOMMU, goes when the guest is asked for it, and comes again, while an edu
# behind another root port does I/O all the time. When it is gone, nobody has its VFIO group open.
# limit: 600
# long
. /causeway/files/lib.sh
. /causeway/files/plug-lib.sh

group_is_closed() {
    group=$(basename "$(readlink "/sys/bus/pci/devices/$NVME/iommu_group")")
    ! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q "/dev/vfio/$group\$"
}

bind-vfio "$NVME" || fail "binding"
{
    echo "$PLUG_GUEST"
    cat <<'GUEST'
modprobe -a nvme vfio-pci vfio_iommu_type1
edu-vfio --bdf 0000:02:00.0 busy /stop &
echo "ready"
for round in 1 2; do
    until_so "[ -b /dev/nvme0n1 ]"
    checksum direct
    echo "read $round in the group of $(ls /sys/bus/pci/devices/0000:01:00.0/iommu_group/devices | wc -l)"
    until_so "[ ! -e /sys/bus/pci/devices/0000:01:00.0 ]"
    echo "lost $round"
done
touch /stop
wait $! || fail "the edu beside it stopped"
show_faults
GUEST
} | guest plug
mark
start plug intel_iommu=on --root-ports 2 --device edu,port=2 --socket "$SOCKET" &
printed ready 90
for round in 1 2; do
    ctl add --device vfio,host="$NVME",id=disk,port=1 || { cat plug.err; fail "adding"; }
    refused "is a device of this machine already" add --device vfio,host="$NVME"
    printed "read $round in the group of 1" 90
    ctl remove disk || fail "removing"
    printed "lost $round" 60
    is_gone disk
    wait_until 5 group_is_closed || fail "its group is still open"
done
ended
expect "the checksums" "$(lines plug 'sha256 ' | sort -u)" "$DISK_SHA256"
expect "how many" "$(lines plug 'sha256 ' | wc -l)" 2
cat plug.err
