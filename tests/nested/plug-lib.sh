#!/bin/sh
# What the cases share in which devices come and go behind root ports. Sourced after lib.sh.

SOCKET=$PWD/control

ctl() { causeway ctl "$SOCKET" "$@"; }

# printed TEXT SECONDS: the guest says so.
printed() { wait_until "$2" grep -q "^$1" plug.log || { tail -n 40 plug.log; cat plug.err; fail "the guest did not print '$1'"; }; }

# is_gone ID: the machine has it no more.
has_no() { ! ctl devices | grep -q "\"id\":\"$1\""; }
is_gone() { wait_until 20 has_no "$1" || { ctl devices; fail "$1 is still there"; }; }

# refused PART WORD...: the request is refused with this in the message.
refused() {
    part=$1
    shift
    ! ctl "$@" 2>refusal || fail "not refused: $*"
    expect_line refusal "$part"
}

# The guest's side of the scripts.
PLUG_GUEST='until_so() {
    tries=1200
    until eval "$1"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "it never came: $1"
        usleep 100000
    done
}
'

# ended: the guest did what it was to do, without a fault.
ended() {
    wait
    grep -q "guest: exit 0" plug.log || { tail -n 40 plug.log; cat plug.err; fail "the guest"; }
    no_faults plug
    expect_line plug.err "no difference"
}

# Nobody has the NVMe open, as a group or as a device.
is_closed() {
    group=$(basename "$(readlink "/sys/bus/pci/devices/$NVME/iommu_group")")
    ! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -qE "/dev/vfio/($group|devices/.*)\$"
}

# nvme_comes_and_goes BACKEND: an NVMe that is added by it reads right, goes when the guest is asked for it, and comes again.
nvme_comes_and_goes() {
    bind-vfio "$NVME" || fail "binding"
    {
        echo "$PLUG_GUEST"
        cat <<'GUEST'
modprobe -a nvme vfio-pci vfio_iommu_type1
edu-vfio --bdf 0000:02:00.0 busy /stop &
echo "ready"
for round in 1 2; do
    until_so "[ -b /dev/nvme0n1 ]"
    checksum direct
    echo "read $round in the group of $(ls /sys/bus/pci/devices/0000:01:00.0/iommu_group/devices | wc -l)"
    until_so "[ ! -e /sys/bus/pci/devices/0000:01:00.0 ]"
    echo "lost $round"
done
touch /stop
wait $! || fail "the edu beside it stopped"
show_faults
GUEST
    } | guest plug
    mark
    start plug intel_iommu=on --root-ports 2 --device edu,port=2 --socket "$SOCKET" &
    printed ready 90
    for round in 1 2; do
        ctl add --device vfio,host="$NVME",id=disk,port=1,backend="$1" || { cat plug.err; fail "adding"; }
        refused "is a device of this machine already" add --device vfio,host="$NVME"
        printed "read $round in the group of 1" 90
        ctl remove disk || fail "removing"
        printed "lost $round" 60
        is_gone disk
        wait_until 5 is_closed || { ls -l /proc/[0-9]*/fd 2>/dev/null | grep /dev/vfio/; fail "it is still open"; }
    done
    ended
    expect "the checksums" "$(lines plug 'sha256 ' | sort -u)" "$DISK_SHA256"
    expect "how many" "$(lines plug 'sha256 ' | wc -l)" 2
    cat plug.err
}
