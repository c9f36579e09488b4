# limit: 180
# What a function sends without a right to it reaches nobody, and becomes a fault record of the unit with the index and the cause when it
# fires: a message in compatibility format, one by another function's entry, one by an entry that is not there, one beyond the table.
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
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
# The buffer holds zeros: a write of them to an address that has the index.
by_dma() {
    devmem $((bar + 0x80)) 32 0x40000
    devmem $((bar + 0x88)) 32 $address
    devmem $((bar + 0x90)) 32 4
    devmem $((bar + 0x98)) 32 3
}
# The entry of the serial port's pin, 4: bits 63:49 of what the IOAPIC has for it.
devmem 0xfec00000 32 0x19
serial=$(($(devmem 0xfec00010 32) >> 17))
[ "$serial" -gt 0 ] || fail "the serial port has no entry"
for function in /sys/bus/pci/devices/*; do
    [ "$(cat "$function/vendor"):$(cat "$function/device")" = 0x1234:0x11e8 ] || continue
    name=${function##*/}
    bar=$(bar_of "$name")
    put_config "$name" 4 2 6
    msi=$((0x$(dd if="$function/config" bs=1 skip=52 count=1 2>/dev/null | od -An -tx1 | tr -d ' ')))
    # send ADDRESS DATA: is its message from now on.
    send() {
        put_config "$name" $((msi + 4)) 4 $1
        put_config "$name" $((msi + 8)) 4 0
        put_config "$name" $((msi + 12)) 2 $2
        put_config "$name" $((msi + 2)) 1 0x81
    }
    raise() { by_message; }
    device="Request device [${name#*:}] fault index"
    send 0xfee00000 0x41
    raise_until "$device 0x0 [fault reason 0x25]"
    send $((0xfee00010 | serial << 5)) 0
    raise_until "$device 0x$(printf %x $serial) [fault reason 0x26]"
    send $((0xfee00010 | 0x7000 << 5)) 0
    raise_until "$device 0x7000 [fault reason 0x22]"
    send 0xfeeffffc 0x10 # 0xffff + 0x10
    raise_until "$device 0xffff [fault reason 0x21]"
    put_config "$name" $((msi + 2)) 1 0x80
    echo "blocked: messages of $name"
done
# The last one is emulated. Its buffer holds zeros.
[ "$(devmem $((bar + 0x98)) 64)" = 0x0000000000000000 ] || fail "edu is not idle"
raise() { by_dma; }
dmesg -c >/dev/null
address=0xfee00000
raise_until "$device 0x0 [fault reason 0x25]"
address=$((0xfee00010 | 0x7000 << 5))
raise_until "$device 0x7000 [fault reason 0x22]"
echo "blocked: DMA of $name"
dmesg | grep -q 'spurious\|No irq handler' && fail "a blocked interrupt arrived"
true
GUEST
run blocked "intel_iommu=on iomem=relaxed" --device vfio,host="$EDU" --device edu
expect "what was blocked" "$(lines blocked 'blocked: ' | wc -l)" 3
expect_line blocked.json '"0x21":' '"0x22":' '"0x25":' '"0x26":'
grep -oE '"faults":\{[^}]*\}' blocked.json
