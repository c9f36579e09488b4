# Sourced by cases that compare L1's tables with what a VMM that runs in the background did. They set `vmm` (its process), `name` (of its files
# name.err and name.trace) and `audits` (0 when it starts), and say in `all_is_traced` how its trace is known to be whole.

traced() { grep -c "^[0-9.]* host $1 " "$name.trace"; }
audited() { [ "$(grep -c 'audit:.* pending' "$name.err")" -ge $audits ]; }
stopped() { ! grep -h '^State:' /proc/$vmm/task/*/status | grep -qv stopped; }

# at_rest: the VMM is stopped, and its trace has all that L1's kernel was asked for.
at_rest() {
    kill -CONT $vmm
    audits=$((audits + 1))
    kill -USR1 $vmm && wait_until 20 audited || fail "no audit"
    kill -STOP $vmm && wait_until 20 stopped || fail "the VMM does not stop"
    all_is_traced
}

# compare PAGES FUNCTION...: the kernel's tables of these, with at least so many pages; what was found is in the file `compared`, too.
compare() {
    wait_until 20 at_rest || fail "the guest does not come to rest"
    pages=$1
    shift
    for function; do
        kernel-tables "$function" --trace "$name.trace" --pid $vmm --pages "$pages" || fail "the tables of $function"
    done | tee compared
    [ "$(grep -c 'as handed out' compared)" = $# ] || fail "guest '$name'"
    kill -CONT $vmm
}

# nothing_mapped WHEN FUNCTION...: their tables are empty.
nothing_mapped() {
    when=$1
    shift
    for function; do
        kernel-tables "$function" --empty || fail "$when"
    done
}
