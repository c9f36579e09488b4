//! The legacy interrupt of the assigned function. VFIO masks it each time it fires; the guest's end of interrupt, which
//! KVM brings to the IOAPIC, unmasks it (F-5: with a split irqchip the kernel's resampler never fires).
//!
//! VFIO clears INTx Disable before its handler is there, and leaves it clear when the handler is gone. So it is set
//! around both ([`HostCommand::hold_line`]): VFIO then begins masked, and looks at the function's level when the bit is
//! cleared.

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vfio_bridge::{Function, IrqKind};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::command::HostCommand;
use super::reach::Change;
use crate::host::IrqLine;
use crate::told::Told;

/// The line, and what VFIO signals.
pub struct Intx {
    host: Arc<dyn Function>,
    line: Arc<dyn IrqLine>,
    event: EventFd,
    // Held while the line is set, so that levels arrive in the order of their causes.
    state: Mutex<State>,
    told: Told,
}

#[derive(Default)]
struct State {
    enabled: bool,
    /// The line is high because the device fired; VFIO has it masked.
    pending: bool,
    /// It fired again since: not VFIO, but servers of vfio-user do not mask it, and need not fire once more when they
    /// are asked to unmask.
    again: bool,
}

/// What is saved of it: what the guest has still to hear.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedIntx {
    pending: bool,
    again: bool,
}

impl Intx {
    /// What is saved.
    pub fn saved(&self) -> SavedIntx {
        let State { pending, again, enabled: _ } = *self.state.lock().unwrap();
        SavedIntx { pending, again }
    }

    /// As it was, if it is enabled. A function whose line is high says so once more when it gets its state: what the
    /// guest has to hear of already is not heard twice.
    pub fn restore(&self, saved: &SavedIntx) {
        let mut state = self.state.lock().unwrap();
        if state.enabled {
            if saved.pending {
                let _ = self.event.read();
            }
            (state.pending, state.again) = (saved.pending, saved.again);
            self.line.set_level(saved.pending);
        }
    }

    /// A disabled interrupt.
    pub fn new(host: Arc<dyn Function>, line: Arc<dyn IrqLine>) -> io::Result<Self> {
        Ok(Self { host, line, event: EventFd::new(EFD_NONBLOCK)?, state: Mutex::default(), told: Told::default() })
    }

    /// What VFIO signals.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Lets the device raise the line.
    pub fn enable(&self, command: &HostCommand) {
        let mut state = self.state.lock().unwrap();
        if !state.enabled {
            match self.host.set_irqs(IrqKind::Intx, 0, &[Some(&self.event)]) {
                Ok(()) => {
                    state.enabled = true;
                    command.hold_line(false);
                }
                Err(e) => self.told.once(|| log::warn!("the host refused the legacy interrupt: {e}")),
            }
        }
    }

    /// The device no longer raises the line.
    pub fn disable(&self, command: &HostCommand) {
        let mut state = self.state.lock().unwrap();
        if state.enabled {
            let _ = self.host.mask_intx();
            command.hold_line(true);
            if let Err(e) = self.host.disable_irqs(IrqKind::Intx) {
                log::debug!("the legacy interrupt could not be disabled: {e}");
            }
            let _ = self.event.read();
            self.line.set_level(false);
            *state = State::default();
        }
    }

    /// Writes the command register. VFIO reads it, changes it and writes it back, and its handler that sets INTx
    /// Disable can come in between: the bit would be lost, and a level that VFIO takes for masked would stay on the
    /// host's line. So it is masked meanwhile.
    pub fn write_command(&self, command: &HostCommand, value: u16, change: &Change) {
        self.while_masked(|| command.write(value, change));
    }

    /// The same for whether requests get through the bridges above, which is a bit of that register, too.
    pub fn set_gets_through(&self, command: &HostCommand, gets_through: bool) {
        self.while_masked(|| command.set_gets_through(gets_through));
    }

    fn while_masked(&self, write: impl FnOnce()) {
        let state = self.state.lock().unwrap();
        let masked = state.enabled && self.host.mask_intx().is_ok();
        write();
        // What fired, and is not the guest's yet, VFIO signals once more.
        if masked
            && !state.pending
            && let Err(e) = self.host.unmask_intx()
        {
            log::debug!("the legacy interrupt could not be unmasked: {e}");
        }
    }

    /// The eventfd was signalled.
    pub fn fired(&self) {
        let mut state = self.state.lock().unwrap();
        if self.event.read().is_ok() && state.enabled {
            state.again = std::mem::replace(&mut state.pending, true);
            self.line.set_level(true);
        }
    }

    /// The guest is done with it: if the device still wants service, VFIO signals again at once.
    pub fn end_of_interrupt(&self) {
        let mut state = self.state.lock().unwrap();
        if state.pending {
            self.line.set_level(false);
            if let Err(e) = self.host.unmask_intx() {
                log::debug!("the legacy interrupt could not be unmasked: {e}");
            }
            state.pending = std::mem::take(&mut state.again);
            if state.pending {
                self.line.set_level(true);
            }
        }
    }
}
