//! A bridge over a model, and what tests say about them.

use std::sync::{Arc, Mutex};

use vfio_bridge::model::{Contents, HostOp, Kernel, Model, Served};
use vfio_bridge::{Bridge, GroupId, GuestMap, Quarantine, Region, UnmapRange};
use vtd::{
    Applied, AttachRefused, DomainId, Gpa, Iova, MapOp, Mapping, PagedSpace, Perm, Requester, SourceId, SpaceKey,
    SpaceListener, Stage, UnitId,
};

pub const KIB4: u64 = 4096;
pub const MIB2: u64 = 2 << 20;
pub const GIB: u64 = 1 << 30;

/// Guest RAM: low memory, a hole up to 4 GiB, high memory. The host addresses of the two are far apart.
#[derive(Clone, Copy)]
pub struct Ram {
    pub low: u64,
    pub high: u64,
}

pub const LOW_HVA: u64 = 1 << 45;
pub const HIGH_HVA: u64 = 1 << 46;
pub const HIGH_GPA: u64 = 4 * GIB;

impl Ram {
    pub fn map(self) -> GuestMap {
        let region = |gpa, len, hva| {
            // SAFETY: the model never uses the address.
            unsafe { Region::ram(gpa, len, hva, None) }.expect("whole pages")
        };
        GuestMap::new(vec![region(0, self.low, LOW_HVA), region(HIGH_GPA, self.high, HIGH_HVA)]).expect("disjoint")
    }

    /// Where a guest-physical address is, said without the code under test.
    pub fn hva(self, gpa: u64) -> Option<u64> {
        match gpa {
            _ if gpa < self.low => Some(LOW_HVA + gpa),
            _ if gpa >= HIGH_GPA && gpa - HIGH_GPA < self.high => Some(HIGH_HVA + (gpa - HIGH_GPA)),
            _ => None,
        }
    }
}

/// Remembers what was stopped.
#[derive(Default)]
pub struct Stopped {
    pub functions: Mutex<Vec<Requester>>,
    pub machine: Mutex<bool>,
    /// Stopping a function fails.
    pub stubborn: Mutex<bool>,
}

impl Quarantine for Stopped {
    fn quarantine(&self, functions: &[Requester], _: &str) -> Result<(), String> {
        self.functions.lock().expect("whole").extend(functions);
        if *self.stubborn.lock().expect("whole") { Err("it does not listen".into()) } else { Ok(()) }
    }
    fn stop_machine(&self, _: &[Requester], _: &str) {
        *self.machine.lock().expect("whole") = true;
    }
}

pub struct World {
    pub model: Arc<Model>,
    pub bridge: Bridge,
    pub stopped: Arc<Stopped>,
}

pub fn requester(device: u8) -> Requester {
    Requester { segment: 0, sid: SourceId::new(0, device, 0) }
}

pub fn paged(domain: u16, width: u8) -> SpaceKey {
    SpaceKey::Paged(PagedSpace {
        unit: UnitId(0),
        root: Gpa(0x1000 * u64::from(domain)),
        width,
        stage: Stage::Second,
        domain: DomainId(domain),
    })
}

pub fn mapping(iova: u64, gpa: u64, len: u64) -> Mapping {
    Mapping { iova: Iova(iova), gpa: Gpa(gpa), len, perm: Perm::ReadWrite }
}

pub fn map(iova: u64, gpa: u64, len: u64) -> MapOp {
    MapOp::Map(mapping(iova, gpa, len))
}

pub fn unmap(first: u64, last: u64) -> MapOp {
    MapOp::Unmap { first: Iova(first), last: Iova(last) }
}

impl World {
    /// Functions `(device, group)` before a host of kind `kernel`.
    pub fn new(kernel: Kernel, ram: Ram, functions: &[(u8, u32)]) -> Self {
        let groups: Vec<GroupId> = functions.iter().map(|(_, group)| GroupId(*group)).collect();
        let model = Model::new(kernel, &groups);
        let stopped = Arc::new(Stopped::default());
        let bridge = Bridge::new(model.clone(), ram.map(), stopped.clone());
        for (device, group) in functions {
            bridge.register(requester(*device), GroupId(*group)).expect("new");
        }
        Self { model, bridge, stopped }
    }

    /// One function, device 1 in group 1, attached to a paged space.
    pub fn one(kernel: Kernel, width: u8) -> (Self, SpaceKey) {
        let world = Self::new(kernel, Ram { low: 2 * GIB, high: 4 * GIB }, &[(1, 1)]);
        let space = paged(1, width);
        world.attach(1, &space, &[]).expect("attached");
        (world, space)
    }

    pub fn attach(&self, device: u8, space: &SpaceKey, live: &[Mapping]) -> Result<(), AttachRefused> {
        self.bridge.attach(requester(device), None, space, &mut live.iter().copied())
    }

    pub fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied {
        self.bridge.apply(space, ops)
    }

    /// Applies, and nothing may be refused.
    pub fn done(&self, space: &SpaceKey, ops: &[MapOp]) {
        assert_eq!(self.apply(space, ops), Applied::default());
    }

    pub fn contents(&self) -> Contents {
        self.model.contents(GroupId(1))
    }

    /// First IOVA and length of each mapping of group 1.
    pub fn shape(&self) -> Vec<(u64, u64)> {
        self.contents().values().map(|held| (held.iova, held.len)).collect()
    }

    pub fn stats(&self, device: u8) -> vfio_bridge::DeviceStats {
        self.bridge.stats(requester(device)).expect("registered")
    }

    /// The unmaps since the last look.
    pub fn unmaps(&self) -> Vec<UnmapRange> {
        let range = |served: Served| match served.op {
            HostOp::Unmap(range) => Some(range),
            HostOp::Map(_) => None,
        };
        self.model.served().into_iter().filter_map(range).collect()
    }
}
