//! The clock with its battery-backed memory: a Motorola MC146818 as PCs have it, with the century in register 0x32.
//!
//! It shows the host's time in UTC, and keeps how far the guest set it from that. Its interrupts (each second, an
//! alarm, a period of at least 122 us) are levels of its line, which reading register C takes back.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::BusDevice;
use crate::host::IrqLine;
use crate::saved::{Saves, Unfit, decode, encode, fits, hex};
use crate::timers::{Alarm, Clock, Timed};

const SECOND: u8 = 0x00;
const SECOND_ALARM: u8 = 0x01;
const MINUTE: u8 = 0x02;
const MINUTE_ALARM: u8 = 0x03;
const HOUR: u8 = 0x04;
const HOUR_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

/// Register A: an update comes in less than 244 us, or is under way.
const A_UPDATE: u8 = 0x80;
/// Register A after power-on: the oscillator runs at 32,768 Hz; a period of 1024 Hz.
const A_POWER_ON: u8 = 0x26;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
/// Register C: the line is high.
const C_REQUEST: u8 = 0x80;
/// Register D: the time is valid.
const D_VALID: u8 = 0x80;
/// Bit 7 of the hour in 12-hour mode.
const PM: u8 = 0x80;
/// An alarm register from here on matches everything.
const ANY: u8 = 0xc0;

/// How long before an update register A tells of it.
const UPDATE: Duration = Duration::from_micros(244);
const DAY_SECONDS: u64 = 86_400;
const OSCILLATOR: u128 = 32_768;

/// The clock: an index port and a data port.
pub struct Rtc {
    clock: Arc<dyn Clock>,
    alarm: Arc<Alarm>,
    /// Held while a level is said, so that the last one said is the newest.
    line: Mutex<Arc<dyn IrqLine>>,
    state: Mutex<State>,
}

struct State {
    index: u8,
    /// Battery-backed memory, with the alarm registers and registers A and B. While bit 7 of B stops the clock, its
    /// time, too.
    memory: [u8; 128],
    /// Periodic, alarm and update flags of register C.
    flags: u8,
    /// Seconds from the host's time to this clock's.
    offset: i64,
    /// Up to which second of this clock, and which period, the flags are right.
    seen: u64,
    periods: u64,
}

impl Rtc {
    /// The index port.
    pub const FIRST: u64 = 0x70;
    /// The data port.
    pub const LAST: u64 = 0x71;
    /// The IOAPIC's pin, edge-triggered.
    pub const GSI: u8 = 8;
    /// The register of the century, for the FADT.
    pub const CENTURY: u8 = 0x32;

    /// A clock that shows the host's time, and interrupts through `line`.
    pub fn new(clock: Arc<dyn Clock>, alarm: Arc<Alarm>, line: Arc<dyn IrqLine>) -> Arc<Self> {
        let mut memory = [0; 128];
        memory[usize::from(REGISTER_A)] = A_POWER_ON;
        memory[usize::from(REGISTER_B)] = B_24_HOURS;
        let seen = clock.wall().as_secs();
        let state = State { index: 0, memory, flags: 0, offset: 0, seen, periods: 0 };
        Arc::new(Self { clock, alarm, line: Mutex::new(line), state: Mutex::new(state) })
    }

    /// The machine was reset: interrupts are off. Time and memory have a battery.
    pub fn reset(&self) {
        {
            let state = &mut *self.state.lock().unwrap();
            state.index = 0;
            state.flags = 0;
            state.memory[usize::from(REGISTER_B)] &= !(B_PERIODIC | B_ALARM | B_UPDATE);
        }
        self.say();
    }

    /// Sets the line as the flags say.
    fn say(&self) {
        let line = self.line.lock().unwrap();
        let high = self.state.lock().unwrap().requests();
        line.set_level(high);
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    index: u8,
    #[serde(with = "hex")]
    memory: Vec<u8>,
    flags: u8,
    offset: i64,
    seen: u64,
}

/// The time goes on while it is saved, as with a battery; periods do not.
impl Saves for Rtc {
    fn save(&self) -> Value {
        let State { index, memory, flags, offset, seen, periods: _ } = &*self.state.lock().unwrap();
        let (index, memory, flags, offset, seen) = (*index, memory.to_vec(), *flags, *offset, *seen);
        encode(1, &Saved { index, memory, flags, offset, seen })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { index, memory, flags, offset, seen } = decode(1, state)?;
        fits("index", index < 0x80)?;
        fits("flags", flags & !(B_PERIODIC | B_ALARM | B_UPDATE) == 0)?;
        let memory: [u8; 128] = memory.try_into().map_err(|_| Unfit::Value("memory"))?;
        {
            let mut state = self.state.lock().unwrap();
            *state = State { index, memory, flags, offset, seen, periods: 0 };
            state.periods = state.periods(&*self.clock);
        }
        self.say();
        self.alarm.ring();
        Ok(())
    }
}

impl State {
    fn b(&self) -> u8 {
        self.memory[usize::from(REGISTER_B)]
    }

    /// Whether the line is high.
    fn requests(&self) -> bool {
        self.flags & self.b() & (B_PERIODIC | B_ALARM | B_UPDATE) != 0
    }

    /// The rate of the periodic interrupt in Hz.
    fn rate(&self) -> Option<u128> {
        match self.memory[usize::from(REGISTER_A)] & 0xf {
            0 => None,
            // The first two select what 8 and 9 select, too.
            select @ 1..=2 => Some(OSCILLATOR >> (select + 6)),
            select => Some(OSCILLATOR >> (select - 1)),
        }
    }

    /// This clock's time in seconds since 1970.
    fn seconds(&self, wall: Duration) -> u64 {
        wall.as_secs().saturating_add_signed(self.offset)
    }

    fn is_set(&self) -> bool {
        self.b() & B_SET != 0
    }

    /// Periods of the present rate until now.
    fn periods(&self, clock: &dyn Clock) -> u64 {
        self.rate().map_or(0, |rate| (clock.now().as_nanos() * rate / 1_000_000_000) as u64)
    }

    /// Brings the flags up to now.
    fn advance(&mut self, clock: &dyn Clock) {
        let periods = self.periods(clock);
        if periods != self.periods {
            self.flags |= B_PERIODIC;
            self.periods = periods;
        }
        let now = self.seconds(clock.wall());
        if !self.is_set() && now != self.seen {
            self.flags |= B_UPDATE;
            // Every time of day comes once a day; a clock that went back shows no second again.
            let first = self.seen.saturating_add(1).max(now.saturating_sub(DAY_SECONDS - 1));
            if (first..=now).any(|second| self.is_alarm(second)) {
                self.flags |= B_ALARM;
            }
        }
        self.seen = now;
    }

    fn is_alarm(&self, second: u64) -> bool {
        let time = Time::of(second);
        [(SECOND_ALARM, time.second), (MINUTE_ALARM, time.minute), (HOUR_ALARM, time.hour)].into_iter().all(
            |(register, value)| {
                let wanted = self.memory[usize::from(register)];
                let shown = if register == HOUR_ALARM { self.hour(value) } else { self.digits(value) };
                wanted >= ANY || wanted == shown
            },
        )
    }

    /// When a flag that makes an interrupt is set next.
    fn next(&self, clock: &dyn Clock) -> Option<Duration> {
        let enabled = self.b() & !self.flags;
        let period = self.rate().filter(|_| enabled & B_PERIODIC != 0).map(|rate| {
            let nanoseconds = (u128::from(self.periods) + 1) * 1_000_000_000;
            Duration::from_nanos(nanoseconds.div_ceil(rate).try_into().unwrap_or(u64::MAX))
        });
        let second = (enabled & (B_ALARM | B_UPDATE) != 0 && !self.is_set()).then(|| {
            let into = u64::from(clock.wall().subsec_nanos());
            clock.now().saturating_add(Duration::from_nanos(1_000_000_000 - into))
        });
        period.into_iter().chain(second).min()
    }

    /// A number as the registers have it: decimal digits or binary.
    fn digits(&self, number: u8) -> u8 {
        if self.b() & B_BINARY != 0 { number } else { ((number / 10) << 4) | (number % 10) }
    }

    fn number(&self, digits: u8) -> u8 {
        if self.b() & B_BINARY != 0 { digits } else { (digits >> 4).saturating_mul(10).saturating_add(digits & 0xf) }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.b() & B_24_HOURS != 0 {
            return self.digits(hour);
        }
        let shown = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.digits(shown) | if hour >= 12 { PM } else { 0 }
    }

    /// What a register of the time shows at `second`.
    fn time_register(&self, register: u8, second: u64) -> Option<u8> {
        let time = Time::of(second);
        Some(match register {
            SECOND => self.digits(time.second),
            MINUTE => self.digits(time.minute),
            HOUR => self.hour(time.hour),
            WEEKDAY => self.digits(time.weekday),
            DAY => self.digits(time.day),
            MONTH => self.digits(time.month),
            YEAR => self.digits((time.year % 100) as u8),
            Rtc::CENTURY => self.digits((time.year / 100) as u8),
            _ => return None,
        })
    }

    /// Puts the time into the registers, where software finds and sets it.
    fn freeze(&mut self, second: u64) {
        for register in (SECOND..=YEAR).chain([Rtc::CENTURY]) {
            if let Some(value) = self.time_register(register, second) {
                self.memory[usize::from(register)] = value;
            }
        }
    }

    /// The clock goes on from the time in the registers; a time that there is not leaves it as it was.
    fn take_time(&mut self, wall: Duration) {
        let number = |register: u8| u64::from(self.number(self.memory[usize::from(register)]));
        let raw = self.memory[usize::from(HOUR)];
        let hour = if self.b() & B_24_HOURS != 0 {
            number(HOUR)
        } else {
            u64::from(self.number(raw & !PM)) % 12 + if raw & PM != 0 { 12 } else { 0 }
        };
        let year = Some(number(Rtc::CENTURY) * 100 + number(YEAR)).filter(|_| number(YEAR) < 100);
        let seconds =
            year.and_then(|year| Time::seconds(year, number(MONTH), number(DAY), hour, number(MINUTE), number(SECOND)));
        if let Some(offset) = seconds.and_then(|seconds| seconds.checked_signed_diff(wall.as_secs())) {
            self.offset = offset;
        }
        self.seen = self.seconds(wall);
    }

    fn read(&mut self, clock: &dyn Clock) -> u8 {
        self.advance(clock);
        let wall = clock.wall();
        match self.index {
            REGISTER_A => {
                let left = Duration::from_secs(1) - Duration::from_nanos(wall.subsec_nanos().into());
                let updates = !self.is_set() && left < UPDATE;
                self.memory[usize::from(REGISTER_A)] | if updates { A_UPDATE } else { 0 }
            }
            REGISTER_C => {
                let request = if self.requests() { C_REQUEST } else { 0 };
                std::mem::take(&mut self.flags) | request
            }
            REGISTER_D => D_VALID,
            index if !self.is_set() => {
                self.time_register(index, self.seconds(wall)).unwrap_or(self.memory[usize::from(index)])
            }
            index => self.memory[usize::from(index)],
        }
    }

    fn write(&mut self, value: u8, clock: &dyn Clock) {
        self.advance(clock);
        let wall = clock.wall();
        let register = usize::from(self.index);
        match self.index {
            REGISTER_A => {
                self.memory[register] = value & !A_UPDATE;
                // The period that begins now is the first of the new rate.
                self.periods = 0;
                let flags = self.flags;
                self.advance(clock);
                self.flags = flags;
            }
            REGISTER_B => {
                let was_set = self.is_set();
                if !was_set && value & B_SET != 0 {
                    self.freeze(self.seconds(wall));
                }
                self.memory[register] = if value & B_SET != 0 { value & !B_UPDATE } else { value };
                if was_set && value & B_SET == 0 {
                    self.take_time(wall);
                }
            }
            REGISTER_C | REGISTER_D => {}
            index if self.is_set() || self.time_register(index, 0).is_none() => self.memory[register] = value,
            _ => {
                self.freeze(self.seconds(wall));
                self.memory[register] = value;
                self.take_time(wall);
            }
        }
    }
}

impl Timed for Rtc {
    fn run(&self) -> Option<Duration> {
        let next = {
            let mut state = self.state.lock().unwrap();
            state.advance(&*self.clock);
            state.next(&*self.clock)
        };
        self.say();
        next
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The index cannot be read.
        if offset != 1 {
            return;
        }
        let is_acknowledged = {
            let mut state = self.state.lock().unwrap();
            data[0] = state.read(&*self.clock);
            state.index == REGISTER_C
        };
        if is_acknowledged {
            self.say();
            self.alarm.ring();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let is_control = {
            let mut state = self.state.lock().unwrap();
            if offset == 0 {
                // Bit 7 masks NMIs, which this machine has none of.
                state.index = data[0] & 0x7f;
                return;
            }
            state.write(data[0], &*self.clock);
            matches!(state.index, REGISTER_A | REGISTER_B)
        };
        if is_control {
            self.say();
            self.alarm.ring();
        }
    }
}

/// A moment in the proleptic Gregorian calendar, UTC.
#[derive(PartialEq, Eq, Debug)]
struct Time {
    year: u64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// 1 for Sunday.
    weekday: u8,
}

impl Time {
    /// From seconds since 1970-01-01.
    fn of(seconds: u64) -> Self {
        let (days, rest) = (seconds / DAY_SECONDS, seconds % DAY_SECONDS);
        // Counted from 0000-03-01, so that the leap day is the last of its year: eras of 400 years have 146,097 days.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
        }
    }

    /// Seconds since 1970-01-01; `None`: there is no such time, or it was before.
    fn seconds(year: u64, month: u64, day: u64, hour: u64, minute: u64, second: u64) -> Option<u64> {
        let exists = (1970..10_000).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
        if !exists || hour > 23 || minute > 59 || second > 59 {
            return None;
        }
        let (march_month, march_year) = if month > 2 { (month - 3, year) } else { (month + 9, year - 1) };
        let (era, year_of_era) = (march_year / 400, march_year % 400);
        let day_of_year = (153 * march_month + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = (era * 146_097 + day_of_era).checked_sub(719_468)?;
        Some(days * DAY_SECONDS + hour * 3600 + minute * 60 + second)
    }
}

#[cfg(test)]
#[path = "rtc_test.rs"]
mod rtc_test;
