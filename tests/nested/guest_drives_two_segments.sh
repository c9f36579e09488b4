# A guest with a function of one address in each of two PCI segments finds both, by the MCFG table and by ECAM, and drives them: each is behind the
# unit of its segment, which translates for it, remaps its interrupts, and has the fault records of what it aims elsewhere.
. /causeway/files/lib.sh

guest segments <<'GUEST'
# unit_of FUNCTION: the unit above it, by the kernel's name.
unit_of() { basename "$(readlink "/sys/bus/pci/devices/$1/iommu")"; }
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
ls /sys/bus/pci/devices | sed 's/^/function: /'
dmesg | grep -iE 'mmconfig|ecam|pci_bus 0001|PCI1' | sed 's/^/seen: /'
for function in 0000:00:02.0 0001:00:02.0; do
    echo "unit of $function: $(unit_of $function)"
    for scenario in roundtrip msi; do
        edu-vfio --bdf $function $scenario || fail "edu-vfio $scenario of $function"
    done
done
show_faults
# Two transfers of the one, and one of the other: each unit has its own.
edu-vfio --bdf 0000:00:02.0 --expect-fault outside || fail "edu-vfio outside"
edu-vfio --bdf 0001:00:02.0 --expect-fault readonly || fail "edu-vfio readonly"
GUEST
mark
run segments intel_iommu=on --iommu vtd --iommu vtd,segment=1 --device edu,id=first,addr=02.0 --device edu,id=second,addr=0001:00:02.0
expect_line segments.log "function: 0000:00:02.0" "function: 0001:00:00.0" "function: 0001:00:02.0"
expect_line segments.log 'PCI1\] \(domain 0001 \[bus 00\]\)' "mem 0xf0000000-0xf00fffff\] reserved as ACPI motherboard resource"
# Linux numbers units in the order of the table: by segment.
expect_line segments.log "unit of 0000:00:02.0: dmar0" "unit of 0001:00:02.0: dmar1"
no_faults segments

# units_have FIELD: that field of both units' statistics, in their order.
units_have() { tr -d '\n ' <segments.json | grep -oE '"id":"vtd[01]".*' | grep -oE "\"$1\":(\{[^}]*\}|[0-9]+)" | tr '\n' ' '; }
echo "of each unit: $(units_have faults) $(units_have iotlb)"
expect "units with fault records" "$(units_have faults | grep -o '{"0x' | wc -l)" 2
expect "units with invalidations" "$(units_have iotlb | grep -oE ':[1-9]' | wc -l)" 2
expect "devices by their addresses" "$(tr -d '\n ' <segments.json | grep -oE '"addr":"[^"]*"' | tr '\n' ' ')" \
    '"addr":"00:02.0" "addr":"0001:00:02.0" '
