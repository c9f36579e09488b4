#!/bin/sh
# What the cases share in which devices come and go behind root ports. Sourced after lib.sh.

SOCKET=$PWD/control

ctl() { causeway ctl "$SOCKET" "$@"; }

# printed TEXT SECONDS: the guest says so.
printed() { wait_until "$2" grep -q "^$1" plug.log || { tail -n 40 plug.log; cat plug.err; fail "the guest did not print '$1'"; }; }

# is_gone ID: the machine has it no more.
has_no() { ! ctl devices | grep -q "\"id\":\"$1\""; }
is_gone() { wait_until 20 has_no "$1" || { ctl devices; fail "$1 is still there"; }; }

# refused PART WORD...: the request is refused with this in the message.
refused() {
    part=$1
    shift
    ! ctl "$@" 2>refusal || fail "not refused: $*"
    expect_line refusal "$part"
}

# The guest's side of the scripts.
PLUG_GUEST='until_so() {
    tries=1200
    until eval "$1"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "it never came: $1"
        usleep 100000
    done
}
'

# ended: the guest did what it was to do, without a fault.
ended() {
    wait
    grep -q "guest: exit 0" plug.log || { tail -n 40 plug.log; cat plug.err; fail "the guest"; }
    no_faults plug
    expect_line plug.err "no difference"
}
