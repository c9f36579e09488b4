//! The command register of the host's function, which stops its DMA for good when that has to be (B-11), and its legacy
//! interrupt while nobody hears it; and its reset. What of them ends accesses of BARs needs the proof that there are
//! none ([`super::reach`]).

use std::io;
use std::sync::{Arc, Mutex};

use vfio_bridge::{Function, RegionKind, ResetScope};
use vtd::Requester;

use super::reach::{Change, Closed};
use crate::pci::config::{COMMAND, COMMAND_INTX_OFF, COMMAND_MASTER};
use crate::told::Told;

/// The command register of the host's function. Bus Master never comes back once the function is quarantined.
pub struct HostCommand {
    host: Arc<dyn Function>,
    state: Mutex<State>,
    told: Told,
}

struct State {
    /// What the guest wants.
    value: u16,
    quarantined: bool,
    /// Requests get through the bridges above.
    gets_through: bool,
    /// INTx Disable is set, whatever the guest wants.
    holds_line: bool,
}

impl HostCommand {
    /// Of a function that is not quarantined, and whose legacy interrupt nobody hears. Nothing is enabled.
    pub fn new(host: Arc<dyn Function>) -> Self {
        let state = State { value: 0, quarantined: false, gets_through: true, holds_line: true };
        let command = Self { host, state: Mutex::new(state), told: Told::default() };
        command.put(&command.state.lock().unwrap());
        command
    }

    /// Writes what the guest wants, as far as it can be. Memory and I/O stay on as long as they are reached.
    pub fn write(&self, value: u16, change: &Change) {
        let mut state = self.state.lock().unwrap();
        state.value = value | change.keeps().bits();
        self.put(&state);
    }

    /// Whether the function may not raise its line, because VFIO does not listen. The host's line may be other
    /// functions' as well, and a level that nobody takes away makes the host turn it off for all of them.
    pub fn hold_line(&self, holds: bool) {
        let mut state = self.state.lock().unwrap();
        if std::mem::replace(&mut state.holds_line, holds) != holds {
            self.put(&state);
        }
    }

    /// Whether what the function asks for gets through the bridges above it. Where it does not, its Bus Master is off,
    /// which a function of the host is not asked about in its own configuration space.
    pub fn set_gets_through(&self, gets_through: bool) {
        let mut state = self.state.lock().unwrap();
        if std::mem::replace(&mut state.gets_through, gets_through) != gets_through {
            self.put(&state);
        }
    }

    fn put(&self, state: &State) {
        let mut value = state.value;
        if state.holds_line {
            value |= COMMAND_INTX_OFF;
        }
        if state.quarantined || !state.gets_through {
            value &= !COMMAND_MASTER;
        }
        if let Err(e) = self.host.write(RegionKind::Config, COMMAND.into(), &value.to_le_bytes()) {
            self.told.once(|| log::warn!("the host's command register could not be written: {e}"));
        }
    }

    /// Bus Master off for good, then a reset. An error says that the bit may be set still.
    pub fn quarantine(&self) -> Result<(), String> {
        let mut state = self.state.lock().unwrap();
        state.quarantined = true;
        // As `Intx::write_command` does. The guest's next end of interrupt unmasks it; where it is not enabled there is
        // nothing to mask.
        let _ = self.host.mask_intx();
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

    /// Whether the function does no DMA any more, whatever the guest writes.
    pub fn is_quarantined(&self) -> bool {
        self.state.lock().unwrap().quarantined
    }

    /// Resets the function, of which nothing is reached meanwhile.
    pub fn reset(&self, scope: ResetScope, requester: Requester, _: &Closed<'_>) {
        // Held so that a quarantine cannot clear Bus Master between the host's saving and restoring it.
        let _state = self.state.lock().unwrap();
        // That nothing can reset it was said at start.
        if let Err(e) = self.host.reset(scope)
            && e.kind() != io::ErrorKind::Unsupported
        {
            self.told.once(|| log::warn!("{requester}: the host could not reset the function: {e}"));
        }
    }
}
