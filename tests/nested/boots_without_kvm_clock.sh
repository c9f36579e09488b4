# A distribution's kernel boots with an unchanged command line where it has no clock of KVM's, or takes no notice of KVM
# at all: it calibrates by the interval timer or the power management timer, has the time of day from the CMOS clock,
# and finds the timer's interrupt at pin 2 of the IOAPIC, which it tests in the latter case. With interrupt remapping
# and without.
# limit: 400
. /causeway/files/lib.sh

guest clock <<'GUEST'
echo "source $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
dmesg | grep -iE 'tsc:|calibrat|timer:|rtc_cmos|Hypervisor' | sed 's/^/boot: /'
grep -E 'timer$' /proc/interrupts | sed 's/^/interrupt: /'
# The first processor's, which is the only one.
echo "timer $(awk '/IO-APIC +2-edge +timer$/ { print $2 }' /proc/interrupts)"
echo "date $(date +%s)"
hwclock -r -u | sed 's/^/hwclock: /' || fail "hwclock"
rtc=/sys/class/rtc/rtc0/since_epoch
# From one second of the clock to the tenth after it, by the kernel's own time.
next() { last=$(cat $rtc); until [ "$(cat $rtc)" != "$last" ]; do :; done; }
next
first=$(cat $rtc) from=$(cut -d. -f1 /proc/uptime)
until [ $(($(cat $rtc) - first)) -ge 10 ]; do usleep 50000; done
echo "ran $(($(cut -d. -f1 /proc/uptime) - from))"
# Two alarms, each an interrupt of the clock.
for alarm in 1 2; do
    echo 0 >/sys/class/rtc/rtc0/wakealarm
    echo +2 >/sys/class/rtc/rtc0/wakealarm || fail "no alarm"
    until [ -z "$(cat /sys/class/rtc/rtc0/wakealarm)" ]; do usleep 100000; done
done
echo "alarms $(awk '/rtc0$/ { print $2 }' /proc/interrupts)"
GUEST

# boots KERNEL-OPTIONS [OPTION...]
boots() {
    GUEST_CMDLINE="console=ttyS0 quiet mitigations=off panic=-1"
    before=$(date +%s)
    run clock "$@"
    after=$(date +%s)
    grep -E '^(boot|interrupt|hwclock): |^(source|timer|ran|alarms) ' clock.log
    at=$(lines clock 'date ')
    [ "$at" -ge $((before - 1)) ] && [ "$at" -le $((after + 1)) ] ||
        fail "the guest's date is $at, between $before and $after here"
    ran=$(lines clock 'ran ')
    [ "$ran" -ge 9 ] && [ "$ran" -le 11 ] || fail "ten seconds of the clock are $ran of the kernel"
    expect "interrupts of two alarms" "$(lines clock 'alarms ')" 2
    echo "booted with '$1'"
}

boots no-kvmclock
boots nopv
ticks=$(lines clock 'timer ')
[ "${ticks:-0}" -gt 0 ] || fail "no tick of the timer at pin 2"
boots "nopv intel_iommu=on"
