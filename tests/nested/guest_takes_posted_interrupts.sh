# A Linux guest that has its messages posted (intremap=posted_msi): those of an assigned NVMe and of an emulated edu are recorded in memory, its
# processors are notified, and everything arrives.
# kernel: own
# needs: CONFIG_X86_POSTED_MSI
. /causeway/files/lib.sh

KERNEL=/causeway/guest/vmlinuz-own
bind-vfio "$NVME" || fail "binding"
guest posted <<'GUEST'
checksum buffered
checksum direct
edu msi
# How many notifications each processor took.
awk '$1 == "PMN:" { for (i = 2; $i ~ /^[0-9]+$/; i++) sum += $i; print "notified " sum }' /proc/interrupts
grep -E 'nvme|PMN|edu|vfio' /proc/interrupts | sed 's/^/guest-irq: /'
show_faults
GUEST
mark
run posted "intel_iommu=on intremap=posted_msi" --cpus 2 --iommu vtd,posted=on --device vfio,host="$NVME" --device edu
lines posted 'guest-irq: '
expect "the checksums" "$(lines posted 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "2 $DISK_SHA256"
expect "MSIs of edu" "$(lines posted 'msi: ' | grep -c arrived)" 2
no_faults posted
echo "posted: $(field posted.json interrupts_posted), notifications: $(field posted.json notifications)"
[ "$(field posted.json interrupts_posted)" -ge 10 ] || fail "hardly an interrupt was posted"
[ "$(lines posted 'notified ')" -ge 10 ] || fail "the guest was hardly notified"
expect_at_most "what the guest was notified of" "$(lines posted 'notified ')" "$(field posted.json notifications)"
