//! Which space of the host holds what a space of the guest has, and which groups are in it.
//!
//! ```text
//!   Placement::PerGroup:   group ── for life ──► host space, whose content follows the group
//!   Placement::PerSpace:   group ── attached ──► host space of one space of the guest, whose groups come and go
//! ```

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use log::{error, warn};
use vtd::{Mapping, Requester, SpaceKey, Stream};

use super::dirty::GroupLog;
use super::group::Group;
use super::guest_map::GuestMap;
use super::held::{Held, HeldState, Occupant};
use super::host_space::{HostSpace, Lost};
use super::pin::book::Going;
use super::{Bridge, Broken};
use crate::host::{GroupId, HostIommu, HostStream, Placement};
use crate::stats::Counters;

/// Where a group is.
enum Place {
    /// In this one for as long as it is open.
    ForLife(Arc<Held>),
    /// Attached to this one; to none while it reaches nothing.
    Attached(Option<Arc<Held>>),
}

/// A group of this virtual machine, in its place; or a part of a function, which is a group of its own.
pub(super) struct PlacedGroup {
    who: Occupant,
    pub group: Group,
    host: Arc<dyn HostIommu>,
    counters: Arc<Counters>,
    log: Arc<GroupLog>,
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
        Self::at(Occupant::Group(id), host, place, counters, Arc::default())
    }

    /// A part of a function whose group is `whole`, which reaches nothing. What it writes is in the log of that. `None`
    /// where groups are in their host spaces for life, and so the parts of a function are, too.
    pub fn part_of(whole: &Self, stream: HostStream) -> Option<Self> {
        let Place::Attached(_) = whole.place else { return None };
        let (host, counters) = (Arc::clone(&whole.host), Arc::clone(&whole.counters));
        Some(Self::at(Occupant::Part(stream), host, Place::Attached(None), counters, Arc::clone(&whole.log)))
    }

    fn at(who: Occupant, host: Arc<dyn HostIommu>, place: Place, counters: Arc<Counters>, log: Arc<GroupLog>) -> Self {
        let (group, space) = (Group::default(), SpaceKey::Blocked);
        Self { who, group, host, counters, log, place, space, stopped: None, said_blocked: false }
    }

    /// It is in no space of the host, and was not stopped: nothing is lost if it is forgotten.
    pub fn is_nowhere(&self) -> bool {
        matches!(self.place, Place::Attached(None)) && self.stopped.is_none()
    }

    /// The requests that are in its place.
    fn streams(&self) -> Vec<Stream> {
        let pasid = match self.who {
            Occupant::Group(_) => None,
            Occupant::Part(stream) => stream.pasid,
        };
        self.group.members().map(|requester| Stream { requester, pasid }).collect()
    }

    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    pub fn log(&self) -> &Arc<GroupLog> {
        &self.log
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

    /// The space of the host that its devices pin in, if they are software.
    pub fn software_space(&self) -> Option<&Arc<Held>> {
        self.held().filter(|_| matches!(self.who, Occupant::Group(group) if group.is_software()))
    }

    /// Whether `requester` may pin: not while it is behind no unit.
    pub fn pins_of(&self, requester: Requester, present: bool) {
        if let Some(held) = self.software_space() {
            held.lock().pins.set_present(requester, present);
        }
    }

    /// `requester` is a member, which wants nothing to be reachable until it is attached.
    pub fn add(&mut self, requester: Requester) {
        self.group.add(requester);
        if let Some(held) = self.held() {
            let mut state = held.lock();
            state.occupants.insert(self.who, self.streams());
            state.admit(self.who, &self.log);
        }
    }

    /// `requester` is a member no longer. Whether there are others.
    pub fn remove(&mut self, requester: Requester) -> bool {
        self.group.remove(requester);
        if let Some(held) = self.held() {
            held.lock().occupants.insert(self.who, self.streams());
        }
        self.group.members().next().is_some()
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
        let broken_space = placed.held().and_then(|held| held.lock().space.broken().map(str::to_owned));
        if let Some(why) = broken_space.or_else(|| self.why_stopped(&placed.group)) {
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
        let target = state.target(&guest, space, None, live, lost);
        if !whole || lost.is_empty() {
            let going = state.going(&target);
            state = held.without_pins(state, Going::Ranges(&going));
        }
        state.fill_with(&guest, space, &target, whole, lost);
        let before = std::mem::replace(&mut state.holds, space);
        self.follow(held, before, space);
        self.note_broken(held, &mut state, broken);
        if let Some(why) = state.space.broken() {
            placed.stopped.get_or_insert(why.to_owned());
        }
    }

    /// A device that is behind no unit any more lets go of what it has pinned; others of its group keep theirs (D-4).
    pub(super) fn take_pins_of(&self, placed: &mut PlacedGroup, requester: Requester, broken: &mut Broken) {
        let Some(held) = placed.software_space().cloned() else { return };
        let mut state = held.without_pins(held.lock(), Going::Device(requester));
        self.note_broken(&held, &mut state, broken);
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
        state.fill(&guest, space, Some(&placed.group), live, whole, lost);
        state.holds = space;
        let refused = whole && !lost.is_empty();
        let stays = placed.held().is_some_and(|before| Arc::ptr_eq(before, &held));
        if !refused && !stays && state.space.broken().is_none() {
            state.admit(placed.who, &placed.log);
            match placed.who.attach(&*placed.host, state.space.id()) {
                Ok(()) => {
                    state.occupants.insert(placed.who, placed.streams());
                }
                Err(e) => {
                    drop(state);
                    self.take_back(placed, &held, broken);
                    return Err(format!("the host could not attach it: {e}"));
                }
            };
        }
        let joined = state.occupants.contains_key(&placed.who);
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
                self.leave(placed.who, &before);
            }
        }
        Ok(())
    }

    /// A group that could not be attached to `to` reaches nothing (C-2): neither what it had, nor `to`, where a part of
    /// it may be if the host could not undo what it had begun.
    fn take_back(&self, placed: &mut PlacedGroup, to: &Arc<Held>, broken: &mut Broken) {
        self.detach(placed, broken);
        let mut state = to.lock();
        if placed.stopped.is_some() {
            // It may be there for as long as the host lives.
            state.occupants.insert(placed.who, placed.streams());
        }
        self.retire_if_empty(to, &mut state);
    }

    /// A group that is somewhere reaches nothing any more.
    fn take_out(&self, placed: &mut PlacedGroup, broken: &mut Broken) {
        if placed.held().is_some() {
            self.detach(placed, broken);
        }
    }

    /// The host is asked to let a group reach nothing.
    fn detach(&self, placed: &mut PlacedGroup, broken: &mut Broken) {
        let held = placed.held().cloned();
        let detached = placed.who.detach(&*placed.host);
        let why = |e| format!("the host could not detach {}: {e}", placed.who.label());
        match (detached.map_err(why), held) {
            (Ok(()), held) => {
                placed.place = Place::Attached(None);
                if let Some(held) = held {
                    self.leave(placed.who, &held);
                }
            }
            (Err(why), Some(held)) => {
                let mut state = held.lock();
                state.space.break_for(why);
                self.note_broken(&held, &mut state, broken);
                placed.stopped = state.space.broken().map(str::to_owned);
            }
            (Err(why), None) => {
                error!("{why}");
                broken.push((placed.group.members().collect(), why.clone()));
                placed.stopped = Some(why);
            }
        }
    }

    fn leave(&self, who: Occupant, held: &Arc<Held>) {
        let mut state = held.lock();
        state.dismiss(who);
        state.occupants.remove(&who);
        self.retire_if_empty(held, &mut state);
    }

    /// A host space that nobody is in goes; but not the identity space, so that translation that is turned off is one
    /// attach (B-12).
    fn retire_if_empty(&self, held: &Arc<Held>, state: &mut HeldState) {
        let stays = state.follows(&SpaceKey::Identity)
            && self.following(&SpaceKey::Identity).iter().any(|other| Arc::ptr_eq(other, held));
        if state.occupants.is_empty() && !stays && !std::mem::replace(&mut state.retired, true) {
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
            let functions: BTreeSet<Requester> = state.occupants.values().flatten().map(|of| of.requester).collect();
            if !functions.is_empty() {
                broken.push((functions.into_iter().collect(), why.to_owned()));
            }
            state.stopped = true;
            self.follow(held, state.holds, SpaceKey::Blocked);
        }
    }

    /// The memory behind guest-physical addresses is another from now on: a device that came, moved or went. Groups in
    /// the identity space have what there is when this returns. Of the others, whoever calls this has the units look
    /// ([`vtd::Unit`]): until then they keep what they have.
    pub fn replace_guest_map(&self, guest: GuestMap) {
        self.guest.store(Arc::new(guest));
        let mut broken = Broken::new();
        let mut filled: Vec<Arc<Held>> = Vec::new();
        for placed in self.everyone() {
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
                let (identity, lost) = (SpaceKey::Identity, &mut Vec::new());
                let target = state.target(&guest, identity, None, &mut std::iter::empty(), lost);
                let going = state.going(&target);
                state = held.without_pins(state, Going::Ranges(&going));
                state.fill_with(&guest, identity, &target, false, lost);
                self.note_broken(held, &mut state, &mut broken);
            }
        }
        for held in self.following(&SpaceKey::Identity).iter() {
            let mut state = held.lock();
            // One that nobody is in at the moment.
            if state.occupants.is_empty() && state.follows(&SpaceKey::Identity) {
                let guest = self.guest.load();
                state.fill(&guest, SpaceKey::Identity, None, &mut std::iter::empty(), false, &mut Vec::new());
                self.note_broken(held, &mut state, &mut broken);
                self.retire_if_empty(held, &mut state);
            }
        }
        self.stop(&broken);
    }
}
