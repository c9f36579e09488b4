# What the cases of the guest's life cycle share: an NVMe, an edu and an e1000e assigned, each with work to do. Sourced after lib.sh.

# L1's end of the wire to the guest's e1000e.
L1_ADDRESS=10.9.0.1

# igb_up: gives igb to L1's own driver.
igb_up() {
    modprobe igb && echo "$IGB" >/sys/bus/pci/drivers_probe
    wait_until 10 test -d "/sys/bus/pci/devices/$IGB/net" || fail "no network function at $IGB"
    wire=$(ls "/sys/bus/pci/devices/$IGB/net")
    ip address add $L1_ADDRESS/24 dev "$wire" && ip link set "$wire" up || fail "L1's end of the wire"
}

# guest_functions: what the guests' scripts share.
guest_functions() {
    echo "L1_ADDRESS=$L1_ADDRESS"
    cat $FILES/guest-life-lib.sh
}

# three_functions: as options of causeway.
three_functions() { echo "--device vfio,host=$NVME --device vfio,host=$EDU --device vfio,host=$E1000E"; }

# sound NAME SPLITS [BUS-RESETS]: nothing faulted, the audit has no difference, and what L1's kernel counted is what the statistics say.
sound() {
    no_faults "$1"
    same_counts "$@"
    ! grep 'audit:' "$1.err" | grep -v 'no difference' || fail "the audit of '$1' has a difference"
    grep -q '"differences": *\[\]' "$1.json" || fail "no audit, or one with a difference, in $1.json"
    [ "$(field "$1.json" checked)" -gt 0 ] || fail "the audit compared nothing"
    expect "faults of the unit" "$(grep -o '"faults": *{[^}]*}' "$1.json" | tr -d ' ')" '"faults":{}'
}

# reboots NUMBER [from-outside]: one VM that is reset that often, each time with DMA of all three functions under way, and whose guest does its
# work each time it is up. Every other time Linux shuts its drivers down first, else it just resets the machine. Or all resets come from outside,
# by the control socket, each after an audit.
reboots() {
    bind-vfio "$NVME" "$EDU" "$E1000E" || fail "binding"
    igb_up
    { guest_functions && cat <<'GUEST'; } | guest life
checksum buffered
network_up
edu msi
show_faults
work_begins
echo "ready"
read -r answer </dev/ttyS0
case "$answer" in
reboot)
    # Shut down while it is up, Linux's driver of the 82574 frees its buffers and leaves the receiver on: what arrives then is a fault.
    ip link set "$wire" down
    edu_at_home
    reboot -f
    ;;
reset) echo b >/proc/sysrq-trigger ;;
esac
[ "$answer" = off ] || sleep 100
work_ends
show_faults
GUEST
    mkfifo answers
    # Answers each time the guest is ready; both ends of the pipe are open so that nobody waits for the other.
    {
        number=0
        while [ $number -le "$1" ]; do
            wait_until 60 ready $((number + 1)) || exit 1
            number=$((number + 1))
            case $((number > $1 ? 2 : number % 2))${2:-} in
            0) echo reboot ;;
            1) echo reset ;;
            2*) echo off ;;
            ?from-outside)
                causeway ctl control audit | grep -q '"differences":\[\]' && causeway ctl control reset >/dev/null && continue
                causeway ctl control quit
                exit 1
                ;;
            esac
        done
    } >answers &
    mark
    count_host_operations
    # shellcheck disable=SC2046
    INPUT=answers run life "intel_iommu=on" $(three_functions) --cpus 2 --socket control
    expect "checksums of $(($1 + 1)) boots" "$(lines life 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "$(($1 + 1)) $DISK_SHA256"
    expect "MSIs of edu" "$(lines life 'msi: ' | grep -c arrived)" $((2 * ($1 + 1)))
    expect "guest_resets" "$(field life.json guest_resets)" "$1"
    # A reset of the bus: QEMU's e1000e survives the one by power state.
    expect_line life.err "$E1000E is reset with its bus"
    # Two containers of the guest's own vfio each time; the first reset is that before the start, and the last that at the end.
    sound life $((2 * ($1 + 1))) $(($1 + 2))
    lines life 'work: '
}

ready() { [ "$(grep -c '^ready' life.log)" -ge "$1" ]; }

# second_kernels CPUS: a guest with that many starts another kernel with DMA of its own under way: by kexec, and by a panic.
second_kernels() {
    bind-vfio "$NVME" "$EDU" "$E1000E" || fail "binding"
    igb_up
    { guest_functions && cat <<'GUEST'; } | guest second
dmesg | grep -E 'DMAR|kdump' | sed 's/^/second-kernel: /'
checksum buffered
network_up
edu msi
show_faults
GUEST
    { guest_functions && cat <<'GUEST'; } | guest first "$VMLINUZ" second.cpio "$(command -v kexec)"
options="$(sed 's/crashkernel=[^ ]*//' /proc/cmdline) second"
checksum buffered
network_up
show_faults
case "$options" in
*with-panic*)
    kexec --panic /files/vmlinuz /files/second.cpio "$options nr_cpus=1 reset_devices" || fail "kexec --panic"
    work_begins
    echo c >/proc/sysrq-trigger
    ;;
*)
    work_begins
    # As before an orderly reboot.
    ip link set "$wire" down
    edu_at_home
    kexec /files/vmlinuz /files/second.cpio "$options" || fail "kexec"
    ;;
esac
sleep 100
fail "this kernel still runs"
GUEST
    second_kernel by-kexec "$1" ""
    second_kernel by-panic "$1" "crashkernel=256M with-panic"
    expect_line by-panic.log 'second-kernel: .*Copied translation tables' 'second-kernel: .*Copied IR table'
}

# second_kernel NAME CPUS KERNEL-OPTIONS
second_kernel() {
    mark
    count_host_operations
    # shellcheck disable=SC2046
    CPIO=first.cpio run "$1" "intel_iommu=on $3" $(three_functions) --cpus "$2" --memory 1G
    lines "$1" 'second-kernel: '
    expect "the checksums" "$(lines "$1" 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "2 $DISK_SHA256"
    expect "MSIs of edu" "$(lines "$1" 'msi: ' | grep -c arrived)" 2
    expect "guest_resets" "$(field "$1.json" guest_resets)" 0
    # A container of the guest's own vfio in each kernel; the reset at the end.
    sound "$1" 2 2
}

# rebinds NUMBER: the guest's NVMe goes from nvme to vfio-pci, gets huge pages mapped, and goes back, that often, while the others work.
rebinds() {
    bind-vfio "$NVME" "$EDU" "$E1000E" || fail "binding"
    igb_up
    { guest_functions && echo "ROUNDS=$1" && cat <<'GUEST'; } | guest rebound "$(command -v vfio-huge)"
nvme=$(function_of 0x1b36:0x0010)
checksum buffered
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
echo 16 >/proc/sys/vm/nr_hugepages
[ "$(cat /proc/sys/vm/nr_hugepages)" = 16 ] || fail "no huge pages"
network_up
ON_CPU="taskset 2" work_begins edu network
for round in $(seq $ROUNDS); do
    taskset 1 vfio-huge "$nvme" || fail "round $round"
    echo "$nvme" >/sys/bus/pci/drivers/vfio-pci/unbind
    echo nvme >"/sys/bus/pci/devices/$nvme/driver_override"
    echo "$nvme" >/sys/bus/pci/drivers_probe
    checksum direct
done
work_ends edu network
show_faults
GUEST
    mark
    count_host_operations
    # shellcheck disable=SC2046
    run rebound "intel_iommu=on" $(three_functions) --cpus 2 --trace rebound.trace
    expect "the checksums" "$(lines rebound 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "$(($1 + 1)) $DISK_SHA256"
    expect "rounds" "$(lines rebound 'vfio-huge: ' | wc -l)" "$1"
    # One container of the guest's own vfio for each round, and one for edu.
    sound rebound $(($1 + 1))
    lines rebound 'work: '
}
