//! Two books of one space, compared translation by translation.

use crate::ids::{Gpa, Iova};
use crate::listener::Mapping;
use crate::range::IovaRange;
use crate::space::Perm;

/// Where a book says that a run of IOVAs leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Guest-physical address of the first byte.
    pub gpa: Gpa,
    /// What the device may do.
    pub perm: Perm,
}

impl Target {
    fn after(self, skipped: u64) -> Self {
        Self { gpa: Gpa(self.gpa.0.wrapping_add(skipped)), ..self }
    }
}

/// A run of IOVAs about which each of two books says one thing: where it leads, or that it is not mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// The IOVAs.
    pub range: IovaRange,
    /// What the first book says.
    pub left: Option<Target>,
    /// What the second book says.
    pub right: Option<Target>,
}

impl Piece {
    /// Whether the books agree.
    pub fn agrees(&self) -> bool {
        self.left == self.right
    }

    /// The part of it within `range`, if there is one.
    pub(crate) fn within(&self, range: IovaRange) -> Option<Self> {
        let range = self.range.intersection(range)?;
        let skipped = range.first - self.range.first;
        let side = |target: Option<Target>| target.map(|target| target.after(skipped));
        Some(Self { range, left: side(self.left), right: side(self.right) })
    }

    /// Makes `next` part of it, when it goes on where this ends.
    fn join(&mut self, next: &Self) -> bool {
        let len = next.range.first.wrapping_sub(self.range.first);
        let goes_on = |from: Option<Target>, to: Option<Target>| from.map(|from| from.after(len)) == to;
        let joins = self.range.last.checked_add(1) == Some(next.range.first)
            && goes_on(self.left, next.left)
            && goes_on(self.right, next.right);
        if joins {
            self.range.last = next.range.last;
        }
        joins
    }
}

/// Compares two books of one space, each ascending and disjoint: `each` is called for every run of IOVAs that at least
/// one of them maps, in ascending order, cut where either of them is.
pub fn compare(
    left: impl IntoIterator<Item = Mapping>,
    right: impl IntoIterator<Item = Mapping>,
    mut each: impl FnMut(Piece),
) {
    let (mut lefts, mut rights) = (left.into_iter(), right.into_iter());
    let (mut left, mut right) = (lefts.next(), rights.next());
    let target = |mapping: Mapping| Some(Target { gpa: mapping.gpa, perm: mapping.perm });
    while let Some(first) = left.iter().chain(&right).map(|mapping| mapping.iova).min() {
        let (l, r) = (left.filter(|m| m.iova == first), right.filter(|m| m.iova == first));
        // Up to the end of what begins here, and not into what the other book has next.
        let ends = l.iter().chain(&r).map(|mapping| mapping.last().0);
        let begins = left.iter().chain(&right).filter(|mapping| mapping.iova > first).map(|mapping| mapping.iova.0 - 1);
        let Some(last) = ends.chain(begins).min() else { return };
        each(Piece { range: IovaRange::new(first.0, last), left: l.and_then(target), right: r.and_then(target) });
        if let Some(mapping) = l {
            left = rest(mapping, last).or_else(|| lefts.next());
        }
        if let Some(mapping) = r {
            right = rest(mapping, last).or_else(|| rights.next());
        }
    }
}

/// What is left of `mapping` behind `last`, which is in it.
fn rest(mapping: Mapping, last: u64) -> Option<Mapping> {
    let gone = last - mapping.iova.0 + 1;
    (gone < mapping.len).then(|| Mapping {
        iova: Iova(last + 1),
        gpa: Gpa(mapping.gpa.0.wrapping_add(gone)),
        len: mapping.len - gone,
        perm: mapping.perm,
    })
}

/// The disagreements between two books, joined where they go on; each comparison is counted in `checked`.
pub fn disagreements(
    left: impl IntoIterator<Item = Mapping>,
    right: impl IntoIterator<Item = Mapping>,
    checked: &mut u64,
) -> Vec<Piece> {
    let mut found: Vec<Piece> = Vec::new();
    compare(left, right, |piece| {
        *checked += 1;
        if !piece.agrees() && !found.last_mut().is_some_and(|last| last.join(&piece)) {
            found.push(piece);
        }
    });
    found
}
