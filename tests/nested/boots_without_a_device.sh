# A guest without a device boots on one and on two vCPUs, runs its script and powers off: exit 0.
. /causeway/files/lib.sh

guest plain <<'GUEST'
echo "processors $(nproc)"
echo "memory $(awk '/MemTotal/ { print $2 }' /proc/meminfo)"
GUEST
for cpus in 1 2; do
    run plain "" --cpus $cpus
    expect "the guest's number of processors" "$(lines plain 'processors ')" $cpus
    memory=$(lines plain 'memory ')
    [ "$memory" -gt 400000 ] && [ "$memory" -le 524288 ] || fail "of 512 MiB the guest has $memory KiB"
    echo "$cpus vCPU: booted and powered off"
done
