# topology: slot
# Two functions that only a reset of their bus resets: it is done before the guest starts, when it resets and at the end, with
# both of them quiet, and both
# work afterwards.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh

bind-vfio "$EDU" "$EDU2" || fail "binding"
guest life <<'GUEST'
for device in /sys/bus/pci/devices/*; do
    [ "$(cat "$device/device")" = 0x11e8 ] || continue
    # Memory Enable and Bus Master. What is written to the second register is read inverted.
    put_config "${device##*/}" 4 2 6
    devmem $(($(bar_of "${device##*/}") + 4)) 32 0x12345678
    echo "inverted $(devmem $(($(bar_of "${device##*/}") + 4)) 32)"
done
echo "ready"
read -r answer </dev/ttyS0
[ "$answer" = off ] || reboot -f
GUEST
mkfifo answers
{ wait_until 60 ready 1 && echo reboot && wait_until 60 ready 2 && echo off; } >answers &
mark
count_host_operations
INPUT=answers run life "intel_iommu=off" --device vfio,host="$EDU" --device vfio,host="$EDU2"
grep 'is reset' life.err
expect_line life.err "$EDU is reset with its bus, which $EDU2 share" "$EDU2 is reset with its bus, which $EDU share"
expect "guest_resets" "$(field life.json guest_resets)" 1
expect "what edu said" "$(lines life 'inverted ' | sort | uniq -c | awk '{ print $1, $2 }')" "4 0xEDCBA987"
no_faults life
# Each of the functions at each of the three resets. One container is that of both, and both have its numbers. See same_counts for the rest.
expect "maps, and resets of the bus" "$(host_operations 3b71)" $(($(field life.json host_maps) / 2 + 6))
