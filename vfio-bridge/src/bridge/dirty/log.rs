//! What is known of a group's writes, until somebody asks; and who is tracked at all.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::tracking::Found;

/// What an unmap may lose while devices are tracked (E-3).
///
/// Between the clearing of a translation and the flush of the IOTLB a device can write by the translation that it has
/// cached. (On iommufd that moment begins with the read, which comes before the unmap.) Where the host's dirty bits
/// are in its translations, such a write is in memory and in no bitmap. A guest that unmaps what a device still
/// writes to has no right to what is written then; but memory that is migrated without it differs from what the guest
/// saw.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DirtyRace {
    /// Such a write may be lost. Costs nothing.
    #[default]
    Open,
    /// Nothing is lost: write permission goes first, or the translation that has it, and what is dirty is read when
    /// nothing can be written any more; a host that cannot do that has everything that was writable in an unmapped
    /// mapping dirty.
    Closed,
}

/// Whether functions that come are tracked.
#[derive(Default)]
pub(crate) struct All(AtomicU8);

impl All {
    pub fn set(&self, race: Option<DirtyRace>) {
        let value = match race {
            None => 0,
            Some(DirtyRace::Open) => 1,
            Some(DirtyRace::Closed) => 2,
        };
        self.0.store(value, Ordering::SeqCst);
    }

    pub fn get(&self) -> Option<DirtyRace> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(DirtyRace::Open),
            _ => Some(DirtyRace::Closed),
        }
    }
}

/// What the functions of a group wrote, as far as it was collected. Its lock is taken last of all.
#[derive(Default)]
pub(crate) struct GroupLog(Mutex<Option<Logged>>);

#[derive(Debug)]
struct Logged {
    race: DirtyRace,
    found: Found,
}

impl GroupLog {
    fn lock(&self) -> MutexGuard<'_, Option<Logged>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts, or goes on with what there is.
    pub fn start(&self, race: DirtyRace) {
        self.lock().get_or_insert_with(|| Logged { race, found: Found::default() }).race = race;
    }

    pub fn race(&self) -> Option<DirtyRace> {
        self.lock().as_ref().map(|logged| logged.race)
    }

    pub fn add(&self, found: &Found) {
        if let Some(logged) = &mut *self.lock() {
            logged.found.pages.merge(&found.pages);
            logged.found.knowledge = logged.found.knowledge.max(found.knowledge);
        }
    }

    /// Nothing is tracked any more.
    pub fn stop(&self) {
        *self.lock() = None;
    }

    pub fn take(&self) -> Option<Found> {
        self.lock().as_mut().map(|logged| std::mem::take(&mut logged.found))
    }
}
