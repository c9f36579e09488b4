# The guest changes the type of the NVMe's group between DMA and identity, twice there and back: the disk is right each time, and the
# edu, whose domain is another one, works all the time.
. /causeway/files/lib.sh
. /causeway/files/life-lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
{ guest_functions && cat <<'GUEST'; } | guest types
nvme=$(function_of 0x1b36:0x0010)
checksum buffered
work_begins edu
echo "type $(domain_of 0x1b36:0x0010)"
for type in identity DMA identity DMA; do
    echo "$nvme" >/sys/bus/pci/drivers/nvme/unbind || fail "unbinding"
    echo $type >"/sys/bus/pci/devices/$nvme/iommu_group/type" || fail "the type cannot become $type"
    echo "$nvme" >/sys/bus/pci/drivers/nvme/bind || fail "binding"
    echo "type $(domain_of 0x1b36:0x0010)"
    checksum buffered
done
work_ends edu
show_faults
GUEST
mark
count_host_operations
run types "intel_iommu=on" --device vfio,host="$NVME" --device vfio,host="$EDU"
expect "the types" "$(lines types 'type ' | tr '\n' ' ')" "DMA identity DMA identity DMA "
expect "the checksums" "$(lines types 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "5 $DISK_SHA256"
sound types 1
