# A function takes an interrupt of the host for each vector that its guest unmasked, and not for each that it has (the NVMe: 65): also where
# there are fewer open files than vectors.
. /causeway/files/lib.sh

bind-vfio "$NVME" || fail "binding"
guest vectors <<'GUEST'
checksum buffered
echo "unmasked $(grep -c nvme /proc/interrupts)"
dmesg | grep -E 'nvme.*(timeout|polled)' | sed 's/^/lost: /'
echo "ready"
read -r answer </dev/ttyS0
GUEST
# vectors FILES: that guest, with a limit of so many.
vectors() {
    rm -f answers taken vectors.log
    mkfifo answers
    {
        wait_until 60 grep -q '^ready' vectors.log
        grep -c vfio-msix /proc/interrupts >taken
        echo off
    } >answers &
    ulimit -n "$1"
    INPUT=answers run vectors "intel_iommu=on" --device vfio,host="$NVME" --cpus 2
    expect "the checksum" "$(lines vectors 'sha256 ')" "$DISK_SHA256"
    expect "what was lost" "$(lines vectors 'lost: ')" ""
    echo "with $1 files: $(cat taken) interrupts of the host, $(lines vectors 'unmasked ') vectors unmasked"
    expect "interrupts of the host" "$(cat taken)" "$(lines vectors 'unmasked ')"
    ! grep 'interrupts are lost' vectors.err || fail "of what there is enough"
}
vectors 1024
! grep 'open files' vectors.err || fail "1,024 files are enough"
vectors 64
expect_line vectors.err '65 interrupt vectors.*limit of 64 open files leaves room for [0-9]+;.*ulimit -n [0-9]+$'
