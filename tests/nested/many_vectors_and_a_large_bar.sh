# topology: large
# limit: 400
# Four NVMe functions of 65 vectors each and one vCPU take as many interrupts of the host as the guest uses, and a BAR of 128 GiB has its place.
# Two more of 2,048 vectors each, where 1,024 files may be open, lose none that the guest uses; the start says what is not there, and the remedy.
. /causeway/files/lib.sh

# disks NAME FUNCTION...: a guest with an NVMe behind each of these, at 02.0 and so on, that reads the first MiB of each by its own name.
disks() {
    name=$1
    shift
    DEVICES=
    slot=2
    for function; do
        at=$(printf '%02x.0' $slot)
        DEVICES="$DEVICES --device vfio,host=$function,addr=$at"
        slot=$((slot + 1))
    done
    {
        echo "functions=$#"
        cat <<'GUEST'
for slot in $(seq 2 $((functions + 1))); do
    function=0000:00:$(printf '%02x.0' $slot)
    wait-for "/sys/bus/pci/devices/$function/nvme" 30 || fail "no NVMe at $function"
    disk=/dev/$(ls "/sys/bus/pci/devices/$function/nvme")n1
    wait-for "$disk" 30 || fail "no $disk"
    blkread "$disk" direct 65536 16 --sha256 >/read || fail "reading $disk"
    sed -n 's/^sha256 /read: /p' /read
done
echo "used $(grep -c 'nvme[0-9]*q' /proc/interrupts)"
for function in /sys/bus/pci/devices/*; do
    [ "$(cat "$function/vendor"):$(cat "$function/device")" != 0x1b36:0x0005 ] || sed 's/^/bar: /' "$function/resource"
done
dmesg | grep -E 'nvme.*(timeout|polled)' | sed 's/^/lost: /'
show_faults
echo "ready"
read -r answer </dev/ttyS0
GUEST
    } | guest "$name"
}

# counted NAME [OPTION...]: that guest, with one vCPU. $TAKEN is how many interrupts of the host it takes when all disks are read.
counted() {
    name=$1
    shift
    rm -f answers taken
    mkfifo answers
    {
        wait_until 120 grep -q '^ready' "$name.log"
        grep -c vfio-msix /proc/interrupts >taken
        echo off
    } >answers &
    mark
    # shellcheck disable=SC2086
    INPUT=answers run "$name" "intel_iommu=on nvme_core.multipath=N" $DEVICES "$@"
    TAKEN=$(cat taken)
    no_faults "$name"
    expect "what was lost" "$(lines "$name" 'lost: ')" ""
    echo "$name: $TAKEN interrupts of the host, the guest uses $(lines "$name" 'used ')"
    expect "interrupts of the host" "$TAKEN" "$(lines "$name" 'used ')"
    ! grep 'interrupts are lost' "$name.err" || fail "of what the guest uses there is enough"
}

# contents NAME...: the checksums of those disks, one a line.
contents() {
    for disk; do
        echo "$DISKS" | tr ' ' '\n' | sed -n "s/^$disk://p"
    done
}

# shellcheck disable=SC2086
bind-vfio $NVMES $NVMES_MANY "$PCI_TESTDEV" || fail "binding"

# shellcheck disable=SC2086
disks four $NVMES
counted four --device vfio,host="$PCI_TESTDEV"
expect "the checksums" "$(lines four 'read: ')" "$(contents nvme nvme1 nvme2 nvme3)"
# Two for each: of its admin queue, and of the one vCPU's.
expect "vectors that the guest uses" "$(lines four 'used ')" 8
lines four 'bar: ' | awk '$2 != $1 { print $1, $2 }' >bars
bar=$(awk '{ print $2 - $1 + 1 }' bars | grep -x 137438953472) || { cat bars && fail "no BAR of 128 GiB"; }
echo "a BAR of $bar bytes: $(cat bars | tr '\n' ';')"

ulimit -n 1024
# shellcheck disable=SC2086
disks many $NVMES_MANY
counted many
expect "the checksums" "$(lines many 'read: ')" "$(contents many0 many1)"
expect "vectors that the guest uses" "$(lines many 'used ')" 4
expect_line many.err 'interrupt vectors.*limit of 1024 open files leaves room for [0-9]+;.*ulimit -n [0-9]+$'
grep 'open files' many.err
