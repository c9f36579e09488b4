//! What every part of a unit uses: its configuration, guest memory, whom it tells, its registers and what of them is
//! read without their lock.

use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::ArcSwap;
use vm_memory::GuestMemoryBackend;

use crate::ats::Functions;
use crate::config::UnitConfig;
use crate::faults::Fault;
use crate::ids::Gpa;
use crate::listener::SpaceListener;
use crate::memory::write_word;
use crate::msi::{Msi, MsiSink};
use crate::registers::Registers;
use crate::registers::page::RegistersGuard;
use crate::registers::record::Recorded;
use crate::source_ids::Sources;
use crate::stats::Counters;
use crate::tables::context::Translation;
use crate::tables::interrupt::{EntriesChanged, RemapFault, RemapListener, Remapping};
use crate::tail_bells::TailBells;

/// What every part of a unit uses.
pub(crate) struct Core<M> {
    pub(crate) config: UnitConfig,
    pub(crate) memory: M,
    pub(crate) listener: Arc<dyn SpaceListener>,
    pub(crate) messages: Arc<dyn MsiSink>,
    pub(crate) registers: Mutex<Registers>,
    pub(crate) translation: ArcSwap<Translation>,
    pub(crate) sources: ArcSwap<Sources>,
    pub(crate) remapping: ArcSwap<Remapping>,
    pub(crate) remap_listener: Mutex<Option<Arc<dyn RemapListener>>>,
    pub(crate) ats: Functions,
    pub(crate) tail_bells: OnceLock<Arc<dyn TailBells>>,
    pub(crate) counters: Counters,
}

impl<M: GuestMemoryBackend> Core<M> {
    pub(crate) fn registers(&self) -> RegistersGuard<'_> {
        RegistersGuard::new(self.registers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// Sends a message of the unit itself: a write of 32 bits, which is an interrupt only where interrupts are, as on
    /// hardware.
    pub(crate) fn signal(&self, message: Option<Msi>) {
        let Some(message) = message else { return };
        if message.is_interrupt() {
            self.messages.signal(message);
        } else if !write_word(&self.memory, Gpa(message.address), message.data) {
            log::debug!("unit {}: there is no memory at {:#x} for an event", self.config.id.0, message.address);
        }
    }

    /// Counts a fault and, unless the guest silenced it, records it. The message that is to be sent then is given back:
    /// it may be a system call, so whoever is inside a DMA session sends it when that is over.
    #[must_use]
    pub(crate) fn record(&self, fault: &Fault) -> Option<Msi> {
        self.counters.fault(fault.reason);
        if fault.silenced {
            return None;
        }
        let recorded = self.registers().record_fault(fault);
        self.recorded(recorded)
    }

    /// The same for an interrupt that fired.
    pub(crate) fn record_remap_fault(&self, fault: &RemapFault) {
        self.counters.interrupt_fault(fault.reason);
        if fault.silenced {
            return;
        }
        let recorded = self.registers().record_remap_fault(fault);
        self.signal(self.recorded(recorded));
    }

    pub(crate) fn recorded(&self, (recorded, message): (Recorded, Option<Msi>)) -> Option<Msi> {
        if recorded == Recorded::Dropped {
            self.counters.faults_dropped.add(1);
        }
        message
    }

    /// Tells the remap listener; the queue lock is held.
    pub(crate) fn entries_changed(&self, changed: EntriesChanged) {
        let listener = self.remap_listener.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        if let Some(listener) = listener {
            listener.entries_changed(changed);
        }
    }

    /// How interrupts are remapped changes as a whole.
    pub(crate) fn set_remapping(&self, remapping: Remapping) {
        self.remapping.store(Arc::new(remapping));
        self.entries_changed(EntriesChanged::All);
    }
}

impl<M> Core<M> {
    /// Counts a bound that was exhausted. The first one is a warning; a guest must not be able to fill the log.
    pub(crate) fn bound_exhausted(&self) -> log::Level {
        let first = self.counters.bounds_exhausted.get() == 0;
        self.counters.bounds_exhausted.add(1);
        if first { log::Level::Warn } else { log::Level::Debug }
    }
}
