#!/bin/sh
# What the guests' scripts share; stands in front of each of them.

fail() {
    echo "guest: FAIL: $*"
    exit 1
}

# The DMAR fault lines of this kernel, for the host to see.
show_faults() { dmesg | grep 'DMAR:.*fault' | sed 's/^/guest-fault: /'; }

# function_of VENDOR:DEVICE: the first such PCI function.
function_of() {
    for device in /sys/bus/pci/devices/*; do
        [ "$(cat "$device/vendor"):$(cat "$device/device")" = "$1" ] && echo "${device##*/}" && return
    done
    fail "no function $1"
}

# domain_of VENDOR:DEVICE: the type of the IOMMU domain that the function is in: DMA, DMA-FQ, identity, none.
domain_of() { cat "/sys/bus/pci/devices/$(function_of "$1")/iommu_group/type" 2>/dev/null || echo none; }

# The guest address width of the first remapping unit: CAP.MGAW + 1.
unit_width() {
    [ -e /sys/class/iommu/dmar0 ] || { echo none; return; }
    capabilities=$(cat /sys/class/iommu/dmar0/intel-iommu/cap)
    echo $((((0x$capabilities >> 16) & 0x3f) + 1))
}

# checksum buffered|direct: of the disk's first 64 MiB, read 1 MiB at a time.
checksum() {
    wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
    blkread /dev/nvme0n1 "$1" 1048576 64 --sha256 || fail "reading the disk"
}

# edu SCENARIO...: each must hold.
edu() {
    modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
    # For `big`: 1 GiB in scattered 4 KiB pages would be more mappings than a host holds for one container.
    echo 1 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
    for scenario; do
        # shellcheck disable=SC2086
        edu-vfio ${EDU_OPTIONS:-} $scenario || fail "edu-vfio $scenario"
    done
}

# edu_iommufd SCENARIO...: each must hold, by this kernel's iommufd.
edu_iommufd() {
    modprobe -a vfio-pci iommufd || fail "no vfio, or no iommufd"
    for scenario; do
        # shellcheck disable=SC2086
        edu-iommufd ${EDU_OPTIONS:-} $scenario || fail "edu-iommufd $scenario"
    done
}

# interrupts NAME: how many of the interrupt with that name each processor had, one line; the interrupt's number first.
interrupts() { awk -v name="$1" '$NF == name { sub(":", ""); for (i = 1; i < NF && $i ~ /^[0-9]+$/; i++) printf "%s ", $i; print "" }' /proc/interrupts; }

# move_interrupt NAME WORK...: the interrupt goes from processor to processor while WORK is done; it must arrive at each of the first
# two, and none may be lost: the NVMe driver complains of a command whose interrupt did not come.
move_interrupt() {
    name=$1
    shift
    affinity=/proc/irq/$(interrupts "$name" | cut -d' ' -f1)/smp_affinity
    {
        "$@"
        echo $? >/work-status
    } &
    moves=0
    until [ -s /work-status ]; do
        for mask in 1 2; do
            echo $mask >"$affinity" || fail "the interrupt $name cannot be moved"
            moves=$((moves + 1))
        done
    done
    [ "$(cat /work-status)" = 0 ] || fail "$*"
    set -- $(interrupts "$name")
    echo "moved: $name $moves times, CPU 0 got $2, CPU 1 got $3"
    [ "$2" -gt 0 ] && [ "$3" -gt 0 ] || fail "$name did not reach both processors"
    ! dmesg | grep -E 'nvme.*(timeout|completion polled)' || fail "an interrupt was lost"
}

# The address of BAR 0 of a function.
bar_of() { cut -d' ' -f1 "/sys/bus/pci/devices/$1/resource" | head -n 1; }

# put_config FUNCTION OFFSET LENGTH VALUE: a number of LENGTH bytes into its configuration space.
put_config() {
    value=$(($4))
    for offset in $(seq $2 $(($2 + $3 - 1))); do
        printf "\\$(printf %o $((value & 255)))" |
            dd of="/sys/bus/pci/devices/$1/config" bs=1 seek="$offset" conv=notrunc 2>/dev/null || fail "writing configuration space"
        value=$((value >> 8))
    done
}
