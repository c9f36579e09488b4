//! The shadow of a space: what its listener was told, with exactly the boundaries that it was told, and the diff
//! between that and what a walk found (B-1, B-2, B-7, B-14).
//!
//! The diff compares translations, not shapes: where an address leads to the same place with the same permission before
//! and after, nothing is said about it, whatever leaves or extents it belonged to.

use super::elsewhere::Elsewhere;
use super::extents::{Extent, Extents};
use crate::ids::{Gpa, Iova};
use crate::listener::{MapOp, Mapping};
use crate::range::{GpaRange, IovaRange};

/// What a listener was told about one space.
#[derive(Default, Debug)]
pub(crate) struct Shadow {
    extents: Extents,
    /// Where leaves lead that it was told of and refused.
    elsewhere: Elsewhere,
}

/// The changes of one batch. Unmaps are given before maps, whatever order they were found in.
#[derive(Default, Debug)]
pub(crate) struct Changes {
    /// Ascending within one re-sync.
    pub(crate) unmaps: Vec<IovaRange>,
    pub(crate) maps: Vec<Mapping>,
    // From the first IOVA of all maps to their last.
    mapped: Option<IovaRange>,
}

impl Changes {
    pub(crate) fn is_empty(&self) -> bool {
        self.unmaps.is_empty() && self.maps.is_empty()
    }

    pub(crate) fn clear(&mut self) {
        self.unmaps.clear();
        self.maps.clear();
        self.mapped = None;
    }

    /// The batch for the listener, appended to `ops`.
    pub(crate) fn to_ops(&self, ops: &mut Vec<MapOp>) {
        ops.extend(self.unmaps.iter().map(|&range| MapOp::Unmap(range)));
        ops.extend(self.maps.iter().map(|&mapping| MapOp::Map(mapping)));
    }
}

impl From<&Mapping> for Extent {
    fn from(mapping: &Mapping) -> Self {
        Self { first: mapping.iova.0, last: mapping.last().0, gpa: mapping.gpa.0, perm: mapping.perm }
    }
}

impl From<Extent> for Mapping {
    fn from(Extent { first, last, gpa, perm }: Extent) -> Self {
        Self { iova: Iova(first), gpa: Gpa(gpa), len: last - first + 1, perm }
    }
}

impl Shadow {
    /// One that was told these, ascending and disjoint.
    pub(crate) fn of(told: Vec<Mapping>) -> Self {
        let mut shadow = Self::default();
        told.iter().for_each(|mapping| shadow.extents.insert(mapping.into()));
        shadow
    }

    /// Number of extents.
    pub(crate) fn len(&self) -> usize {
        self.extents.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.extents.len() == 0
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.extents.clear();
        self.elsewhere.clear();
    }

    /// Everything is about to be compared: what was refused is told again, if it is there.
    pub(crate) fn begin_whole(&mut self) {
        self.elsewhere.clear();
    }

    /// Whether something in it leads to `targets`, or something that was refused may.
    pub(crate) fn leads_into(&self, targets: GpaRange) -> bool {
        self.elsewhere.meets(targets) || self.iter().any(|extent| extent.leading_into(targets).is_some())
    }

    /// The listener refused `range`: takes it out.
    pub(crate) fn refuse(&mut self, range: IovaRange) {
        let Self { extents, elsewhere } = self;
        let reached = extents.from(range.first).take_while(|extent| extent.first <= range.last);
        for extent in reached.map(|extent| extent.within(range.first, range.last)) {
            elsewhere.add(GpaRange::new(extent.gpa, extent.gpa + (extent.last - extent.first)));
        }
        self.remove(range);
    }

    /// The extents in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Mapping> + '_ {
        self.extents.iter().map(|extent| Mapping::from(*extent))
    }

    /// The parts of the extents in `range`, in ascending order.
    pub(crate) fn part(&self, range: IovaRange) -> impl Iterator<Item = Mapping> + '_ {
        self.within(range).map(Mapping::from)
    }

    /// Where the extent begins that crosses the edge before `first`; `first` if there is none.
    pub(crate) fn edge_before(&self, first: u64) -> u64 {
        self.extents.from(first).next().map_or(first, |extent| extent.first.min(first))
    }

    /// Where the extent ends that crosses the edge behind `last`; `last` if there is none.
    pub(crate) fn edge_behind(&self, last: u64) -> u64 {
        self.extents.from(last).next().filter(|extent| extent.first <= last).map_or(last, |extent| extent.last)
    }

    /// Compares what was told of `range` with `runs`, which lie within it, ascending and disjoint; adds to `changes`
    /// what makes the listener agree, and takes it into the shadow. Nothing is done, and
    /// `false` is returned, when `changes` may hold a map that would have to go again: then the batch must be given
    /// first.
    pub(crate) fn sync(&mut self, range: IovaRange, runs: &[Mapping], changes: &mut Changes) -> bool {
        let (unmaps_before, maps_before) = (changes.unmaps.len(), changes.maps.len());
        self.diff(range, runs, changes);
        // By the span of the maps: looking at each of them would let a guest make one drain quadratic.
        let conflict = changes.mapped.is_some_and(|mapped| {
            changes.unmaps[unmaps_before..].iter().any(|unmap| unmap.intersection(mapped).is_some())
        });
        if conflict {
            changes.unmaps.truncate(unmaps_before);
            changes.maps.truncate(maps_before);
            return false;
        }
        let (unmaps, maps) = (&changes.unmaps[unmaps_before..], &changes.maps[maps_before..]);
        // One page that leads elsewhere, most often: in place.
        let in_place = match (unmaps, maps) {
            ([gone], [new]) if *gone == new.range() => self.extents.replace(new.into()),
            _ => false,
        };
        if !in_place {
            unmaps.iter().for_each(|range| self.extents.remove(range.first, range.last));
            maps.iter().for_each(|map| self.extents.insert(map.into()));
        }
        for map in maps {
            let all = changes.mapped.get_or_insert(map.range());
            *all = IovaRange::new(all.first.min(map.iova.0), all.last.max(map.last().0));
        }
        join_neighbours(&mut changes.unmaps, unmaps_before);
        true
    }

    /// What leads to `targets` is to be told anew: takes it out, and takes in `runs`, which lead there, ascending and
    /// disjoint, except where something stays that leads elsewhere. Adds the same to `changes`, which are empty.
    pub(crate) fn renew(&mut self, targets: GpaRange, runs: &[Mapping], changes: &mut Changes) {
        self.elsewhere.forget(targets);
        // Unmaps are joined over gaps as long as nothing lies between them that stays.
        let mut stays_since_unmap = true;
        for extent in self.iter() {
            let Some(gone) = extent.leading_into(targets) else {
                stays_since_unmap = true;
                continue;
            };
            match changes.unmaps.last_mut() {
                Some(previous) if !stays_since_unmap && gone.iova == extent.iova => previous.last = gone.last().0,
                _ => changes.unmaps.push(gone.range()),
            }
            stays_since_unmap = gone.last() < extent.last();
        }
        changes.unmaps.iter().for_each(|range| self.extents.remove(range.first, range.last));
        for run in runs {
            for part in run.range().without(self.part(run.range()).map(|stays| stays.range())) {
                let new = Extent::from(run).within(part.first, part.last);
                changes.maps.push(new.into());
                self.extents.insert(new);
            }
        }
    }

    fn diff(&self, mut range: IovaRange, mut runs: &[Mapping], changes: &mut Changes) {
        // Of most that is looked at, nothing changed: what stays at the beginning is passed quickly.
        let (same, rest) = runs.split_at(self.extents.same_from(range.first, runs));
        if let Some(last) = same.last().map(|run| run.last().0) {
            if last == range.last {
                return;
            }
            (range, runs) = (IovaRange::new(last + 1, range.last), rest);
        }
        let unmaps_from = changes.unmaps.len();
        // Unmaps are joined over gaps as long as nothing lies between them that stays.
        let mut stays_since_unmap = true;
        let mut unmap = |first: u64, last: u64, stays: &mut bool| match changes.unmaps[unmaps_from..].last_mut() {
            Some(previous) if !*stays => previous.last = last,
            _ => {
                changes.unmaps.push(IovaRange::new(first, last));
                *stays = false;
            }
        };
        // A run that is cut only where the old extents had their boundaries is one map.
        let mut mapped_from: Option<usize> = None;
        let maps = &mut changes.maps;
        let mut map = |piece: Extent, last: u64, run: usize| match maps.last_mut() {
            Some(previous) if mapped_from == Some(run) && previous.last().0.wrapping_add(1) == piece.first => {
                previous.len += last - piece.first + 1;
            }
            _ => {
                maps.push(Extent { last, ..piece }.into());
                mapped_from = Some(run);
            }
        };

        let mut old_pieces = self.within(range);
        let mut old = old_pieces.next();
        let mut run = 0;
        let mut new = runs.first().map(Extent::from);
        let next_run = |run: &mut usize| {
            *run += 1;
            runs.get(*run).map(Extent::from)
        };
        loop {
            match (old, new) {
                (None, None) => break,
                (Some(o), None) => {
                    unmap(o.first, o.last, &mut stays_since_unmap);
                    old = old_pieces.next();
                }
                (None, Some(n)) => {
                    map(n, n.last, run);
                    new = next_run(&mut run);
                }
                (Some(o), Some(n)) if o.first < n.first => {
                    let last = o.last.min(n.first - 1);
                    unmap(o.first, last, &mut stays_since_unmap);
                    old = o.after(last).or_else(|| old_pieces.next());
                }
                (Some(o), Some(n)) if n.first < o.first => {
                    let last = n.last.min(o.first - 1);
                    map(n, last, run);
                    new = n.after(last).or_else(|| next_run(&mut run));
                }
                (Some(o), Some(n)) => {
                    let last = o.last.min(n.last);
                    if (o.gpa, o.perm) == (n.gpa, n.perm) {
                        stays_since_unmap = true;
                    } else {
                        unmap(o.first, last, &mut stays_since_unmap);
                        map(n, last, run);
                    }
                    old = o.after(last).or_else(|| old_pieces.next());
                    new = n.after(last).or_else(|| next_run(&mut run));
                }
            }
        }
    }

    /// The parts of the extents that lie within the range, ascending.
    fn within(&self, IovaRange { first, last }: IovaRange) -> impl Iterator<Item = Extent> + '_ {
        let reached = self.extents.from(first).take_while(move |extent| extent.first <= last);
        reached.map(move |extent| extent.within(first, last))
    }

    /// Takes `range` out; extents that reach beyond it keep what is beyond.
    pub(crate) fn remove(&mut self, range: IovaRange) {
        self.extents.remove(range.first, range.last);
    }
}

/// Joins the first range at `from` with the one before it, if they touch: ranges of several invalidations of one drain.
fn join_neighbours(unmaps: &mut Vec<IovaRange>, from: usize) {
    if from == 0 || from >= unmaps.len() {
        return;
    }
    let (previous, next) = (unmaps[from - 1], unmaps[from]);
    if previous.last.checked_add(1) == Some(next.first) {
        unmaps[from - 1].last = next.last;
        unmaps.remove(from);
    }
}

#[cfg(test)]
#[path = "diff_test.rs"]
mod diff_test;
