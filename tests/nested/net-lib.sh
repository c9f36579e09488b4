# What the cases of virtio-net share. Sourced by them, after lib.sh.

# copies FILE TIMES: the file, so many times.
copies() { for copy in $(seq "$2"); do cat "$1"; done; }

# tap [MIB]: a tap of L1 with the address 10.0.2.1, brought up, and that many MiB (64) to send.
tap() {
    MIB=${1:-64}
    modprobe tun || fail "no tun"
    tunctl -t tap0 >/dev/null || fail "no tap"
    ifconfig tap0 10.0.2.1 netmask 255.255.255.0 up || fail "the tap does not come up"
    dd if=/dev/urandom of=sent bs=1M count="$MIB" 2>/dev/null
    # An input that does not end: a client whose input ends closes the connection.
    mkfifo open && exec 5<>open
    LISTENERS=
    trap 'kill $LISTENERS 2>/dev/null' EXIT
}

# carry NAME TIMES KERNEL-OPTIONS OPTION...: a guest gets these MiB from L1, that many times, and sends as much of its own; all of it
# arrives as it was.
carry() {
    name=$1
    times=$2
    shift 2
    copies sent "$times" | nc -l -p 5002 >/dev/null &
    LISTENERS=$!
    nc -l -p 5003 <&5 | sha256sum >back &
    LISTENERS="$LISTENERS $!"
    {
        echo "TIMES=$times MIB=$MIB"
        cat <<'GUEST'
modprobe virtio_net || fail "no virtio_net"
ifconfig eth0 10.0.2.2 netmask 255.255.255.0 up || fail "no interface"
echo "domain $(domain_of 0x1af4:0x1041)"
echo "address $(cat /sys/class/net/eth0/address)"
mkfifo /open && exec 3<>/open
begin() { BEGIN=$(cut -d' ' -f1 /proc/uptime); }
took() { awk -v what="$1" -v from="$BEGIN" '{ print what, $1 - from }' /proc/uptime; }
begin
echo "received $(nc 10.0.2.1 5002 <&3 | sha256sum | cut -d' ' -f1)"
took seconds-in
head -c $((MIB << 20)) /dev/urandom >/data
copies() { for copy in $(seq "$TIMES"); do cat /data; done; }
begin
copies | nc 10.0.2.1 5003 >/dev/null || fail "nothing goes"
took seconds-out
echo "sent $(copies | sha256sum | cut -d' ' -f1)"
show_faults
GUEST
    } | guest "$name"
    run "$name" "$@"
    wanted=$(copies sent "$times" | sha256sum | cut -d' ' -f1)
    expect "what the guest received" "$(lines "$name" 'received ')" "$wanted"
    wait $LISTENERS
    expect "what the guest sent" "$(cut -d' ' -f1 back)" "$(lines "$name" 'sent ')"
    echo "$((MIB * times)) MiB in $(lines "$name" 'seconds-in ') s, back in $(lines "$name" 'seconds-out ') s"
}
