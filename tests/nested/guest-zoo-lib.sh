# The work of each kind of function in the zoo's guests; stands behind guest-lib.sh.
# zoo_work prints `zoo: KIND VENDOR DEVICE DRIVER RESULT...`, which zoo-lib.sh compares with what it should be.

# One network function must not answer for another.
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce
net=0

# zoo_work KIND FUNCTION WORK DRIVER: what does not work is said, and the others are tried as well.
zoo_work() {
    kind=$1
    function=$2
    path=/sys/bus/pci/devices/$function
    started=$(cut -d' ' -f1 /proc/uptime)
    if [ ! -d "$path" ]; then
        echo "zoo: $kind is not there"
        return
    fi
    # Each has a network of its own.
    [ "$3" != network ] || net=$((net + 1))
    result=$("$3" "$4" 2>/zoo-errors) || result="$result, and then: $(tail -n 3 /zoo-errors | tr '\n' ' ')"
    bound=$(readlink "$path/driver") || bound=none
    echo "zoo: $kind $(cat "$path/vendor" "$path/device" | tr '\n' ' ')${bound##*/} $result"
    echo "zoo-time: $kind $(awk "BEGIN { print $(cut -d' ' -f1 /proc/uptime) - $started }") s"
}

# within SECONDS COMMAND...
within() {
    tries=$(($1 * 20))
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        usleep 50000
    done
}

# A disk that is below the function.
disk_below() {
    for block in /sys/block/*; do
        case $(readlink -f "$block") in */"$function"/*) disk=${block##*/} && return ;; esac
    done
    return 1
}

disk() {
    case $1 in
    virtio-pci) modprobe virtio_blk ;;
    xhci_hcd) modprobe -a xhci-pci sd_mod usb-storage ;;
    ehci-pci | ohci-pci) modprobe -a "$1" sd_mod usb-storage ;;
    sdhci-pci) modprobe -a sdhci-pci mmc_block ;;
    nvme) modprobe nvme ;;
    *) modprobe -a "$1" sd_mod ;;
    esac || return
    within 30 disk_below || { echo "no disk" && return 1; }
    wait-for "/dev/$disk" || return
    blkread "/dev/$disk" direct 65536 16 --sha256 >/read || return
    echo "sha256 $(sed -n 's/^sha256 //p' /read)"
}

interface_below() { interface=$(ls "$path/net" "$path"/virtio*/net 2>/dev/null | grep -v :) && [ -n "$interface" ]; }

answered() { ping -c 1 -W 1 -I "$interface" $1 >/dev/null 2>&1; }

network() {
    case $1 in virtio-pci) modprobe virtio_net ;; *) modprobe "$1" ;; esac || return
    within 20 interface_below || { echo "no interface" && return 1; }
    ip address add 10.9.$net.2/24 dev "$interface" && ip link set "$interface" up || return
    within 30 answered 10.9.$net.1 || { echo "no answer, carrier $(cat "/sys/class/net/$interface/carrier")" && return 1; }
    answers=$(ping -A -c 20 -w 20 -q -s 1400 -I "$interface" 10.9.$net.1 | sed -n 's/.*, \([0-9]*\) packets received.*/\1/p')
    before=$(cat "/sys/class/net/$interface/statistics/rx_bytes")
    page=$(wget -q -O - http://10.9.$net.1/page | sha256sum | cut -d' ' -f1)
    # By this function, and by no other.
    [ $(($(cat "/sys/class/net/$interface/statistics/rx_bytes") - before)) -gt 1048576 ] || echo "not by $interface"
    echo "answers $answers page $page"
    ip link set "$interface" down
    # An interface that is down leaves the rings of a virtio function in use: a packet at power-off, with translation off, would be a fault.
    [ "$1" != virtio-pci ] || rmmod virtio_net
}

sound() {
    modprobe -a snd-hda-codec-generic snd-hda-intel || return
    wait-for /dev/snd/pcmC0D0p 20 || return
    codec=$(sed -n 's/^Vendor Id: //p' /proc/asound/card0/codec#0)
    pcm-play /dev/snd/pcmC0D0p 500 >/played || return
    echo "codec $codec $(sed 's/ in .*//' /played)"
}

random() {
    modprobe virtio_rng || return
    echo virtio_rng.0 >/sys/class/misc/hw_random/rng_current || return
    for piece in 1 2 3 4; do
        dd if=/dev/hwrng bs=64 count=1 2>/dev/null | sha256sum
    done | sort -u | wc -l | sed 's/^/different /'
}

# Its driver is the guest's own vfio.
edu() {
    modprobe -a vfio-pci vfio_iommu_type1 || return
    for scenario in roundtrip msi; do
        edu-vfio --bdf "$function" $scenario >/edu-output || { cat /edu-output >&2 && return 1; }
    done
    echo "roundtrip msi"
}

# All it has is an I/O BAR. What its FIFO does not take at once goes out by its interrupts.
serial() {
    ports=$(awk 'NR == 1 { print $1, $2 }' "$path/resource")
    set -- $ports
    # Newer kernels have devices of the serial core between.
    tty=$(ls -d "$path"/tty/ttyS* "$path"/*/*/tty/ttyS* 2>/dev/null | head -n 1)
    tty=${tty##*/}
    wait-for "/dev/${tty:?no port}" || return
    dd if=/dev/zero of="/dev/$tty" bs=100 count=1 2>/dev/null || return
    port=$(grep "^${tty#ttyS}: " /proc/tty/driver/serial)
    echo "ports $(($2 - $1 + 1)) $(echo "$port" | sed 's/.*uart:\([^ ]*\) .*tx:\([0-9]*\) .*/\1 sent \2/')"
}
