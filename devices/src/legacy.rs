//! What every PC guest looks for: a clock with battery-backed memory, and the keyboard controller's reset.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use vm_superio::{I8042Device, Trigger};

use crate::BusDevice;
use crate::host::PowerControl;

/// A CMOS clock that shows the host's time in UTC, and 128 bytes of memory. It has no alarm and no interrupt.
pub struct Cmos {
    now: fn() -> u64,
    state: Mutex<(u8, [u8; 128])>,
}

impl Cmos {
    /// The index port.
    pub const FIRST: u64 = 0x70;
    /// The data port.
    pub const LAST: u64 = 0x71;

    /// A clock that shows the host's time.
    pub fn new() -> Self {
        Self::with_clock(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }

    fn with_clock(now: fn() -> u64) -> Self {
        let mut memory = [0; 128];
        memory[0x0a] = 0x26;
        memory[0x0b] = BCD_24H;
        Self { now, state: Mutex::new((0, memory)) }
    }

    fn register(&self, index: u8, memory: &[u8; 128]) -> u8 {
        let time = Time::of((self.now)());
        let number = match index {
            0x00 => time.second,
            0x02 => time.minute,
            0x04 => time.hour,
            0x06 => time.weekday,
            0x07 => time.day,
            0x08 => time.month,
            0x09 => (time.year % 100) as u8,
            0x32 => (time.year / 100) as u8,
            // The clock and its battery are good; no interrupt is pending.
            0x0c => return 0,
            0x0d => return 0x80,
            _ => return memory[usize::from(index)],
        };
        // Register B bit 2: binary instead of decimal digits.
        if memory[0x0b] & 0x04 != 0 { number } else { ((number / 10) << 4) | (number % 10) }
    }
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

/// Register B: 24-hour mode.
const BCD_24H: u8 = 0x02;

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let (index, memory) = &*self.state.lock().unwrap();
        if offset == 1 {
            data[0] = self.register(*index, memory);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (index, memory) = &mut *self.state.lock().unwrap();
        match (offset, data[0]) {
            // Bit 7 masks NMIs, which this machine has none of.
            (0, value) => *index = value & 0x7f,
            (_, value) => {
                match *index {
                    // The time is the host's; 12-hour mode is not offered.
                    0x00 | 0x02 | 0x04 | 0x06..=0x09 | 0x0c | 0x0d | 0x32 => {}
                    0x0a => memory[0x0a] = value & 0x7f,
                    0x0b => memory[0x0b] = value | BCD_24H,
                    other => memory[usize::from(other)] = value,
                }
            }
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
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
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
}

/// A keyboard controller without a keyboard: the guest can reset the machine through it. Port 0x61, which lies in its
/// range, says that the timer it belongs to has run out.
pub struct I8042(Mutex<I8042Device<ResetTrigger>>);

struct ResetTrigger(Arc<dyn PowerControl>);

impl Trigger for ResetTrigger {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.reset();
        Ok(())
    }
}

impl I8042 {
    /// First port.
    pub const FIRST: u64 = 0x60;
    /// Last port.
    pub const LAST: u64 = 0x64;

    /// A controller whose reset command reaches `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        Self(Mutex::new(I8042Device::new(ResetTrigger(power))))
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        data[0] = match offset {
            // Port 0x61: timer 2 has run out. Linux waits for that bit without end when it measures the TSC's rate.
            1 => 0x20,
            _ => self.0.lock().unwrap().read(offset as u8),
        };
    }
    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(()) = self.0.lock().unwrap().write(offset as u8, data[0]);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::testing::FakePower;

    fn cmos(device: &Cmos, index: u8) -> u8 {
        let mut data = [0];
        device.write(0, &[index]);
        device.read(1, &mut data);
        data[0]
    }

    #[test]
    fn cmos_shows_the_time_in_decimal_digits_and_in_binary_when_asked() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let device = Cmos::with_clock(|| 1_709_251_198);
        let shown: Vec<u8> = [0x32, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00].map(|i| cmos(&device, i)).to_vec();
        assert_eq!(shown, [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
        device.write(0, &[0x0b]);
        device.write(1, &[0x04]);
        assert_eq!((cmos(&device, 0x00), cmos(&device, 0x0b)), (58, 0x06));
        assert_eq!(cmos(&device, 0x0d), 0x80);
    }

    #[test]
    fn cmos_calendar_is_right_around_leap_days_and_centuries() {
        let date = |seconds| {
            let time = Time::of(seconds);
            (time.year, time.month, time.day, time.weekday)
        };
        assert_eq!(date(0), (1970, 1, 1, 5));
        assert_eq!(date(951_782_400), (2000, 2, 29, 3));
        assert_eq!(date(951_868_800), (2000, 3, 1, 4));
        assert_eq!(date(1_735_689_599), (2024, 12, 31, 3));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2));
    }

    #[test]
    fn cmos_memory_keeps_what_is_written() {
        let device = Cmos::new();
        device.write(0, &[0xff]);
        device.write(1, &[0x5a]);
        assert_eq!(cmos(&device, 0x7f), 0x5a);
    }

    #[test]
    fn i8042_reset_command_reaches_the_machine() {
        let power = Arc::new(FakePower::default());
        let device = I8042::new(power.clone());
        device.write(4, &[0xff]);
        assert!(!power.reset.load(Ordering::SeqCst));
        device.write(4, &[0xfe]);
        assert!(power.reset.load(Ordering::SeqCst));
    }
}
