//! What a function was granted beside what the host holds for it, part by part: what the [audit](Bridge::audit)
//! compares, to be looked at.

use vtd::audit::{Piece, Target, compare};
use vtd::{Gpa, Iova, IovaRange, Mapping, SpaceKey, Stream};

use super::audit::{outside_interrupt_window, without};
use super::{Bridge, lock};
use crate::bridge::ledger::Extent;

/// A part of what a function was granted, beside what the host holds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mappings {
    /// Runs of IOVAs, ascending: left is what was granted, right what the host holds. Neighbours that go on are one.
    pub pieces: Vec<Piece>,
    /// Where the next part begins; `None`: this is the last one.
    pub next: Option<u64>,
    /// What differs otherwise, in words.
    pub differences: Vec<String>,
    /// What the host refused of identity, and what is tried again: not held, and no difference.
    pub refused: Vec<IovaRange>,
}

/// Adds `piece`, to the last one if it goes on where that ends.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = pieces.last_mut()
        && last.range.last.checked_add(1) == Some(piece.range.first)
    {
        let len = piece.range.first - last.range.first;
        let goes_on = |from: Option<Target>, to: Option<Target>| {
            from.map(|target| Target { gpa: Gpa(target.gpa.0.wrapping_add(len)), ..target }) == to
        };
        if goes_on(last.left, piece.left) && goes_on(last.right, piece.right) {
            last.range.last = piece.range.last;
            return;
        }
    }
    pieces.push(piece);
}

/// Up to `most` of them, and the last IOVA up to which these are all.
fn some(mappings: impl Iterator<Item = Mapping>, most: usize) -> (Vec<Mapping>, u64) {
    let mut taken: Vec<Mapping> = mappings.take(most.saturating_add(1)).collect();
    if taken.len() <= most {
        return (taken, u64::MAX);
    }
    taken.pop();
    let last = taken.last().map_or(u64::MAX, |mapping| mapping.last().0);
    (taken, last)
}

impl Bridge {
    /// What the host holds for the requests of `stream` from the IOVA `from` on, beside what they were granted in
    /// `space`: `granted`, of a paged one (ascending, and nothing that ends before `from`). At most `most` mappings of
    /// each side (1 and more) are looked at; [`Mappings::next`] says where to go on. `None` for a function that the
    /// bridge does not know.
    ///
    /// To be called while the unit waits, as [`Bridge::audit`] is.
    pub fn mappings(
        &self,
        stream: impl Into<Stream>,
        space: &SpaceKey,
        granted: &mut dyn Iterator<Item = Mapping>,
        from: u64,
        most: usize,
    ) -> Option<Mappings> {
        let stream = stream.into();
        let requester = stream.requester;
        let placed = self.placed(stream)?;
        let placed = lock(&placed);
        let state = placed.held().map(|held| held.lock());
        let mut found = Mappings::default();
        let broken = state.as_ref().and_then(|state| state.space.broken()).or(placed.stopped.as_deref());
        let wanted = placed.group.wanted(requester).unwrap_or(SpaceKey::Blocked);
        if from == 0 {
            found.differences.extend(broken.map(|why| format!("it was stopped: {why}")));
            if wanted != *space {
                found.differences.push(format!("the unit attached it to {space}, the bridge has it in {wanted}"));
            }
        }

        let guest = self.guest.load();
        let here = |mapping: &Mapping| mapping.last().0 >= from;
        let (expected, up_to) = match space {
            _ if placed.group.agreed() != *space || *space == SpaceKey::Blocked => (Vec::new(), u64::MAX),
            SpaceKey::Paged(_) => some(granted.flat_map(outside_interrupt_window).filter(here), most),
            SpaceKey::Identity | SpaceKey::Blocked => {
                let refused = state.as_ref().map_or(&[][..], |state| &state.refused);
                let alone = state.as_ref().and_then(|state| state.alone);
                found.refused = if from == 0 { refused.to_vec() } else { Vec::new() };
                let inside = |mapping| without(mapping, refused);
                some(guest.identity(alone).flat_map(outside_interrupt_window).flat_map(inside).filter(here), most)
            }
        };
        let held = state.iter().flat_map(|state| state.space.ledger().overlapping(from, u64::MAX));
        let misled =
            |extent: &Extent| guest.host_mem(extent.gpa, extent.size()).map(|mem| mem.hva()) != Some(extent.hva);
        let mut elsewhere = Vec::new();
        let held = held.inspect(|extent| {
            if misled(extent) {
                elsewhere.push(*extent);
            }
        });
        let as_mapping = |extent: Extent| Mapping {
            iova: Iova(extent.first),
            gpa: Gpa(extent.gpa),
            len: extent.size(),
            perm: extent.perm,
        };
        let (held, held_up_to) = some(held.map(as_mapping), most);
        let last = up_to.min(held_up_to);
        for extent in elsewhere.iter().filter(|extent| from <= extent.first && extent.first <= last) {
            let Extent { gpa, hva, .. } = extent;
            found.differences.push(format!("{}: the host leads to {hva:#x}, which is not {gpa:#x}", extent.range()));
        }
        compare(expected, held, |piece| {
            // What is beyond is compared with the next part.
            let Some(range) = piece.range.intersection(IovaRange::new(from, last)) else { return };
            let skipped = range.first - piece.range.first;
            let side = |target: Option<Target>| {
                target.map(|target| Target { gpa: Gpa(target.gpa.0.wrapping_add(skipped)), ..target })
            };
            push(&mut found.pieces, Piece { range, left: side(piece.left), right: side(piece.right) });
        });
        found.next = last.checked_add(1);
        Some(found)
    }
}
