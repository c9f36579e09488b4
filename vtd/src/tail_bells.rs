//! Bells that a guest rings by writing the tail of its invalidation queue.

use crate::spec::invalidation::Descriptor;
use crate::spec::registers::QueueAddress;

/// The invalidation queue in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct QueueShape {
    /// How many descriptors it has room for.
    pub descriptors: u64,
    /// Bytes of one: 16, or 32 in scalable mode.
    pub descriptor: u64,
}

impl QueueShape {
    pub(crate) fn of(address: QueueAddress) -> Self {
        let descriptor = Descriptor::size(address.wide());
        Self { descriptors: (4096 << address.size()) / descriptor, descriptor }
    }
}

/// Bells that a guest rings by writing the tail of its queue.
///
/// All but [`Self::hang`] is called with the queue lock held, and so calls nothing of the unit that waits for that.
pub trait TailBells: Send + Sync {
    /// The queue is on and begins at its first descriptor, or it was put back; `None`: it is off, and what rang before
    /// this returns is forgotten.
    fn queue_changed(&self, queue: Option<QueueShape>);
    /// Whether a bell may have rung that nobody has taken. While it is so, each write of a register waits for the
    /// queue.
    fn hang(&self) -> bool;
    /// Takes what was written since the last call, each tail in bytes.
    fn take(&self, tail: &mut dyn FnMut(u64));
}
