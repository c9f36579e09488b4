# limit: 360
# `eim=off` leaves the guest in xAPIC mode, `intremap=off` without remapping; devices work in both, and `intel_iommu=off` in the guest
# leaves remapping off.
. /causeway/files/lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
guest mode <<'GUEST'
dmesg | grep -E 'DMAR-IR|Switched APIC' | sed 's/^/guest-irq: /'
checksum buffered
edu roundtrip msi
show_faults
GUEST
# with OPTIONS KERNEL-OPTIONS
with() {
    echo "with $1, $2"
    mark
    run mode "$2" --device vfio,host="$NVME" --device vfio,host="$EDU" --cpus 2 --iommu "$1"
    lines mode 'guest-irq: '
    expect "the checksum" "$(lines mode 'sha256 ')" "$DISK_SHA256"
    expect "MSIs of edu" "$(lines mode 'msi: ' | grep -c arrived)" 2
    no_faults mode
}
with vtd,eim=off "intel_iommu=on"
expect_line mode.log 'DMAR-IR: Enabled IRQ remapping in xapic mode'
with vtd,intremap=off "intel_iommu=on vfio_iommu_type1.allow_unsafe_interrupts=1"
! grep -q 'Enabled IRQ remapping' mode.log || fail "the guest found interrupt remapping"
with vtd "intel_iommu=on intremap=off vfio_iommu_type1.allow_unsafe_interrupts=1"
! grep -q 'Enabled IRQ remapping' mode.log || fail "the guest was told to leave interrupt remapping off"
