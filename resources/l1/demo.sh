#!/bin/sh
# The demonstration: one guest, its NVMe disk assigned, 64 MiB read and checked.
. /causeway/files/measure.sh
bind-vfio "$NVME" || exit 1
mkinitrd /tmp/guest.cpio /causeway/files/reads.sh "$(command -v blkread)" || exit 1
faults_before=$(dmesg | grep -c 'DMAR:.*fault')
boot /tmp/demo causeway /tmp/guest.cpio "$DEMO_OPTIONS reads=buffered,checksum" "$NVME"
{
    echo "status $STATUS"
    echo "init $INIT"
    echo "counted_maps $MAPS"
    echo "counted_unmaps $UNMAPS"
    echo "host_faults $(($(dmesg | grep -c 'DMAR:.*fault') - faults_before))"
    echo "host_device $NVME"
} >/causeway/out/facts
cp /tmp/demo.log /tmp/demo.err /causeway/out/
cp /tmp/demo.json /causeway/out/ 2>/dev/null
unbind-vfio "$NVME"
exit 0
