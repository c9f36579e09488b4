//! Changes of the guest-physical map (B-15): a BAR that appears, moves or goes away. The tables are the same, and what
//! they lead to is not.
//!
//! In each open space, what the listener was told of leaves into the range goes, and what the tables say of such leaves
//! now is offered to it, in one batch. It is not a re-sync: what leads elsewhere is neither taken away nor added,
//! whatever the tables say about it by now, since no invalidation said that it changed. So a leaf that led into the
//! range, and that the guest changed since, is gone until the guest invalidates it; one that leads there only now, and
//! that the guest did not invalidate yet, may come early, where nothing else is mapped: a guest in Caching Mode
//! promises nothing about an entry between its change and its invalidation.
//!
//! A space of which nothing leads into the range, neither what is in its shadow nor what was refused ([`elsewhere`]),
//! is left alone: that is found without a look at the tables. What was refused because there was no memory is in no
//! shadow, so any other space is walked whole, within the same bounds as by a global invalidation.
//!
//! [`elsewhere`]: super::elsewhere

use vm_memory::GuestMemoryBackend;

use super::Spaces;
use super::attach::report;
use super::waiting::Occasion;
use crate::core::Core;
use crate::range::GpaRange;

impl Spaces {
    /// The guest-physical map changed in `range`.
    pub(crate) fn memory_changed<M: GuestMemoryBackend>(&mut self, core: &Core<M>, range: GpaRange) {
        self.round += 1;
        let unmaps = core.counters.unmap_ops.get();
        for space in self.spaces.values_mut() {
            space.renew(core, &mut self.scratch, range);
            self.book.refused(space.key, &self.scratch.refused);
            report(core, &mut self.reported, &self.scratch.refused);
            self.scratch.refused.clear();
        }
        self.freed += u64::from(core.counters.unmap_ops.get() != unmaps);
        self.try_again(core, Occasion::MemoryChanged);
        self.scratch.shrink();
    }
}
