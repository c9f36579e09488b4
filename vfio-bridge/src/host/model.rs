//! An in-memory host IOMMU that answers as the kernel's type1 does, of old and of new kernels. For tests.
//!
//! Its groups are in spaces for life, or are attached to the spaces that it is asked to make ([`Placement`]).
//!
//! It keeps the kernel's order of checks, so that an operation that is wrong in two ways fails for the same reason, and
//! it can fail any operation on request. A hook sees what it holds after **every** operation: that is how tests check
//! what a device can reach in the middle of a change.

mod dirty;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vtd::spec::INTERRUPT_WINDOW;
use vtd::{IovaRange, Perm, RefusalCause};

use crate::bridge::guest_map::HostMem;
use crate::bridge::guest_map::PAGE_SIZE;
use crate::bridge::limits::Limits;
use crate::host::dirty::{DirtyBitmap, DirtySupport};
use crate::host::members::{self, Devices};
use crate::host::type1::remedy;
use crate::host::{GroupId, HostDevice, HostIommu, HostSpaceId, HostStream, MapRefused, Placement, UnmapRange};

/// What kind of host it is.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `VFIO_DMA_UNMAP_FLAG_ALL` exists (5.12).
    pub unmap_all: bool,
    /// A range that wraps is refused. Without it, look-ups compare with an end that wrapped.
    pub checks_wrap: bool,
    /// Where mappings may be.
    pub iova_ranges: Vec<IovaRange>,
    /// `dma_entry_limit`: mappings a space can hold.
    pub entries: usize,
    /// Bytes that may be pinned in all spaces together.
    pub memlock: Option<u64>,
    /// Write-only mappings can be read as well (Linux up to 6.12).
    pub write_implies_read: bool,
}

impl Kernel {
    /// A kernel of today on a host that maps `width` bits.
    pub fn new(width: u8) -> Self {
        Self {
            unmap_all: true,
            checks_wrap: true,
            iova_ranges: Self::ranges(width),
            entries: 65_535,
            memlock: None,
            write_implies_read: false,
        }
    }

    /// A kernel before 5.12.
    pub fn old(width: u8) -> Self {
        Self { unmap_all: false, checks_wrap: false, write_implies_read: true, ..Self::new(width) }
    }

    /// All of `width` bits (33 to 64) but the interrupt window.
    pub fn ranges(width: u8) -> Vec<IovaRange> {
        let last = u64::MAX >> (64 - u32::from(width.clamp(33, 64)));
        let window = INTERRUPT_WINDOW;
        vec![IovaRange { first: 0, last: window.first - 1 }, IovaRange { first: window.last + 1, last }]
    }
}

/// What the model holds at an IOVA.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// First IOVA.
    pub iova: u64,
    /// Length in bytes.
    pub len: u64,
    /// Host address of the first byte.
    pub hva: u64,
    /// What a device may do.
    pub perm: Perm,
}

impl Held {
    /// The last IOVA, inclusive.
    pub fn last(&self) -> u64 {
        self.iova + (self.len - 1)
    }
}

/// What one space holds, by first IOVA.
pub type Contents = BTreeMap<u64, Held>;

/// One host operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostOp {
    /// A map.
    Map(Held),
    /// An unmap.
    Unmap(UnmapRange),
    /// A new space.
    Create,
    /// A space that goes.
    Destroy,
    /// The group reaches what the space has.
    Attach(GroupId),
    /// The group reaches nothing; the space is the one that it was attached to.
    Detach(GroupId),
    /// A device of a group, or a part of one, reaches what the space has.
    AttachStream(HostStream),
    /// It reaches nothing.
    DetachStream(HostStream),
}

/// An operation that the model served, and its result: bytes unmapped, or the errno.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Served {
    /// Where.
    pub space: HostSpaceId,
    /// What.
    pub op: HostOp,
    /// Bytes unmapped (0 for any other), or the errno.
    pub result: Result<u64, i32>,
}

type Hook = Arc<dyn Fn(&Served, &Contents) + Send + Sync>;
type Injector = Box<dyn FnMut(HostSpaceId, &HostOp) -> Option<i32> + Send>;

#[derive(Default)]
struct State {
    spaces: BTreeMap<HostSpaceId, Contents>,
    /// Groups that are open, and the space that each is in.
    groups: BTreeMap<GroupId, Option<HostSpaceId>>,
    /// Devices and parts of devices that are attached, each with its space.
    streams: BTreeMap<HostStream, HostSpaceId>,
    /// Spaces that were made so far.
    made: u32,
    pinned: u64,
    served: VecDeque<Served>,
    maps: u64,
    unmaps: u64,
    hook: Option<Hook>,
    injector: Option<Injector>,
    tracker: dirty::Tracker,
}

/// The model. Its spaces are numbered from 1 on.
pub struct Model {
    kernel: Kernel,
    per_space: bool,
    /// The devices of groups that are attached device by device, each with what the IOMMU sees of it.
    devices: BTreeMap<GroupId, Vec<(HostDevice, HostStream)>>,
    state: Mutex<State>,
}

/// How many operations [`Model::served`] keeps.
const KEPT: usize = 65_536;

impl Model {
    /// A host of this kind with these groups open, each in a space of its own, in this order.
    pub fn new(kernel: Kernel, groups: &[GroupId]) -> Arc<Self> {
        let mut state = State::default();
        for group in groups {
            if !state.groups.contains_key(group) {
                let space = state.create();
                state.groups.insert(*group, Some(space));
            }
        }
        Arc::new(Self { kernel, per_space: false, devices: BTreeMap::new(), state: Mutex::new(state) })
    }

    /// A host that makes spaces and attaches these groups to them, as iommufd does.
    pub fn per_space(kernel: Kernel, groups: &[GroupId]) -> Arc<Self> {
        Self::with_devices(kernel, groups.iter().map(|group| (*group, Vec::new())).collect())
    }

    /// The same with groups of these devices, each with what the IOMMU sees of it. Those of a group are attached one by
    /// one.
    pub fn with_devices(kernel: Kernel, devices: BTreeMap<GroupId, Vec<(HostDevice, HostStream)>>) -> Arc<Self> {
        let groups = devices.keys().map(|group| (*group, None)).collect();
        Arc::new(Self { kernel, per_space: true, devices, state: Mutex::new(State { groups, ..State::default() }) })
    }

    fn devices_of(&self, group: GroupId) -> Vec<HostDevice> {
        self.devices.get(&group).into_iter().flatten().map(|(device, _)| *device).collect()
    }

    /// `hook` sees each operation and what its space holds afterwards. It is called without a lock of the model.
    pub fn set_hook(&self, hook: impl Fn(&Served, &Contents) + Send + Sync + 'static) {
        self.state().hook = Some(Arc::new(hook));
    }

    /// From now on an operation for which `injector` gives an errno fails with it and changes nothing.
    pub fn inject(&self, injector: impl FnMut(HostSpaceId, &HostOp) -> Option<i32> + Send + 'static) {
        self.state().injector = Some(Box::new(injector));
    }

    /// Nothing is made to fail any more.
    pub fn stop_injecting(&self) {
        self.state().injector = None;
    }

    /// The space that `group` is in.
    pub fn space_of(&self, group: GroupId) -> Option<HostSpaceId> {
        self.state().groups.get(&group).copied().flatten()
    }

    /// The groups that are in `space`.
    pub fn groups_in(&self, space: HostSpaceId) -> Vec<GroupId> {
        self.state().groups.iter().filter(|(_, of)| **of == Some(space)).map(|(group, _)| *group).collect()
    }

    /// What all spaces hold together: mappings, and bytes.
    pub fn totals(&self) -> (u64, u64) {
        let state = self.state();
        let held = || state.spaces.values().flat_map(BTreeMap::values);
        (held().count() as u64, held().map(|held| held.len).sum())
    }

    /// How many spaces there are.
    pub fn spaces(&self) -> usize {
        self.state().spaces.len()
    }

    /// What `group` reaches.
    pub fn contents(&self, group: GroupId) -> Contents {
        let state = self.state();
        let space = state.groups.get(&group).copied().flatten();
        space.and_then(|space| state.spaces.get(&space)).cloned().unwrap_or_default()
    }

    /// Where a device of `group` gets with `iova`: host address and permission.
    pub fn translate(&self, group: GroupId, iova: u64) -> Option<(u64, Perm)> {
        let state = self.state();
        state.reached(state.groups.get(&group).copied().flatten()?, iova)
    }

    /// The space that the requests of `stream` reach; for devices of groups that are attached device by device.
    pub fn space_of_stream(&self, stream: HostStream) -> Option<HostSpaceId> {
        self.state().streams.get(&stream).copied()
    }

    /// Where the requests of `stream` get with `iova`: host address and permission.
    pub fn translate_stream(&self, stream: HostStream, iova: u64) -> Option<(u64, Perm)> {
        let state = self.state();
        state.reached(state.streams.get(&stream).copied()?, iova)
    }

    /// The last operations, and forgets them.
    pub fn served(&self) -> Vec<Served> {
        self.state().served.drain(..).collect()
    }

    /// How many maps and unmaps were asked for.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.maps, state.unmaps)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, space: HostSpaceId, op: HostOp) -> Result<u64, i32> {
        let mut state = self.state();
        match op {
            HostOp::Map(_) => state.maps += 1,
            HostOp::Unmap(_) => state.unmaps += 1,
            _ => {}
        }
        let injected = state.injector.as_mut().and_then(|inject| inject(space, &op));
        let result = match (injected, op) {
            (Some(errno), _) => Err(errno),
            (None, HostOp::Map(held)) => self.map_dma(&mut state, space, held).map(|()| 0),
            (None, HostOp::Unmap(range)) => self.unmap_dma(&mut state, space, range),
            (None, op) => state.place(space, op).map(|()| 0),
        };
        let served = Served { space, op, result };
        if state.served.len() == KEPT {
            state.served.pop_front();
        }
        state.served.push_back(served);
        if let Some(hook) = state.hook.clone() {
            let contents = state.spaces.get(&space).cloned().unwrap_or_default();
            drop(state);
            hook(&served, &contents);
        }
        result
    }

    /// `vfio_dma_do_map`, check by check.
    fn map_dma(&self, state: &mut State, space: HostSpaceId, new: Held) -> Result<(), i32> {
        let State { spaces, pinned, .. } = state;
        let contents = spaces.get_mut(&space).ok_or(libc::EBADF)?;
        let aligned = [new.iova, new.len, new.hva].iter().all(|n| n.is_multiple_of(PAGE_SIZE));
        let wraps = |start: u64| start.checked_add(new.len.wrapping_sub(1)).is_none();
        if new.len == 0 || !aligned || wraps(new.iova) || wraps(new.hva) {
            return Err(libc::EINVAL);
        }
        if contents.range(..=new.last()).next_back().is_some_and(|(_, held)| held.last() >= new.iova) {
            return Err(libc::EEXIST);
        }
        if contents.len() >= self.kernel.entries {
            return Err(libc::ENOSPC);
        }
        let within = |range: &IovaRange| range.first <= new.iova && new.last() <= range.last;
        if !self.kernel.iova_ranges.iter().any(within) {
            return Err(libc::EINVAL);
        }
        if self.kernel.memlock.is_some_and(|limit| *pinned + new.len > limit) {
            return Err(libc::ENOMEM);
        }
        *pinned += new.len;
        let widened = self.kernel.write_implies_read && new.perm == Perm::Write;
        let perm = if widened { Perm::ReadWrite } else { new.perm };
        contents.insert(new.iova, Held { perm, ..new });
        Ok(())
    }

    /// `vfio_dma_do_unmap`, check by check.
    fn unmap_dma(&self, state: &mut State, space: HostSpaceId, range: UnmapRange) -> Result<u64, i32> {
        let contents = state.spaces.get_mut(&space).ok_or(libc::EBADF)?;
        let gone: Vec<Held> = match range {
            UnmapRange::All if self.kernel.unmap_all => contents.values().copied().collect(),
            UnmapRange::All => return Err(libc::EINVAL),
            UnmapRange::Span { first, last } => {
                // The user's base and size: the size of all of 2^64 is 0.
                let size = last.wrapping_sub(first).wrapping_add(1);
                let end = first.wrapping_add(size);
                if size == 0 || !size.is_multiple_of(PAGE_SIZE) || !first.is_multiple_of(PAGE_SIZE) {
                    return Err(libc::EINVAL);
                }
                if self.kernel.checks_wrap && first.checked_add(size - 1).is_none() {
                    return Err(libc::EOVERFLOW);
                }
                if contents.range(..first).next_back().is_some_and(|(_, held)| held.last() >= first) {
                    return Err(libc::EINVAL);
                }
                if contents.range(..=last).next_back().is_some_and(|(_, held)| held.last() > last) {
                    return Err(libc::EINVAL);
                }
                // `vfio_find_dma`, whose ends wrapped until it was made to compare inclusive ends.
                let found = |held: &&Held| match self.kernel.checks_wrap {
                    true => held.iova <= last && held.last() >= first,
                    false => end > held.iova && first < held.iova.wrapping_add(held.len),
                };
                contents.values().filter(found).copied().collect()
            }
        };
        for held in &gone {
            contents.remove(&held.iova);
        }
        state.tracker.unmapped(space, &gone);
        let bytes = gone.iter().map(|held| held.len).sum();
        state.pinned -= bytes;
        Ok(bytes)
    }
}

impl State {
    fn create(&mut self) -> HostSpaceId {
        self.made += 1;
        let space = HostSpaceId(self.made);
        self.spaces.insert(space, Contents::new());
        space
    }

    /// Spaces, and who is in which.
    fn place(&mut self, space: HostSpaceId, op: HostOp) -> Result<(), i32> {
        match op {
            HostOp::Destroy => {
                let in_use = self.groups.values().flatten().chain(self.streams.values()).any(|of| *of == space);
                if in_use {
                    return Err(libc::EBUSY);
                }
                let contents = self.spaces.remove(&space).ok_or(libc::ENOENT)?;
                self.tracker.forget(space);
                self.pinned -= contents.values().map(|held| held.len).sum::<u64>();
            }
            HostOp::Attach(group) => {
                if !self.spaces.contains_key(&space) {
                    return Err(libc::ENOENT);
                }
                *self.groups.get_mut(&group).ok_or(libc::ENODEV)? = Some(space);
            }
            HostOp::Detach(group) => {
                *self.groups.get_mut(&group).ok_or(libc::ENODEV)? = None;
            }
            HostOp::AttachStream(stream) => {
                if !self.spaces.contains_key(&space) {
                    return Err(libc::ENOENT);
                }
                self.streams.insert(stream, space);
            }
            HostOp::DetachStream(stream) => {
                self.streams.remove(&stream);
            }
            HostOp::Create | HostOp::Map(_) | HostOp::Unmap(_) => {}
        }
        Ok(())
    }

    fn reached(&self, space: HostSpaceId, iova: u64) -> Option<(u64, Perm)> {
        let (_, held) = self.spaces.get(&space)?.range(..=iova).next_back()?;
        (iova <= held.last()).then(|| (held.hva + (iova - held.iova), held.perm))
    }
}

impl Devices for Model {
    fn seen(&self, device: HostDevice) -> HostStream {
        let found = self.devices.values().flatten().find(|(of, _)| *of == device);
        found.map_or(HostStream { device, pasid: None }, |(_, stream)| *stream)
    }

    fn attach(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        self.serve(space, HostOp::AttachStream(stream)).map(drop).map_err(io::Error::from_raw_os_error)
    }

    fn detach(&self, stream: HostStream) -> io::Result<()> {
        let Some(space) = self.space_of_stream(stream) else { return Ok(()) };
        self.serve(space, HostOp::DetachStream(stream)).map(drop).map_err(io::Error::from_raw_os_error)
    }
}

impl HostIommu for Model {
    fn name(&self) -> &'static str {
        "model"
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        let place = *self.state().groups.get(&group)?;
        if self.per_space { Some(Placement::PerSpace) } else { place.map(Placement::PerGroup) }
    }

    fn limits(&self, _: HostSpaceId) -> Limits {
        Limits {
            iova_ranges: self.kernel.iova_ranges.clone(),
            page_sizes: 0x4020_1000,
            entries: self.kernel.entries as u64,
            memlock: self.kernel.memlock,
            unmap_all: self.kernel.unmap_all,
        }
    }

    fn create(&self) -> io::Result<HostSpaceId> {
        let space = self.state().create();
        self.serve(space, HostOp::Create).map(|_| space).map_err(|errno| {
            self.state().spaces.remove(&space);
            io::Error::from_raw_os_error(errno)
        })
    }

    fn destroy(&self, space: HostSpaceId) {
        let destroyed = self.serve(space, HostOp::Destroy);
        assert!(destroyed.is_ok(), "{space:?} is in use, or was never made: {destroyed:?}");
    }

    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        match &self.devices_of(group)[..] {
            [] => {}
            devices => members::attach(self, devices, self.space_of(group), space)?,
        }
        self.serve(space, HostOp::Attach(group)).map(drop).map_err(io::Error::from_raw_os_error)
    }

    fn detach(&self, group: GroupId) -> io::Result<()> {
        members::detach(self, &self.devices_of(group))?;
        match self.space_of(group) {
            Some(space) => self.serve(space, HostOp::Detach(group)).map(drop).map_err(io::Error::from_raw_os_error),
            None => Ok(()),
        }
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let held = Held { iova, len: mem.size(), hva: mem.hva(), perm };
        self.serve(space, HostOp::Map(held)).map(|_| ()).map_err(MapRefused::from_errno)
    }

    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        self.serve(space, HostOp::Unmap(range)).map_err(io::Error::from_raw_os_error)
    }

    fn attach_part(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        match self.devices.values().flatten().any(|(device, _)| *device == stream.device) {
            true => Devices::attach(self, stream, space),
            false => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }

    fn detach_part(&self, stream: HostStream) -> io::Result<()> {
        Devices::detach(self, stream)
    }

    fn remedy(&self, space: HostSpaceId, cause: RefusalCause) -> String {
        self.groups_in(space).first().map(|group| remedy(*group, cause)).unwrap_or_default()
    }

    fn dirty_start(&self, space: HostSpaceId) -> io::Result<DirtySupport> {
        self.start_tracking(space).map_err(io::Error::from_raw_os_error)
    }

    fn dirty_stop(&self, space: HostSpaceId) {
        self.stop_tracking(space);
    }

    fn dirty_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> io::Result<()> {
        self.read_dirty(space, bitmap).map_err(io::Error::from_raw_os_error)
    }

    fn unmap_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, close: bool) -> io::Result<u64> {
        self.unmap_and_read(space, bitmap, close).map_err(io::Error::from_raw_os_error)
    }
}

#[cfg(test)]
#[path = "model_test.rs"]
mod model_test;
