# limit: 600
# The host's vfio-pci is unbound from a function behind a root port of a running guest. A guest that listens is asked for it, lets go, and runs on;
# the function can come again. From one that does not listen it is taken when the host asks again, ten seconds later, and that guest runs on, too.
. /causeway/files/lib.sh
. /causeway/files/plug-lib.sh

# taken_back: the host wants its function, and gets it while the guest runs.
taken_back() {
    is_given_back() { [ ! -e "/sys/bus/pci/devices/$EDU/driver" ]; }
    echo "$EDU" >/sys/bus/pci/drivers/vfio-pci/unbind &
    unbinding=$!
    wait_until 60 is_given_back || { cat plug.err; fail "the function is not given back"; }
    wait $unbinding
    is_gone taken
    bind-vfio "$EDU" && edu-vfio --bdf "$EDU" roundtrip || fail "the device does not work afterwards"
}

bind-vfio "$EDU" || fail "binding"
{
    echo "$PLUG_GUEST"
    cat <<'GUEST'
edu=/sys/bus/pci/devices/0000:01:00.0
for round in 1 2; do
    until_so "[ -e $edu ]"
    edu roundtrip
    echo "worked $round"
    until_so "[ ! -e $edu ]"
    echo "lost $round"
done
show_faults
GUEST
} | guest plug
mark
start plug intel_iommu=on --root-ports 1 --device vfio,host="$EDU",port=1,id=taken --socket "$SOCKET" &
for round in 1 2; do
    printed "worked $round" 90
    taken_back
    printed "lost $round" 60
    [ $round = 2 ] || ctl add --device vfio,host="$EDU",port=1,id=taken || { cat plug.err; fail "adding"; }
done
ended
expect "how often the guest was asked" "$(grep -c 'taken: the host wants the device back: the guest is asked for it' plug.err)" 2
! grep 'did not let go' plug.err || fail "the guest was not given the time"

# Without the service of hot-plug.
guest plug <<'GUEST'
edu=/sys/bus/pci/devices/0000:01:00.0
value() { hexdump -n 4 -v -e '1/4 "%08x"' $edu/config; }
echo "before $(value)"
tries=1200
until [ "$(value)" = ffffffff ]; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || fail "the function is there yet"
    usleep 100000
done
echo "gone"
show_faults
GUEST
mark
start plug "intel_iommu=on pcie_ports=compat" --root-ports 1 --device vfio,host="$EDU",port=1,id=taken --socket "$SOCKET" &
printed before 90
taken_back
ended
expect "what the guest saw" "$(lines plug 'before ')" 11e81234
expect_line plug.err "taken: the host wants the device back: the guest is asked for it" "the guest did not let go of it: it is taken away"
