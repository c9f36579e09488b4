//! A unit with guest memory, tables in it, an invalidation queue, and a listener that models what it is told.
// Shared by the tests and the benches; neither uses all of it.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::spec::fault::FaultRecordHigh;
use vtd::spec::invalidation::{ContextCacheLow, IotlbHigh, IotlbLow, WaitHigh, WaitLow, granularity, kind};
use vtd::spec::registers::{Global, offset};
use vtd::spec::root_context::{ContextEntryHigh, ContextEntryLow, RootEntryLow};
use vtd::spec::second_stage::{SecondStageEntry, entry_span, levels};
use vtd::{
    Applied, AttachRefused, DirtyLog, DomainId, Gpa, GpaRange, Iova, IovaRange, MapOp, Mapping, Msi, MsiSink,
    PagedSpace, Perm, Refusal, RefusalCause, Requester, SourceId, SpaceKey, SpaceListener, Stream, Tables, Unit,
    UnitConfig, UnitId,
};

pub type Memory = GuestMemoryMmap<DirtyLog>;

/// Size of guest memory, from address 0.
pub const MEMORY: u64 = 64 << 20;
/// Where the invalidation queue is; it has 256 descriptors.
pub const QUEUE: u64 = 0x10_0000;
/// Where wait descriptors write their status.
pub const STATUS: u64 = 0x10_8000;
/// Tables are allocated from here.
pub const TABLES: u64 = 0x20_0000;

/// The function most tests assign.
pub const NVME: Requester = requester(0, 3, 0);
/// Another one.
pub const NIC: Requester = requester(1, 0, 1);

pub const fn requester(bus: u8, device: u8, function: u8) -> Requester {
    Requester { segment: 0, sid: SourceId::new(bus, device, function) }
}

pub fn mapping(iova: u64, gpa: u64, len: u64, perm: Perm) -> Mapping {
    Mapping { iova: Iova(iova), gpa: Gpa(gpa), len, perm }
}

pub fn map(iova: u64, gpa: u64, len: u64) -> MapOp {
    MapOp::Map(mapping(iova, gpa, len, Perm::ReadWrite))
}

pub fn unmap(first: u64, last: u64) -> MapOp {
    MapOp::Unmap(IovaRange::new(first, last))
}

/// What a listener was told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Attach(Requester, SpaceKey, Vec<Mapping>),
    Detach(Requester),
    Apply(SpaceKey, Vec<MapOp>),
}

#[derive(Default)]
pub struct Told {
    pub events: Vec<Event>,
    pub attached: BTreeMap<Requester, SpaceKey>,
    /// First IOVA -> mapping.
    pub spaces: BTreeMap<SpaceKey, BTreeMap<u64, Mapping>>,
    /// Maps at these IOVAs are refused, from 2^32 on as outside the host's ranges.
    pub refuse: BTreeSet<u64>,
    /// Here is no memory: what leads there is refused.
    pub absent: Vec<GpaRange>,
    /// These find no room in a space of others.
    pub crowded: BTreeSet<Requester>,
    /// Attaches of these are refused whole.
    pub unattachable: BTreeSet<Requester>,
}

impl Told {
    fn unmap(space: &mut BTreeMap<u64, Mapping>, first: u64, last: u64) {
        let hit: Vec<Mapping> = space.range(..=last).map(|(_, m)| *m).filter(|m| m.last().0 >= first).collect();
        for old in hit {
            space.remove(&old.iova.0);
            if old.iova.0 < first {
                space.insert(old.iova.0, Mapping { len: first - old.iova.0, ..old });
            }
            if old.last().0 > last {
                let cut = last + 1 - old.iova.0;
                let rest = mapping(last + 1, old.gpa.0 + cut, old.len - cut, old.perm);
                space.insert(last + 1, rest);
            }
        }
    }

    /// The parts of `m` that lead to memory, and refusals of those that do not.
    fn resolve(&self, m: Mapping, stream: Stream) -> (Vec<Mapping>, Vec<Refusal>) {
        let absent = self.absent.iter().filter_map(|range| m.leading_into(*range)).map(|hole| hole.range());
        let absent = IovaRange::union_of(absent.collect());
        let part = |IovaRange { first, last }| mapping(first, m.gpa.0 + (first - m.iova.0), last - first + 1, m.perm);
        let present = m.range().without(absent.iter().copied()).into_iter().map(part).collect();
        let refused = absent.into_iter().map(|range| Refusal { range, cause: RefusalCause::Target, stream });
        (present, refused.collect())
    }

    fn forget_unused(&mut self) {
        let used: BTreeSet<SpaceKey> = self.attached.values().copied().collect();
        self.spaces.retain(|key, _| used.contains(key));
    }
}

/// A listener that checks the order of what it is told, and keeps the result.
#[derive(Default)]
pub struct Listener(pub Mutex<Told>);

impl Listener {
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap().events)
    }

    /// The operations of all batches since the last call.
    pub fn take_ops(&self) -> Vec<MapOp> {
        let ops = self.take_events().into_iter().map(|event| match event {
            Event::Apply(_, ops) => ops,
            Event::Attach(..) | Event::Detach(_) => Vec::new(),
        });
        ops.flatten().collect()
    }

    pub fn attached(&self, requester: Requester) -> Option<SpaceKey> {
        self.0.lock().unwrap().attached.get(&requester).copied()
    }

    /// What `requester` can reach in a paged space, joined where contiguous.
    pub fn reach(&self, requester: Requester) -> Vec<Mapping> {
        let told = self.0.lock().unwrap();
        let space = told.attached.get(&requester).and_then(|key| told.spaces.get(key));
        joined(space.into_iter().flat_map(|space| space.values().copied()))
    }
}

fn cause_at(iova: Iova) -> RefusalCause {
    if iova.0 >> 32 == 0 { RefusalCause::Limit } else { RefusalCause::Range }
}

/// Contiguous neighbours joined.
pub fn joined(mappings: impl IntoIterator<Item = Mapping>) -> Vec<Mapping> {
    let mut result: Vec<Mapping> = Vec::new();
    for next in mappings {
        match result.last_mut() {
            Some(m) if m.last().0 + 1 == next.iova.0 && m.gpa.0 + m.len == next.gpa.0 && m.perm == next.perm => {
                m.len += next.len;
            }
            _ => result.push(next),
        }
    }
    result
}

impl SpaceListener for Listener {
    fn attach(
        &self,
        Stream { requester, .. }: Stream,
        space: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        let mut told = self.0.lock().unwrap();
        let live: Vec<Mapping> = live.collect();
        assert!(live.is_sorted_by(|a, b| a.last() < b.iova), "not ascending and disjoint: {live:?}");
        told.events.push(Event::Attach(requester, *space, live.clone()));
        if told.unattachable.contains(&requester) && !matches!(space, SpaceKey::Blocked) {
            told.attached.insert(requester, SpaceKey::Blocked);
            told.forget_unused();
            return Err(AttachRefused::Host { requester, reason: "told so".into() });
        }
        if told.crowded.contains(&requester) && matches!(space, SpaceKey::Paged(_)) {
            told.attached.insert(requester, SpaceKey::Blocked);
            told.forget_unused();
            let (range, cause) = (IovaRange::new(0x4000, 0x4fff), RefusalCause::Memlock);
            return Err(AttachRefused::Shared(vec![Refusal { range, cause, stream: requester.into() }]));
        }
        let had_others = told.attached.iter().any(|(other, key)| *other != requester && key == space);
        if had_others && told.attached.get(&requester) != Some(space) {
            let known: Vec<Mapping> = told.spaces.get(space).into_iter().flat_map(|s| s.values().copied()).collect();
            assert_eq!(joined(known), joined(live.clone()), "a joining device is told something else");
        }
        let (mut kept, mut refused) = (BTreeMap::new(), Vec::new());
        for m in live {
            if told.refuse.contains(&m.iova.0) {
                refused.push(Refusal { range: m.range(), cause: cause_at(m.iova), stream: requester.into() });
            } else {
                let (present, absent) = told.resolve(m, requester.into());
                kept.extend(present.into_iter().map(|part| (part.iova.0, part)));
                refused.extend(absent);
            }
        }
        if had_others && refused.iter().any(|refusal| refusal.cause == RefusalCause::Target) {
            told.attached.insert(requester, SpaceKey::Blocked);
            told.forget_unused();
            return Err(AttachRefused::Shared(refused));
        }
        told.attached.insert(requester, *space);
        told.spaces.insert(*space, kept);
        told.forget_unused();
        if refused.is_empty() { Ok(()) } else { Err(AttachRefused::Partial(refused)) }
    }

    fn detach(&self, Stream { requester, .. }: Stream) {
        let mut told = self.0.lock().unwrap();
        told.events.push(Event::Detach(requester));
        told.attached.remove(&requester);
        told.forget_unused();
    }

    fn apply(&self, space: &SpaceKey, ops: &[MapOp]) -> Applied {
        let mut told = self.0.lock().unwrap();
        told.events.push(Event::Apply(*space, ops.to_vec()));
        let member = told.attached.iter().find(|(_, key)| *key == space).map(|(requester, _)| *requester);
        let member = member.expect("apply for a space without members");
        let refuse = told.refuse.clone();
        let mut refused = Vec::new();
        let mut maps_began = false;
        for op in ops {
            let mapped = told.spaces.get_mut(space).expect("apply for an unknown space");
            match *op {
                MapOp::Unmap(IovaRange { first, last }) => {
                    assert!(!maps_began, "an unmap after a map: {ops:?}");
                    assert!(first <= last);
                    Told::unmap(mapped, first, last);
                }
                MapOp::Map(m) => {
                    maps_began = true;
                    assert!(m.len > 0 && m.len % 4096 == 0 && m.iova.0 % 4096 == 0 && m.gpa.0 % 4096 == 0);
                    let below = mapped.range(..=m.last().0).next_back();
                    assert!(below.is_none_or(|(_, b)| b.last() < m.iova), "{m:?} is mapped already: {below:?}");
                    if refuse.contains(&m.iova.0) {
                        let cause = cause_at(m.iova);
                        refused.push(Refusal { range: m.range(), cause, stream: member.into() });
                    } else {
                        let (present, absent) = told.resolve(m, member.into());
                        let mapped = told.spaces.entry(*space).or_default();
                        mapped.extend(present.into_iter().map(|part| (part.iova.0, part)));
                        refused.extend(absent);
                    }
                }
            }
        }
        Applied { refused }
    }
}

/// Messages that were signalled.
#[derive(Default)]
pub struct Messages(pub Mutex<Vec<Msi>>);

impl Messages {
    pub fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MsiSink for Messages {
    fn signal(&self, msi: Msi) {
        self.0.lock().unwrap().push(msi);
    }
}

/// A unit and its guest.
pub struct Rig {
    pub unit: Arc<Unit<Memory>>,
    pub memory: Memory,
    pub listener: Arc<Listener>,
    pub messages: Arc<Messages>,
    pub root_table: u64,
    /// TTM, and DW of the queue.
    pub table_mode: u64,
    pub wide: bool,
    next_table: u64,
    tail: u64,
    next_status: u32,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(UnitConfig::new(UnitId(0), 48))
    }

    pub fn with(config: UnitConfig) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let (listener, messages) = (Arc::new(Listener::default()), Arc::new(Messages::default()));
        let unit = Unit::new(config, memory.clone(), listener.clone(), messages.clone()).unwrap();
        let (root_table, table_mode, wide, next_table, tail, next_status) = (0, 0, false, TABLES, 0, 0);
        let mut rig =
            Self { unit, memory, listener, messages, root_table, table_mode, wide, next_table, tail, next_status };
        rig.root_table = rig.table();
        rig
    }

    /// A unit with the queue and translation on.
    pub fn translating() -> Self {
        let mut rig = Self::new();
        rig.enable_queue();
        rig.enable_translation();
        rig
    }

    /// A zeroed page for a table.
    pub fn table(&mut self) -> u64 {
        let table = self.next_table;
        self.next_table += 4096;
        assert!(self.next_table <= MEMORY);
        self.memory.write_slice(&[0; 4096], GuestAddress(table)).unwrap();
        table
    }

    pub fn store(&self, address: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn load(&self, address: u64) -> u64 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    // Registers.

    pub fn read32(&self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.unit.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn read64(&self, at: u64) -> u64 {
        let mut data = [0; 8];
        self.unit.read(at, &mut data);
        u64::from_le_bytes(data)
    }

    pub fn write32(&self, at: u64, value: u32) {
        self.unit.write(at, &value.to_le_bytes());
    }

    pub fn write64(&self, at: u64, value: u64) {
        self.unit.write(at, &value.to_le_bytes());
    }

    pub fn status(&self) -> Global {
        Global::from_bits(self.read32(offset::GSTS))
    }

    /// GCMD: what is on, with `change`.
    pub fn command(&self, change: impl FnOnce(Global) -> Global) {
        // One-shot bits of the status are not written back. Section 11.4.4.1.
        let on = self.status().with_root_table_pointer(false).with_interrupt_table_pointer(false);
        self.write32(offset::GCMD, change(on).into_bits());
    }

    pub fn enable_queue(&mut self) {
        self.write64(offset::IQT, 0);
        self.write64(offset::IQA, QUEUE | u64::from(self.wide) << 11);
        self.command(|on| on.with_queued_invalidation(true));
        self.tail = 0;
    }

    pub fn set_root(&self) {
        self.write64(offset::RTADDR, self.root_table | self.table_mode << 10);
        self.command(|on| on.with_root_table_pointer(true));
    }

    pub fn enable_translation(&self) {
        self.set_root();
        self.command(|on| on.with_translation(true));
    }

    // Root and context tables.

    /// Writes the context entry of a requester, with its root entry.
    pub fn set_context(&mut self, requester: Requester, low: ContextEntryLow, high: ContextEntryHigh) {
        let entry = self.context_address(requester);
        self.store(entry + 8, high.into_bits());
        self.store(entry, low.into_bits());
    }

    /// Where the context entry of a requester is; its table is made when there is none.
    pub fn context_address(&mut self, requester: Requester) -> u64 {
        let root = self.root_table + u64::from(requester.sid.bus()) * 16;
        let mut entry = RootEntryLow::from_bits(self.load(root));
        if !entry.present() {
            let table = self.table();
            entry = RootEntryLow::new().with_present(true).with_context_table(table >> 12);
            self.store(root, entry.into_bits());
        }
        (entry.context_table() << 12) + u64::from(requester.sid.devfn()) * 16
    }

    /// Gives a requester a second stage of `width` bits, with domain id `domain`.
    pub fn set_paged(&mut self, requester: Requester, root: u64, width: u8, domain: u16) -> SpaceKey {
        let low = ContextEntryLow::new().with_present(true).with_second_stage(root >> 12);
        let high = ContextEntryHigh::new().with_address_width((width - 30) / 9).with_domain(domain);
        self.set_context(requester, low, high);
        SpaceKey::Paged(PagedSpace {
            unit: UnitId(0),
            tables: Tables::Second { root: Gpa(root), width },
            domain: DomainId(domain),
        })
    }

    pub fn set_pass_through(&mut self, requester: Requester, domain: u16) {
        let low = ContextEntryLow::new().with_present(true).with_translation_type(2);
        self.set_context(requester, low, ContextEntryHigh::new().with_address_width(2).with_domain(domain));
    }

    pub fn clear_context(&mut self, requester: Requester) {
        self.set_context(requester, ContextEntryLow::new(), ContextEntryHigh::new());
    }

    /// A unit that translates, with `NVME` in domain 1; and the root of its 48-bit table.
    pub fn with_nvme() -> (Self, u64) {
        let mut rig = Self::translating();
        let root = rig.table();
        rig.set_paged(NVME, root, 48, 1);
        rig.unit.add_requester(NVME).unwrap();
        rig.listener.take_events();
        (rig, root)
    }

    // Second-stage tables.

    /// Where the entry of `level` for `iova` is; tables above it are made when there are none.
    pub fn entry_address(&mut self, root: u64, width: u8, iova: u64, level: u8) -> u64 {
        let mut table = root;
        let mut at = levels(width);
        loop {
            let entry = table + iova / entry_span(at) % 512 * 8;
            if at == level {
                return entry;
            }
            let found = SecondStageEntry::from_bits(self.load(entry));
            if !found.read() && !found.write() {
                table = self.table();
                let made = SecondStageEntry::new().with_read(true).with_write(true).with_page(table >> 12);
                self.store(entry, made.into_bits());
            } else {
                assert!(!found.page_size(), "a leaf is in the way");
                table = found.page() << 12;
            }
            at -= 1;
        }
    }

    /// The same, unless a table is not where it would be made.
    pub fn try_entry_address(&mut self, root: u64, width: u8, iova: u64, level: u8) -> Option<u64> {
        let mut table = root;
        for at in (level..=levels(width)).rev() {
            let entry = table + iova / entry_span(at) % 512 * 8;
            if at == level {
                return Some(entry);
            }
            table = SecondStageEntry::from_bits(self.load(entry)).page() << 12;
            if !(TABLES..self.next_table).contains(&table) {
                return None;
            }
        }
        None
    }

    /// Sets a leaf of `level` in a table of `width` bits.
    pub fn leaf(&mut self, root: u64, width: u8, iova: u64, gpa: u64, perm: Option<Perm>, level: u8) {
        let address = self.entry_address(root, width, iova, level);
        let entry = perm.map_or(SecondStageEntry::new(), |perm| {
            SecondStageEntry::new()
                .with_read(perm.readable())
                .with_write(perm.writable())
                .with_page_size(level > 1)
                .with_page(gpa >> 12)
        });
        self.store(address, entry.into_bits());
    }

    /// Maps `pages` read-write 4 KiB leaves in a 48-bit table.
    pub fn pages(&mut self, root: u64, iova: u64, gpa: u64, pages: u64) {
        for page in 0..pages {
            self.leaf(root, 48, iova + page * 4096, gpa + page * 4096, Some(Perm::ReadWrite), 1);
        }
    }

    /// Clears `pages` 4 KiB leaves in a 48-bit table.
    pub fn clear(&mut self, root: u64, iova: u64, pages: u64) {
        for page in 0..pages {
            self.leaf(root, 48, iova + page * 4096, 0, None, 1);
        }
    }

    // Descriptors.

    /// Puts descriptors on the queue without moving the tail.
    pub fn push(&mut self, descriptors: &[(u64, u64)]) {
        let size = self.descriptor_size();
        for (low, high) in descriptors {
            let words = [*low, *high, 0, 0];
            let words = words.into_iter().zip((0..size).step_by(8));
            words.for_each(|(word, at)| self.store(QUEUE + self.tail * size + at, word));
            self.tail = (self.tail + 1) % (4096 / size);
        }
    }

    fn descriptor_size(&self) -> u64 {
        if self.wide { 32 } else { 16 }
    }

    /// Moves the tail to what was pushed.
    pub fn ring(&self) {
        self.write64(offset::IQT, self.tail * self.descriptor_size());
    }

    /// Puts descriptors on the queue, then a wait; `true` when the wait wrote its status.
    pub fn submit(&mut self, descriptors: &[(u64, u64)]) -> bool {
        self.next_status += 1;
        let status = self.next_status;
        self.store(STATUS, 0);
        self.push(descriptors);
        self.push(&[wait_status(status)]);
        self.ring();
        self.load(STATUS) as u32 == status
    }

    /// A queue of 32,768 descriptors, in which each of `descriptors` is followed by a wait, and then again, until it is
    /// full. Returns how long the drain took.
    pub fn full_queue(&mut self, descriptors: &[(u64, u64)]) -> Duration {
        const LARGEST: u64 = 7;
        const ENTRIES: u64 = 256 << LARGEST;
        const AT: u64 = MEMORY - ENTRIES * 16;
        self.command(|on| on.with_queued_invalidation(false));
        self.write64(offset::IQT, 0);
        self.write64(offset::IQA, AT | LARGEST);
        self.command(|on| on.with_queued_invalidation(true));
        for index in 0..ENTRIES - 1 {
            let number = (index / 2) as u32;
            let (low, high) = match index % 2 {
                0 => descriptors[number as usize % descriptors.len()],
                _ => wait_status(number + 1),
            };
            self.store(AT + index * 16, low);
            self.store(AT + index * 16 + 8, high);
        }
        self.store(STATUS, 0);
        let start = Instant::now();
        self.write64(offset::IQT, (ENTRIES - 1) * 16);
        let time = start.elapsed();
        assert_eq!((self.read64(offset::IQH), self.unit.stats().queue_errors), ((ENTRIES - 1) * 16, 0));
        assert_eq!(self.load(STATUS), ENTRIES / 2 - 1, "the last wait of the queue is complete");
        time
    }

    /// The full fault records: (index, source id, reason, address, is a read).
    pub fn fault_records(&self) -> Vec<(usize, SourceId, u8, u64, bool)> {
        let record = |index: usize| {
            let at = offset::FRCD + 16 * index as u64;
            let high = FaultRecordHigh::from_bits(self.read64(at + 8));
            let low = self.read64(at);
            high.fault().then(|| (index, SourceId(high.source()), high.reason(), low, high.type_1()))
        };
        (0..vtd::config::FAULT_RECORDS).filter_map(record).collect()
    }
}

pub fn iotlb_global() -> (u64, u64) {
    let low = IotlbLow::new().with_kind(kind::IOTLB).with_granularity(granularity::GLOBAL);
    (low.into_bits(), 0)
}

pub fn iotlb_domain(domain: u16) -> (u64, u64) {
    let low = IotlbLow::new().with_kind(kind::IOTLB).with_granularity(granularity::DOMAIN).with_domain(domain);
    (low.with_drain_reads(true).with_drain_writes(true).into_bits(), 0)
}

/// `2^mask` pages at `iova`.
pub fn iotlb_pages(domain: u16, iova: u64, mask: u8) -> (u64, u64) {
    let low = IotlbLow::new().with_kind(kind::IOTLB).with_granularity(granularity::SELECTIVE).with_domain(domain);
    (low.into_bits(), IotlbHigh::new().with_page(iova >> 12).with_address_mask(mask).into_bits())
}

pub fn context_global() -> (u64, u64) {
    (ContextCacheLow::new().with_kind(kind::CONTEXT_CACHE).with_granularity(granularity::GLOBAL).into_bits(), 0)
}

pub fn context_domain(domain: u16) -> (u64, u64) {
    let low = ContextCacheLow::new().with_kind(kind::CONTEXT_CACHE).with_granularity(granularity::DOMAIN);
    (low.with_domain(domain).into_bits(), 0)
}

pub fn context_device(domain: u16, source: SourceId, function_mask: u8) -> (u64, u64) {
    let low = ContextCacheLow::new().with_kind(kind::CONTEXT_CACHE).with_granularity(granularity::SELECTIVE);
    (low.with_domain(domain).with_source(source.0).with_function_mask(function_mask).into_bits(), 0)
}

pub fn wait_status(status: u32) -> (u64, u64) {
    let low = WaitLow::new().with_kind(kind::WAIT).with_status_write(true).with_status(status);
    (low.into_bits(), WaitHigh::new().with_address(STATUS >> 2).into_bits())
}

pub fn wait_interrupt() -> (u64, u64) {
    (WaitLow::new().with_kind(kind::WAIT).with_interrupt(true).into_bits(), 0)
}
