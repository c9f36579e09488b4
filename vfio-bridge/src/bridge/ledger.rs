//! The ledger: exactly what the host was handed, per host space, and the plans that follow from it.
//!
//! Planning is pure: it reads the ledger and says which host operations make a wish true. Every planned unmap is a
//! union of whole extents (design rule 4); an extent that is only partly in the way is unmapped whole and what remains
//! of it is mapped again (B-8).

use std::collections::BTreeMap;

use vtd::{IovaRange, Perm};

use crate::host::UnmapRange;

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

    /// Its IOVAs.
    pub fn range(&self) -> IovaRange {
        IovaRange { first: self.first, last: self.last }
    }

    /// The part of it in `first..=last`, which must be inside: both addresses advance with the left edge (B-6).
    pub fn part(&self, first: u64, last: u64) -> Self {
        debug_assert!(self.first <= first && first <= last && last <= self.last);
        let skip = first - self.first;
        Self { first, last, gpa: self.gpa + skip, hva: self.hva + skip, perm: self.perm }
    }

    /// Whether an IOVA that both hold leads to the same host memory with the same permission. The boundaries may differ
    /// (B-14).
    pub(super) fn agrees_with(&self, other: &Self) -> bool {
        // Both sides wrap alike, so equal differences mean equal targets.
        self.perm == other.perm && self.hva.wrapping_sub(self.first) == other.hva.wrapping_sub(other.first)
    }
}

/// One host unmap, and what must be mapped right after it.
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
    /// What takes the place of those extents, at a switch; in ascending order.
    pub maps: Vec<Extent>,
}

impl Run {
    fn of(extent: Extent, remainders: Vec<Extent>, maps: Vec<Extent>) -> Self {
        let range = UnmapRange::Span { first: extent.first, last: extent.last };
        let cuts = u64::from(!remainders.is_empty());
        Self { range, extents: vec![extent], remainders, cuts, maps }
    }

    fn last(&self) -> u64 {
        self.extents.last().map_or(0, |extent| extent.last)
    }

    /// Takes away the next extent, too.
    fn grow(&mut self, extent: Extent, remainders: Vec<Extent>, maps: Vec<Extent>) {
        if let UnmapRange::Span { last, .. } = &mut self.range {
            *last = extent.last;
        }
        self.extents.push(extent);
        self.cuts += u64::from(!remainders.is_empty());
        self.remainders.extend(remainders);
        self.maps.extend(maps);
    }

    /// Whether nothing is mapped where it was.
    fn leaves_nothing(&self) -> bool {
        self.remainders.is_empty() && self.maps.is_empty()
    }
}

/// The way from what a host space holds to what it shall hold, on which an IOVA that both have is without a translation
/// for as short a time as possible.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Switch {
    /// First these: nothing is held where they are.
    pub maps: Vec<Extent>,
    /// Then these, one by one.
    pub runs: Vec<Run>,
}

/// As many separate pieces of held extents may lie under one new extent so that it is mapped around them, in up to
/// twice as many pieces and one more. With them, an identity of gigabytes under which a few pages are held (a guest
/// that turns translation off while a program uses its device) has its pages pinned before anything goes, and each held
/// page is away for an unmap and a map of its own size. But the pieces stay for as long as the new extent does: each is
/// an entry of the host's limit, and where one begins or ends the host's tables have no large page. Beyond this number
/// all that is in the way goes at once, and the new extent comes whole: 129 entries are nothing to a limit of 65,535,
/// tens of thousands are.
const CUT_AROUND: usize = 64;

/// What is not there yet of an extent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Missing {
    /// To be mapped.
    pub maps: Vec<Extent>,
    /// Held already, and leads elsewhere.
    pub conflicts: Vec<IovaRange>,
}

/// What one host space holds.
#[derive(Debug, Default)]
pub struct Ledger {
    /// By first IOVA.
    extents: BTreeMap<u64, Rest>,
    bytes: u64,
}

/// An extent without its first IOVA: a guest can have millions, and 80 bytes are what one takes.
#[derive(Clone, Copy, Debug)]
struct Rest {
    last: u64,
    gpa: u64,
    hva: u64,
    perm: Perm,
}

fn whole((&first, &Rest { last, gpa, hva, perm }): (&u64, &Rest)) -> Extent {
    Extent { first, last, gpa, hva, perm }
}

/// Cuts `missing` (ascending, disjoint) where `gone` is in the way: what can be mapped before anything goes, and what
/// must take the place of something, both in ascending order. At most `spare` more pieces come of it than `missing`
/// has.
fn cut_around(missing: &[Extent], gone: &[(Extent, Vec<Extent>)], mut spare: usize) -> (Vec<Extent>, Vec<Extent>) {
    let (mut free, mut replacing) = (Vec::new(), Vec::new());
    let mut from = 0;
    for new in missing {
        while gone.get(from).is_some_and(|(old, _)| old.last < new.first) {
            from += 1;
        }
        let under = gone[from..].iter().map(|(old, _)| old).take_while(|old| old.first <= new.last);
        let in_the_way = IovaRange::union_of(under.filter_map(|old| old.range().intersection(new.range())).collect());
        let holes = new.range().without(in_the_way.iter().copied());
        let more = (in_the_way.len() + holes.len()).saturating_sub(1);
        if in_the_way.len() > CUT_AROUND || more > spare {
            replacing.push(*new);
            continue;
        }
        spare -= more;
        let part = |range: &IovaRange| new.part(range.first, range.last);
        free.extend(holes.iter().map(part));
        replacing.extend(in_the_way.iter().map(part));
    }
    (free, replacing)
}

/// The last address of `width` bits (1 to 64).
pub(crate) fn last_of(width: u8) -> u64 {
    u64::MAX >> (u64::BITS - u32::from(width).clamp(1, u64::BITS))
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
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        self.extents.iter().map(whole)
    }

    /// The last IOVA of the highest extent: the high watermark. `None` when nothing is held.
    pub fn high_watermark(&self) -> Option<u64> {
        self.extents.values().next_back().map(|extent| extent.last)
    }

    /// What an unmap of `range` has to be about, in a space whose addresses have `width` bits (1 to 64): it ends where
    /// the space does, and where the highest extent does. `None` if nothing is left of it.
    ///
    /// A guest says that everything goes as all of 2^64. That range has no size, older kernels do not see that it
    /// wraps, and one of a size that a host takes could cut a mapping (B-3).
    pub fn clip(&self, range: IovaRange, width: u8) -> Option<IovaRange> {
        let last = range.last.min(last_of(width)).min(self.high_watermark()?);
        (range.first <= last).then_some(IovaRange { first: range.first, last })
    }

    /// The extents that have an IOVA in `first..=last`, in ascending order.
    pub fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = Extent> {
        let before = self.extents.range(..first).next_back().map(whole).filter(|e| e.last >= first);
        before.into_iter().chain(self.extents.range(first..=last).map(whole))
    }

    /// Records that the host now holds `extent`, which overlaps nothing that it held.
    pub fn insert(&mut self, extent: Extent) {
        debug_assert!(self.overlapping(extent.first, extent.last).next().is_none());
        self.bytes += extent.size();
        let Extent { first, last, gpa, hva, perm } = extent;
        self.extents.insert(first, Rest { last, gpa, hva, perm });
    }

    /// Records that the host no longer holds `extents`.
    pub fn remove(&mut self, extents: &[Extent]) {
        for extent in extents {
            if let Some(gone) = self.extents.remove(&extent.first) {
                self.bytes -= gone.last - extent.first + 1;
            }
        }
    }

    /// The fewest host unmaps after which nothing in `ranges` (ascending, disjoint) is mapped (B-3), and none where
    /// nothing was (B-4). Runs that cut nothing come first: they free the entries that the cuts need.
    pub fn plan_unmap(&self, ranges: &[IovaRange], unmap_all: bool) -> Vec<Run> {
        let mut gone: Vec<(Extent, Vec<Extent>)> = Vec::new();
        let mut done = 0;
        for (i, range) in ranges.iter().enumerate() {
            for extent in self.overlapping(range.first, range.last) {
                // One extent may reach over several ranges: it is taken once, at the first of them.
                if done > 0 && extent.first <= gone[done - 1].0.first {
                    continue;
                }
                let kept = extent.range().without(ranges[i..].iter().copied());
                gone.push((extent, kept.into_iter().map(|r| extent.part(r.first, r.last)).collect()));
                done += 1;
            }
        }
        self.runs(gone, unmap_all)
    }

    /// The way from what is held to exactly `target` (ascending, disjoint), in a space that takes `entries`. A
    /// translation that is in both is not touched unless its extent must be cut.
    pub fn plan_switch(&self, target: &[Extent], entries: u64, unmap_all: bool) -> Switch {
        let mut gone: Vec<(Extent, Vec<Extent>)> = Vec::new();
        // What is there after the unmaps and their remainders, in ascending order.
        let mut present: Vec<IovaRange> = Vec::new();
        let mut from = 0;
        for extent in self.extents() {
            while target.get(from).is_some_and(|t| t.last < extent.first) {
                from += 1;
            }
            let overlap = target[from..].iter().take_while(|t| t.first <= extent.last);
            let same: Vec<Extent> = overlap
                .filter(|t| t.agrees_with(&extent))
                .map(|t| extent.part(t.first.max(extent.first), t.last.min(extent.last)))
                .collect();
            if same.iter().map(Extent::size).sum::<u64>() == extent.size() {
                present.push(extent.range());
            } else {
                present.extend(same.iter().map(Extent::range));
                gone.push((extent, same));
            }
        }
        let mut missing = Vec::new();
        let mut from = 0;
        for wish in target {
            while present.get(from).is_some_and(|p| p.last < wish.first) {
                from += 1;
            }
            let parts = wish.range().without(present[from..].iter().copied());
            missing.extend(parts.into_iter().map(|r| wish.part(r.first, r.last)));
        }

        let kept: usize = gone.iter().map(|(_, same)| same.len()).sum();
        let spare = usize::try_from(entries).unwrap_or(usize::MAX).saturating_sub(self.len() + kept + missing.len());
        let (maps, replacing) = cut_around(&missing, &gone, spare);
        let runs = self.switch_runs(gone, &maps, &replacing, unmap_all);
        Switch { maps, runs }
    }

    /// What is held and not the same in `target` (ascending, disjoint).
    pub(super) fn going(&self, target: &[Extent]) -> Vec<IovaRange> {
        let mut going = Vec::new();
        let mut from = 0;
        for extent in self.extents() {
            while target.get(from).is_some_and(|t| t.last < extent.first) {
                from += 1;
            }
            let overlap = target[from..].iter().take_while(|t| t.first <= extent.last);
            let same = overlap.filter(|t| t.agrees_with(&extent)).map(Extent::range);
            going.extend(extent.range().without(same));
        }
        going
    }

    /// The runs of a switch: `gone` (ascending; each with the parts that stay granted) goes, `replacing` comes in its
    /// place, and `mapped` is there already. Extents share a run, and so the time without a translation, only if a new
    /// one spans them, or if nothing comes in their place. Runs that leave nothing come first: they make room for what
    /// the others map.
    fn switch_runs(
        &self,
        gone: Vec<(Extent, Vec<Extent>)>,
        mapped: &[Extent],
        replacing: &[Extent],
        unmap_all: bool,
    ) -> Vec<Run> {
        let everything = unmap_all && mapped.is_empty() && gone.len() == self.extents.len();
        let mapped_between = |last: u64, first: u64| {
            let next = mapped.partition_point(|new| new.first < last);
            mapped.get(next).is_some_and(|new| new.first < first)
        };
        let mut runs: Vec<Run> = Vec::new();
        let mut next = 0;
        for (extent, kept) in gone {
            let count = replacing[next..].iter().take_while(|new| new.first <= extent.last).count();
            let maps = replacing[next..next + count].to_vec();
            next += count;
            match runs.last_mut() {
                Some(run) if run.maps.last().is_some_and(|new| new.last >= extent.first) => {
                    run.grow(extent, kept, maps)
                }
                Some(run)
                    if run.leaves_nothing()
                        && kept.is_empty()
                        && maps.is_empty()
                        && self.nothing_between(run.last(), extent.first)
                        && !mapped_between(run.last(), extent.first) =>
                {
                    run.grow(extent, kept, maps);
                }
                _ => runs.push(Run::of(extent, kept, maps)),
            }
        }
        if everything && let [run] = &mut runs[..] {
            run.range = UnmapRange::All;
        }
        runs.sort_by_key(|run| !run.leaves_nothing());
        runs
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
        let parts = extent.range().without(holes);
        missing.maps = parts.into_iter().map(|r| extent.part(r.first, r.last)).collect();
        missing
    }

    /// Joins neighbours of `gone` (ascending; each with the parts that stay granted) into as few host unmaps as
    /// possible: one covers holes too, as long as no other extent lies between.
    fn runs(&self, gone: Vec<(Extent, Vec<Extent>)>, unmap_all: bool) -> Vec<Run> {
        let everything = unmap_all && gone.len() == self.extents.len();
        let mut runs: Vec<Run> = Vec::new();
        for (extent, kept) in gone {
            match runs.last_mut() {
                Some(run) if self.nothing_between(run.last(), extent.first) => run.grow(extent, kept, Vec::new()),
                _ => runs.push(Run::of(extent, kept, Vec::new())),
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

#[cfg(test)]
#[path = "ledger_test.rs"]
mod ledger_test;
