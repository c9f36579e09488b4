# topology: bridge
# Two edus that share a host group, behind one PCIe-to-PCI bridge of the guest: the guest, too, has them in one group, and moves both between
# spaces with one context entry. So its vfio can give one of them a domain, and that works: the host's group has agreed.
. /causeway/files/lib.sh

bind-vfio "$EDU" "$EDU2" || fail "binding"
expect "the host's group has both" "$(ls "/sys/bus/pci/devices/$EDU/iommu_group/devices" | grep -cE "$EDU|$EDU2")" 2
guest both <<'GUEST'
devices=/sys/bus/pci/devices
edus() { grep -lx 0x11e8 $devices/*/device | xargs -n 1 dirname | xargs -n 1 basename; }
for function in $(edus); do
    echo "group: $(ls "$devices/$function/iommu_group/devices" | xargs)"
    edu "--bdf $function roundtrip"
done
show_faults
GUEST
mark
run both intel_iommu=on --device pcie-pci-bridge,id=br,addr=08.0 --device vfio,host="$EDU",bus=br --device vfio,host="$EDU2",bus=br
expect "functions in a group of the bridge and both" "$(grep -c '^group: 0000:00:08.0 0000:..:01.0 0000:..:02.0' both.log)" 2
no_faults both
expect_line both.err "no difference"
! grep "share a host group" both.err || fail "it is said where it is so already"

# On bus 0 they are in groups of their own, and it is said what helps.
guest apart </dev/null
run apart intel_iommu=off --device vfio,host="$EDU" --device vfio,host="$EDU2"
expect_line apart.err "share a host group.*bus="
