//! What the bridge asks of a host IOMMU: the seam to `type1`, to `vfio_user`, and to the `model` that tests use.
//!
//! A backend knows containers, and which container a group is in; the bridge keeps the ledger of each. Permissions,
//! addresses and ranges are passed on as they are: no backend merges, crops or retries.

pub mod model;
pub(crate) mod type1;

use std::io;
use std::sync::Arc;

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

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.of_kernel() {
            Some(number) => number.fmt(f),
            None => write!(f, "vfio-user{}", self.0 - FIRST_OF_USER_FUNCTIONS),
        }
    }
}

/// One set of host translations: what type1 calls a container.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ContainerId(pub u32);

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

/// A host IOMMU that holds translations in containers.
///
/// The bridge never calls it twice at once for one container.
pub trait HostIommu: Send + Sync {
    /// The name that statistics show for `container`, such as `type1`.
    fn name(&self, container: ContainerId) -> &'static str;

    /// The container that `group` is in for as long as it is open, `None` for a group that is not open.
    fn container(&self, group: GroupId) -> Option<ContainerId>;

    /// What the host allows in `container`.
    fn limits(&self, container: ContainerId) -> Limits;

    /// One host map: `iova` leads to `mem`, with exactly `perm`. On an error nothing of it is mapped.
    fn map(&self, container: ContainerId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused>;

    /// Several maps that overlap nowhere, as [`HostIommu::map`] each. `done` hears of each, in their order, when its
    /// result is known. A host that is far away can be asked for many at a time.
    fn map_all(&self, container: ContainerId, maps: &[Map<'_>], done: &mut dyn FnMut(Result<(), MapRefused>)) {
        maps.iter().for_each(|map| done(self.map(container, map.iova, map.mem, map.perm)));
    }

    /// One host unmap. Returns how many bytes the kernel says it took away. When it returns, no device reaches them
    /// any more. On an error nothing may be concluded about what is still mapped.
    fn unmap(&self, container: ContainerId, range: UnmapRange) -> io::Result<u64>;
}

/// Several hosts, each with containers of its own.
#[derive(Default)]
pub struct Hosts(Vec<Arc<dyn HostIommu>>);

impl Hosts {
    /// `hosts`, no group of which is in two.
    pub fn new(hosts: Vec<Arc<dyn HostIommu>>) -> Self {
        Self(hosts)
    }

    /// Whose container it is.
    fn of(&self, container: ContainerId) -> io::Result<&dyn HostIommu> {
        let group = GroupId(container.0);
        let host = self.0.iter().find(|host| host.container(group) == Some(container));
        host.map(Arc::as_ref).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl HostIommu for Hosts {
    fn name(&self, container: ContainerId) -> &'static str {
        self.of(container).map_or("none", |host| host.name(container))
    }

    fn container(&self, group: GroupId) -> Option<ContainerId> {
        self.0.iter().find_map(|host| host.container(group))
    }

    fn limits(&self, container: ContainerId) -> Limits {
        self.of(container).map(|host| host.limits(container)).unwrap_or_default()
    }

    fn map(&self, container: ContainerId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let host = self.of(container).map_err(|_| MapRefused::from_errno(libc::ENODEV))?;
        host.map(container, iova, mem, perm)
    }

    fn map_all(&self, container: ContainerId, maps: &[Map<'_>], done: &mut dyn FnMut(Result<(), MapRefused>)) {
        match self.of(container) {
            Ok(host) => host.map_all(container, maps, done),
            Err(_) => maps.iter().for_each(|_| done(Err(MapRefused::from_errno(libc::ENODEV)))),
        }
    }

    fn unmap(&self, container: ContainerId, range: UnmapRange) -> io::Result<u64> {
        self.of(container)?.unmap(container, range)
    }
}

#[cfg(test)]
#[path = "host_test.rs"]
mod host_test;
