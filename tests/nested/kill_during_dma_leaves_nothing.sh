# limit: 480
# SIGKILL while the guest reads its NVMe and copies with its edu, again and again: each time the next start on the same devices succeeds at
# once, the pages that were pinned are not, and L1's kernel has nothing to say.
. /causeway/files/lib.sh

ROUNDS=${ROUNDS:-3}
MEMORY=512
bind-vfio "$NVME" "$EDU" || fail "binding"
guest busy "$(command -v randread)" <<'GUEST'
wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
{ edu-vfio busy /work-over || echo "FAIL: edu"; } &
{ randread /dev/nvme0n1 --mib 8 --seconds 1000 --threads 2 || echo "FAIL: random reads"; } &
while :; do blkread /dev/nvme0n1 direct 1048576 16 && echo "reading" || echo "FAIL: reads"; done
GUEST
guest last <<'GUEST'
checksum direct
edu roundtrip msi
show_faults
GUEST

# pinned acquired|now: pages that the kernel has pinned for DMA since it started, or holds now. Each processor counts by itself, and its
# numbers are added up only now and then unless that is asked for: without it some 15 pages were seen too many after a kill.
pinned() {
    echo 1 >/proc/sys/vm/stat_refresh || fail "the counters cannot be brought up to date"
    awk '/^nr_foll_pin_acquired / { acquired = $2 } /^nr_foll_pin_released / { released = $2 }
        END { print "'"$1"'" == "now" ? acquired - released : acquired }' /proc/vmstat
}

# complaints: what L1's kernel said since the mark that is not said at every start.
complaints() {
    dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' |
        grep -iE 'DMAR|BUG|WARNING|Oops|Call Trace|error|fail|timed? ?out|stuck|leak|refcount|iommu'
}

mark
pinned_before=$(pinned now)
state_before=$(host_state)
for round in $(seq "$ROUNDS"); do
    acquired_before=$(pinned acquired)
    # What the last guest wrote must not be taken for this one's.
    rm -f busy.log
    causeway run --kernel "$KERNEL" --initrd busy.cpio --cmdline "$GUEST_CMDLINE intel_iommu=on iommu.strict=$((round % 2))" --cpus 2 \
        --memory ${MEMORY}M --device vfio,host="$NVME" --device vfio,host="$EDU" --timeout "$(time_left)" </dev/null >busy.log 2>busy.err &
    pid=$!
    wait_until 40 grep -qs '^reading' busy.log || { tail busy.log busy.err; fail "round $round: the guest does not read"; }
    # Another moment each time.
    usleep $((round * 37 % 11 * 30000))
    pinned_meanwhile=$(pinned now)
    kill -KILL $pid || fail "round $round: the VMM ended by itself"
    wait $pid 2>/dev/null
    pinned_after=$(pinned now)
    acquired=$(($(pinned acquired) - acquired_before))
    echo "round $round: $acquired pages were pinned in all, $pinned_meanwhile before the kill, $pinned_after after it"
    ! grep 'FAIL' busy.log || fail "round $round: before it was killed"
    # The counters do count what is pinned for the guest: all of its memory, once, and what it reads into.
    [ $acquired -gt $((MEMORY * 256)) ] && [ "$pinned_meanwhile" -gt "$pinned_before" ] || fail "round $round: too few pages were pinned"
    expect "pinned pages after SIGKILL" "$pinned_after" "$pinned_before"
    expect "what is there after SIGKILL" "$(host_state)" "$state_before"
done
run last "intel_iommu=on" --device vfio,host="$NVME" --device vfio,host="$EDU"
expect "the checksum" "$(lines last 'sha256 ')" "$DISK_SHA256"
no_faults last
expect "pinned pages after the last guest" "$(pinned now)" "$pinned_before"
! complaints || fail "L1's kernel complained"
