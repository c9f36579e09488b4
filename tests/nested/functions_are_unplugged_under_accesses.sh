# topology: zoo
# long
# limit: 900
# Two vCPUs access registers of a function behind a root port while a third disables and enables its memory, resets it, and has it go from its
# slot and come again: by turns the guest takes the slot's power, and the function is taken from the machine by its control socket. What is written
# while nobody is there is not there afterwards, reads give ones, and the host sees no fault. An edu, and virtual functions of igb and of an NVMe.
. /causeway/files/lib.sh
. /causeway/files/plug-lib.sh
. /causeway/files/zoo-lib.sh

virtual_functions
bind-vfio "$EDU" "$IGB_VF" "$NVME_VF" || fail "binding"
{
    echo "$PLUG_GUEST"
    cat <<'GUEST'
# Nobody else has the function, and nobody takes it when it comes again.
rmmod nvme 2>/dev/null
echo 0 >/sys/bus/pci/drivers_autoprobe
modprobe pciehp 2>/dev/null
hammered() {
    echo "hammering $1"
    bar-hammer "$@" --seconds 20 --reset-every 3 --unplug-every 4 --times 24 || fail "$1"
}
hammered 0000:01:00.0 --slot 1 --register 80 --register 88
hammered 0000:02:00.0 --slot 2 --register 2800 --register 3800
hammered 0000:03:00.0 --slot 3 --register 28 --register 30
show_faults
GUEST
} | guest plug "$(command -v bar-hammer)"
mark
start plug "intel_iommu=off iomem=relaxed" --cpus 3 --root-ports 3 --socket "$SOCKET" --device vfio,host="$EDU",port=1,id=of1 \
    --device vfio,host="$IGB_VF",port=2,id=of2 --device vfio,host="$NVME_VF",port=3,id=of3 &
number=0
for host in "$EDU" "$IGB_VF" "$NVME_VF"; do
    number=$((number + 1))
    printed "hammering 0000:0$number:00.0" 90
    # Of six times every other one.
    for round in 2 4 6; do
        said() { [ "$(tr -d '\r' <plug.log | grep -c "^bar-hammer: $round $1")" = $number ]; }
        wait_until 60 said remove || { tail -n 40 plug.log; cat plug.err; fail "nobody asks for $host to go the $round. time"; }
        ctl remove of$number || fail "removing $host"
        is_gone of$number
        is_closed_for() { ! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qE "/dev/vfio/$(basename "$(readlink "/sys/bus/pci/devices/$host/iommu_group")")\$"; }
        wait_until 5 is_closed_for || fail "the group of $host is still open"
        wait_until 60 said add || { tail -n 40 plug.log; cat plug.err; fail "nobody asks for $host to come the $round. time"; }
        ctl add --device vfio,host="$host",port=$number,id=of$number || { cat plug.err; fail "adding $host"; }
    done
done
ended
lines plug 'bar-hammer: disabled' | tee hammered
expect "functions" "$(wc -l <hammered)" 3
expect "functions that were reset and unplugged often" "$(grep -cE 'reset [1-9][0-9]* times, unplugged ([6-9]|[1-9][0-9]+) times' hammered)" 3
! dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -E 'BUG|Oops|WARNING|restoring BARs' || fail "the host's kernel"
