# topology: zoo
# limit: 2400
# long
# Each function of the zoo alone in a guest, under Causeway and under QEMU, and a table of both: what works under QEMU works under Causeway. Alone,
# since functions that share a line of L1 come to a stop under QEMU when their guest resets itself.
. /causeway/files/lib.sh
. /causeway/files/zoo-lib.sh

qemu-system-x86_64 --unpack-only || fail "no QEMU in L1"
# alone KIND...
alone() {
    for kind; do
        # One that hangs does not take the time of all.
        CASE_ENDS=$(($(cut -d. -f1 /proc/uptime) + 100 * ${BOOT_SCALE:-1}))
        zoo_run "$kind" "$kind"
        tail -n 1 $VMM.results | sed "s/^/$VMM: /"
    done
}
for VMM in causeway qemu; do
    : >$VMM.results
    virtual_functions
    wire_up "$IGB"
    alone ahci xhci ehci ohci sdhci megasas virtio_blk nvme nvme_many nvme_vf
    alone e1000 e1000e igb_vf rtl8139 vmxnet3 virtio_net hda virtio_rng edu pci_serial
    wire_down
    no_virtual_functions
    in_l1 "$E1000E" e1000e
    wire_up "$E1000E"
    alone igb nvme_sriov
    wire_down
done
echo "| function | Causeway | QEMU |"
echo "|---|---|---|"
worse=
while read -r kind result; do
    reference=$(sed -n "s/^$kind //p" qemu.results)
    echo "| $kind | $result | $reference |"
    [ "$reference" != yes ] || [ "$result" = yes ] || worse="$worse $kind"
done <causeway.results
[ -z "$worse" ] || fail "what works under QEMU does not under Causeway:$worse"
