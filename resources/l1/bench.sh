#!/bin/sh
# Causeway beside QEMU in one L1, with the same guest, disk and options. A line for each run.
. /causeway/files/measure.sh
# Both unpack the same kernel.
KERNEL=$VMLINUZ
bind-vfio "$NVME" || exit 1
mkinitrd /tmp/guest.cpio /causeway/files/reads.sh "$(command -v blkread)" || exit 1
qemu-system-x86_64 --unpack-only || exit 1

# once VMM READS
once() {
    boot /tmp/bench "$1" /tmp/guest.cpio "intel_iommu=on reads=$2" "$NVME"
    if [ $STATUS != 0 ] || [ -z "$INIT" ] || ! grep -q 'guest: exit 0' /tmp/bench.log; then
        echo "failed $1 $2: status $STATUS"
        tail -n 20 /tmp/bench.log /tmp/bench.err
        exit 1
    fi
}

for vmm in causeway qemu; do
    for reads in idle buffered-unsettled direct-unsettled buffered direct small; do
        once $vmm $reads
        [ $vmm = qemu ] || cp /tmp/bench.json /causeway/out/$reads.json
        echo "count $vmm $reads $MAPS $UNMAPS"
    done
done
round=1
while [ $round -le "$ROUNDS" ]; do
    order="causeway qemu"
    [ $((round % 2)) = 1 ] || order="qemu causeway"
    for vmm in $order; do
        once $vmm buffered-unsettled,direct-unsettled,buffered,direct,small
        seconds() { said /tmp/bench "$1 seconds"; }
        echo "run $vmm $round $INIT $(seconds buffered-unsettled) $(seconds direct-unsettled) $(seconds buffered) $(seconds direct) $(seconds small)"
    done
    round=$((round + 1))
done
unbind-vfio "$NVME"
