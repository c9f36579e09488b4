# A guest whose NVMe is under DMA is steered by `causeway ctl`: status, audits, a pause in the middle of its reading, a reset, and the power
# button, at which the guest's own program has it power off.
# limit: 480
. /causeway/files/lib.sh

bind-vfio "$NVME" || fail "binding"
guest steered <<'GUEST'
checksum buffered
# Some kernels have them built in.
for module in button evdev; do modprobe $module; done
for event in /sys/class/input/event*; do
    [ "$(cat "$event/device/name")" = "Power Button" ] && button=/dev/input/${event##*/}
done
[ -n "${button:-}" ] && wait-for "$button" 20 || fail "no power button"
{
    number=0
    until [ -e /over ]; do
        number=$((number + 1))
        sum=$(blkread /dev/nvme0n1 direct 65536 16 --sha256) || exit 1
        echo "reading $number $(echo "$sum" | sed -n 's/^sha256 //p')"
    done
} &
reader=$!
# struct input_event: the time, then type, code and value.
dd if="$button" bs=24 count=1 2>/dev/null | hexdump -v -e '24/1 "%02x " "\n"' | cut -d' ' -f17-24 | sed 's/^/key /'
touch /over
wait $reader || fail "reading the disk"
checksum direct
show_faults
GUEST

# A reset may come in the middle of a line, which the next boot then goes on with.
boots() { [ "$(grep -c 'guest: init at' steered.log)" -ge "$1" ]; }
# readings: how many there were since the last boot.
readings() { awk '/guest: init at/ { n = 0 } /^reading/ { n++ } END { print n + 0 }' steered.log; }
more_readings() { [ "$(readings)" -ge "$1" ]; }

# ask VERB: the reply, in the file VERB.reply.
ask() { causeway ctl control "$1" >"$1.reply" || fail "ctl $1: status $?"; }

# asked VERB WANTED
asked() {
    ask "$1"
    expect "the reply to $1" "$(cat "$1.reply")" "$2"
}

# audited: an audit without a difference that compared something.
audited() {
    ask audit
    grep -q '"differences":\[\]' audit.reply || { cat audit.reply; fail "an audit with a difference"; }
    [ "$(field audit.reply checked)" -gt 0 ] || fail "an audit that compared nothing"
}

steer() {
    trap '[ $? = 0 ] || causeway ctl control quit' EXIT
    wait_until 60 more_readings 2 || fail "the guest does not read"
    ask status
    expect_line status.reply '"exit":null' '"state":"running"' '"kind":"vfio"' '"backend":"type1"'
    [ "$(field status.reply host_maps)" -gt 0 ] || fail "the status has no host operations"
    ask devices
    expect_line devices.reply "^\{\"devices\":\[\{.*\"host\":\"$NVME\".*\]\}$"
    for _ in 1 2 3; do audited; done
    ask status
    expect "comparisons of the last audit in the status" "$(field status.reply checked)" "$(field audit.reply checked)"

    asked pause '{"state":"paused"}'
    # What the guest printed before is out.
    sleep 1
    printed=$(wc -c <steered.log)
    ask status
    maps=$(field status.reply host_maps)
    for _ in 1 2 3; do
        audited
        sleep 1
    done
    asked pause '{"state":"paused"}'
    ask status
    expect_line status.reply '"state":"paused"'
    expect "the output of a paused guest" "$(wc -c <steered.log)" "$printed"
    expect "the host maps of a paused guest" "$(field status.reply host_maps)" "$maps"
    before=$(readings)
    asked resume '{"state":"running"}'
    wait_until 60 more_readings $((before + 3)) || fail "the guest does not read on"
    audited
    asked trace '{"trace":"steered.trace"}'
    expect_line steered.trace 'host ledger container='

    asked reset '{"state":"running"}'
    wait_until 60 boots 2 && wait_until 60 more_readings 2 || fail "the guest is not up again"
    audited
    ask status
    expect "guest_resets" "$(field status.reply guest_resets)" 1
    asked power-button '{"state":"running"}'
    echo "steered to the end"
}

mark
count_host_operations
steer >steering 2>&1 &
steering=$!
run steered intel_iommu=on --device vfio,host="$NVME" --socket control --trace steered.trace
wait $steering || { cat steering; fail "steering the guest"; }
cat steering
[ ! -e control ] || fail "the socket is left behind"
causeway ctl control status
expect "the status of ctl without a machine" $? 4

expect "the key" "$(lines steered 'key ')" "01 00 74 00 01 00 00 00"
expect "the checksums" "$(lines steered 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "3 $DISK_SHA256"
expect "different readings" "$(lines steered 'reading ' | grep -E '^[0-9]+ [0-9a-f]{64}$' | cut -d' ' -f2 | sort -u | wc -l)" 1
no_faults steered
same_counts steered
echo "$(lines steered 'reading ' | wc -l) readings of 1 MiB, paused for 4 s, reset, and ended by the power button"
