# limit: 180
# Peer to peer: an assigned edu writes and reads a register of an assigned NVMe, before the guest turns translation on and through its tables;
# and does not any more while the NVMe's memory is disabled, or where it was before it moved. The host's kernel maps the BAR (type1).
. /causeway/files/lib.sh

bind-vfio "$EDU" "$NVME" || fail "binding"
mark
count_host_operations
causeway test --device vfio,host="$EDU" --device vfio,host="$NVME" --filter '^b10_' --timeout 100 >images.log 2>&1
status=$?
cat images.log
expect "status of the images" "$status" 0
expect_line images.log '^1 passed, 0 failed, 0 skipped'
echo "host operations: $(host_operations 3b71) maps, $(host_operations 3b72) unmaps"
# What was written while the BAR was away is a fault of the host, one for each transfer.
host_faults
dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -wE 'BUG|Oops|WARNING' && fail "the host's kernel"
exit 0
