# The bench itself: edu and NVMe work in L1, through its kernel's VFIO and its own NVMe driver, so that a failure above them is Causeway's.
. /causeway/files/lib.sh

unbind-vfio "$NVME"
echo "$NVME" >/sys/bus/pci/drivers_probe
modprobe nvme
wait_until 20 [ -b /dev/nvme0n1 ] || fail "no NVMe disk in L1"
blkread /dev/nvme0n1 direct 1048576 64 --sha256 >nvme.log || fail "reading the disk"
expect "the checksum" "$(lines nvme 'sha256 ')" "$DISK_SHA256"
echo "NVMe: 64 MiB read right in $(lines nvme 'seconds ') s"
unbind-vfio "$NVME"

bind-vfio "$EDU" || fail "binding"
for scenario in roundtrip msi outside armed readonly; do
    edu-vfio --bdf "$EDU" --expect-fault $scenario || fail "edu-vfio $scenario"
done
for scenario in big "loop 20"; do
    # shellcheck disable=SC2086
    edu-vfio --bdf "$EDU" $scenario || fail "edu-vfio $scenario"
done
