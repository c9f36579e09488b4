# Runs a guest under Causeway or, beside it, under QEMU, and measures from outside. Sourced by scripts that run in L1.

GUEST_CMDLINE="console=ttyS0 quiet mitigations=off tsc=reliable panic=-1"
IOCTLS=/sys/kernel/tracing/events/syscalls/sys_enter_ioctl
MAP_DMA=3b71
UNMAP_DMA=3b72

# boot NAME VMM INITRD KERNEL-OPTIONS BDF: a guest of 512 MiB with that function behind a VT-d. Its console goes to NAME.log, messages to
# NAME.err, our statistics to NAME.json. Sets STATUS, INIT (seconds from start to the guest's init), MAPS and UNMAPS (the host operations
# as L1's kernel counts them).
boot() {
    rm -f "$1.fifo" "$1.json"
    mkfifo "$1.fifo"
    echo '!hist:keys=cmd.hex' >"$IOCTLS/trigger" 2>/dev/null
    echo 'hist:keys=cmd.hex:size=256' >"$IOCTLS/trigger"
    read -r from rest </proc/uptime
    case "$2" in
    causeway)
        timeout 120 causeway run --kernel "$KERNEL" --initrd "$3" --cmdline "$GUEST_CMDLINE $4" --memory 512M --cpus 1 \
            --device "vfio,host=$5" --stats "$1.json" </dev/null >"$1.fifo" 2>"$1.err" &
        ;;
    qemu)
        timeout 120 qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -accel kvm -machine q35,kernel-irqchip=split -cpu host \
            -smp 1 -m 512 -display none -serial stdio -device intel-iommu,intremap=off,caching-mode=on,aw-bits=48 \
            -device "vfio-pci,host=$5" -kernel "$VMLINUZ" -initrd "$3" -append "$GUEST_CMDLINE $4" </dev/null >"$1.fifo" 2>"$1.err" &
        ;;
    esac
    process=$!
    INIT=
    while IFS= read -r line; do
        case "$line" in *"guest: init at "*) read -r to rest </proc/uptime && INIT=$(awk "BEGIN { printf \"%.2f\", $to - $from }") ;; esac
        printf '%s\n' "$line"
    done <"$1.fifo" >"$1.console"
    wait $process
    STATUS=$?
    tr -d '\r' <"$1.console" >"$1.log"
    MAPS=$(operations $MAP_DMA)
    UNMAPS=$(operations $UNMAP_DMA)
}

# operations COMMAND: how many of these ioctls since the guest started.
operations() { sed -nE "s/.*cmd: *(0x)?0*$1 .*hitcount: *([0-9]+).*/\2/p" "$IOCTLS/hist" | grep . || echo 0; }

# said NAME KEY: what the guest printed behind KEY.
said() { sed -n "s/^$2 //p" "$1.log"; }
