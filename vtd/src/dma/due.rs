//! Messages of the unit that a session brought about: they are sent when it is over, since that may be a system call.

use std::sync::{Mutex, PoisonError};

use crate::msi::Msi;

/// What is to be sent when a session is over.
#[derive(Default)]
pub(super) struct Due(Mutex<Option<Messages>>);

#[derive(Default)]
pub(super) struct Messages {
    /// The fault event's.
    pub(super) fault: Option<Msi>,
    /// That of an overflow of a counter.
    pub(super) counters: Option<Msi>,
}

impl Due {
    /// The fault event's message, if it is due.
    pub(super) fn of_faults(&self, message: Option<Msi>) {
        if message.is_some() {
            self.change(|messages| messages.fault = message);
        }
    }

    /// That of the counters, if it is due.
    pub(super) fn of_counters(&self, message: Option<Msi>) {
        if message.is_some() {
            self.change(|messages| messages.counters = message);
        }
    }

    fn change(&self, change: impl FnOnce(&mut Messages)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default());
    }

    /// What is due, if anything.
    #[inline]
    pub(super) fn take(&mut self) -> Option<Messages> {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take()
    }
}
