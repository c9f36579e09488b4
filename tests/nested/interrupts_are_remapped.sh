# limit: 480
# Interrupts of assigned functions and of the IOAPIC go through the guest's remapping table, by x2APIC destinations, and arrive also
# while the guest moves them from processor to processor under load.
. /causeway/files/lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
guest remapped <<'GUEST'
dmesg | grep -E 'DMAR-IR|Switched APIC' | sed 's/^/guest-irq: /'
checksum buffered
grep -E 'nvme|IO-APIC' /proc/interrupts | sed 's/^/guest-irq: /'
# Linux places the queues' interrupts by itself; the administration queue's can be moved.
[ "$(nproc)" = 1 ] || move_interrupt nvme0q0 sh -c 'for i in $(seq 12); do echo 1 >/sys/class/nvme/nvme0/rescan_controller; blkread /dev/nvme0n1 direct 4096 64 >/dev/null || exit 1; done'
edu roundtrip msi
show_faults
GUEST
for cpus in 1 2 4; do
    mark
    cp remapped.cpio "on$cpus.cpio"
    run "on$cpus" "intel_iommu=on" --device vfio,host="$NVME" --device vfio,host="$EDU" --cpus $cpus
    lines "on$cpus" 'guest-irq: '
    expect_line "on$cpus.log" 'DMAR-IR: Enabled IRQ remapping in x2apic mode' 'IR-PCI-MSIX-.*nvme0q1' 'IR-IO-APIC.*ttyS0'
    expect "the checksum" "$(lines "on$cpus" 'sha256 ')" "$DISK_SHA256"
    expect "MSIs of edu" "$(lines "on$cpus" 'msi: ' | grep -c arrived)" 2
    [ $cpus = 1 ] || lines "on$cpus" 'moved: ' | grep . || fail "no interrupt was moved"
    no_faults "on$cpus"
    expect "faults of the unit" "$(grep -o '"faults":{[^}]*}' "on$cpus.json")" '"faults":{}'
done
