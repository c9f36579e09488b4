# The host's vfio-pci is unbound from a function that a guest uses, and asks for it (VFIO's request interrupt): the run ends and says why, and the
# unbinding, which waits for that, comes to its end.
. /causeway/files/lib.sh

waiting_guest
{
    is_waiting || exit 1
    # This waits until the function is closed.
    echo "$EDU" >/sys/bus/pci/drivers/vfio-pci/unbind && date +%s >unbound
} &
start waiting "" --device vfio,host="$EDU"
cat waiting.err
grep -q '^waiting' waiting.log || fail "the guest did not come up"
expect "the status" $STATUS 6
expect_line waiting.err "wants the device back"
wait_until 20 test -s unbound || fail "the function is not given back"
[ ! -e "/sys/bus/pci/devices/$EDU/driver" ] || fail "it still has a driver"
bind-vfio "$EDU" && edu-vfio --bdf "$EDU" roundtrip || fail "the device does not work afterwards"
