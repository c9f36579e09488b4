//! What the bridge asks of a host IOMMU: the seam to `type1`, and to the `model` that tests use.
//!
//! A backend knows containers, and which container a group is in; the bridge keeps the ledger of each. Permissions,
//! addresses and ranges are passed on as they are: no backend merges, crops or retries.

use std::io;

use vtd::{Perm, RefusalCause};

use crate::guest_map::HostMem;
use crate::limits::Limits;

/// Size of the smallest page that every part of the bridge works in.
pub const PAGE_SIZE: u64 = 4096;

/// A host IOMMU group, by the kernel's number (`/sys/kernel/iommu_groups/N`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GroupId(pub u32);

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// One set of host translations: what type1 calls a container.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ContainerId(pub u32);

/// What one host unmap takes away.
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

/// A host IOMMU that holds translations in containers.
///
/// The bridge never calls it twice at once for one container.
pub trait HostIommu: Send + Sync {
    /// The name that statistics show, such as `type1`.
    fn name(&self) -> &'static str;

    /// The container that `group` is in for as long as it is open, `None` for a group that is not open.
    fn container(&self, group: GroupId) -> Option<ContainerId>;

    /// What the host allows in `container`.
    fn limits(&self, container: ContainerId) -> Limits;

    /// One host map: `iova` leads to `mem`, with exactly `perm`. On an error nothing of it is mapped.
    fn map(&self, container: ContainerId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused>;

    /// One host unmap. Returns how many bytes the kernel says it took away. When it returns, no device reaches them
    /// any more. On an error nothing may be concluded about what is still mapped.
    fn unmap(&self, container: ContainerId, range: UnmapRange) -> io::Result<u64>;
}
