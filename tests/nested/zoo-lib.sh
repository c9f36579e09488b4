# What the cases of the zoo share: many kinds of functions, each of which does its work in a guest. Sourced after lib.sh.

ZOO_OPTIONS="intel_iommu=on usb-storage.delay_use=0 nvme_core.multipath=N"
# Bytes that a guest fetches over the network.
PAGE_BYTES=1048576

# zoo: a line for each function that the case can assign, KIND ADDRESS WORK DRIVER. WORK is a function of guest-zoo-lib.sh, DRIVER what the
# guest's kernel drives it with.
zoo() {
    cat <<ZOO
ahci $AHCI disk ahci
xhci $XHCI disk xhci_hcd
ehci $EHCI disk ehci-pci
ohci $OHCI disk ohci-pci
sdhci $SDHCI disk sdhci-pci
megasas $MEGASAS disk megaraid_sas
virtio_blk $VIRTIO_BLK disk virtio-pci
nvme $NVME disk nvme
nvme_many $NVMES_MANY disk nvme
nvme_sriov $NVME_SRIOV disk nvme
nvme_vf ${NVME_VF:-none} disk nvme
e1000 $E1000 network e1000
e1000e $E1000E network e1000e
igb $IGB network igb
igb_vf ${IGB_VF:-none} network igbvf
rtl8139 $RTL8139 network 8139cp
vmxnet3 $VMXNET3 network vmxnet3
virtio_net $VIRTIO_NET network virtio-pci
hda $HDA sound snd_hda_intel
virtio_rng $VIRTIO_RNG random virtio-pci
edu $EDU edu vfio-pci
pci_serial $PCI_SERIAL serial serial
ZOO
}

# zoo_line KIND: that line.
zoo_line() { zoo | tr -s " " | grep "^$1 " || fail "the zoo has no $1"; }

# content KIND: the checksum of the first MiB of that kind's disk.
content() {
    case $1 in
    nvme_vf) content nvme_sriov ;;
    *) echo "$DISKS" | tr ' ' '\n' | sed -n "s/^$1://p" | grep . || fail "no checksum of $1's disk" ;;
    esac
}

# in_l1 FUNCTION MODULE: gives the function to L1's own driver.
in_l1() {
    unbind-vfio "$1"
    modprobe "$2" && echo "$1" >/sys/bus/pci/drivers_probe
    [ -e "/sys/bus/pci/devices/$1/driver" ] || fail "L1's $2 does not take $1"
}

# wire_up FUNCTION: L1's end of the wire, where guests find a page.
wire_up() {
    wait_until 20 test -d "/sys/bus/pci/devices/$1/net" || fail "no network function at $1"
    wire=$(ls "/sys/bus/pci/devices/$1/net")
    for net in 1 2 3 4 5 6 7 8; do
        ip address add 10.9.$net.1/24 dev "$wire" || fail "L1's address"
    done
    ip link set "$wire" up || fail "L1's end of the wire"
    mkdir -p page
    dd if=/dev/urandom of=page/page bs=$PAGE_BYTES count=1 2>/dev/null
    PAGE_SHA256=$(sha256sum page/page | cut -d' ' -f1)
    httpd -h "$PWD/page" -p 80 || fail "no server in L1"
}

# wire_down: takes the server and the addresses away.
wire_down() {
    kill "$(pidof httpd)" || fail "L1's server ended"
    ip link set "$wire" down
    ip address flush dev "$wire"
}

# virtual_functions: igb and the NVMe stay in L1, and each has a virtual function for a guest: $IGB_VF, $NVME_VF.
virtual_functions() {
    in_l1 "$IGB" igb
    wait_until 20 test -d "/sys/bus/pci/devices/$IGB/net" || fail "no network function at $IGB"
    virtual_function "$IGB"
    IGB_VF=$VIRTUAL
    in_l1 "$NVME_SRIOV" nvme
    wait_until 20 test -d "/sys/bus/pci/devices/$NVME_SRIOV/nvme" || fail "no NVMe at $NVME_SRIOV"
    controller=$(ls "/sys/bus/pci/devices/$NVME_SRIOV/nvme")
    is_live || fail "$controller does not come up"
    nvme-secondary --release "/dev/$controller" 0 0 0 || fail "the flexible resources"
    echo 1 >"/sys/class/nvme/$controller/reset_controller" || fail "resetting $controller"
    is_live || fail "$controller does not come up again"
    virtual_function "$NVME_SRIOV"
    NVME_VF=$VIRTUAL
    nvme-secondary "/dev/$controller" 1 2 1 || fail "the virtual function's resources"
}

is_live() { wait_until 20 grep -q live "/sys/class/nvme/$controller/state"; }

# virtual_function FUNCTION: makes one, $VIRTUAL. No driver of L1 takes it of itself; one that it is bound to by name (as bind-vfio does) has it.
virtual_function() {
    echo 0 >"/sys/bus/pci/devices/$1/sriov_drivers_autoprobe"
    echo 1 >"/sys/bus/pci/devices/$1/sriov_numvfs" || fail "$1 has no virtual function"
    VIRTUAL=$(basename "$(readlink "/sys/bus/pci/devices/$1/virtfn0")")
}

no_virtual_functions() {
    for physical in "$IGB" "$NVME_SRIOV"; do
        echo 0 >"/sys/bus/pci/devices/$physical/sriov_numvfs" || fail "the virtual functions of $physical stay"
    done
}

# zoo_guest NAME KIND...: the guest NAME.cpio with these functions, in this order, and the options for it in $ZOO_DEVICES. The script $ZOO_AFTER, if
# there is one, comes after their work.
zoo_guest() {
    name=$1
    shift
    ZOO_DEVICES=
    slot=2
    : >"$name.functions"
    for kind; do
        # shellcheck disable=SC2046
        set_kind $(zoo_line "$kind")
        bind-vfio "$address" || fail "binding $kind"
        at=$(printf '%02x.0' $slot)
        slot=$((slot + 1))
        ZOO_DEVICES="$ZOO_DEVICES --device vfio,host=$address,addr=$at"
        echo "$kind 0000:00:$at $work $driver" >>"$name.functions"
    done
    [ -e zoo-base.cpio ] || cat /causeway/guest/base.cpio /causeway/guest/zoo.cpio >zoo-base.cpio
    {
        cat $FILES/guest-zoo-lib.sh
        sed 's/^/zoo_work /' "$name.functions"
        [ ! -e "${ZOO_AFTER:-}" ] || cat "$ZOO_AFTER"
        echo "show_faults"
    } | INITRD=$PWD/zoo-base.cpio guest "$name" "$(command -v pcm-play)"
}

set_kind() {
    kind=$1
    address=$2
    work=$3
    driver=$4
    [ "$address" != none ] && [ -d "/sys/bus/pci/devices/$address" ] || fail "L1 has no $kind"
}

# zoo_results NAME: for each function of the guest `KIND yes`, or what it printed instead of what it should.
zoo_results() {
    while read -r kind at work driver; do
        host=$(zoo_line "$kind" | cut -d' ' -f2)
        ids="$(cat "/sys/bus/pci/devices/$host/vendor" "/sys/bus/pci/devices/$host/device" | tr '\n' ' ')"
        got=$(lines "$1" "zoo: $kind ")
        [ "$got" = "$(expected "$kind" "$work" "$driver" "${ids% }")" ] && got=yes
        echo "$kind ${got:-nothing}"
    done <"$1.functions"
}

# zoo_run NAME KIND...: that guest, to its end. Its results are added to $VMM.results.
zoo_run() {
    zoo_guest "$@"
    mark
    # shellcheck disable=SC2086
    start "$1" "$ZOO_OPTIONS" --memory 384M $ZOO_DEVICES
    zoo_results "$1" >"$1.results"
    cat "$1.results" >>$VMM.results
    if [ $STATUS != 0 ] || ! grep -q 'guest: exit 0' "$1.log"; then
        grep -E -A30 'Oops|BUG:|Kernel panic' "$1.log" | head -n 40
        tail -n 20 "$1.log"
        tail -n 20 "$1.err"
        echo "the guest '$1' under $VMM ended with status $STATUS"
    fi
    lines "$1" 'zoo-time: ' | sed "s/^/$VMM: /"
    [ $VMM != causeway ] || no_faults "$1"
    cut -d' ' -f1 "$1.functions" | while read -r kind; do
        # shellcheck disable=SC2046
        set_kind $(zoo_line "$kind") && unbind-vfio "$address"
    done
}

# zoo_guests: all functions under $VMM, in three guests: disks, the others with the two virtual functions, and what those stood on.
zoo_guests() {
    : >$VMM.results
    virtual_functions
    wire_up "$IGB"
    zoo_run disks ahci xhci ehci ohci sdhci megasas virtio_blk nvme nvme_many nvme_vf
    zoo_run others e1000 e1000e igb_vf rtl8139 vmxnet3 virtio_net hda virtio_rng edu pci_serial
    wire_down
    no_virtual_functions
    in_l1 "$E1000E" e1000e
    wire_up "$E1000E"
    zoo_run physical igb nvme_sriov
    wire_down
}

# expected KIND WORK DRIVER IDS: what a guest prints when that works.
expected() {
    case $2 in
    disk) echo "$4 $3 sha256 $(content "$1")" ;;
    network) echo "$4 $3 answers 20 page $PAGE_SHA256" ;;
    # The codec is QEMU's (vendor 0x1af4), with an output and an input.
    sound) echo "$4 $3 codec 0x1af40022 played 24000 frames" ;;
    random) echo "$4 $3 different 4" ;;
    edu) echo "$4 $3 roundtrip msi" ;;
    serial) echo "$4 $3 ports 8 16550A sent 100" ;;
    esac
}
