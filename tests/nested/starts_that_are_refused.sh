# What cannot work, or would bypass the guest's tables, is refused at start: exit 4, one message with the cause and the remedy, nothing
# left behind.
. /causeway/files/lib.sh

guest never <<'GUEST'
fail "this guest must not run"
GUEST
ln -s never.cpio initrd.cpio

failed=0

# refused WHAT PATTERN... -- OPTION...: the message has each pattern. Goes on after a failure, which the end reports.
refused() {
    (refused_alone "$@") || failed=$((failed + 1))
}

refused_alone() {
    what=$1
    shift
    : >patterns
    while [ "$1" != -- ]; do
        echo "$1" >>patterns
        shift
    done
    shift
    before=$(host_state)
    causeway run --timeout "$(time_left)" "$@" </dev/null >refused.log 2>refused.err
    status=$?
    echo "$what: $(cat refused.err)"
    expect "the status for '$what'" $status 4
    expect "what is there after '$what'" "$(host_state)" "$before"
    expect "what the guest said under '$what'" "$(cat refused.log)" ""
    while read -r pattern; do expect_line refused.err "$pattern"; done <patterns
    expect "the number of messages for '$what'" "$(grep -c 'error' refused.err)" 1
}

boot="--kernel $KERNEL --initrd initrd.cpio --cmdline console=ttyS0"

# shellcheck disable=SC2086
{
    refused "no such device" "1e:1f\.7" "has no PCI function" "/sys/bus/pci/devices" -- $boot --device vfio,host=1e:1f.7

    unbind-vfio "$NVME"
    echo "$NVME" >/sys/bus/pci/drivers_probe
    [ -e "/sys/bus/pci/devices/$NVME/driver" ] || { modprobe nvme; echo "$NVME" >/sys/bus/pci/drivers_probe; }
    driver=$(basename "$(readlink "/sys/bus/pci/devices/$NVME/driver")")
    [ -n "$driver" ] && [ "$driver" != vfio-pci ] || fail "the bench has no driver of its own for the NVMe"
    refused "another driver bound" "$NVME" "$driver" "driver_override|unbind|bind" -- $boot --device vfio,host="$NVME"
    unbind-vfio "$NVME"
    refused "no driver bound" "$NVME" "vfio-pci" -- $boot --device vfio,host="$NVME"

    bind-vfio "$EDU" || fail "binding"
    refused "caching-mode=off with a vfio device" "caching-mode" -- $boot --iommu vtd,caching-mode=off --device vfio,host="$EDU"
    refused "a first stage with a vfio device" "stage=first" "stage=second" -- $boot --iommu vtd,scalable=on,stage=first --device vfio,host="$EDU"
    refused "--iommu none with a vfio device" "--iommu" -- $boot --iommu none --device vfio,host="$EDU"
    # L1's own unit has 48 bits.
    refused "aw-bits beyond the host" "aw-bits" "48" -- $boot --iommu vtd,aw-bits=57 --device vfio,host="$EDU"

    refused "no kernel file" "/nowhere/vmlinuz" -- --kernel /nowhere/vmlinuz --initrd initrd.cpio
    head -c 100000 /dev/urandom >noise
    refused "not a kernel" "noise" "kernel|bzImage" -- --kernel noise --initrd initrd.cpio
    : >empty
    refused "an empty kernel file" "empty" "kernel|bzImage" -- --kernel empty --initrd initrd.cpio
    refused "no initrd file" "/nowhere/initrd" -- --kernel "$KERNEL" --initrd /nowhere/initrd

    trap 'exit 143' TERM
    trap 'for node in kvm vfio; do [ ! -e /dev/$node.away ] || mv /dev/$node.away /dev/$node; done' EXIT
    mv /dev/kvm /dev/kvm.away
    refused "no /dev/kvm" "/dev/kvm" "modprobe|module|firmware|BIOS|enable" -- $boot
    mv /dev/kvm.away /dev/kvm
    mv /dev/vfio /dev/vfio.away
    refused "no /dev/vfio" "/dev/vfio/vfio does not exist here" "container" -- $boot --device vfio,host="$EDU"
    mv /dev/vfio.away /dev/vfio
}

expect "the number of starts that were not refused as they should be" $failed 0
