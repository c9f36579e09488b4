#!/bin/sh
# A guest's own pciehp takes an edu that comes while it runs and does DMA with it behind the IOMMU; it gives it back when it is asked to,
# and takes it again. Each function is alone in its group.
# limit: 600
# long
. /causeway/files/lib.sh
. /causeway/files/plug-lib.sh

{
    echo "$PLUG_GUEST"
    cat <<'GUEST'
EDU=/sys/bus/pci/devices/0000:01:00.0
echo "ready"
for round in 1 2; do
    until_so "[ -e $EDU ]"
    edu "--bdf 0000:01:00.0 roundtrip" "--bdf 0000:01:00.0 msi"
    echo "used $round in the group of $(ls $EDU/iommu_group/devices | wc -l)"
    until_so "[ ! -e $EDU ]"
    echo "gone $round"
done
show_faults
GUEST
} | guest plug
mark
start plug intel_iommu=on --root-ports 2 --socket "$SOCKET" &
printed ready 90
refused "root ports 1 to 2" add --device edu,port=3
for round in 1 2; do
    ctl add --device edu,port=1,id=comes || fail "adding"
    refused "another device has id=comes" add --device edu,id=comes
    printed "used $round in the group of 1" 60
    ctl devices | grep -q '"port":1,"addr":"00:10.0","device":"comes","powered":true,"removing":false' || fail "the port does not say so"
    ctl remove comes || fail "removing"
    refused "is being removed" remove comes
    printed "gone $round" 60
    is_gone comes
done
ended
