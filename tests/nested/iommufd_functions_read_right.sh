# The guest reads the assigned NVMe right by iommufd, an edu beside it, in the lazy and the strict mode of its driver and in passthrough; and
# the tables that L1's kernel keeps for both are what the guest granted, page by page and both ways, and empty afterwards.
# kernel: own
# limit: 480
# needs: CONFIG_INTEL_IOMMU_DEBUGFS
. /causeway/files/lib.sh
. /causeway/files/tables-lib.sh

modprobe iommufd || fail "no iommufd"
bind-vfio "$NVME" "$EDU" || fail "binding"
mkfifo keys
# Both ends, so that the guest's input never ends.
exec 3<>keys
COPY=3b83
UNMAP=3b86

# boot NAME KERNEL-OPTIONS: the guest runs in the background.
boot() {
    name=$1
    audits=0
    count_host_operations
    causeway run --kernel "$KERNEL" --initrd "$name.cpio" --memory 512M --timeout "$(time_left)" --cmdline "$GUEST_CMDLINE $2" \
        --device vfio,host="$NVME",backend=iommufd --device vfio,host="$EDU" --stats "$name.json" --trace "$name.trace" \
        <&3 >"$name.log" 2>"$name.err" &
    vmm=$!
    wait_until 60 grep -qs "^paused" "$name.log" || { tail -n 40 "$name.log" "$name.err"; fail "the guest '$name'"; }
}

refused_bars() { grep "^[0-9.]* host map " "$name.trace" | grep -vc "result=ok$"; }

# There is one copy more at the start: whether the kernel does it. BARs of the other function are no copies, and this kernel refuses them: it
# maps what has pages of memory.
all_is_traced() {
    [ $(($(traced map) - $(refused_bars) + 1)) = "$(host_operations $COPY)" ] && [ "$(traced unmap)" = "$(host_operations $UNMAP)" ]
}

# ended: the guest powers off, nothing is mapped, and the statistics say what they were.
ended() {
    echo >&3
    wait $vmm || { tail "$name.log" "$name.err"; fail "the end of the guest"; }
    nothing_mapped "after the power-off of '$name'" "$NVME" "$EDU"
    expect "the checksums" "$(lines "$name" 'sha256 ' | sort -u)" "$DISK_SHA256"
    expect "the backends" "$(grep -oE '"backend":"[a-z0-9]*"' "$name.json" | sort | uniq -c | awk '{ print $1, $2 }')" '2 "backend":"iommufd"'
    expect_line "$name.err" "0000:.* is assigned by iommufd: " "pins the guest's memory once for its 2 host group"
    ! grep 'audit:' "$name.err" | grep -v 'no difference' || fail "an audit with a difference"
}

mark
for mode in strict lazy passthrough; do
    case $mode in
    strict) options="iommu.strict=1" pages=1 ;;
    lazy) options="iommu.strict=0" pages=1 ;;
    passthrough) options="iommu.passthrough=1" pages=$((512 << 8)) ;;
    esac
    guest $mode "$(command -v vfio-churn)" <<'GUEST'
checksum buffered
echo "domains $(domain_of 0x1b36:0x0010)"
if [ "$(domain_of 0x1b36:0x0010)" != identity ]; then
    modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
    echo 1 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
    mkfifo /churn
    vfio-churn "$(function_of 0x1234:0x11e8)" </churn >/churned &
    exec 4>/churn
    echo >&4
    until grep -q mappings /churned; do usleep 10000; done
    cat /churned
fi
echo "paused"
read -r key
GUEST
    boot $mode "intel_iommu=on $options"
    compare $pages "$NVME" "$EDU"
    ended
done
expect "the domain in passthrough" "$(lines passthrough 'domains ')" identity
! host_faults || fail "faults in the host's log"
