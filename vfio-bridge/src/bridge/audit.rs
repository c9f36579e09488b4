//! The bridge's part of an audit: what the ledger of a function's host space holds, against what the function was
//! granted. Translations are compared, not shapes; both books are read in one moment, because the unit waits.
//!
//! The ledger records what the host was asked for. Hosts that widen a write-only mapping (Linux up to 6.12 lets the
//! device read it, too) do so below it; nothing else is allowed to differ.

use std::collections::BTreeSet;

use vtd::audit::disagreements;
use vtd::{Audit, Difference, Gpa, Iova, IovaRange, Mapping, SpaceKey, Stream};

use super::{Bridge, lock};
use crate::bridge::ledger::{Extent, Ledger};
use crate::bridge::limits::without_interrupt_window;
use crate::trace::Trace;

impl Bridge {
    /// Writes into `trace` what the ledger of each host space holds at this moment.
    pub fn trace_ledgers(&self, trace: &Trace) {
        let mut said = BTreeSet::new();
        for placed in self.everyone() {
            let Some(held) = lock(&placed).held().cloned() else { continue };
            let state = held.lock();
            if said.insert(state.space.id()) {
                trace.ledger(state.space.id(), state.space.ledger());
            }
        }
    }

    /// Compares what the host was handed for the requests of `stream` with `space`, in which `granted` is mapped
    /// (ascending; for a paged space). Identity is all RAM and the BARs of other functions, without the interrupt
    /// window, and without what the host refused, which is pending; a group whose members disagree holds nothing
    /// (C-3). A function that was stopped because an unmap was
    /// refused is a difference as such.
    ///
    /// To be called by [`vtd::Unit::audit`].
    pub fn audit(
        &self,
        stream: impl Into<Stream>,
        space: &SpaceKey,
        granted: &mut dyn Iterator<Item = Mapping>,
        audit: &mut Audit,
    ) {
        let stream = stream.into();
        let requester = stream.requester;
        let Some(placed) = self.placed(stream) else {
            return audit.differ(Difference::Other(format!("{requester} is not a device that the bridge knows")));
        };
        let placed = lock(&placed);
        let state = placed.held().map(|held| held.lock());
        let nothing = Ledger::default();
        let ledger = state.as_ref().map_or(&nothing, |state| state.space.ledger());
        let refused = state.as_ref().map_or(&[][..], |state| &state.refused);
        let alone = state.as_ref().and_then(|state| state.alone);
        let broken = state.as_ref().and_then(|state| state.space.broken()).or(placed.stopped.as_deref());
        if let Some(why) = broken {
            let text = format!(
                "{requester}: it was stopped, and the host may still hold {} of its mappings: {why}",
                ledger.len()
            );
            return audit.differ(Difference::Other(text));
        }
        if placed.group.wanted(requester) != Some(*space) {
            let wanted = placed.group.wanted(requester).unwrap_or(SpaceKey::Blocked);
            let text = format!("{requester}: the unit attached it to {space}, the bridge has it in {wanted}");
            audit.differ(Difference::Other(text));
        }
        let guest = self.guest.load();
        let expected: Vec<Mapping> = match space {
            _ if placed.group.agreed() != *space => Vec::new(),
            SpaceKey::Blocked => Vec::new(),
            SpaceKey::Identity => {
                audit.pending += refused.len() as u64;
                let inside = |mapping| without(mapping, refused);
                guest.identity(alone).flat_map(outside_interrupt_window).flat_map(inside).collect()
            }
            SpaceKey::Paged(_) => granted.flat_map(outside_interrupt_window).collect(),
        };
        let held = ledger.extents().map(|extent| {
            let Extent { first, gpa, perm, .. } = extent;
            Mapping { iova: Iova(first), gpa: Gpa(gpa), len: extent.size(), perm }
        });
        for piece in disagreements(expected, held, &mut audit.checked) {
            audit.differ(Difference::Host(requester, piece));
        }
        // What the host translates to is the address in this process; the guest-physical one is only its name.
        for extent in ledger.extents() {
            if guest.host_mem(extent.gpa, extent.size()).map(|mem| mem.hva()) != Some(extent.hva) {
                let range = extent.range();
                let text = format!(
                    "{requester}: {range}: the host leads to {:#x}, which is not {:#x}",
                    extent.hva, extent.gpa
                );
                audit.differ(Difference::Other(text));
            }
        }
    }
}

pub(super) fn outside_interrupt_window(mapping: Mapping) -> impl Iterator<Item = Mapping> {
    without_interrupt_window(mapping.range()).into_iter().map(move |range| part(&mapping, range))
}

/// What `holes` (ascending, disjoint) leave of `mapping`.
pub(super) fn without(mapping: Mapping, holes: &[IovaRange]) -> impl Iterator<Item = Mapping> {
    let ranges = mapping.range().without(holes.iter().copied());
    ranges.into_iter().map(move |range| part(&mapping, range))
}

fn part(mapping: &Mapping, range: IovaRange) -> Mapping {
    Mapping {
        iova: Iova(range.first),
        gpa: Gpa(mapping.gpa.0 + (range.first - mapping.iova.0)),
        len: range.last - range.first + 1,
        perm: mapping.perm,
    }
}
