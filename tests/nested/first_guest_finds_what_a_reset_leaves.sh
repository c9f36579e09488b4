# topology: ports
# What the host wrote to a function that only a reset of its bus cleans (the e1000e, whose own way is by power state) is not what its first
# guest reads.
. /causeway/files/lib.sh

device=/sys/bus/pci/devices/$E1000E
register=$(($(head -n 1 "$device/resource" | cut -d' ' -f1) + 0x5400))
expect "the first way to reset it" "$(cut -d' ' -f1 "$device/reset_method")" pm
# Receive address 0.
echo 1 >"$device/enable"
untouched=$(devmem $register 32)
devmem $register 32 0xdeadbeef
expect "what the host wrote" "$(devmem $register 32)" 0xDEADBEEF
bind-vfio "$E1000E" || fail "binding"
guest first <<'GUEST'
device=$(function_of 0x8086:0x10d3)
rmmod e1000e 2>/dev/null
put_config "$device" 4 2 2
echo "register $(devmem $(($(bar_of "$device") + 0x5400)) 32)"
GUEST
run first "intel_iommu=on" --device vfio,host="$E1000E"
expect_line first.err "$E1000E is reset with its bus"
expect "what the guest reads" "$(lines first 'register ')" "$untouched"
