# The table that L1's kernel keeps for each assigned function is what the guest granted, page by page and both ways: the same IOVAs, the
# same permissions, and the frames of the VMM's memory at those guest addresses. With strict invalidation, an NVMe at work and mappings
# that come and go at random for an edu; in passthrough; and after SIGKILL and after a power-off it is empty.
# kernel: own
# limit: 480
# needs: CONFIG_INTEL_IOMMU_DEBUGFS
. /causeway/files/lib.sh
. /causeway/files/tables-lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
mkfifo keys
# Both ends, so that the guest's input never ends.
exec 3<>keys

# boot NAME KERNEL-OPTIONS: the guest runs in the background.
boot() {
    name=$1
    count_host_operations
    audits=0
    causeway run --kernel "$KERNEL" --initrd "$name.cpio" --memory 512M --timeout "$(time_left)" --cmdline "$GUEST_CMDLINE $2" \
        --device vfio,host="$NVME",backend=type1 --device vfio,host="$EDU",backend=type1 --stats "$name.json" --trace "$name.trace" \
        <&3 >"$name.log" 2>"$name.err" &
    vmm=$!
}

all_is_traced() { [ "$(traced map)" = "$(host_operations 3b71)" ] && [ "$(traced unmap)" = "$(host_operations 3b72)" ]; }

# paused NUMBER: the guest has done its work up to there, and waits for a key.
paused() {
    wait_until 60 grep -qs "^paused $1" "$name.log" || { tail -n 40 "$name.log" "$name.err"; fail "the guest '$name' before pause $1"; }
}

guest strict "$(command -v vfio-churn)" <<'GUEST'
wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
echo 1 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
mkfifo /churn
vfio-churn "$(function_of 0x1234:0x11e8)" </churn >/churned &
exec 4>/churn
for round in 1 2 3; do
    blkread /dev/nvme0n1 direct 4096 500 &
    echo >&4
    checksum buffered
    wait $! || fail "reading"
    until [ "$(grep -c mappings /churned)" = $round ]; do usleep 10000; done
    echo "paused $round: $(tail -n 1 /churned)"
    read -r key
done
GUEST
mark
boot strict "intel_iommu=on iommu.strict=1"
for round in 1 2 3; do
    paused $round
    compare 1 "$NVME" "$EDU"
    # What the guest's own vfio counted.
    expect "the edu's pages" "$(sed -n "s/.*$EDU: \([0-9]*\) pages.*/\1/p" compared)" \
        "$(lines strict "paused $round: " | sed 's/.*mappings of \([0-9]*\) pages.*/\1/')"
    [ $round = 3 ] || echo >&3
done
expect "the checksums" "$(lines strict 'sha256 ' | sort -u)" "$DISK_SHA256"
! grep 'audit:' strict.err | grep -v 'no difference' || fail "an audit with a difference"
kill -KILL $vmm
wait $vmm 2>/dev/null
nothing_mapped "after SIGKILL" "$NVME" "$EDU"

guest passthrough <<'GUEST'
checksum buffered
echo "domains $(domain_of 0x1b36:0x0010) $(domain_of 0x1234:0x11e8)"
echo "kernel $(uname -r)"
echo "paused 1"
read -r key
GUEST
# This one on the own kernel, too.
KERNEL=/causeway/guest/vmlinuz-own
boot passthrough "intel_iommu=on iommu.passthrough=1"
paused 1
expect "the guest's kernel" "$(lines passthrough 'kernel ')" "$(uname -r)"
expect "the domains of NVMe and edu" "$(lines passthrough 'domains ')" "identity identity"
expect "the checksum" "$(lines passthrough 'sha256 ')" "$DISK_SHA256"
# The edu also reaches the NVMe's registers, of which no pagemap tells the frames.
compare $((512 << 8)) "$NVME"
echo >&3
wait $vmm || { tail "passthrough.log" "passthrough.err"; fail "the end of the guest"; }
nothing_mapped "after the power-off" "$NVME" "$EDU"
! host_faults || fail "faults in the host's log"
