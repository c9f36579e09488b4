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
mod held;
mod host_space;
pub mod ledger;
pub(crate) mod limits;
pub(crate) mod pin;
mod placement;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use arc_swap::ArcSwap;
use log::error;
use vtd::{Applied, AttachRefused, IovaRange, MapOp, Mapping, Refusal, Requester, SpaceKey, SpaceListener, Stream};

use self::group::Group;
use self::guest_map::GuestMap;
use self::held::Held;
use self::host_space::Lost;
use self::ledger::Extent;
use self::pin::book::Going;
use self::placement::PlacedGroup;
use crate::host::{GroupId, HostDevice, HostIommu, HostStream};
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
    /// Which device of its host a function is, for those whose parts can be attached.
    devices: BTreeMap<Requester, HostDevice>,
    /// Parts of functions that are attached (C-4), in the way that groups are.
    parts: BTreeMap<Stream, Arc<Mutex<PlacedGroup>>>,
    /// Functions that were stopped, and why: nothing is mapped for them any more.
    stopped: BTreeMap<Requester, String>,
    /// The host spaces that hold a space of the guest.
    following: BTreeMap<SpaceKey, Arc<[Arc<Held>]>>,
    /// By function, with the name of its backend.
    counters: BTreeMap<Requester, (&'static str, Arc<Counters>)>,
}

/// The listener that makes the host hold what the units say.
pub struct Bridge {
    hosts: Vec<Arc<dyn HostIommu>>,
    guest: Arc<ArcSwap<GuestMap>>,
    quarantine: Arc<dyn Quarantine>,
    directory: RwLock<Directory>,
    dirty_all: dirty::All,
}

impl Bridge {
    /// A bridge from `hosts`, no group of which is in two, to the memory in `guest`. No function is behind it until
    /// [`Bridge::register`].
    pub fn new(hosts: Vec<Arc<dyn HostIommu>>, guest: GuestMap, quarantine: Arc<dyn Quarantine>) -> Self {
        let (guest, directory) = (Arc::new(ArcSwap::from_pointee(guest)), RwLock::default());
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
            self.start_dirty(&placed, race);
        }
        let counters = (host.name(), Arc::clone(placed.counters()));
        self.directory_mut().counters.insert(requester, counters);
        let mut broken = Broken::new();
        self.block(&mut placed, &mut broken);
        drop(placed);
        self.stop(&broken);
        Ok(())
    }

    /// [`Bridge::register`], for a function that is `device` of its host: where the host can, its requests with a PASID
    /// are attached to spaces of their own (C-4).
    pub fn register_device(
        &self,
        requester: Requester,
        group: GroupId,
        device: HostDevice,
    ) -> Result<(), RegisterError> {
        self.register(requester, group)?;
        self.directory_mut().devices.insert(requester, device);
        Ok(())
    }

    /// Takes a function, which its unit detached before, from behind the bridge: nothing is known of it any more, and
    /// with the last function of its group nothing of that. Then the host may close it.
    pub fn unregister(&self, requester: Requester) {
        let Some(placed) = self.group_of(requester) else { return };
        let mut placed = lock(&placed);
        let mut broken = Broken::new();
        placed.group.set(requester, None);
        if placed.group.agreed() != placed.space {
            self.block(&mut placed, &mut broken);
        }
        let has_others = placed.remove(requester);
        {
            let mut directory = self.directory_mut();
            directory.parts.retain(|stream, _| stream.requester != requester);
            directory.devices.remove(&requester);
            directory.stopped.remove(&requester);
            directory.counters.remove(&requester);
            if let Some(group) = directory.requesters.remove(&requester).filter(|_| !has_others) {
                directory.groups.remove(&group);
            }
        }
        drop(placed);
        self.stop(&broken);
    }

    /// How many functions of this virtual machine are in the group of `requester`.
    pub fn sharing(&self, requester: Requester) -> usize {
        let directory = self.directory();
        let group = directory.requesters.get(&requester);
        directory.requesters.values().filter(|other| Some(*other) == group).count()
    }

    /// The name of `requester`'s backend, as statistics show it; `None` when it is not registered.
    pub fn backend(&self, requester: Requester) -> Option<&'static str> {
        self.directory().counters.get(&requester).map(|(backend, _)| *backend)
    }

    /// Counters of `requester`, `None` when it is not registered. Never waits for a host operation.
    pub fn stats(&self, requester: Requester) -> Option<DeviceStats> {
        self.directory().counters.get(&requester).map(|(_, counters)| counters.snapshot())
    }

    /// The space that the requests of `stream` are in (C-2), whichever way they got there: those without PASID are in
    /// that of the function's group, which is [`SpaceKey::Blocked`] while its members disagree. `None` for a function
    /// that is not registered, and for a PASID of one that is not attached.
    pub fn space_of(&self, stream: impl Into<Stream>) -> Option<SpaceKey> {
        self.placed(stream.into()).map(|placed| lock(&placed).space)
    }

    /// What the host holds for the requests of `stream` according to the ledger, in ascending order.
    pub fn holds(&self, stream: impl Into<Stream>) -> Vec<Extent> {
        let placed = self.placed(stream.into());
        let held = placed.and_then(|placed| lock(&placed).held().cloned());
        held.map_or_else(Vec::new, |held| held.lock().space.ledger().extents().collect())
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

    /// What is attached for the requests of `stream`.
    fn placed(&self, stream: Stream) -> Option<Arc<Mutex<PlacedGroup>>> {
        match stream.pasid {
            None => self.group_of(stream.requester),
            Some(_) => self.directory().parts.get(&stream).cloned(),
        }
    }

    /// [`Bridge::placed`], of a part also if it is not attached yet.
    fn placed_for(&self, stream: Stream) -> Result<Arc<Mutex<PlacedGroup>>, AttachRefused> {
        let requester = stream.requester;
        let group = self.group_of(requester).ok_or(AttachRefused::UnknownRequester(requester))?;
        let Some(pasid) = stream.pasid else { return Ok(group) };
        if let Some(part) = self.placed(stream) {
            return Ok(part);
        }
        let host = |reason: String| AttachRefused::Host { requester, reason };
        let device = self.directory().devices.get(&requester).copied();
        let device = device.ok_or_else(|| host("its host does not tell its PASIDs apart".to_owned()))?;
        let part = PlacedGroup::part_of(&lock(&group), HostStream { device, pasid: Some(pasid) });
        let mut part = part.ok_or_else(|| host("its host attaches it as a whole".to_owned()))?;
        part.add(requester);
        let part = Arc::new(Mutex::new(part));
        // Whoever was quicker has made the same.
        Ok(Arc::clone(self.directory_mut().parts.entry(stream).or_insert(part)))
    }

    /// A part that is nowhere is forgotten: a guest can attach a million of them, one after the other.
    fn forget_if_nowhere(&self, stream: Stream, placed: &PlacedGroup) {
        if stream.pasid.is_some() && placed.is_nowhere() {
            self.directory_mut().parts.remove(&stream);
        }
    }

    /// All groups, and all parts of functions.
    fn everyone(&self) -> Vec<Arc<Mutex<PlacedGroup>>> {
        let directory = self.directory();
        directory.groups.values().chain(directory.parts.values()).cloned().collect()
    }

    /// The parts that are attached of the functions in `group`.
    fn parts_of(&self, group: &Group) -> Vec<Arc<Mutex<PlacedGroup>>> {
        let directory = self.directory();
        let its = |stream: &Stream| group.members().any(|member| member == stream.requester);
        directory.parts.iter().filter(|(stream, _)| its(stream)).map(|(_, part)| Arc::clone(part)).collect()
    }

    /// Why a member of `group` was stopped, if one was.
    fn why_stopped(&self, group: &Group) -> Option<String> {
        let directory = self.directory();
        group.members().find_map(|member| directory.stopped.get(&member).cloned())
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
        lost: Vec<(Stream, Vec<Lost>)>,
        broken: &mut Broken,
    ) -> Vec<Refusal> {
        let mut refused = Vec::new();
        for (by, mut lost) in lost {
            while !lost.is_empty() {
                refused.extend(lost.iter().map(|l| refusal(l, by)));
                let ranges = IovaRange::union_of(lost.iter().map(|l| l.range).collect());
                lost = Vec::new();
                if let SpaceKey::Paged(_) = space {
                    self.each(held, space, &ranges, broken, |state, guest| {
                        state.space.unmap(guest, &ranges, &mut lost);
                    });
                }
            }
        }
        refused
    }

    /// Does something to each of `held` that still holds `space`, one after the other. Nothing in `going` is pinned
    /// then.
    fn each(
        &self,
        held: &[Arc<Held>],
        space: &SpaceKey,
        going: &[IovaRange],
        broken: &mut Broken,
        mut change: impl FnMut(&mut held::HeldState, &GuestMap),
    ) {
        let guest = self.guest.load();
        for held in held {
            let state = held.lock();
            if !state.follows(space) {
                continue;
            }
            let mut state = held.without_pins(state, Going::Ranges(going));
            // Also where a client was cut off: what must go goes.
            if state.holds == *space {
                change(&mut state, &guest);
                self.note_broken(held, &mut state, broken);
            }
        }
    }

    /// Stops the functions of groups whose host did not unmap.
    fn stop(&self, broken: &Broken) {
        for (functions, why) in broken {
            self.directory_mut().stopped.extend(functions.iter().map(|function| (*function, why.clone())));
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
        self.each(held, space, &ranges, broken, |state, guest| {
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
        let mut losses: Vec<(Stream, Vec<Lost>)> = Vec::new();
        let mut except = Vec::new();
        self.each(held, space, &[], broken, |state, guest| {
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

fn refusal(lost: &Lost, stream: Stream) -> Refusal {
    Refusal { range: lost.range, cause: lost.cause, stream }
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
        if pasid.is_some() && *space == SpaceKey::Blocked && self.placed(stream).is_none() {
            // No host lets requests through whose PASID is not attached.
            return Ok(());
        }
        let placed = self.placed_for(stream)?;
        let mut placed = lock(&placed);
        let paged = matches!(space, SpaceKey::Paged(_));
        let shared = paged && self.following(space).iter().any(|held| !placed.is_in(held));
        placed.group.set(requester, Some(*space));
        placed.pins_of(requester, true);
        let (mut lost, mut broken) = (Vec::new(), Broken::new());
        let settled = self.settle(&mut placed, space, live, shared, &mut lost, &mut broken);
        let refused = lost.iter().map(|l| refusal(l, stream)).collect::<Vec<_>>();
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
        self.forget_if_nowhere(stream, &placed);
        drop(placed);
        self.stop(&broken);
        result
    }

    fn detach(&self, stream: Stream) {
        let Some(placed) = self.placed(stream) else { return };
        let mut placed = lock(&placed);
        placed.group.set(stream.requester, None);
        let mut broken = Broken::new();
        placed.pins_of(stream.requester, false);
        if placed.group.agreed() != placed.space {
            self.block(&mut placed, &mut broken);
        }
        self.take_pins_of(&mut placed, stream.requester, &mut broken);
        self.forget_if_nowhere(stream, &placed);
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
