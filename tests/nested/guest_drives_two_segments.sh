# A guest with a function of one address in each of two PCI segments finds both, by the MCFG table and by ECAM, and drives them: each is behind the
# unit of its segment, which translates for it, remaps its interrupts, and has the fault records of what it aims elsewhere.
. /causeway/files/lib.sh
. /causeway/files/units-lib.sh

{
    echo "$UNITS_GUEST"
    cat <<'GUEST'
ls /sys/bus/pci/devices | sed 's/^/function: /'
dmesg | grep -iE 'mmconfig|ecam|pci_bus 0001|PCI1' | sed 's/^/seen: /'
each_is_driven 0000:00:02.0 0001:00:02.0
GUEST
} | guest segments
mark
run segments intel_iommu=on --iommu vtd --iommu vtd,segment=1 --device edu,id=first,addr=02.0 --device edu,id=second,addr=0001:00:02.0
expect_line segments.log "function: 0000:00:02.0" "function: 0001:00:00.0" "function: 0001:00:02.0"
expect_line segments.log 'PCI1\] \(domain 0001 \[bus 00\]\)' "mem 0xf0000000-0xf00fffff\] reserved as ACPI motherboard resource"
# Linux numbers units in the order of the table: by segment.
expect_line segments.log "unit of 0000:00:02.0: dmar0" "unit of 0001:00:02.0: dmar1"
no_faults segments
each_unit_was_used segments
expect "devices by their addresses" "$(tr -d '\n ' <segments.json | grep -oE '"addr":"[^"]*"' | tr '\n' ' ')" \
    '"addr":"00:02.0" "addr":"0001:00:02.0" '
