# limit: 2400
# long
# A disk and a network by virtio behind the unit, under Causeway and under QEMU with the same guest and image, in turn: the data are right
# under both, and a table says how long each took (medians of the rounds; seconds, of a machine that does nothing else).
. /causeway/files/lib.sh
. /causeway/files/net-lib.sh

ROUNDS=${ROUNDS:-5}
# The median of the numbers behind NAME in the file of results.
median() { sed -n "s/^$1 //p" results | sort -n | awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'; }

KERNEL=$VMLINUZ
tap
# Anything but holes, in the host's page cache.
copies sent 4 >disk.img
guest disk <<'GUEST'
modprobe virtio_blk || fail "no virtio_blk"
wait-for /dev/vda 20 || fail "no disk"
begin() { BEGIN=$(cut -d' ' -f1 /proc/uptime); }
took() { awk -v what="$1" -v from="$BEGIN" '{ print what, $1 - from }' /proc/uptime; }
begin
blkread /dev/vda direct 1048576 256 >/dev/null || fail "reading"
took read-direct
begin
blkread /dev/vda buffered 1048576 256 --sha256 || fail "reading"
took read-buffered
begin
dd if=/dev/zero of=/dev/vda bs=1M count=256 conv=fsync 2>/dev/null || fail "writing"
took write
GUEST
: >results
for round in $(seq "$ROUNDS"); do
    order="causeway qemu"
    [ $((round % 2)) = 1 ] || order="qemu causeway"
    for VMM in $order; do
        cp disk.img work.img
        run disk "intel_iommu=on iommu.strict=1" --iommu vtd,caching-mode=off --device virtio-blk,file=work.img
        expect "the checksum under $VMM" "$(lines disk 'sha256 ')" "$(sha256sum <disk.img | cut -d' ' -f1)"
        for what in read-direct read-buffered write; do
            echo "$VMM-$what $(lines disk "$what ")" >>results
        done
        carry net 4 "intel_iommu=on iommu.strict=1" --iommu vtd,caching-mode=off --device virtio-net,tap=tap0
        echo "$VMM-receive $(lines net 'seconds-in ')" >>results
        echo "$VMM-send $(lines net 'seconds-out ')" >>results
    done
done
for what in read-direct read-buffered write receive send; do
    echo "256 MiB $what: Causeway $(median "causeway-$what") s, QEMU $(median "qemu-$what") s"
done
