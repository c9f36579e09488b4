use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::pci::config::{COMMAND, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY};
use crate::pci::{BarKind, BarTarget, PciRoot, RootPort, RootPortWiring};
use crate::testing::FakeInterrupts;
use crate::{Bus, BusDevice};

/// Offsets in the bridge's configuration space: of the PCI Express capability, of power management.
const EXPRESS: u16 = 0x40;
const POWER: u16 = 0x7c;
/// Of power management, and of slot control, in a root port's.
const PORT_POWER: u16 = 0x8c;
const SLOT_CONTROL: u16 = 0x68;
const SLOT_OFF: u16 = 1 << 10;
const CONTROL: u16 = 0x3e;
const HOLD: u16 = 1 << 6;

struct Answer;
impl BusDevice for Answer {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0x77);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

/// A function with 4 KiB of memory and 32 ports.
struct Fake {
    name: Requester,
    decoders: [Arc<Decoder>; 2],
    config: Mutex<ConfigSpace>,
    bar: BarTarget,
    resets: AtomicU32,
    masters: AtomicBool,
}

impl Fake {
    fn new(name: Requester, root: &PciRoot) -> Arc<Self> {
        let id = Identity { vendor: 0x1234, device: 0x5678, revision: 1, class: 0xff_00_00, subsystem: (1, 2) };
        let mut config = ConfigSpace::new(&id);
        config.add_bar(0, BarKind::Memory32, 0x1000);
        config.add_bar(1, BarKind::Io, 0x20);
        config.put(0x100, &[0x55; 4]);
        let bar = BarTarget::of_device(Arc::new(Answer));
        let (decoders, config) = ([root.decoder(), root.port_decoder()], Mutex::new(config));
        Arc::new(Self { name, decoders, config, bar, resets: AtomicU32::new(0), masters: AtomicBool::new(true) })
    }

    fn decode(&self, config: &ConfigSpace) {
        for (index, decoder) in self.decoders.iter().enumerate() {
            decoder.set(self.name, index as u8, config.decoded(index), &self.bar);
        }
    }
}

impl PciFunction for Fake {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        config.write(offset, data);
        self.decode(&config);
    }
    fn path_changed(&self, path: &Path) {
        self.masters.store(path.masters, Ordering::Relaxed);
    }
    fn reset(&self) {
        let mut config = self.config.lock().unwrap();
        config.reset();
        self.decode(&config);
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Told(Mutex<BTreeMap<SourceId, Option<SourceId>>>);
impl SourceIds for Told {
    fn renumbered(&self, name: Requester, id: Option<SourceId>) {
        self.0.lock().unwrap().insert(name.sid, id);
    }
}

struct World {
    memory: Arc<Bus>,
    ports: Arc<Bus>,
    root: Arc<PciRoot>,
    told: Arc<Told>,
    port: Option<Arc<RootPort>>,
    bridge: Arc<PciePciBridge>,
    function: Arc<Fake>,
}

const ON_ROOT: SourceId = SourceId::new(0, 8, 0);
const PORT: SourceId = SourceId::new(0, 0x10, 0);
/// Where the bridge is behind the port, whose bus has the number 1.
const BEHIND: SourceId = SourceId::new(1, 0, 0);

impl World {
    /// A bridge on bus 0, or behind a root port, with a function 01.0 below it.
    fn new(behind_port: bool) -> Self {
        let (memory, ports, told) = (Arc::new(Bus::default()), Arc::new(Bus::default()), Arc::new(Told::default()));
        let root = PciRoot::with_ports(memory.clone(), ports.clone());
        let bridge = PciePciBridge::new(PciePciBridgeWiring {
            bus: 2,
            segment: 0,
            decoder: root.decoder(),
            port_decoder: root.port_decoder(),
            ids: Some(told.clone()),
        });
        let port = behind_port.then(|| {
            let port = RootPort::new(RootPortWiring {
                requester: root.requester(PORT),
                number: 1,
                bus: 1,
                decoder: root.decoder(),
                port_decoder: root.port_decoder(),
                interrupts: Arc::new(FakeInterrupts::default()),
                ids: Some(told.clone()),
                power: None,
            });
            root.insert_port(&port).unwrap();
            port.reserve().unwrap();
            port.fill(bridge.clone());
            port
        });
        if port.is_none() {
            root.insert_bridge(ON_ROOT, bridge.clone()).unwrap();
        }
        let function = Fake::new(bridge.name_of(1, 0), &root);
        assert!(bridge.insert(1, 0, function.clone()).is_ok());
        Self { memory, ports, root, told, port, bridge, function }
    }

    fn read(&self, sid: SourceId, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.root.config_read(sid, offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn write(&self, sid: SourceId, offset: u16, value: u32) {
        self.root.config_write(sid, offset, &value.to_le_bytes());
    }
    fn write16(&self, sid: SourceId, offset: u16, value: u16) {
        self.root.config_write(sid, offset, &value.to_le_bytes());
    }
    fn buses(&self, sid: SourceId, secondary: u8, subordinate: u8) {
        self.write(sid, 0x18, u32::from_le_bytes([0, secondary, subordinate, 0]));
    }
    /// Memory from 0xc0100000 to 0xc01fffff, ports from 0x2000 to 0x2fff, and requests.
    fn open(&self, sid: SourceId) {
        self.write(sid, 0x20, 0xc010_c010);
        self.write16(sid, 0x1c, 0x2020);
        self.write16(sid, COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
    }
    fn place(&self, sid: SourceId) {
        self.write(sid, 0x10, 0xc010_0000);
        self.write(sid, 0x14, 0x2040);
        self.write16(sid, COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
    }
    /// Whether its memory and its ports answer, and whether its requests get through.
    fn reach(&self) -> [bool; 3] {
        let (mut data, masters) = ([0; 4], self.function.masters.load(Ordering::Relaxed));
        [self.memory.read(0xc010_0000, &mut data), self.ports.read(0x2040, &mut data), masters]
    }
    fn told(&self) -> Option<SourceId> {
        self.told.0.lock().unwrap()[&self.bridge.alias().sid]
    }
    /// All open, with the buses numbered 1 and 2.
    fn opened(behind_port: bool) -> (Self, SourceId) {
        let world = Self::new(behind_port);
        let bridge = if behind_port { BEHIND } else { ON_ROOT };
        if behind_port {
            world.buses(PORT, 1, 2);
            world.open(PORT);
        }
        world.buses(bridge, 2, 2);
        world.open(bridge);
        world.place(SourceId::new(2, 1, 0));
        (world, bridge)
    }
}

#[test]
fn f6_a_bridge_to_conventional_pci_says_what_it_is_whatever_is_written() {
    let world = World::new(false);
    let identity = |world: &World| {
        [0x00, 0x08, 0x0c, 0x34, EXPRESS, POWER].map(|at| world.read(ON_ROOT, at) & if at == 0x0c { !0xff } else { !0 })
    };
    let expected = [0x000e_1b36, 0x0604_0000, 0x0001_0000, EXPRESS.into(), 0x0072_7c10, 0x0003_0001];
    assert_eq!(identity(&world), expected);
    for value in [u32::MAX, 0x5555_5555, 0] {
        (0..0x200).step_by(4).for_each(|at| world.write(ON_ROOT, at, value));
    }
    assert_eq!(identity(&world), expected);
    // D1 and D2 are not there: it stays as it was.
    for (state, is) in [(1, 0), (3, 3), (2, 3), (0, 0)] {
        world.write16(ON_ROOT, POWER + 4, state);
        assert_eq!(world.read(ON_ROOT, POWER + 4) & 3, is);
    }
}

#[test]
fn f6_functions_of_a_conventional_bus_are_found_by_its_number_and_have_256_bytes() {
    let world = World::new(false);
    let at = |bus, device, function| SourceId::new(bus, device, function);
    let vendor = |sid| world.read(sid, 0) & 0xffff;
    assert_eq!(vendor(at(2, 1, 0)), 0xffff, "no bus leads there yet");
    world.buses(ON_ROOT, 2, 4);
    assert_eq!([at(2, 1, 0), at(2, 0, 0), at(3, 1, 0)].map(vendor), [0x1234, 0xffff, 0xffff]);
    assert_eq!((world.read(at(2, 1, 0), 0x100), world.read(at(2, 1, 0), 0xfc)), (u32::MAX, 0));
    world.write(at(2, 1, 0), 0x104, 1);
    world.buses(ON_ROOT, 9, 9);
    assert_eq!([at(2, 1, 0), at(9, 1, 0)].map(vendor), [0xffff, 0x1234]);
    // A second function makes a device one of several.
    let header = |sid| world.read(sid, 0x0c) >> 16 & 0xff;
    assert_eq!(header(at(9, 1, 0)), 0);
    let further = Fake::new(world.bridge.name_of(1, 3), &world.root);
    assert!(world.bridge.insert(1, 3, further.clone()).is_ok());
    assert!(world.bridge.insert(1, 3, further).is_err(), "the place is taken");
    assert_eq!((header(at(9, 1, 0)), header(at(9, 1, 3))), (0x80, 0));
}

#[test]
fn a16_the_unit_hears_of_the_bridges_id_before_the_write_is_done() {
    let world = World::new(true);
    assert_eq!(world.told(), None);
    world.buses(PORT, 1, 5);
    world.buses(BEHIND, 2, 2);
    assert_eq!((world.told(), world.bridge.id()), (Some(SourceId::new(2, 0, 0)), Some(SourceId::new(2, 0, 0))));
    world.root.config_write(BEHIND, 0x19, &[4]);
    assert_eq!(world.told(), None, "beyond its subordinate bus");
    world.root.config_write(BEHIND, 0x1a, &[4]);
    assert_eq!(world.told(), Some(SourceId::new(4, 0, 0)));
    // What the port above leads to counts, too, and each write to that.
    world.buses(PORT, 1, 3);
    assert_eq!(world.told(), None);
    world.buses(PORT, 1, 4);
    assert_eq!(world.told(), Some(SourceId::new(4, 0, 0)));
    world.port.as_ref().unwrap().reset();
    assert_eq!(world.told(), None);
}

#[test]
fn f6_what_gets_through_is_what_every_bridge_on_the_way_lets_through() {
    for behind_port in [false, true] {
        let (world, bridge) = World::opened(behind_port);
        assert_eq!(world.reach(), [true; 3]);
        for each in if behind_port { vec![PORT, bridge] } else { vec![bridge] } {
            let all = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER;
            for (off, reach) in [
                (COMMAND_MEMORY, [false, true, true]),
                (COMMAND_IO, [true, false, true]),
                (COMMAND_MASTER, [true, true, false]),
            ] {
                world.write16(each, COMMAND, all & !off);
                assert_eq!(world.reach(), reach, "{each} without {off:#x}");
                world.write16(each, COMMAND, all);
                assert_eq!(world.reach(), [true; 3]);
            }
            // Ports and memory end at their windows.
            for (register, other, own) in [(0x1c, 0x1010, 0x2020), (0x1c, 0x2030, 0x2020)] {
                world.write16(each, register, other);
                assert_eq!(world.reach(), [true, false, true], "{other:#x}");
                world.write16(each, register, own);
            }
            // Asleep, what is below is not found either, and not reset.
            let power = if each == PORT { PORT_POWER } else { POWER } + 4;
            let resets = world.function.resets.load(Ordering::Relaxed);
            world.write16(each, power, 3);
            assert_eq!((world.reach(), world.read(SourceId::new(2, 1, 0), 0)), ([false; 3], u32::MAX));
            world.write16(each, power, 0);
            assert_eq!((world.reach(), world.read(SourceId::new(2, 1, 0), 0)), ([true; 3], 0x5678_1234));
            assert_eq!(world.function.resets.load(Ordering::Relaxed), resets);
        }
    }
}

#[test]
fn f4_the_reset_of_a_bus_is_one_of_all_below() {
    for behind_port in [false, true] {
        let (world, bridge) = World::opened(behind_port);
        for each in if behind_port { vec![bridge, PORT] } else { vec![bridge] } {
            let resets = world.function.resets.load(Ordering::Relaxed);
            world.write16(each, CONTROL, HOLD);
            assert_eq!((world.reach(), world.read(SourceId::new(2, 1, 0), 0)), ([false; 3], u32::MAX));
            assert_eq!(world.function.resets.load(Ordering::Relaxed), resets + 1);
            world.write16(each, CONTROL, 0);
            assert_eq!(world.function.resets.load(Ordering::Relaxed), resets + 1);
        }
        // The port's reset was one of the bridge, which has no numbers now.
        world.buses(bridge, 2, 2);
        assert_eq!(world.read(SourceId::new(2, 1, 0), COMMAND) & 7, 0);
        assert_eq!(world.read(bridge, COMMAND) & 7, if behind_port { 0 } else { 7 });
    }
}

/// What a hostile guest writes.
#[derive(Clone, Debug)]
enum Step {
    Port(u16, u32),
    Bridge(u16, u32),
    Function(u16, u32),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let bridge_write = |power: u16| {
        prop_oneof![
            4 => (0u8..4, 0u8..5).prop_map(|(a, b)| (0x18, u32::from_le_bytes([0, a, b, 0]))),
            3 => Just((0x20, 0xc010_c010)),
            1 => Just((0x20, 0xc010_c020)),
            2 => Just((0x1c, 0x2020)),
            4 => (0u32..8).prop_map(|bits| (COMMAND, bits)),
            3 => Just((COMMAND, 7)),
            1 => any::<bool>().prop_map(|hold| (0x3c, u32::from(hold) << 22)),
            1 => (0u32..4).prop_map(move |state| (power + 4, state)),
            1 => (0u16..0x40, any::<u32>()).prop_map(|(at, value)| (4 * at, value)),
        ]
    };
    let slot = any::<bool>().prop_map(|off| (SLOT_CONTROL, u32::from(off) << 10));
    let function = prop_oneof![Just((0x10, 0xc010_0000)), Just((0x14, 0x2040)), Just((COMMAND, 7)), Just((COMMAND, 0))];
    let step = prop_oneof![
        4 => bridge_write(PORT_POWER).prop_map(|(at, value)| Step::Port(at, value)),
        1 => slot.prop_map(|(at, value)| Step::Port(at, value)),
        4 => bridge_write(POWER).prop_map(|(at, value)| Step::Bridge(at, value)),
        3 => function.prop_map(|(at, value)| Step::Function(at, value)),
    ];
    prop::collection::vec(step, 1..60)
}

/// A bridge as its registers say: its buses if they lead anywhere, and what it lets through of the three.
fn registers(read: impl Fn(u16) -> u32, power: u16) -> (Option<(u8, u8)>, [bool; 3], bool) {
    let [_, secondary, subordinate, _] = read(0x18).to_le_bytes();
    let buses = (secondary != 0 && secondary <= subordinate).then_some((secondary, subordinate));
    let (command, on) = (read(COMMAND) as u16, read(power + 4) & 3 == 0 && read(0x3c) >> 22 & 1 == 0);
    let (memory, ports) = (read(0x20), read(0x1c));
    let has = |bit| on && command & bit != 0;
    let in_memory = u64::from(memory & 0xfff0) << 16 <= 0xc010_0000
        && u64::from(memory & 0xfff0_0000 | 0xf_ffff) >= 0xc010_0fff
        || {
            let (low, high) = (read(0x24), (read(0x28), read(0x2c)));
            let base = u64::from(high.0) << 32 | u64::from(low & 0xfff0) << 16;
            let limit = u64::from(high.1) << 32 | u64::from(low & 0xfff0_0000) | 0xf_ffff;
            base <= 0xc010_0000 && 0xc010_0fff <= limit
        };
    let in_ports = (ports & 0xf0) << 8 <= 0x2040 && (ports & 0xf000 | 0xfff) >= 0x205f;
    (buses, [has(COMMAND_MEMORY) && in_memory, has(COMMAND_IO) && in_ports, has(COMMAND_MASTER)], on)
}

proptest! {
    /// Whatever is written anywhere on the way: a function behind two bridges is reached, reaches, and has the id that
    /// all their registers together say, when the write is done.
    #[test]
    fn a16_the_registers_of_all_bridges_are_the_truth_about_what_is_below(steps in steps()) {
        let (world, _) = World::opened(true);
        for step in steps {
            match step {
                Step::Port(at, value) => world.write(PORT, at, value),
                Step::Bridge(at, value) => world.bridge.config_write(at, &value.to_le_bytes()),
                Step::Function(at, value) => world.function.config_write(at, &value.to_le_bytes()),
            }
            let of_port = |at| world.read(PORT, at);
            let of_bridge = |at| {
                let mut data = [0; 4];
                world.bridge.config_read(at, &mut data);
                u32::from_le_bytes(data)
            };
            let (outer, mut through, mut found) = registers(of_port, PORT_POWER);
            let powered = of_port(SLOT_CONTROL) as u16 & SLOT_OFF == 0 && of_port(0x60) as u16 & 1 << 4 == 0;
            let (inner, second, on) = registers(of_bridge, POWER);
            through.iter_mut().zip(second).for_each(|(through, second)| *through &= second && powered);
            found &= on && powered;
            let id = inner.filter(|(bus, _)| outer.is_some_and(|(first, last)| (first..=last).contains(bus)));
            prop_assert_eq!(world.told(), id.map(|(bus, _)| SourceId::new(bus, 0, 0)));
            let config = world.function.config.lock().unwrap();
            let decoded = [0, 1].map(|index| config.decoded(index).is_some());
            drop(config);
            let expected = [through[0] && decoded[0], through[1] && decoded[1], through[2]];
            prop_assert_eq!(world.reach(), expected);
            if let Some((bus, _)) = id {
                let hidden = outer.is_some_and(|(own, _)| own == bus);
                let is_found = world.read(SourceId::new(bus, 1, 0), 0) == 0x5678_1234;
                prop_assert_eq!(is_found, found && !hidden);
            }
        }
    }
}
