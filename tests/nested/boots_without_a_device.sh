# A guest without a device boots on one and on two vCPUs, runs its script and powers off: exit 0. With the kernel as its distribution packs it,
# which guests in the bench do not unpack otherwise, and without its compression.
. /causeway/files/lib.sh

guest plain <<'GUEST'
echo "processors $(nproc)"
echo "memory $(awk '/MemTotal/ { print $2 }' /proc/meminfo)"
GUEST
for KERNEL in "$VMLINUZ" "$KERNEL"; do for cpus in 1 2; do
    run plain "" --cpus $cpus
    expect "the guest's number of processors" "$(lines plain 'processors ')" $cpus
    memory=$(lines plain 'memory ')
    [ "$memory" -gt 400000 ] && [ "$memory" -le 524288 ] || fail "of 512 MiB the guest has $memory KiB"
    echo "${KERNEL##*/}, $cpus vCPU: booted and powered off"
done; done
