//! A page that has what the registers read, so that a guest reads them without an exit.

use std::sync::{Arc, MutexGuard};

use super::{FRCD_END, Registers};
use crate::spec::registers::offset;

/// Memory that a guest reads in place of the registers, [`crate::REGISTER_WINDOW`] bytes of it; its writes go to
/// [`crate::Unit::write`] as ever. All of it is 0 at first.
pub trait RegisterPage: Send + Sync {
    /// Puts 8 bytes at `offset`, a multiple of 8: a read of all of them, or of one half, sees them together. Called
    /// with the lock of the registers held, so it waits for nothing.
    fn store(&self, offset: u64, value: u64);
}

/// The registers have nothing but zeros from here to the fault records, and behind these.
const LOW_END: u64 = 0x100;
const LOW_QUADS: usize = (LOW_END / 8) as usize;
const QUADS: usize = LOW_QUADS + ((FRCD_END - offset::FRCD) / 8) as usize;

/// Where the `index`th 8 bytes are that may have something else than zeros.
const fn place(index: usize) -> u64 {
    match index.checked_sub(LOW_QUADS) {
        None => index as u64 * 8,
        Some(record) => offset::FRCD + record as u64 * 8,
    }
}

/// A page, and what it has.
pub(super) struct Shown {
    page: Arc<dyn RegisterPage>,
    quads: [u64; QUADS],
}

impl Registers {
    /// `page` has what the registers read from now on.
    pub(crate) fn show_in(&mut self, page: Arc<dyn RegisterPage>) {
        self.shown = Some(Box::new(Shown { page, quads: [0; QUADS] }));
    }

    /// Puts what changed into the page.
    fn show(&mut self) {
        let Some(mut shown) = self.shown.take() else { return };
        for (index, quad) in shown.quads.iter_mut().enumerate() {
            let value = self.read_quad(place(index));
            if *quad != value {
                *quad = value;
                shown.page.store(place(index), value);
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
