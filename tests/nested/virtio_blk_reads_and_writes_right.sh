# A guest reads and writes a disk image by virtio-blk, its rings and data behind the unit (lazy, strict; it says what it maps, or not): 64 MiB
# of it have the right checksum, what it writes is in the file afterwards, and nothing faults. Each map of the bridge is a pin's, and none is left.
. /causeway/files/lib.sh

dd if=/dev/urandom of=disk.img bs=1M count=64 2>/dev/null
truncate -s 96M disk.img
guest blk <<'GUEST'
modprobe virtio_blk || fail "no virtio_blk"
wait-for /dev/vda 20 || fail "no disk"
echo "domain $(domain_of 0x1af4:0x1042)"
echo "serial $(cat /sys/block/vda/serial)"
blkread /dev/vda buffered 1048576 64 --sha256 || fail "reading"
blkread /dev/vda direct 1048576 8 || fail "reading directly"
# Behind what the host compares: pages of a file, and pieces that are no page.
dd if=/dev/vda of=/dev/vda bs=1M count=16 seek=64 conv=fsync,notrunc 2>/dev/null || fail "writing"
dd if=/dev/vda of=/dev/vda bs=1536 count=1000 seek=54614 conv=fsync,notrunc 2>/dev/null || fail "writing pieces"
show_faults
GUEST
mark
for mode in "iommu.strict=0 on" "iommu.strict=1 on" "iommu.strict=1 off"; do
    options="intel_iommu=on ${mode% *}"
    wanted=$(head -c 67108864 disk.img | sha256sum | cut -d' ' -f1)
    run blk "$options" --iommu vtd,caching-mode="${mode#* }" --device virtio-blk,file=disk.img,id=first-disk
    expect "the checksum" "$(lines blk 'sha256 ')" "$wanted"
    expect "the serial number" "$(lines blk 'serial ')" first-disk
    expect "what it wrote" "$(tail -c 33554432 disk.img | head -c 16777216 | sha256sum)" "$(head -c 16777216 disk.img | sha256sum)"
    expect "what it wrote in pieces" "$(tail -c +83887105 disk.img | head -c 1536000 | sha256sum)" "$(head -c 1536000 disk.img | sha256sum)"
    expect "what the host read first is as it was" "$(head -c 67108864 disk.img | sha256sum | cut -d' ' -f1)" "$wanted"
    no_faults blk
    expect "pins that were refused, left or late" "$(($(field blk.json refused) + $(field blk.json left_pinned) + $(field blk.json late)))" 0
    expect "pages that are pinned" "$(field blk.json pinned_pages)" 0
    [ "$(field blk.json pins)" -gt 20000 ] || fail "only $(field blk.json pins) pages were pinned"
    echo "$mode: $(lines blk 'domain '), $(field blk.json pins) pages pinned, $(field blk.json notices) notices, $(field blk.json iotlb) invalidations, read in $(lines blk 'seconds ') s"
done

# A disk that is read-only takes no write, and a file that is none is refused.
printf '%s\n' 'modprobe virtio_blk; wait-for /dev/vda 20' 'echo "ro $(cat /sys/block/vda/ro)"' \
    'dd if=/dev/zero of=/dev/vda bs=4096 count=1 2>/dev/null && fail "it was written"; true' | guest ro
before=$(sha256sum <disk.img)
run ro intel_iommu=on --device virtio-blk,file=disk.img,readonly=on
expect "read-only" "$(lines ro 'ro ')" 1
expect "the file" "$(sha256sum <disk.img)" "$before"
for file in /nowhere /dev/null /tmp; do
    start ro intel_iommu=on --device virtio-blk,file=$file
    expect "the status with $file" $STATUS 4
done
start ro "" --iommu none --device virtio-blk,file=disk.img
expect "the status without a unit" $STATUS 4
