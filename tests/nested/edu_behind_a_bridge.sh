# Two edus behind a PCIe-to-PCI bridge, in a guest whose Linux drives the unit: it has them in one group with the bridge, their one context
# entry is the bridge's, and each reaches what its vfio mapped for it, and interrupts. What is blocked is recorded by the bridge's id. Beside
# them is one behind a bridge behind a root port; a further one comes by hot-plug.
# limit: 600
. /causeway/files/lib.sh
. /causeway/files/plug-lib.sh

{
    echo "$PLUG_GUEST"
    cat <<'GUEST'
devices=/sys/bus/pci/devices
edus() { grep -lx 0x11e8 $devices/*/device | xargs -n 1 dirname | xargs -n 1 basename; }
for function in $(edus); do
    above=$(basename "$(dirname "$(readlink -f "$devices/$function")")")
    echo "edu $function behind $above in the group of: $(ls "$devices/$function/iommu_group/devices" | xargs)"
    edu "--bdf $function roundtrip" "--bdf $function msi"
    # Of its faults Linux prints ten lines in five seconds: two for each of these, so one function of each bridge is blocked.
    case $function in *:01.0) edu "--bdf $function armed" ;; esac
done
echo "used $(edus | wc -l)"
until_so '[ $(edus | wc -l) = 4 ]'
for function in $(edus); do
    edu "--bdf $function roundtrip"
done
show_faults
GUEST
} | guest plug
start plug intel_iommu=on --root-ports 2 --socket "$SOCKET" --device pcie-pci-bridge,id=br,addr=08.0 --device edu,bus=br,id=a \
    --device edu,bus=br,id=b --device pcie-pci-bridge,id=far,port=1 --device edu,bus=far,id=c &
printed "used 3" 120
near=$(sed -n 's/^edu 0000:\(..\):01.0 behind 0000:00:08.0 in.*/\1/p' plug.log)
far=$(sed -n 's/^edu 0000:\(..\):01.0 behind 0000:..:00.0 in.*/\1/p' plug.log)
expect_line plug.log "^edu 0000:$near:01.0 behind .* in the group of: 0000:00:08.0 0000:$near:01.0 0000:$near:02.0.?$" \
    "^edu 0000:$near:02.0 behind .* in the group of: 0000:00:08.0 0000:$near:01.0 0000:$near:02.0.?$" \
    "^edu 0000:$far:01.0 behind .* in the group of: 0000:..:00.0 0000:$far:01.0.?$"
ctl iommu tables >tables.shown || fail "the tables cannot be shown"
expect_line tables.shown "^$near:00.0 a,b, domain [0-9]*" "^$far:00.0 c, domain [0-9]*"
ctl iommu tables --device b >b.shown || fail "the tables of an edu behind the bridge cannot be shown"
expect_line b.shown "^$near:00.0 a,b, domain [0-9]*"
ctl add --device edu,port=2,id=comes || fail "adding"
wait
grep -q "guest: exit 0" plug.log || { tail -n 40 plug.log; cat plug.err; fail "the guest"; }
expect_line plug.err "no difference"
expect_line plug.log "guest-fault: .*DMA Write.*Request device .$near:00.0" "guest-fault: .*DMA Write.*Request device .$far:00.0"
expect "faults by other ids" "$(grep 'guest-fault: .*Request device' plug.log | grep -vE "\[($near|$far):00.0\]")" ""
