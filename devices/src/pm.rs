//! ACPI fixed hardware: PM1 event and control, PM timer, GPE0 (ACPI specification 6.5, section 4.8.3 and 4.8.4).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::BusDevice;
use crate::host::{IrqLine, PowerControl};
use crate::saved::{Saves, Unfit, decode, encode, fits};

const STATUS_POWER_BUTTON: u16 = 1 << 8;
const STATUS_RTC: u16 = 1 << 10;
/// Timer, global lock, power button, sleep button, RTC, wake.
const STATUS_BITS: u16 = 0x8721;
const ENABLE_BITS: u16 = 0x0721;
const CONTROL_SCI_EN: u16 = 1 << 0;
const CONTROL_SLP_EN: u16 = 1 << 13;
const TIMER_HZ: u128 = 3_579_545;

/// The power-management block, [`PmBlock::LEN`] ports at any base. Its offsets go into the FADT.
pub struct PmBlock {
    power: Arc<dyn PowerControl>,
    sci: Option<Arc<dyn IrqLine>>,
    start: Instant,
    state: Mutex<Registers>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u32,
    gpe_enable: u32,
    /// What the timer is ahead of the time since its start, modulo 2^32.
    ahead: u32,
}

impl PmBlock {
    /// Ports of the block.
    pub const LEN: u64 = 0x20;
    /// Offset of PM1a_EVT_BLK, 4 ports.
    pub const EVENT: u64 = 0x00;
    /// Offset of PM1a_CNT_BLK, 2 ports.
    pub const CONTROL: u64 = 0x04;
    /// Offset of PM_TMR_BLK, 4 ports; the timer has 32 bits (TMR_VAL_EXT).
    pub const TIMER: u64 = 0x08;
    /// Offset of GPE0_BLK, 8 ports: 32 events.
    pub const GPE0: u64 = 0x10;
    /// SLP_TYPa of \_S5.
    pub const SLP_TYP_S5: u8 = 5;

    /// A block that powers off through `power` and, if there is one, raises `sci` (level-triggered) for enabled events.
    pub fn new(power: Arc<dyn PowerControl>, sci: Option<Arc<dyn IrqLine>>) -> Self {
        Self { power, sci, start: Instant::now(), state: Mutex::default() }
    }

    /// Presses the power button: a guest with ACPI shuts down in order.
    pub fn press_power_button(&self) {
        let mut state = self.state.lock().unwrap();
        state.status |= STATUS_POWER_BUTTON;
        self.update_sci(&state);
    }

    /// The interrupt line of the clock on its way to `line`: each time it rises, RTC_STS is set, so that an alarm wakes
    /// a guest that sleeps (4.8.3.1.1).
    pub fn clock_line(self: &Arc<Self>, line: Arc<dyn IrqLine>) -> Arc<dyn IrqLine> {
        Arc::new(ClockLine { power: self.clone(), line, high: AtomicBool::new(false) })
    }

    /// Back to power-on. The timer goes on.
    pub fn reset(&self) {
        let mut state = self.state.lock().unwrap();
        *state = Registers { ahead: state.ahead, ..Registers::default() };
        self.update_sci(&state);
    }

    fn update_sci(&self, state: &Registers) {
        if let Some(sci) = &self.sci {
            sci.set_level(state.status & state.enable != 0 || state.gpe_status & state.gpe_enable != 0);
        }
    }

    fn timer(&self, state: &Registers) -> u32 {
        ((self.start.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000) as u32).wrapping_add(state.ahead)
    }

    /// The whole block as bytes.
    fn image(&self) -> [u8; Self::LEN as usize] {
        let state = self.state.lock().unwrap();
        let mut image = [0; Self::LEN as usize];
        image[0..2].copy_from_slice(&state.status.to_le_bytes());
        image[2..4].copy_from_slice(&state.enable.to_le_bytes());
        // There is no SMI command: the machine is always in ACPI mode.
        image[4..6].copy_from_slice(&(state.control | CONTROL_SCI_EN).to_le_bytes());
        image[8..12].copy_from_slice(&self.timer(&state).to_le_bytes());
        image[16..20].copy_from_slice(&state.gpe_status.to_le_bytes());
        image[20..24].copy_from_slice(&state.gpe_enable.to_le_bytes());
        image
    }
}

struct ClockLine {
    power: Arc<PmBlock>,
    line: Arc<dyn IrqLine>,
    high: AtomicBool,
}

impl IrqLine for ClockLine {
    fn set_level(&self, high: bool) {
        self.line.set_level(high);
        if !self.high.swap(high, Ordering::Relaxed) && high {
            let mut state = self.power.state.lock().unwrap();
            state.status |= STATUS_RTC;
            self.power.update_sci(&state);
        }
    }
}

/// The timer is saved as what it shows.
impl Saves for PmBlock {
    fn save(&self) -> Value {
        let state = self.state.lock().unwrap();
        let Registers { status, enable, control, gpe_status, gpe_enable, ahead: _ } = *state;
        let ahead = self.timer(&state);
        encode(1, &Registers { status, enable, control, gpe_status, gpe_enable, ahead })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let saved: Registers = decode(1, state)?;
        fits("PM1 status", saved.status & !STATUS_BITS == 0)?;
        fits("PM1 enable", saved.enable & !ENABLE_BITS == 0)?;
        fits("PM1 control", saved.control & CONTROL_SLP_EN == 0)?;
        let mut state = self.state.lock().unwrap();
        let started = self.timer(&Registers::default());
        *state = Registers { ahead: saved.ahead.wrapping_sub(started), ..saved };
        self.update_sci(&state);
        Ok(())
    }
}

impl BusDevice for PmBlock {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = image.get(offset as usize + i).copied().unwrap_or(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut power_off = false;
        {
            let mut state = self.state.lock().unwrap();
            for (i, value) in data.iter().enumerate() {
                let value = *value;
                match offset.saturating_add(i as u64) {
                    at @ 0..2 => state.status &= !(u16::from(value) << (8 * at)) | !STATUS_BITS,
                    at @ 2..4 => {
                        let shift = 8 * (at - 2);
                        state.enable = (state.enable & !(0xff << shift) | u16::from(value) << shift) & ENABLE_BITS;
                    }
                    at @ 4..6 => {
                        let shift = 8 * (at - 4);
                        let control = state.control & !(0xff << shift) | u16::from(value) << shift;
                        let sleep_type = (control >> 10 & 7) as u8;
                        // SLP_EN is write-only; only S5 exists.
                        power_off |= control & CONTROL_SLP_EN != 0 && sleep_type == Self::SLP_TYP_S5;
                        state.control = control & !CONTROL_SLP_EN;
                    }
                    at @ 16..20 => state.gpe_status &= !(u32::from(value) << (8 * (at - 16))),
                    at @ 20..24 => {
                        let shift = 8 * (at - 20);
                        state.gpe_enable = state.gpe_enable & !(0xff << shift) | u32::from(value) << shift;
                    }
                    _ => {}
                }
            }
            self.update_sci(&state);
        }
        if power_off {
            self.power.power_off();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FakeLine, FakePower};

    fn read32(block: &PmBlock, offset: u64) -> u32 {
        let mut data = [0; 4];
        block.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn pm_s5_powers_off_and_other_sleep_types_do_not() {
        let power = Arc::new(FakePower::default());
        let block = PmBlock::new(power.clone(), None);
        block.write(PmBlock::CONTROL, &(CONTROL_SLP_EN | 1 << 10).to_le_bytes());
        block.write(PmBlock::CONTROL, &(u16::from(PmBlock::SLP_TYP_S5) << 10).to_le_bytes());
        assert!(!power.off.load(Ordering::SeqCst));
        block.write(PmBlock::CONTROL, &(CONTROL_SLP_EN | u16::from(PmBlock::SLP_TYP_S5) << 10).to_le_bytes());
        assert!(power.off.load(Ordering::SeqCst));
    }

    fn write16(block: &PmBlock, offset: u64, value: u16) {
        block.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn pm_registers_have_the_bits_that_there_are() {
        let block = PmBlock::new(Arc::new(FakePower::default()), None);
        write16(&block, PmBlock::EVENT, 0xffff);
        write16(&block, PmBlock::EVENT + 2, 0xffff);
        assert_eq!(read32(&block, PmBlock::EVENT), 0x0721_0000);
        block.write(PmBlock::EVENT + 3, &[0]);
        assert_eq!(read32(&block, PmBlock::EVENT), 0x0021_0000);
        write16(&block, PmBlock::CONTROL, 0xfffe & !(7 << 10));
        assert_eq!(read32(&block, PmBlock::CONTROL), 0xc3ff, "ACPI is on, and SLP_EN reads as 0");
        block.write(PmBlock::GPE0, &[0xff; 8]);
        assert_eq!((read32(&block, PmBlock::GPE0), read32(&block, PmBlock::GPE0 + 4)), (0, u32::MAX));
        block.write(PmBlock::GPE0 + 5, &[0x12]);
        assert_eq!(read32(&block, PmBlock::GPE0 + 4), 0xffff_12ff);
        let mut beyond = [0; 4];
        block.read(PmBlock::LEN - 2, &mut beyond);
        assert_eq!(beyond, [0, 0, 0xff, 0xff]);
        block.reset();
        assert_eq!([0x00, 0x04, 0x10, 0x14].map(|at| read32(&block, at)), [0, 1, 0, 0]);
    }

    #[test]
    fn pm_s5_written_a_byte_at_a_time_powers_off() {
        let power = Arc::new(FakePower::default());
        let block = PmBlock::new(power.clone(), None);
        block.write(PmBlock::CONTROL, &[0xff]);
        assert!(!power.off.load(Ordering::SeqCst));
        block.write(PmBlock::CONTROL + 1, &[(PmBlock::SLP_TYP_S5 << 2) | 0x20]);
        assert!(power.off.load(Ordering::SeqCst));
    }

    #[test]
    fn pm_a_reset_lowers_the_sci_and_a_status_bit_is_cleared_alone() {
        let line = Arc::new(FakeLine::default());
        let block = PmBlock::new(Arc::new(FakePower::default()), Some(line.clone()));
        write16(&block, PmBlock::EVENT + 2, STATUS_POWER_BUTTON);
        block.press_power_button();
        write16(&block, PmBlock::EVENT, !STATUS_POWER_BUTTON);
        assert!(line.is_high());
        write16(&block, PmBlock::EVENT + 2, 0);
        assert!(!line.is_high());
        write16(&block, PmBlock::EVENT + 2, STATUS_POWER_BUTTON);
        block.reset();
        assert!(!line.is_high());
        assert_eq!(read32(&block, PmBlock::EVENT), 0);
    }

    #[test]
    fn pm_timer_counts_at_its_rate() {
        let block = PmBlock::new(Arc::new(FakePower::default()), None);
        let (before, first, after) = (Instant::now(), read32(&block, PmBlock::TIMER), Instant::now());
        while after.elapsed().as_millis() < 20 {}
        let ticks = u128::from(read32(&block, PmBlock::TIMER).wrapping_sub(first));
        let most = before.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000;
        assert!(ticks >= 20 * TIMER_HZ / 1000 - 1 && ticks <= most + 1, "{ticks} of at most {most}");
    }

    #[test]
    fn pm_power_button_raises_the_sci_until_its_status_is_cleared() {
        let line = Arc::new(FakeLine::default());
        let block = PmBlock::new(Arc::new(FakePower::default()), Some(line.clone()));
        block.press_power_button();
        assert!(!line.is_high(), "not enabled");
        block.write(PmBlock::EVENT + 2, &STATUS_POWER_BUTTON.to_le_bytes());
        assert!(line.is_high());
        block.write(PmBlock::EVENT, &STATUS_POWER_BUTTON.to_le_bytes());
        assert!(!line.is_high());
        assert_eq!(read32(&block, PmBlock::EVENT), u32::from(STATUS_POWER_BUTTON) << 16);
        block.press_power_button();
        assert!(line.is_high(), "at once");
        assert_eq!(read32(&block, PmBlock::EVENT), u32::from(STATUS_POWER_BUTTON) * 0x1_0001);
    }

    #[test]
    fn pm_an_alarm_of_the_clock_is_an_event_once_and_an_interrupt_of_its_own() {
        let [sci, pin] = [(); 2].map(|()| Arc::new(FakeLine::default()));
        let block = Arc::new(PmBlock::new(Arc::new(FakePower::default()), Some(sci.clone())));
        let clock = block.clock_line(pin.clone());
        write16(&block, PmBlock::EVENT + 2, STATUS_RTC);
        clock.set_level(true);
        assert!(sci.is_high() && pin.is_high());
        write16(&block, PmBlock::EVENT, STATUS_RTC);
        assert!(!sci.is_high());
        // As long as the guest has not read the clock's flags.
        clock.set_level(true);
        assert!(!sci.is_high());
        clock.set_level(false);
        assert!(!sci.is_high() && !pin.is_high());
        write16(&block, PmBlock::EVENT + 2, 0);
        clock.set_level(true);
        assert!(!sci.is_high(), "not enabled");
        assert_eq!(read32(&block, PmBlock::EVENT), u32::from(STATUS_RTC));
    }

    #[test]
    fn pm_control_is_written_a_byte_at_a_time_too() {
        let block = PmBlock::new(Arc::new(FakePower::default()), None);
        let control = || read32(&block, PmBlock::CONTROL);
        write16(&block, PmBlock::CONTROL, 0x1ffe);
        assert_eq!(control(), 0x1fff);
        block.write(PmBlock::CONTROL + 1, &[0x04]);
        assert_eq!(control(), 0x04ff);
        block.write(PmBlock::CONTROL, &[0x02]);
        assert_eq!(control(), 0x0403);
    }
}
