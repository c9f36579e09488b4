# What the cases of a guest with two units share.

# In front of the guest's script.
UNITS_GUEST=$(
    cat <<'GUEST'
# unit_of FUNCTION: the unit above it, by the kernel's name.
unit_of() { basename "$(readlink "/sys/bus/pci/devices/$1/iommu")"; }

# each_is_driven FUNCTION FUNCTION: both edus work; then one reaches outside, and the other writes what it may only read.
each_is_driven() {
    modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
    for function; do
        echo "unit of $function: $(unit_of "$function")"
        for scenario in roundtrip msi; do
            edu-vfio --bdf "$function" $scenario || fail "edu-vfio $scenario of $function"
        done
    done
    show_faults
    edu-vfio --bdf "$1" --expect-fault outside || fail "edu-vfio outside"
    edu-vfio --bdf "$2" --expect-fault readonly || fail "edu-vfio readonly"
}
GUEST
)

# units_have NAME FIELD: that field of both units in the statistics of the guest NAME, in their order.
units_have() { tr -d '\n ' <"$1.json" | grep -oE '"id":"vtd[01]".*' | grep -oE "\"$2\":(\{[^}]*\}|[0-9]+)" | tr '\n' ' '; }

# each_unit_was_used NAME: both have fault records and invalidations, of what the functions did behind them.
each_unit_was_used() {
    echo "of each unit: $(units_have "$1" faults) $(units_have "$1" iotlb)"
    expect "units with fault records" "$(units_have "$1" faults | grep -o '{"0x' | wc -l)" 2
    expect "units with invalidations" "$(units_have "$1" iotlb | grep -oE ':[1-9]' | wc -l)" 2
}
