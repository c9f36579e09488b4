# Two edu behind one bridge are one group. With the second one at another driver the group is not viable: the start is refused, and names
# the other member and its driver.
# topology: bridge
. /causeway/files/lib.sh

guest never <<'GUEST'
fail "this guest must not run"
GUEST
bind-vfio "$EDU" || fail "binding"
modprobe uio_pci_generic || fail "this kernel has no uio_pci_generic"
echo uio_pci_generic >"/sys/bus/pci/devices/$EDU2/driver_override"
echo "$EDU2" >/sys/bus/pci/drivers_probe
expect "the second edu's driver" "$(basename "$(readlink "/sys/bus/pci/devices/$EDU2/driver")")" uio_pci_generic
before=$(host_state)
start never "" --device vfio,host="$EDU"
cat never.err
expect "the status" $STATUS 4
expect_line never.err "group" "viable|$EDU2" "$EDU2" "uio_pci_generic"
expect "what is there afterwards" "$(host_state)" "$before"

# Without a driver the other member keeps the group viable, and the same start works.
unbind-vfio "$EDU2"
guest fine </dev/null
run fine "intel_iommu=off" --device vfio,host="$EDU"
