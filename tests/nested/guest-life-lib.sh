# What guests of the life cycle's cases share; stands behind guest-lib.sh.

# network_up: the e1000e reaches L1.
network_up() {
    modprobe e1000e || fail "no e1000e"
    wire=$(ls "/sys/bus/pci/devices/$(function_of 0x8086:0x10d3)/net") || fail "no network function"
    ip address add 10.9.0.2/24 dev "$wire" && ip link set "$wire" up || fail "the guest's end of the wire"
    reached
}

# reached: L1 answers, now that the link is up.
reached() {
    tries=0
    until ping -c 1 -W 1 $L1_ADDRESS >/dev/null 2>&1; do
        tries=$((tries + 1))
        [ $tries -lt 60 ] || { wire_counters; fail "no answer from L1"; }
    done
}

# icmp NAME: that counter of this kernel.
icmp() {
    awk -v name="$1" '$1 == "Icmp:" && at { print $at; exit }
        $1 == "Icmp:" { for (i = 2; i <= NF; i++) if ($i == name) at = i }' /proc/net/snmp
}

# answers NUMBER: that many echo requests are answered.
answers() {
    wanted=$(($(icmp InEchoReps) + $1))
    ping -A -c $(($1 + $1 / 10)) -q -s 1400 $L1_ADDRESS >/answers
    [ "$(icmp InEchoReps)" -ge $wanted ] || { cat /answers; wire_counters; fail "not $1 answers"; }
}

# wire_counters: what the function's driver and this kernel counted, for who asks where a packet went.
wire_counters() {
    grep -H . "/sys/class/net/$wire/statistics/"* | grep -v ':0$' | sed 's|.*/||'
    grep Icmp: /proc/net/snmp
    dmesg | grep -E 'e1000e|NETDEV' | tail -n 20
}

# comes WHAT TEST...: waits for what a machine that is busy takes long to do; whoever waits for it in vain says so.
comes() {
    what=$1
    shift
    tries=1200
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { [ ! -e /network-work ] || wire_counters; fail "$what"; }
        usleep 100000
    done
}
have_read() { [ "$(wc -l </nvme-work)" -ge "$1" ]; }
have_answers() { [ $(($(icmp InEchoReps) - answers_before)) -ge "$1" ]; }

# unanswered: how many echo requests this kernel sent that have no answer. `ping` does not count what it has not read when it ends.
unanswered() { echo $(($(icmp OutEchos) - $(icmp InEchoReps))); }

# work_begins [nvme] [edu] [network]: those (all if none is given) are under DMA from now on: each has done some of its work.
work_begins() {
    [ $# -gt 0 ] || set -- nvme edu network
    # Before the work: loading a module rewrites the kernel's text, which QEMU's TCG does not always bear while several processors run it
    # (docs/nested-bench.md).
    modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
    for kind; do
        case $kind in
        nvme)
            : >/nvme-work
            { until [ -e /work-over ]; do blkread /dev/nvme0n1 direct 4096 64 >/dev/null && echo read >>/nvme-work || exit 1; done; } &
            nvme_work=$!
            comes "the NVMe reads nothing" have_read 1
            ;;
        edu)
            ${ON_CPU:-} edu-vfio busy /work-over --at-home-from /edu-at-home >/edu-work &
            edu_work=$!
            comes "the edu does not begin" grep -q begins /edu-work
            ;;
        network)
            unanswered_before=$(unanswered)
            answers_before=$(icmp InEchoReps)
            sent_before=$(icmp OutEchos)
            ${ON_CPU:-} ping -A -q -s 1400 $L1_ADDRESS >/network-work 2>&1 &
            network_work=$!
            comes "not 10 answers" have_answers 10
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

# work_ends [nvme] [edu] [network]: it went well up to now, and there was enough of it to tell.
work_ends() {
    [ $# -gt 0 ] || set -- nvme edu network
    for kind; do
        case $kind in
        nvme) comes "the NVMe reads no more" have_read 3 ;;
        network) comes "not 30 answers" have_answers 30 ;;
        esac
    done
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
            # Packets may be lost where the machine is slow, as on any network; a device that lost its rings would answer none. The last
            # answer may be on its way.
            sent=$(($(icmp OutEchos) - sent_before))
            enough_answers() { [ $(($(unanswered) - unanswered_before)) -le $((sent / 20)) ]; }
            comes "the network's work: of $sent requests more than $((sent / 20)) have no answer" enough_answers
            echo "network: $(($(unanswered) - unanswered_before)) of $sent requests have no answer"
            ;;
        esac
    done
}
