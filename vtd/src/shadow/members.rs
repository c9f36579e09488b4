//! Who is behind the unit: assigned functions and endpoints, and where the tables say that each function is to be.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vm_memory::GuestMemoryBackend;

use super::Spaces;
use super::waiting::Waiting;
use crate::core::Core;
use crate::dma::iotlb::Iotlb;
use crate::faults::RequestType;
use crate::ids::{DomainId, Pasid, Requester, SourceId};
use crate::listener::AttachRefused;
use crate::scope::ContextScope;
use crate::space::{PagedSpace, SpaceKey};
use crate::tables::context::{Attached, Resolved};
use crate::tables::flags::Flags;
use crate::tables::resolve::resolve;

/// An assigned function behind the unit.
pub(super) struct Member {
    pub(super) attached: SpaceKey,
    /// What its requests carry.
    pub(super) source: Option<SourceId>,
    /// The domain id of its context entry, or of the PASID table's entry, if it has one.
    pub(super) domain: Option<DomainId>,
    /// The PASID that its requests are translated with, if that is known.
    pub(super) pasid: Option<Pasid>,
    /// The round in which its context entry was resolved last.
    pub(super) resolved_in: u64,
    /// The round in which it was attached, or refused, last.
    pub(super) attached_in: u64,
    /// It waits for room, or for memory, to be where its tables say.
    pub(super) waiting: Option<Waiting>,
}

impl ContextScope {
    fn reaches(self, member: &Member) -> bool {
        match self {
            Self::Everything => true,
            Self::Pasids { domain, pasid } => {
                let named = |of_member| pasid.is_none_or(|pasid| pasid == of_member);
                member.domain.is_none_or(|of_member| of_member == domain && member.pasid.is_none_or(named))
            }
            // With Caching Mode, what was not present is tagged with domain 0. Section 6.1.
            Self::Domain(domain) => member.domain == Some(domain) || member.domain.is_none() && domain == DomainId(0),
            Self::Device { source, ignored } => member.source.is_some_and(|id| (id.0 ^ source.0) & !ignored == 0),
        }
    }
}

impl Spaces {
    /// A function joins; it is attached to what the guest's tables say.
    pub(crate) fn add_requester<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
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
            pasid: None,
            resolved_in: self.round,
            attached_in: self.round,
            waiting: None,
        };
        self.members.insert(requester, member);
        // It may have the id of another one: then that one is blocked first.
        self.sources_changed(core);
        let (key, domain, pasid) = resolve_requester(core, requester);
        if let Some(member) = self.members.get_mut(&requester) {
            (member.domain, member.pasid, member.source) = (domain, pasid, core.sources.load().of(requester).id());
        }
        let attached = self.attach(core, requester, key);
        match attached {
            // The rest of the space is in place, and what was refused has its fault record.
            Ok(()) | Err(AttachRefused::Partial(_)) => Ok(()),
            Err(refused) => {
                self.members.remove(&requester);
                self.sources_changed(core);
                Err(refused)
            }
        }
    }

    /// A function leaves.
    pub(crate) fn remove_requester<M: GuestMemoryBackend>(&mut self, core: &Core<M>, requester: Requester) {
        if let Some(member) = self.members.remove(&requester) {
            core.listener.detach(requester.into());
            self.freed += u64::from(member.attached != SpaceKey::Blocked);
            self.leave(requester, member.attached);
            self.reported.retain(|(reported, _)| *reported != requester);
            self.said_blocked.remove(&requester);
            self.forget_id(requester);
            self.sources_changed(core);
        }
    }

    pub(crate) fn add_endpoint<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
        requester: Requester,
        iotlb: &Arc<Iotlb>,
    ) {
        iotlb.set_counting(self.counting);
        self.endpoints.push((requester, iotlb.clone()));
        self.sources_changed(core);
    }

    /// Waits for what emulated devices of this name have under way.
    pub(crate) fn wait_for_sessions_of(&self, requester: Requester) {
        let own = self.endpoints.iter().filter(|(name, _)| *name == requester);
        own.for_each(|(_, iotlb)| iotlb.wait_for_sessions());
    }

    /// An emulated device leaves, and with the last endpoint of its name its id: who had the same one has it alone.
    pub(crate) fn remove_endpoint<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
        requester: Requester,
        iotlb: &Arc<Iotlb>,
    ) {
        self.endpoints.retain(|(_, other)| !Arc::ptr_eq(other, iotlb));
        let is_there =
            self.members.contains_key(&requester) || self.endpoints.iter().any(|(name, _)| *name == requester);
        if !is_there {
            self.forget_id(requester);
        }
        self.sources_changed(core);
    }

    /// Resolves the requesters in `scope` again, once a round. Spaces of those that stay where they are go to `whole`,
    /// and those that are to be elsewhere to `moves`.
    pub(super) fn refresh_members<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
        scope: ContextScope,
        whole: &mut BTreeSet<PagedSpace>,
        moves: &mut BTreeMap<Requester, SpaceKey>,
    ) {
        let reached: Vec<Requester> = self.reached_by(scope).collect();
        for requester in reached {
            let (key, domain, pasid) = resolve_requester(core, requester);
            let Some(member) = self.members.get_mut(&requester) else { continue };
            (member.domain, member.pasid) = (domain, pasid);
            member.resolved_in = self.round;
            let waits = member.waiting.is_some_and(|waiting| waiting.for_room && waiting.space == key);
            if waits && !scope.names_a_function() {
                // Nothing says that there is room: it is tried when it is due. Who names the device has it tried at
                // once.
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
    pub(super) fn move_members<M: GuestMemoryBackend>(&mut self, core: &Core<M>, moves: BTreeMap<Requester, SpaceKey>) {
        self.leaving = moves.keys().copied().collect();
        for (requester, key) in moves {
            if let Err(refused) = self.attach(core, requester, key) {
                self.not_attached(core, requester, &refused);
            }
            self.leaving.remove(&requester);
        }
    }

    /// The members that a context-cache invalidation reaches and that were not resolved in this round yet. One that
    /// waits for room is reached by its name all the same, unless it was tried already: what came before it did not
    /// have it tried.
    pub(crate) fn reached_by(&self, scope: ContextScope) -> impl Iterator<Item = Requester> + '_ {
        let named = scope.names_a_function();
        let reached = move |(_, member): &(&Requester, &Member)| {
            let waits = named && member.waiting.is_some() && member.attached_in != self.round;
            (member.resolved_in != self.round || waits) && scope.reaches(member)
        };
        self.members.iter().filter(reached).map(|(requester, _)| *requester)
    }

    /// What a member is attached to.
    pub(crate) fn attached_to(&self, requester: Requester) -> Option<SpaceKey> {
        self.members.get(&requester).map(|member| member.attached)
    }
}

/// What the guest's tables say about a requester; its domain id, and the PASID that its requests are translated with.
pub(crate) fn resolve_requester<M: GuestMemoryBackend>(
    core: &Core<M>,
    requester: Requester,
) -> (SpaceKey, Option<DomainId>, Option<Pasid>) {
    let translation = **core.translation.load();
    let Some(source) = core.sources.load().of(requester).own() else {
        // With translation off nobody looks at the id.
        return (if translation.enabled { SpaceKey::Blocked } else { SpaceKey::Identity }, None, None);
    };
    let request = RequestType::Untranslated;
    // Only these requests of an assigned function are attached: see `UnitConfig::pasid_bits`.
    let Ok(Attached { resolved, pasid }) = resolve(&core.memory, &core.config, translation, source, None, request)
    else {
        return (SpaceKey::Blocked, None, None);
    };
    let key = match resolved {
        Resolved::Off | Resolved::PassThrough { .. } => SpaceKey::Identity,
        Resolved::Paged { space, flags: Flags::Ignored, .. } => SpaceKey::Paged(space),
        // Nobody would set the flags of its tables.
        Resolved::Paged { .. } => SpaceKey::Blocked,
        // What a first stage adds need not be invalidated: there is no moment to tell the listener of it.
        Resolved::First { .. } | Resolved::Nested { .. } => SpaceKey::Blocked,
    };
    (key, resolved.domain(), pasid)
}
