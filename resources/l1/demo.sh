#!/bin/sh
# The demonstration: a guest, its NVMe disk assigned, 64 MiB read and checked; with its memory as boot left it, and settled.
. /causeway/files/measure.sh
bind-vfio "$NVME" || exit 1
mkinitrd /tmp/guest.cpio /causeway/files/reads.sh "$(command -v blkread)" || exit 1
for read in $DEMO_READS; do
    faults_before=$(dmesg | grep -c 'DMAR:.*fault')
    boot "/tmp/$read" causeway /tmp/guest.cpio "$DEMO_OPTIONS reads=$read,checksum" "$NVME"
    {
        echo "status $STATUS"
        echo "init $INIT"
        echo "counted_maps $MAPS"
        echo "counted_unmaps $UNMAPS"
        echo "host_faults $(($(dmesg | grep -c 'DMAR:.*fault') - faults_before))"
        echo "host_device $NVME"
    } >"/causeway/out/$read.facts"
    cp "/tmp/$read.log" "/tmp/$read.err" /causeway/out/
    cp "/tmp/$read.json" /causeway/out/ 2>/dev/null
done
unbind-vfio "$NVME"
exit 0
