# topology: zoo
# long
# limit: 400
# The same for a minute with virtual functions, for which the host blocks nothing of itself: of igb and of an NVMe, and with edu between.
. /causeway/files/lib.sh
. /causeway/files/zoo-lib.sh

virtual_functions
bind-vfio "$EDU" "$IGB_VF" "$NVME_VF" || fail "binding"
guest hammer "$(command -v bar-hammer)" <<'GUEST'
# Nobody else has the function.
rmmod nvme 2>/dev/null
bar-hammer 0000:00:02.0 --register 80 --register 88 --seconds 10 || exit 1
bar-hammer 0000:00:03.0 --register 2800 --register 3800 --seconds 25 --reset-every 5 || exit 1
bar-hammer 0000:00:04.0 --register 28 --register 30 --seconds 25 --reset-every 5 || exit 1
GUEST
mark
run hammer "intel_iommu=off" --cpus 3 --device vfio,host="$EDU",addr=02.0 --device vfio,host="$IGB_VF",addr=03.0 \
    --device vfio,host="$NVME_VF",addr=04.0
lines hammer 'bar-hammer: ' | tee hammered
expect "functions" "$(wc -l <hammered)" 3
expect "functions that were reset" "$(grep -cE 'reset [1-9][0-9]* times' hammered)" 2
no_faults hammer
! dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -E 'BUG|Oops|WARNING|restoring BARs' || fail "the host's kernel"
