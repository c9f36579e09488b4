#!/bin/sh
# Reads the assigned NVMe disk as `reads=` on the kernel command line says, and prints how long each took.
# Settled: what boot freed is handed out again in descending order, which no mapping can join, so a program takes that memory out of the way
# first, and counts do not depend on how much of it a read meets. `-unsettled` reads with the memory as it is, which is what any guest does.
reads=$(sed -n 's/.*reads=\([a-z,-]*\).*/\1/p' /proc/cmdline)
wait-for /dev/nvme0n1 20 || exit 1
# Held open: the last close of a disk drops what was read of it.
exec 3</dev/nvme0n1
for read in $(echo "$reads" | tr ',' ' '); do
    settle=--settle
    [ "$read" = "${read%-unsettled}" ] || settle=
    case "${read%-unsettled}" in
    buffered) set -- buffered 1048576 64 ;;
    direct) set -- direct 1048576 64 ;;
    small) set -- direct 4096 2000 ;;
    idle) set -- buffered 1048576 0 ;;
    # Of what the buffered read left in memory.
    checksum) blkread /dev/nvme0n1 buffered 1048576 64 --sha256 | grep sha256; continue ;;
    *) echo "no read '$read'"; exit 1 ;;
    esac
    echo 3 >/proc/sys/vm/drop_caches
    # shellcheck disable=SC2086
    blkread /dev/nvme0n1 "$@" $settle | sed "s/^/$read /" || exit 1
done
echo "kernel $(uname -r)"
for device in /sys/bus/pci/devices/*; do
    read -r class <"$device/class"
    [ "$class" = 0x010802 ] || continue
    echo "function ${device##*/}"
    echo "domain $(cat "$device/iommu_group/type" 2>/dev/null || echo none)"
done
[ ! -e /sys/class/iommu/dmar0 ] || echo "capabilities $(cat /sys/class/iommu/dmar0/intel-iommu/cap)"
echo "faults $(dmesg | grep -c 'DMAR:.*fault')"
