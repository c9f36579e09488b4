# A guest with two units drives both: each has the function that it was given, which reaches what the guest maps for it; and what the function
# of either one aims elsewhere becomes a fault record of that unit.
. /causeway/files/lib.sh
. /causeway/files/units-lib.sh

{
    echo "$UNITS_GUEST"
    echo 'each_is_driven 0000:00:02.0 0000:00:03.0'
} | guest units
mark
run units intel_iommu=on --iommu vtd --iommu vtd,devices=second --device edu,id=first,addr=02.0 --device edu,id=second,addr=03.0
expect_line units.log "unit of 0000:00:02.0: dmar1" "unit of 0000:00:03.0: dmar0"
no_faults units
each_unit_was_used units
