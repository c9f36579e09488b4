//! What the host refuses, seen from the guest (B-11): the unit, the bridge and the model together. The unit's own part
//! is tested there, the bridge's in `behaviours.rs`.

use std::cell::RefCell;
use std::sync::{Arc, Mutex, Once};

use vfio_bridge::model::{HostOp, Kernel, Model};
use vfio_bridge::{Bridge, DeviceStats, GroupId, GuestMap, Quarantine, Region};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vtd::spec::registers::offset;
use vtd::{GpaRange, IovaRange, Msi, MsiSink, Requester, SpaceKey, Unit, UnitConfig, UnitId};

use crate::world::{MIB2, requester};

type Memory = GuestMemoryMmap<()>;

const RAM: u64 = 4 * MIB2;
const ROOT_TABLE: u64 = 0x1000;
const CONTEXT_TABLE: u64 = 0x2000;
const QUEUE: u64 = 0x3000;
const STATUS: u64 = 0x4000;
/// A page table of 48 bits: its levels 4 and 3, and two of level 2: for IOVA 0 on, and for 2^40 on.
const LEVEL4: u64 = 0x1_0000;
const LEVEL3: u64 = 0x1_1000;
const LEVEL2: u64 = 0x1_2000;
const FAR_LEVEL3: u64 = 0x1_3000;
const FAR_LEVEL2: u64 = 0x1_4000;
const FAR: u64 = 1 << 40;
const RW: u64 = 3;
const LARGE: u64 = 1 << 7;

struct Silent;

impl MsiSink for Silent {
    fn signal(&self, _: Msi) {}
}

/// Notes what the wait status was when functions were stopped.
struct Watch {
    memory: Memory,
    stopped: Mutex<Vec<(Requester, u32)>>,
    machine: Mutex<Vec<u32>>,
    stubborn: bool,
}

impl Watch {
    fn status(&self) -> u32 {
        self.memory.read_obj(GuestAddress(STATUS)).expect("RAM")
    }
}

impl Quarantine for Watch {
    fn quarantine(&self, functions: &[Requester], _: &str) -> Result<(), String> {
        let status = self.status();
        self.stopped.lock().expect("whole").extend(functions.iter().map(|function| (*function, status)));
        if self.stubborn { Err("it does not listen".into()) } else { Ok(()) }
    }
    fn stop_machine(&self, _: &[Requester], _: &str) {
        self.machine.lock().expect("whole").push(self.status());
    }
}

/// What a device's context entry says.
#[derive(Clone, Copy)]
enum Context {
    Absent,
    PassThrough,
    Paged,
}

struct Guest {
    memory: Memory,
    unit: Arc<Unit<Memory>>,
    bridge: Arc<Bridge>,
    model: Arc<Model>,
    watch: Arc<Watch>,
    tail: u64,
    status: u32,
}

impl Guest {
    /// Devices 1 and 2 in groups of their own, behind a unit whose translation is off.
    fn new(kernel: Kernel, stubborn: bool) -> Self {
        let memory = Memory::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("memory");
        let model = Model::new(kernel, &[GroupId(1), GroupId(2)]);
        let map = GuestMap::of_memory(Arc::new(memory.clone())).expect("whole pages");
        let watch =
            Arc::new(Watch { memory: memory.clone(), stopped: Mutex::default(), machine: Mutex::default(), stubborn });
        let bridge = Arc::new(Bridge::new(vec![model.clone()], map, watch.clone()));
        let config = UnitConfig::new(UnitId(0), 48);
        let unit = Unit::new(config, memory.clone(), bridge.clone(), Arc::new(Silent)).expect("a unit");
        let guest = Self { memory, unit, bridge, model, watch, tail: 0, status: 0 };
        for (table, entry) in
            [(LEVEL4, LEVEL3), (LEVEL3, LEVEL2), (LEVEL4 + 2 * 8, FAR_LEVEL3), (FAR_LEVEL3, FAR_LEVEL2)]
        {
            guest.store(table, entry | RW);
        }
        guest.store(ROOT_TABLE, CONTEXT_TABLE | 1);
        for device in [1, 2] {
            guest.bridge.register(requester(device), GroupId(device.into())).expect("new");
            guest.unit.add_requester(requester(device)).expect("attached");
        }
        guest
    }

    /// Both devices as `contexts` say, with translation on.
    fn translating(kernel: Kernel, stubborn: bool, contexts: [Context; 2]) -> Self {
        let guest = Self::new(kernel, stubborn);
        guest.set_context(1, contexts[0]);
        guest.set_context(2, contexts[1]);
        guest.start();
        guest
    }

    fn start(&self) {
        self.write64(offset::IQA, QUEUE);
        self.write32(offset::GCMD, 1 << 26);
        self.write64(offset::RTADDR, ROOT_TABLE);
        self.write32(offset::GCMD, 1 << 30 | 1 << 26);
        self.write32(offset::GCMD, 1 << 31 | 1 << 26);
    }

    fn store(&self, gpa: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(gpa)).expect("RAM");
    }
    fn write32(&self, at: u64, value: u32) {
        self.unit.write(at, &value.to_le_bytes());
    }
    fn write64(&self, at: u64, value: u64) {
        self.unit.write(at, &value.to_le_bytes());
    }

    fn set_context(&self, device: u8, context: Context) {
        let (low, high) = match context {
            Context::Absent => (0, 0),
            Context::PassThrough => (1 | 2 << 2, 2 | 9 << 8),
            Context::Paged => (1 | LEVEL4, 2 | 1 << 8),
        };
        let entry = CONTEXT_TABLE + u64::from(device) * 8 * 16;
        self.store(entry + 8, high);
        self.store(entry, low);
    }

    /// The 2 MiB at `index` leads to the same place of memory, or to nothing.
    fn leaf(&self, table: u64, index: u64, present: bool) {
        self.store(table + index * 8, if present { (index * MIB2 % RAM) | LARGE | RW } else { 0 });
    }

    /// Gives descriptors and a wait; true when the wait wrote its status.
    fn submit(&mut self, descriptors: &[(u64, u64)]) -> bool {
        self.status += 1;
        let wait = (5 | 1 << 5 | u64::from(self.status) << 32, STATUS);
        for (low, high) in descriptors.iter().chain([&wait]) {
            self.store(QUEUE + self.tail * 16, *low);
            self.store(QUEUE + self.tail * 16 + 8, *high);
            self.tail = (self.tail + 1) % 256;
        }
        self.write64(offset::IQT, self.tail * 16);
        self.watch.status() == self.status
    }

    /// The full fault records, which are then cleared: source id, reason, address.
    fn faults(&self) -> Vec<(u64, u64, u64)> {
        let mut found = Vec::new();
        for record in 0..vtd::config::FAULT_RECORDS as u64 {
            let read = |at| {
                let mut data = [0; 8];
                self.unit.read(at, &mut data);
                u64::from_le_bytes(data)
            };
            let at = offset::FRCD + 16 * record;
            let (low, high) = (read(at), read(at + 8));
            if high >> 63 != 0 {
                found.push((high & 0xffff, high >> 32 & 0xff, low));
                self.write32(at + 12, 1 << 31);
            }
        }
        found
    }

    fn stats(&self, device: u8) -> DeviceStats {
        self.bridge.stats(requester(device)).expect("registered")
    }

    /// First IOVA and length of what a device's group holds.
    fn held(&self, device: u8) -> Vec<(u64, u64)> {
        self.model.contents(GroupId(device.into())).values().map(|held| (held.iova, held.len)).collect()
    }
}

fn pages(iova: u64, mask: u64) -> (u64, u64) {
    (2 | 3 << 4 | 1 << 16, iova | mask)
}
fn contexts() -> (u64, u64) {
    (1 | 1 << 4, 0)
}
fn context_of(device: u64) -> (u64, u64) {
    (1 | 3 << 4 | device << 3 << 32, 0)
}
fn everything() -> (u64, u64) {
    (2 | 1 << 4, 0)
}

const SECOND: u64 = 2 << 3;
/// The reason of a table that cannot be used.
const UNUSABLE: u64 = 7;
const NOBODY_STOPPED: [(Requester, u32); 0] = [];

/// Six leaves of 2 MiB, the last two over the same memory as the first: two mappings, of 8 and of 4 MiB.
fn map_twelve(guest: &mut Guest) {
    (0..6).for_each(|index| guest.leaf(LEVEL2, index, true));
    assert!(guest.submit(&[pages(0, 12)]));
}

#[test]
fn b11_a_group_that_may_not_join_a_space_has_one_record_and_joins_when_there_is_room() {
    // Both may have all RAM, and 12 MiB each are too much.
    let kernel = Kernel { memlock: Some(21 << 20), ..Kernel::new(48) };
    let mut guest = Guest::translating(kernel, false, [Context::Paged, Context::Absent]);
    map_twelve(&mut guest);
    let all = [(0, 4 * MIB2), (4 * MIB2, 2 * MIB2)];
    assert_eq!((guest.held(1), guest.faults()), (all.to_vec(), vec![]));

    guest.set_context(2, Context::Paged);
    let before = guest.model.counts();
    assert!(guest.submit(&[context_of(2)]));
    assert_eq!((guest.held(1), guest.held(2)), (all.to_vec(), vec![]), "not a part of it");
    assert_eq!(guest.bridge.space_of(requester(2)), Some(SpaceKey::Blocked));
    assert_eq!(guest.faults(), [(SECOND, UNUSABLE, 4 * MIB2)]);
    assert_eq!((guest.stats(2).refused_maps.memlock, guest.unit.stats().maps_refused), (1, 1));
    assert_eq!(guest.model.counts(), (before.0 + 2, before.1 + 1), "tried, and undone");

    // Pages that come are no reason to try again, and what is refused again has no second record.
    let tried = guest.model.counts();
    assert!(guest.submit(&[pages(0, 12)]));
    assert_eq!(guest.model.counts(), tried);
    for _ in 0..20 {
        assert!(guest.submit(&[everything()]));
    }
    let tries = guest.stats(2).refused_maps.memlock;
    assert!((2..=5).contains(&tries), "{tries} tries at 21 occasions");
    assert_eq!(guest.faults(), []);
    // A guest that attaches it again has it tried at once.
    assert!(guest.submit(&[context_of(2)]));
    assert_eq!(guest.stats(2).refused_maps.memlock, tries + 1);

    // 2 MiB go for each, and the rest fits: in the drain that took them away, when its turn has come.
    guest.leaf(LEVEL2, 5, false);
    assert!(guest.submit(&[context_of(2), pages(5 * MIB2, 9)]));
    let rest = vec![(0, 4 * MIB2), (4 * MIB2, MIB2)];
    assert_eq!(guest.held(1), rest);
    let mut occasions = 0;
    while guest.held(2).is_empty() {
        assert!(guest.submit(&[everything()]));
        occasions += 1;
        assert!(occasions <= 64, "it is forgotten");
    }
    assert_eq!(guest.held(2), rest);
    assert_eq!(guest.faults(), []);
    // From here on it follows the space as the other does.
    guest.leaf(LEVEL2, 4, false);
    assert!(guest.submit(&[pages(4 * MIB2, 9)]));
    assert_eq!((guest.held(1), guest.held(2)), (vec![(0, 4 * MIB2)], vec![(0, 4 * MIB2)]));
}

#[test]
fn b11_what_a_function_waits_for_comes_in_the_very_drain_that_makes_room() {
    let kernel = Kernel { memlock: Some(21 << 20), ..Kernel::new(48) };
    let mut guest = Guest::translating(kernel, false, [Context::Paged, Context::Absent]);
    map_twelve(&mut guest);
    guest.set_context(2, Context::Paged);
    assert!(guest.submit(&[context_of(2)]));
    assert_eq!(guest.held(2), []);
    // A page-selective unmap: its wait status is written when the other device is there.
    guest.leaf(LEVEL2, 5, false);
    assert!(guest.submit(&[pages(5 * MIB2, 9)]));
    assert_eq!(guest.held(2), [(0, 4 * MIB2), (4 * MIB2, MIB2)]);
    // A guest that detaches it meanwhile is not disappointed by a late attach.
    guest.set_context(2, Context::Absent);
    assert!(guest.submit(&[contexts()]));
    map_twelve(&mut guest);
    guest.set_context(2, Context::Paged);
    assert!(guest.submit(&[context_of(2)]));
    guest.set_context(2, Context::Absent);
    assert!(guest.submit(&[context_of(2)]));
    (0..6).for_each(|index| guest.leaf(LEVEL2, index, false));
    assert!(guest.submit(&[pages(0, 12)]));
    assert_eq!((guest.held(1), guest.held(2)), (vec![], vec![]));
    assert_eq!(guest.bridge.space_of(requester(2)), Some(SpaceKey::Blocked));
}

#[test]
fn b11_a_refused_part_of_the_identity_space_comes_when_there_is_room() {
    // All RAM once, and not twice.
    let kernel = Kernel { memlock: Some(RAM + MIB2), ..Kernel::new(48) };
    let mut guest = Guest::new(kernel, false);
    assert_eq!((guest.held(1), guest.held(2)), (vec![(0, RAM)], vec![]));
    assert_eq!(guest.faults(), [(SECOND, UNUSABLE, 0)]);
    assert_eq!((guest.stats(2).refused_maps.memlock, guest.unit.stats().maps_refused), (1, 1));
    // The first goes to a page table, which makes room; the second stays in pass-through, so nobody attaches it again.
    guest.set_context(1, Context::Paged);
    guest.set_context(2, Context::PassThrough);
    guest.start();
    assert_eq!((guest.held(1), guest.held(2)), (vec![], vec![(0, RAM)]));
    // Now it is the other one that finds no room: the rest of its space is its own, and RAM twice is not to be had.
    guest.set_context(1, Context::PassThrough);
    assert!(guest.submit(&[context_of(1)]));
    assert_eq!((guest.held(1), guest.held(2)), (vec![], vec![(0, RAM)]));
    assert_eq!(guest.faults(), [(1 << 3, UNUSABLE, 0)]);
    guest.set_context(2, Context::Absent);
    assert!(guest.submit(&[context_of(2)]));
    assert_eq!((guest.held(1), guest.held(2)), (vec![(0, RAM)], vec![]));
    assert_eq!(guest.faults(), []);
}

#[test]
fn b11_a_reset_forgets_what_was_said_and_tries_at_once() {
    let kernel = Kernel { memlock: Some(RAM + MIB2), ..Kernel::new(48) };
    let guest = Guest::new(kernel, false);
    guest.faults();
    for _ in 0..3 {
        guest.unit.reset();
        assert_eq!(guest.faults(), [(SECOND, UNUSABLE, 0)], "the next guest is told, too");
    }
    assert_eq!(guest.stats(2).refused_maps.memlock, 4);
}

#[test]
fn b11_what_is_outside_the_hosts_ranges_is_told_once_and_the_rest_goes_on() {
    let mut kernel = Kernel::new(48);
    kernel.iova_ranges =
        vec![IovaRange { first: 0, last: 0xfedf_ffff }, IovaRange { first: 0xfef0_0000, last: FAR - 1 }];
    let mut guest = Guest::translating(kernel, false, [Context::Paged, Context::Absent]);
    let maps = guest.model.counts().0;
    lines();
    for index in 0..3 {
        guest.leaf(FAR_LEVEL2, index, true);
        guest.leaf(LEVEL2, index, true);
        assert!(guest.submit(&[pages(FAR + index * MIB2, 9), pages(index * MIB2, 9)]));
    }
    assert_eq!(guest.held(1), [0, 1, 2].map(|index| (index * MIB2, MIB2)));
    assert_eq!(guest.faults(), [(1 << 3, UNUSABLE, FAR)]);
    let refused = guest.stats(1).refused_maps;
    assert_eq!((refused.range, refused.limit, refused.memlock, refused.target, refused.other), (3, 0, 0, 0, 0));
    assert_eq!(guest.model.counts().0, maps + 3, "the host is not asked for what it cannot map");
    let said = lines();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("outside its IOVA ranges") && said[0].contains("reserved_regions"), "{said:?}");
    // It never comes, so nobody waits for it.
    assert!(guest.submit(&[everything()]));
    assert_eq!((guest.faults(), lines()), (vec![], vec![]));
}

#[test]
fn b11_leaves_over_a_neighbours_bar_have_one_record_a_function_until_the_next_reset() {
    // As each program does that maps the BARs of its functions into its own container, and lets go of them.
    const BAR: u64 = 0xe000_0000;
    let mut guest = Guest::translating(Kernel::new(48), false, [Context::Paged, Context::Absent]);
    guest.leaf(LEVEL2, 0, true);
    assert!(guest.submit(&[pages(0, 9)]));
    lines();
    let mut told = Vec::new();
    for round in 0..6 {
        let index = 1 + round % 3;
        guest.store(LEVEL2 + index * 8, (BAR + round * MIB2) | LARGE | RW);
        let invalidation = if round % 2 == 0 { pages(index * MIB2, 9) } else { everything() };
        assert!(guest.submit(&[invalidation]));
        // The function leaves, and another program has it.
        [Context::Absent, Context::Paged].into_iter().for_each(|context| {
            guest.set_context(1, context);
            assert!(guest.submit(&[contexts(), everything()]));
        });
        guest.leaf(LEVEL2, index, false);
        assert!(guest.submit(&[pages(index * MIB2, 9)]));
        told.extend(guest.faults());
    }
    assert_eq!(told, [(1 << 3, UNUSABLE, MIB2)]);
    assert_eq!(lines().len(), 1);
    assert_eq!(guest.held(1), [(0, MIB2)], "the rest goes on");
    assert!(guest.stats(1).refused_maps.target >= 6);

    // The next guest is told, too.
    guest.unit.reset();
    guest.tail = 0;
    guest.start();
    guest.store(LEVEL2 + 8, BAR | LARGE | RW);
    assert!(guest.submit(&[everything()]));
    assert_eq!(guest.faults(), [(1 << 3, UNUSABLE, MIB2)]);
}

#[test]
fn b11_a_range_that_the_host_refuses_although_it_named_it_is_the_same() {
    // EINVAL of a map: a range that was reserved after the start.
    let mut guest = Guest::translating(Kernel::new(48), false, [Context::Paged, Context::Absent]);
    guest.model.inject(|_, op| matches!(op, HostOp::Map(held) if held.iova >= FAR).then_some(libc::EINVAL));
    lines();
    for index in 0..3 {
        guest.leaf(FAR_LEVEL2, index, true);
        assert!(guest.submit(&[pages(FAR + index * MIB2, 9)]));
    }
    assert_eq!(guest.faults(), [(1 << 3, UNUSABLE, FAR)]);
    assert_eq!(guest.stats(1).refused_maps.range, 3);
    assert_eq!(lines().len(), 1);
}

#[test]
fn b11_a_refused_unmap_stops_the_function_before_the_wait_status() {
    let mut guest = Guest::translating(Kernel::new(48), false, [Context::Paged, Context::Absent]);
    map_twelve(&mut guest);
    guest.model.inject(|_, op| matches!(op, HostOp::Unmap(_)).then_some(libc::EIO));
    guest.leaf(LEVEL2, 5, false);
    assert!(guest.submit(&[pages(5 * MIB2, 9)]), "the queue goes on");
    assert_eq!(*guest.watch.stopped.lock().expect("whole"), [(requester(1), guest.status - 1)]);
    assert_eq!(*guest.watch.machine.lock().expect("whole"), [0u32; 0]);
    // Once, and nothing is mapped for it any more.
    let maps = guest.model.counts().0;
    guest.leaf(LEVEL2, 7, true);
    assert!(guest.submit(&[contexts(), everything()]));
    assert_eq!((guest.watch.stopped.lock().expect("whole").len(), guest.model.counts().0), (1, maps));
    assert_eq!((guest.stats(1).quarantined, guest.stats(2).quarantined), (1, 0));
}

#[test]
fn b11_a_function_that_cannot_be_stopped_stops_the_machine_before_the_wait_status() {
    let mut guest = Guest::translating(Kernel::new(48), true, [Context::Paged, Context::Paged]);
    map_twelve(&mut guest);
    guest.model.inject(|_, op| matches!(op, HostOp::Unmap(_)).then_some(libc::EIO));
    guest.set_context(1, Context::Absent);
    assert!(guest.submit(&[contexts()]), "whether it is read makes no difference");
    assert_eq!(*guest.watch.stopped.lock().expect("whole"), [(requester(1), guest.status - 1)]);
    assert_eq!(*guest.watch.machine.lock().expect("whole"), [guest.status - 1]);
}

#[test]
fn nobody_is_stopped_without_a_reason() {
    let mut guest = Guest::translating(Kernel::new(48), true, [Context::Paged, Context::Paged]);
    map_twelve(&mut guest);
    assert!(guest.submit(&[contexts(), everything()]));
    assert_eq!(*guest.watch.stopped.lock().expect("whole"), NOBODY_STOPPED);
}

thread_local! {
    static LINES: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Keeps the warnings of each thread: tests run in threads of their own.
struct Keeper;

impl log::Log for Keeper {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.with_borrow_mut(|lines| lines.push(record.args().to_string()));
        }
    }
    fn flush(&self) {}
}

/// The warnings of this thread since the last call. Called first, it begins to keep them.
fn lines() -> Vec<String> {
    static START: Once = Once::new();
    START.call_once(|| {
        log::set_logger(&Keeper).expect("the only one");
        log::set_max_level(log::LevelFilter::Warn);
    });
    LINES.take()
}

/// Where a device's memory comes and goes in the guest-physical map.
const DEVICE: u64 = 1 << 32;

#[test]
fn leaves_follow_a_guest_physical_map_that_changes_under_a_running_guest() {
    let mut guest = Guest::translating(Kernel::new(48), false, [Context::Paged, Context::PassThrough]);
    let ram = guest.memory.get_host_address(GuestAddress(0)).expect("RAM").addr() as u64;
    // SAFETY: the model never uses the addresses.
    let region = |gpa, len, hva| unsafe { Region::ram(gpa, len, hva, None) }.expect("whole pages");
    let map = |device: Option<u64>| {
        let device = device.map(|hva| region(DEVICE, MIB2, hva));
        GuestMap::new([region(0, RAM, ram)].into_iter().chain(device).collect()).expect("disjoint")
    };
    // The guest has a leaf that leads to a device that is not there, and one to memory.
    guest.store(LEVEL2, DEVICE | LARGE | RW);
    guest.store(LEVEL2 + 8, MIB2 | LARGE | RW);
    assert!(guest.submit(&[pages(0, 10)]));
    assert_eq!((guest.held(1), guest.stats(1).refused_maps.target), (vec![(MIB2, MIB2)], 1));
    let faults = guest.faults();
    assert_eq!(faults.len(), 1, "it was told: {faults:x?}");

    let operations = guest.model.counts();
    let reaches = |guest: &Guest| {
        [(1, 0), (2, DEVICE)].map(|(group, iova)| guest.model.translate(GroupId(group), iova).map(|(hva, _)| hva))
    };
    for device in [Some(1u64 << 40), Some(1 << 41), None, Some(1 << 42)] {
        guest.bridge.replace_guest_map(map(device));
        guest.unit.memory_changed(GpaRange::new(DEVICE, DEVICE + (MIB2 - 1)));
        assert_eq!(reaches(&guest), [device; 2]);
        let kept = guest.model.translate(GroupId(1), MIB2).map(|(hva, _)| hva);
        assert_eq!(kept, Some(ram + MIB2), "what leads elsewhere stays");
    }
    // Of each of the two functions: it came, moved (an unmap and a map), went, and came again. Nothing else was
    // touched.
    let (maps, unmaps) = guest.model.counts();
    assert_eq!((maps - operations.0, unmaps - operations.1), (2 * 3, 2 * 2));
    assert_eq!(guest.watch.stopped.lock().expect("whole")[..], NOBODY_STOPPED);
}
