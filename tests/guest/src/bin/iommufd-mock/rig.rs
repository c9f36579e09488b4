//! Guest memory, a bridge over iommufd, and mocks behind it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use guest_programs::memory::{Backing, DmaMemory, PAGE};
use vfio_bridge::{Bridge, GroupId, GuestMap, Iommufd, Quarantine, Region};
use vtd::{
    DomainId, Gpa, Iova, IovaRange, MapOp, Mapping, PagedSpace, Perm, Requester, SourceId, SpaceKey, SpaceListener,
    Tables, UnitId,
};

use crate::mock::{Attached, Kind, Mock};

/// Pages of guest memory, which begins at 0.
pub const PAGES: u64 = 1024;
const MEMORY: usize = PAGES as usize * PAGE;

struct Nobody;

impl Quarantine for Nobody {
    fn quarantine(&self, _: &[Requester], why: &str) -> Result<(), String> {
        Err(why.to_owned())
    }
    fn stop_machine(&self, _: &[Requester], why: &str) {
        eprintln!("iommufd-mock: an unmap failed: {why}");
        std::process::exit(1);
    }
}

/// All of it.
pub struct Rig {
    pub bridge: Bridge,
    pub host: Arc<Iommufd>,
    pub guest: GuestMap,
    pub mocks: Vec<Arc<Mock>>,
    // After those who have it mapped.
    pub memory: DmaMemory,
}

impl Rig {
    /// With a mock of each of `kinds`, each alone in a group, and registered.
    pub fn new(kinds: &[Kind]) -> Result<Self> {
        let memory = DmaMemory::new(MEMORY, Backing::Base)?;
        // SAFETY: the mapping is dropped after the guest map and whoever has it mapped, and all accesses to it are
        // volatile.
        let region = unsafe { Region::ram(0, MEMORY as u64, memory.address(0), None) }?;
        let guest = GuestMap::new(vec![region])?;
        let host = Arc::new(Iommufd::new(None, &guest)?);
        ensure!(host.pins_once(), "this kernel does not copy parts of what is mapped");
        let mut mocks = Vec::new();
        for (n, kind) in (0..).zip(kinds) {
            let device = host.add_device(GroupId(n), |iommufd| {
                let mock = Arc::new(Mock::new(iommufd, *kind)?);
                mocks.push(Arc::clone(&mock));
                Ok((mock.device(), Box::new(Attached(mock)) as _))
            });
            device.context("a device of IOMMUFD_TEST")?;
        }
        let bridge = Bridge::new(vec![host.clone()], guest.clone(), Arc::new(Nobody));
        for (n, mock) in mocks.iter().enumerate() {
            bridge.register_device(requester(n), GroupId(n as u32), mock.device())?;
        }
        Ok(Self { bridge, host, guest, mocks, memory })
    }

    /// The bridge does all of `ops` in `space`.
    pub fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Result<()> {
        let refused = self.bridge.apply(space, ops).refused;
        ensure!(refused.is_empty(), "the bridge refuses {refused:?}");
        Ok(())
    }

    /// The nth mock is attached to `space`, which has these.
    pub fn attach(&self, nth: usize, space: &SpaceKey, live: &[Mapping]) -> Result<()> {
        let mut live = live.iter().copied();
        self.bridge.attach(requester(nth).into(), space, &mut live).context("an attach")
    }
}

/// The nth mock.
pub fn requester(nth: usize) -> Requester {
    Requester { segment: 0, sid: SourceId::new(0, nth as u8 + 1, 0) }
}

/// A space of the guest.
pub fn space(domain: u16) -> SpaceKey {
    let tables = Tables::Second { root: Gpa(u64::from(domain) << 12), width: 48 };
    SpaceKey::Paged(PagedSpace { unit: UnitId(0), tables, domain: DomainId(domain) })
}

/// Pages from `iova` on lead to those from the page `gpa` on.
pub fn mapping(iova: u64, gpa: u64, pages: u64, perm: Perm) -> Mapping {
    Mapping { iova: Iova(iova), gpa: Gpa(gpa * PAGE as u64), len: pages * PAGE as u64, perm }
}

/// `pages` of them from `iova` on.
pub fn range(iova: u64, pages: u64) -> IovaRange {
    IovaRange { first: iova, last: iova + (pages * PAGE as u64 - 1) }
}
