//! A host IOMMU of one's own below the bridge: `cargo run -p vfio-bridge --example host_iommu`.
//!
//! The bridge is driven as a remapping unit drives it, by the calls of `SpaceListener`. A unit of `vtd` takes the
//! bridge as its listener as it is; `vtd/examples/listener.rs` has the unit's side.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vfio_bridge::{
    Bridge, GroupId, GuestMap, HostIommu, HostMem, HostSpaceId, Limits, MapRefused, PAGE_SIZE, Placement, Quarantine,
    UnmapRange,
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vtd::spec::INTERRUPT_WINDOW;
use vtd::{
    DomainId, Gpa, Iova, IovaRange, MapOp, Mapping, PagedSpace, Perm, RefusalCause, Requester, SourceId, SpaceKey,
    SpaceListener, Tables, UnitId,
};

// ---- The host: one container, a table in memory. A real one asks its IOMMU where this one inserts and removes.

/// By first IOVA: the last one, the address in this process, and what a device may do.
#[derive(Default)]
struct Table {
    held: Mutex<BTreeMap<u64, (u64, u64, Perm)>>,
    /// It does not let go any more.
    stuck: AtomicBool,
}

const GROUP: GroupId = GroupId(7);
const ENTRIES: usize = 3;

impl HostIommu for Table {
    fn name(&self) -> &'static str {
        "table"
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        (group == GROUP).then_some(Placement::PerGroup(HostSpaceId(1)))
    }

    fn limits(&self, _: HostSpaceId) -> Limits {
        let below = IovaRange { first: 0, last: INTERRUPT_WINDOW.first - 1 };
        let above = IovaRange { first: INTERRUPT_WINDOW.last + 1, last: (1 << 48) - 1 };
        let (iova_ranges, page_sizes, entries) = (vec![below, above], PAGE_SIZE, ENTRIES as u64);
        Limits { iova_ranges, page_sizes, entries, memlock: None, unmap_all: true }
    }

    fn map(&self, _: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        let mut held = self.held.lock().unwrap();
        if held.len() == ENTRIES {
            return Err(MapRefused { cause: RefusalCause::Limit, source: io::ErrorKind::StorageFull.into() });
        }
        println!("host: map {iova:#x} + {:#x} {perm}", mem.size());
        held.insert(iova, (iova + (mem.size() - 1), mem.hva(), perm));
        Ok(())
    }

    fn unmap(&self, _: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let (first, last) = match range {
            UnmapRange::Span { first, last } => (first, last),
            UnmapRange::All => (0, u64::MAX),
        };
        println!("host: unmap {first:#x}-{last:#x}");
        // The bridge never asks for a part of what it mapped.
        let mut held = self.held.lock().unwrap();
        Ok(held.extract_if(first..=last, |_, _| true).map(|(first, (last, ..))| last - first + 1).sum())
    }
}

impl Table {
    /// Where a device gets with `iova`, for this example.
    fn translate(&self, iova: u64) -> Option<(u64, Perm)> {
        let held = self.held.lock().unwrap();
        let (first, (last, hva, perm)) = held.range(..=iova).next_back()?;
        (iova <= *last).then(|| (hva + (iova - first), *perm))
    }

    fn len(&self) -> usize {
        self.held.lock().unwrap().len()
    }
}

/// Stops functions whose mappings the host did not take away. A real one clears Bus Master and resets.
#[derive(Default)]
struct Stopped(Mutex<Vec<Requester>>);

impl Quarantine for Stopped {
    fn quarantine(&self, functions: &[Requester], why: &str) -> Result<(), String> {
        println!("stop {functions:?}: {why}");
        self.0.lock().unwrap().extend(functions);
        Ok(())
    }

    fn stop_machine(&self, _: &[Requester], _: &str) {
        unreachable!("no function refused to stop");
    }
}

// ---- The unit's part.

const NIC: Requester = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };
/// Guest memory has 64 pages.
const MEMORY: u64 = 64 * PAGE_SIZE;

/// `page` of guest memory at `iova`.
fn mapping(iova: u64, page: u64, perm: Perm) -> Mapping {
    Mapping { iova: Iova(iova), gpa: Gpa(page * PAGE_SIZE), len: PAGE_SIZE, perm }
}

fn main() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("guest memory");
    let hva = |page: u64| memory.get_host_address(GuestAddress(page * PAGE_SIZE)).expect("guest memory").addr() as u64;
    let guest = GuestMap::of_memory(Arc::new(memory.clone())).expect("whole pages");
    let (table, stopped) = (Arc::new(Table::default()), Arc::new(Stopped::default()));
    let bridge = Bridge::new(vec![table.clone()], guest, stopped.clone());
    bridge.register(NIC, GROUP).expect("the group is open");
    assert!(table.len() == 0, "nothing before the unit says so");

    // Untranslated: all guest memory at its own addresses. The bridge knows it, nothing has to be listed.
    bridge.attach(NIC.into(), &SpaceKey::Identity, &mut std::iter::empty()).expect("attached");
    assert_eq!(table.translate(5 * PAGE_SIZE), Some((hva(5), Perm::ReadWrite)));

    // A page table of the guest with one page in it: the rest of memory goes.
    let space = SpaceKey::Paged(PagedSpace {
        unit: UnitId(0),
        tables: Tables::Second { root: Gpa(PAGE_SIZE), width: 48 },
        domain: DomainId(1),
    });
    bridge.attach(NIC.into(), &space, &mut [mapping(0x10_0000, 9, Perm::Read)].into_iter()).expect("attached");
    assert_eq!(table.translate(0x10_0000), Some((hva(9), Perm::Read)));
    assert_eq!(table.len(), 1);

    // More pages, and one that the host has no room for: it alone is refused.
    let pages = [0x20_0000, 0x30_0000, 0x40_0000].map(|iova| MapOp::Map(mapping(iova, 10, Perm::ReadWrite)));
    let refused = bridge.apply(&space, &pages).refused;
    println!("refused: {refused:?}");
    let refused: Vec<_> = refused.iter().map(|refusal| (refusal.range.first, refusal.cause)).collect();
    assert_eq!(refused, [(0x40_0000, RefusalCause::Limit)]);
    assert_eq!(table.len(), ENTRIES);

    // The ledger says what the host holds, so an unmap of what is not there asks the host nothing.
    let unmap = |first, last| bridge.apply(&space, &[MapOp::Unmap(IovaRange::new(first, last))]).refused;
    assert!(unmap(0x1000_0000, u64::MAX).is_empty());
    assert!(unmap(0x10_0000, 0x2f_ffff).is_empty());
    assert_eq!((table.translate(0x20_0000), table.translate(0x30_0000)), (None, Some((hva(10), Perm::ReadWrite))));
    let stats = bridge.stats(NIC).expect("registered");
    println!("{} host maps, {} host unmaps", stats.host_maps, stats.host_unmaps);
    assert_eq!(stats.host_unmaps, 2, "leaving identity, and the two pages together");

    // A host that does not let go: the function is stopped before the call returns, so before the guest is told.
    table.stuck.store(true, Ordering::Relaxed);
    assert!(unmap(0, u64::MAX).is_empty());
    assert_eq!(*stopped.0.lock().unwrap(), [NIC]);
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_example_runs() {
        super::main();
    }
}
