# A storm of changes to interrupt remapping entries: edu's MSI arrives once each time and at the processor it was moved to; while they are
# raised without a pause, none comes to the old processor after a move; and while the guest moves them as fast as it can and reads its
# NVMe, none is lost, none comes twice, and none is a fault.
. /causeway/files/lib.sh

# L1's processor delivers an interrupt twice once in a long while (docs/nested-bench.md). Its handler then ends two, of which KVM has only
# one in service; of an interrupt that we sent twice it has both. So no more may come twice than KVM was told the end of none.
ENDS=/sys/kernel/tracing/events/kvm/kvm_eoi
ends_of_none() { sed -nE 's/.*vector: *(-1|4294967295|18446744073709551615) .*hitcount: *([0-9]+).*/\2/p' $ENDS/hist | grep . || echo 0; }
echo 'hist:keys=vector' >$ENDS/trigger || fail "no histogram of KVM's ends of interrupts"

bind-vfio "$NVME" "$EDU" || fail "binding"
guest storm <<'GUEST'
wait-for /dev/nvme0n1 20 || fail "no NVMe disk"
modprobe -a vfio-pci vfio_iommu_type1 || fail "no vfio"
# The storm waits for the end of handlers by way of RCU, which else takes its time.
echo 1 >/sys/kernel/rcu_expedited
edu-vfio storm 500 --twice 20 &
storm=$!
# The administration queue's interrupt is the one of NVMe's that can be moved; its commands are issued while the other queues read.
move_interrupt nvme0q0 sh -c 'for i in $(seq 12); do echo 1 >/sys/class/nvme/nvme0/rescan_controller; blkread /dev/nvme0n1 direct 4096 100 >/dev/null || exit 1; done'
checksum direct
wait $storm || fail "the storm"
show_faults
GUEST
mark
run storm intel_iommu=on --device vfio,host="$NVME" --device vfio,host="$EDU" --cpus 2
lines storm 'storm: '
lines storm 'moved: '
grep -q 'vector: .* hitcount' $ENDS/hist || fail "KVM's ends of interrupts were not counted"
expect_at_most "interrupts that came twice" "$(lines storm 'twice: ')" "$(ends_of_none)"
expect "phases of the storm" "$(grep -c '^storm: ' storm.log)" 4
expect "the checksum" "$(lines storm 'sha256 ')" "$DISK_SHA256"
no_faults storm
expect "faults of the unit" "$(grep -o '"faults":{[^}]*}' storm.json)" '"faults":{}'
# Each move changed an entry.
[ "$(field storm.json interrupt_entry)" -gt 500 ] || fail "$(field storm.json interrupt_entry) invalidations are no storm"
