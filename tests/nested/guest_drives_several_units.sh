# A guest with two units drives both: each has the function that it was given, which reaches what the guest maps for it; and what the function
# of either one aims elsewhere becomes a fault record of that unit.
. /causeway/files/lib.sh

guest units <<'GUEST'
# unit_of FUNCTION: the unit above it, by the kernel's name.
unit_of() { basename "$(readlink "/sys/bus/pci/devices/$1/iommu")"; }
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
for function in 0000:00:02.0 0000:00:03.0; do
    echo "unit of $function: $(unit_of $function)"
    for scenario in roundtrip msi; do
        edu-vfio --bdf $function $scenario || fail "edu-vfio $scenario of $function"
    done
done
show_faults
edu-vfio --bdf 0000:00:02.0 --expect-fault outside || fail "edu-vfio outside"
edu-vfio --bdf 0000:00:03.0 --expect-fault readonly || fail "edu-vfio readonly"
GUEST
mark
run units intel_iommu=on --iommu vtd --iommu vtd,devices=second --device edu,id=first,addr=02.0 --device edu,id=second,addr=03.0
expect_line units.log "unit of 0000:00:02.0: dmar1" "unit of 0000:00:03.0: dmar0"
no_faults units

# units_have FIELD: that field of both units' statistics, in their order.
units_have() { tr -d '\n ' <units.json | grep -oE '"id":"vtd[01]".*' | grep -oE "\"$1\":(\{[^}]*\}|[0-9]+)" | tr '\n' ' '; }
echo "of each unit: $(units_have faults) $(units_have iotlb)"
expect "units with fault records" "$(units_have faults | grep -o '{"0x' | wc -l)" 2
expect "units with invalidations" "$(units_have iotlb | grep -oE ':[1-9]' | wc -l)" 2
