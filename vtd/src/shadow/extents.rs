//! The extents of one space, in ascending order, so stored that a comparison finds its place once and has what is
//! beside it at hand.
//!
//! They stand in chunks of up to [`FULL`], and a list of where the chunks begin is searched first: of 65,536 extents,
//! 1,024 numbers, and then a chunk of 2 KiB. Two chunks side by side hold more than half of what one can, else they
//! become one: what a guest makes the list hold is bounded by the number of its extents, and a chunk that was made is
//! filled or emptied by half before it goes or is divided, so that the list is seldom moved.

use crate::space::Perm;

/// Most extents of a chunk.
const FULL: usize = 64;
/// The chunk's extents that are looked at in one step.
const LOOK: usize = 8;

/// A run of addresses, both ends inclusive, that leads to a run of guest-physical ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Extent {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) gpa: u64,
    pub(crate) perm: Perm,
}

impl Extent {
    /// What is left of it after `last`.
    pub(crate) fn after(self, last: u64) -> Option<Self> {
        let cut = |first: u64| Self { first, gpa: self.gpa + (first - self.first), ..self };
        (last < self.last).then(|| cut(self.first.max(last + 1)))
    }

    /// The part of it from `first` to `last`, which it reaches.
    pub(crate) fn within(self, first: u64, last: u64) -> Self {
        let from = self.first.max(first);
        Self { first: from, last: self.last.min(last), gpa: self.gpa + (from - self.first), ..self }
    }
}

/// Extents that do not overlap.
#[derive(Default, Debug)]
pub(crate) struct Extents {
    /// Where each chunk begins.
    firsts: Vec<u64>,
    /// None is empty.
    chunks: Vec<Vec<Extent>>,
    len: usize,
}

/// A place in a chunk, or behind the last of its extents.
#[derive(Clone, Copy)]
struct Place {
    chunk: usize,
    index: usize,
}

impl Extents {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// All, ascending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Extent> {
        self.chunks.iter().flatten()
    }

    /// Those that end at `at` or behind it, ascending.
    pub(crate) fn from(&self, at: u64) -> impl Iterator<Item = &Extent> {
        self.slices_from(at).flatten()
    }

    /// The same, as they stand beside each other.
    fn slices_from(&self, at: u64) -> impl Iterator<Item = &[Extent]> {
        let Place { chunk, index } = self.find(at);
        let (here, behind) = self.chunks[chunk.min(self.chunks.len())..].split_first().unzip();
        let here: &[Extent] = here.map_or(&[], |here| &here[index..]);
        std::iter::once(here).chain(behind.into_iter().flatten().map(Vec::as_slice))
    }

    /// How many of `others`, ascending, are the same as the extents from `at` on, one by one.
    pub(crate) fn same_from<'a, E>(&self, at: u64, others: &'a [E]) -> usize
    where
        Extent: From<&'a E>,
    {
        let mut rest = others;
        for extents in self.slices_from(at) {
            let same = extents.iter().zip(rest).take_while(|(extent, other)| **extent == Extent::from(*other)).count();
            rest = &rest[same..];
            if same < extents.len() {
                break;
            }
        }
        others.len() - rest.len()
    }

    /// Where the first extent is that ends at `at` or behind it, if it is in the last chunk that begins no later than
    /// `at`; else behind that chunk's last.
    fn find(&self, at: u64) -> Place {
        let chunk = self.firsts.partition_point(|first| *first <= at).saturating_sub(1);
        let index = self.chunks.get(chunk).map_or(0, |extents| end_before(extents, at));
        Place { chunk, index }
    }

    /// Adds an extent where none is.
    pub(crate) fn insert(&mut self, extent: Extent) {
        self.len += 1;
        let Place { mut chunk, mut index } = self.find(extent.first);
        if self.chunks.is_empty() {
            self.firsts.push(extent.first);
            self.chunks.push(Vec::new());
        } else if self.chunks[chunk].len() == FULL {
            // Ascending ones fill their chunks.
            let ascending = chunk + 1 == self.chunks.len() && index == FULL;
            let right = if ascending { Vec::with_capacity(FULL) } else { self.chunks[chunk].split_off(FULL / 2) };
            self.firsts.insert(chunk + 1, right.first().map_or(extent.first, |extent| extent.first));
            self.chunks.insert(chunk + 1, right);
            let left = self.chunks[chunk].len();
            if ascending || index > left {
                (chunk, index) = (chunk + 1, index - left);
            }
        }
        self.chunks[chunk].insert(index, extent);
        self.firsts[chunk] = self.chunks[chunk][0].first;
    }

    /// Puts `extent` in the place of one with just its addresses; `false` if there is none.
    pub(crate) fn replace(&mut self, extent: Extent) -> bool {
        let Place { chunk, index } = self.find(extent.first);
        let there = self.chunks.get_mut(chunk).and_then(|extents| extents.get_mut(index));
        match there.filter(|there| (there.first, there.last) == (extent.first, extent.last)) {
            Some(there) => *there = extent,
            None => return false,
        }
        true
    }

    /// Takes `first` to `last` (inclusive) out; extents that reach beyond it keep what is beyond.
    pub(crate) fn remove(&mut self, first: u64, last: u64) {
        let Place { chunk: from, mut index } = self.find(first);
        let there = self.chunks.get_mut(from).and_then(|extents| extents.get_mut(index));
        if let Some(extent) = there.filter(|extent| extent.first < first) {
            let rest = extent.after(last);
            extent.last = first - 1;
            if let Some(rest) = rest {
                return self.insert(rest);
            }
            index += 1;
        }
        let mut to = from;
        while let Some(extents) = self.chunks.get_mut(to) {
            let gone = extents[index..].iter().take_while(|extent| extent.last <= last).count();
            extents.drain(index..index + gone);
            self.len -= gone;
            if let Some(extent) = extents.get_mut(index) {
                *extent = extent.after(last).unwrap_or(*extent);
                break;
            }
            (to, index) = (to + 1, 0);
        }
        self.tidy(from, to);
    }

    /// After extents of the chunks `from` to `to` went: of those between the two, all.
    fn tidy(&mut self, from: usize, to: usize) {
        let kept = self.chunks.get(from).is_some_and(|extents| !extents.is_empty());
        let emptied = from + usize::from(kept)..to;
        if !emptied.is_empty() {
            self.firsts.drain(emptied.clone());
            self.chunks.drain(emptied);
        }
        for chunk in [from, from + 1] {
            if let Some(extents) = self.chunks.get(chunk) {
                self.firsts[chunk] = extents[0].first;
            }
        }
        for left in (from.saturating_sub(1)..=from + 1).rev() {
            if let Some([one, two]) = self.chunks.get_mut(left..left + 2)
                && one.len() + two.len() <= FULL / 2
            {
                one.append(two);
                self.firsts.remove(left + 1);
                self.chunks.remove(left + 1);
            }
        }
    }
}

/// How many of `extents` end before `at`. A chunk is seldom in the processor's nearest cache, and in a binary search
/// each step waits for the one before it. Here nothing waits but the second of two looks, each at a few places at once.
fn end_before(extents: &[Extent], at: u64) -> usize {
    let begun = extents.chunks(LOOK).filter(|some| some[0].first <= at).count();
    let from = begun.saturating_sub(1) * LOOK;
    from + extents[from..].iter().take(LOOK).filter(|extent| extent.last < at).count()
}

#[cfg(test)]
#[path = "extents_test.rs"]
mod extents_test;
