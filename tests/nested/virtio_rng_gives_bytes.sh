# A virtio-rng gives a Linux guest bytes, its rings behind the unit (strict), and without a unit; none of it faults.
. /causeway/files/lib.sh

mark
guest rng <<'GUEST'
modprobe virtio_rng || fail "no virtio_rng"
current=/sys/class/misc/hw_random/rng_current
case $(cat $current) in virtio_rng*) ;; *) fail "the entropy comes from $(cat $current)" ;; esac
echo "domain $(domain_of 0x1af4:0x1044)"
dd if=/dev/hwrng of=/bytes bs=4096 count=64 iflag=fullblock 2>/dev/null || fail "reading /dev/hwrng"
echo "bytes $(wc -c </bytes) different $(hexdump -v -e '1/4 "%08x\n"' /bytes | sort -u | wc -l)"
show_faults
GUEST
run rng "intel_iommu=on iommu.strict=1" --device virtio-rng
no_faults rng
lines rng 'bytes '
# 65,536 words at random: a few dozen of them twice would be much.
expect "bytes" "$(lines rng 'bytes ' | cut -d' ' -f1)" 262144
[ "$(lines rng 'bytes ' | cut -d' ' -f3)" -gt 65000 ] || fail "the bytes are not random"
expect "the domain" "$(lines rng 'domain ')" DMA
run rng "" --device virtio-rng --iommu none
expect "bytes without a unit" "$(lines rng 'bytes ' | cut -d' ' -f1)" 262144
