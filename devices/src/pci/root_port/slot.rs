//! The PCI Express capability of a root port with a slot (PCI Express base specification 6.0, sections 7.5.3 and
//! 6.7.3): attention button, power controller, both indicators, presence, and the state of the link.
//!
//! Commands of software act at once, so none is reported as completed.

use crate::pci::ConfigSpace;
use crate::pci::config::CAP_EXPRESS;

/// Offsets in the capability.
const FLAGS: u16 = 0x02;
const DEVICE: u16 = 0x04;
const DEVICE_CONTROL: u16 = 0x08;
const LINK: u16 = 0x0c;
const LINK_CONTROL: u16 = 0x10;
const LINK_STATUS: u16 = 0x12;
const SLOT: u16 = 0x14;
const SLOT_CONTROL: u16 = 0x18;
const SLOT_STATUS: u16 = 0x1a;
const LINK_2: u16 = 0x2c;
const LINK_CONTROL_2: u16 = 0x30;
const LEN: usize = 0x3c;

/// Version 2, root port, with a slot.
const IS_ROOT_PORT: u16 = 2 | 4 << 4 | 1 << 8;
/// Role-based error reporting.
const DEVICE_CAPABILITIES: u32 = 1 << 15;
/// 2.5 GT/s, one lane, and it is told whether the link is active.
const LINK_CAPABILITIES: u32 = 1 | 1 << 4 | 1 << 20;
const LINK_DISABLED: u16 = 1 << 4;
/// 2.5 GT/s, one lane.
const LINK_IS: u16 = 1 | 1 << 4;
const LINK_ACTIVE: u16 = 1 << 13;
/// Attention button, power controller, both indicators, cards that go by surprise, hot-plug; no "command completed".
const SLOT_CAPABILITIES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 18;

/// Slot control: the interrupt is enabled at all.
const INTERRUPT: u16 = 1 << 5;
/// Slot control: the attention indicator is off.
const ATTENTION_OFF: u16 = 3 << 6;
const POWER_INDICATOR_ON: u16 = 1 << 8;
const POWER_INDICATOR_OFF: u16 = 3 << 8;
/// Slot control: the power is off.
const POWER_OFF: u16 = 1 << 10;
/// Slot control: what can be written. There is no interlock.
const CONTROL: u16 = 0x17ff;

/// Slot status, and at the same place in slot control its interrupt: the button was pressed.
pub const BUTTON: u16 = 1 << 0;
/// The same: a card came or went.
pub const PRESENCE: u16 = 1 << 3;
/// Slot status: the link went up or down.
pub const LINK_CHANGED: u16 = 1 << 8;
/// Slot status: there is a card.
const PRESENT: u16 = 1 << 6;
/// Slot control: the interrupt of [`LINK_CHANGED`].
const LINK_INTERRUPT: u16 = 1 << 12;
/// Slot status: what software clears by ones. Power faults and commands that end are never reported.
const EVENTS: u16 = BUTTON | PRESENCE | LINK_CHANGED;

/// Where the capability is.
#[derive(Clone, Copy)]
pub struct SlotRegisters(u16);

impl SlotRegisters {
    /// Adds the capability of slot `number` to `config`. The slot is empty.
    pub fn add(config: &mut ConfigSpace, number: u8) -> Self {
        let mut body = [0; LEN - 2];
        let mut put = |at: u16, value: u32, len: usize| {
            let at = usize::from(at) - 2;
            body[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        };
        put(FLAGS, IS_ROOT_PORT.into(), 2);
        put(DEVICE, DEVICE_CAPABILITIES, 4);
        put(LINK, LINK_CAPABILITIES | u32::from(number) << 24, 4);
        put(LINK_STATUS, LINK_IS.into(), 2);
        put(SLOT, SLOT_CAPABILITIES | u32::from(number) << 19, 4);
        put(LINK_2, 1 << 1, 4);
        put(LINK_CONTROL_2, 1, 2);
        let at = config.add_capability(CAP_EXPRESS, &body, &[]);
        // Error reports, payload and request sizes: nothing here depends on them.
        config.allow(at + DEVICE_CONTROL, &0x7fffu16.to_le_bytes());
        config.allow(at + LINK_CONTROL, &(LINK_DISABLED | 0x00cb).to_le_bytes());
        config.allow(at + SLOT_CONTROL, &CONTROL.to_le_bytes());
        config.clear_on_one(at + SLOT_STATUS, &EVENTS.to_le_bytes());
        let this = Self(at);
        this.reset(config, false);
        this
    }

    /// After a reset of the port: a card that is there has power.
    pub fn reset(self, config: &mut ConfigSpace, present: bool) {
        let power = if present { POWER_INDICATOR_ON } else { POWER_INDICATOR_OFF | POWER_OFF };
        config.put(self.0 + SLOT_CONTROL, &(ATTENTION_OFF | power).to_le_bytes());
        let status = if present { PRESENT } else { 0 };
        config.put(self.0 + SLOT_STATUS, &status.to_le_bytes());
    }

    fn status(self, config: &ConfigSpace) -> u16 {
        config.u16(self.0 + SLOT_STATUS)
    }

    /// Something of `events` happened.
    pub fn happened(self, config: &mut ConfigSpace, events: u16) {
        let status = self.status(config) | events;
        config.put(self.0 + SLOT_STATUS, &status.to_le_bytes());
    }

    /// There is a card, or there is none.
    pub fn set_present(self, config: &mut ConfigSpace, present: bool) {
        let status = self.status(config) & !PRESENT | if present { PRESENT } else { 0 };
        config.put(self.0 + SLOT_STATUS, &status.to_le_bytes());
    }

    /// Whether there is a card.
    pub fn is_present(self, config: &ConfigSpace) -> bool {
        self.status(config) & PRESENT != 0
    }

    /// Whether software lets the slot have power.
    pub fn has_power(self, config: &ConfigSpace) -> bool {
        config.u16(self.0 + SLOT_CONTROL) & POWER_OFF == 0
    }

    /// The registers that software does not write and that change: offsets and masks.
    pub fn own(self) -> [(u16, u16); 2] {
        [(self.0 + LINK_STATUS, 0xffff), (self.0 + SLOT_STATUS, PRESENT)]
    }

    /// Whether the link status says that it is active.
    pub fn shows_link(self, config: &ConfigSpace) -> bool {
        config.u16(self.0 + LINK_STATUS) == LINK_IS | LINK_ACTIVE
    }

    /// Whether a card that is there can be talked to.
    pub fn is_linked(self, config: &ConfigSpace) -> bool {
        let disabled = config.u16(self.0 + LINK_CONTROL) & LINK_DISABLED != 0;
        self.is_present(config) && self.has_power(config) && !disabled
    }

    /// Shows whether the link is active.
    pub fn show_link(self, config: &mut ConfigSpace, active: bool) {
        let status = LINK_IS | if active { LINK_ACTIVE } else { 0 };
        config.put(self.0 + LINK_STATUS, &status.to_le_bytes());
    }

    /// Whether the port has reason to interrupt: an event whose interrupt is enabled (section 6.7.3.4).
    pub fn interrupts(self, config: &ConfigSpace) -> bool {
        let (control, status) = (config.u16(self.0 + SLOT_CONTROL), self.status(config));
        let link = if control & LINK_INTERRUPT != 0 { LINK_CHANGED } else { 0 };
        control & INTERRUPT != 0 && status & (control & (BUTTON | PRESENCE) | link) != 0
    }
}
