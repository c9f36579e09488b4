//! Messages that a guest can provoke are logged once: a guest that tries again and again fills no log.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether something has been said.
#[derive(Default)]
pub struct Told(AtomicBool);

impl Told {
    /// Calls `say` the first time.
    pub fn once(&self, say: impl FnOnce()) {
        if !self.0.swap(true, Ordering::Relaxed) {
            say();
        }
    }
}
