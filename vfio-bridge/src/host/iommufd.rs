//! The kernel's iommufd: an IOAS for each space, and page tables (HWPT) from which a group is switched to another in
//! one step ([`Placement::PerSpace`]).
//!
//! ```text
//!   IOAS of RAM ──copy──► IOAS of a space ──filled──► HWPT ◄── attached ── functions of a group
//!   (never attached)             └────────────filled──► HWPT ◄── attached ── those behind another unit of the host
//! ```
//!
//! All RAM is in one IOAS, and what a space maps of it is copied from there, so that a page is pinned and charged once
//! in whatever number of spaces. HWPTs are made explicitly and stay as long as their space does: one that the kernel
//! makes by itself is filled anew in each switch. What is made of a space before its first group comes is filled before
//! that group is switched to it.

mod dirty;
mod kernel;
mod open;
mod space;
mod sys;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use vtd::{IovaRange, Pasid, Perm, RefusalCause};

pub use self::kernel::BoundDevice;
use self::kernel::{Host, Kernel};
use self::space::{Half, Space, give_back};
use self::sys::{DeviceInfo, Hwpt, Ioas, Place, With};
use crate::bridge::guest_map::{GuestMap, HostMem, MemKind, PAGE_SIZE};
use crate::bridge::limits::{Limits, Memlock};
use crate::function::check::Bdf;
use crate::host::dirty::{DirtyBitmap, DirtySupport};
use crate::host::members::{self, Devices};
use crate::host::{GroupId, HostDevice, HostIommu, HostSpaceId, HostStream, MapRefused, Placement, UnmapRange};

/// A function that is bound to the iommufd, which knows it by a number.
struct Bound {
    /// `None`: no function that VFIO has.
    bdf: Option<Bdf>,
    limits: Limits,
    /// Whether its page tables are such that PASIDs of it can be attached; then how many bits these have, else 0.
    pasid_bits: u8,
    /// Whether the unit above it has page tables with dirty bits.
    dirty_bits: bool,
}

impl Bound {
    /// What its page tables are made with.
    fn with(&self) -> With {
        With { pasids: self.pasid_bits > 0, dirty_bits: self.dirty_bits }
    }
}

/// A group: those of its functions that are open, all of which are in one space.
#[derive(Default)]
struct Group {
    members: Vec<HostDevice>,
    at: Option<HostSpaceId>,
}

/// Why a function could not be added to its group.
#[derive(Debug)]
enum Refused {
    /// It is there.
    Twice,
    /// What its IOMMU allows could not be read.
    Limits(io::Error),
    /// It could not be attached to where its group is.
    Group(io::Error),
}

/// RAM in its IOAS: guest-physical addresses are IOVAs there.
struct Ram {
    ioas: Ioas,
    regions: Vec<RamRegion>,
}

/// One region of it.
#[derive(Clone, Copy)]
struct RamRegion {
    gpa: u64,
    len: u64,
    hva: u64,
}

impl Ram {
    /// Where `mem` is in the IOAS, if all of it is there.
    fn place_of(&self, mem: &HostMem<'_>) -> Option<Place> {
        let iova = place_in(&self.regions, mem.gpa(), mem.hva(), mem.size())?;
        Some(Place { ioas: self.ioas, iova })
    }
}

/// The IOVA, in an IOAS that has `regions`, of `len` bytes at `gpa` that are at `hva` in this process.
fn place_in(regions: &[RamRegion], gpa: u64, hva: u64, len: u64) -> Option<u64> {
    let region = regions.iter().find(|region| region.gpa <= gpa && gpa - region.gpa < region.len)?;
    let offset = gpa - region.gpa;
    (region.hva + offset == hva && len <= region.len - offset).then_some(gpa)
}

/// The iommufd backend.
pub struct Iommufd<K = Host> {
    kernel: K,
    /// `None` where the kernel does not copy parts of what is mapped: then each space maps for itself.
    ram: Option<Ram>,
    groups: Mutex<BTreeMap<GroupId, Arc<Mutex<Group>>>>,
    devices: RwLock<BTreeMap<HostDevice, Arc<Bound>>>,
    spaces: RwLock<BTreeMap<HostSpaceId, Arc<Mutex<Space>>>>,
    /// Who is attached to what.
    places: Mutex<BTreeMap<HostStream, HostSpaceId>>,
    /// Held, shared, while somebody moves: not while all of a space go from one page table to another. Taken before all
    /// other locks.
    moves: RwLock<()>,
    /// The kernel has mapped a dma-buf where a page table was to be filled.
    takes_dma_bufs: AtomicBool,
}

impl<K: Kernel> Iommufd<K> {
    /// A backend over `kernel`, whose IOAS `of_ram` is empty and gets the RAM of `guest`.
    fn over(kernel: K, of_ram: Ioas, guest: &GuestMap) -> io::Result<Self> {
        let ram = ram_in(&kernel, of_ram, guest)?;
        let (groups, devices, spaces) = (Mutex::default(), RwLock::default(), RwLock::default());
        let (places, moves, takes_dma_bufs) = (Mutex::default(), RwLock::default(), AtomicBool::default());
        Ok(Self { kernel, ram, groups, devices, spaces, places, moves, takes_dma_bufs })
    }

    /// Whether memory is pinned and charged once, in whatever number of spaces it is mapped (B-12).
    pub fn pins_once(&self) -> bool {
        self.ram.is_some()
    }

    /// What the host allows for `group`, `None` when it is not open.
    pub fn limits_of(&self, group: GroupId) -> Option<Limits> {
        let members = lock(&*self.group(group).ok()?).members.clone();
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        members.iter().filter_map(|member| Some(devices.get(member)?.limits.clone())).reduce(both)
    }

    /// Whether `bdf` is open.
    fn has(&self, bdf: Bdf) -> bool {
        self.devices.read().unwrap_or_else(PoisonError::into_inner).values().any(|bound| bound.bdf == Some(bdf))
    }

    /// `bdf`, of `group`, is bound to the iommufd as `device`, and attached to nothing. It goes where the others of its
    /// group are. On an error it is attached to nothing, and no member.
    fn add(&self, group: GroupId, bdf: impl Into<Option<Bdf>>, device: HostDevice) -> Result<(), Refused> {
        let bdf = bdf.into();
        let _moving = self.moving();
        let group = Arc::clone(lock(&self.groups).entry(group).or_default());
        let mut group = lock(&group);
        if bdf.is_some_and(|bdf| self.has(bdf)) {
            return Err(Refused::Twice);
        }
        let (limits, pasid_bits) = match group.at {
            None => self.read_limits(device).map_err(Refused::Limits),
            Some(space) => self.join(device, space).map_err(Refused::Group),
        }?;
        let dirty_bits = self.kernel.device_info(device).dirty_bits;
        let bound = Arc::new(Bound { bdf, limits, pasid_bits, dirty_bits });
        self.devices.write().unwrap_or_else(PoisonError::into_inner).insert(device, bound);
        group.members.push(device);
        Ok(())
    }

    /// `bdf` is a member of its group no longer, nor attached to anything: the number that the kernel has for it.
    /// `None`: it is not open.
    fn take(&self, bdf: Bdf) -> Option<HostDevice> {
        let _moving = self.moving();
        let mut groups = lock(&self.groups);
        let device = {
            let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
            devices.iter().find(|(_, bound)| bound.bdf == Some(bdf)).map(|(device, _)| *device)?
        };
        groups.retain(|_, group| {
            let mut group = lock(group);
            group.members.retain(|member| *member != device);
            !group.members.is_empty()
        });
        let its = |stream: &HostStream| stream.device == device;
        let attached: Vec<HostStream> = lock(&self.places).keys().copied().filter(its).collect();
        for stream in attached {
            // Closing its file does it, too.
            if let Err(e) = self.detach_stream(stream) {
                log::debug!("{bdf}: {e} when it was detached");
            }
        }
        self.devices.write().unwrap_or_else(PoisonError::into_inner).remove(&device);
        Some(device)
    }

    /// Asks an empty IOAS that `device` is attached to for a moment: one that it is not attached to does not know its
    /// limits. Whether its PASIDs can be attached is found out by trying, too.
    fn read_limits(&self, device: HostDevice) -> io::Result<(Limits, u8)> {
        let info = self.kernel.device_info(device);
        let ioas = self.object(self.kernel.alloc_ioas()?.0);
        let alloc = |pasids| self.kernel.alloc_hwpt(device, Ioas(ioas.id), With { pasids, dirty_bits: false });
        let for_pasids = if info.pasid_bits > 0 { alloc(true).ok() } else { None };
        let pasid_bits = if for_pasids.is_some() { info.pasid_bits } else { 0 };
        let hwpt = self.object(for_pasids.map_or_else(|| alloc(false), Ok)?.0);
        self.kernel.attach(self.seen(device), Hwpt(hwpt.id))?;
        let limits = self.limits_in(Ioas(ioas.id), info);
        self.kernel.detach(self.seen(device))?;
        Ok((limits?, pasid_bits))
    }

    /// `device` goes where its group is, in `space`: as long as that is anywhere, the kernel attaches it to no other
    /// page table. Its limits are those of all who are there.
    fn join(&self, device: HostDevice, space: HostSpaceId) -> io::Result<(Limits, u8)> {
        let (info, stream, held) = (self.kernel.device_info(device), self.seen(device), self.space(space)?);
        let mut held = lock(&held);
        let Half { ioas, tables } = held.front();
        let hwpt = tables.iter().find(|hwpt| self.kernel.attach(stream, *hwpt).is_ok());
        let hwpt = hwpt.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let takes_pasids = tables.that_take(true).any(|other| other == hwpt);
        match self.limits_in(*ioas, info) {
            Ok(limits) => {
                lock(&self.places).insert(stream, space);
                Ok((limits, if takes_pasids { info.pasid_bits } else { 0 }))
            }
            Err(e) => {
                self.kernel.detach(stream)?;
                Err(e)
            }
        }
    }

    /// What a device of which the kernel says `info` allows, that is attached to `ioas`.
    fn limits_in(&self, ioas: Ioas, info: DeviceInfo) -> io::Result<Limits> {
        let (iova_ranges, alignment) = self.kernel.iova_ranges(ioas)?;
        if alignment > PAGE_SIZE {
            return Err(io::Error::other(format!("it maps no pages of 4 KiB, but of {alignment:#x} bytes")));
        }
        Ok(Limits {
            iova_ranges,
            page_sizes: info.page_sizes.unwrap_or(PAGE_SIZE),
            entries: u64::MAX,
            memlock: Memlock::of_this_process().limit,
            unmap_all: true,
        })
    }

    /// Maps a part of a BAR (B-10). What has no pages is mapped by a dma-buf or not at all: by its address, or by a
    /// file that is none to it, a kernel takes it for a space without a page table, and then refuses to attach anybody.
    fn map_bar(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
        let refused = || io::Error::from_raw_os_error(libc::EFAULT);
        mem.dma_buf().ok_or_else(refused)?;
        if !self.takes_dma_bufs.load(Ordering::Relaxed) {
            self.try_dma_buf(mem)?;
            self.takes_dma_bufs.store(true, Ordering::Relaxed);
        }
        self.kernel.map_dma_buf(at, mem, perm)
    }

    /// Whether the kernel knows what `mem` is, found out by trying it where a page table is filled at once.
    fn try_dma_buf(&self, mem: &HostMem<'_>) -> io::Result<()> {
        let device = self.devices.read().unwrap_or_else(PoisonError::into_inner).keys().next().copied();
        let device = device.ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))?;
        let scratch = self.object(self.kernel.alloc_ioas()?.0);
        let ioas = Ioas(scratch.id);
        let table = self.object(self.kernel.alloc_hwpt(device, ioas, With::default())?.0);
        let tried = self.kernel.map_dma_buf(Place { ioas, iova: 0 }, mem, Perm::ReadWrite);
        drop(table);
        tried
    }

    fn object(&self, id: u32) -> Object<'_, K> {
        Object { kernel: &self.kernel, id }
    }

    fn group(&self, group: GroupId) -> io::Result<Arc<Mutex<Group>>> {
        lock(&self.groups).get(&group).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn bound(&self, device: HostDevice) -> io::Result<Arc<Bound>> {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        devices.get(&device).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }

    fn moving(&self) -> RwLockReadGuard<'_, ()> {
        self.moves.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who is attached to `space`, and what page tables each needs.
    fn attached_to(&self, space: HostSpaceId) -> io::Result<Vec<(HostStream, With)>> {
        let places = lock(&self.places);
        let there = places.iter().filter(|(_, at)| **at == space).map(|(stream, _)| *stream);
        there.map(|stream| Ok((stream, self.bound(stream.device)?.with()))).collect()
    }

    fn space(&self, space: HostSpaceId) -> io::Result<Arc<Mutex<Space>>> {
        let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
        spaces.get(&space).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl<K: Kernel> Devices for Iommufd<K> {
    /// Itself: what VFIO opens by a device file makes its own requests.
    fn seen(&self, device: HostDevice) -> HostStream {
        HostStream { device, pasid: None }
    }

    fn attach_stream(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        let (with, to) = (self.bound(stream.device)?.with(), self.space(space)?);
        lock(&to).front().attach(&self.kernel, stream, with)?;
        lock(&self.places).insert(stream, space);
        Ok(())
    }

    fn detach_stream(&self, stream: HostStream) -> io::Result<()> {
        lock(&self.places).remove(&stream);
        self.kernel.detach(stream)
    }
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An object of the iommufd that goes when this does.
struct Object<'a, K: Kernel> {
    kernel: &'a K,
    id: u32,
}

impl<K: Kernel> Drop for Object<'_, K> {
    fn drop(&mut self) {
        give_back(self.kernel, self.id);
    }
}

/// What `one` and `other` both allow.
fn both(one: Limits, other: Limits) -> Limits {
    let pairs = one.iova_ranges.iter().flat_map(|a| other.iova_ranges.iter().map(move |b| a.intersection(*b)));
    Limits {
        iova_ranges: pairs.flatten().collect(),
        page_sizes: one.page_sizes & other.page_sizes,
        entries: one.entries.min(other.entries),
        memlock: one.memlock.min(other.memlock),
        unmap_all: one.unmap_all && other.unmap_all,
    }
}

/// Puts all RAM of `guest` into `ioas`, where nothing is pinned yet. `None`, and nothing is there, if the kernel does
/// not copy parts of it to another IOAS: the header of `IOMMU_IOAS_COPY` does not promise that it does.
fn ram_in(kernel: &impl Kernel, ioas: Ioas, guest: &GuestMap) -> io::Result<Option<Ram>> {
    let mut regions = Vec::new();
    for region in guest.regions() {
        let Some(mem) = guest.host_mem(region.gpa(), region.size()).filter(|mem| mem.kind() == MemKind::Ram) else {
            continue;
        };
        map_at(kernel, Place { ioas, iova: mem.gpa() }, &mem, Perm::ReadWrite)?;
        regions.push(RamRegion { gpa: mem.gpa(), len: mem.size(), hva: mem.hva() });
    }
    let ram = Ram { ioas, regions };
    if copies_parts(kernel, &ram)? {
        return Ok(Some(ram));
    }
    kernel.unmap(ioas, UnmapRange::All)?;
    Ok(None)
}

/// Whether a page from the midst of RAM can be copied, found out by trying. Nothing is pinned for it.
fn copies_parts(kernel: &impl Kernel, ram: &Ram) -> io::Result<bool> {
    let Some(region) = ram.regions.iter().max_by_key(|region| region.len) else { return Ok(false) };
    let scratch = Object { kernel, id: kernel.alloc_ioas()?.0 };
    let middle = region.gpa + (region.len / 2) / PAGE_SIZE * PAGE_SIZE;
    let (to, from) = (Place { ioas: Ioas(scratch.id), iova: 0 }, Place { ioas: ram.ioas, iova: middle });
    Ok(kernel.copy(to, from, PAGE_SIZE, Perm::Read).is_ok())
}

/// Maps `mem` by its file, where the kernel can, or else by its address.
fn map_at(kernel: &impl Kernel, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
    if mem.backing().is_some() && kernel.map_file(at, mem, perm).is_ok() {
        return Ok(());
    }
    kernel.map(at, mem, perm)
}

impl<K: Kernel> HostIommu for Iommufd<K> {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        let group = self.group(group).ok()?;
        let is_open = !lock(&group).members.is_empty();
        is_open.then_some(Placement::PerSpace)
    }

    /// What all functions allow that may come into it.
    fn limits(&self, _: HostSpaceId) -> Limits {
        let groups: Vec<GroupId> = lock(&self.groups).keys().copied().collect();
        groups.into_iter().filter_map(|group| self.limits_of(group)).reduce(both).unwrap_or_default()
    }

    fn create(&self) -> io::Result<HostSpaceId> {
        let space = Arc::new(Mutex::new(Space::new(&self.kernel)?));
        let id = HostSpaceId::next();
        self.spaces.write().unwrap_or_else(PoisonError::into_inner).insert(id, space);
        Ok(id)
    }

    fn destroy(&self, space: HostSpaceId) {
        let gone = self.spaces.write().unwrap_or_else(PoisonError::into_inner).remove(&space);
        if let Some(gone) = gone {
            lock(&gone).destroy(&self.kernel);
        }
    }

    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        let _moving = self.moving();
        let group = self.group(group)?;
        let mut group = lock(&group);
        members::attach(self, &group.members, group.at, space).map_err(with_help)?;
        group.at = Some(space);
        Ok(())
    }

    fn detach(&self, group: GroupId) -> io::Result<()> {
        let _moving = self.moving();
        let group = self.group(group)?;
        let mut group = lock(&group);
        members::detach(self, &group.members)?;
        group.at = None;
        Ok(())
    }

    fn attach_part(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        let _moving = self.moving();
        let bound = self.bound(stream.device)?;
        check_pasid(stream, bound.pasid_bits).map_err(io::Error::other)?;
        self.attach_stream(stream, space).map_err(with_help)
    }

    fn detach_part(&self, stream: HostStream) -> io::Result<()> {
        let _moving = self.moving();
        let bound = self.bound(stream.device)?;
        // What cannot be attached never was.
        if check_pasid(stream, bound.pasid_bits).is_err() { Ok(()) } else { self.detach_stream(stream) }
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let refused = |e: io::Error| MapRefused::from_errno(e.raw_os_error().unwrap_or(libc::EIO));
        let of_ram = self.ram.as_ref().and_then(|ram| ram.place_of(&mem));
        let map = |at| match of_ram {
            _ if mem.kind() == MemKind::Bar => self.map_bar(at, &mem, perm),
            Some(from) => self.kernel.copy(at, from, mem.size(), perm),
            None => map_at(&self.kernel, at, &mem, perm),
        };
        let space = self.space(space).map_err(refused)?;
        lock(&space).map(&self.kernel, iova, mem.size(), perm, map).map_err(refused)
    }

    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        lock(&*self.space(space)?).unmap(&self.kernel, range)
    }

    fn dirty_start(&self, space: HostSpaceId) -> io::Result<DirtySupport> {
        let space = self.space(space)?;
        let all_have = self.devices.read().unwrap_or_else(PoisonError::into_inner).values().all(|it| it.dirty_bits);
        lock(&space).track(&self.kernel, all_have)
    }

    fn dirty_stop(&self, space: HostSpaceId) {
        if let Ok(space) = self.space(space) {
            lock(&space).untrack(&self.kernel);
        }
    }

    fn dirty_close(&self, space: HostSpaceId, mapped: &mut dyn Iterator<Item = (IovaRange, Perm)>) -> io::Result<()> {
        lock(&*self.space(space)?).close(&self.kernel, mapped)
    }

    fn dirty_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> io::Result<()> {
        lock(&*self.space(space)?).read(&self.kernel, bitmap, false)
    }

    fn unmap_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, close: bool) -> io::Result<u64> {
        let held = self.space(space)?;
        if !close {
            return lock(&held).unmap_dirty(&self.kernel, bitmap, None);
        }
        let _nobody_moves = self.moves.write().unwrap_or_else(PoisonError::into_inner);
        let attached = self.attached_to(space)?;
        lock(&held).unmap_dirty(&self.kernel, bitmap, Some(&attached))
    }

    fn remedy(&self, _: HostSpaceId, cause: RefusalCause) -> String {
        remedy(cause).to_owned()
    }
}

/// Whether a part of a function of which PASIDs have `bits` bits can be attached as `stream`.
///
/// The kernel means the requests without PASID by PASID 0, so that part would take these along.
fn check_pasid(stream: HostStream, bits: u8) -> Result<(), NoPasid> {
    match stream.pasid {
        None | Some(Pasid(0)) => Err(NoPasid::Whole),
        Some(_) if bits == 0 => Err(NoPasid::Unsupported),
        Some(Pasid(pasid)) if pasid.checked_shr(bits.into()).unwrap_or(0) != 0 => Err(NoPasid::TooWide { pasid, bits }),
        Some(_) => Ok(()),
    }
}

/// Why a PASID is not attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
enum NoPasid {
    /// It is none, to the kernel.
    #[error("the host's kernel does not tell PASID 0 from requests without a PASID; use another one")]
    Whole,
    /// Nobody tells its PASIDs apart.
    #[error(
        "the host attaches no PASIDs of this function: that takes Linux 6.15, an IOMMU that tells them apart (Intel's in scalable mode: \
         intel_iommu=on,sm_on), and a function with the PASID capability"
    )]
    Unsupported,
    /// There are not so many.
    #[error("PASID {pasid:#x} has more than the {bits} bits that the function and its IOMMU have; use a smaller one")]
    TooWide {
        /// Which.
        pasid: u32,
        /// How many bits there are.
        bits: u8,
    },
}

/// An attach that failed, with what helps.
fn with_help(e: io::Error) -> io::Error {
    if e.raw_os_error() == Some(libc::ENOMEM) {
        return io::Error::new(e.kind(), format!("{e}. {}", remedy(RefusalCause::Memlock)));
    }
    e
}

/// What the user can do about a map that was refused for `cause`. There is no limit on the number of mappings.
fn remedy(cause: RefusalCause) -> &'static str {
    match cause {
        RefusalCause::Memlock => {
            "Raise the limit with `ulimit -l` (iommufd counts what all processes of this user lock together), or give the \
             program CAP_IPC_LOCK"
        }
        RefusalCause::Range => {
            "See reserved_regions of the groups in /sys/kernel/iommu_groups; a smaller aw-bits may keep the guest out of it"
        }
        RefusalCause::Limit | RefusalCause::Target => "",
        RefusalCause::Other => "See the host's kernel log",
    }
}

#[cfg(test)]
mod backend_test;
#[cfg(test)]
#[path = "iommufd/dirty_test.rs"]
mod dirty_test;
#[cfg(test)]
mod fake;
#[cfg(test)]
#[path = "iommufd_test.rs"]
mod iommufd_test;
