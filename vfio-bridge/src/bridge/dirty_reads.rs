//! Dirty tracking of functions: who is tracked, and what they wrote (E-1, E-4).

use std::sync::{Arc, Mutex};

use vtd::{IovaRange, Requester};

use super::dirty::{DirtyPages, DirtyRace, GroupLog};
use super::guest_map::{GuestMap, MemKind};
use super::placement::{HeldState, Occupant, PlacedGroup};
use super::{Bridge, lock};
use crate::host::dirty::DirtyKnowledge;

/// Why nothing can be said.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DirtyError {
    /// The bridge does not know it.
    #[error("{0} is not behind the bridge")]
    Unknown(Requester),
    /// It was not asked for.
    #[error("what {0} writes is not tracked: start that first")]
    NotTracked(Requester),
    /// It was not asked for.
    #[error("what devices write is not tracked: start that first")]
    Off,
}

/// What was written since the last read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DirtyRead {
    /// Pages of RAM.
    pub pages: DirtyPages,
    /// How that is known, by function. Functions of one host group, and of one space of a host that attaches groups to
    /// spaces, cannot be told apart: what one wrote is what all wrote.
    pub known: Vec<(Requester, DirtyKnowledge)>,
}

impl HeldState {
    /// The group of `log` is about to come in. What it writes is tracked before it does.
    pub(super) fn admit(&mut self, who: Occupant, log: &Arc<GroupLog>) {
        if !self.logs.contains_key(&who) {
            // What others wrote is not its.
            self.collect_dirty();
            self.logs.insert(who, Arc::clone(log));
        }
        self.track();
    }

    /// It went: what it wrote here is in its log.
    pub(super) fn dismiss(&mut self, who: Occupant) {
        self.collect_dirty();
        self.logs.remove(&who);
        self.track();
    }

    /// Has the host track if one of the groups is tracked, and only then.
    fn track(&mut self) {
        let races = || self.logs.values().filter_map(|log| log.race());
        let wanted = races().next().is_some();
        self.space.track(wanted.then(|| races().any(|race| race == DirtyRace::Closed)));
    }

    /// What is dirty goes to the logs.
    fn collect_dirty(&mut self) {
        if let Some(found) = self.space.read_dirty() {
            self.logs.values().for_each(|log| log.add(&found));
        }
    }
}

impl Bridge {
    /// What the functions of a group write, also with a PASID, is tracked from now on.
    pub(super) fn start_dirty(&self, placed: &PlacedGroup, race: DirtyRace) {
        placed.log().start(race);
        self.each_place(placed, |state| {
            // What others wrote before is not its.
            state.collect_dirty();
            state.track();
        });
        placed.log().take();
    }

    /// Each host space that requests of the group's functions are in.
    fn each_place(&self, placed: &PlacedGroup, mut what: impl FnMut(&mut HeldState)) {
        if let Some(held) = placed.held() {
            what(&mut held.lock());
        }
        for part in self.parts_of(&placed.group) {
            if let Some(held) = lock(&part).held() {
                what(&mut held.lock());
            }
        }
    }

    /// Starts to track what functions write: `device`, with all of its group, or all that there are and that come.
    /// What is tracked already goes on, and may change what it does about the race. Gives back how it will be known.
    ///
    /// While functions are tracked, unmaps cost more: by extents, and with a bitmap each.
    pub fn dirty_start(
        &self,
        device: Option<Requester>,
        race: DirtyRace,
    ) -> Result<Vec<(Requester, DirtyKnowledge)>, DirtyError> {
        if device.is_none() {
            self.dirty_all.set(Some(race));
        }
        let mut known = Vec::new();
        for placed in self.tracked(device)? {
            let placed = lock(&placed);
            let fresh = placed.log().race().is_none();
            if fresh {
                self.start_dirty(&placed, race);
            } else {
                placed.log().start(race);
            }
            let mut knowledge = None;
            self.each_place(&placed, |state| {
                state.track();
                knowledge = knowledge.max(state.space.dirty_knowledge());
            });
            // One that is attached to no space of the host is asked when it is.
            known.extend(placed.group.members().map(|member| (member, knowledge.unwrap_or_default())));
        }
        Ok(known)
    }

    /// What was written since the last read, or since the start: by `device`, with all of its group, or by all
    /// functions that are tracked. What is given back is clean again.
    ///
    /// A write that a device makes meanwhile is in this result or in the next one. What is unmapped meanwhile is in
    /// one of them, too; of the moment of an unmap see [`DirtyRace`].
    pub fn dirty_read(&self, device: Option<Requester>) -> Result<DirtyRead, DirtyError> {
        let mut read = DirtyRead::default();
        for placed in self.tracked(device)? {
            let placed = lock(&placed);
            self.each_place(&placed, HeldState::collect_dirty);
            match (placed.log().take(), device) {
                (Some(found), _) => {
                    read.pages.merge(&found.pages);
                    read.known.extend(placed.group.members().map(|member| (member, found.knowledge)));
                }
                (None, Some(device)) => return Err(DirtyError::NotTracked(device)),
                (None, None) => {}
            }
        }
        if device.is_none() && read.known.is_empty() && self.dirty_all.get().is_none() {
            return Err(DirtyError::Off);
        }
        let guest = self.guest.load();
        read.pages = read.pages.within(ram(&guest));
        Ok(read)
    }

    /// Stops it, and forgets what was not read.
    pub fn dirty_stop(&self, device: Option<Requester>) -> Result<(), DirtyError> {
        if device.is_none() {
            self.dirty_all.set(None);
        }
        for placed in self.tracked(device)? {
            let placed = lock(&placed);
            placed.log().stop();
            self.each_place(&placed, HeldState::track);
        }
        Ok(())
    }

    /// The group of `device`, or all.
    fn tracked(&self, device: Option<Requester>) -> Result<Vec<Arc<Mutex<PlacedGroup>>>, DirtyError> {
        match device {
            Some(device) => Ok(vec![self.group_of(device).ok_or(DirtyError::Unknown(device))?]),
            None => Ok(self.directory().groups.values().cloned().collect()),
        }
    }
}

/// What of `guest` is RAM.
fn ram(guest: &GuestMap) -> impl Iterator<Item = IovaRange> {
    let regions = guest.regions().iter().filter_map(|region| guest.host_mem(region.gpa(), region.size()));
    let ram = regions.filter(|mem| mem.kind() == MemKind::Ram);
    ram.map(|mem| IovaRange { first: mem.gpa(), last: mem.gpa() + (mem.size() - 1) })
}
