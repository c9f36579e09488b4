# limit: 360
# Two vCPUs read the NVMe at random, each map and unmap of a page at once the host's (strict mode): every read is right, the VMM's memory
# stays flat after the first 10 s, and the audit agrees whenever the reads pause.
#
# The measure is RssAnon of the whole process. The guest's RAM does not grow in it (where it is not shared memory, which counts elsewhere):
# before the guest turned translation on, all of it was pinned for the device, so each page of it is there from the start.
. /causeway/files/lib.sh

ROUNDS=${ROUNDS:-2}
SECONDS_EACH=${SECONDS_EACH:-10}
MEMORY=512
bind-vfio "$NVME" || fail "binding"
{ echo "ROUNDS=$ROUNDS SECONDS_EACH=$SECONDS_EACH" && cat <<'GUEST'; } | guest random "$(command -v randread)"
wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
echo "reads begin"
for round in $(seq $ROUNDS); do
    randread /dev/nvme0n1 --mib 64 --seconds $SECONDS_EACH --threads 2 --seed $round || fail "reading"
    echo "pause $round"
    read -r answer
    [ "$answer" = "go on" ] || fail "the answer is '$answer'"
done
! dmesg | grep -iE 'nvme.*(timeout|polled|error)|blk_update|I/O error' || fail "the driver complains"
show_faults
GUEST

audits() { [ "$(grep -c 'audit:.* pending' random.err)" -ge "$1" ]; }
paused() { grep -q "^pause $1" random.log || ! kill -0 $vmm; }
resident() { awk '/^VmRSS:/ { print $2 }' /proc/$vmm/status; }
anonymous() { awk '/^RssAnon:/ { print $2 }' /proc/$vmm/status; }

mark
mkfifo answers || fail "mkfifo"
causeway run --kernel "$KERNEL" --initrd random.cpio --memory ${MEMORY}M --cpus 2 --timeout "$(time_left)" \
    --cmdline "$GUEST_CMDLINE intel_iommu=on iommu.strict=1" --device vfio,host="$NVME" --stats random.json \
    <answers >random.log 2>random.err &
vmm=$!
# Kept open, so that the guest's input does not end.
exec 3>answers
wait_until 40 grep -qs '^reads begin' random.log || { tail -n 40 random.log random.err; fail "no guest"; }
# What the VMM takes for its work, it has after 10 s.
usleep 10000000
first=$(anonymous)
[ "$(resident)" -ge $((MEMORY * 1024)) ] || fail "$(resident) KiB are resident: RAM that is not there yet would be counted as growth"
for round in $(seq "$ROUNDS"); do
    if ! wait_until $((SECONDS_EACH + 40)) paused "$round" || ! grep -q "^pause $round" random.log; then
        tail -n 40 random.log random.err
        fail "round $round does not end"
    fi
    kill -USR1 $vmm || fail "the VMM is gone"
    wait_until 10 audits "$round" || { tail random.err; fail "no audit $round"; }
    audit=$(grep 'audit:.* pending' random.err | tail -n 1)
    now=$(anonymous)
    echo "round $round: $(lines random 'reads ' | tail -n 1) reads, RssAnon $now KiB, $audit"
    case $audit in *" 0 pending, no difference") ;; *) fail "the reads pause, and the audit does not agree" ;; esac
    expect_at_most "growth of RssAnon in KiB" $((now - first)) 1023
    echo "go on" >&3
done
wait $vmm
status=$?
[ $status = 0 ] && grep -q 'guest: exit 0' random.log || { tail -n 40 random.log random.err; fail "the guest: status $status"; }
expect "the checksums" "$(lines random 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "$ROUNDS $DISK_SHA256"
[ "$(field random.json host_maps)" -ge "$(lines random 'reads ' | awk '{ n += $1 } END { print n }')" ] || fail "reads without a map of their own"
! grep 'audit:' random.err | grep -v 'pending, no difference' || fail "an audit with a difference"
grep -q '"differences": *\[\]' random.json || fail "a difference at the end"
expect "splits" "$(field random.json splits)" 0
no_faults random
