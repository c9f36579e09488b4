# Two vCPUs access registers of an assigned function without rest while a third disables and enables its memory, and resets it: what is written
# while memory is disabled is not there afterwards, reads give ones, and the host sees no fault. The guest's driver is off, so each function is
# mapped for the other's DMA, too, and comes and goes there.
. /causeway/files/lib.sh

bind-vfio "$EDU" "$NVME" || fail "binding"
guest hammer "$(command -v bar-hammer)" <<'GUEST'
# Nobody else has the function.
rmmod nvme 2>/dev/null
bar-hammer 0000:00:02.0 --register 80 --register 88 --seconds 3 || exit 1
bar-hammer 0000:00:03.0 --register 28 --register 30 --seconds 3 --reset-every 5 || exit 1
GUEST
mark
run hammer "intel_iommu=off" --cpus 3 --device vfio,host="$EDU",addr=02.0 --device vfio,host="$NVME",addr=03.0
lines hammer 'bar-hammer: ' | tee hammered
expect "functions" "$(wc -l <hammered)" 2
expect "functions whose memory was often disabled" "$(grep -cE '^disabled [0-9]{2,} times' hammered)" 2
expect_line hammered 'reset [1-9][0-9]* times'
no_faults hammer
! dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -E 'BUG|Oops|WARNING|restoring BARs' || fail "the host's kernel"
