# long
# limit: 420
# Linux suspends to idle with an assigned NVMe and an assigned edu, and is woken by the power button, then by the clock's alarm: both functions
# work as before, and nothing faults.
. /causeway/files/lib.sh

bind-vfio "$NVME" "$EDU" || fail "binding"
guest sleeper <<'GUEST'
# Some kernels have it built in.
modprobe button
echo "states: $(cat /sys/power/state /sys/power/mem_sleep | xargs)"
edu msi
checksum buffered
# suspend BY: the kernel says what woke it.
suspend() {
    echo "suspends"
    echo freeze >/sys/power/state || fail "suspending"
    dmesg | grep -E 'ACPI: PM: .*wakeup' | tail -n 1 | sed "s/^.*ACPI: PM: /woken by $1: /"
    checksum direct
    edu msi
}
suspend button
# While it is busy with freezing, so that the alarm comes after.
echo +20 >/sys/class/rtc/rtc0/wakealarm || fail "setting the alarm"
suspend alarm
show_faults
GUEST

suspended() { [ -e sleeper.log ] && [ "$(grep -c 'PM: suspend-to-idle' sleeper.log)" -ge "$1" ]; }
mark
count_host_operations
{ wait_until 60 suspended 1 && causeway ctl control power-button || echo "the guest was not woken by the button"; } &
run sleeper "intel_iommu=on no_console_suspend loglevel=8 pm_debug_messages" --device vfio,host="$NVME" --device vfio,host="$EDU" --socket control
wait $!
grep -E '^states|^woken' sleeper.log
expect "states" "$(lines sleeper 'states: ')" "freeze mem disk [s2idle]"
expect "what woke it" "$(lines sleeper 'woken by ')" "$(printf '%s\n' 'button: ACPI fixed event wakeup' 'alarm: ACPI fixed event wakeup')"
expect "suspends" "$(grep -c 'PM: suspend-to-idle' sleeper.log)" 2
expect "MSIs of edu" "$(lines sleeper 'msi: ' | grep -c arrived)" 6
expect "the checksums" "$(lines sleeper 'sha256 ' | sort | uniq -c | awk '{ print $1, $2 }')" "3 $DISK_SHA256"
no_faults sleeper
# A container of the guest's own vfio each time.
same_counts sleeper 3
