//! The bridge: hears what changes in the spaces of the units, and makes the host hold exactly that.
//!
//! ```text
//!   requester ──► group ──► host space ──► ledger ──► host operations
//!                   │ agreed space (C-3)     ▲
//!   space  ─────────┘ fans out to the host spaces of its groups
//! ```
//!
//! A mapping of a paged space is real for all of its groups or for none: the unit forgets a mapping that is refused, so
//! it must not stay in the host space of a group whose host took it. For the same reason a group that joins a space of
//! others joins it with all of its mappings or not at all: then it is blocked, and the others are not touched.
//!
//! Locks, in this order: a group, from the beginning of its move to its end; a host space, around what it holds and
//! around the host's calls for it; the directory, which says who is where, for a few instructions. So a change of one
//! space waits for no host call of another. None is held while functions are quarantined. Statistics are read without
//! the first two.

mod audit;
pub(crate) mod dirty;
pub(crate) mod dirty_reads;
pub(crate) mod group;
pub(crate) mod guest_map;
mod host_space;
pub mod ledger;
pub(crate) mod limits;
mod placement;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use arc_swap::ArcSwap;
use log::error;
use vtd::{
    Applied, AttachRefused, IovaRange, MapOp, Mapping, Pasid, Refusal, Requester, SpaceKey, SpaceListener, Stream,
};

use self::guest_map::GuestMap;
use self::host_space::Lost;
use self::ledger::Extent;
use self::placement::{Held, PlacedGroup};
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
    /// No host has the group open.
    #[error("host group {0} is not open")]
    NotOpen(GroupId),
}

/// Functions to stop, and why.
type Broken = Vec<(Vec<Requester>, String)>;

/// Who is where.
#[derive(Default)]
struct Directory {
    requesters: BTreeMap<Requester, GroupId>,
    groups: BTreeMap<GroupId, Arc<Mutex<PlacedGroup>>>,
    /// The host spaces that hold a space of the guest.
    following: BTreeMap<SpaceKey, Arc<[Arc<Held>]>>,
    /// By function, with the name of its backend.
    counters: BTreeMap<Requester, (&'static str, Arc<Counters>)>,
}

/// The listener that makes the host hold what the units say.
pub struct Bridge {
    hosts: Vec<Arc<dyn HostIommu>>,
    guest: ArcSwap<GuestMap>,
    quarantine: Arc<dyn Quarantine>,
    directory: RwLock<Directory>,
    dirty_all: dirty::All,
}

impl Bridge {
    /// A bridge from `hosts`, no group of which is in two, to the memory in `guest`. No function is behind it until
    /// [`Bridge::register`].
    pub fn new(hosts: Vec<Arc<dyn HostIommu>>, guest: GuestMap, quarantine: Arc<dyn Quarantine>) -> Self {
        let (guest, directory) = (ArcSwap::from_pointee(guest), RwLock::default());
        Self { hosts, guest, quarantine, directory, dirty_all: dirty::All::default() }
    }

    /// Puts a function of host group `group` behind the bridge. It reaches nothing until the unit attaches it, and
    /// neither does its group (C-3).
    pub fn register(&self, requester: Requester, group: GroupId) -> Result<(), RegisterError> {
        let open = self.hosts.iter().find_map(|host| Some((host, host.placement(group)?)));
        let (host, placement) = open.ok_or(RegisterError::NotOpen(group))?;
        let groups = self.directory().groups.clone();
        // The host is asked what it allows without the directory.
        let placed = groups.get(&group).cloned().unwrap_or_else(|| {
            let counters = groups.values().find_map(|placed| lock(placed).counters_of(host));
            Arc::new(Mutex::new(PlacedGroup::new(group, Arc::clone(host), placement, counters)))
        });
        let placed = {
            let mut directory = self.directory_mut();
            if let Some(other) = directory.requesters.get(&requester) {
                return Err(RegisterError::Busy(requester, *other));
            }
            directory.requesters.insert(requester, group);
            Arc::clone(directory.groups.entry(group).or_insert(placed))
        };
        let mut placed = lock(&placed);
        placed.add(requester);
        if let Some(race) = self.dirty_all.get() {
            placed.start_dirty(race);
        }
        let counters = (host.name(), Arc::clone(placed.counters()));
        self.directory_mut().counters.insert(requester, counters);
        let mut broken = Broken::new();
        self.block(&mut placed, &mut broken);
        drop(placed);
        self.stop(&broken);
        Ok(())
    }

    /// The name of `requester`'s backend, as statistics show it; `None` when it is not registered.
    pub fn backend(&self, requester: Requester) -> Option<&'static str> {
        self.directory().counters.get(&requester).map(|(backend, _)| *backend)
    }

    /// Counters of `requester`, `None` when it is not registered. Never waits for a host operation.
    pub fn stats(&self, requester: Requester) -> Option<DeviceStats> {
        self.directory().counters.get(&requester).map(|(_, counters)| counters.snapshot())
    }

    /// The space that `requester`'s group is in (C-2): [`SpaceKey::Blocked`] while its members disagree.
    pub fn space_of(&self, requester: Requester) -> Option<SpaceKey> {
        self.group_of(requester).map(|placed| lock(&placed).space)
    }

    /// What the host holds for `requester`'s group according to the ledger, in ascending order.
    pub fn holds(&self, requester: Requester) -> Vec<Extent> {
        let placed = self.group_of(requester);
        let held = placed.and_then(|placed| lock(&placed).held().cloned());
        held.map_or_else(Vec::new, |held| held.lock().space.ledger().extents().copied().collect())
    }

    fn directory(&self) -> RwLockReadGuard<'_, Directory> {
        self.directory.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn directory_mut(&self) -> RwLockWriteGuard<'_, Directory> {
        self.directory.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn group_of(&self, requester: Requester) -> Option<Arc<Mutex<PlacedGroup>>> {
        let directory = self.directory();
        directory.requesters.get(&requester).and_then(|group| directory.groups.get(group)).cloned()
    }

    /// The host spaces that hold `space`.
    fn following(&self, space: &SpaceKey) -> Arc<[Arc<Held>]> {
        self.directory().following.get(space).cloned().unwrap_or_default()
    }

    /// `held` held `before`, and holds `now`.
    fn follow(&self, held: &Arc<Held>, before: SpaceKey, now: SpaceKey) {
        let mut directory = self.directory_mut();
        let without = |list: Option<&Arc<[Arc<Held>]>>| -> Vec<Arc<Held>> {
            list.into_iter().flat_map(|list| list.iter()).filter(|other| !Arc::ptr_eq(other, held)).cloned().collect()
        };
        let rest = without(directory.following.get(&before));
        if rest.is_empty() {
            directory.following.remove(&before);
        } else {
            directory.following.insert(before, rest.into());
        }
        if now != SpaceKey::Blocked {
            let mut list = without(directory.following.get(&now));
            list.push(Arc::clone(held));
            directory.following.insert(now, list.into());
        }
    }

    /// A group reaches nothing, unless its members agree on something that is known without a unit.
    fn block(&self, placed: &mut PlacedGroup, broken: &mut Broken) {
        let nothing = &mut std::iter::empty();
        if let Err(why) = self.settle(placed, &SpaceKey::Blocked, nothing, false, &mut Vec::new(), broken) {
            error!("{why}");
        }
    }

    /// Takes what one host space lost away from the others that hold the same, and says what became of it.
    fn level(
        &self,
        held: &[Arc<Held>],
        space: &SpaceKey,
        lost: Vec<(Requester, Vec<Lost>)>,
        broken: &mut Broken,
    ) -> Vec<Refusal> {
        let mut refused = Vec::new();
        for (by, mut lost) in lost {
            while !lost.is_empty() {
                refused.extend(lost.iter().map(|l| refusal(l, by)));
                let ranges = IovaRange::union_of(lost.iter().map(|l| l.range).collect());
                lost = Vec::new();
                if let SpaceKey::Paged(_) = space {
                    self.each(held, space, broken, |state, guest| state.space.unmap(guest, &ranges, &mut lost));
                }
            }
        }
        refused
    }

    /// Does something to each of `held` that still holds `space`, one after the other.
    fn each(
        &self,
        held: &[Arc<Held>],
        space: &SpaceKey,
        broken: &mut Broken,
        mut change: impl FnMut(&mut placement::HeldState, &GuestMap),
    ) {
        let guest = self.guest.load();
        for held in held {
            let mut state = held.lock();
            if state.follows(space) {
                change(&mut state, &guest);
                self.note_broken(held, &mut state, broken);
            }
        }
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

    fn apply_unmaps(
        &self,
        held: &[Arc<Held>],
        space: &SpaceKey,
        ops: &[MapOp],
        refused: &mut Vec<Refusal>,
        broken: &mut Broken,
    ) {
        let ranges = ops.iter().filter_map(|op| match op {
            MapOp::Unmap(range) if range.first <= range.last => Some(*range),
            _ => None,
        });
        let ranges = IovaRange::union_of(ranges.collect());
        if ranges.is_empty() {
            return;
        }
        let mut losses = Vec::new();
        self.each(held, space, broken, |state, guest| {
            let mut lost = Vec::new();
            state.space.unmap(guest, &ranges, &mut lost);
            losses.extend(state.first_member().map(|by| (by, lost)));
        });
        refused.extend(self.level(held, space, losses, broken));
    }

    fn apply_maps(
        &self,
        held: &[Arc<Held>],
        space: &SpaceKey,
        ops: &[MapOp],
        refused: &mut Vec<Refusal>,
        broken: &mut Broken,
    ) {
        let mut losses: Vec<(Requester, Vec<Lost>)> = Vec::new();
        let mut except = Vec::new();
        self.each(held, space, broken, |state, guest| {
            let mut lost = Vec::new();
            for ops in ops.chunks(MAPS_AT_ONCE) {
                let mut extents = Vec::with_capacity(ops.len());
                for op in ops {
                    if let MapOp::Map(mapping) = op {
                        extents.extend(state.space.resolve(guest, mapping, &mut lost));
                    }
                }
                state.space.map(guest, &extents, &except, &mut lost);
            }
            // What an earlier one lost is lost already.
            lost.retain(|l| !contains(&except, l.range));
            except = IovaRange::union_of(except.drain(..).chain(lost.iter().map(|l| l.range)).collect());
            losses.extend(state.first_member().map(|by| (by, lost)));
        });
        refused.extend(self.level(held, space, losses, broken));
    }
}

fn lock(placed: &Mutex<PlacedGroup>) -> MutexGuard<'_, PlacedGroup> {
    placed.lock().unwrap_or_else(PoisonError::into_inner)
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
        let placed = self.group_of(requester).ok_or(AttachRefused::UnknownRequester(requester))?;
        let mut placed = lock(&placed);
        let paged = matches!(space, SpaceKey::Paged(_));
        let shared = paged && self.following(space).iter().any(|held| !placed.is_in(held));
        placed.group.set(requester, Some(*space));
        let (mut lost, mut broken) = (Vec::new(), Broken::new());
        let settled = self.settle(&mut placed, space, live, shared, &mut lost, &mut broken);
        let refused = lost.iter().map(|l| refusal(l, requester)).collect::<Vec<_>>();
        let stays_out = settled.is_err() || shared && !refused.is_empty();
        let result = match settled {
            Err(why) => Err(host(why)),
            // The others keep what they have, so this group cannot be there with less (as Linux: a group joins a
            // container with all of its mappings or not at all).
            Ok(()) if shared && !refused.is_empty() => Err(AttachRefused::Shared(refused)),
            Ok(()) => match &placed.stopped {
                Some(why) => Err(host(format!("its functions were stopped: {why}"))),
                None if refused.is_empty() => Ok(()),
                None => Err(AttachRefused::Partial(refused)),
            },
        };
        if stays_out {
            // It, and so its group, is blocked after an attach that could not be completed (C-2).
            placed.group.set(requester, Some(SpaceKey::Blocked));
            self.block(&mut placed, &mut broken);
        }
        drop(placed);
        self.stop(&broken);
        result
    }

    fn detach(&self, Stream { requester, pasid }: Stream) {
        if pasid.is_some() {
            return;
        }
        let Some(placed) = self.group_of(requester) else { return };
        let mut placed = lock(&placed);
        placed.group.set(requester, None);
        let mut broken = Broken::new();
        if placed.group.agreed() != placed.space {
            self.block(&mut placed, &mut broken);
        }
        drop(placed);
        self.stop(&broken);
    }

    fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied {
        let held = self.following(space);
        let (mut refused, mut broken) = (Vec::new(), Broken::new());
        // The unit sends unmaps before maps, so this is one batch; any other order is served as it stands.
        for batch in ops.chunk_by(|a, b| !(matches!(a, MapOp::Map(_)) && matches!(b, MapOp::Unmap(_)))) {
            let maps = batch.partition_point(|op| matches!(op, MapOp::Unmap(_)));
            let (unmaps, maps) = batch.split_at(maps);
            self.apply_unmaps(&held, space, unmaps, &mut refused, &mut broken);
            self.apply_maps(&held, space, maps, &mut refused, &mut broken);
        }
        self.stop(&broken);
        Applied { refused }
    }
}
