//! Which space of the host holds what a space of the guest has, and which groups are in it.
//!
//! ```text
//!   Placement::PerGroup:   group ── for life ──► host space, whose content follows the group
//!   Placement::PerSpace:   group ── attached ──► host space of one space of the guest, whose groups come and go
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use vtd::{IovaRange, Mapping, PagedSpace, Requester, SpaceKey, Tables};

use super::group::Group;
use super::guest_map::GuestMap;
use super::host_space::{HostSpace, Lost};
use super::{Bridge, Broken};
use crate::host::{GroupId, HostIommu, Placement};
use crate::stats::Counters;

/// A space of the host that the bridge uses.
pub(super) struct Held {
    host: Arc<dyn HostIommu>,
    state: Mutex<HeldState>,
}

/// What a space of the host holds, and for whom.
pub(super) struct HeldState {
    pub space: HostSpace,
    /// The space of the guest that it holds.
    pub holds: SpaceKey,
    /// What the host refused of the identity space, if it holds that: ascending, disjoint. (What is refused of a paged
    /// one its unit forgets.)
    pub refused: Vec<IovaRange>,
    /// Of the identity space: the only function in it when it was filled, whose own BARs are not there.
    pub alone: Option<Requester>,
    /// The functions of each group in it.
    pub groups: BTreeMap<GroupId, Vec<Requester>>,
    /// Its functions were stopped, or are about to be.
    stopped: bool,
    /// Given back to the host: nobody joins it any more.
    retired: bool,
}

impl Held {
    fn new(space: HostSpace, host: Arc<dyn HostIommu>) -> Arc<Self> {
        let state = HeldState {
            space,
            holds: SpaceKey::Blocked,
            refused: Vec::new(),
            alone: None,
            groups: BTreeMap::new(),
            stopped: false,
            retired: false,
        };
        Arc::new(Self { host, state: Mutex::new(state) })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, HeldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HeldState {
    /// Whether changes of `space` are to be made here.
    pub fn follows(&self, space: &SpaceKey) -> bool {
        self.holds == *space && !self.stopped && self.space.broken().is_none()
    }

    /// Whom a refusal names.
    pub fn first_member(&self) -> Option<Requester> {
        self.groups.values().flatten().min().copied()
    }

    /// Makes it hold exactly what `space` has: `live`, of a paged one. With `whole` it ends at the first mapping that
    /// is refused: the caller has no use for the rest. `joining` is a group that is not in it yet.
    ///
    /// Identity is all RAM, and the BARs of other functions (B-12): a space that one function has alone goes without
    /// its own, which nothing needs there and some hosts refuse. A BAR that the host refuses is counted and said, and
    /// that is all: identity without it is identity (B-10).
    fn fill(
        &mut self,
        guest: &GuestMap,
        space: SpaceKey,
        joining: Option<&PlacedGroup>,
        live: &mut dyn Iterator<Item = Mapping>,
        whole: bool,
        lost: &mut Vec<Lost>,
    ) {
        let mut target = Vec::new();
        self.space.set_width(width_of(&space));
        match space {
            SpaceKey::Blocked => {}
            SpaceKey::Identity => {
                let joining = joining.filter(|joining| !self.groups.contains_key(&joining.id));
                let joining = joining.into_iter().flat_map(|joining| joining.group.members());
                let mut members = self.groups.values().flatten().copied().chain(joining);
                let first = members.next();
                self.alone = first.filter(|_| members.next().is_none());
                for mapping in guest.identity(self.alone) {
                    target.extend(self.space.resolve(guest, &mapping, lost));
                }
            }
            SpaceKey::Paged(_) => {
                for mapping in live {
                    target.extend(self.space.resolve(guest, &mapping, lost));
                }
            }
        }
        if !whole || lost.is_empty() {
            self.space.switch(guest, &target, whole, lost);
        }
        self.refused.clear();
        if space == SpaceKey::Identity {
            self.refused = IovaRange::union_of(lost.iter().map(|lost| lost.range).collect());
            // In identity an IOVA is a guest-physical address.
            lost.retain(|lost| !guest.is_bar(lost.range.first));
        }
    }
}

/// How many bits the addresses of `space` have.
fn width_of(space: &SpaceKey) -> u8 {
    match space {
        SpaceKey::Paged(PagedSpace { tables: Tables::Second { width, .. }, .. }) => *width,
        SpaceKey::Identity | SpaceKey::Blocked => 64,
    }
}

/// Where a group is.
enum Place {
    /// In this one for as long as it is open.
    ForLife(Arc<Held>),
    /// Attached to this one; to none while it reaches nothing.
    Attached(Option<Arc<Held>>),
}

/// A group of this virtual machine, in its place.
pub(super) struct PlacedGroup {
    id: GroupId,
    pub group: Group,
    host: Arc<dyn HostIommu>,
    counters: Arc<Counters>,
    place: Place,
    /// The space of the guest that it is in.
    pub space: SpaceKey,
    /// Why its functions were stopped.
    pub stopped: Option<String>,
    /// It was said that it is blocked until an attach: a guest could make that happen again and again.
    said_blocked: bool,
}

impl PlacedGroup {
    /// A group without members, which reaches nothing. `counters`: those of its host, if that counts all of its spaces
    /// together.
    pub fn new(id: GroupId, host: Arc<dyn HostIommu>, placement: Placement, counters: Option<Arc<Counters>>) -> Self {
        let counters = counters.unwrap_or_default();
        let place = match placement {
            Placement::PerGroup(space) => {
                let space = HostSpace::new(space, Arc::clone(&host), id.label(), Arc::clone(&counters));
                Place::ForLife(Held::new(space, Arc::clone(&host)))
            }
            Placement::PerSpace => Place::Attached(None),
        };
        let (group, space) = (Group::default(), SpaceKey::Blocked);
        Self { id, group, host, counters, place, space, stopped: None, said_blocked: false }
    }

    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The counters of `host`, if all of its spaces are counted together and this group is one of its.
    pub fn counters_of(&self, host: &Arc<dyn HostIommu>) -> Option<Arc<Counters>> {
        let shared = matches!(self.place, Place::Attached(_)) && Arc::ptr_eq(&self.host, host);
        shared.then(|| Arc::clone(&self.counters))
    }

    /// The space of the host that it is in.
    pub fn held(&self) -> Option<&Arc<Held>> {
        match &self.place {
            Place::ForLife(held) => Some(held),
            Place::Attached(held) => held.as_ref(),
        }
    }

    /// Whether this is the space of the host that it is in.
    pub fn is_in(&self, held: &Arc<Held>) -> bool {
        self.held().is_some_and(|own| Arc::ptr_eq(own, held))
    }

    /// `requester` is a member, which wants nothing to be reachable until it is attached.
    pub fn add(&mut self, requester: Requester) {
        self.group.add(requester);
        if let Some(held) = self.held() {
            held.lock().groups.insert(self.id, self.group.members().collect());
        }
    }
}

impl Bridge {
    /// Brings a group where its members agree to be. `live` is what is mapped in `offered`. With `whole` it ends at the
    /// first mapping that is refused.
    ///
    /// An error is the host's, which could not do it: then the group is blocked.
    pub(super) fn settle(
        &self,
        placed: &mut PlacedGroup,
        offered: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
        whole: bool,
        lost: &mut Vec<Lost>,
        broken: &mut Broken,
    ) -> Result<(), String> {
        let mut space = placed.group.agreed();
        if let Some(why) = placed.held().and_then(|held| held.lock().space.broken().map(str::to_owned)) {
            placed.stopped.get_or_insert(why);
        }
        if placed.stopped.is_some() {
            space = SpaceKey::Blocked;
        }
        if let SpaceKey::Paged(_) = space
            && space != *offered
        {
            // Its mappings are not known here; the next attach brings them. Until then nothing is reachable.
            if !std::mem::replace(&mut placed.said_blocked, true)
                && let Some(member) = placed.group.members().next()
            {
                warn!("the group of {member} stays blocked until one of its functions is attached again");
            }
            space = SpaceKey::Blocked;
        }
        let settled = match &placed.place {
            Place::ForLife(held) => {
                let held = Arc::clone(held);
                self.refill(placed, &held, space, live, whole, lost, broken);
                Ok(())
            }
            Place::Attached(_) if space == SpaceKey::Blocked => {
                self.take_out(placed, broken);
                Ok(())
            }
            Place::Attached(_) => {
                let settled = self.bring_into(placed, space, live, whole, lost, broken);
                if settled.is_err() || placed.stopped.is_some() {
                    space = SpaceKey::Blocked;
                    self.take_out(placed, broken);
                }
                settled
            }
        };
        placed.space = space;
        settled
    }

    /// The host space of a group becomes that of another space.
    #[allow(clippy::too_many_arguments)]
    fn refill(
        &self,
        placed: &mut PlacedGroup,
        held: &Arc<Held>,
        space: SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
        whole: bool,
        lost: &mut Vec<Lost>,
        broken: &mut Broken,
    ) {
        let guest = self.guest.load();
        let mut state = held.lock();
        state.fill(&guest, space, None, live, whole, lost);
        let before = std::mem::replace(&mut state.holds, space);
        self.follow(held, before, space);
        self.note_broken(held, &mut state, broken);
        if let Some(why) = state.space.broken() {
            placed.stopped.get_or_insert(why.to_owned());
        }
    }

    /// A group goes into the host space that there is for `space`, or into a new one, which is whole before it does.
    fn bring_into(
        &self,
        placed: &mut PlacedGroup,
        space: SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
        whole: bool,
        lost: &mut Vec<Lost>,
        broken: &mut Broken,
    ) -> Result<(), String> {
        let there = self.following(&space).iter().find(|held| Arc::ptr_eq(&held.host, &placed.host)).cloned();
        let usable = |held: &Arc<Held>| {
            let state = held.lock();
            state.follows(&space) && !state.retired
        };
        let held = match there.filter(usable) {
            Some(held) => held,
            None => {
                let id = placed.host.create().map_err(|e| format!("the host has no space for it: {e}"))?;
                let host = Arc::clone(&placed.host);
                let host_space = HostSpace::new(id, Arc::clone(&host), space.to_string(), Arc::clone(&placed.counters));
                Held::new(host_space, host)
            }
        };
        let guest = self.guest.load();
        let mut state = held.lock();
        state.fill(&guest, space, Some(placed), live, whole, lost);
        state.holds = space;
        let refused = whole && !lost.is_empty();
        let mut result = Ok(());
        let stays = placed.held().is_some_and(|before| Arc::ptr_eq(before, &held));
        if !refused && !stays && state.space.broken().is_none() {
            result = match placed.host.attach(placed.id, state.space.id()) {
                Ok(()) => {
                    state.groups.insert(placed.id, placed.group.members().collect());
                    Ok(())
                }
                Err(e) => Err(format!("the host could not attach it: {e}")),
            };
        }
        let joined = state.groups.contains_key(&placed.id);
        self.note_broken(&held, &mut state, broken);
        if let Some(why) = state.space.broken() {
            placed.stopped.get_or_insert(why.to_owned());
        } else if joined {
            self.follow(&held, SpaceKey::Blocked, space);
        }
        self.retire_if_empty(&held, &mut state);
        drop(state);
        if joined && !stays {
            let before = std::mem::replace(&mut placed.place, Place::Attached(Some(held)));
            if let Place::Attached(Some(before)) = before {
                self.leave(placed.id, &before);
            }
        }
        result
    }

    /// A group reaches nothing any more.
    fn take_out(&self, placed: &mut PlacedGroup, broken: &mut Broken) {
        let Place::Attached(Some(held)) = &placed.place else { return };
        let held = Arc::clone(held);
        match placed.host.detach(placed.id) {
            Ok(()) => {
                placed.place = Place::Attached(None);
                self.leave(placed.id, &held);
            }
            Err(e) => {
                let mut state = held.lock();
                state.space.break_for(format!("the host could not detach {}: {e}", placed.id.label()));
                self.note_broken(&held, &mut state, broken);
                placed.stopped = state.space.broken().map(str::to_owned);
            }
        }
    }

    fn leave(&self, group: GroupId, held: &Arc<Held>) {
        let mut state = held.lock();
        state.groups.remove(&group);
        self.retire_if_empty(held, &mut state);
    }

    /// A host space that nobody is in goes.
    fn retire_if_empty(&self, held: &Arc<Held>, state: &mut HeldState) {
        if state.groups.is_empty() && !std::mem::replace(&mut state.retired, true) {
            self.follow(held, state.holds, SpaceKey::Blocked);
            held.host.destroy(state.space.id());
            state.space.gone();
        }
    }

    /// What its functions are to be stopped for, if a host call failed of which the books do not know what it did.
    pub(super) fn note_broken(&self, held: &Arc<Held>, state: &mut HeldState, broken: &mut Broken) {
        if let Some(why) = state.space.broken()
            && !state.stopped
        {
            broken.push((state.groups.values().flatten().copied().collect(), why.to_owned()));
            state.stopped = true;
            self.follow(held, state.holds, SpaceKey::Blocked);
        }
    }

    /// The memory behind guest-physical addresses is another from now on: a device that came, moved or went. Groups in
    /// the identity space have what there is when this returns. Of the others, whoever calls this has the units look
    /// ([`vtd::Unit`]): until then they keep what they have.
    pub fn replace_guest_map(&self, guest: GuestMap) {
        self.guest.store(Arc::new(guest));
        let groups: Vec<_> = self.directory().groups.values().cloned().collect();
        let mut broken = Broken::new();
        let mut filled: Vec<Arc<Held>> = Vec::new();
        for placed in groups {
            // A group that was on its way to the identity space with the map before it is there now.
            let placed = placed.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(held) = placed.held() else { continue };
            if filled.iter().any(|other| Arc::ptr_eq(other, held)) {
                continue;
            }
            let mut state = held.lock();
            if state.follows(&SpaceKey::Identity) {
                filled.push(Arc::clone(held));
                let guest = self.guest.load();
                state.fill(&guest, SpaceKey::Identity, None, &mut std::iter::empty(), false, &mut Vec::new());
                self.note_broken(held, &mut state, &mut broken);
            }
        }
        self.stop(&broken);
    }
}
