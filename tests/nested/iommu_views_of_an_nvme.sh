# What `causeway ctl PATH iommu` shows of a guest that reads its NVMe: its tables, and what it was granted beside what the host holds, without
# a difference, while it reads and while it is paused.
# limit: 240
. /causeway/files/lib.sh

bind-vfio "$NVME" || fail "binding"
guest shown <<'GUEST'
wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
echo "reading"
until [ -e /over ]; do
    blkread /dev/nvme0n1 direct 65536 16 --sha256 || exit 1
done &
reader=$!
sleep 20
touch /over
wait $reader || fail "reading the disk"
checksum direct
show_faults
GUEST

# shown VIEW OPTIONS...: in the file VIEW.shown, and no difference.
shown() {
    causeway ctl control iommu "$@" >"$1.shown" || { cat "$1.shown"; fail "iommu $*: status $?"; }
}

look() {
    trap '[ $? = 0 ] || causeway ctl control quit' EXIT
    wait_until 60 grep -qs '^reading' shown.log || fail "the guest does not read"
    number=0
    until [ $number = 10 ]; do
        number=$((number + 1))
        shown mappings
        expect_line mappings.shown ': unit0/domain.*, held by type1$' '^[0-9]* runs, 0 differences$'
        shown tables --device vfio0
    done
    causeway ctl control pause >/dev/null || fail "pausing"
    shown tables
    expect_line tables.shown '^translation is on, legacy mode, root table 0x' '^00:01.0 vfio0, domain [0-9]*, second stage at 0x' ' rw  *[0-9]* x 4K '
    shown mappings
    expect_line mappings.shown '^    0x[0-9a-f]*-0x[0-9a-f]* *0x[0-9a-f]* rw$' '^[0-9]* runs, 0 differences$'
    shown mappings --json
    expect_line mappings.shown '"complete":true' '"differences":0'
    shown tables --json
    expect_line tables.shown '"complete":true' '"stage":"second"'
    causeway ctl control resume >/dev/null || fail "resuming"
    echo "shown to the end"
}

mark
look >looking 2>&1 &
looking=$!
run shown "intel_iommu=on iommu.strict=1" --device vfio,host="$NVME" --socket control
wait $looking || { cat looking; fail "looking at the guest"; }
cat looking
expect "the checksum" "$(lines shown 'sha256 ' | sort -u | grep -c "$DISK_SHA256")" 1
no_faults shown
