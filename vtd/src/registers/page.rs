//! A page that has what the registers read, so that a guest reads them without an exit.

use std::sync::{Arc, MutexGuard};

use super::{FRCD_END, Registers};
use crate::config::UnitConfig;
use crate::spec::performance::offset as counters;
use crate::spec::registers::offset;

/// Memory that a guest reads in place of the first page of the registers, [`crate::REGISTER_WINDOW`] bytes; its writes
/// go to [`crate::Unit::write`] as ever, and so do reads of further pages, where the counters are. All of it is 0 at
/// first.
pub trait RegisterPage: Send + Sync {
    /// Puts 8 bytes at `offset`, a multiple of 8: a read of all of them, or of one half, sees them together. Called
    /// with the lock of the registers held, so it waits for nothing.
    fn store(&self, offset: u64, value: u64);
}

/// Where the registers may have something else than zeros, of the first page: in 8 bytes at each of these.
fn places(config: &UnitConfig) -> impl Iterator<Item = u64> {
    let counters = if config.performance_counters { counters::PERFCAP..counters::ECCAP_3 + 8 } else { 0..0 };
    let ranges = [0..LOW_END, offset::FRCD..FRCD_END, counters];
    ranges.into_iter().flat_map(|range| range.step_by(8))
}

/// Behind the registers whose places every unit has.
const LOW_END: u64 = 0x100;

/// A page, and what it has.
pub(super) struct Shown {
    page: Arc<dyn RegisterPage>,
    quads: Vec<(u64, u64)>,
}

impl Registers {
    /// `page` has what the registers read from now on.
    pub(crate) fn show_in(&mut self, page: Arc<dyn RegisterPage>) {
        let mut quads: Vec<_> = places(&self.config).map(|at| (at, 0)).collect();
        // A guest may look in between: what says that something is there comes after what is there. Records come before
        // FSTS, IQERCD and the head before IQE, PRS before the tail of page requests.
        quads.sort_unstable_by_key(|(at, _)| if *at < LOW_END { (1, LOW_END - at) } else { (0, *at) });
        self.shown = Some(Shown { page, quads });
    }

    /// Puts what changed into the page.
    fn show(&mut self) {
        let Some(mut shown) = self.shown.take() else { return };
        for (at, quad) in &mut shown.quads {
            let value = self.read_quad(*at);
            if *quad != value {
                *quad = value;
                shown.page.store(*at, value);
            }
        }
        self.shown = Some(shown);
    }
}

/// The registers, locked. Whoever has changed them has the page say so before another has the lock.
pub(crate) struct RegistersGuard<'a> {
    registers: MutexGuard<'a, Registers>,
    changed: bool,
}

impl<'a> RegistersGuard<'a> {
    pub(crate) fn new(registers: MutexGuard<'a, Registers>) -> Self {
        Self { registers, changed: false }
    }
}

impl std::ops::Deref for RegistersGuard<'_> {
    type Target = Registers;

    fn deref(&self) -> &Registers {
        &self.registers
    }
}

impl std::ops::DerefMut for RegistersGuard<'_> {
    fn deref_mut(&mut self) -> &mut Registers {
        self.changed = true;
        &mut self.registers
    }
}

impl Drop for RegistersGuard<'_> {
    fn drop(&mut self) {
        if self.changed {
            self.registers.show();
        }
    }
}
