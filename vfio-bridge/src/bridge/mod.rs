//! The bridge: hears what changes in the spaces of the units, and makes the host hold exactly that.
//!
//! ```text
//!   requester ──► group ──► container ──► ledger ──► host operations
//!                   │ agreed space (C-3)     ▲
//!   space  ─────────┘ fans out to the containers of its groups
//! ```
//!
//! A mapping of a paged space is real for all of its groups or for none: the unit forgets a mapping that is refused, so
//! it must not stay in the container of a group whose host took it. For the same reason a group that joins a space of
//! others joins it with all of its mappings or not at all: then it is blocked, and the others are not touched.
//!
//! Locks: one, around what the containers hold. It is not held while functions are quarantined. Statistics are read
//! without it.

mod audit;
mod container;
pub(crate) mod group;
pub(crate) mod guest_map;
pub mod ledger;
pub(crate) mod limits;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use log::{error, warn};
use vtd::{
    Applied, AttachRefused, IovaRange, MapOp, Mapping, Pasid, Refusal, Requester, SpaceKey, SpaceListener, Stream,
};

use self::container::{Container, Lost};
use self::group::Group;
use self::guest_map::GuestMap;
use self::ledger::Extent;
use crate::host::{GroupId, HostIommu};
use crate::stats::{Counters, DeviceStats};

/// Maps of a batch that are resolved before the host is asked: a batch can be as long as a shadow.
const MAPS_AT_ONCE: usize = 1024;

/// Stops functions whose mappings the host did not take away (B-11). Called without a lock held, before the unit tells
/// the guest that its invalidation is complete.
pub trait Quarantine: Send + Sync {
    /// Stops `functions`: Bus Master off, then reset or detach. After `Ok` none of them does DMA any more.
    fn quarantine(&self, functions: &[Requester], why: &str) -> Result<(), String>;

    /// Stops the virtual machine, because `functions` could not be stopped. When it returns, no vCPU runs guest code
    /// again.
    fn stop_machine(&self, functions: &[Requester], why: &str);
}

/// Why a function could not be registered.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RegisterError {
    /// The requester is registered already, with this group.
    #[error("{0} is registered already, with host group {1}")]
    Busy(Requester, GroupId),
    /// The backend has no container for the group.
    #[error("host group {0} is not open")]
    NotOpen(GroupId),
}

/// A group of this virtual machine.
struct Entry {
    group: Group,
    container: Container,
    /// The space that the container holds.
    space: SpaceKey,
    /// What the host refused of the identity space that it is in: ascending, disjoint. (What is refused of a paged one
    /// its unit forgets.)
    refused: Vec<IovaRange>,
    /// Its functions were stopped, or are about to be.
    quarantined: bool,
    /// It was said that it is blocked until an attach: a guest could make that happen again and again.
    told: bool,
}

impl Entry {
    fn first_member(&self) -> Option<Requester> {
        self.group.members().next()
    }

    fn follows(&self, space: &SpaceKey) -> bool {
        self.space == *space && !self.quarantined && self.container.broken().is_none()
    }
}

#[derive(Default)]
struct State {
    groups: BTreeMap<GroupId, Entry>,
    requesters: BTreeMap<Requester, GroupId>,
}

/// Functions to stop, and why.
type Broken = Vec<(Vec<Requester>, String)>;

impl State {
    fn following(&mut self, space: &SpaceKey) -> impl Iterator<Item = (GroupId, &mut Entry)> {
        self.groups.iter_mut().filter(|(_, e)| e.follows(space)).map(|(id, e)| (*id, e))
    }

    /// Groups whose container broke and whose functions nobody stopped yet.
    fn newly_broken(&mut self) -> Broken {
        let mut broken = Vec::new();
        for entry in self.groups.values_mut().filter(|e| !e.quarantined) {
            if let Some(why) = entry.container.broken() {
                broken.push((entry.group.members().collect(), why.to_owned()));
                entry.quarantined = true;
            }
        }
        broken
    }
}

/// The listener that makes the host hold what the units say.
pub struct Bridge {
    host: Arc<dyn HostIommu>,
    guest: GuestMap,
    quarantine: Arc<dyn Quarantine>,
    state: Mutex<State>,
    /// By function, with the name of its backend.
    counters: RwLock<BTreeMap<Requester, (&'static str, Arc<Counters>)>>,
}

impl Bridge {
    /// A bridge from `host` to the memory in `guest`. No function is behind it until [`Bridge::register`].
    pub fn new(host: Arc<dyn HostIommu>, guest: GuestMap, quarantine: Arc<dyn Quarantine>) -> Self {
        Self { host, guest, quarantine, state: Mutex::default(), counters: RwLock::default() }
    }

    /// Puts a function of host group `group` behind the bridge. It reaches nothing until the unit attaches it, and
    /// neither does its group (C-3).
    pub fn register(&self, requester: Requester, group: GroupId) -> Result<(), RegisterError> {
        let container = self.host.container(group).ok_or(RegisterError::NotOpen(group))?;
        let backend = self.host.name(container);
        let mut state = self.state();
        if let Some(other) = state.requesters.get(&requester) {
            return Err(RegisterError::Busy(requester, *other));
        }
        let entry = state.groups.entry(group).or_insert_with(|| Entry {
            group: Group::default(),
            container: Container::new(container, group, Arc::clone(&self.host)),
            space: SpaceKey::Blocked,
            refused: Vec::new(),
            quarantined: false,
            told: false,
        });
        entry.group.add(requester);
        let counters = Arc::clone(entry.container.counters());
        self.settle(entry, &SpaceKey::Blocked, &mut std::iter::empty(), false, &mut Vec::new());
        state.requesters.insert(requester, group);
        let broken = state.newly_broken();
        drop(state);
        self.counters.write().unwrap_or_else(PoisonError::into_inner).insert(requester, (backend, counters));
        self.stop(&broken);
        Ok(())
    }

    /// The name of `requester`'s backend, as statistics show it; `None` when it is not registered.
    pub fn backend(&self, requester: Requester) -> Option<&'static str> {
        self.counters.read().unwrap_or_else(PoisonError::into_inner).get(&requester).map(|(backend, _)| *backend)
    }

    /// Counters of `requester`, `None` when it is not registered. Never waits for a host operation.
    pub fn stats(&self, requester: Requester) -> Option<DeviceStats> {
        let counters = self.counters.read().unwrap_or_else(PoisonError::into_inner);
        counters.get(&requester).map(|(_, counters)| counters.snapshot())
    }

    /// The space that `requester`'s group is in (C-2): [`SpaceKey::Blocked`] while its members disagree.
    pub fn space_of(&self, requester: Requester) -> Option<SpaceKey> {
        let state = self.state();
        state.requesters.get(&requester).and_then(|id| state.groups.get(id)).map(|e| e.space)
    }

    /// What the host holds for `requester`'s group according to the ledger, in ascending order.
    pub fn holds(&self, requester: Requester) -> Vec<Extent> {
        let state = self.state();
        let entry = state.requesters.get(&requester).and_then(|id| state.groups.get(id));
        entry.map_or_else(Vec::new, |e| e.container.ledger().extents().copied().collect())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the container of `entry` hold the space that its members agree on. `live` is what is mapped in `offered`.
    /// With `whole` it ends at the first mapping that is refused: the caller has no use for the rest.
    fn settle(
        &self,
        entry: &mut Entry,
        offered: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
        whole: bool,
        lost: &mut Vec<Lost>,
    ) {
        let mut space = entry.group.agreed();
        if entry.quarantined || entry.container.broken().is_some() {
            space = SpaceKey::Blocked;
        }
        if let SpaceKey::Paged(_) = space
            && space != *offered
        {
            // Its mappings are not known here; the next attach brings them. Until then nothing is reachable.
            if !std::mem::replace(&mut entry.told, true)
                && let Some(member) = entry.first_member()
            {
                warn!("the group of {member} stays blocked until one of its functions is attached again");
            }
            space = SpaceKey::Blocked;
        }
        let container = &mut entry.container;
        let mut target = Vec::new();
        match space {
            SpaceKey::Blocked => {}
            SpaceKey::Identity => {
                for mapping in self.identity() {
                    target.extend(container.resolve(&self.guest, &mapping, lost));
                }
            }
            SpaceKey::Paged(_) => {
                for mapping in live {
                    target.extend(container.resolve(&self.guest, &mapping, lost));
                }
            }
        }
        if !whole || lost.is_empty() {
            container.switch(&self.guest, &target, whole, lost);
        }
        let of_identity = lost.iter().filter(|_| space == SpaceKey::Identity);
        entry.refused = IovaRange::union_of(of_identity.map(|lost| lost.range).collect());
        entry.space = space;
    }

    /// Blocks `requester`, and so its group, after an attach that could not be completed (C-2).
    fn keep_out(&self, state: &mut State, id: GroupId, requester: Requester) {
        if let Some(entry) = state.groups.get_mut(&id) {
            entry.group.set(requester, Some(SpaceKey::Blocked));
            self.settle(entry, &SpaceKey::Blocked, &mut std::iter::empty(), false, &mut Vec::new());
        }
    }

    /// All guest RAM at its guest-physical addresses.
    fn identity(&self) -> impl Iterator<Item = Mapping> {
        self.guest.regions().iter().map(|region| Mapping {
            iova: vtd::Iova(region.gpa()),
            gpa: vtd::Gpa(region.gpa()),
            len: region.size(),
            perm: vtd::Perm::ReadWrite,
        })
    }

    /// Takes what one group of a paged space lost away from the others, and says what became of it.
    fn level(&self, state: &mut State, space: &SpaceKey, by: Requester, mut lost: Vec<Lost>) -> Vec<Refusal> {
        let mut refused = Vec::with_capacity(lost.len());
        while !lost.is_empty() {
            refused.extend(lost.iter().map(|l| refusal(l, by)));
            let ranges = IovaRange::union_of(lost.iter().map(|l| l.range).collect());
            lost = Vec::new();
            if let SpaceKey::Paged(_) = space {
                for (_, entry) in state.following(space) {
                    entry.container.unmap(&self.guest, &ranges, &mut lost);
                }
            }
        }
        refused
    }

    /// Stops the functions of groups whose host did not unmap.
    fn stop(&self, broken: &Broken) {
        for (functions, why) in broken {
            if let Err(failed) = self.quarantine.quarantine(functions, why) {
                error!("{functions:?} could not be stopped: {failed}");
                self.quarantine.stop_machine(functions, why);
            }
        }
    }
}

/// Whether one of `ranges` (ascending, disjoint) has all of `inner`.
fn contains(ranges: &[IovaRange], inner: IovaRange) -> bool {
    let at = ranges.partition_point(|range| range.last < inner.first);
    ranges.get(at).is_some_and(|range| range.first <= inner.first && inner.last <= range.last)
}

fn refusal(lost: &Lost, requester: Requester) -> Refusal {
    Refusal { range: lost.range, cause: lost.cause, stream: requester.into() }
}

impl SpaceListener for Bridge {
    fn attach(
        &self,
        stream: Stream,
        space: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        let Stream { requester, pasid } = stream;
        let host = |reason: String| AttachRefused::Host { requester, reason };
        if let Some(Pasid(pasid)) = pasid {
            return Err(host(format!("PASID {pasid:#x} cannot be attached")));
        }
        let mut state = self.state();
        let id = *state.requesters.get(&requester).ok_or(AttachRefused::UnknownRequester(requester))?;
        let shared = matches!(space, SpaceKey::Paged(_)) && state.following(space).any(|(other, _)| other != id);
        let entry = state.groups.get_mut(&id).ok_or(AttachRefused::UnknownRequester(requester))?;
        entry.group.set(requester, Some(*space));
        let mut lost = Vec::new();
        self.settle(entry, space, live, shared, &mut lost);
        let refused = lost.iter().map(|l| refusal(l, requester)).collect::<Vec<_>>();
        if shared && !refused.is_empty() {
            // The others keep what they have, so this group cannot be there with less (as Linux: a group joins a
            // container with all of its mappings or not at all).
            self.keep_out(&mut state, id, requester);
            let broken = state.newly_broken();
            drop(state);
            self.stop(&broken);
            return Err(AttachRefused::Shared(refused));
        }
        let broken = state.newly_broken();
        let stopped = state.groups.get(&id).filter(|e| e.quarantined).and_then(|e| e.container.broken());
        let stopped = stopped.map(str::to_owned);
        drop(state);
        self.stop(&broken);
        match stopped {
            Some(why) => Err(host(format!("its functions were stopped: {why}"))),
            None if refused.is_empty() => Ok(()),
            None => Err(AttachRefused::Partial(refused)),
        }
    }

    fn detach(&self, Stream { requester, pasid }: Stream) {
        if pasid.is_some() {
            return;
        }
        let mut state = self.state();
        let Some(id) = state.requesters.get(&requester).copied() else {
            return;
        };
        if let Some(entry) = state.groups.get_mut(&id) {
            entry.group.set(requester, None);
            let offered = entry.space;
            if entry.group.agreed() != offered {
                self.settle(entry, &SpaceKey::Blocked, &mut std::iter::empty(), false, &mut Vec::new());
            }
        }
        let broken = state.newly_broken();
        drop(state);
        self.stop(&broken);
    }

    fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied {
        let mut state = self.state();
        let mut refused = Vec::new();
        // The unit sends unmaps before maps, so this is one turn; any other order is served as it stands.
        for batch in ops.chunk_by(|a, b| !(matches!(a, MapOp::Map(_)) && matches!(b, MapOp::Unmap(_)))) {
            let maps = batch.partition_point(|op| matches!(op, MapOp::Unmap(_)));
            let (unmaps, maps) = batch.split_at(maps);
            self.apply_unmaps(&mut state, space, unmaps, &mut refused);
            self.apply_maps(&mut state, space, maps, &mut refused);
        }
        let broken = state.newly_broken();
        drop(state);
        self.stop(&broken);
        Applied { refused }
    }
}

impl Bridge {
    fn apply_unmaps(&self, state: &mut State, space: &SpaceKey, ops: &[MapOp], refused: &mut Vec<Refusal>) {
        let ranges = ops.iter().filter_map(|op| match op {
            MapOp::Unmap(range) if range.first <= range.last => Some(*range),
            _ => None,
        });
        let ranges = IovaRange::union_of(ranges.collect());
        if ranges.is_empty() {
            return;
        }
        let mut losses = Vec::new();
        for (_, entry) in state.following(space) {
            let mut lost = Vec::new();
            entry.container.unmap(&self.guest, &ranges, &mut lost);
            losses.extend(entry.first_member().map(|by| (by, lost)));
        }
        for (by, lost) in losses {
            refused.extend(self.level(state, space, by, lost));
        }
    }

    fn apply_maps(&self, state: &mut State, space: &SpaceKey, ops: &[MapOp], refused: &mut Vec<Refusal>) {
        let mut losses: Vec<(Requester, Vec<Lost>)> = Vec::new();
        let mut except = Vec::new();
        for (_, entry) in state.following(space) {
            let mut lost = Vec::new();
            for ops in ops.chunks(MAPS_AT_ONCE) {
                let mut extents = Vec::with_capacity(ops.len());
                for op in ops {
                    if let MapOp::Map(mapping) = op {
                        extents.extend(entry.container.resolve(&self.guest, mapping, &mut lost));
                    }
                }
                entry.container.map(&self.guest, &extents, &except, &mut lost);
            }
            // What an earlier group lost is lost already.
            lost.retain(|l| !contains(&except, l.range));
            except = IovaRange::union_of(except.into_iter().chain(lost.iter().map(|l| l.range)).collect());
            losses.extend(entry.first_member().map(|by| (by, lost)));
        }
        for (by, lost) in losses {
            refused.extend(self.level(state, space, by, lost));
        }
    }
}
