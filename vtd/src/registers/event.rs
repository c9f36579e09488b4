//! The registers of an event, and when its message is due.

use serde::{Deserialize, Serialize};

use crate::msi::Msi;
use crate::spec::registers::EventControl;

/// An event with its message: fault event, invalidation completion event, or that of counters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventRegisters {
    /// Control: IM and IP.
    pub control: EventControl,
    /// Data.
    pub data: u32,
    /// Address.
    pub address: u32,
    /// Upper address.
    pub upper_address: u32,
}

impl Default for EventRegisters {
    fn default() -> Self {
        Self { control: EventControl::new().with_masked(true), data: 0, address: 0, upper_address: 0 }
    }
}

impl EventRegisters {
    fn message(&self) -> Msi {
        Msi { address: u64::from(self.upper_address) << 32 | u64::from(self.address), data: self.data }
    }

    /// The event happened: its message, unless the mask holds it back.
    pub(crate) fn raise(&mut self) -> Option<Msi> {
        let control = self.control;
        self.control = control.with_pending(control.masked());
        (!control.masked()).then(|| self.message())
    }

    /// The conditions of the event are gone.
    pub(crate) fn withdraw(&mut self) {
        self.control = self.control.with_pending(false);
    }

    pub(super) fn set_mask(&mut self, masked: bool) -> Option<Msi> {
        let control = self.control;
        let due = control.pending() && !masked;
        self.control = EventControl::new().with_masked(masked).with_pending(control.pending() && masked);
        due.then(|| self.message())
    }
}
