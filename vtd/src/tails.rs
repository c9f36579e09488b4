//! Tails of the invalidation queue that a guest writes without a call of [`crate::Unit::write`]: they ring a bell, and
//! whoever takes the queue lock next takes them before it does anything else ([`crate::Unit::serve_tails`]).
//!
//! Bells say which tails were written and not in which order. A guest moves its tail forward, from the head on and
//! never past it, so of several the one that is furthest from the head was written last.
//! Of a guest that takes a tail back
//! the descriptors up to the furthest one are processed: hardware may fetch them as soon as they were announced.

use vm_memory::GuestMemoryBackend;

use crate::core::Core;
use crate::tail_bells::QueueShape;

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
