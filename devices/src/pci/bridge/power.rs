//! The power-management capability of a bridge (PCI Express base specification 6.0, section 7.5.2): D0 and D3hot. In
//! D3hot a bridge forwards nothing but what is for itself.

use crate::pci::ConfigSpace;
use crate::pci::config::CAP_POWER;

/// Offset of the control and status register in the capability.
const CONTROL: u16 = 4;
const STATE: u16 = 3;
const D3_HOT: u16 = 3;
/// What was configured is still there after D3hot.
const NO_SOFT_RESET: u16 = 1 << 3;
/// Version 3. Neither D1 nor D2, and no power-management events.
const CAPABILITIES: u16 = 3;

/// Where the capability is.
#[derive(Clone, Copy)]
pub struct Power(u16);

impl Power {
    /// Adds the capability to `config`; the bridge is in D0.
    pub fn add(config: &mut ConfigSpace) -> Self {
        let mut body = [0; 6];
        body[..2].copy_from_slice(&CAPABILITIES.to_le_bytes());
        body[2..4].copy_from_slice(&NO_SOFT_RESET.to_le_bytes());
        Self(config.add_capability(CAP_POWER, &body, &[0, 0, STATE as u8]))
    }

    /// Writes configuration space as software does. A state that there is not is not taken.
    pub fn write(self, config: &mut ConfigSpace, offset: u16, data: &[u8]) {
        let at = self.0 + CONTROL;
        let before = config.u16(at);
        config.write(offset, data);
        if !matches!(config.u16(at) & STATE, 0 | D3_HOT) {
            config.put(at, &before.to_le_bytes());
        }
    }

    /// Whether it is in D0.
    pub fn is_on(self, config: &ConfigSpace) -> bool {
        config.u16(self.0 + CONTROL) & STATE == 0
    }
}
