# What the nested cases share. Sourced by each case, in the shell of the nested bench's host (L1), where `causeway` meets a real KVM and a
# real VFIO. A case ends with status 1 at the first thing that is not as it should be, and says what it expected and what it got.
#
# VMM=qemu runs the same guest under QEMU with the same kind of unit: the reference that Causeway is compared with.

set -u
FILES=/causeway/files
VMM=${VMM:-causeway}
GUEST_CMDLINE="console=ttyS0 quiet mitigations=off tsc=reliable panic=-1"

fail() {
    echo "FAIL: $*"
    exit 1
}

# expect WHAT GOT WANTED
expect() { [ "$2" = "$3" ] || fail "$1 is '$2' instead of '$3'"; }

# expect_at_most WHAT GOT LIMIT
expect_at_most() {
    echo "$1: $2 (at most $3)"
    [ "$2" -le "$3" ] || fail "$1 is $2: more than $3"
}

# expect_line FILE PATTERN...: each pattern (extended, case ignored) is in the file.
expect_line() {
    in=$1
    shift
    for pattern; do
        grep -qiE -e "$pattern" "$in" || { cat "$in"; fail "no line with '$pattern' in $in"; }
    done
}

# time_left: seconds in which a guest may run. It ends 20 s before the case does, so that there is time to say what it printed.
time_left() {
    now=$(cut -d. -f1 /proc/uptime)
    left=$((${CASE_ENDS:-$((now + 620))} - now - 20))
    echo $((left > 0 ? left : 1))
}

# wait_until SECONDS COMMAND...: until the command succeeds; fails if it does not in time. SECONDS is ample on a quiet machine; others
# have three times that.
wait_until() {
    tries=$(($1 * 30 * ${BOOT_SCALE:-1}))
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || return 1
        usleep 100000
    done
}

# ---- guests ----

# guest NAME [FILE...]: makes the initrd NAME.cpio of a guest that runs the script on stdin, with guest-lib.sh, the guest programs and the
# files beside it.
guest() {
    name=$1
    shift
    { cat $FILES/guest-lib.sh && cat; } >"$name.guest.sh"
    mkinitrd "$name.cpio" "$name.guest.sh" "$(command -v edu-vfio)" "$(command -v blkread)" "$@" || fail "mkinitrd"
}

# start NAME KERNEL-OPTIONS [OPTION...]: runs the guest NAME.cpio (or $CPIO) with causeway's options. The guest's console goes to
# NAME.log, messages to NAME.err, statistics to NAME.json; the status to $STATUS. $INPUT is what it can read from its console.
start() {
    name=$1
    cmdline="$GUEST_CMDLINE $2"
    shift 2
    cpio=${CPIO:-$name.cpio}
    if [ $VMM = qemu ]; then
        # shellcheck disable=SC2046
        timeout "$(time_left)" qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -accel kvm -machine q35,kernel-irqchip=split -cpu host \
            -display none -serial stdio $(as_qemu --memory 512M "$@") -kernel "$VMLINUZ" -initrd "$cpio" -append "$cmdline" \
            </dev/null >"$name.log" 2>"$name.err"
    else
        case " $* " in *" --timeout "*) ;; *) set -- "$@" --timeout "$(time_left)" ;; esac
        causeway run --kernel "$KERNEL" --initrd "$cpio" --cmdline "$cmdline" --stats "$name.json" "$@" \
            <"${INPUT:-/dev/null}" >"$name.log" 2>"$name.err"
    fi
    STATUS=$?
}

# run NAME KERNEL-OPTIONS [OPTION...]: start, and the guest's script and the VMM must both end well.
run() {
    start "$@"
    if [ $STATUS != 0 ] || ! grep -q 'guest: exit 0' "$1.log"; then
        echo "--- $1.log (its kernel's last words, and its end)"
        grep -E 'Oops|BUG:|RIP: 0010|Kernel panic|detected stalls' "$1.log" | head -n 12
        tail -n 60 "$1.log"
        echo "--- $1.err"
        tail -n 40 "$1.err"
        fail "guest '$1' ($2): status $STATUS, $(grep -o 'guest: exit.*' "$1.log" || echo 'its script did not end')"
    fi
}

# waiting_guest: the initrd waiting.cpio of a guest that says so and waits, for an edu that is bound.
waiting_guest() {
    bind-vfio "$EDU" || fail "binding"
    guest waiting <<'GUEST'
echo "waiting"
sleep 1000
GUEST
}

# is_waiting: the guest with that initrd and waiting.log came up.
is_waiting() { wait_until 40 grep -q '^waiting' waiting.log; }

# ---- an unprivileged owner ----

# owner_of FUNCTION INITRD...: until the case ends, a user without privileges has the function, KVM, and the initrds.
owner_of() {
    group=$(basename "$(readlink "/sys/bus/pci/devices/$1/iommu_group")")
    shift
    user=1000
    grep -q "^guest:" /etc/passwd 2>/dev/null || echo "guest:x:$user:$user::/:/bin/sh" >>/etc/passwd
    chmod 666 /dev/kvm
    chown $user "/dev/vfio/$group"
    trap 'exit 143' TERM
    trap 'chmod 600 /dev/kvm; chown 0 "/dev/vfio/$group"; rm -rf /tmp/owner' EXIT
    mkdir -p /tmp/owner
    cp "$@" /tmp/owner
    chmod -R a+rX /tmp/owner
    chown $user /tmp/owner
}

# as_owner KIBIBYTES NAME KERNEL-OPTIONS [OPTION...]: start as that user, who may lock so much memory (or unlimited).
as_owner() {
    limit=$1
    name=$2
    cmdline="$GUEST_CMDLINE $3"
    shift 3
    (
        cd /tmp/owner && ulimit -l "$limit" && exec su -s /bin/sh guest -c \
            "exec causeway run --kernel $KERNEL --initrd $name.cpio --cmdline '$cmdline' --timeout $(time_left) --stats $name.json $*"
    ) </dev/null >"$name.log" 2>"$name.err"
    STATUS=$?
    [ ! -e "/tmp/owner/$name.json" ] || cp "/tmp/owner/$name.json" .
}

# causeway's options as QEMU's.
as_qemu() {
    unit="-device intel-iommu,caching-mode=on,intremap=on"
    others=
    behind=iommu_platform=on,disable-legacy=on,ats=off
    while [ $# -gt 0 ]; do
        case "$1 ${2:-}" in
        "--iommu none") unit= ;;
        "--iommu vtd,"*) unit="$unit,${2#vtd,}" ;;
        "--device vfio,"*) others="$others -device vfio-pci,${2#vfio,}" ;;
        "--device vfio-user,socket="*)
            # Its process maps the guest's memory.
            shared="-object memory-backend-memfd,id=memory,size=512M,share=on -machine memory-backend=memory"
            others="$others $shared -device {\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"${2#vfio-user,socket=}\"}}"
            ;;
        "--device virtio-blk,file="*)
            drive=$((${drive:-0} + 1))
            others="$others -drive file=${2#virtio-blk,file=},if=none,id=drive$drive,format=raw -device virtio-blk-pci,drive=drive$drive,$behind"
            ;;
        "--device virtio-net,tap="*)
            others="$others -netdev tap,id=tap,ifname=${2#virtio-net,tap=},script=no,downscript=no -device virtio-net-pci,netdev=tap,$behind"
            ;;
        "--device virtio-rng") others="$others -device virtio-rng-pci,$behind" ;;
        "--device edu"*) others="$others -device edu,dma_mask=0xffffffffffff${2#edu}" ;;
        "--cpus "*) others="$others -smp $2" ;;
        "--memory "*) others="$others -m $2" ;;
        *) fail "no QEMU option for $1" ;;
        esac
        shift 2
    done
    echo "$unit $others"
}

# lines NAME PREFIX: what the guest printed behind PREFIX.
lines() { tr -d '\r' <"$1.log" | sed -n "s/^$2//p"; }

# field FILE NAME: the sum of that number over the statistics (all devices).
field() { grep -oE "\"$2\": *[0-9]+" "$1" | awk -F': *' '{ sum += $2 } END { print sum + 0 }'; }

# ---- faults ----

# Forgets the kernel messages so far, for host_faults.
mark() {
    MARK="case mark $$ $(cut -d' ' -f1 /proc/uptime)"
    echo "$MARK" >/dev/kmsg
}

# The DMAR fault lines of L1's kernel since the mark.
host_faults() { dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep 'DMAR:.*fault'; }

# no_faults NAME: neither L1's kernel nor the guest's saw one.
no_faults() {
    ! host_faults || fail "faults in the host's log while guest '$1' ran"
    ! lines "$1" 'guest-fault: ' | grep . || fail "faults in the log of guest '$1'"
}

# ---- host operations, counted by L1's kernel ----

IOCTLS=/sys/kernel/tracing/events/syscalls/sys_enter_ioctl

count_host_operations() {
    [ -e $IOCTLS/trigger ] || fail "this kernel does not trace system calls"
    echo '!hist:keys=cmd.hex' >$IOCTLS/trigger 2>/dev/null
    echo 'hist:keys=cmd.hex' >$IOCTLS/trigger || fail "no histogram of ioctls"
}

# host_operations 3b71 (VFIO_IOMMU_MAP_DMA) or 3b72 (VFIO_IOMMU_UNMAP_DMA): how many since count_host_operations.
host_operations() { sed -nE "s/.*cmd: *$1 .*hitcount: *([0-9]+).*/\1/p" $IOCTLS/hist | grep . || echo 0; }

# ---- what must be left behind: nothing ----

# Bindings, processes, files and mounts.
host_state() {
    for device in /sys/bus/pci/devices/*; do
        echo "${device##*/} $(readlink "$device/driver")"
    done
    for process in /proc/[0-9]*; do
        readlink "$process/exe"
    done | grep -c causeway
    ls -A /tmp /dev/shm /dev/hugepages /run
    cat /proc/mounts
}

# ---- cases in several variants ----

# nvme_reads_right DOMAIN KERNEL-OPTIONS [OPTION...]: 64 MiB from the assigned NVMe have the right checksum, an assigned edu is there
# too, both are in a domain of that type (DMA, identity, none) in the guest, and nothing faults. Counts from outside equal the statistics.
nvme_reads_right() {
    domain=$1
    options=$2
    shift 2
    bind-vfio "$NVME" "$EDU" || fail "binding"
    guest nvme <<'GUEST'
checksum buffered
echo "domains $(domain_of 0x1b36:0x0010) $(domain_of 0x1234:0x11e8)"
echo "width $(unit_width)"
dmesg | grep -iE 'DMAR|iommu:' | sed 's/^/guest-iommu: /'
show_faults
GUEST
    mark
    count_host_operations
    run nvme "$options" --device vfio,host="$NVME" --device vfio,host="$EDU" "$@"
    expect "the checksum" "$(lines nvme 'sha256 ')" "$DISK_SHA256"
    expect "the domains of NVMe and edu" "$(lines nvme 'domains ')" "$domain $domain"
    no_faults nvme
    lines nvme 'guest-iommu: '
    same_counts nvme
    echo "64 MiB read right in $(lines nvme 'seconds ') s"
}

# same_counts NAME [SPLITS [BUS-RESETS]]: what L1's kernel counted is what the statistics say, and no mapping was cut (or as many as
# given). A reset of a function's bus has the same number as a map.
same_counts() {
    MAPS=$(($(host_operations 3b71) - ${3:-0}))
    UNMAPS=$(host_operations 3b72)
    echo "host operations of '$1': $MAPS maps, $UNMAPS unmaps"
    [ $VMM = causeway ] || return 0
    expect "host_maps" "$(field "$1.json" host_maps)" "$MAPS"
    expect "host_unmaps" "$(field "$1.json" host_unmaps)" "$UNMAPS"
    [ "$(field "$1.json" splits)" = "${2:-0}" ] || [ ! -e "$1.trace" ] || cuts "$1"
    expect "splits" "$(field "$1.json" splits)" "${2:-0}"
}

# cuts NAME: from the trace, the batches in which a part of what was unmapped was mapped again.
cuts() {
    awk '
        # Hex numbers with 0x and without leading zeros.
        function at_most(a, b) { return length(a) < length(b) || length(a) == length(b) && a <= b }
        function within(part, whole, p, w) {
            split(part, p, "-")
            split(whole, w, "-")
            return at_most(w[1], p[1]) && at_most(p[2], w[2])
        }
        function iova() { match($0, / iova=[^ ]*/); return substr($0, RSTART + 6, RLENGTH - 6) }
        / host unmap / { gone = iova() }
        / host map / && gone != "" && within(iova(), gone) { cut = 1 }
        lines < 20 { lines++; batch = batch "\n    " $0 }
        / notify (applied|attached) / {
            if (cut) print "cut:" batch
            cut = lines = 0
            gone = batch = ""
        }
    ' "$1.trace"
}

# edu_in_guest SPLITS COMMAND OPTION...: the command (guest-lib's `edu SCENARIO...`) inside a guest with $EDU_CMDLINE, if that is set. Its
# vfio demands interrupt remapping.
# When a container gets its first group, Linux' vfio maps two pages at once and unmaps one, to see whether that works: one split for
# each scenario on an assigned function.
edu_in_guest() {
    splits=$1
    printf '%s\nshow_faults\n' "$2" | guest edu
    shift 2
    mark
    count_host_operations
    run edu "${EDU_CMDLINE:-intel_iommu=on}" "$@"
    grep -E '^(roundtrip|msi|outside|armed|readonly|big|loop|fault):' edu.log
    same_counts edu "$splits"
}
