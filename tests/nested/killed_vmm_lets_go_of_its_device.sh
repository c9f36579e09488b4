# While one VMM has a device, a second start with it is refused. After SIGKILL of the first one the device is still bound, and opens at once.
. /causeway/files/lib.sh

waiting_guest
before=$(host_state)
causeway run --kernel "$KERNEL" --initrd waiting.cpio --cmdline "$GUEST_CMDLINE" --device vfio,host="$EDU" --timeout "$(time_left)" \
    </dev/null >waiting.log 2>waiting.err &
is_waiting || { tail waiting.log waiting.err; fail "the guest does not come up"; }

cp waiting.cpio second.cpio
start second "" --device vfio,host="$EDU"
cat second.err
expect "the status of a second start with the device" $STATUS 4
expect_line second.err "$EDU|group" "in use|busy|another"

kill -KILL $!
wait $! 2>/dev/null
expect "what is there after SIGKILL" "$(host_state)" "$before"
edu-vfio --bdf "$EDU" roundtrip || fail "the device does not work after SIGKILL"
