//! Tails of the invalidation queue that a guest writes without a call of [`crate::Unit::write`]: they ring a bell, and
//! whoever takes the queue lock next takes them before it does anything else ([`crate::Unit::serve_tails`]).
//!
//! Bells say which tails were written and not in which order. A guest moves its tail forward, from the head on and never
//! past it, so of several the one that is furthest from the head was written last. Of a guest that takes a tail back
//! the descriptors up to the furthest one are processed: hardware may fetch them as soon as they were announced.

use vm_memory::GuestMemoryBackend;

use crate::core::Core;
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
    fn of(address: QueueAddress) -> Self {
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
    /// Whether a bell may have rung that nobody has taken. While it is so, each write of a register waits for the queue.
    fn hang(&self) -> bool;
    /// Takes what was written since the last call, each tail in bytes.
    fn take(&self, tail: &mut dyn FnMut(u64));
}

/// The queue in use, if it is on.
pub(crate) fn queue<M: GuestMemoryBackend>(core: &Core<M>) -> Option<QueueShape> {
    let registers = core.registers();
    let state = &registers.state;
    state.global_status.queued_invalidation().then(|| QueueShape::of(state.queue_in_use))
}

/// Tells the bells what became of the queue.
pub(crate) fn tell<M: GuestMemoryBackend>(core: &Core<M>, queue: Option<QueueShape>) {
    if let Some(bells) = core.tail_bells.get() {
        bells.queue_changed(queue);
    }
}

/// Whether tails may be there that nobody has taken.
pub(crate) fn may_wait<M>(core: &Core<M>) -> bool {
    core.tail_bells.get().is_some_and(|bells| bells.hang())
}

/// Puts what was written into IQT. Whether there was anything. The queue lock is held.
pub(crate) fn take<M: GuestMemoryBackend>(core: &Core<M>) -> bool {
    let Some(bells) = core.tail_bells.get().filter(|bells| bells.hang()) else { return false };
    let (len, head) = {
        let registers = core.registers();
        (4096 << registers.state.queue_in_use.size(), registers.state.queue_head)
    };
    let (mut taken, mut furthest) = (0, None);
    bells.take(&mut |tail| {
        taken += 1;
        if tail < len {
            furthest = furthest.max(Some((tail + len - head) % len));
        }
    });
    core.counters.tails_taken.add(taken);
    let Some(distance) = furthest else { return false };
    core.registers().state.queue_tail = (head + distance) % len;
    true
}
