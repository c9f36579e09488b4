# What guests of the life cycle's cases share; stands behind guest-lib.sh.

# network_up: the e1000e reaches L1.
network_up() {
    modprobe e1000e || fail "no e1000e"
    wire=$(ls "/sys/bus/pci/devices/$(function_of 0x8086:0x10d3)/net") || fail "no network function"
    ip address add 10.9.0.2/24 dev "$wire" && ip link set "$wire" up || fail "the guest's end of the wire"
    tries=0
    until ping -c 1 -W 1 $L1_ADDRESS >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 20 ] || fail "no answer from L1"
    done
}

# unanswered: how many echo requests this kernel sent that have no answer. `ping` does not count what it has not read when it ends.
unanswered() {
    awk '$1 == "Icmp:" && names { print $out - $in_; exit }
        $1 == "Icmp:" { names = 1; for (i = 2; i <= NF; i++) { if ($i == "OutEchos") out = i; if ($i == "InEchoReps") in_ = i } }' /proc/net/snmp
}

# work_begins [nvme] [edu] [network]: those (all if none is given) are under DMA from now on.
work_begins() {
    [ $# -gt 0 ] || set -- nvme edu network
    # Before the work: loading a module rewrites the kernel's text, which QEMU's TCG does not always bear while several processors run it
    # (docs/nested-bench.md).
    modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
    for kind; do
        case $kind in
        nvme)
            { until [ -e /work-over ]; do blkread /dev/nvme0n1 direct 4096 64 >/dev/null || exit 1; done; } &
            nvme_work=$!
            ;;
        edu)
            ${ON_CPU:-} edu-vfio busy /work-over --at-home-from /edu-at-home >/edu-work &
            edu_work=$!
            wait-for /edu-work 20
            until grep -q begins /edu-work; do usleep 10000; done
            ;;
        network)
            unanswered_before=$(unanswered)
            ${ON_CPU:-} ping -A -q -s 1400 $L1_ADDRESS >/network-work 2>&1 &
            network_work=$!
            ;;
        esac
    done
}

# edu_at_home: the edu's work goes on, at the IOVA that is its page's guest-physical address. A kernel that goes down in order turns translation
# off, and from then on any other IOVA leads into memory that belongs to somebody else, on hardware as well: where programs are ended first,
# their devices are quiet by then. This one page is the same with translation and without, so its DMA is never blocked in between.
edu_at_home() {
    touch /edu-at-home
    until grep -q 'at home' /edu-work; do usleep 10000; done
}

# work_ends [nvme] [edu] [network]: it went well up to now.
work_ends() {
    [ $# -gt 0 ] || set -- nvme edu network
    touch /work-over
    for kind; do
        case $kind in
        nvme) wait $nvme_work || fail "the NVMe's work" ;;
        edu)
            wait $edu_work || fail "the edu's work"
            grep 'came back' /edu-work | sed 's/^/work: /'
            ;;
        network)
            kill -INT $network_work
            wait $network_work
            grep 'packets transmitted' /network-work | sed 's/^/work: /'
            # Packets may be lost where the machine is slow, as on any network; a device that lost its rings would answer none.
            sent=$(sed -n 's/ packets transmitted.*//p' /network-work)
            tries=0
            until [ "$sent" -gt 0 ] && [ $(($(unanswered) - unanswered_before)) -le $((sent / 100)) ]; do
                tries=$((tries + 1))
                [ $tries -lt 50 ] || {
                    dmesg | grep -E 'e1000e|NETDEV' | tail -n 20
                    fail "the network's work: $(($(unanswered) - unanswered_before)) of $sent requests have no answer"
                }
                usleep 100000
            done
            echo "network: $(($(unanswered) - unanswered_before)) of $sent requests have no answer"
            ;;
        esac
    done
}
