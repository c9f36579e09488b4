//! The 8254 interval timer (Intel's data sheet 231164), and port 0x61 that belongs to its channel 2.
//!
//! Channel 0's output is the timer interrupt of every PC; channel 1 refreshed memory; channel 2 measures time for
//! guests that calibrate their clocks by it. Nothing counts: a channel knows when it was started, and what it shows is
//! computed from that. Edges of channel 0 that come while the thread was late are one.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::BusDevice;
use crate::host::IrqLine;
use crate::saved::{Saves, Unfit, decode, encode, fits};
use crate::timers::{Alarm, Clock, Timed};

/// Its clock, in Hz.
pub const HZ: u64 = 1_193_182;
const NANOSECONDS: u128 = 1_000_000_000;

/// How a count is read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Access {
    Low = 1,
    High = 2,
    Both = 3,
}

/// A moment, in ticks of the timer's clock.
type Ticks = u64;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Channel {
    /// Bits 3:1 of the control word: modes 6 and 7 are 2 and 3.
    mode: u8,
    access: Access,
    bcd: bool,
    /// The count that was written since the control word, 1 to 65,536.
    written: Option<u64>,
    /// The count that it works with.
    count: u64,
    /// The lower half of a count whose upper half is still to come.
    low: Option<u8>,
    /// The upper half is read next.
    high_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    /// It works: its count is written, and it was triggered where it needs that.
    started: bool,
    /// Ticks before `since`.
    counted: Ticks,
    /// Counts since then; `None`: it is held by its gate.
    since: Option<Ticks>,
    /// Rising edges of the output that were seen.
    edges: u64,
}

impl Default for Channel {
    fn default() -> Self {
        Self {
            mode: 0,
            access: Access::Both,
            bcd: false,
            written: None,
            count: 0x1_0000,
            low: None,
            high_next: false,
            latched: None,
            latched_status: None,
            gate: true,
            started: false,
            counted: 0,
            since: None,
            edges: 0,
        }
    }
}

impl Channel {
    fn mode(&self) -> u8 {
        if self.mode > 5 { self.mode & 3 } else { self.mode }
    }

    /// Whether a rising edge of the gate, and not the count, starts it.
    fn is_triggered(&self) -> bool {
        matches!(self.mode(), 1 | 5)
    }

    fn elapsed(&self, now: Ticks) -> Ticks {
        self.counted.saturating_add(self.since.map_or(0, |since| now.saturating_sub(since)))
    }

    fn start(&mut self, now: Ticks) {
        let Some(count) = self.written else { return };
        self.count = count;
        self.started = true;
        self.counted = 0;
        self.since = (self.gate || self.is_triggered()).then_some(now);
        self.edges = 0;
    }

    fn output(&self, now: Ticks) -> bool {
        let (count, elapsed) = (self.count, self.elapsed(now));
        match self.mode() {
            mode if !self.started => mode != 0,
            0 | 1 => elapsed >= count,
            2 => count < 2 || elapsed % count != count - 1,
            3 => elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// Rising edges of the output since the start.
    fn rises(&self, now: Ticks) -> u64 {
        let elapsed = self.elapsed(now);
        match self.mode() {
            _ if !self.started => 0,
            0 | 1 => (elapsed >= self.count).into(),
            2 | 3 => elapsed / self.count,
            _ => (elapsed > self.count).into(),
        }
    }

    /// When the output rises next.
    fn next_rise(&self, now: Ticks) -> Option<Ticks> {
        let since = self.since.filter(|_| self.started)?;
        let rises = self.rises(now);
        let at = match self.mode() {
            2 | 3 => (rises + 1).saturating_mul(self.count),
            _ if rises > 0 => return None,
            0 | 1 => self.count,
            _ => self.count + 1,
        };
        Some(since.saturating_add(at.saturating_sub(self.counted)))
    }

    /// What the counter shows.
    fn value(&self, now: Ticks) -> u16 {
        let (count, elapsed) = (self.count, if self.started { self.elapsed(now) } else { 0 });
        let modulus = if self.bcd { 10_000 } else { 0x1_0000 };
        let value = match self.mode() {
            2 => count - elapsed % count,
            3 => count - (2 * (elapsed % count)) % count,
            // After its end it goes on from the highest number.
            _ => (count % modulus + modulus - elapsed % modulus) % modulus,
        } % modulus;
        if self.bcd { to_bcd(value) } else { value as u16 }
    }

    fn status(&self, now: Ticks) -> u8 {
        let no_count = self.written.is_none_or(|written| !self.started || written != self.count);
        u8::from(self.output(now)) << 7
            | u8::from(no_count) << 6
            | (self.access as u8) << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    /// Bits 5:0 of a control word that is no latch command.
    fn control(&mut self, word: u8) {
        let access = match word >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        *self = Self { mode: word >> 1 & 7, access, bcd: word & 1 != 0, gate: self.gate, ..Self::default() };
    }

    fn latch(&mut self, now: Ticks) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
            self.high_next = false;
        }
    }

    fn latch_status(&mut self, now: Ticks) {
        if self.latched_status.is_none() {
            self.latched_status = Some(self.status(now));
        }
    }

    fn read(&mut self, now: Ticks) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let is_high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        if is_high || self.access == Access::Low {
            self.latched = None;
        }
        if is_high { high } else { low }
    }

    fn write(&mut self, value: u8, now: Ticks) {
        let count = match (self.access, self.low.take()) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::Both, None) => {
                self.low = Some(value);
                // The first half stops mode 0, whose output goes low.
                self.started &= self.mode() != 0;
                return;
            }
        };
        let count = if self.bcd { from_bcd(count) } else { count.into() };
        self.written = Some(match count {
            0 if self.bcd => 10_000,
            0 => 0x1_0000,
            count => count,
        });
        if !self.is_triggered() && (self.gate || matches!(self.mode(), 0 | 4)) {
            self.start(now);
        }
    }

    /// The same at a moment 0: what it counted is behind it.
    fn saved(&self, now: Ticks) -> Self {
        Self { counted: self.elapsed(now), since: self.since.map(|_| 0), ..self.clone() }
    }

    /// What [`Channel::saved`] gave, from now on.
    fn restored(self, now: Ticks) -> Result<Self, Unfit> {
        let counts = |count: u64| (1..=0x1_0000).contains(&count);
        fits(
            "timer",
            counts(self.count)
                && self.written.is_none_or(counts)
                && self.mode <= 7
                && self.since.is_none_or(|at| at == 0),
        )?;
        Ok(Self { since: self.since.map(|_| now), ..self })
    }

    fn set_gate(&mut self, gate: bool, now: Ticks) {
        let was = std::mem::replace(&mut self.gate, gate);
        match (was, gate, self.mode()) {
            (false, true, 0 | 4) => self.since = self.started.then_some(now),
            (false, true, _) => self.start(now),
            (true, false, 0 | 4) => {
                self.counted = self.elapsed(now);
                self.since = None;
            }
            (true, false, 2 | 3) => self.started = false,
            _ => {}
        }
    }
}

fn to_bcd(value: u64) -> u16 {
    (0..4).fold(0, |digits, place| digits | ((value / 10u64.pow(place) % 10) as u16) << (4 * place))
}

fn from_bcd(digits: u16) -> u64 {
    (0..4).rev().fold(0, |value, place| value * 10 + u64::from(digits >> (4 * place) & 0xf)) % 10_000
}

/// The timer: ports [`Pit::FIRST`] to [`Pit::LAST`].
pub struct Pit {
    clock: Arc<dyn Clock>,
    alarm: Arc<Alarm>,
    line: Arc<dyn IrqLine>,
    state: Mutex<State>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    channels: [Channel; 3],
    /// Bit 1 of port 0x61.
    speaker: bool,
}

impl State {
    fn new() -> Self {
        let mut state = Self::default();
        // Its gate is bit 0 of port 0x61; the others are tied high.
        state.channels[2].gate = false;
        state
    }

    fn control(&mut self, word: u8, now: Ticks) {
        if word >> 6 == 3 {
            // Read back: a clear bit 5 latches counts, a clear bit 4 latches status.
            for (index, channel) in self.channels.iter_mut().enumerate() {
                if word >> (index + 1) & 1 != 0 {
                    if word & 0x20 == 0 {
                        channel.latch(now);
                    }
                    if word & 0x10 == 0 {
                        channel.latch_status(now);
                    }
                }
            }
            return;
        }
        let channel = &mut self.channels[usize::from(word >> 6)];
        if word & 0x30 == 0 {
            channel.latch(now);
        } else {
            channel.control(word);
        }
    }
}

impl Pit {
    /// First port.
    pub const FIRST: u64 = 0x40;
    /// Last port.
    pub const LAST: u64 = 0x43;
    /// The IOAPIC's pin: ISA interrupt 0, which the MADT must say is here.
    pub const GSI: u8 = 2;

    /// A timer of which no channel counts. Each rising edge of channel 0's output is an edge of `line`.
    pub fn new(clock: Arc<dyn Clock>, alarm: Arc<Alarm>, line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self { clock, alarm, line, state: Mutex::new(State::new()) })
    }

    /// Back to power-on.
    pub fn reset(&self) {
        *self.state.lock().unwrap() = State::new();
    }

    fn ticks(&self) -> Ticks {
        (self.clock.now().as_nanos() * u128::from(HZ) / NANOSECONDS) as Ticks
    }

    /// The moment at which that many ticks are over.
    fn moment(ticks: Ticks) -> Duration {
        let nanoseconds = (u128::from(ticks) * NANOSECONDS).div_ceil(HZ.into());
        Duration::from_nanos(nanoseconds.try_into().unwrap_or(u64::MAX))
    }
}

/// Saved as at a moment 0. Time that passes until it is put back is none for it.
impl Saves for Pit {
    fn save(&self) -> Value {
        let (now, state) = (self.ticks(), self.state.lock().unwrap());
        let channels = std::array::from_fn(|index| state.channels[index].saved(now));
        encode(1, &State { channels, speaker: state.speaker })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let State { channels: [first, second, third], speaker } = decode(1, state)?;
        let now = self.ticks();
        let channels = [first.restored(now)?, second.restored(now)?, third.restored(now)?];
        *self.state.lock().unwrap() = State { channels, speaker };
        self.alarm.ring();
        Ok(())
    }
}

impl Timed for Pit {
    fn run(&self) -> Option<Duration> {
        let now = self.ticks();
        let (rose, next) = {
            let channel = &mut self.state.lock().unwrap().channels[0];
            let rises = channel.rises(now);
            let rose = rises > channel.edges;
            channel.edges = rises;
            (rose, channel.next_rise(now))
        };
        if rose {
            self.line.set_level(true);
            self.line.set_level(false);
        }
        next.map(Self::moment)
    }
}

impl BusDevice for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let now = self.ticks();
        // The control word cannot be read.
        if let Some(channel) = self.state.lock().unwrap().channels.get_mut(offset as usize) {
            data[0] = channel.read(now);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let now = self.ticks();
        {
            let mut state = self.state.lock().unwrap();
            match offset {
                0..3 => state.channels[offset as usize].write(data[0], now),
                _ => state.control(data[0], now),
            }
        }
        self.alarm.ring();
    }
}

/// Port 0x61: the gate of channel 2 (bit 0), the speaker (bit 1, which nobody hears), a bit that toggles with channel
/// 1's refresh (bit 4), and the output of channel 2 (bit 5).
pub struct SystemPort(Arc<Pit>);

impl SystemPort {
    /// The port of `pit`.
    pub fn new(pit: Arc<Pit>) -> Self {
        Self(pit)
    }
}

/// Ticks of one level of the refresh bit: 15 us.
const REFRESH: Ticks = 18;

impl BusDevice for SystemPort {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
        let now = self.0.ticks();
        let state = self.0.state.lock().unwrap();
        let channel = &state.channels[2];
        data[0] = u8::from(channel.gate)
            | u8::from(state.speaker) << 1
            | ((now / REFRESH % 2) as u8) << 4
            | u8::from(channel.output(now)) << 5;
    }

    fn write(&self, _: u64, data: &[u8]) {
        let now = self.0.ticks();
        let mut state = self.0.state.lock().unwrap();
        state.speaker = data[0] & 2 != 0;
        state.channels[2].set_gate(data[0] & 1 != 0, now);
    }
}

#[cfg(test)]
#[path = "pit_test.rs"]
mod pit_test;
