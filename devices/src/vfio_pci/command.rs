//! The command register of the host's function, which stops its DMA for good when that has to be (B-11).

use std::io;
use std::sync::{Arc, Mutex};

use vtd::Requester;

use super::host::{AssignedHost, RegionKind, ResetScope};
use crate::pci::config::{COMMAND, COMMAND_MASTER};
use crate::told::Told;

/// The command register of the host's function. Bus Master never comes back once the function is quarantined.
pub struct HostCommand {
    host: Arc<dyn AssignedHost>,
    quarantined: Mutex<bool>,
    told: Told,
}

impl HostCommand {
    /// Of a function that is not quarantined.
    pub fn new(host: Arc<dyn AssignedHost>) -> Self {
        Self { host, quarantined: Mutex::new(false), told: Told::default() }
    }

    /// Writes the register, without Bus Master where the function is quarantined.
    pub fn write(&self, value: u16) {
        let quarantined = self.quarantined.lock().unwrap();
        let value = if *quarantined { value & !COMMAND_MASTER } else { value };
        if let Err(e) = self.host.write(RegionKind::Config, COMMAND.into(), &value.to_le_bytes()) {
            self.told.once(|| log::warn!("the host's command register could not be written: {e}"));
        }
    }

    /// Bus Master off for good, then a reset. An error says that the bit may be set still.
    pub fn quarantine(&self) -> Result<(), String> {
        let mut quarantined = self.quarantined.lock().unwrap();
        *quarantined = true;
        let read = || {
            let mut data = [0; 2];
            self.host.read(RegionKind::Config, COMMAND.into(), &mut data);
            u16::from_le_bytes(data)
        };
        let off = read() & !COMMAND_MASTER;
        let written = self.host.write(RegionKind::Config, COMMAND.into(), &off.to_le_bytes());
        // Ones are what a read gives that failed, and among them is this bit.
        let now = read();
        if written.is_err() || now & COMMAND_MASTER != 0 {
            return Err(format!("Bus Master could not be cleared (the command register reads {now:#06x})"));
        }
        if let Err(e) = self.host.reset(ResetScope::Function) {
            log::warn!("the quarantined function could not be reset ({e}); its Bus Master bit is clear");
        }
        Ok(())
    }

    /// Resets the function.
    pub fn reset(&self, scope: ResetScope, requester: Requester) {
        // Held so that a quarantine cannot clear Bus Master between the host's saving and restoring it.
        let _quarantined = self.quarantined.lock().unwrap();
        // That nothing can reset it was said at start.
        if let Err(e) = self.host.reset(scope)
            && e.kind() != io::ErrorKind::Unsupported
        {
            self.told.once(|| log::warn!("{requester}: the host could not reset the function: {e}"));
        }
    }
}
