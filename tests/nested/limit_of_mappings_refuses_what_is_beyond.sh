# append: vfio_iommu_type1.dma_entry_limit=512
# The guest maps 2000 scattered pages for its edu, and the host takes 512 mappings: the others are counted, told once to the guest (a fault
# record) and once to the user (with the remedy), the device reaches what the host took, and unmapping makes room again (B-11).
. /causeway/files/lib.sh

expect "the limit" "$(cat /sys/module/vfio_iommu_type1/parameters/dma_entry_limit)" 512
bind-vfio "$EDU" || fail "binding"
guest crowded <<'GUEST'
edu 'crowded 2000' roundtrip
show_faults
GUEST
mark
count_host_operations
run crowded intel_iommu=on --device vfio,host="$EDU"
lines crowded 'crowded: '
expect "scenarios that held" "$(grep -cE '^(crowded|roundtrip):' crowded.log)" 3

# What the guest asked for beyond the limit. All of it fits into one domain, so nothing else can be refused.
expect "refused_maps" "$(grep -oE '"refused_maps": *\{[^}]*\}' crowded.json | tr -d ' \n')" \
    '"refused_maps":{"limit":1488,"memlock":0,"range":0,"target":0,"other":0}'
expect "peak_extents" "$(field crowded.json peak_extents)" 512
expect "unmaps_refused" "$(field crowded.json unmaps_refused)" 0
expect "quarantined" "$(field crowded.json quarantined)" 0
lines crowded 'guest-fault: ' >faults
cat faults
expect "fault lines in the guest's log" "$(grep -c 'Request device' faults)" 1
expect_line faults "Request device \[$(grep -oE '"addr": *"[^"]*"' crowded.json | grep -oE '[0-9a-f]{2}:[0-9a-f]{2}\.[0-9]')\]"
grep WARN crowded.err
expect "warnings about the limit" "$(grep -c dma_entry_limit crowded.err)" 1
expect_line crowded.err "takes no more.*dma_entry_limit=N"
# What the device aimed at and did not reach, was stopped by the host.
host_faults >host-faults
cat host-faults
! grep 'Request device' host-faults | grep -v "\[${EDU#*:}\]" || fail "faults of another device"
