# The guest's own kernel drives our unit as it would hardware, for an emulated edu: its iommufd tracks what the device writes and nests a
# program's tables over its own, and its perf counts what the device asks for; each to the page.
# kernel: own
# needs: CONFIG_IOMMUFD
. /causeway/files/lib.sh

KERNEL=/causeway/guest/vmlinuz-own
guest iommufd "$(command -v edu-iommufd)" <<'GUEST'
edu_iommufd dirty nested counted
show_faults
GUEST
run iommufd "intel_iommu=on,sm_on" --iommu vtd,scalable=on,stage=both,nest=on,slads=on,perf=on --device edu
grep -E '^(dirty|nested|counted):' iommufd.log
