//! One space that has members: its shadow, and how it is compared with the guest's tables.
//!
//! A space is open or blocked. Only an open one has a shadow, and a comparison takes the shadow out of the space: it is
//! put back when the comparison ends within the bounds, and else the space stays without one, so that nothing can be
//! added to a space that is blocked. A blocked space holds nothing, and is opened again only by a whole comparison
//! (rule 5).

use std::collections::BTreeSet;

use vm_memory::GuestMemoryBackend;

use super::diff::{Changes, Shadow};
use crate::core::Core;
use crate::ids::Requester;
use crate::listener::{MapOp, Mapping, Refusal};
use crate::range::{GpaRange, IovaRange};
use crate::space::{PagedSpace, SpaceKey};
use crate::tables::second_stage::{Exhausted, Found, Merge, walk_range, walk_range_into};

/// Storage that is used again and again.
#[derive(Default)]
pub(crate) struct Scratch {
    found: Found,
    /// Of a look at what is beside a range.
    beside: Found,
    changes: Changes,
    ops: Vec<MapOp>,
    /// The ranges that are to be compared, each of one page-selective invalidation.
    pub(crate) ranges: Vec<IovaRange>,
    /// What the listener refused.
    pub(crate) refused: Vec<Refusal>,
    /// Re-syncs since the last large one.
    small_ones: u32,
}

impl Scratch {
    /// Gives back what an exceptionally large re-sync took, when many after it did not need it: a guest that re-syncs
    /// the same large space each time has the storage ready.
    pub(crate) fn shrink(&mut self) {
        const KEPT: usize = 1 << 14;
        const SMALL_ONES: u32 = 256;
        let was_large = [self.found.runs.len(), self.ops.len(), self.ranges.len()].iter().any(|len| *len > KEPT);
        self.small_ones = if was_large { 0 } else { self.small_ones.saturating_add(1) };
        if self.small_ones != SMALL_ONES {
            return;
        }
        self.found.runs.shrink_to(KEPT);
        self.changes.unmaps.shrink_to(KEPT);
        self.changes.maps.shrink_to(KEPT);
        self.ops.shrink_to(KEPT);
        self.ranges.shrink_to(KEPT);
        self.refused.shrink_to(KEPT);
    }
}

enum State {
    /// Follows the guest's tables.
    Open(Shadow),
    /// A bound was exhausted: nothing is mapped until a whole comparison succeeds.
    Blocked,
}

/// A space that has members.
pub(crate) struct Space {
    pub(crate) key: PagedSpace,
    pub(crate) members: BTreeSet<Requester>,
    state: State,
    /// The round in which it was compared whole last.
    pub(crate) whole_in: u64,
    /// The round in which ranges were compared last, and the table entries that this visited.
    ranges_in: (u64, u64),
}

impl Space {
    /// A space that was not compared yet, without members. Where its tables lead to what was `told` of it, ascending
    /// and disjoint, it has the boundaries of that.
    pub(crate) fn new(key: PagedSpace, told: Vec<Mapping>) -> Self {
        let state = State::Open(Shadow::of(told));
        Self { key, members: BTreeSet::new(), state, whole_in: 0, ranges_in: (0, 0) }
    }

    /// What the listener was told, unless a bound has blocked the space.
    pub(crate) fn shadow(&self) -> Option<&Shadow> {
        match &self.state {
            State::Open(shadow) => Some(shadow),
            State::Blocked => None,
        }
    }

    /// The listener does not have these.
    pub(crate) fn lose(&mut self, refused: &[Refusal]) {
        if let State::Open(shadow) = &mut self.state {
            refused.iter().for_each(|refusal| shadow.refuse(refusal.range));
        }
    }

    /// A shadow that says something else than its listener was told: what an audit is there to find.
    #[cfg(test)]
    pub(crate) fn falsify(&mut self, range: IovaRange) {
        if let State::Open(shadow) = &mut self.state {
            shadow.remove(range);
        }
    }

    /// Compares all of it. Nothing that stayed the same is touched (B-2).
    pub(crate) fn compare_whole<M: GuestMemoryBackend>(&mut self, core: &Core<M>, scratch: &mut Scratch, round: u64) {
        self.whole_in = round;
        let (mut shadow, was_open) = match std::mem::replace(&mut self.state, State::Blocked) {
            State::Open(shadow) => (shadow, true),
            State::Blocked => (Shadow::default(), false),
        };
        match self.comparison(core, scratch, &mut shadow).whole() {
            Ok(()) => self.state = State::Open(shadow),
            Err(Exhausted) => self.block(core, scratch, was_open),
        }
    }

    /// Compares the ranges of `scratch`.
    pub(crate) fn compare_ranges<M: GuestMemoryBackend>(&mut self, core: &Core<M>, scratch: &mut Scratch, round: u64) {
        let State::Open(mut shadow) = std::mem::replace(&mut self.state, State::Blocked) else { return };
        // One budget for all ranges of a round: a queue full of overlapping ranges is no way around it.
        let budget = core.config.bounds.table_entries;
        let visited = if self.ranges_in.0 == round { self.ranges_in.1 } else { 0 };
        scratch.changes.clear();
        scratch.found.entries_left = budget.saturating_sub(visited);
        let mut comparison = self.comparison(core, scratch, &mut shadow);
        let (mut compared, mut is_whole) = (comparison.ranges(), false);
        if let Ok(Ranges::Unaffordable) = compared {
            // A full queue is legal: one look at everything stands for the ranges that are left.
            is_whole = true;
            compared = comparison.whole().map(|()| Ranges::Compared);
        }
        if is_whole {
            self.whole_in = round;
        }
        self.ranges_in = (round, budget - scratch.found.entries_left);
        match compared {
            Ok(_) => self.state = State::Open(shadow),
            Err(Exhausted) => self.block(core, scratch, true),
        }
    }

    /// What leads to `targets` is told anew; nothing else is touched (B-15).
    pub(crate) fn renew<M: GuestMemoryBackend>(&mut self, core: &Core<M>, scratch: &mut Scratch, targets: GpaRange) {
        if !self.shadow().is_some_and(|shadow| shadow.leads_into(targets)) {
            return;
        }
        let State::Open(mut shadow) = std::mem::replace(&mut self.state, State::Blocked) else { return };
        match self.comparison(core, scratch, &mut shadow).renewal(targets) {
            Ok(()) => self.state = State::Open(shadow),
            Err(Exhausted) => self.block(core, scratch, true),
        }
    }

    fn comparison<'a, M>(
        &self,
        core: &'a Core<M>,
        scratch: &'a mut Scratch,
        shadow: &'a mut Shadow,
    ) -> Comparison<'a, M> {
        Comparison { core, key: self.key, has_members: !self.members.is_empty(), shadow, scratch }
    }

    /// A bound is exhausted, and the space has no shadow any more: nothing of it stays mapped (rule 5).
    fn block<M>(&self, core: &Core<M>, scratch: &mut Scratch, was_open: bool) {
        let level = core.bound_exhausted();
        if was_open {
            log::log!(
                level,
                "unit {}: domain {} has more mappings or tables than the bounds allow; it is blocked until the guest \
                 invalidates all of it",
                core.config.id.0,
                self.key.domain.0
            );
        }
        scratch.changes.clear();
        if !self.members.is_empty() {
            scratch.ops.clear();
            scratch.ops.push(MapOp::Unmap(IovaRange::ALL));
            apply(core, self.key, scratch);
        }
    }
}

/// What became of a batch of ranges.
enum Ranges {
    Compared,
    /// They visit more table entries than one drain may; those before were compared, and the listener has what they
    /// changed.
    Unaffordable,
}

/// An open space, while it is compared with the guest's tables. An error ends it: the shadow is not to be used any
/// more.
struct Comparison<'a, M> {
    core: &'a Core<M>,
    key: PagedSpace,
    /// The space has members, so there is somebody who is told.
    has_members: bool,
    shadow: &'a mut Shadow,
    scratch: &'a mut Scratch,
}

impl<M: GuestMemoryBackend> Comparison<'_, M> {
    fn whole(&mut self) -> Result<(), Exhausted> {
        let Scratch { found, changes, .. } = &mut *self.scratch;
        changes.clear();
        self.shadow.begin_whole();
        found.entries_left = self.core.config.bounds.table_entries;
        walk(self.core, &self.key, IovaRange::ALL, Merge::Aligned, found)?;
        if found.runs.is_empty() && !self.shadow.is_empty() {
            self.shadow.clear();
            changes.unmaps.push(IovaRange::ALL);
        } else {
            self.shadow.sync(IovaRange::ALL, &found.runs, changes);
        }
        self.finish()
    }

    fn renewal(&mut self, targets: GpaRange) -> Result<(), Exhausted> {
        let Scratch { found, changes, .. } = &mut *self.scratch;
        changes.clear();
        found.entries_left = self.core.config.bounds.table_entries;
        let (memory, config) = (&self.core.memory, &self.core.config);
        let walked = walk_range_into(memory, config, &self.key, IovaRange::ALL, targets, Merge::Aligned, found);
        self.core.counters.leaves_walked.add(found.leaves);
        walked?;
        self.shadow.renew(targets, &found.runs, changes);
        self.finish()
    }

    fn ranges(&mut self) -> Result<Ranges, Exhausted> {
        for index in 0..self.scratch.ranges.len() {
            if let Ranges::Unaffordable = self.range(self.scratch.ranges[index])? {
                self.give();
                return Ok(Ranges::Unaffordable);
            }
        }
        self.finish()?;
        Ok(Ranges::Compared)
    }

    fn range(&mut self, range: IovaRange) -> Result<Ranges, Exhausted> {
        let Scratch { found, beside, .. } = &mut *self.scratch;
        let whole_budget = found.entries_left == self.core.config.bounds.table_entries;
        let mut walked = walk(self.core, &self.key, range, Merge::Range, found);
        if walked.is_err() && whole_budget {
            // A look at everything would be no shorter.
            return Err(Exhausted);
        }
        if walked.is_ok()
            && let Some(wider) = gone_beyond(self.core, &self.key, self.shadow, found, beside)
        {
            // If it has more runs than there may be, the range alone has to do.
            let mut walk = |range| walk(self.core, &self.key, range, Merge::Range, found);
            walked = walk(wider).or_else(|Exhausted| walk(range));
        }
        if walked.is_err() {
            return Ok(Ranges::Unaffordable);
        }
        let spoken_of = found.range;
        if !self.shadow.sync(spoken_of, &self.scratch.found.runs, &mut self.scratch.changes) {
            // The guest changed its mind within one drain: what was found before is given first.
            self.give();
            self.shadow.sync(spoken_of, &self.scratch.found.runs, &mut self.scratch.changes);
        }
        // After each range: together they could hold the leaves of all table entries that one drain may visit. Twice,
        // because what takes the place of all that was there may come before it in the order of addresses.
        if self.shadow.len() / 2 > self.core.config.bounds.shadow_entries {
            return Err(Exhausted);
        }
        Ok(Ranges::Compared)
    }

    /// Gives the last batch, if there is room for what it leaves.
    fn finish(&mut self) -> Result<(), Exhausted> {
        if self.shadow.len() > self.core.config.bounds.shadow_entries {
            return Err(Exhausted);
        }
        self.give();
        Ok(())
    }

    /// Gives the batch to the listener, if the space has members.
    fn give(&mut self) {
        if !self.scratch.changes.is_empty() && self.has_members {
            self.scratch.ops.clear();
            self.scratch.changes.to_ops(&mut self.scratch.ops);
            let lost = self.scratch.refused.len();
            apply(self.core, self.key, self.scratch);
            for refusal in &self.scratch.refused[lost..] {
                self.shadow.refuse(refusal.range);
            }
        }
        self.scratch.changes.clear();
    }
}

/// Gives `scratch.ops` to the listener; what it refuses is added to `scratch.refused`.
fn apply<M>(core: &Core<M>, space: PagedSpace, scratch: &mut Scratch) {
    let unmaps = scratch.ops.iter().filter(|op| matches!(op, MapOp::Unmap(_))).count() as u64;
    core.counters.unmap_ops.add(unmaps);
    core.counters.map_ops.add(scratch.ops.len() as u64 - unmaps);
    let applied = core.listener.apply(&SpaceKey::Paged(space), &scratch.ops);
    scratch.refused.extend(applied.refused);
}

fn walk<M: GuestMemoryBackend>(
    core: &Core<M>,
    space: &PagedSpace,
    range: IovaRange,
    merge: Merge,
    found: &mut Found,
) -> Result<(), Exhausted> {
    let walked = walk_range(&core.memory, &core.config, space, range, merge, found);
    core.counters.leaves_walked.add(found.leaves);
    walked
}

/// The range that `found` speaks of with the whole of the extents at its edges, if these are not only gone from it but
/// beyond it, too.
///
/// A guest that takes away several mappings clears them all, and then invalidates them one by one, each in a range that
/// is rounded up to a power of two. Where that cuts the next one, nothing of which is live any more, it would be mapped
/// again without need, for as long as its own invalidation takes (B-8). Only one page beside the range is looked at,
/// and if that is live, no more.
fn gone_beyond<M: GuestMemoryBackend>(
    core: &Core<M>,
    space: &PagedSpace,
    shadow: &Shadow,
    found: &Found,
    beside: &mut Found,
) -> Option<IovaRange> {
    let IovaRange { first, last } = found.range;
    let first_is_here = found.runs.first().is_some_and(|run| run.iova.0 <= first);
    let last_is_here = found.runs.last().is_some_and(|run| run.last().0 >= last);
    let from = if first_is_here { first } else { shadow.edge_before(first) };
    let to = if last_is_here { last } else { shadow.edge_behind(last) };
    let mut is_gone = |at: u64| {
        // No more than the entries on the way to one leaf.
        beside.entries_left = u64::from(space.tables.levels());
        walk(core, space, IovaRange::new(at, at), Merge::Range, beside).is_ok() && beside.runs.is_empty()
    };
    let left = from < first && is_gone(first - 1);
    let right = to > last && is_gone(last + 1);
    let (from, to) = (if left { from } else { first }, if right { to } else { last });
    // More than its leaves and the tables above them: a walk that is cut short would block the space.
    let most_entries = ((to - from) >> 11) + 64;
    ((left || right) && most_entries <= found.entries_left).then_some(IovaRange::new(from, to))
}
