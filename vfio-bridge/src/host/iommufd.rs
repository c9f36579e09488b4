//! The kernel's iommufd: an IOAS for each space, and page tables (HWPT) from which a group is switched to another in one
//! step ([`Placement::PerSpace`]).
//!
//! ```text
//!   IOAS of RAM ──copy──► IOAS of a space ──filled──► HWPT ◄── attached ── functions of a group
//!   (never attached)             └────────────filled──► HWPT ◄── attached ── those behind another unit of the host
//! ```
//!
//! All RAM is in one IOAS, and what a space maps of it is copied from there, so that a page is pinned and charged once in
//! whatever number of spaces. HWPTs are made explicitly and stay as long as their space does: one that the kernel makes
//! by itself is filled anew in each switch. What is made of a space before its first group comes is filled before that
//! group is switched to it.

mod members;
mod sys;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use iommufd_ioctls::{IommuFd, IommufdError, IommufdIoas};
use log::{debug, error};
use vfio_ioctls::{VfioDevice, VfioDeviceFd, VfioError, VfioIommufd};
use vtd::{Perm, RefusalCause};

use self::members::{Failed, Member, Members};
use self::sys::{Hwpt, Ioas, Place};
use crate::bridge::guest_map::{GuestMap, HostMem, MemKind, PAGE_SIZE};
use crate::bridge::limits::{Limits, Memlock};
use crate::function::check::{Bdf, CheckedFunction, HostPaths, OpenError};
use crate::function::of_iommufd::OfThisIommufd;
use crate::function::vfio::HostFunction;
use crate::host::{GroupId, HostIommu, HostSpaceId, MapRefused, Placement, UnmapRange};

/// A function that is bound to the iommufd.
struct Bound {
    bdf: Bdf,
    device: Arc<VfioDevice>,
    /// The iommufd's number of it.
    id: u32,
    limits: Limits,
}

impl Member for Bound {
    fn attach(&self, to: Hwpt) -> io::Result<()> {
        self.device.attach_hwpt(to.0).map_err(vfio_error)
    }

    fn detach(&self) -> io::Result<()> {
        self.device.detach_hwpt().map_err(vfio_error)
    }
}

/// The errno of a call of vfio-ioctls on a device of an iommufd.
fn vfio_error(error: VfioError) -> io::Error {
    match error {
        VfioError::VfioDeviceAttachIommufdPt(e)
        | VfioError::VfioDeviceDetachIommufdPt(e)
        | VfioError::VfioDeviceBindIommufd(e) => io::Error::from_raw_os_error(e.errno()),
        other => io::Error::other(other),
    }
}

/// A group, with those of its functions that are open.
#[derive(Default)]
struct Group {
    members: Members<Bound>,
}

/// A space.
struct Space {
    ioas: Ioas,
    /// The page tables that are filled from it. Usually one; one more for functions behind a unit of the host that does
    /// not take the others.
    hwpts: Mutex<Vec<Hwpt>>,
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
pub struct Iommufd {
    // It keeps the IOAS of RAM and the KVM-VFIO device, too.
    vfio: Arc<VfioIommufd>,
    /// `None` where the kernel does not copy parts of what is mapped: then each space maps for itself.
    ram: Option<Ram>,
    groups: Mutex<BTreeMap<GroupId, Arc<Mutex<Group>>>>,
    spaces: RwLock<BTreeMap<HostSpaceId, Arc<Space>>>,
}

impl Iommufd {
    /// A backend without groups, for a guest whose memory is `guest`. `kvm` is the virtual machine's KVM-VFIO device: the
    /// file of each function is added to it before the function can be used (F-7).
    pub fn new(kvm: Option<Arc<VfioDeviceFd>>, guest: &GuestMap) -> Result<Self, OpenError> {
        let node = HostPaths::default().dev_iommu;
        let file = |source: io::Error| match source.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => OpenError::Permission(node.clone()),
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::NoIommufd(node.clone()),
            _ => OpenError::File { path: node.clone(), source },
        };
        let crate_error = |e: IommufdError| file(sys::io_error(e));
        let fd = Arc::new(IommuFd::new().map_err(crate_error)?);
        let ioas = Arc::new(IommufdIoas::new(Arc::clone(&fd)).map_err(crate_error)?);
        let ram = ram_in(&fd, Ioas(ioas.id()), guest).map_err(file)?;
        debug!("iommufd: guest memory is {}", if ram.is_some() { "pinned once" } else { "pinned by each space" });
        let vfio = VfioIommufd::new(fd, Some(ioas), kvm).map_err(|e| file(io::Error::other(e)))?;
        Ok(Self { vfio: Arc::new(vfio), ram, groups: Mutex::default(), spaces: RwLock::default() })
    }

    /// Whether memory is pinned and charged once, in whatever number of spaces it is mapped (B-12).
    pub fn pins_once(&self) -> bool {
        self.ram.is_some()
    }

    /// Opens `function` by its own device file. On an error nothing of it stays attached.
    pub fn open(&self, function: &CheckedFunction) -> Result<HostFunction, OpenError> {
        let bdf = function.bdf();
        let group = Arc::clone(self.groups().entry(function.group()).or_default());
        let mut group = group.lock().unwrap_or_else(PoisonError::into_inner);
        if group.members.iter().any(|member| member.bdf == bdf) {
            return Err(OpenError::AssignedTwice(bdf));
        }
        let vfio = |reason: String| OpenError::Vfio { bdf, reason };
        let device = VfioDevice::new(function.path(), self.vfio.clone(), false).map_err(|e| explain(function, e))?;
        let device = Arc::new(device);
        let id = device.iommufd_dev_id().ok_or_else(|| vfio("it is not bound to the iommufd".to_owned()))?;
        let limits = self.read_limits(&device, id);
        let limits = limits.map_err(|e| vfio(format!("what its IOMMU allows could not be read: {e}")))?;
        let host_function = HostFunction::new(Arc::clone(&device), function, Arc::new(OfThisIommufd));
        let host_function = host_function.map_err(|e| explain(function, e))?;
        let bound = Bound { bdf, device, id, limits };
        group.members.add(bound).map_err(|e| vfio(format!("it could not follow its group: {e}")))?;
        Ok(host_function)
    }

    /// What the host allows for `group`, `None` when it is not open.
    pub fn limits_of(&self, group: GroupId) -> Option<Limits> {
        let group = self.group(group).ok()?;
        let group = lock(&group);
        group.members.iter().map(|member| member.limits.clone()).reduce(both)
    }

    /// Asks an empty IOAS that `device` is attached to for a moment: one that it is not attached to does not know its
    /// limits.
    fn read_limits(&self, device: &VfioDevice, id: u32) -> io::Result<Limits> {
        let fd = self.fd();
        let ioas = Object { fd, id: sys::alloc_ioas(fd)?.0 };
        let hwpt = Object { fd, id: sys::alloc_hwpt(fd, id, Ioas(ioas.id))?.0 };
        device.attach_hwpt(hwpt.id).map_err(vfio_error)?;
        let ranges = sys::iova_ranges(fd, Ioas(ioas.id));
        device.detach_hwpt().map_err(vfio_error)?;
        let (iova_ranges, alignment) = ranges?;
        if alignment > PAGE_SIZE {
            return Err(io::Error::other(format!("it maps no pages of 4 KiB, but of {alignment:#x} bytes")));
        }
        Ok(Limits {
            iova_ranges,
            page_sizes: sys::page_sizes(fd, id).unwrap_or(PAGE_SIZE),
            entries: u64::MAX,
            memlock: Memlock::of_this_process().limit,
            unmap_all: true,
        })
    }

    fn fd(&self) -> &IommuFd {
        self.vfio.iommufd()
    }

    fn groups(&self) -> MutexGuard<'_, BTreeMap<GroupId, Arc<Mutex<Group>>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self, group: GroupId) -> io::Result<Arc<Mutex<Group>>> {
        self.groups().get(&group).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn space(&self, space: HostSpaceId) -> io::Result<Arc<Space>> {
        let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
        spaces.get(&space).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Attaches `member` to a page table of `space`: to one that there is, or, if its unit takes none of these, to one
    /// that is made for it and has all that the space holds before it is switched to it.
    fn attach_member(&self, member: &Bound, space: &Space) -> io::Result<Hwpt> {
        let mut hwpts = space.hwpts.lock().unwrap_or_else(PoisonError::into_inner);
        for hwpt in hwpts.iter() {
            // Whatever the reason is: where another page table would not help either, its attach says so.
            if member.attach(*hwpt).is_ok() {
                return Ok(*hwpt);
            }
        }
        let hwpt = sys::alloc_hwpt(self.fd(), member.id, space.ioas)?;
        if let Err(e) = member.attach(hwpt) {
            drop(Object { fd: self.fd(), id: hwpt.0 });
            return Err(e);
        }
        hwpts.push(hwpt);
        Ok(hwpt)
    }
}

fn lock(group: &Mutex<Group>) -> MutexGuard<'_, Group> {
    group.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An object of the iommufd that goes when this does.
struct Object<'a> {
    fd: &'a IommuFd,
    id: u32,
}

impl Drop for Object<'_> {
    fn drop(&mut self) {
        if let Err(e) = sys::destroy(self.fd, self.id) {
            error!("iommufd: object {} could not be given back: {e}", self.id);
        }
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

/// Puts all RAM of `guest` into `ioas`, where nothing is pinned yet. `None`, and nothing is there, if the kernel does not
/// copy parts of it to another IOAS: the header of `IOMMU_IOAS_COPY` does not promise that it does.
fn ram_in(fd: &IommuFd, ioas: Ioas, guest: &GuestMap) -> io::Result<Option<Ram>> {
    let mut regions = Vec::new();
    for region in guest.regions() {
        let Some(mem) = guest.host_mem(region.gpa(), region.size()).filter(|mem| mem.kind() == MemKind::Ram) else {
            continue;
        };
        map_at(fd, Place { ioas, iova: mem.gpa() }, &mem, Perm::ReadWrite)?;
        regions.push(RamRegion { gpa: mem.gpa(), len: mem.size(), hva: mem.hva() });
    }
    let ram = Ram { ioas, regions };
    if copies_parts(fd, &ram)? {
        return Ok(Some(ram));
    }
    sys::unmap(fd, ioas, UnmapRange::All)?;
    Ok(None)
}

/// Whether a page from the midst of RAM can be copied, found out by trying. Nothing is pinned for it.
fn copies_parts(fd: &IommuFd, ram: &Ram) -> io::Result<bool> {
    let Some(region) = ram.regions.iter().max_by_key(|region| region.len) else { return Ok(false) };
    let scratch = Object { fd, id: sys::alloc_ioas(fd)?.0 };
    let middle = region.gpa + (region.len / 2) / PAGE_SIZE * PAGE_SIZE;
    let (to, from) = (Place { ioas: Ioas(scratch.id), iova: 0 }, Place { ioas: ram.ioas, iova: middle });
    Ok(sys::copy(fd, to, from, PAGE_SIZE, Perm::Read).is_ok())
}

/// Maps `mem` by its file, where the kernel can, or else by its address.
fn map_at(fd: &IommuFd, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
    if let Some((file, offset)) = mem.backing() {
        // SAFETY: `mem` is the guest's alone, without Rust references into it: that is the promise of whoever made the
        // `GuestMap` that it is from. The kernel pins its pages, so they outlive their mapping here.
        if unsafe { sys::map_file(fd, at, file, offset, mem.size(), perm) }.is_ok() {
            return Ok(());
        }
    }
    // SAFETY: as above.
    unsafe { sys::map(fd, at, mem.hva(), mem.size(), perm) }
}

/// What a refusal of VFIO means to the user.
fn explain(function: &CheckedFunction, error: VfioError) -> OpenError {
    let (bdf, group) = (function.bdf(), function.group());
    let node = HostPaths::default().device_file(bdf).unwrap_or_else(|_| function.path().to_owned());
    let errno = match &error {
        VfioError::OpenDeviceCdev(e) => e.raw_os_error(),
        VfioError::VfioDeviceBindIommufd(e) => Some(e.errno()),
        _ => None,
    };
    match (error, errno) {
        (_, Some(libc::EBUSY)) => OpenError::DeviceBusy { bdf, group },
        (VfioError::VfioDeviceBindIommufd(_), Some(libc::EPERM)) => OpenError::UnsafeInterruptsOfIommufd(bdf),
        (VfioError::OpenDeviceCdev(_), Some(libc::EACCES | libc::EPERM)) => OpenError::Permission(node),
        (VfioError::OpenDeviceCdev(source), _) => OpenError::File { path: node, source },
        (VfioError::InvalidVfioDev, _) => OpenError::NoDeviceFiles(bdf),
        (other, _) => OpenError::Vfio { bdf, reason: other.to_string() },
    }
}

impl HostIommu for Iommufd {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        let group = self.group(group).ok()?;
        let is_open = lock(&group).members.iter().next().is_some();
        is_open.then_some(Placement::PerSpace)
    }

    /// What all functions allow that may come into it.
    fn limits(&self, _: HostSpaceId) -> Limits {
        let groups: Vec<GroupId> = self.groups().keys().copied().collect();
        groups.into_iter().filter_map(|group| self.limits_of(group)).reduce(both).unwrap_or_default()
    }

    fn create(&self) -> io::Result<HostSpaceId> {
        let ioas = sys::alloc_ioas(self.fd())?;
        let id = HostSpaceId::next();
        let mut spaces = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
        spaces.insert(id, Arc::new(Space { ioas, hwpts: Mutex::default() }));
        Ok(id)
    }

    fn destroy(&self, space: HostSpaceId) {
        let gone = self.spaces.write().unwrap_or_else(PoisonError::into_inner).remove(&space);
        let Some(gone) = gone else { return };
        let hwpts = gone.hwpts.lock().unwrap_or_else(PoisonError::into_inner);
        for id in hwpts.iter().map(|hwpt| hwpt.0).chain([gone.ioas.0]) {
            drop(Object { fd: self.fd(), id });
        }
    }

    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        let (group, space) = (self.group(group)?, self.space(space)?);
        let mut group = lock(&group);
        match group.members.attach(|member| self.attach_member(member, &space)) {
            Ok(()) => Ok(()),
            Err(Failed::Undone(e)) if e.raw_os_error() == Some(libc::ENOMEM) => {
                Err(io::Error::new(e.kind(), format!("{e}. {}", remedy(RefusalCause::Memlock))))
            }
            Err(Failed::Undone(e)) => Err(e),
            Err(Failed::Astray(why)) => Err(io::Error::other(why)),
        }
    }

    fn detach(&self, group: GroupId) -> io::Result<()> {
        let group = self.group(group)?;
        let mut group = lock(&group);
        group.members.detach()
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let refused = |e: io::Error| MapRefused::from_errno(e.raw_os_error().unwrap_or(libc::EIO));
        let at = Place { ioas: self.space(space).map_err(refused)?.ioas, iova };
        match self.ram.as_ref().and_then(|ram| ram.place_of(&mem)) {
            Some(from) => sys::copy(self.fd(), at, from, mem.size(), perm),
            None => map_at(self.fd(), at, &mem, perm),
        }
        .map_err(refused)
    }

    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        sys::unmap(self.fd(), self.space(space)?.ioas, range)
    }

    fn remedy(&self, _: HostSpaceId, cause: RefusalCause) -> String {
        remedy(cause).to_owned()
    }
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
#[path = "iommufd_test.rs"]
mod iommufd_test;
