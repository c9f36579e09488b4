//! Invalidations: collected as the guest gives them, and made to take effect together.

use std::collections::{BTreeMap, BTreeSet};

use vm_memory::GuestMemoryBackend;

use super::Spaces;
use super::attach::report;
use super::waiting::{Occasion, Waiting};
use crate::core::Core;
use crate::ids::{DomainId, Pasid};
use crate::scope::{ContextScope, Scope};
use crate::space::PagedSpace;
use crate::tables::interrupt::EntriesChanged;

/// Looks at a part of the interrupt entries in one round; the next one is at all of them, and the last. Each may cost
/// the listener a change of all its routes.
const ENTRY_LOOKS: u32 = 64;

/// Invalidations that did not take effect yet.
#[derive(Default)]
pub(super) struct Pending {
    contexts: Vec<ContextScope>,
    /// What reaches spaces. A space is of no PASID: one of a PASID reaches its whole domain.
    iotlb: Vec<Scope>,
    /// What reaches what emulated DMA caches, of one PASID or of all.
    cached: Vec<(Scope, Option<Pasid>)>,
    /// One range for all: routes are replaced once a flush.
    interrupt_entries: Option<EntriesChanged>,
}

impl Spaces {
    /// A context-cache invalidation: takes effect at the next [`Spaces::flush`].
    pub(crate) fn invalidate_contexts(&mut self, scope: ContextScope) {
        self.pending.contexts.push(scope);
    }

    /// An IOTLB invalidation: takes effect at the next [`Spaces::flush`].
    pub(crate) fn invalidate_iotlb(&mut self, scope: Scope) {
        self.pending.iotlb.push(scope);
        self.pending.cached.push((scope, None));
    }

    /// A PASID-based IOTLB invalidation: takes effect at the next [`Spaces::flush`].
    pub(crate) fn invalidate_pasid(&mut self, scope: Scope, pasid: Pasid) {
        self.pending.iotlb.push(scope);
        self.pending.cached.push((scope, Some(pasid)));
    }

    /// An interrupt-entry-cache invalidation: takes effect at the next [`Spaces::flush`].
    pub(crate) fn invalidate_interrupt_entries(&mut self, changed: EntriesChanged) {
        let pending = &mut self.pending.interrupt_entries;
        *pending = Some(pending.map_or(changed, |before| before.join(changed)));
    }

    /// TE, the root table or everything changed: requesters are looked up again and every space is compared whole.
    pub(crate) fn refresh<M: GuestMemoryBackend>(&mut self, core: &Core<M>) {
        self.invalidate_contexts(ContextScope::Everything);
        self.invalidate_iotlb(Scope::Everything);
        self.members.values_mut().filter_map(|member| member.waiting.as_mut()).for_each(Waiting::rested);
        self.flush(core);
    }

    /// A drain begins: the tail is known, so all its descriptors were given.
    pub(crate) fn begin_drain(&mut self) {
        self.round += 1;
        self.draining = true;
    }

    /// The drain is over.
    pub(crate) fn end_drain(&mut self) {
        self.draining = false;
    }

    /// What was invalidated takes effect: when this returns, no device can reach what the guest took away.
    pub(crate) fn flush<M: GuestMemoryBackend>(&mut self, core: &Core<M>) {
        if !self.draining {
            self.round += 1;
        }
        if let Some(changed) = self.pending.interrupt_entries.take()
            && self.all_entries_in != self.round
        {
            let looks = if self.entry_looks.0 == self.round { self.entry_looks.1 + 1 } else { 1 };
            self.entry_looks = (self.round, looks);
            let changed = if looks > ENTRY_LOOKS { EntriesChanged::All } else { changed };
            if changed == EntriesChanged::All {
                self.all_entries_in = self.round;
            }
            core.entries_changed(changed);
        }
        if self.pending.contexts.is_empty() && self.pending.iotlb.is_empty() {
            return;
        }
        let mut pending = std::mem::take(&mut self.pending);
        self.invalidate_endpoints(&pending);
        let (spaces, round) = (&self.spaces, self.round);
        let done =
            |space: &PagedSpace| spaces.get(&(space.domain, *space)).is_some_and(|space| space.whole_in == round);
        self.book.covers(&pending.iotlb, done);
        let only_pages = |scope: &Scope| matches!(scope, Scope::Pages(..));
        let occasion = if pending.contexts.is_empty() && pending.iotlb.iter().all(only_pages) {
            Occasion::Pages
        } else {
            Occasion::MoreThanPages
        };
        self.note_contexts(&pending.contexts);

        let mut whole = BTreeSet::new();
        if !pending.contexts.is_empty() {
            let mut moves = BTreeMap::new();
            for scope in pending.contexts.drain(..) {
                self.refresh_members(core, scope, &mut whole, &mut moves);
            }
            self.move_members(core, moves);
        }
        self.compare(core, &mut pending.iotlb, &whole);
        self.recheck_remembered(core);
        self.try_again(core, occasion);
        pending.iotlb.clear();
        pending.cached.clear();
        // Its storage is used again.
        self.pending = pending;
        self.scratch.shrink();
    }

    fn invalidate_endpoints(&self, pending: &Pending) {
        // Nothing is cached that is not present, so what a PASID-cache invalidation reaches has its domain. Any other
        // one of contexts is of everything here.
        let of_entry = |scope: &ContextScope| match *scope {
            ContextScope::Pasids { domain, pasid } => Some((Scope::Domain(domain), pasid)),
            _ => None,
        };
        let of_entries: Option<Vec<_>> = pending.contexts.iter().map(of_entry).collect();
        for (_, iotlb) in &self.endpoints {
            if let Some(of_entries) = &of_entries {
                pending.cached.iter().chain(of_entries).for_each(|(scope, pasid)| iotlb.invalidate_of(*scope, *pasid));
            } else {
                iotlb.invalidate(Scope::Everything);
            }
            iotlb.wait_for_sessions();
        }
    }

    /// Compares the spaces that `scopes` reach, and those in `whole`, with the guest's tables, unless they were
    /// compared whole in this round already.
    fn compare<M: GuestMemoryBackend>(&mut self, core: &Core<M>, scopes: &mut [Scope], whole: &BTreeSet<PagedSpace>) {
        // In ascending order, so that neighbours are found and a space's ranges stand together.
        scopes.sort_unstable_by_key(|scope| match *scope {
            Scope::Everything => (0, DomainId(0), None),
            Scope::Domain(domain) => (1, domain, None),
            Scope::Pages(domain, range) => (2, domain, Some(range)),
        });
        let everything = scopes.first() == Some(&Scope::Everything);
        let domains = scopes.iter().filter_map(|scope| match scope {
            Scope::Domain(domain) => Some(*domain),
            _ => None,
        });
        let domains: BTreeSet<DomainId> = domains.collect();
        let unmaps = core.counters.unmap_ops.get();
        for space in self.spaces.values_mut() {
            if space.whole_in == self.round {
                continue;
            }
            if everything || domains.contains(&space.key.domain) || whole.contains(&space.key) {
                space.compare_whole(core, &mut self.scratch, self.round);
            } else {
                let domain = space.key.domain;
                let before = |scope: &Scope| !matches!(scope, Scope::Pages(other, ..) if *other >= domain);
                let from = scopes.partition_point(before);
                let ranges = scopes[from..].iter().map_while(|scope| match *scope {
                    Scope::Pages(other, range) if other == domain => Some(range),
                    _ => None,
                });
                self.scratch.ranges.clear();
                self.scratch.ranges.extend(ranges);
                self.scratch.ranges.dedup();
                if !self.scratch.ranges.is_empty() {
                    space.compare_ranges(core, &mut self.scratch, self.round);
                }
            }
            if !self.scratch.refused.is_empty() {
                self.book.refused(space.key, &self.scratch.refused);
                report(core, &mut self.reported, &self.scratch.refused);
                self.scratch.refused.clear();
            }
        }
        self.freed += u64::from(core.counters.unmap_ops.get() != unmaps);
    }
}
