//! What the bridge asks of a host IOMMU: the seam to `type1`, `iommufd` and `vfio_user`, and to the `model` that tests
//! use.
//!
//! A backend knows its address spaces, and how groups get into them ([`Placement`]); the bridge keeps the ledger of
//! each space. Permissions, addresses and ranges are passed on as they are: no backend merges, crops or retries.

pub mod faulty;
pub(crate) mod iommufd;
pub mod model;
pub(crate) mod type1;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vtd::{Perm, RefusalCause};

use crate::bridge::guest_map::HostMem;
use crate::bridge::limits::Limits;

/// A host IOMMU group, by the kernel's number (`/sys/kernel/iommu_groups/N`); or what stands for one: a function that
/// another process emulates is alone in its group, which the kernel knows nothing of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GroupId(pub u32);

/// Above every number of the kernel.
const FIRST_OF_USER_FUNCTIONS: u32 = 1 << 31;

impl GroupId {
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

    /// `group` leaves the space that it is attached to, if it is to one, and reaches what `space` has. A group is never
    /// seen to reach something else in between, but it may reach nothing. Only asked of a host with a
    /// [`Placement::PerSpace`].
    ///
    /// # Errors
    /// The group is where it was, or reaches nothing; unless [`HostIommu::astray`] says otherwise.
    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        let _ = (group, space);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// `group` reaches nothing. Only asked of a host with a [`Placement::PerSpace`], of a group that is attached.
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

    /// What the user can do about a map in `space` that was refused for `cause`: a sentence, or nothing.
    fn remedy(&self, space: HostSpaceId, cause: RefusalCause) -> String {
        let _ = (space, cause);
        String::new()
    }

    /// After an attach of `group` that failed: why it may be in that space, in the one before, or in none, and which is
    /// not known. `None` when it is where it was, or reaches nothing. Its functions are stopped for it.
    fn astray(&self, group: GroupId) -> Option<String> {
        let _ = group;
        None
    }
}

#[cfg(test)]
#[path = "host_test.rs"]
mod host_test;
