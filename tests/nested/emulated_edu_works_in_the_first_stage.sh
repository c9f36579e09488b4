# An emulated edu, driven by the guest's own vfio, reaches what the guest's first-stage tables of 5 levels grant; and what it aims
# elsewhere, with 4 levels, becomes a fault record with the reason of a first-stage entry.
. /causeway/files/lib.sh

EDU_CMDLINE="intel_iommu=on,sm_on"
edu_in_guest 0 "edu roundtrip msi" --iommu vtd,scalable=on,stage=first,aw-bits=57 --device edu
no_faults edu
[ "$(field edu.json pasid_iotlb)" -gt 0 ] || fail "no invalidation of a first stage"

edu_in_guest 0 "EDU_OPTIONS=--expect-fault; edu outside readonly" --iommu vtd,scalable=on,stage=first --device edu
expect_line edu.log "fault: .*SM: Present bit in first-level paging entry is clear"
