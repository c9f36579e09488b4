# SIGTERM and SIGINT from outside: an orderly stop, then death by that signal; the binding stays, the statistics are written, and the
# device opens again at once.
. /causeway/files/lib.sh

waiting_guest
for signal in TERM INT; do
    [ $signal = TERM ] && number=15 || number=2
    rm -f waiting.log waiting.json
    before=$(host_state)
    # The guest in front and the killer behind: the shell has its background processes ignore SIGINT.
    { is_waiting; kill -$signal "$(cat pid)"; } 2>/dev/null &
    # shellcheck disable=SC2016
    sh -c 'echo $$ >pid; exec causeway run "$@"' sh --kernel "$KERNEL" --initrd waiting.cpio --cmdline "$GUEST_CMDLINE" \
        --device vfio,host="$EDU" --timeout "$(time_left)" --stats waiting.json </dev/null >waiting.log 2>waiting.err
    status=$?
    wait
    grep -q '^waiting' waiting.log || { tail waiting.log waiting.err; fail "the guest did not come up"; }
    expect "the status after SIG$signal" $status $((128 + number))
    grep -q '"reason": *"signal"' waiting.json || fail "the statistics do not say that a signal ended the run"
    expect "what is there after SIG$signal" "$(host_state)" "$before"
    edu-vfio --bdf "$EDU" roundtrip || fail "the device does not work after SIG$signal"
    echo "SIG$signal: stopped, nothing left behind, the device works"
done
