# A virtio-console: what a guest writes there comes out of stdout, and stdin goes there, in order and whole, behind the unit and without one.
. /causeway/files/lib.sh

seq 1 20000 >typed
guest console <<'GUEST'
modprobe virtio_console || fail "no virtio_console"
wait-for /dev/hvc0 20 || fail "no console"
stty -F /dev/hvc0 raw -echo
echo "ready"
# More than the device keeps.
head -c 108894 /dev/hvc0 >/got
echo "typed $(sha256sum </got | cut -d' ' -f1)"
echo "hello from hvc0" >/dev/hvc0
# Its last bytes are out when the terminal is closed.
show_faults
GUEST
for options in "--iommu vtd" "--iommu none"; do
    # shellcheck disable=SC2086
    mkfifo keys
    { wait_until 60 grep -q '^ready' console.log && cat typed; sleep 1000; } >keys &
    typist=$!
    : >console.log
    INPUT=keys run console intel_iommu=on $options --device virtio-console
    kill $typist
    rm keys
    expect "what the guest read" "$(lines console 'typed ')" "$(sha256sum <typed | cut -d' ' -f1)"
    expect_line console.log '^hello from hvc0'
    no_faults console
done
