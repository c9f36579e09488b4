//! A space of the host that the bridge uses: what it holds, for whom, and who is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vtd::{IovaRange, Mapping, PagedSpace, Requester, SpaceKey, Stream, Tables};

use super::dirty::GroupLog;
use super::group::Group;
use super::guest_map::GuestMap;
use super::host_space::{HostSpace, Lost};
use super::ledger::Extent;
use super::pin::book::{Going, Pins};
use super::pin::clear::{HasPins, clear};
use crate::host::{GroupId, HostIommu, HostSpaceId, HostStream};

/// Who is in a space of the host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Occupant {
    /// A group, with its requests that carry no PASID.
    Group(GroupId),
    /// A part of a function: its requests with one PASID (C-4).
    Part(HostStream),
}

impl Occupant {
    pub fn attach(self, host: &dyn HostIommu, space: HostSpaceId) -> io::Result<()> {
        match self {
            Self::Group(group) => host.attach(group, space),
            Self::Part(stream) => host.attach_part(stream, space),
        }
    }

    pub fn detach(self, host: &dyn HostIommu) -> io::Result<()> {
        match self {
            Self::Group(group) => host.detach(group),
            Self::Part(stream) => host.detach_part(stream),
        }
    }

    /// For messages.
    pub fn label(self) -> String {
        match self {
            Self::Group(group) => group.label(),
            Self::Part(stream) => stream.to_string(),
        }
    }
}

/// A space of the host that the bridge uses.
pub(crate) struct Held {
    pub host: Arc<dyn HostIommu>,
    state: Mutex<HeldState>,
}

/// What a space of the host holds, and for whom.
pub(crate) struct HeldState {
    pub space: HostSpace,
    /// The space of the guest that it holds.
    pub holds: SpaceKey,
    /// What the host refused of the identity space, if it holds that: ascending, disjoint. (What is refused of a paged
    /// one its unit forgets.)
    pub refused: Vec<IovaRange>,
    /// Of the identity space: the only function in it when it was filled, whose own BARs are not there.
    pub alone: Option<Requester>,
    /// Who is in it, with the requests of the guest's functions that this is.
    pub occupants: BTreeMap<Occupant, Vec<Stream>>,
    /// What each of them wrote.
    pub logs: BTreeMap<Occupant, Arc<GroupLog>>,
    /// Its functions were stopped, or are about to be.
    pub stopped: bool,
    /// Given back to the host: nobody joins it any more.
    pub retired: bool,
    /// What software devices have pinned of it (D).
    pub pins: Pins,
}

impl Held {
    /// Nobody is in `space` yet.
    pub fn new(space: HostSpace, host: Arc<dyn HostIommu>) -> Arc<Self> {
        let state = HeldState {
            space,
            holds: SpaceKey::Blocked,
            refused: Vec::new(),
            alone: None,
            occupants: BTreeMap::new(),
            logs: BTreeMap::new(),
            stopped: false,
            retired: false,
            pins: Pins::default(),
        };
        Arc::new(Self { host, state: Mutex::new(state) })
    }

    pub fn lock(&self) -> MutexGuard<'_, HeldState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before something goes away: nothing of it is pinned when this returns, and nothing can be until the lock is
    /// given back (D-3). If something was, the lock was given back meanwhile. Who could not be made to let go is to be
    /// stopped, as after an unmap that the host refused.
    pub fn without_pins<'a>(&'a self, state: MutexGuard<'a, HeldState>, going: Going<'_>) -> MutexGuard<'a, HeldState> {
        let (mut state, cut_off) = clear(&self.state, state, going);
        cut_off.into_iter().for_each(|why| state.space.break_for(why));
        state
    }
}

impl HasPins for HeldState {
    fn pins(&mut self) -> &mut Pins {
        &mut self.pins
    }
}

impl HeldState {
    /// Whether changes of `space` are to be made here.
    pub fn follows(&self, space: &SpaceKey) -> bool {
        self.holds == *space && !self.stopped && self.space.broken().is_none()
    }

    /// Whom a refusal names.
    pub fn first_member(&self) -> Option<Stream> {
        self.occupants.values().flatten().min().copied()
    }

    /// Makes it hold exactly what `space` has: `live`, of a paged one. With `whole` it ends at the first mapping that
    /// is refused: the caller has no use for the rest. `joining` is a group that is not in it yet.
    ///
    /// Identity is all RAM, and the BARs of other functions (B-12): a space that one function has alone goes without
    /// its own, which nothing needs there and some hosts refuse. A BAR that the host refuses is counted and said, and
    /// that is all: identity without it is identity (B-10).
    pub fn fill(
        &mut self,
        guest: &GuestMap,
        space: SpaceKey,
        joining: Option<&Group>,
        live: &mut dyn Iterator<Item = Mapping>,
        whole: bool,
        lost: &mut Vec<Lost>,
    ) {
        let target = self.target(guest, space, joining, live, lost);
        self.fill_with(guest, space, &target, whole, lost);
    }

    /// What `space` has, as this host can map it.
    pub fn target(
        &mut self,
        guest: &GuestMap,
        space: SpaceKey,
        joining: Option<&Group>,
        live: &mut dyn Iterator<Item = Mapping>,
        lost: &mut Vec<Lost>,
    ) -> Vec<Extent> {
        let mut target = Vec::new();
        self.space.set_width(width_of(&space));
        match space {
            SpaceKey::Blocked => {}
            SpaceKey::Identity => {
                let there = self.occupants.values().flatten().map(|stream| stream.requester);
                let joining = joining.into_iter().flat_map(Group::members);
                let functions: BTreeSet<Requester> = there.chain(joining).collect();
                self.alone = functions.first().copied().filter(|_| functions.len() == 1);
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
        target
    }

    /// What is pinned and not the same in `target`.
    pub fn going(&self, target: &[Extent]) -> Vec<IovaRange> {
        if self.pins.is_empty() { Vec::new() } else { self.space.ledger().going(target) }
    }

    /// Makes it hold exactly `target`.
    pub fn fill_with(
        &mut self,
        guest: &GuestMap,
        space: SpaceKey,
        target: &[Extent],
        whole: bool,
        lost: &mut Vec<Lost>,
    ) {
        if !whole || lost.is_empty() {
            self.space.switch(guest, target, whole, lost);
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
