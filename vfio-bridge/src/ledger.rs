//! The ledger: exactly what the host was handed, per container, and the plans that follow from it.
//!
//! Planning is pure: it reads the ledger and says which host operations make a wish true. Every planned unmap is a union
//! of whole extents (design rule 4); an extent that is only partly in the way is unmapped whole and what remains of
//! it is mapped again (B-8).

use std::collections::BTreeMap;

use vtd::Perm;

use crate::host::UnmapRange;
use crate::limits::IovaRange;

/// One host mapping: `first..=last` leads to host memory at `hva`, guest-physical `gpa`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First IOVA.
    pub first: u64,
    /// Last IOVA, inclusive.
    pub last: u64,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Address of the first byte in this process.
    pub hva: u64,
    /// What the device may do.
    pub perm: Perm,
}

impl Extent {
    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.last - self.first + 1
    }

    /// The part of it in `first..=last`, which must be inside: both addresses advance with the left edge (B-6).
    pub fn part(&self, first: u64, last: u64) -> Self {
        debug_assert!(self.first <= first && first <= last && last <= self.last);
        let skip = first - self.first;
        Self { first, last, gpa: self.gpa + skip, hva: self.hva + skip, perm: self.perm }
    }

    /// Whether an IOVA that both hold leads to the same host memory with the same permission. The boundaries may differ (B-14).
    fn agrees_with(&self, other: &Self) -> bool {
        // Both sides wrap alike, so equal differences mean equal targets.
        self.perm == other.perm && self.hva.wrapping_sub(self.first) == other.hva.wrapping_sub(other.first)
    }
}

/// One host unmap, and what must be mapped again right after it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// What the host is asked to take away.
    pub range: UnmapRange,
    /// The whole extents that this takes away, in ascending order.
    pub extents: Vec<Extent>,
    /// Parts of those extents that stay granted.
    pub remainders: Vec<Extent>,
    /// How many of the extents have such parts.
    pub cuts: u64,
}

/// The way from what a container holds to what it shall hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Switch {
    /// First these.
    pub unmaps: Vec<Run>,
    /// Then these.
    pub maps: Vec<Extent>,
}

/// What is not there yet of an extent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Missing {
    /// To be mapped.
    pub maps: Vec<Extent>,
    /// Held already, and leads elsewhere.
    pub conflicts: Vec<IovaRange>,
}

/// What one container holds.
#[derive(Debug, Default)]
pub struct Ledger {
    extents: BTreeMap<u64, Extent>,
    bytes: u64,
}

/// Sorts `ranges` and joins those that overlap or touch.
pub fn union_of(mut ranges: Vec<IovaRange>) -> Vec<IovaRange> {
    ranges.sort_unstable();
    let mut union: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match union.last_mut() {
            Some(open) if range.first <= open.last.saturating_add(1) => open.last = open.last.max(range.last),
            _ => union.push(range),
        }
    }
    union
}

/// The parts of `first..=last` that are in none of `holes` (ascending, disjoint).
pub fn subtract(first: u64, last: u64, holes: impl Iterator<Item = IovaRange>) -> Vec<IovaRange> {
    let mut parts = Vec::with_capacity(1);
    let mut at = first;
    for hole in holes {
        if hole.last < at {
            continue;
        }
        if hole.first > last {
            break;
        }
        if hole.first > at {
            parts.push(IovaRange { first: at, last: hole.first - 1 });
        }
        if hole.last >= last {
            return parts;
        }
        at = hole.last + 1;
    }
    parts.push(IovaRange { first: at, last });
    parts
}

impl Ledger {
    /// Number of extents.
    pub fn len(&self) -> usize {
        self.extents.len()
    }
    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// All extents, in ascending order.
    pub fn extents(&self) -> impl Iterator<Item = &Extent> {
        self.extents.values()
    }

    /// The extents that have an IOVA in `first..=last`, in ascending order.
    pub fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = &Extent> {
        let before = self.extents.range(..first).next_back().map(|(_, e)| e).filter(|e| e.last >= first);
        before.into_iter().chain(self.extents.range(first..=last).map(|(_, e)| e))
    }

    /// Records that the host now holds `extent`, which overlaps nothing that it held.
    pub fn insert(&mut self, extent: Extent) {
        debug_assert!(self.overlapping(extent.first, extent.last).next().is_none());
        self.bytes += extent.size();
        self.extents.insert(extent.first, extent);
    }

    /// Records that the host no longer holds `extents`.
    pub fn remove(&mut self, extents: &[Extent]) {
        for extent in extents {
            if let Some(gone) = self.extents.remove(&extent.first) {
                self.bytes -= gone.size();
            }
        }
    }

    /// The fewest host unmaps after which nothing in `ranges` (ascending, disjoint) is mapped. Runs that cut nothing come
    /// first: they free the entries that the cuts need.
    pub fn plan_unmap(&self, ranges: &[IovaRange], unmap_all: bool) -> Vec<Run> {
        let mut gone: Vec<(Extent, Vec<Extent>)> = Vec::new();
        let mut done = 0;
        for (i, range) in ranges.iter().enumerate() {
            for extent in self.overlapping(range.first, range.last) {
                // One extent may reach over several ranges: it is taken once, at the first of them.
                if done > 0 && extent.first <= gone[done - 1].0.first {
                    continue;
                }
                let kept = subtract(extent.first, extent.last, ranges[i..].iter().copied());
                gone.push((*extent, kept.into_iter().map(|r| extent.part(r.first, r.last)).collect()));
                done += 1;
            }
        }
        self.runs(gone, unmap_all)
    }

    /// The way from what is held to exactly `target` (ascending, disjoint). A translation that is in both is not touched unless its
    /// extent must be cut.
    pub fn plan_switch(&self, target: &[Extent], unmap_all: bool) -> Switch {
        let mut gone: Vec<(Extent, Vec<Extent>)> = Vec::new();
        // What is there after the unmaps and their remainders, in ascending order.
        let mut present: Vec<IovaRange> = Vec::new();
        let mut from = 0;
        for extent in self.extents.values() {
            while target.get(from).is_some_and(|t| t.last < extent.first) {
                from += 1;
            }
            let overlap = target[from..].iter().take_while(|t| t.first <= extent.last);
            let same: Vec<Extent> = overlap
                .filter(|t| t.agrees_with(extent))
                .map(|t| extent.part(t.first.max(extent.first), t.last.min(extent.last)))
                .collect();
            if same.iter().map(Extent::size).sum::<u64>() == extent.size() {
                present.push(IovaRange { first: extent.first, last: extent.last });
            } else {
                present.extend(same.iter().map(|e| IovaRange { first: e.first, last: e.last }));
                gone.push((*extent, same));
            }
        }
        let mut maps = Vec::new();
        let mut from = 0;
        for wish in target {
            while present.get(from).is_some_and(|p| p.last < wish.first) {
                from += 1;
            }
            let missing = subtract(wish.first, wish.last, present[from..].iter().copied());
            maps.extend(missing.into_iter().map(|r| wish.part(r.first, r.last)));
        }
        Switch { unmaps: self.runs(gone, unmap_all), maps }
    }

    /// What must be mapped so that `extent` is real, and where something else is in its way.
    pub fn missing(&self, extent: &Extent) -> Missing {
        let mut missing = Missing::default();
        let mut holes = Vec::new();
        for held in self.overlapping(extent.first, extent.last) {
            let range = IovaRange { first: held.first.max(extent.first), last: held.last.min(extent.last) };
            if !held.agrees_with(extent) {
                missing.conflicts.push(range);
            }
            holes.push(range);
        }
        let parts = subtract(extent.first, extent.last, holes.into_iter());
        missing.maps = parts.into_iter().map(|r| extent.part(r.first, r.last)).collect();
        missing
    }

    /// Joins neighbours of `gone` (ascending; each with the parts that stay granted) into as few host unmaps as possible:
    /// one covers holes too, as long as no other extent lies between.
    fn runs(&self, gone: Vec<(Extent, Vec<Extent>)>, unmap_all: bool) -> Vec<Run> {
        let everything = unmap_all && !gone.is_empty() && gone.len() == self.extents.len();
        let mut runs: Vec<Run> = Vec::new();
        for (extent, kept) in gone {
            let cuts = u64::from(!kept.is_empty());
            match runs.last_mut() {
                Some(Run { range: UnmapRange::Span { last, .. }, extents, remainders, cuts: sum })
                    if self.nothing_between(*last, extent.first) =>
                {
                    *last = extent.last;
                    extents.push(extent);
                    remainders.extend(kept);
                    *sum += cuts;
                }
                _ => runs.push(Run {
                    range: UnmapRange::Span { first: extent.first, last: extent.last },
                    extents: vec![extent],
                    remainders: kept,
                    cuts,
                }),
            }
        }
        if everything && let [run] = &mut runs[..] {
            run.range = UnmapRange::All;
        }
        runs.sort_by_key(|run| run.cuts > 0);
        runs
    }

    fn nothing_between(&self, last: u64, first: u64) -> bool {
        self.extents.range(last..first).next().is_none()
    }
}
