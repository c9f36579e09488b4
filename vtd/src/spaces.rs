//! The spaces that have members, and who is a member of which: one diff path for map, unmap, permission change, domain
//! switch, attach, TE, SRTP and reset.
//!
//! Invalidations are collected first and take effect together, when a wait descriptor or the end of the queue is
//! reached: requesters are looked up again where the context cache was invalidated, then each space is compared with
//! the guest's tables in the ranges that were invalidated.

#[path = "renumber.rs"]
mod renumber;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vm_memory::GuestMemoryBackend;

use crate::audit::Book;
use crate::ids::{DomainId, Iova, Requester, SourceId};
use crate::iotlb::{Iotlb, Scope};
use crate::remap::EntriesChanged;
use crate::resync::{Scratch, Space};
use crate::shadow::Shadow;
use crate::space::{AttachRefused, Mapping, PagedSpace, Refusal, RefusalCause, SpaceKey};
use crate::spec::fault::FaultReason;
use crate::tables::{Resolved, resolve};
use crate::unit::Shared;
use crate::waiting::{Now, Waiting};
use crate::{Access, Fault};

pub(crate) use renumber::{Source, Sources};

/// Looks at a part of the interrupt entries in one turn; the next one is at all of them, and the last. Each may cost the listener a
/// change of all its routes.
const ENTRY_LOOKS: u32 = 64;

/// Which requesters a context-cache invalidation reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ContextScope {
    Everything,
    Domain(DomainId),
    /// A source id, and the function bits that are ignored in it.
    Device {
        source: SourceId,
        ignored: u16,
    },
}

impl ContextScope {
    fn reaches(self, member: &Member) -> bool {
        match self {
            Self::Everything => true,
            // With Caching Mode, what was not present is tagged with domain 0. Section 6.1.
            Self::Domain(domain) => member.domain == Some(domain) || member.domain.is_none() && domain == DomainId(0),
            Self::Device { source, ignored } => member.source.is_some_and(|id| (id.0 ^ source.0) & !ignored == 0),
        }
    }
}

/// An assigned function behind the unit.
struct Member {
    attached: SpaceKey,
    /// What its requests carry.
    source: Option<SourceId>,
    /// The domain id of its context entry, if it has one.
    domain: Option<DomainId>,
    /// The turn in which its context entry was looked up last.
    looked_up_in: u64,
    /// The turn in which it was attached, or refused, last.
    attached_in: u64,
    /// It waits for room to be where its tables say.
    waiting: Option<Waiting>,
}

/// A space as an audit sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SpaceView {
    /// Which space.
    pub key: PagedSpace,
    /// The requesters attached to it, by the names that they were added with.
    pub members: Vec<Requester>,
    /// What the listener was told, with the boundaries that it was told, in ascending order.
    pub extents: Vec<Mapping>,
    /// Nothing is mapped because a bound was exhausted.
    pub blocked: bool,
}

/// Invalidations that did not take effect yet.
#[derive(Default)]
struct Pending {
    contexts: Vec<ContextScope>,
    iotlb: Vec<Scope>,
    /// One range for all: routes are replaced once a flush.
    interrupt_entries: Option<EntriesChanged>,
}

/// All spaces of a unit. Stands behind the unit's queue lock.
#[derive(Default)]
pub(crate) struct Spaces {
    members: BTreeMap<Requester, Member>,
    /// By domain id first: an invalidation names nothing else.
    spaces: BTreeMap<(DomainId, PagedSpace), Space>,
    endpoints: Vec<(Requester, Arc<Iotlb>)>,
    /// The source ids of functions that do not have the one of their name; `None` for one that has none.
    ids: BTreeMap<Requester, Option<SourceId>>,
    pending: Pending,
    /// What a fault record was made for (B-11).
    reported: BTreeSet<(Requester, RefusalCause)>,
    /// Members that are about to move.
    leaving: BTreeSet<Requester>,
    /// Of which functions the log has that they are blocked.
    said_blocked: BTreeSet<Requester>,
    scratch: Scratch,
    /// Number of the drain, or of the command outside a drain. Every descriptor of a drain was given before it began, so what
    /// was looked at once in a turn is not looked at again in it: else a full queue would be as many walks of everything.
    turn: u64,
    draining: bool,
    /// How often something was taken away from the host.
    freed: u64,
    /// The turn in which all interrupt entries were looked at.
    all_entries_in: u64,
    /// The turn in which some of them were looked at last, and how often.
    entry_looks: (u64, u32),
    /// What the last audit found to disagree.
    pub(crate) book: Book,
}

impl Spaces {
    /// A function joins; it is attached to what the guest's tables say.
    pub(crate) fn add_requester<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        requester: Requester,
    ) -> Result<(), AttachRefused> {
        if self.members.contains_key(&requester) {
            return Ok(());
        }
        let blocked = SpaceKey::Blocked;
        let member = Member {
            attached: blocked,
            source: None,
            domain: None,
            looked_up_in: self.turn,
            attached_in: self.turn,
            waiting: None,
        };
        self.members.insert(requester, member);
        // It may have the id of another one: then that one is blocked first.
        self.sources_changed(shared);
        let (key, domain) = look_up(shared, requester);
        if let Some(member) = self.members.get_mut(&requester) {
            (member.domain, member.source) = (domain, shared.sources.load().of(requester).id());
        }
        let attached = self.attach(shared, requester, key);
        match attached {
            // The rest of the space is in place, and what was refused has its fault record.
            Ok(()) | Err(AttachRefused::Partial(_)) => Ok(()),
            Err(refused) => {
                self.members.remove(&requester);
                self.sources_changed(shared);
                Err(refused)
            }
        }
    }

    /// A function leaves.
    pub(crate) fn remove_requester<M: GuestMemoryBackend>(&mut self, shared: &Shared<M>, requester: Requester) {
        if let Some(member) = self.members.remove(&requester) {
            shared.listener.detach(requester, None);
            self.freed += u64::from(member.attached != SpaceKey::Blocked);
            self.leave(requester, member.attached);
            self.reported.retain(|(reported, _)| *reported != requester);
            self.said_blocked.remove(&requester);
            self.ids.remove(&requester);
            self.sources_changed(shared);
        }
    }

    pub(crate) fn add_endpoint<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        requester: Requester,
        iotlb: &Arc<Iotlb>,
    ) {
        self.endpoints.push((requester, iotlb.clone()));
        self.sources_changed(shared);
    }

    /// An emulated device leaves, and with the last endpoint of its name its id: who had the same one has it alone.
    pub(crate) fn remove_endpoint<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        requester: Requester,
        iotlb: &Arc<Iotlb>,
    ) {
        self.endpoints.retain(|(_, other)| !Arc::ptr_eq(other, iotlb));
        let is_there =
            self.members.contains_key(&requester) || self.endpoints.iter().any(|(name, _)| *name == requester);
        if !is_there {
            self.ids.remove(&requester);
        }
        self.sources_changed(shared);
    }

    pub(crate) fn views(&self) -> Vec<SpaceView> {
        let view = |space: &Space| SpaceView {
            key: space.key,
            members: space.members.iter().copied().collect(),
            extents: space.shadow().into_iter().flat_map(Shadow::iter).collect(),
            blocked: space.shadow().is_none(),
        };
        self.spaces.values().map(view).collect()
    }

    /// What each function is attached to.
    pub(crate) fn attachments(&self) -> Vec<(Requester, SpaceKey)> {
        self.members.iter().map(|(requester, member)| (*requester, member.attached)).collect()
    }

    /// A context-cache invalidation: takes effect at the next [`Spaces::flush`].
    pub(crate) fn invalidate_contexts(&mut self, scope: ContextScope) {
        self.pending.contexts.push(scope);
    }

    /// An IOTLB invalidation: takes effect at the next [`Spaces::flush`].
    pub(crate) fn invalidate_iotlb(&mut self, scope: Scope) {
        self.pending.iotlb.push(scope);
    }

    /// An interrupt-entry-cache invalidation: takes effect at the next [`Spaces::flush`].
    pub(crate) fn invalidate_interrupt_entries(&mut self, changed: EntriesChanged) {
        let pending = &mut self.pending.interrupt_entries;
        *pending = Some(pending.map_or(changed, |before| before.join(changed)));
    }

    /// TE, the root table or everything changed: requesters are looked up again and every space is compared whole.
    pub(crate) fn refresh<M: GuestMemoryBackend>(&mut self, shared: &Shared<M>) {
        self.invalidate_contexts(ContextScope::Everything);
        self.invalidate_iotlb(Scope::Everything);
        self.members.values_mut().filter_map(|member| member.waiting.as_mut()).for_each(Waiting::rested);
        self.flush(shared);
    }

    /// A drain begins: the tail is known, so all its descriptors were given.
    pub(crate) fn begin_drain(&mut self) {
        self.turn += 1;
        self.draining = true;
    }

    /// The drain is over.
    pub(crate) fn end_drain(&mut self) {
        self.draining = false;
    }

    /// Forgets which refusals the guest was told of.
    pub(crate) fn forget_reports(&mut self) {
        self.reported.clear();
        self.said_blocked.clear();
    }

    /// What was invalidated takes effect: when this returns, no device can reach what the guest took away.
    pub(crate) fn flush<M: GuestMemoryBackend>(&mut self, shared: &Shared<M>) {
        if !self.draining {
            self.turn += 1;
        }
        if let Some(changed) = self.pending.interrupt_entries.take()
            && self.all_entries_in != self.turn
        {
            let looks = if self.entry_looks.0 == self.turn { self.entry_looks.1 + 1 } else { 1 };
            self.entry_looks = (self.turn, looks);
            let changed = if looks > ENTRY_LOOKS { EntriesChanged::All } else { changed };
            if changed == EntriesChanged::All {
                self.all_entries_in = self.turn;
            }
            shared.entries_changed(changed);
        }
        if self.pending.contexts.is_empty() && self.pending.iotlb.is_empty() {
            return;
        }
        let mut pending = std::mem::take(&mut self.pending);
        self.invalidate_endpoints(&pending);
        let (spaces, turn) = (&self.spaces, self.turn);
        let done = |space: &PagedSpace| spaces.get(&(space.domain, *space)).is_some_and(|space| space.whole_in == turn);
        self.book.covers(&pending.iotlb, done);
        let only_pages = |scope: &Scope| matches!(scope, Scope::Pages(..));
        let more_than_pages = !pending.contexts.is_empty() || !pending.iotlb.iter().all(only_pages);
        self.note_contexts(&pending.contexts);

        let mut whole = BTreeSet::new();
        if !pending.contexts.is_empty() {
            let mut moves = BTreeMap::new();
            for scope in pending.contexts.drain(..) {
                self.look_up_again(shared, scope, &mut whole, &mut moves);
            }
            self.move_members(shared, moves);
        }
        self.compare(shared, &mut pending.iotlb, &whole);
        self.look_again(shared);
        self.try_again(shared, more_than_pages);
        pending.iotlb.clear();
        // Its storage is used again.
        self.pending = pending;
        self.scratch.shrink();
    }

    fn invalidate_endpoints(&self, pending: &Pending) {
        for (_, iotlb) in &self.endpoints {
            if pending.contexts.is_empty() {
                pending.iotlb.iter().for_each(|scope| iotlb.invalidate(*scope));
            } else {
                iotlb.invalidate(Scope::Everything);
            }
            iotlb.wait_for_sessions();
        }
    }

    /// Looks the requesters in `scope` up again, once a turn. Spaces of those that stay where they are go to `whole`, and those that
    /// are to be elsewhere to `moves`.
    fn look_up_again<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        scope: ContextScope,
        whole: &mut BTreeSet<PagedSpace>,
        moves: &mut BTreeMap<Requester, SpaceKey>,
    ) {
        let reached: Vec<Requester> = self.reached_by(scope).collect();
        for requester in reached {
            let (key, domain) = look_up(shared, requester);
            let Some(member) = self.members.get_mut(&requester) else { continue };
            member.domain = domain;
            member.looked_up_in = self.turn;
            let waits = member.waiting.is_some_and(|waiting| waiting.space == key);
            if waits && !matches!(scope, ContextScope::Device { .. }) {
                // Nothing says that there is room: its turn comes when it comes. Who names the device has it tried at once.
                continue;
            }
            if member.attached == key && !waits {
                if let SpaceKey::Paged(space) = key {
                    whole.insert(space);
                }
                continue;
            }
            moves.insert(requester, key);
        }
    }

    /// Attaches functions to what their tables say.
    fn move_members<M: GuestMemoryBackend>(&mut self, shared: &Shared<M>, moves: BTreeMap<Requester, SpaceKey>) {
        self.leaving = moves.keys().copied().collect();
        for (requester, key) in moves {
            if let Err(refused) = self.attach(shared, requester, key) {
                self.not_attached(shared, requester, &refused);
            }
            self.leaving.remove(&requester);
        }
    }

    /// The members that a context-cache invalidation reaches and that were not looked up in this turn yet. One that waits for room
    /// is reached by its name all the same, unless it was tried already: what came before it did not have it tried.
    pub(crate) fn reached_by(&self, scope: ContextScope) -> impl Iterator<Item = Requester> + '_ {
        let named = matches!(scope, ContextScope::Device { .. });
        let reached = move |(_, member): &(&Requester, &Member)| {
            let waits = named && member.waiting.is_some() && member.attached_in != self.turn;
            (member.looked_up_in != self.turn || waits) && scope.reaches(member)
        };
        self.members.iter().filter(reached).map(|(requester, _)| *requester)
    }

    /// What a member is attached to.
    pub(crate) fn attached_to(&self, requester: Requester) -> Option<SpaceKey> {
        self.members.get(&requester).map(|member| member.attached)
    }

    pub(crate) fn is_member(&self, space: PagedSpace, requester: Requester) -> bool {
        self.spaces.get(&(space.domain, space)).is_some_and(|space| space.members.contains(&requester))
    }

    /// The spaces that no bound has blocked, with their shadows.
    pub(crate) fn open_shadows(&self) -> impl Iterator<Item = (PagedSpace, impl Iterator<Item = Mapping> + '_)> + '_ {
        self.spaces.values().filter_map(|space| Some((space.key, space.shadow()?.iter())))
    }

    /// The part of a space's shadow in `range` (inclusive), unless a bound has blocked the space.
    pub(crate) fn open_shadow(
        &self,
        space: PagedSpace,
        range: (u64, u64),
    ) -> Option<impl Iterator<Item = Mapping> + '_> {
        let shadow = self.spaces.get(&(space.domain, space))?.shadow()?;
        Some(shadow.part(range))
    }

    /// A shadow that says something else than its listener was told: what an audit is there to find.
    #[cfg(test)]
    pub(crate) fn falsify(&mut self, first: u64, last: u64) {
        self.spaces.values_mut().for_each(|space| space.falsify(first, last));
    }

    /// What the listener was told about the space that `key` names; nothing unless it is a paged one.
    pub(crate) fn granted(&self, key: &SpaceKey) -> Box<dyn Iterator<Item = Mapping> + '_> {
        match key {
            SpaceKey::Paged(space) => {
                let shadow = self.spaces.get(&(space.domain, *space)).and_then(Space::shadow);
                Box::new(shadow.into_iter().flat_map(Shadow::iter))
            }
            SpaceKey::Identity | SpaceKey::Blocked => Box::new(std::iter::empty()),
        }
    }

    /// Switches a member from what it is attached to, to `key`.
    fn attach<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        requester: Requester,
        wanted: SpaceKey,
    ) -> Result<(), AttachRefused> {
        let key = self.with_space(shared, requester, wanted);
        let nothing = Shadow::default();
        let live = match key {
            SpaceKey::Paged(space) => self.spaces.get(&(space.domain, space)).and_then(Space::shadow),
            SpaceKey::Identity | SpaceKey::Blocked => None,
        };
        let result = shared.listener.attach(requester, None, &key, &mut live.unwrap_or(&nothing).iter());
        let attached = match &result {
            Ok(()) | Err(AttachRefused::Partial(_)) => key,
            Err(_) => SpaceKey::Blocked,
        };
        let refused: &[Refusal] = match &result {
            Err(AttachRefused::Partial(refused) | AttachRefused::Shared(refused)) => refused,
            _ => &[],
        };
        let now = Now { turn: self.turn, freed: self.freed };
        let left = self.members.get_mut(&requester).map(|member| {
            // What a paged space lost is not in its shadow, so that every comparison tries it again.
            let kept = matches!(attached, SpaceKey::Paged(_));
            let waits = !kept && refused.iter().any(|refusal| refusal.cause.may_pass());
            member.waiting = waits.then(|| Waiting::refused(member.waiting, key, now));
            member.attached_in = now.turn;
            std::mem::replace(&mut member.attached, attached)
        });
        report(shared, &mut self.reported, refused);
        if let SpaceKey::Paged(space) = attached
            && let Some(space) = self.spaces.get_mut(&(space.domain, space))
        {
            space.members.insert(requester);
            space.lose(refused);
            self.book.refused(space.key, refused);
        }
        self.freed += u64::from(left.is_some_and(|left| left != attached && left != SpaceKey::Blocked));
        self.book.attached(requester, attached == wanted);
        if let Some(left) = left.filter(|left| *left != attached) {
            self.leave(requester, left);
        }
        if attached != key
            && let SpaceKey::Paged(space) = key
        {
            self.forget_if_empty(space);
        }
        result
    }

    /// A member could not be attached whole. Said once a function: a guest could make it happen again and again.
    fn not_attached<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        requester: Requester,
        refused: &AttachRefused,
    ) {
        let has_its_records = match refused {
            AttachRefused::Partial(_) => return,
            AttachRefused::Shared(_) => true,
            AttachRefused::UnknownRequester(_) | AttachRefused::Host { .. } => false,
        };
        if self.said_blocked.insert(requester) {
            log::warn!("unit {}: {requester} is blocked: {refused}", shared.config.id.0);
        }
        if !has_its_records && self.reported.insert((requester, RefusalCause::Other)) {
            shared.signal(shared.record(&refused_fault(shared, requester, Iova(0))));
        }
    }

    /// Tries the functions again that wait for room, if there may be some: something was taken away, or the guest invalidated
    /// more than pages.
    fn try_again<M: GuestMemoryBackend>(&mut self, shared: &Shared<M>, more_than_pages: bool) {
        let now = Now { turn: self.turn, freed: self.freed };
        let due = |(requester, member): (&Requester, &mut Member)| {
            let waiting = member.waiting.as_mut()?;
            waiting.is_due(now, more_than_pages).then_some((*requester, waiting.space))
        };
        let due: Vec<(Requester, SpaceKey)> = self.members.iter_mut().filter_map(due).collect();
        for (requester, space) in due {
            if let Err(refused) = self.attach(shared, requester, space) {
                self.not_attached(shared, requester, &refused);
            }
        }
    }

    /// `key`, with its space made and walked if it is a paged one without members; blocked if there is no room for it.
    fn with_space<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        requester: Requester,
        key: SpaceKey,
    ) -> SpaceKey {
        let SpaceKey::Paged(paged) = key else { return key };
        let index = (paged.domain, paged);
        if self.spaces.contains_key(&index) {
            return key;
        }
        let bound = shared.config.bounds.spaces;
        // A space that all its members are about to leave is none that stays.
        let stays = |member: &Requester| *member != requester && !self.leaving.contains(member);
        if self.spaces.len() >= bound
            && self.spaces.values().filter(|space| space.members.iter().any(stays)).count() >= bound
        {
            log::log!(
                bound_exhausted(shared),
                "unit {}: more than {bound} spaces; {requester} is blocked",
                shared.config.id.0,
            );
            return SpaceKey::Blocked;
        }
        let mut space = Space::new(paged);
        space.compare_whole(shared, &mut self.scratch, self.turn);
        self.spaces.insert(index, space);
        key
    }

    fn leave(&mut self, requester: Requester, left: SpaceKey) {
        if let SpaceKey::Paged(space) = left {
            if let Some(space) = self.spaces.get_mut(&(space.domain, space)) {
                space.members.remove(&requester);
            }
            self.forget_if_empty(space);
        }
    }

    fn forget_if_empty(&mut self, space: PagedSpace) {
        let index = (space.domain, space);
        if self.spaces.get(&index).is_some_and(|space| space.members.is_empty()) {
            self.spaces.remove(&index);
        }
    }

    /// Compares the spaces that `scopes` reach, and those in `whole`, with the guest's tables, unless they were compared whole in
    /// this turn already.
    fn compare<M: GuestMemoryBackend>(
        &mut self,
        shared: &Shared<M>,
        scopes: &mut [Scope],
        whole: &BTreeSet<PagedSpace>,
    ) {
        // In ascending order, so that neighbours are found and a space's ranges stand together.
        scopes.sort_unstable_by_key(|scope| match *scope {
            Scope::Everything => (0, DomainId(0), 0, 0),
            Scope::Domain(domain) => (1, domain, 0, 0),
            Scope::Pages(domain, first, last) => (2, domain, first, last),
        });
        let everything = scopes.first() == Some(&Scope::Everything);
        let domains = scopes.iter().filter_map(|scope| match scope {
            Scope::Domain(domain) => Some(*domain),
            _ => None,
        });
        let domains: BTreeSet<DomainId> = domains.collect();
        let unmaps = shared.counters.unmap_ops.get();
        for space in self.spaces.values_mut() {
            if space.whole_in == self.turn {
                continue;
            }
            if everything || domains.contains(&space.key.domain) || whole.contains(&space.key) {
                space.compare_whole(shared, &mut self.scratch, self.turn);
            } else {
                let domain = space.key.domain;
                let before = |scope: &Scope| !matches!(scope, Scope::Pages(other, ..) if *other >= domain);
                let from = scopes.partition_point(before);
                let ranges = scopes[from..].iter().map_while(|scope| match *scope {
                    Scope::Pages(other, first, last) if other == domain => Some((first, last)),
                    _ => None,
                });
                self.scratch.ranges.clear();
                self.scratch.ranges.extend(ranges);
                self.scratch.ranges.dedup();
                if !self.scratch.ranges.is_empty() {
                    space.compare_ranges(shared, &mut self.scratch, self.turn);
                }
            }
            if !self.scratch.refused.is_empty() {
                self.book.refused(space.key, &self.scratch.refused);
                report(shared, &mut self.reported, &self.scratch.refused);
                self.scratch.refused.clear();
            }
        }
        self.freed += u64::from(shared.counters.unmap_ops.get() != unmaps);
    }
}

/// Counts a bound that was exhausted. The first one is a warning; a guest must not be able to fill the log.
pub(crate) fn bound_exhausted<M>(shared: &Shared<M>) -> log::Level {
    let first = shared.counters.bounds_exhausted.get() == 0;
    shared.counters.bounds_exhausted.add(1);
    if first { log::Level::Warn } else { log::Level::Debug }
}

/// What the guest's tables say about a requester, and its domain id.
pub(crate) fn look_up<M: GuestMemoryBackend>(shared: &Shared<M>, requester: Requester) -> (SpaceKey, Option<DomainId>) {
    let translation = **shared.translation.load();
    let Some(source) = shared.sources.load().of(requester).own() else {
        // With translation off nobody looks at the id.
        return (if translation.enabled { SpaceKey::Blocked } else { SpaceKey::Identity }, None);
    };
    match resolve(&shared.memory, &shared.config, translation, source) {
        Ok(Resolved::Off) => (SpaceKey::Identity, None),
        Ok(Resolved::PassThrough { domain, .. }) => (SpaceKey::Identity, Some(domain)),
        Ok(Resolved::Paged { space, .. }) => (SpaceKey::Paged(space), Some(space.domain)),
        Err(_) => (SpaceKey::Blocked, None),
    }
}

/// The fault of a device that cannot reach what the guest's tables grant. Its reason is the one of a table that could not
/// be used.
fn refused_fault<M>(shared: &Shared<M>, requester: Requester, iova: Iova) -> Fault {
    let requester = shared.sources.load().of(requester).seen(requester);
    Fault { requester, iova, access: Access::Read, reason: FaultReason::PagingTableAccess, silenced: false }
}

/// One fault record per device and cause for what the host refused (B-11).
fn report<M: GuestMemoryBackend>(
    shared: &Shared<M>,
    reported: &mut BTreeSet<(Requester, RefusalCause)>,
    refused: &[Refusal],
) {
    shared.counters.maps_refused.add(refused.len() as u64);
    for refusal in refused {
        if reported.insert((refusal.requester, refusal.cause)) {
            shared.signal(shared.record(&refused_fault(shared, refusal.requester, refusal.first)));
        }
    }
}
