# The guest's tables, the shadow and the ledger agree: while the guest reads its NVMe and maps and unmaps for an edu at random, with each
# unmap invalidated at once, and at the end. The trace has a line for each host operation.
. /causeway/files/lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
guest busy <<'GUEST'
wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
edu 'loop 30' &
loop=$!
echo "reading"
checksum direct
blkread /dev/nvme0n1 direct 4096 500 || fail "reading"
checksum buffered
wait $loop || fail "the edu"
echo "done"
show_faults
GUEST

# audits NUMBER: that many were said.
audits() { [ "$(grep -c 'audit:.* pending' busy.err)" -ge "$1" ]; }

mark
count_host_operations
# The guest in front, and behind it whoever asks for audits.
{
    wait_until 40 grep -q '^reading' busy.log || exit 1
    number=0
    until grep -q '^done\|^guest: exit' busy.log; do
        number=$((number + 1))
        kill -USR1 "$(cat pid)" || exit 1
        wait_until 20 audits $number || exit 1
        # The file comes after the line.
        [ $number != 1 ] || { wait_until 20 test -e busy.json && cp busy.json first.json; } || exit 1
        usleep 100000
    done
    echo "$number audits while the guest was busy"
    [ $number -ge 3 ]
} >asking 2>&1 &
asking=$!
# shellcheck disable=SC2016
sh -c 'echo $$ >pid; exec causeway run "$@"' sh --kernel "$KERNEL" --initrd busy.cpio --memory 512M --timeout "$(time_left)" \
    --cmdline "$GUEST_CMDLINE intel_iommu=on iommu.strict=1 vfio_iommu_type1.allow_unsafe_interrupts=1" \
    --device vfio,host="$NVME" --device vfio,host="$EDU" --stats busy.json --trace busy.trace </dev/null >busy.log 2>busy.err
status=$?
wait $asking || { cat asking; tail busy.log busy.err; fail "the audits in the middle"; }
[ $status = 0 ] && grep -q 'guest: exit 0' busy.log || { tail -n 40 busy.log busy.err; fail "the guest: status $status"; }
expect "the checksums" "$(lines busy 'sha256 ' | sort -u)" "$DISK_SHA256"
# The edu also aims at what is not mapped; only that may fault, and only in the host.
! host_faults | grep -v -e 'handling fault status' -e "\[${EDU#*:}\]" || fail "faults of another device in the host's log"
expect "fault lines in the guest's log" "$(lines busy 'guest-fault: ')" ""

cat asking
grep 'audit:' busy.err
! grep 'audit:' busy.err | grep -v 'pending, no difference' || fail "an audit with a difference"
for file in first.json busy.json; do
    grep -q '"differences": *\[\]' $file || fail "a difference in $file"
    [ "$(field $file checked)" -gt 0 ] || fail "nothing was compared in $file"
done
grep -q '"exit": *null' first.json || fail "the statistics of a running guest say that it ended"
expect "pending at the end" "$(field busy.json pending)" 0

expect "traced maps" "$(grep -c '^[0-9.]* host map ' busy.trace)" "$(host_operations 3b71)"
expect "traced unmaps" "$(grep -c '^[0-9.]* host unmap ' busy.trace)" "$(host_operations 3b72)"
