# A triple fault while an NVMe and an edu are under DMA ends the VMM with status 8; the devices are quiet and open again at once.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
{ guest_functions && cat <<'GUEST'; } | guest faulted
checksum buffered
work_begins nvme edu
show_faults
echo c >/proc/sysrq-trigger
GUEST
for round in 1 2; do
    mark
    count_host_operations
    start faulted "intel_iommu=on reboot=t" --device vfio,host="$NVME" --device vfio,host="$EDU" --cpus 2
    expect "the status after a triple fault" $STATUS 8
    expect_line faulted.err 'triple fault'
    expect_line faulted.json '"reason": *"crash"'
    expect "the checksum of round $round" "$(lines faulted 'sha256 ')" "$DISK_SHA256"
    sound faulted 1
done
