//! How a function gets into a space, what is told of what the host refused, and how it is tried again.

use std::collections::BTreeSet;

use vm_memory::GuestMemoryBackend;

use super::Spaces;
use super::diff::Shadow;
use super::members::Member;
use super::space::Space;
use super::waiting::{Now, Occasion, Waiting};
use crate::core::Core;
use crate::faults::{Access, Fault, RequestType};
use crate::ids::{Iova, Requester};
use crate::listener::{AttachRefused, Refusal, RefusalCause};
use crate::space::{PagedSpace, SpaceKey};
use crate::spec::fault::FaultReason;

impl Spaces {
    /// Switches a member from what it is attached to, to `key`.
    pub(super) fn attach<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
        requester: Requester,
        wanted: SpaceKey,
    ) -> Result<(), AttachRefused> {
        let key = self.with_space(core, requester, wanted);
        let nothing = Shadow::default();
        let live = match key {
            SpaceKey::Paged(space) => self.spaces.get(&(space.domain, space)).and_then(Space::shadow),
            SpaceKey::Identity | SpaceKey::Blocked => None,
        };
        let result = core.listener.attach(requester.into(), &key, &mut live.unwrap_or(&nothing).iter());
        let attached = match &result {
            Ok(()) | Err(AttachRefused::Partial(_)) => key,
            Err(_) => SpaceKey::Blocked,
        };
        let refused: &[Refusal] = match &result {
            Err(AttachRefused::Partial(refused) | AttachRefused::Shared(refused)) => refused,
            _ => &[],
        };
        let now = Now { round: self.round, freed: self.freed };
        let left = self.members.get_mut(&requester).map(|member| {
            // What a paged space lost is not in its shadow, so that every comparison tries it again.
            let kept = matches!(attached, SpaceKey::Paged(_));
            let for_room = refused.iter().any(|refusal| refusal.cause.may_pass());
            let for_memory = refused.iter().any(|refusal| refusal.cause == RefusalCause::Target);
            let waits = !kept && (for_room || for_memory);
            member.waiting = waits.then(|| Waiting::refused(member.waiting, key, for_room, now));
            member.attached_in = now.round;
            std::mem::replace(&mut member.attached, attached)
        });
        report(core, &mut self.reported, refused);
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
    pub(super) fn not_attached<M: GuestMemoryBackend>(
        &mut self,
        core: &Core<M>,
        requester: Requester,
        refused: &AttachRefused,
    ) {
        let has_its_records = match refused {
            AttachRefused::Partial(_) => return,
            AttachRefused::Shared(_) => true,
            AttachRefused::UnknownRequester(_) | AttachRefused::Host { .. } => false,
        };
        if self.said_blocked.insert(requester) {
            log::warn!("unit {}: {requester} is blocked: {refused}", core.config.id.0);
        }
        if !has_its_records && self.reported.insert((requester, RefusalCause::Other)) {
            core.signal(core.record(&refused_fault(core, requester, Iova(0))));
        }
    }

    /// Tries the functions again that wait for room, or for memory, if there may be some on this occasion.
    pub(super) fn try_again<M: GuestMemoryBackend>(&mut self, core: &Core<M>, occasion: Occasion) {
        let now = Now { round: self.round, freed: self.freed };
        let due = |(requester, member): (&Requester, &mut Member)| {
            let waiting = member.waiting.as_mut()?;
            waiting.is_due(now, occasion).then_some((*requester, waiting.space))
        };
        let due: Vec<(Requester, SpaceKey)> = self.members.iter_mut().filter_map(due).collect();
        for (requester, space) in due {
            if let Err(refused) = self.attach(core, requester, space) {
                self.not_attached(core, requester, &refused);
            }
        }
    }

    /// `key`, with its space made and walked if it is a paged one without members; blocked if there is no room for it.
    fn with_space<M: GuestMemoryBackend>(&mut self, core: &Core<M>, requester: Requester, key: SpaceKey) -> SpaceKey {
        let SpaceKey::Paged(paged) = key else { return key };
        let index = (paged.domain, paged);
        if self.spaces.contains_key(&index) {
            return key;
        }
        let bound = core.config.bounds.spaces;
        // A space that all its members are about to leave is none that stays.
        let stays = |member: &Requester| *member != requester && !self.leaving.contains(member);
        if self.spaces.len() >= bound
            && self.spaces.values().filter(|space| space.members.iter().any(stays)).count() >= bound
        {
            log::log!(
                core.bound_exhausted(),
                "unit {}: more than {bound} spaces; {requester} is blocked",
                core.config.id.0,
            );
            return SpaceKey::Blocked;
        }
        let mut space = Space::new(paged, self.told.remove(&paged).unwrap_or_default());
        space.compare_whole(core, &mut self.scratch, self.round);
        self.spaces.insert(index, space);
        key
    }

    pub(super) fn leave(&mut self, requester: Requester, left: SpaceKey) {
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
}

/// The fault of a device that cannot reach what the guest's tables grant. Its reason is the one of a table that could
/// not be used.
fn refused_fault<M>(core: &Core<M>, requester: Requester, iova: Iova) -> Fault {
    let requester = core.sources.load().of(requester).seen(requester);
    Fault {
        requester,
        pasid: None,
        iova,
        access: Access::Read,
        request: RequestType::Untranslated,
        reason: FaultReason::PagingTableAccess,
        silenced: false,
    }
}

/// One fault record per device and cause for what the host refused (B-11).
pub(super) fn report<M: GuestMemoryBackend>(
    core: &Core<M>,
    reported: &mut BTreeSet<(Requester, RefusalCause)>,
    refused: &[Refusal],
) {
    core.counters.maps_refused.add(refused.len() as u64);
    for refusal in refused {
        let requester = refusal.stream.requester;
        if reported.insert((requester, refusal.cause)) {
            core.signal(core.record(&refused_fault(core, requester, Iova(refusal.range.first))));
        }
    }
}
