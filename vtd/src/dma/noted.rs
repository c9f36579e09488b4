//! What happened to the requests of an endpoint while they are counted.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::spec::performance::Event;

/// What happened and was not taken in yet, by the order of [`Event::ALL`].
#[derive(Default)]
pub(super) struct Noted([AtomicU32; Event::ALL.len()]);

impl Noted {
    /// It happened once more.
    #[cold]
    pub(super) fn add(&self, event: Event) {
        self.0[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// What was noted since this was called last.
    pub(super) fn take(&self) -> [u32; Event::ALL.len()] {
        std::array::from_fn(|index| match self.0[index].load(Ordering::Relaxed) {
            0 => 0,
            _ => self.0[index].swap(0, Ordering::Relaxed),
        })
    }
}
