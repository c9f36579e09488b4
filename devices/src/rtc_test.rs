use super::*;
use crate::testing::{FakeClock, FakeLine};

/// 2024-02-29 23:59:58 UTC, a Thursday.
const LEAP_NIGHT: u64 = 1_709_251_198;

struct Rig {
    rtc: Arc<Rtc>,
    clock: Arc<FakeClock>,
    line: Arc<FakeLine>,
    alarm: Arc<Alarm>,
}

impl Rig {
    fn at(seconds: u64) -> Self {
        let (clock, line) = (Arc::new(FakeClock::default()), Arc::new(FakeLine::default()));
        clock.set_epoch(Duration::from_secs(seconds));
        let alarm = Arc::new(Alarm::default());
        Self { rtc: Rtc::new(clock.clone(), alarm.clone(), line.clone()), clock, line, alarm }
    }

    /// Without a period, whose flag is set whether or not it interrupts.
    fn without_period(seconds: u64) -> Self {
        let rig = Self::at(seconds);
        rig.write(REGISTER_A, 0x20);
        rig
    }

    fn read(&self, register: u8) -> u8 {
        let mut data = [0];
        self.rtc.write(0, &[register]);
        self.rtc.read(1, &mut data);
        data[0]
    }

    fn write(&self, register: u8, value: u8) {
        self.rtc.write(0, &[register]);
        self.rtc.write(1, &[value]);
    }

    fn pass(&self, time: Duration) {
        self.clock.set(self.clock.now() + time);
    }

    /// Century, year, month, day, weekday, hour, minute, second.
    fn time(&self) -> [u8; 8] {
        [Rtc::CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOUR, MINUTE, SECOND].map(|register| self.read(register))
    }
}

const MILLISECOND: Duration = Duration::from_millis(1);

#[test]
fn rtc_shows_the_time_in_decimal_digits_and_in_binary_when_asked() {
    let rig = Rig::at(LEAP_NIGHT);
    assert_eq!(rig.time(), [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
    rig.write(REGISTER_B, B_BINARY | B_24_HOURS);
    assert_eq!(rig.time(), [20, 24, 2, 29, 5, 23, 59, 58]);
    assert_eq!((rig.read(REGISTER_B), rig.read(REGISTER_D)), (B_BINARY | B_24_HOURS, D_VALID));
    rig.pass(2000 * MILLISECOND);
    assert_eq!(rig.time(), [20, 24, 3, 1, 6, 0, 0, 0]);
}

#[test]
fn rtc_hours_of_twelve_have_an_afternoon_bit() {
    // Hours since midnight, what the register shows.
    for (hour, shown) in [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)] {
        let rig = Rig::at(hour * 3600);
        rig.write(REGISTER_B, 0);
        assert_eq!(rig.read(HOUR), shown, "{hour}");
        rig.write(HOUR, shown);
        rig.write(REGISTER_B, B_24_HOURS | B_BINARY);
        assert_eq!(u64::from(rig.read(HOUR)), hour);
    }
}

#[test]
fn rtc_calendar_is_right_around_leap_days_and_centuries() {
    let dates = [
        (0, (1970, 1, 1, 5)),
        (951_782_400, (2000, 2, 29, 3)),
        (951_868_800, (2000, 3, 1, 4)),
        (1_735_689_599, (2024, 12, 31, 3)),
        (4_107_542_400, (2100, 3, 1, 2)),
    ];
    for (seconds, date) in dates {
        let time = Time::of(seconds);
        assert_eq!((time.year, time.month, time.day, time.weekday), date);
    }
    for seconds in (0..8_000_000_000u64).step_by(86_400 * 7 - 1234) {
        let Time { year, month, day, hour, minute, second, .. } = Time::of(seconds);
        let back = Time::seconds(year, month.into(), day.into(), hour.into(), minute.into(), second.into());
        assert_eq!(back, Some(seconds));
    }
}

#[test]
fn rtc_time_that_is_set_goes_on_and_outlives_a_reset() {
    let rig = Rig::at(LEAP_NIGHT);
    rig.write(REGISTER_B, B_SET | B_24_HOURS);
    for (register, value) in
        [(Rtc::CENTURY, 0x19), (YEAR, 0x99), (MONTH, 0x12), (DAY, 0x31), (HOUR, 0x23), (MINUTE, 0x59), (SECOND, 0x57)]
    {
        rig.write(register, value);
    }
    rig.pass(3500 * MILLISECOND);
    assert_eq!(rig.read(SECOND), 0x57, "it stands still while it is set");
    rig.write(REGISTER_B, B_24_HOURS);
    rig.pass(2000 * MILLISECOND);
    assert_eq!(rig.time(), [0x19, 0x99, 0x12, 0x31, 0x06, 0x23, 0x59, 0x59]);
    rig.rtc.reset();
    rig.pass(1000 * MILLISECOND);
    assert_eq!(rig.time(), [0x20, 0x00, 0x01, 0x01, 0x07, 0x00, 0x00, 0x00]);
    // A register by itself, while the clock goes on.
    rig.write(HOUR, 0x15);
    assert_eq!(rig.time()[5..], [0x15, 0x00, 0x00]);
}

#[test]
fn rtc_time_that_there_is_not_changes_nothing() {
    for (register, value) in
        [(MONTH, 0x13), (MONTH, 0), (DAY, 0), (DAY, 0xff), (HOUR, 0x24), (MINUTE, 0x60), (SECOND, 0xff), (YEAR, 0xff)]
    {
        let rig = Rig::at(LEAP_NIGHT);
        rig.write(register, value);
        assert_eq!(rig.time(), [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58], "{register:#x} = {value:#x}");
    }
}

#[test]
fn rtc_update_is_announced_244_microseconds_before() {
    let rig = Rig::at(LEAP_NIGHT);
    let update = || rig.read(REGISTER_A) & A_UPDATE != 0;
    assert!(!update());
    rig.pass(Duration::from_micros(1_000_000 - 250));
    assert!(!update());
    rig.pass(Duration::from_micros(10));
    assert!(update());
    rig.write(REGISTER_B, B_SET | B_24_HOURS);
    assert!(!update(), "none comes while the time is set");
    rig.write(REGISTER_B, B_24_HOURS);
    rig.pass(Duration::from_micros(240));
    assert!(!update());
}

#[test]
fn rtc_interrupts_once_a_second_until_register_c_is_read() {
    let rig = Rig::without_period(1000);
    rig.pass(300 * MILLISECOND);
    assert_eq!(rig.rtc.run(), None, "nothing is enabled");
    rig.write(REGISTER_B, B_UPDATE | B_24_HOURS);
    assert_eq!(rig.rtc.run(), Some(1000 * MILLISECOND));
    rig.pass(700 * MILLISECOND);
    assert_eq!((rig.rtc.run(), rig.line.is_high()), (None, true), "what is not acknowledged does not come again");
    assert_eq!(rig.read(REGISTER_C), C_REQUEST | B_UPDATE);
    assert!(!rig.line.is_high());
    assert_eq!(rig.read(REGISTER_C), 0);
    assert_eq!(rig.rtc.run(), Some(2000 * MILLISECOND));
    // Without the enable bit the flag is there, and no interrupt.
    rig.write(REGISTER_B, B_24_HOURS);
    rig.pass(1000 * MILLISECOND);
    assert_eq!((rig.rtc.run(), rig.line.is_high()), (None, false));
    assert_eq!(rig.read(REGISTER_C), B_UPDATE);
}

#[test]
fn rtc_periods_have_the_rates_of_the_data_sheet() {
    // Rate select, microseconds.
    for (select, period) in [(1, 3906), (2, 7812), (3, 122), (6, 976), (8, 3906), (15, 500_000)] {
        let rig = Rig::at(LEAP_NIGHT);
        rig.write(REGISTER_A, 0x20 | select);
        rig.write(REGISTER_B, B_PERIODIC | B_24_HOURS);
        rig.read(REGISTER_C);
        let mut last = 0;
        for round in 1..=8 {
            let next = rig.rtc.run().unwrap();
            assert!((next.as_micros() as u64).abs_diff(last + period) <= 2, "select {select}, round {round}: {next:?}");
            last = next.as_micros() as u64;
            rig.clock.set(next);
            rig.rtc.run();
            assert!(rig.line.is_high());
            // Seconds and the alarm at midnight have flags, too.
            assert_eq!(rig.read(REGISTER_C) & !(B_UPDATE | B_ALARM), C_REQUEST | B_PERIODIC);
            assert!(!rig.line.is_high());
        }
    }
    let rig = Rig::at(LEAP_NIGHT);
    rig.write(REGISTER_A, 0x20);
    rig.write(REGISTER_B, B_PERIODIC | B_24_HOURS);
    assert_eq!(rig.rtc.run(), None, "rate 0 is none");
}

#[test]
fn rtc_alarm_comes_at_its_time_of_day() {
    // Hour, minute and second of the alarm; seconds from 23:59:58 on until it comes.
    for (alarm, after) in
        [([0x23, 0x59, 0x59], 1), ([0x00, 0x00, 0x00], 2), ([0xff, 0xc0, 0x10], 12), ([0xff, 0x01, 0xff], 62)]
    {
        let rig = Rig::without_period(LEAP_NIGHT);
        rig.write(REGISTER_B, B_ALARM | B_24_HOURS);
        for (register, value) in [HOUR_ALARM, MINUTE_ALARM, SECOND_ALARM].into_iter().zip(alarm) {
            rig.write(register, value);
        }
        for second in 1..=after {
            assert!(!rig.line.is_high(), "{alarm:x?} after {second} s");
            let next = rig.rtc.run().unwrap();
            assert_eq!(next, Duration::from_secs(second));
            rig.clock.set(next);
        }
        rig.rtc.run();
        assert!(rig.line.is_high(), "{alarm:x?}");
        assert_eq!(rig.read(REGISTER_C), C_REQUEST | B_ALARM | B_UPDATE);
    }
}

#[test]
fn rtc_alarm_that_nobody_watched_is_found_later() {
    let rig = Rig::without_period(LEAP_NIGHT);
    for (register, value) in [(HOUR_ALARM, 0x12), (MINUTE_ALARM, 0x00), (SECOND_ALARM, 0x00)] {
        rig.write(register, value);
    }
    rig.pass(Duration::from_secs(3600));
    assert_eq!(rig.read(REGISTER_C), B_UPDATE);
    rig.pass(Duration::from_secs(100 * 86_400));
    assert_eq!(rig.read(REGISTER_C), B_UPDATE | B_ALARM);
}

#[test]
fn rtc_a_reset_turns_interrupts_off() {
    let rig = Rig::at(LEAP_NIGHT);
    rig.write(REGISTER_B, B_PERIODIC | B_ALARM | B_UPDATE | B_24_HOURS);
    rig.pass(1000 * MILLISECOND);
    rig.rtc.run();
    assert!(rig.line.is_high());
    rig.rtc.reset();
    assert_eq!((rig.line.is_high(), rig.rtc.run()), (false, None));
    assert_eq!(rig.read(REGISTER_B), B_24_HOURS);
}

#[test]
fn rtc_memory_keeps_what_is_written() {
    let rig = Rig::at(0);
    rig.write(0xff, 0x5a);
    assert_eq!(rig.read(0x7f), 0x5a, "bit 7 of the index is no part of it");
    rig.rtc.reset();
    assert_eq!(rig.read(0x7f), 0x5a);
    let mut data = [0];
    rig.rtc.read(0, &mut data);
    assert_eq!(data, [0xff], "the index cannot be read");
    for register in [REGISTER_C, REGISTER_D] {
        rig.write(register, 0x55);
        assert_eq!(rig.read(register), if register == REGISTER_D { D_VALID } else { 0 });
    }
}

#[test]
fn rtc_registers_at_power_on_and_after_a_reset() {
    let rig = Rig::at(LEAP_NIGHT);
    assert_eq!((rig.read(REGISTER_A), rig.read(REGISTER_B)), (0x26, B_24_HOURS));
    // Bit 7 of register A is the clock's own.
    rig.write(REGISTER_A, 0xff);
    assert_eq!(rig.read(REGISTER_A), 0x7f);
    rig.pass(1000 * MILLISECOND);
    rig.rtc.run();
    rig.write(0x30, 0x77);
    rig.rtc.reset();
    let mut data = [0; 2];
    rig.rtc.read(1, &mut data);
    assert_eq!(data, [0x59, 0xff], "the index is that of the seconds");
    assert_eq!(rig.read(REGISTER_C), 0);
}

#[test]
fn rtc_registers_hold_the_time_at_which_the_clock_was_stopped() {
    let rig = Rig::without_period(LEAP_NIGHT);
    rig.write(REGISTER_B, B_SET | B_UPDATE | B_24_HOURS);
    assert_eq!(rig.read(REGISTER_B), B_SET | B_24_HOURS, "stopping it turns the update interrupt off");
    rig.pass(5000 * MILLISECOND);
    assert_eq!(rig.time(), [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
    assert_eq!((rig.read(REGISTER_C), rig.rtc.run()), (0, None), "no second begins");
    rig.write(REGISTER_B, B_SET | B_ALARM | B_24_HOURS);
    assert_eq!(rig.rtc.run(), None);
    assert_eq!(rig.time()[7], 0x58, "what was stopped already is not stopped again");
    // It goes on from there; a later write of register B does not set it back.
    rig.write(REGISTER_B, B_24_HOURS);
    rig.pass(10_000 * MILLISECOND);
    for control in [B_24_HOURS, B_24_HOURS | B_UPDATE, B_24_HOURS] {
        rig.write(REGISTER_B, control);
        assert_eq!(rig.time(), [0x20, 0x24, 0x03, 0x01, 0x06, 0x00, 0x00, 0x08]);
    }
}

#[test]
fn rtc_time_is_set_in_binary_too() {
    let rig = Rig::at(LEAP_NIGHT);
    rig.write(REGISTER_B, B_BINARY | B_24_HOURS);
    for (register, value) in [(YEAR, 31), (MONTH, 12), (DAY, 25), (HOUR, 17), (MINUTE, 59), (SECOND, 59)] {
        rig.write(register, value);
        assert_eq!(rig.read(register), value);
    }
    assert_eq!(rig.time(), [20, 31, 12, 25, 5, 17, 59, 59]);
    rig.write(YEAR, 99);
    assert_eq!(rig.read(YEAR), 99);
    rig.write(YEAR, 100);
    assert_eq!(rig.time()[..2], [20, 99], "a century has no year 100");
    // In the afternoon of a clock of twelve hours.
    rig.write(REGISTER_B, B_BINARY);
    assert_eq!(rig.read(HOUR), 0x80 | 5);
    rig.write(HOUR, 0x80 | 12);
    assert_eq!(rig.read(HOUR), 0x80 | 12);
    rig.write(REGISTER_B, B_BINARY | B_24_HOURS);
    assert_eq!(rig.read(HOUR), 12);
}

#[test]
fn rtc_alarm_has_the_afternoon_bit_in_its_hour_alone() {
    // 20:20:20 on a clock of twelve hours.
    let rig = Rig::without_period(20 * 3600 + 20 * 60 + 19);
    rig.write(REGISTER_B, 0);
    for (register, value) in [(HOUR_ALARM, 0x88), (MINUTE_ALARM, 0x20), (SECOND_ALARM, 0x20)] {
        rig.write(register, value);
    }
    rig.pass(1000 * MILLISECOND);
    assert_eq!(rig.read(REGISTER_C), B_UPDATE | B_ALARM);
}

#[test]
fn rtc_alarm_is_looked_for_in_the_last_day_and_not_before_it_was_set() {
    // The alarm comes at the first second that is looked at, of a day that is over and one second.
    for (days, found) in [(0, B_UPDATE), (1, B_UPDATE | B_ALARM), (3, B_UPDATE | B_ALARM)] {
        let rig = Rig::without_period(100 * DAY_SECONDS);
        for (register, value) in [(HOUR_ALARM, 0), (MINUTE_ALARM, 0), (SECOND_ALARM, 0x05)] {
            rig.write(register, value);
        }
        rig.pass(Duration::from_secs(days * DAY_SECONDS + 4));
        assert_eq!(rig.read(REGISTER_C), found, "{days} days");
    }
    let rig = Rig::without_period(100 * DAY_SECONDS);
    rig.pass(Duration::from_secs(10));
    for (register, value) in [(HOUR_ALARM, 0), (MINUTE_ALARM, 0), (SECOND_ALARM, 0x05)] {
        rig.write(register, value);
    }
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.read(REGISTER_C), B_UPDATE, "its time was over when it was set");
    // Nor does a time that is set pass over it.
    rig.write(MINUTE_ALARM, 0x30);
    rig.write(HOUR, 0x12);
    assert_eq!(rig.read(REGISTER_C), 0);
    rig.pass(Duration::from_secs(1));
    assert_eq!(rig.read(REGISTER_C), B_UPDATE);
}

#[test]
fn rtc_a_new_rate_begins_with_a_whole_period() {
    let rig = Rig::at(0);
    rig.write(REGISTER_A, 0x2f);
    rig.read(REGISTER_C);
    rig.pass(Duration::from_millis(700));
    assert_eq!(rig.read(REGISTER_C), B_PERIODIC);
    rig.write(REGISTER_A, 0x2e);
    assert_eq!(rig.read(REGISTER_C), 0, "another rate is no period");
    rig.write(REGISTER_B, B_PERIODIC | B_24_HOURS);
    assert_eq!(rig.rtc.run(), Some(Duration::from_millis(750)), "the third of a quarter of a second");
}

#[test]
fn rtc_what_is_enabled_late_interrupts_at_once_and_wakes_the_timers() {
    let rig = Rig::without_period(1000);
    rig.alarm.take_rung();
    rig.pass(1000 * MILLISECOND);
    rig.write(REGISTER_B, B_UPDATE | B_24_HOURS);
    assert!(rig.line.is_high(), "the flag was there");
    assert!(rig.alarm.take_rung());
    rig.write(SECOND, 0);
    assert!(!rig.alarm.take_rung(), "the time does not change when something is due next");
    rig.read(REGISTER_C);
    assert!(rig.alarm.take_rung() && !rig.line.is_high());
    rig.read(SECOND);
    assert!(!rig.alarm.take_rung());
    rig.write(REGISTER_A, 0x26);
    assert!(rig.alarm.take_rung());
}
