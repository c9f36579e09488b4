# SIGTERM from outside: an orderly stop, then death by that signal; the binding stays, and the device opens again at once.
. /causeway/files/lib.sh

bind-vfio "$EDU" || fail "binding"
guest waiting <<'GUEST'
echo "waiting"
sleep 1000
GUEST
for signal in TERM INT; do
    before=$(host_state)
    sh -c "echo \$\$ >pid; exec causeway run --kernel $KERNEL --initrd waiting.cpio --cmdline '$GUEST_CMDLINE' \
        --device vfio,host=$EDU --timeout $LIMIT" </dev/null >waiting.log 2>waiting.err &
    wait_until 60 grep -q '^waiting' waiting.log || { cat waiting.log waiting.err; fail "the guest does not come up"; }
    kill -$signal "$(cat pid)"
    wait $!
    status=$?
    expect "the status after SIG$signal" $status $((128 + $([ $signal = TERM ] && echo 15 || echo 2)))
    expect "what is there after SIG$signal" "$(host_state)" "$before"
    edu-vfio --bdf "$EDU" roundtrip || fail "the device does not work after SIG$signal"
    echo "SIG$signal: stopped, nothing left behind, the device works"
done
