//! What the bridge asks of a host IOMMU: the seam to `type1`, `iommufd` and `vfio_user`, and to the `model` that tests
//! use.
//!
//! A backend knows its address spaces, and how groups get into them ([`Placement`]); the bridge keeps the ledger of
//! each space. Permissions, addresses and ranges are passed on as they are: no backend merges, crops or retries.

pub mod dirty;
pub mod faulty;
pub(crate) mod iommufd;
pub(crate) mod members;
pub mod model;
pub(crate) mod software;
pub(crate) mod type1;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vtd::{Pasid, Perm, RefusalCause};

use crate::bridge::guest_map::HostMem;
use crate::bridge::limits::Limits;
use crate::host::dirty::{DirtyBitmap, DirtySupport};

/// A host IOMMU group, by the kernel's number (`/sys/kernel/iommu_groups/N`); or what stands for one: a function that
/// another process emulates is alone in its group, which the kernel knows nothing of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GroupId(pub u32);

/// Above every number of the kernel.
const FIRST_OF_USER_FUNCTIONS: u32 = 1 << 31;

/// Above those.
const FIRST_OF_SOFTWARE: u32 = FIRST_OF_USER_FUNCTIONS | 1 << 30;

impl GroupId {
    /// The group of the `index`th device of this process that pins ([`Software`](crate::Software)).
    pub fn of_software(index: u32) -> Self {
        Self(FIRST_OF_SOFTWARE | index)
    }

    /// Whether it is one of those.
    pub fn is_software(self) -> bool {
        self.0 >= FIRST_OF_SOFTWARE
    }

    /// The group of the `index`th function that another process emulates.
    pub fn of_user_function(index: u32) -> Self {
        Self(FIRST_OF_USER_FUNCTIONS | index)
    }

    /// The number that the kernel has for it; `None` for one that the kernel does not know.
    pub fn of_kernel(self) -> Option<u32> {
        Some(self.0).filter(|number| *number < FIRST_OF_USER_FUNCTIONS)
    }
}

impl GroupId {
    /// For messages: `group 7`, or `vfio-user0`.
    pub(crate) fn label(self) -> String {
        match self.of_kernel() {
            Some(_) => format!("group {self}"),
            None => self.to_string(),
        }
    }
}

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.of_kernel() {
            Some(number) => number.fmt(f),
            None if self.is_software() => write!(f, "software{}", self.0 - FIRST_OF_SOFTWARE),
            None => write!(f, "vfio-user{}", self.0 - FIRST_OF_USER_FUNCTIONS),
        }
    }
}

/// One set of translations of a host: a container of type1, an IOAS of iommufd. Only its backend knows what the number
/// means.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostSpaceId(pub u32);

impl HostSpaceId {
    /// One that nobody in this process was given before.
    pub fn next() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A device of the host that is open, as its backend numbers it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostDevice(pub u32);

/// What a host IOMMU tells apart: the requests of a device that carry a PASID, and those that carry none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostStream {
    /// The device that the IOMMU sees.
    pub device: HostDevice,
    /// The PASID of the requests, `None`: those without.
    pub pasid: Option<Pasid>,
}

impl std::fmt::Display for HostStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pasid {
            None => write!(f, "device {}", self.device.0),
            Some(Pasid(pasid)) => write!(f, "device {} with PASID {pasid:#x}", self.device.0),
        }
    }
}

/// How a group gets into a space of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// It is in this one for as long as it is open: what it reaches changes mapping by mapping.
    PerGroup(HostSpaceId),
    /// The host makes spaces and moves groups between them: each space of the guest has one, which is whole before a
    /// group is attached to it.
    PerSpace,
}

/// What one host unmap takes away (B-3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnmapRange {
    /// Every mapping between `first` and `last`, inclusive. Its size is not 2^64 and it does not end at 2^64:
    /// older kernels look such a range up with an end that wrapped to 0, find nothing and report success.
    Span {
        /// First IOVA, a multiple of the page size.
        first: u64,
        /// Last IOVA.
        last: u64,
    },
    /// Everything (`VFIO_DMA_UNMAP_FLAG_ALL`); only where [`Limits::unmap_all`] says so.
    All,
}

/// Why the host did not map.
#[derive(Debug, thiserror::Error)]
#[error("the host refused to map: {source}")]
pub struct MapRefused {
    /// What the guest's fault record and the counters call it.
    pub cause: RefusalCause,
    /// What the kernel said.
    pub source: io::Error,
}

impl MapRefused {
    /// The refusal that `errno` of a map stands for. Used to name the cause, never to tell what is mapped.
    pub fn from_errno(errno: i32) -> Self {
        let cause = match errno {
            libc::ENOSPC => RefusalCause::Limit,
            libc::ENOMEM => RefusalCause::Memlock,
            libc::EINVAL => RefusalCause::Range,
            libc::EFAULT => RefusalCause::Target,
            _ => RefusalCause::Other,
        };
        Self { cause, source: io::Error::from_raw_os_error(errno) }
    }
}

/// One host map of several.
#[derive(Clone, Copy, Debug)]
pub struct Map<'a> {
    /// First IOVA.
    pub iova: u64,
    /// Where it leads.
    pub mem: HostMem<'a>,
    /// What the device may do.
    pub perm: Perm,
}

/// A host IOMMU.
///
/// The bridge never calls it twice at once for one space or for one group; for several it does.
pub trait HostIommu: Send + Sync {
    /// The name that statistics show, such as `type1`.
    fn name(&self) -> &'static str;

    /// How `group` gets into a space, `None` for a group that is not open here. The same for as long as it is open.
    fn placement(&self, group: GroupId) -> Option<Placement>;

    /// What the host allows in `space`. Asked once, when the space is new to the bridge.
    fn limits(&self, space: HostSpaceId) -> Limits;

    /// A new, empty space. Only asked of a host with a [`Placement::PerSpace`].
    ///
    /// # Errors
    /// There is none to be had.
    fn create(&self) -> io::Result<HostSpaceId> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// `space`, to which no group is attached, goes with all that is mapped in it.
    fn destroy(&self, space: HostSpaceId) {
        let _ = space;
    }

    /// `group` leaves the space that it is attached to, if it is to one, and reaches what `space` has: all of its
    /// devices, by what the IOMMU sees of each (`members`, C-1). None of them is ever seen to reach something else in
    /// between, but it may reach nothing. Only asked of a host with a [`Placement::PerSpace`].
    ///
    /// # Errors
    /// The group is where it was, as far as the host could undo what it had begun; the bridge detaches it.
    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        let _ = (group, space);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// `group` reaches nothing. Only asked of a host with a [`Placement::PerSpace`]; also of a group that is not
    /// attached, or not as a whole, which is no error.
    ///
    /// # Errors
    /// Nothing may be concluded about what the group reaches.
    fn detach(&self, group: GroupId) -> io::Result<()> {
        let _ = group;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// One host map: `iova` leads to `mem`, with exactly `perm`. On an error nothing of it is mapped.
    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused>;

    /// Several maps that overlap nowhere, as [`HostIommu::map`] each. `done` hears of each, in their order, when its
    /// result is known. A host that is far away can be asked for many at a time.
    fn map_all(&self, space: HostSpaceId, maps: &[Map<'_>], done: &mut dyn FnMut(Result<(), MapRefused>)) {
        maps.iter().for_each(|map| done(self.map(space, map.iova, map.mem, map.perm)));
    }

    /// One host unmap. Returns how many bytes the kernel says it took away. When it returns, no device reaches them
    /// any more. On an error nothing may be concluded about what is still mapped.
    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64>;

    /// The requests of `stream`, which have a PASID, reach what `space` has, and those of its device with another or
    /// with none what they reached before (C-4). They are never seen to reach something else in between.
    ///
    /// # Errors
    /// They are where they were. A host that cannot tell the parts of a device apart says
    /// [`Unsupported`](io::ErrorKind::Unsupported).
    fn attach_part(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        let _ = (stream, space);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The requests of `stream`, which is attached, reach nothing.
    ///
    /// # Errors
    /// Nothing may be concluded about what they reach.
    fn detach_part(&self, stream: HostStream) -> io::Result<()> {
        let _ = stream;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What the user can do about a map in `space` that was refused for `cause`: a sentence, or nothing.
    fn remedy(&self, space: HostSpaceId, cause: RefusalCause) -> String {
        let _ = (space, cause);
        String::new()
    }

    /// From now on what devices write by `space` is tracked (E-1), also in mappings that come later; nothing of it is
    /// dirty yet.
    ///
    /// # Errors
    /// The host cannot tell what is written. That is never taken for "nothing".
    fn dirty_start(&self, space: HostSpaceId) -> io::Result<DirtySupport> {
        let _ = space;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Nothing is tracked in `space` any more.
    fn dirty_stop(&self, space: HostSpaceId) {
        let _ = space;
    }

    /// What was written in the range of `bitmap` since it was last asked for is marked there, and is clean again. The
    /// range is one of whole mappings, and has the mappings in it, with holes between them if
    /// [`DirtySupport::holes`] is set; what `bitmap` has of the holes means nothing. Read-only mappings may be marked, too.
    ///
    /// # Errors
    /// Nothing may be concluded about what was written.
    fn dirty_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> io::Result<()> {
        let _ = (space, bitmap);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// [`HostIommu::unmap`] of the range of `bitmap`, in which what was written there since the last read is marked
    /// (E-2): what no read finds any more once the mappings are gone. Asked for only while `space` is tracked.
    ///
    /// A host whose [`UnmapWindow`](dirty::UnmapWindow) is not `Reported` clears the translation, then reads what is
    /// dirty, then flushes the IOTLB: what a device writes by a cached translation before the flush is lost (E-3). With
    /// `close`, which is only asked of one whose window is `Closable`, nothing can be written when it is read.
    ///
    /// # Errors
    /// As for an unmap.
    fn unmap_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, close: bool) -> io::Result<u64> {
        let _ = (space, bitmap, close);
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
#[path = "host_test.rs"]
mod host_test;
