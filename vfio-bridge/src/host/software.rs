//! A host for devices that this process emulates and whose DMA goes by addresses of this process, pinned page by page
//! (D). No kernel is told anything: what a device may reach is what the bridge's ledger has, and
//! [`PinClient`](crate::PinClient) asks that. So such a device is attached, switched, replayed to and refused as any
//! other.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vtd::{IovaRange, Perm};

use super::{GroupId, HostIommu, HostSpaceId, MapRefused, Placement, UnmapRange};
use crate::bridge::guest_map::{HostMem, PAGE_SIZE};
use crate::bridge::limits::Limits;

/// Mappings of one space: what a guest can make grow has an end.
const ENTRIES: u64 = 1 << 20;

/// First IOVA and last of what is mapped in a space.
type Mapped = BTreeMap<u64, u64>;

/// The host. Each device is alone in its group, and has a space of its own.
#[derive(Default)]
pub struct Software {
    groups: Mutex<BTreeMap<GroupId, HostSpaceId>>,
    spaces: Mutex<BTreeMap<HostSpaceId, Mapped>>,
}

impl Software {
    /// A new group, for one device.
    pub fn open(&self) -> GroupId {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let (group, space) = (GroupId::of_software(groups.len() as u32), HostSpaceId::next());
        groups.insert(group, space);
        self.spaces().insert(space, Mapped::new());
        group
    }

    fn spaces(&self) -> MutexGuard<'_, BTreeMap<HostSpaceId, Mapped>> {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostIommu for Software {
    fn name(&self) -> &'static str {
        "software"
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.get(&group).map(|space| Placement::PerGroup(*space))
    }

    fn limits(&self, _: HostSpaceId) -> Limits {
        Limits {
            iova_ranges: vec![IovaRange { first: 0, last: u64::MAX - PAGE_SIZE }],
            page_sizes: !(PAGE_SIZE - 1),
            entries: ENTRIES,
            // Pinned pages have a limit of their own (D-5).
            memlock: None,
            unmap_all: true,
        }
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, _: Perm) -> Result<(), MapRefused> {
        let last = iova.checked_add(mem.size() - 1).ok_or_else(|| MapRefused::from_errno(libc::EINVAL))?;
        let mut spaces = self.spaces();
        let mapped = spaces.get_mut(&space).ok_or_else(|| MapRefused::from_errno(libc::ENODEV))?;
        if mapped.len() as u64 >= ENTRIES {
            return Err(MapRefused::from_errno(libc::ENOSPC));
        }
        if mapped.range(..=last).next_back().is_some_and(|(_, before)| *before >= iova) {
            return Err(MapRefused::from_errno(libc::EEXIST));
        }
        mapped.insert(iova, last);
        Ok(())
    }

    /// Takes whole mappings, as the kernel's does.
    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        let (first, last) = match range {
            UnmapRange::Span { first, last } => (first, last),
            UnmapRange::All => (0, u64::MAX),
        };
        let mut spaces = self.spaces();
        let mapped = spaces.get_mut(&space).ok_or(io::ErrorKind::NotConnected)?;
        let is_cut = |edge: u64| {
            let below = mapped.range(..=edge).next_back();
            below.is_some_and(|(from, to)| *to >= edge && (*from < first || *to > last))
        };
        if is_cut(first) || is_cut(last) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let gone: Vec<(u64, u64)> = mapped.range(first..=last).map(|(from, to)| (*from, *to)).collect();
        for (from, _) in &gone {
            mapped.remove(from);
        }
        Ok(gone.iter().map(|(from, to)| to - from + 1).sum())
    }
}
