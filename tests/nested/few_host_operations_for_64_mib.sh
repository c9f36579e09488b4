# Reading 64 MiB costs few host operations; QEMU 10 issues 16,416 maps and 16,416 unmaps for either read. The read's cost is the
# difference of two runs, with and without it.
. /causeway/files/lib.sh

bind-vfio "$NVME" || fail "binding"
# Settled: what boot freed (the initramfs above all) is handed out again page by page, last freed first: in descending order, which no mapping
# of ascending IOVAs can join. Counts would depend on how much of it a read happens to meet.
for read in "idle buffered 0" "buffered buffered 64" "direct direct 64"; do
    set -- $read
    guest "$1" <<GUEST
wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
blkread /dev/nvme0n1 $2 1048576 $3 --settle --sha256 || fail "reading the disk"
GUEST
done

# Sets MAPS and UNMAPS.
count() {
    count_host_operations
    run "$1" "intel_iommu=on" --device vfio,host="$NVME"
    same_counts "$1"
}
count idle
idle_maps=$MAPS
idle_unmaps=$UNMAPS
count buffered
expect "the checksum, buffered" "$(lines buffered 'sha256 ')" "$DISK_SHA256"
buffered_maps=$((MAPS - idle_maps))
buffered_unmaps=$((UNMAPS - idle_unmaps))
count direct
expect "the checksum, O_DIRECT" "$(lines direct 'sha256 ')" "$DISK_SHA256"
direct_maps=$((MAPS - idle_maps))
direct_unmaps=$((UNMAPS - idle_unmaps))

echo "seconds: buffered $(lines buffered 'seconds '), O_DIRECT in 1 MiB $(lines direct 'seconds ')"
expect_at_most "maps of a buffered read" $buffered_maps $((16416 / 20))
expect_at_most "unmaps of a buffered read" $buffered_unmaps $((16416 / 20))
expect_at_most "maps of an O_DIRECT read" $direct_maps $((16416 / 4))
expect_at_most "unmaps of an O_DIRECT read" $direct_unmaps $((16416 / 20))
# The counts have meaning only if the guest really mapped what it read.
[ $buffered_unmaps -ge 64 ] && [ $direct_unmaps -ge 64 ] || fail "fewer than 64 unmaps: was the guest translating at all?"
# The guest waits for its invalidations by reading registers; it has them in a page.
expect "reads of the unit's registers that were exits" "$(grep -o '"register_reads":[0-9]*' direct.json)" '"register_reads":0'
