# limit: 480
# What a function sends without a right to it reaches nobody, and becomes a fault record of the unit with the index and the cause when it
# fires: a message in compatibility format, one by another function's entry, one by an entry that is not there, one beyond the table. By an
# entry of its own it reaches who it is for, once. Of an assigned and of an emulated edu, and of the latter also what it writes by DMA.
. /causeway/files/lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
guest blocked <<'GUEST'
# raise_until LINE: Linux prints three faults in 5 s and drops the others.
raise_until() {
    for try in $(seq 40); do
        raise
        usleep 500000
        dmesg | grep -F "$1" >/dev/null && return
    done
    dmesg | grep DMAR | tail -n 5
    fail "no line with '$1'"
}
by_message() {
    devmem $((bar + 0x60)) 32 1
    devmem $((bar + 0x64)) 32 1
}
by_dma() { edu-vfio --bdf "$name" message "$address" "$data" || fail "edu-vfio message $address $data"; }
# byte OFFSET (a sum, too): of the function's configuration space.
byte() { echo $((0x$(dd if="$function/config" bs=1 skip=$(($*)) count=1 2>/dev/null | od -An -tx1 | tr -d ' '))); }
# capability ID: where it is.
capability() {
    at=$(byte 52)
    until [ "$(byte $at)" = $1 ]; do
        at=$(byte $at + 1)
        [ $at != 0 ] || fail "no capability $1"
    done
    echo $at
}
# send ADDRESS DATA: is the function's message from now on.
send() {
    put_config "$name" $((msi + 4)) 4 $1
    put_config "$name" $((msi + 8)) 4 0
    put_config "$name" $((msi + 12)) 2 $2
    put_config "$name" $((msi + 2)) 1 0x81
}

wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
# An entry of NVMe's, whose interrupt comes only with a command of the administrator's: its index is in the first entry of the MSI-X table.
function=/sys/bus/pci/devices/$(function_of 0x1b36:0x0010)
table=$(capability 17)
table=$(($(bar_of "${function##*/}") + ($(byte $table + 4) & ~7) + ($(byte $table + 5) << 8)))
message=$(($(devmem $table 32)))
foreign=$((message >> 5 & 0x7fff | (message >> 2 & 1) << 15))
[ $((message & 0x10)) != 0 ] && [ $foreign -gt 0 ] || fail "NVMe's message is $message"
before=$(interrupts nvme0q0)

names=
for function in /sys/bus/pci/devices/*; do
    [ "$(cat "$function/vendor"):$(cat "$function/device")" = 0x1234:0x11e8 ] || continue
    name=${function##*/}
    names="$names $name"
    bar=$(bar_of "$name")
    put_config "$name" 4 2 6
    msi=$(capability 5)
    raise() { by_message; }
    device="Request device [${name#*:}] fault index"
    send 0xfee00000 0x41
    raise_until "$device 0x0 [fault reason 0x25]"
    send $((0xfee00010 | foreign << 5)) 0
    raise_until "$device 0x$(printf %x $foreign) [fault reason 0x26]"
    send $((0xfee00010 | 0x7000 << 5)) 0
    raise_until "$device 0x7000 [fault reason 0x22]"
    send 0xfeeffffc 0x10 # 0xffff + 0x10
    raise_until "$device 0xffff [fault reason 0x21]"
    put_config "$name" $((msi + 2)) 1 0x80
    echo "blocked: messages of $name"
done

# The last one is emulated.
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
dmesg -c >/dev/null
raise() { by_dma; }
address=0xfee00000 data=0x41
raise_until "$device 0x0 [fault reason 0x25]"
address=$(printf 0x%x $((0xfee00010 | foreign << 5))) data=0
raise_until "$device 0x$(printf %x $foreign) [fault reason 0x26]"
address=$(printf 0x%x $((0xfee00010 | 0x7000 << 5)))
raise_until "$device 0x7000 [fault reason 0x22]"
address=0xfeeffffc data=0x10
raise_until "$device 0xffff [fault reason 0x21]"
echo "blocked: DMA of $name"
dmesg | grep 'spurious\|No irq handler' && fail "a blocked interrupt arrived"
[ "$(interrupts nvme0q0)" = "$before" ] || fail "NVMe's interrupt: $before before, $(interrupts nvme0q0) after"

dmesg -c >/dev/null
for each in $names; do
    edu-vfio --bdf "$each" msi || fail "MSI of $each"
done
edu-vfio --bdf "$name" msi-by-dma || fail "MSI of $name by DMA"
show_faults
GUEST
mark
run blocked "intel_iommu=on iomem=relaxed" --device vfio,host="$NVME" --device vfio,host="$EDU" --device edu
expect "what was blocked" "$(lines blocked 'blocked: ' | wc -l)" 3
expect_line blocked.json '"0x21":' '"0x22":' '"0x25":' '"0x26":'
grep -oE '"faults":\{[^}]*\}' blocked.json
expect "MSIs of both" "$(lines blocked 'msi: ' | grep -c arrived)" 4
expect_line blocked.log '^msi-by-dma: .* arrived twice, for two'
no_faults blocked
