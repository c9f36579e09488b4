# Two functions in two host groups: iommufd pins the guest's memory once for both, type1 once for each, and the start says so. A limit on
# locked memory that has room for it once is enough for the one and not for the other.
# kernel: own
# needs: CONFIG_IOMMUFD
. /causeway/files/lib.sh

modprobe iommufd || fail "no iommufd"
bind-vfio "$NVME" "$EDU" || fail "binding"
guest waiting <<'GUEST'
echo "waiting"
sleep 1000
GUEST

# Of all processors, up to now.
pinned() { cat /proc/sys/vm/stat_refresh; awk '/^nr_foll_pin_acquired/ { n += $2 } /^nr_foll_pin_released/ { n -= $2 } END { print n }' /proc/vmstat; }

# pinned_by DEVICE-OPTIONS: MiB of guest memory that are pinned while a guest of 512 MiB waits, untranslated.
pinned_by() {
    rm -f waiting.log
    before=$(pinned)
    causeway run --kernel "$KERNEL" --initrd waiting.cpio --memory 512M --cmdline "$GUEST_CMDLINE intel_iommu=off" --timeout "$(time_left)" \
        --device "vfio,host=$NVME$1" --device "vfio,host=$EDU$1" </dev/null >waiting.log 2>waiting.err &
    vmm=$!
    wait_until 40 grep -qs '^waiting' waiting.log || { cat waiting.log waiting.err; fail "the guest does not come up"; }
    pages=$(($(pinned) - before))
    grep -E '^Vm(Pin|Lck)' /proc/$vmm/status
    kill $vmm
    wait $vmm 2>/dev/null
    expect "pages that stay pinned" "$(pinned)" "$before"
    MIB=$((pages >> 8))
    echo "'$1': $MIB MiB are pinned"
}

pinned_by ,backend=iommufd
expect "MiB pinned by iommufd" $MIB 512
expect_line waiting.err "once for its 2 host group\(s\): 512 MiB"
pinned_by ""
expect "MiB pinned where several groups leave the choice" $MIB 512
expect_line waiting.err "is assigned by iommufd: memory is pinned once for several host groups"
pinned_by ,backend=type1
expect "MiB pinned by type1" $MIB 1024
expect_line waiting.err "2 host groups pin .*: 1024 MiB in all"

guest never <<'GUEST'
echo "this guest runs"
GUEST
owner_of "$EDU" never.cpio
node() { echo "/dev/vfio/devices/$(ls "/sys/bus/pci/devices/$1/vfio-dev")"; }
nodes="/dev/iommu /dev/vfio/$(basename "$(readlink "/sys/bus/pci/devices/$NVME/iommu_group")") $(node "$NVME") $(node "$EDU")"
# shellcheck disable=SC2086
chown "$user" $nodes
# shellcheck disable=SC2064
trap "chmod 600 /dev/kvm; chown 0 /dev/vfio/$group $nodes; rm -rf /tmp/owner" EXIT
with_limit() { as_owner 560000 never intel_iommu=off --memory 512M --device "vfio,host=$NVME,backend=$1" --device "vfio,host=$EDU,backend=$1"; }
with_limit type1
expect "the status on type1" $STATUS 4
expect_line never.err "2 host group\(s\) x 512 MiB"
with_limit iommufd
[ $STATUS = 0 ] || cat never.err
expect "the status on iommufd" $STATUS 0
