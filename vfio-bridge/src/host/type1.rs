//! The kernel's VFIO type1: a container per group, for life ([`Placement::PerGroup`]).
//!
//! `VFIO_GROUP_UNSET_CONTAINER` fails while a device of the group is open, so a group never moves: a switch of spaces
//! is a diff in its container. vfio-ioctls opens containers, groups and devices and tells KVM about them; maps and
//! unmaps are our own calls, because that crate maps everything readable and writable (B-9) and takes holes in an
//! unmapped range for errors.

mod dirty;

use std::collections::BTreeMap;
use std::io;
use std::mem::size_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, VFIO_TYPE, VFIO_UNMAP_ALL, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioError};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_io_nr;
use vtd::{IovaRange, Perm, RefusalCause};

use crate::bridge::guest_map::HostMem;
use crate::bridge::limits::{Limits, Memlock};
use crate::function::check::{Bdf, CheckedFunction, HostPaths, OpenError};
use crate::function::group_files::GroupFiles;
use crate::function::vfio::HostFunction;
use crate::host::dirty::{DirtyBitmap, DirtySupport};
use crate::host::{GroupId, HostIommu, HostSpaceId, MapRefused, Placement, UnmapRange};

ioctl_io_nr!(CHECK_EXTENSION, VFIO_TYPE.into(), VFIO_BASE + 1);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE.into(), VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE.into(), VFIO_BASE + 14);

/// What kernels allow that do not say (before 5.10); the default of `dma_entry_limit`.
const DEFAULT_ENTRIES: u64 = 65_535;

/// What is assumed of kernels that do not name IOVA ranges (before 5.4): every VT-d maps 39 bits.
const DEFAULT_RANGES: [IovaRange; 2] =
    [IovaRange { first: 0, last: 0xfedf_ffff }, IovaRange { first: 0xfef0_0000, last: (1 << 39) - 1 }];

struct Open {
    space: HostSpaceId,
    container: Arc<VfioContainer>,
    limits: Limits,
    /// What it can say of dirty pages.
    migration: Option<dirty::Migration>,
    functions: Vec<Bdf>,
}

/// The type1 backend.
pub struct Type1 {
    kvm: Option<Arc<VfioDeviceFd>>,
    open: Mutex<BTreeMap<GroupId, Open>>,
    files: Arc<GroupFiles>,
}

impl Type1 {
    /// A backend without groups. `kvm` is the virtual machine's KVM-VFIO device: each group is added to it (F-7).
    pub fn new(kvm: Option<Arc<VfioDeviceFd>>) -> Self {
        Self { kvm, open: Mutex::default(), files: Arc::default() }
    }

    /// Opens `function`, and its group with a container if no other function of the group was opened before. On an
    /// error nothing of it stays open.
    pub fn open(&self, function: &CheckedFunction) -> Result<HostFunction, OpenError> {
        let (bdf, group) = (function.bdf(), function.group());
        let mut open = self.lock();
        if let Some(entry) = open.get_mut(&group) {
            if entry.functions.contains(&bdf) {
                return Err(OpenError::AssignedTwice(bdf));
            }
            let host_function = self.open_in(&entry.container, function)?;
            entry.functions.push(bdf);
            return Ok(host_function);
        }
        let container = Arc::new(VfioContainer::new(self.kvm.clone()).map_err(|e| explain(bdf, group, e))?);
        let host_function = self.open_in(&container, function)?;
        let (limits, migration) = read_limits(&container).map_err(|e| OpenError::Vfio {
            bdf,
            reason: format!("the limits of its container could not be read: {e}"),
        })?;
        self.files.add(group, &container);
        open.insert(group, Open { space: HostSpaceId::next(), container, limits, migration, functions: vec![bdf] });
        Ok(host_function)
    }

    /// `function` is closed, or about to be: with the last one of its group its container is given up, and with that
    /// what may still be mapped there.
    pub fn close(&self, function: Bdf) {
        let mut open = self.lock();
        let Some((group, entry)) = open.iter_mut().find(|(_, entry)| entry.functions.contains(&function)) else {
            return;
        };
        let group = *group;
        entry.functions.retain(|other| *other != function);
        if entry.functions.is_empty() {
            self.files.remove(group);
            open.remove(&group);
        }
    }

    /// Opens the device of `function` through its group, which joins `container` unless it is there already.
    fn open_in(&self, container: &Arc<VfioContainer>, function: &CheckedFunction) -> Result<HostFunction, OpenError> {
        let device = VfioDevice::new(function.path(), container.clone(), false);
        let opened = device.and_then(|device| HostFunction::new(Arc::new(device), function, self.files.clone()));
        opened.map_err(|e| explain(function.bdf(), function.group(), e))
    }

    /// What the host allows for `group`, `None` when it is not open.
    pub fn limits_of(&self, group: GroupId) -> Option<Limits> {
        self.lock().get(&group).map(|open| open.limits.clone())
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group that has `space`, with what is open of it.
    fn find<T>(&self, space: HostSpaceId, of: impl FnOnce(GroupId, &Open) -> T) -> Option<T> {
        let open = self.lock();
        open.iter().find(|(_, open)| open.space == space).map(|(group, open)| of(*group, open))
    }

    fn migration(&self, space: HostSpaceId) -> Option<dirty::Migration> {
        self.find(space, |_, open| open.migration).flatten()
    }

    fn container(&self, space: HostSpaceId) -> io::Result<Arc<VfioContainer>> {
        self.find(space, |_, open| Arc::clone(&open.container)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// What a refusal of VFIO means to the user.
fn explain(bdf: Bdf, group: GroupId, error: VfioError) -> OpenError {
    let dev = HostPaths::default().dev_vfio;
    let file = |path: std::path::PathBuf, source: io::Error| match source.raw_os_error() {
        Some(libc::EBUSY) => OpenError::GroupBusy(group),
        Some(libc::EACCES | libc::EPERM) => OpenError::Permission(path),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::NoVfio(path),
        _ => OpenError::File { path, source },
    };
    match error {
        VfioError::OpenContainer(e) => file(dev.join("vfio"), e),
        VfioError::OpenGroup(e, name) => file(dev.join(name), e),
        VfioError::GroupViable => OpenError::NotViableKernel(group),
        VfioError::VfioExtension => OpenError::NoType1,
        VfioError::ContainerSetIOMMU(e) if e.errno() == libc::EPERM => OpenError::UnsafeInterrupts(bdf),
        VfioError::ContainerSetIOMMU(e) if e.errno() == libc::ENODEV => OpenError::NoType1,
        other => OpenError::Vfio { bdf, reason: other.to_string() },
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn read_limits(container: &VfioContainer) -> io::Result<(Limits, Option<dirty::Migration>)> {
    let info = read_info(|words| {
        // SAFETY: `words` is `argsz` bytes long and aligned as `vfio_iommu_type1_info` is; the kernel writes no more
        // than `argsz` bytes.
        check(unsafe { ioctl_with_mut_ptr(container, VFIO_IOMMU_GET_INFO(), words.as_mut_ptr()) })
    })?;
    // SAFETY: the call takes a number.
    let unmap_all = unsafe { ioctl_with_val(container, CHECK_EXTENSION(), VFIO_UNMAP_ALL.into()) } == 1;
    let migration = info.migration;
    Ok((limits(info, Memlock::of_this_process().limit, unmap_all), migration))
}

/// What a container says of itself; what it does not say is what kernels that do not say it allow.
fn limits(info: Info, memlock: Option<u64>, unmap_all: bool) -> Limits {
    Limits {
        iova_ranges: info.ranges.unwrap_or_else(|| DEFAULT_RANGES.to_vec()),
        page_sizes: info.page_sizes,
        entries: info.available.unwrap_or(DEFAULT_ENTRIES),
        memlock,
        unmap_all,
    }
}

/// Asks twice: the first answer says how much there is to say.
fn read_info(mut ask: impl FnMut(&mut [u64]) -> io::Result<()>) -> io::Result<Info> {
    let mut words = vec![0u64; 3];
    for _ in 0..2 {
        let bytes = words.len() * size_of::<u64>();
        words.fill(0);
        words[0] = u64::try_from(bytes).map_err(io::Error::other)?;
        ask(&mut words)?;
        let wanted = u32::from_ne_bytes(first_four(words[0])) as usize;
        if wanted <= bytes {
            break;
        }
        words = vec![0u64; wanted.div_ceil(size_of::<u64>())];
    }
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    parse_info(&bytes).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn first_four(word: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = word.to_ne_bytes();
    [a, b, c, d]
}

/// What `struct vfio_iommu_type1_info` and its chain of capabilities say.
#[derive(Debug, PartialEq, Eq)]
struct Info {
    page_sizes: u64,
    ranges: Option<Vec<IovaRange>>,
    available: Option<u64>,
    migration: Option<dirty::Migration>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}
fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn parse_info(bytes: &[u8]) -> Option<Info> {
    let flags = u32_at(bytes, 4)?;
    // Hosts that do not say have 4 KiB pages at least.
    let page_sizes = if flags & VFIO_IOMMU_INFO_PGSIZES != 0 { u64_at(bytes, 8)? } else { 4096 };
    let mut info = Info { page_sizes, ranges: None, available: None, migration: None };
    let mut at = if flags & VFIO_IOMMU_INFO_CAPS != 0 { u32_at(bytes, 16)? as usize } else { 0 };
    // Each capability is a header { id: u16, version: u16, next: u32 } and its body; 0 ends the chain.
    while at != 0 {
        let next = u32_at(bytes, at + 4)? as usize;
        match u32::from(u16_at(bytes, at)?) {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let count = u32_at(bytes, at + 8)? as usize;
                let pair = |i: usize| Some((u64_at(bytes, at + 16 + i * 16)?, u64_at(bytes, at + 24 + i * 16)?));
                let ranges: Option<Vec<_>> =
                    (0..count).map(|i| pair(i).map(|(first, last)| IovaRange { first, last })).collect();
                let mut ranges = ranges?;
                ranges.sort_unstable();
                info.ranges = Some(ranges);
            }
            VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => info.migration = dirty::Migration::parse(bytes, at),
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.available = Some(u64::from(u32_at(bytes, at + 8)?)),
            _ => {}
        }
        // The kernel chains forwards; anything else would not end.
        at = if next > at { next } else { 0 };
    }
    Some(info)
}

fn map_argument(iova: u64, vaddr: u64, size: u64, perm: Perm) -> vfio_iommu_type1_dma_map {
    let read = if perm.readable() { VFIO_DMA_MAP_FLAG_READ } else { 0 };
    let write = if perm.writable() { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
    let argsz = size_of::<vfio_iommu_type1_dma_map>() as u32;
    vfio_iommu_type1_dma_map { argsz, flags: read | write, vaddr, iova, size }
}

fn unmap_argument(range: UnmapRange) -> io::Result<vfio_iommu_type1_dma_unmap> {
    let (flags, iova, size) = match range {
        UnmapRange::All => (VFIO_DMA_UNMAP_FLAG_ALL, 0, 0),
        UnmapRange::Span { first, last } => {
            let size = last.checked_sub(first).and_then(|n| n.checked_add(1));
            let size = size.filter(|size| first.checked_add(*size).is_some());
            (0, first, size.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?)
        }
    };
    let argsz = size_of::<vfio_iommu_type1_dma_unmap>() as u32;
    Ok(vfio_iommu_type1_dma_unmap { argsz, flags, iova, size, ..Default::default() })
}

impl HostIommu for Type1 {
    fn name(&self) -> &'static str {
        "type1"
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        self.lock().get(&group).map(|open| Placement::PerGroup(open.space))
    }

    fn limits(&self, space: HostSpaceId) -> Limits {
        self.find(space, |_, open| open.limits.clone()).unwrap_or_default()
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let refused = |e: io::Error| MapRefused::from_errno(e.raw_os_error().unwrap_or(libc::EIO));
        let file = self.container(space).map_err(refused)?;
        let map = map_argument(iova, mem.hva(), mem.size(), perm);
        // SAFETY: `map` is what the call takes. The memory is the guest's alone and has no Rust references into it:
        // that is the promise of whoever made the `GuestMap` that `mem` is from. The kernel pins its pages, so they
        // outlive a munmap.
        check(unsafe { ioctl_with_ref(&*file, VFIO_IOMMU_MAP_DMA(), &map) }).map_err(refused)
    }

    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        let file = self.container(space)?;
        let mut unmap = unmap_argument(range)?;
        // SAFETY: `unmap` is what the call takes and writes its answer to.
        check(unsafe { ioctl_with_mut_ref(&*file, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) })?;
        Ok(unmap.size)
    }

    fn remedy(&self, space: HostSpaceId, cause: RefusalCause) -> String {
        self.find(space, |group, _| remedy(group, cause)).unwrap_or_default()
    }

    fn dirty_start(&self, space: HostSpaceId) -> io::Result<DirtySupport> {
        let container = self.container(space)?;
        dirty::start(&container, self.migration(space))
    }

    fn dirty_stop(&self, space: HostSpaceId) {
        if let Err(e) = self.container(space).and_then(|container| dirty::stop(&container)) {
            log::warn!("the host goes on to keep dirty bitmaps: {e}");
        }
    }

    fn dirty_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> io::Result<()> {
        let migration = self.migration(space).ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        dirty::read(&*self.container(space)?, migration, bitmap)
    }

    fn unmap_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, _: bool) -> io::Result<u64> {
        let container = self.container(space)?;
        let unmapped = self.migration(space).and_then(|migration| dirty::unmap(&container, migration, bitmap));
        unmapped.unwrap_or_else(|| {
            let IovaRange { first, last } = bitmap.range();
            // As what type1 would say.
            bitmap.mark(bitmap.range());
            self.unmap(space, UnmapRange::Span { first, last })
        })
    }
}

/// What the user can do about a map for `group` that was refused for `cause`.
pub(super) fn remedy(group: GroupId, cause: RefusalCause) -> String {
    match cause {
        RefusalCause::Limit => "Raise the limit with `modprobe -r vfio_iommu_type1; modprobe vfio_iommu_type1 \
                                dma_entry_limit=N`, or let the guest use larger pages"
            .to_owned(),
        RefusalCause::Memlock => "Raise the limit with `ulimit -l`, or give the program CAP_IPC_LOCK".to_owned(),
        RefusalCause::Range => format!(
            "See /sys/kernel/iommu_groups/{group}/reserved_regions; a smaller aw-bits may keep the guest out of it"
        ),
        RefusalCause::Target => String::new(),
        RefusalCause::Other => "See the host's kernel log".to_owned(),
    }
}

#[cfg(test)]
#[path = "type1_test.rs"]
mod type1_test;
