# limit: 360
# A level-triggered interrupt of an assigned function (INTx, `pci=nomsi`) goes through the IOAPIC and the guest's remapping table: each
# one is ended by the guest and fires again, also while it moves between processors.
. /causeway/files/lib.sh

bind-vfio "$NVME" || fail "binding"
guest intx <<'GUEST'
checksum buffered
grep -E 'nvme' /proc/interrupts | sed 's/^/guest-irq: /'
[ "$(nproc)" = 1 ] || move_interrupt "$(awk '/nvme0q0/ { print $NF }' /proc/interrupts)" blkread /dev/nvme0n1 direct 4096 300
show_faults
GUEST
for options in "--iommu vtd --cpus 1" "--iommu vtd --cpus 2" "--iommu vtd,intremap=off --cpus 2"; do
    echo "with $options"
    mark
    # shellcheck disable=SC2086
    run intx "intel_iommu=on pci=nomsi" --device vfio,host="$NVME" $options
    expect "the checksum" "$(lines intx 'sha256 ')" "$DISK_SHA256"
    lines intx 'guest-irq: '
    lines intx 'moved: '
    expect_line intx.log 'IO-APIC .*fasteoi .*nvme0q0'
    no_faults intx
done
