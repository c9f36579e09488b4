# A virtio-console: what a guest writes there comes out of stdout, and stdin goes there, in order and whole, behind the unit.
. /causeway/files/lib.sh

seq 1 20000 >typed
guest console <<'GUEST'
# Built in, or a module.
modprobe virtio_console 2>/dev/null
wait-for /dev/hvc0 20 || fail "no console"
# Its settings are gone when nobody has it open.
exec 4<>/dev/hvc0 && stty raw -echo <&4 || fail "the console cannot be set up"
echo "ready"
# More than the device keeps.
head -c 108894 <&4 >/got
echo "typed $(sha256sum </got | cut -d' ' -f1)"
echo "hello from hvc0" >&4
# The last bytes are out when it is closed.
exec 4>&-
show_faults
GUEST
mkfifo keys
{
    # Looking for it more often would take the guest's time.
    until grep -q '^ready' console.log; do sleep 1; done
    cat typed
    sleep 1000
} >keys &
typist=$!
trap 'kill $typist 2>/dev/null' EXIT
: >console.log
mark
INPUT=keys run console intel_iommu=on --device virtio-console
expect "what the guest read" "$(lines console 'typed ')" "$(sha256sum <typed | cut -d' ' -f1)"
expect_line console.log '^hello from hvc0'
no_faults console
