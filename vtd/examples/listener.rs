//! A remapping unit over memory of one's own, with a listener of one's own: `cargo run -p vtd --example listener`.
//!
//! What a guest's driver would do is done here by hand: tables in memory, registers, and the invalidation queue. The
//! listener hears of each change; an emulated device in the same domain reads and writes through the same tables.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::spec::invalidation::{IotlbHigh, IotlbLow, WaitHigh, WaitLow, granularity, kind};
use vtd::spec::registers::{FaultStatus, Global, offset};
use vtd::spec::root_context::{ContextEntryHigh, ContextEntryLow, RootEntryLow};
use vtd::spec::second_stage::SecondStageEntry;
use vtd::{
    Applied, AttachRefused, DmaError, Gpa, Iova, IovaRange, MapOp, Mapping, Msi, MsiSink, Perm, Requester, SourceId,
    SpaceKey, SpaceListener, Stream, Unit, UnitConfig, UnitId,
};

type Memory = GuestMemoryMmap<()>;

/// Bytes of guest memory, from address 0.
const MEMORY: u64 = 1 << 20;

// ---- The listener: what each assigned function reaches. A real one has the host's IOMMU below; see `vfio-bridge`.

/// By function: the space that it is in, and what is mapped there.
#[derive(Default)]
struct Reach(Mutex<BTreeMap<Stream, (SpaceKey, Vec<Mapping>)>>);

impl SpaceListener for Reach {
    fn attach(
        &self,
        stream: Stream,
        space: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        println!("attach {stream} to {space}");
        let mut mappings: Vec<Mapping> = live.collect();
        if *space == SpaceKey::Identity {
            // The unit does not list guest memory: whoever built the unit knows it.
            mappings.push(Mapping { iova: Iova(0), gpa: Gpa(0), len: MEMORY, perm: Perm::ReadWrite });
        }
        self.0.lock().unwrap().insert(stream, (*space, mappings));
        Ok(())
    }

    fn detach(&self, stream: Stream) {
        println!("detach {stream}");
        self.0.lock().unwrap().remove(&stream);
    }

    fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied {
        for op in ops {
            println!("{space}: {op:?}");
            for (_, mappings) in self.0.lock().unwrap().values_mut().filter(|(at, _)| at == space) {
                match *op {
                    MapOp::Map(mapping) => mappings.push(mapping),
                    MapOp::Unmap(range) => *mappings = mappings.iter().flat_map(|m| outside(m, range)).collect(),
                }
            }
        }
        Applied::default() // Nothing was refused.
    }
}

/// What a mapping has outside `range`: an unmap may end within one.
fn outside(m: &Mapping, range: IovaRange) -> impl Iterator<Item = Mapping> {
    let (iova, gpa, perm) = (m.iova.0, m.gpa.0, m.perm);
    let kept = m.range().without([range]).into_iter();
    kept.map(move |IovaRange { first, last }| Mapping {
        iova: Iova(first),
        gpa: Gpa(gpa + (first - iova)),
        len: last - first + 1,
        perm,
    })
}

impl Reach {
    /// Where the function gets with `iova`, for this example.
    fn of(&self, requester: Requester, iova: u64) -> Option<Gpa> {
        let functions = self.0.lock().unwrap();
        let hit = functions.get(&requester.into())?.1.iter().find(|m| m.iova.0 <= iova && iova <= m.last().0)?;
        Some(Gpa(hit.gpa.0 + (iova - hit.iova.0)))
    }
}

// ---- The guest: tables, registers and the queue.

const ROOT_TABLE: u64 = 0x1000;
const CONTEXT_TABLE: u64 = 0x2000;
/// Tables of level 4, 3, 2 and 1 of one second stage: 48 bits.
const TABLES: [u64; 4] = [0x3000, 0x4000, 0x5000, 0x6000];
const QUEUE: u64 = 0x7000;
const STATUS: u64 = 0x8000;
/// The page that the devices are to reach, and by which address.
const PAGE: u64 = 0x9_0000;
const IOVA: u64 = 0x7_6543_2000;
const DOMAIN: u16 = 5;

const fn function(device: u8) -> Requester {
    Requester { segment: 0, sid: SourceId::new(0, device, 0) }
}
/// A function that is assigned, and one that is emulated.
const ASSIGNED: Requester = function(3);
const EMULATED: Requester = function(4);

struct Guest {
    memory: Memory,
    unit: Arc<Unit<Memory>>,
    tail: u64,
    waits: u32,
}

impl Guest {
    fn store(&self, at: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(at)).expect("guest memory");
    }
    fn write32(&self, register: u64, value: u32) {
        self.unit.write(register, &value.to_le_bytes());
    }
    fn write64(&self, register: u64, value: u64) {
        self.unit.write(register, &value.to_le_bytes());
    }
    fn read32(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// Root entry, context entries of both functions, and all of the second stage but its leaf.
    fn write_tables(&self) {
        let root = RootEntryLow::new().with_present(true).with_context_table(CONTEXT_TABLE >> 12);
        self.store(ROOT_TABLE, root.into_bits());
        for requester in [ASSIGNED, EMULATED] {
            let entry = CONTEXT_TABLE + 16 * u64::from(requester.sid.devfn());
            // An address width of 2 is 48 bits.
            let high = ContextEntryHigh::new().with_address_width(2).with_domain(DOMAIN);
            let low = ContextEntryLow::new().with_present(true).with_second_stage(TABLES[0] >> 12);
            self.store(entry + 8, high.into_bits());
            self.store(entry, low.into_bits());
        }
        for (level, tables) in (2..=4).rev().zip(TABLES.windows(2)) {
            self.store(tables[0] + index(level), to(tables[1]));
        }
    }

    /// The order of a driver: root table, queue, translation. Each command is done when the write returns.
    fn turn_on(&self) {
        self.write64(offset::RTADDR, ROOT_TABLE);
        let mut on = Global::new();
        self.write32(offset::GCMD, on.with_root_table_pointer(true).into_bits());
        self.write64(offset::IQA, QUEUE); // 256 descriptors: a page.
        on = on.with_queued_invalidation(true);
        self.write32(offset::GCMD, on.into_bits());
        on = on.with_translation(true);
        self.write32(offset::GCMD, on.into_bits());
        let status = Global::from_bits(self.read32(offset::GSTS));
        assert!(status.translation() && status.queued_invalidation() && status.root_table_pointer());
    }

    fn descriptor(&mut self, low: u64, high: u64) {
        self.store(QUEUE + self.tail, low);
        self.store(QUEUE + self.tail + 8, high);
        self.tail += 16;
    }

    /// Writes the leaf (0: not present) and invalidates its page. With Caching Mode a driver says both what it adds and
    /// what it takes away.
    fn set_leaf(&mut self, leaf: u64) {
        self.store(TABLES[3] + index(1), leaf);
        let pages = IotlbLow::new().with_kind(kind::IOTLB).with_granularity(granularity::SELECTIVE);
        self.descriptor(pages.with_domain(DOMAIN).into_bits(), IotlbHigh::new().with_page(IOVA >> 12).into_bits());
        self.waits += 1;
        let wait = WaitLow::new().with_kind(kind::WAIT).with_status_write(true).with_status(self.waits);
        self.descriptor(wait.into_bits(), WaitHigh::new().with_address(STATUS / 4).into_bits());
        self.write64(offset::IQT, self.tail);
        let status: u32 = self.memory.read_obj(GuestAddress(STATUS)).expect("guest memory");
        assert_eq!(status, self.waits, "the wait was not served");
    }
}

/// Where in its table the entry of `level` for [`IOVA`] is.
fn index(level: u64) -> u64 {
    (IOVA >> (3 + 9 * level) & 511) * 8
}

/// An entry that leads to `page`, readable and writable.
fn to(page: u64) -> u64 {
    SecondStageEntry::new().with_read(true).with_write(true).with_page(page >> 12).into_bits()
}

/// Takes the unit's own interrupts.
struct Events;

impl MsiSink for Events {
    fn signal(&self, msi: Msi) {
        println!("the unit interrupts: {msi:x?}");
    }
}

fn main() {
    let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("guest memory");
    let reach = Arc::new(Reach::default());
    let config = UnitConfig::new(UnitId(0), 48);
    let unit = Unit::new(config, memory.clone(), reach.clone(), Arc::new(Events)).expect("a unit");
    let mut guest = Guest { memory, unit: unit.clone(), tail: 0, waits: 0 };

    // Until the guest turns translation on, a function reaches all of its memory.
    unit.add_requester(ASSIGNED).expect("attached");
    assert_eq!(reach.of(ASSIGNED, PAGE), Some(Gpa(PAGE)));

    // From then on it reaches what the tables say: nothing yet.
    guest.write_tables();
    guest.turn_on();
    assert_eq!((reach.of(ASSIGNED, PAGE), reach.of(ASSIGNED, IOVA)), (None, None));

    // One page, and the listener was told before the guest saw its wait descriptor served.
    guest.set_leaf(to(PAGE));
    assert_eq!(reach.of(ASSIGNED, IOVA + 0x123), Some(Gpa(PAGE + 0x123)));

    // An emulated device goes through its endpoint: no listener is asked, the tables are.
    let endpoint = unit.endpoint(EMULATED);
    endpoint.write(Iova(IOVA + 0x10), b"by the tables").expect("it is mapped");
    let mut there = [0; 13];
    guest.memory.read_slice(&mut there, GuestAddress(PAGE + 0x10)).expect("guest memory");
    println!("an emulated device wrote {:?} at {IOVA:#x}, which is {PAGE:#x}", String::from_utf8_lossy(&there));
    assert_eq!(&there, b"by the tables");

    // Taken away: neither gets there any more, and the emulated access is a fault that the guest can read.
    guest.set_leaf(0);
    assert_eq!(reach.of(ASSIGNED, IOVA), None);
    let blocked = endpoint.read(Iova(IOVA), &mut there);
    assert!(matches!(blocked, Err(DmaError::Fault(_))), "{blocked:?}");
    assert!(FaultStatus::from_bits(guest.read32(offset::FSTS)).pending());
    println!("after the unmap: {}", blocked.unwrap_err());

    unit.remove_requester(ASSIGNED);
    assert!(reach.0.lock().unwrap().is_empty());
    let stats = unit.stats();
    println!("{} map and {} unmap told, {} waits served", stats.map_ops, stats.unmap_ops, stats.descriptors.wait);
    assert_eq!((stats.map_ops, stats.unmap_ops, stats.descriptors.wait), (1, 1, 2));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_runs() {
        main();
    }

    #[test]
    fn b8_an_unmap_within_a_mapping_keeps_the_rest() {
        let reach = Reach::default();
        reach.attach(ASSIGNED.into(), &SpaceKey::Identity, &mut std::iter::empty()).unwrap();
        let unmap = MapOp::Unmap(IovaRange::new(0x2000, 0x2fff));
        assert!(reach.apply(&SpaceKey::Identity, &[unmap]).refused.is_empty());
        let at = [0, 0x1fff, 0x2000, 0x2fff, 0x3000, MEMORY - 1, MEMORY].map(|iova| reach.of(ASSIGNED, iova));
        let same = |iova| Some(Gpa(iova));
        assert_eq!(at, [same(0), same(0x1fff), None, None, same(0x3000), same(MEMORY - 1), None]);
    }
}
