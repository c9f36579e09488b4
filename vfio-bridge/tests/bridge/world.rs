//! A bridge over a model, and what tests say about them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vfio_bridge::model::{Contents, Held, HostOp, Kernel, Model, Served};
use vfio_bridge::{Bridge, GroupId, GuestMap, HostIommu, Quarantine, Region, UnmapRange};
use vtd::{
    Applied, AttachRefused, DomainId, Gpa, Iova, IovaRange, MapOp, Mapping, PagedSpace, Perm, Requester, SourceId,
    SpaceKey, SpaceListener, Tables, UnitId,
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
        GuestMap::new(self.regions()).expect("disjoint")
    }

    pub fn regions(self) -> Vec<Region> {
        let region = |gpa, len, hva| {
            // SAFETY: the model never uses the address.
            unsafe { Region::ram(gpa, len, hva, None) }.expect("whole pages")
        };
        vec![region(0, self.low, LOW_HVA), region(HIGH_GPA, self.high, HIGH_HVA)]
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

/// Page by page: where a device gets, and with what permission.
pub type Pages = BTreeMap<u64, (u64, Perm)>;

pub fn pages_of(contents: &Contents) -> Pages {
    let mut pages = Pages::new();
    for held in contents.values() {
        for offset in (0..held.len).step_by(4096) {
            pages.insert(held.iova + offset, (held.hva + offset, held.perm));
        }
    }
    pages
}

/// Looks at a switch after each of its operations: `before` is what the container held, `ops` are the operations, each
/// with what it held afterwards. For hosts that refuse nothing, and up to 64 pieces under one new mapping. Says what a
/// device would have noticed:
///
/// - what is neither old nor new is reachable;
/// - what is new is not there yet when the first old translation goes, although nothing was in its way;
/// - a translation that is in both spaces goes, and its extent had not to be cut; or a new one goes;
/// - an IOVA that both spaces have is without translation for longer than the operations of its own run: an unmap, and
///   maps in the range of that; or extents share a run that no new mapping spans.
pub fn check_switch(before: &Contents, ops: &[(HostOp, Contents)]) -> Result<(), String> {
    let Some((_, after)) = ops.last() else {
        return Ok(());
    };
    let (old, new) = (pages_of(before), pages_of(after));
    let both: Vec<u64> = old.keys().filter(|page| new.contains_key(page)).copied().collect();
    let changes = |held: &Held| (held.iova..=held.last()).step_by(4096).any(|page| old.get(&page) != new.get(&page));
    let mut run: Option<(u64, u64)> = None;
    let (mut held_before, mut pages_before) = (before.clone(), old.clone());
    for (op, held) in ops {
        let pages = pages_of(held);
        if let Some((page, _)) = pages.iter().find(|(page, to)| old.get(page) != Some(to) && new.get(page) != Some(to))
        {
            return Err(format!("{page:#x} is neither old nor new after {op:x?}"));
        }
        let missing = both.iter().find(|page| !pages_before.contains_key(page));
        match op {
            HostOp::Map(mapped) => {
                let inside = run.is_some_and(|(first, last)| first <= mapped.iova && mapped.last() <= last);
                if let Some(page) = missing.filter(|_| !inside) {
                    return Err(format!("{page:#x} is without translation while others get theirs: {op:x?}"));
                }
            }
            HostOp::Create
            | HostOp::Destroy
            | HostOp::Attach(_)
            | HostOp::Detach(_)
            | HostOp::AttachStream(_)
            | HostOp::DetachStream(_) => {
                return Err(format!("a group that is in its space for life has {op:x?}"));
            }
            HostOp::Unmap(range) => {
                if let Some(page) = missing {
                    return Err(format!("{page:#x} is without translation while others lose theirs: {op:x?}"));
                }
                let late = new.keys().find(|page| !old.contains_key(page) && !pages_before.contains_key(page));
                if let Some(page) = late.filter(|_| run.is_none()) {
                    return Err(format!("{page:#x} is not there before anything goes: {op:x?}"));
                }
                for (page, to) in pages_before.iter().filter(|(page, _)| !pages.contains_key(page)) {
                    let cut = before.values().any(|held| held.iova <= *page && *page <= held.last() && changes(held));
                    if new.get(page) == Some(to) && (old.get(page) != Some(to) || !cut) {
                        return Err(format!("{page:#x} is as it shall be and goes: {op:x?}"));
                    }
                }
                let gone: Vec<&Held> = held_before.values().filter(|old| !held.contains_key(&old.iova)).collect();
                let replaced =
                    |held: &&Held| (held.iova..=held.last()).step_by(4096).any(|page| new.contains_key(&page));
                let spanned = |a: &Held, b: &Held| after.values().any(|n| n.iova <= a.last() && b.iova <= n.last());
                if gone.iter().any(replaced)
                    && let Some(pair) = gone.windows(2).find(|pair| !spanned(pair[0], pair[1]))
                {
                    return Err(format!("{:x?} and {:x?} go together: {op:x?}", pair[0], pair[1]));
                }
                run = Some(match range {
                    UnmapRange::Span { first, last } => (*first, *last),
                    UnmapRange::All => (0, u64::MAX),
                });
            }
        }
        (held_before, pages_before) = (held.clone(), pages);
    }
    Ok(())
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
        tables: Tables::Second { root: Gpa(0x1000 * u64::from(domain)), width },
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
    MapOp::Unmap(IovaRange::new(first, last))
}

impl World {
    /// Functions `(device, group)` before a host of kind `kernel`.
    pub fn new(kernel: Kernel, ram: Ram, functions: &[(u8, u32)]) -> Self {
        let groups: Vec<GroupId> = functions.iter().map(|(_, group)| GroupId(*group)).collect();
        Self::over(Model::new(kernel, &groups), ram, functions)
    }

    /// The same over a host that attaches groups to spaces.
    pub fn per_space(kernel: Kernel, ram: Ram, functions: &[(u8, u32)]) -> Self {
        let groups: Vec<GroupId> = functions.iter().map(|(_, group)| GroupId(*group)).collect();
        Self::over(Model::per_space(kernel, &groups), ram, functions)
    }

    fn over(model: Arc<Model>, ram: Ram, functions: &[(u8, u32)]) -> Self {
        let host = model.clone();
        Self::through(host, model, ram, functions)
    }

    /// The same, where the bridge asks `host`, which asks `model`.
    pub fn through(host: Arc<dyn HostIommu>, model: Arc<Model>, ram: Ram, functions: &[(u8, u32)]) -> Self {
        let stopped = Arc::new(Stopped::default());
        let bridge = Bridge::new(vec![host], ram.map(), stopped.clone());
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
        self.bridge.attach(requester(device).into(), space, &mut live.iter().copied())
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
            _ => None,
        };
        self.model.served().into_iter().filter_map(range).collect()
    }
}
