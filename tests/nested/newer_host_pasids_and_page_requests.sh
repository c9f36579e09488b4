# The guest's own kernel, as new as the newer host's, drives what older ones have no interface for: page tables of two PASIDs of an emulated edu,
# and page requests of a device with a device-TLB, which a program answers; and what older ones have: dirty bits, nested tables, counters.
# host: new
# kernel: own
# needs: CONFIG_IOMMUFD
. /causeway/files/lib.sh

KERNEL=/causeway/guest/vmlinuz-own
for scenario in pasids faults "dirty nested counted"; do
    printf 'edu_iommufd %s\nshow_faults\n' "$scenario" | guest iommufd "$(command -v edu-iommufd)"
    with=scalable=on,stage=both,nest=on,slads=on,perf=on,pasid-bits=20
    edu=edu,pasid=on
    [ "$scenario" != faults ] || { with=$with,ats=on,pri=on && edu=$edu,ats=on,pri=on; }
    run iommufd "intel_iommu=on,sm_on" --iommu vtd,$with --device $edu
    grep -E '^(pasids|faults|dirty|nested|counted):' iommufd.log
done
