# Peer to peer by iommufd: an assigned edu writes and reads a register of an assigned NVMe, before the guest turns translation on and through
# its tables; and does not any more while the NVMe's memory is disabled, or where it was before it moved. The host's kernel maps the BAR by
# its dma-buf.
# host: new
# kernel: own
# limit: 180
# needs: CONFIG_VFIO_PCI_DMABUF
. /causeway/files/lib.sh

modprobe iommufd || fail "no iommufd"
bind-vfio "$EDU" "$NVME" || fail "binding"
mark
count_host_operations
causeway test --device vfio,host="$EDU",backend=iommufd --device vfio,host="$NVME",backend=iommufd --filter '^b10_' --timeout 100 >images.log 2>&1
status=$?
cat images.log
expect "status of the images" "$status" 0
expect_line images.log '^1 passed, 0 failed, 0 skipped'
# VFIO_DEVICE_FEATURE, IOMMU_IOAS_MAP_FILE: RAM is mapped by its file once at most, so there are more only where BARs are.
maps=$(host_operations 3b8f)
echo "host operations: $maps maps by file, $(host_operations 3b83) copies, $(host_operations 3b86) unmaps"
[ "$maps" -ge 10 ] || fail "the BAR was not mapped by a file each time it came"
# What was written while the BAR was away is a fault of the host, one for each transfer.
host_faults
dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -wE 'BUG|Oops|WARNING' && fail "the host's kernel"
exit 0
