//! The spaces that have members, and who is a member of which: one diff path for map, unmap, permission change, domain
//! switch, attach, TE, SRTP and reset.
//!
//! Invalidations are collected first and take effect together, when a wait descriptor or the end of the queue is
//! reached: requesters are looked up again where the context cache was invalidated, then each space is compared with
//! the guest's tables in the ranges that were invalidated.

mod attach;
mod audit;
mod diff;
mod elsewhere;
mod extents;
mod flush;
mod members;
mod memory;
mod renumber;
mod saving;
mod space;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::audit::book::Book;
use crate::dma::iotlb::Iotlb;
use crate::ids::{DomainId, Requester, SourceId};
use crate::listener::{Mapping, RefusalCause};
use crate::range::IovaRange;
use crate::space::{PagedSpace, SpaceKey};

use diff::Shadow;
use flush::Pending;
use members::Member;
use space::{Scratch, Space};

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

/// All spaces of a unit. Stands behind the unit's queue lock.
#[derive(Default)]
pub(crate) struct Spaces {
    members: BTreeMap<Requester, Member>,
    /// By domain id first: an invalidation names nothing else.
    spaces: BTreeMap<(DomainId, PagedSpace), Space>,
    endpoints: Vec<(Requester, Arc<Iotlb>)>,
    /// Their requests are counted.
    counting: bool,
    /// The source ids of functions that do not have the one of their name; `None` for one that has none.
    ids: BTreeMap<Requester, Option<SourceId>>,
    /// Functions whose requests carry the id of somebody else: the bridge that they are behind.
    aliases: BTreeMap<Requester, Requester>,
    pending: Pending,
    /// What a fault record was made for (B-11).
    reported: BTreeSet<(Requester, RefusalCause)>,
    /// While a unit is restored: what the listener was told of spaces before.
    told: BTreeMap<PagedSpace, Vec<Mapping>>,
    /// Members that are about to move.
    leaving: BTreeSet<Requester>,
    /// Of which functions the log has that they are blocked.
    said_blocked: BTreeSet<Requester>,
    scratch: Scratch,
    /// The number of the round: of the drain, or of the command outside a drain. Every descriptor of a drain was given
    /// before it began, so what was looked at once in a round is not looked at again in it: else a full queue would be
    /// as many walks of everything.
    round: u64,
    draining: bool,
    /// How often something was taken away from the host.
    freed: u64,
    /// The round in which all interrupt entries were looked at.
    all_entries_in: u64,
    /// The round in which some of them were looked at last, and how often.
    entry_looks: (u64, u32),
    /// What the last audit found to disagree.
    pub(crate) book: Book,
}

impl Spaces {
    pub(crate) fn views(&self) -> Vec<SpaceView> {
        let view = |space: &Space| SpaceView {
            key: space.key,
            members: space.members.iter().copied().collect(),
            extents: space.shadow().into_iter().flat_map(Shadow::iter).collect(),
            blocked: space.shadow().is_none(),
        };
        self.spaces.values().map(view).collect()
    }

    /// Of each space: its members, and how many extents it has; `None` where a bound has blocked it.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (PagedSpace, &BTreeSet<Requester>, Option<usize>)> {
        self.spaces.values().map(|space| (space.key, &space.members, space.shadow().map(Shadow::len)))
    }

    /// What each function is attached to.
    pub(crate) fn attachments(&self) -> Vec<(Requester, SpaceKey)> {
        self.members.iter().map(|(requester, member)| (*requester, member.attached)).collect()
    }

    pub(crate) fn is_member(&self, space: PagedSpace, requester: Requester) -> bool {
        self.spaces.get(&(space.domain, space)).is_some_and(|space| space.members.contains(&requester))
    }

    /// The spaces that no bound has blocked, with their shadows.
    pub(crate) fn open_shadows(&self) -> impl Iterator<Item = (PagedSpace, impl Iterator<Item = Mapping> + '_)> + '_ {
        self.spaces.values().filter_map(|space| Some((space.key, space.shadow()?.iter())))
    }

    /// The part of a space's shadow in `range`, unless a bound has blocked the space.
    pub(crate) fn open_shadow(
        &self,
        space: PagedSpace,
        range: IovaRange,
    ) -> Option<impl Iterator<Item = Mapping> + '_> {
        let shadow = self.spaces.get(&(space.domain, space))?.shadow()?;
        Some(shadow.part(range))
    }

    /// A shadow that says something else than its listener was told: what an audit is there to find.
    #[cfg(test)]
    pub(crate) fn falsify(&mut self, range: IovaRange) {
        self.spaces.values_mut().for_each(|space| space.falsify(range));
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

    /// Whether requests of emulated functions are counted from now on.
    pub(crate) fn set_counting(&mut self, counting: bool) {
        self.counting = counting;
        self.endpoints.iter().for_each(|(_, iotlb)| iotlb.set_counting(counting));
    }

    /// Forgets which refusals the guest was told of.
    pub(crate) fn forget_reports(&mut self) {
        self.reported.clear();
        self.said_blocked.clear();
    }
}
