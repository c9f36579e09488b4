# Power-off 0, reset under --no-reboot 8, triple fault 8, time limit 10; without --no-reboot a reset boots again.
# limit: 480
. /causeway/files/lib.sh

guest off </dev/null
start off "" --no-reboot
expect "the status after power-off" $STATUS 0

echo 'reboot -f' | guest reboot
start reboot "" --no-reboot
expect "the status after a reset under --no-reboot" $STATUS 8

echo 'echo c >/proc/sysrq-trigger' | guest panic
start panic "" --no-reboot
expect "the status after a panic that reboots at once" $STATUS 8
start panic "reboot=t" --no-reboot
expect "the status after a triple fault" $STATUS 8

guest sleeper <<'GUEST'
echo "sleeping"
sleep 1000
GUEST
start sleeper "" --timeout $((18 * ${BOOT_SCALE:-1}))
expect "the status at the time limit" $STATUS 10
grep -q sleeping sleeper.log || fail "the guest was not up before the time limit"

start reboot "" --timeout $((30 * ${BOOT_SCALE:-1}))
expect "the status of a guest that resets itself for ever" $STATUS 10
boots=$(lines reboot 'guest: init at ' | wc -l)
[ "$boots" -ge 2 ] || fail "after a reset the guest came up $boots times"
echo "resets: the guest came up $boots times"
