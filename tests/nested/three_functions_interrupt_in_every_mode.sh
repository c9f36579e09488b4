# topology: ports
# limit: 1500
# Guests with two and four vCPUs, with interrupt remapping to x2APIC destinations and without remapping, each with an NVMe, an edu and an
# e1000e under DMA at the same time: everything arrives, nothing faults, the audit has no difference.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh

bind-vfio "$NVME" "$EDU" "$E1000E" || fail "binding"
igb_up
{ guest_functions && cat <<'GUEST'; } | guest modes
dmesg | grep -E 'DMAR-IR|x2apic' | sed 's/^/guest-irq: /'
echo "processors: $(nproc)"
network_up
edu roundtrip msi
work_begins
checksum buffered
checksum direct
work_ends
grep -E 'nvme|eth|IO-APIC' /proc/interrupts | sed 's/^/guest-irq: /'
show_faults
GUEST
# in_mode CPUS IOMMU KERNEL-OPTIONS
in_mode() {
    echo "$1 vCPUs, $2"
    mark
    count_host_operations
    # shellcheck disable=SC2046
    run modes "intel_iommu=on ${3:-}" $(three_functions) --cpus "$1" --iommu "$2"
    expect "processors" "$(lines modes 'processors: ')" "$1"
    expect "the checksums" "$(lines modes 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "2 $DISK_SHA256"
    expect "MSIs of edu" "$(lines modes 'msi: ' | grep -c arrived)" 2
    expect "kinds of work" "$(lines modes 'work: ' | wc -l)" 2
    # A container of the guest's own vfio for each of edu's three runs; before the start and at the end the e1000e is reset with its bus.
    sound modes 3 2
    lines modes 'work: '
    lines modes 'guest-irq: '
}
for cpus in 2 4; do
    in_mode $cpus vtd,intremap=on,eim=on
    expect_line modes.log 'DMAR-IR: Enabled IRQ remapping in x2apic mode' 'IR-PCI-MSIX-.*nvme0q1' 'IR-IO-APIC.*ttyS0'
    [ "$(field modes.json interrupt_entry)" -gt 0 ] || fail "no invalidation of an interrupt entry"
    in_mode $cpus vtd,intremap=off vfio_iommu_type1.allow_unsafe_interrupts=1
    ! grep -q 'Enabled IRQ remapping' modes.log || fail "the guest has interrupt remapping"
done
