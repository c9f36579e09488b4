# topology: ports
# long
# limit: 1200
# A guest resets its NVMe and its e1000e, each behind a root port of its own, 20 times each: the NVMe by function level reset and while it is read,
# the e1000e with its bus. The right bytes are read and requests are answered before the first reset and after each, without a fault.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh

bind-vfio "$NVME" "$E1000E" || fail "binding"
igb_up
{ guest_functions && echo "ROUNDS=20" && cat <<'GUEST'; } | guest resets
nvme=$(function_of 0x1b36:0x0010)
e1000e=$(function_of 0x8086:0x10d3)
# reset FUNCTION METHOD
reset() {
    path=/sys/bus/pci/devices/$1
    echo "$2" >"$path/reset_method" || fail "$1 has no reset by $2: $(cat "$path/reset_method")"
    echo 1 >"$path/reset" || fail "the reset of $1"
}
read_some() { blkread /dev/nvme0n1 direct 65536 16 --sha256 >/read && sed -n 's/^sha256 //p' /read; }
reads() { wc -l </reads; }

wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
network_up
answers 20
touch /reads
{ until [ -e /work-over ]; do read_some >>/reads || exit 1; done; } &
reader=$!
for round in $(seq $ROUNDS); do
    before=$(reads)
    until [ "$(reads)" -gt "$before" ]; do usleep 50000; done
    reset "$nvme" flr
    # The one under way may have been read before the reset; the next one was not.
    before=$(reads)
    until [ "$(reads)" -gt $((before + 1)) ]; do
        kill -0 $reader || fail "reading the disk after reset $round"
        usleep 50000
    done
    # Its driver does not expect it to be reset while it is up.
    ip link set "$wire" down
    reset "$e1000e" bus
    ip link set "$wire" up
    reached
    answers 20
    echo "reset: $round"
done
touch /work-over
wait $reader || fail "reading the disk"
ip link set "$wire" down
echo "reads: $(sort -u /reads | tr '\n' ' ')"
dmesg | grep -E 'nvme.*(timeout|completion polled)' && fail "a command was lost"
show_faults
GUEST
mark
count_host_operations
run resets "intel_iommu=on" --cpus 2 --root-ports 2 --device vfio,host="$NVME",port=1 --device vfio,host="$E1000E",port=2
expect "resets" "$(lines resets 'reset: ' | wc -l)" 20
expect "what was read" "$(lines resets 'reads: ')" "$(echo "$DISKS" | tr ' ' '\n' | sed -n 's/^nvme://p') "
no_faults resets
expect_line resets.err "no difference"
