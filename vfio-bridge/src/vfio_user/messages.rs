//! What a device asked for by message, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::function::DmaMessages;

/// What became of a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asked {
    Read,
    Write,
    Blocked,
    Refused,
}

/// The counters.
#[derive(Default)]
pub(super) struct Messages {
    /// By [`Asked`].
    counts: [AtomicU64; 4],
    bytes: AtomicU64,
}

impl Messages {
    pub fn count(&self, asked: Asked, bytes: usize) {
        self.counts[asked as usize].fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn so_far(&self) -> DmaMessages {
        let count = |asked: Asked| self.counts[asked as usize].load(Ordering::Relaxed);
        DmaMessages {
            reads: count(Asked::Read),
            writes: count(Asked::Write),
            bytes: self.bytes.load(Ordering::Relaxed),
            blocked: count(Asked::Blocked),
            refused: count(Asked::Refused),
        }
    }
}
