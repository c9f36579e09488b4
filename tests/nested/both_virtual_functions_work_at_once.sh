# topology: zoo
# long
# limit: 600
# One guest has a virtual function of igb and one of an NVMe, whose physical functions stay in L1: both move data at once. While pages come over
# the network, what the disk reads has the right checksum, and the other way round; a stated number of each, and no fault.
. /causeway/files/lib.sh
. /causeway/files/zoo-lib.sh

virtual_functions
wire_up "$IGB"
bind-vfio "$IGB_VF" "$NVME_VF" || fail "binding"
[ -e zoo-base.cpio ] || cat /causeway/guest/base.cpio /causeway/guest/zoo.cpio >zoo-base.cpio
{
    echo "DISK='$(content nvme_vf)' PAGE='$PAGE_SHA256' ROUNDS=4"
    cat $FILES/guest-zoo-lib.sh
    cat <<'GUEST'
modprobe -a nvme igbvf || fail "no drivers"
function=$(function_of 0x1b36:0x0010)
path=/sys/bus/pci/devices/$function
within 30 disk_below && wait-for "/dev/$disk" || fail "no disk"
function=$(function_of 0x8086:0x10ca)
path=/sys/bus/pci/devices/$function
within 30 interface_below || fail "no interface"
ip address add 10.9.1.2/24 dev "$interface" && ip link set "$interface" up || fail "the guest's end of the wire"
within 30 answered 10.9.1.1 || fail "no answer, carrier $(cat "/sys/class/net/$interface/carrier")"

reads() { wc -l </reads; }
pages() { wc -l </pages; }
touch /reads /pages
# Each goes on until both have done their rounds, so that all of them had the other beside it.
over() { [ "$(reads)" -ge $ROUNDS ] && [ "$(pages)" -ge $ROUNDS ]; }
{
    until over; do
        sum=$(blkread "/dev/$disk" direct 65536 16 --sha256) || exit 1
        echo "$sum" | sed -n 's/^sha256 //p' >>/reads
    done
} &
reader=$!
until over; do
    kill -0 $reader 2>/dev/null || fail "reading the disk"
    wget -q -O - http://10.9.1.1/page | sha256sum | cut -d' ' -f1 >>/pages
done
wait $reader || fail "reading the disk"
# Of the virtual function's own counter: nothing came another way.
received=$(cat "/sys/class/net/$interface/statistics/rx_bytes")
[ "$received" -ge $(($(pages) << 20)) ] || fail "$received bytes for $(pages) pages"
echo "at once: $(reads) reads, $(pages) pages"
expect_all() { [ "$(sort -u "$1")" = "$2" ] || fail "$1: $(sort "$1" | uniq -c), and not $2"; }
expect_all /reads "$DISK"
expect_all /pages "$PAGE"
ip link set "$interface" down
show_faults
GUEST
} | INITRD=$PWD/zoo-base.cpio guest both
mark
count_host_operations
run both "$ZOO_OPTIONS" --cpus 2 --device vfio,host="$IGB_VF" --device vfio,host="$NVME_VF"
lines both 'at once: ' | grep . || fail "nothing was moved"
no_faults both
same_counts both
expect_line both.err "no difference"
# The physical functions went on in L1 meanwhile.
expect "the state of L1's $controller" "$(cat "/sys/class/nvme/$controller/state")" live
expect "the carrier of L1's $wire" "$(cat "/sys/class/net/$wire/carrier")" 1
! dmesg | awk -v mark="$MARK" 'index($0, mark) { seen = 1 } seen' | grep -E 'BUG|Oops|WARNING|nvme.*timeout' || fail "the host's kernel"
