use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vtd::{Msi, Requester, SourceId};

use super::bridge::{Path, header};
use super::config::{COMMAND, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY};
use super::{BarKind, BarTarget, ConfigSpace, Decoder, Identity, Occupied, PciFunction, PciRoot};
use super::{RootPort, RootPortWiring, SlotState};
use crate::host::{SlotPower, SourceIds};
use crate::testing::FakeInterrupts;
use crate::{Bus, BusDevice};

/// Offsets in the port's configuration space: of MSI, of the PCI Express capability.
const MSI: u16 = 0x40;
const EXPRESS: u16 = 0x50;
const SLOT_CONTROL: u16 = EXPRESS + 0x18;
const SLOT_STATUS: u16 = EXPRESS + 0x1a;
const LINK_CONTROL: u16 = EXPRESS + 0x10;
const LINK_STATUS: u16 = EXPRESS + 0x12;
const POWER_OFF: u16 = 1 << 10;
/// That of power management.
const POWER: u16 = 0x8c;

mod steps;

struct Answer;
impl BusDevice for Answer {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0x77);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

/// A card with a BAR of 4 KiB.
struct Fake {
    name: Requester,
    decoder: Arc<Decoder>,
    config: Mutex<ConfigSpace>,
    bar: BarTarget,
    resets: AtomicU32,
    /// It was reset without having been quiet before.
    was_torn: AtomicBool,
    is_quiet: AtomicBool,
    /// What it was told that gets through to it.
    path: Mutex<Option<Path>>,
}

impl Fake {
    fn new(name: Requester, decoder: Arc<Decoder>) -> Arc<Self> {
        let id = Identity { vendor: 0x1234, device: 0x5678, revision: 1, class: 0xff_00_00, subsystem: (1, 2) };
        let mut config = ConfigSpace::new(&id);
        config.add_bar(0, BarKind::Memory64, 0x1000);
        let bar = BarTarget::of_device(Arc::new(Answer));
        Arc::new(Self {
            name,
            decoder,
            config: Mutex::new(config),
            bar,
            resets: AtomicU32::new(0),
            was_torn: AtomicBool::new(false),
            is_quiet: AtomicBool::new(false),
            path: Mutex::default(),
        })
    }

    fn resets(&self) -> u32 {
        assert!(!self.was_torn.load(Ordering::Relaxed), "it was reset under its DMA");
        self.resets.load(Ordering::Relaxed)
    }

    fn path(&self) -> Path {
        self.path.lock().unwrap().clone().unwrap()
    }
}

impl PciFunction for Fake {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        config.write(offset, data);
        self.decoder.set(self.name, 0, config.decoded(0), &self.bar);
    }
    fn quiesce(&self) {
        self.is_quiet.store(true, Ordering::Relaxed);
    }
    fn path_changed(&self, path: &Path) {
        *self.path.lock().unwrap() = Some(path.clone());
    }
    fn reset(&self) {
        if !self.is_quiet.swap(false, Ordering::Relaxed) {
            self.was_torn.store(true, Ordering::Relaxed);
        }
        let mut config = self.config.lock().unwrap();
        config.reset();
        self.decoder.set(self.name, 0, None, &self.bar);
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the unit was told last.
#[derive(Default)]
struct Told(Mutex<BTreeMap<SourceId, Option<SourceId>>>);
impl SourceIds for Told {
    fn renumbered(&self, name: Requester, id: Option<SourceId>) {
        self.0.lock().unwrap().insert(name.sid, id);
    }
}

#[derive(Default)]
struct Powers(AtomicU32);
impl SlotPower for Powers {
    fn powered_off(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct World {
    bus: Arc<Bus>,
    root: Arc<PciRoot>,
    port: Arc<RootPort>,
    interrupts: Arc<FakeInterrupts>,
    told: Arc<Told>,
    powers: Arc<Powers>,
}

/// The first bus, and the name of the first card.
const CARD: SourceId = SourceId::new(1, 0, 0);

impl World {
    fn new() -> Self {
        let bus = Arc::new(Bus::default());
        let (root, interrupts) = (PciRoot::new(bus.clone()), Arc::new(FakeInterrupts::default()));
        let (told, powers) = (Arc::new(Told::default()), Arc::new(Powers::default()));
        let port = Self::port(&root, 1, &interrupts, &told, &powers);
        Self { bus, root, port, interrupts, told, powers }
    }

    fn port(
        root: &PciRoot,
        number: u8,
        interrupts: &Arc<FakeInterrupts>,
        told: &Arc<Told>,
        powers: &Arc<Powers>,
    ) -> Arc<RootPort> {
        let port = RootPort::new(RootPortWiring {
            requester: root.requester(SourceId::new(0, 0x0f + number, 0)),
            number,
            bus: number,
            decoder: root.decoder(),
            port_decoder: root.port_decoder(),
            interrupts: interrupts.clone(),
            ids: Some(told.clone()),
            power: Some(powers.clone()),
        });
        root.insert_port(&port).unwrap();
        port
    }

    fn second_port(&self) -> Arc<RootPort> {
        Self::port(&self.root, 2, &self.interrupts, &self.told, &self.powers)
    }

    fn card(&self, port: &RootPort) -> Arc<Fake> {
        let name = port.reserve().unwrap();
        Fake::new(name, self.root.decoder())
    }

    /// With a card that has been there from the start.
    fn with_card() -> (Self, Arc<Fake>) {
        let world = Self::new();
        let card = world.card(&world.port);
        world.port.fill(card.clone());
        (world, card)
    }

    fn read(&self, sid: SourceId, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.root.config_read(sid, offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn read16(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.root.config_read(self.port.requester().sid, offset, &mut data);
        u16::from_le_bytes(data)
    }
    fn write(&self, offset: u16, value: u32) {
        self.root.config_write(self.port.requester().sid, offset, &value.to_le_bytes());
    }
    fn write16(&self, offset: u16, value: u16) {
        self.root.config_write(self.port.requester().sid, offset, &value.to_le_bytes());
    }
    fn buses(&self, secondary: u8, subordinate: u8) {
        self.write(0x18, u32::from(subordinate) << 16 | u32::from(secondary) << 8);
    }
    /// The card's BAR, and its Memory Enable.
    fn place(&self, sid: SourceId, address: u64) {
        self.root.config_write(sid, 0x10, &(address as u32).to_le_bytes());
        self.root.config_write(sid, 0x14, &((address >> 32) as u32).to_le_bytes());
        self.root.config_write(sid, COMMAND, &COMMAND_MEMORY.to_le_bytes());
    }
    fn answers_at(&self, address: u64) -> bool {
        self.bus.read(address, &mut [0; 4])
    }
    /// What the port's registers say that it forwards.
    fn forwarded(&self) -> Vec<(u64, u64)> {
        let none = Identity { vendor: 0, device: 0, revision: 0, class: 0, subsystem: (0, 0) };
        let mut config = header::new(&none);
        for at in (0..0x40).step_by(4) {
            config.write(at, &self.read(self.port.requester().sid, at).to_le_bytes());
        }
        header::forwarded(&config)
    }
    /// Memory, and messages.
    fn enable(&self) {
        self.write16(MSI + 2, 1);
        self.write(MSI + 4, 0xfee0_0000);
        self.write16(MSI + 12, 0x31);
        self.write16(COMMAND, COMMAND_MEMORY | COMMAND_MASTER);
    }
    fn told(&self, name: SourceId) -> Option<SourceId> {
        self.told.0.lock().unwrap()[&name]
    }
}

#[test]
fn f6_a_root_port_says_what_it_is() {
    let world = World::new();
    let port = world.port.requester().sid;
    assert_eq!([0x00, 0x08, 0x0c].map(|at| world.read(port, at)), [0x000c_1b36, 0x0604_0000, 0x0001_0000]);
    assert_eq!(world.read(port, 0x34), u32::from(MSI));
    assert_eq!(world.read(port, MSI) & 0xffff, u32::from(EXPRESS) << 8 | 0x05);
    // Version 2, root port, slot; then power management.
    assert_eq!(world.read(port, EXPRESS), 0x0142_8c10);
    assert_eq!(world.read(port, EXPRESS + 0x14), 1 << 19 | 0x4007b, "slot 1, hot-plug, by surprise, no completions");
    assert_eq!(world.read(port, EXPRESS + 0x0c) >> 20 & 1, 1, "the link's state is told");
    assert_eq!([0x100, 0x104].map(|at| world.read(port, at)), [0x0001_000d, 0x1f]);
    assert_eq!((world.read16(SLOT_CONTROL), world.read16(SLOT_STATUS)), (0x7c0, 0), "no power, both indicators off");
    assert_eq!((world.read(port, 0x3c), world.read(port, 0x10)), (0, 0), "no interrupt pin and no BAR");
}

#[test]
fn f6_nothing_that_software_writes_changes_what_a_root_port_is() {
    let (world, _) = World::with_card();
    let port = world.port.requester().sid;
    let before: Vec<u32> = (0..0x110).step_by(4).map(|at| world.read(port, at)).collect();
    for value in [u32::MAX, 0x5555_5555, 0] {
        (0..0x110).step_by(4).for_each(|at| world.write(at, value));
    }
    // Command, line size, buses, windows, bridge control, MSI, device and link and slot control, ACS control.
    let may =
        [0x04, 0x0c, 0x18, 0x1c, 0x20, 0x24, 0x28, 0x2c, 0x3c, 0x40, 0x44, 0x48, 0x4c, 0x58, 0x60, 0x68, 0x80, 0x104];
    for (at, before) in (0..0x110).step_by(4).zip(before).filter(|(at, _)| !may.contains(at)) {
        assert_eq!(world.read(port, at), before, "{at:#x}");
    }
    assert_eq!(world.read16(0x1c), 0, "ports are not forwarded");
    assert_eq!([0x24, 0x26].map(|at| world.read16(at) & 0xf), [1, 1], "64-bit addresses");
    assert_eq!(world.read16(SLOT_STATUS) & 1 << 6, 1 << 6, "the card is still there");
}

#[test]
fn f6_a_card_is_found_where_the_bus_numbers_say() {
    let (world, _) = World::with_card();
    let vendor = |bus, device| world.read(SourceId::new(bus, device, 0), 0) & 0xffff;
    assert_eq!(vendor(1, 0), 0xffff, "no bus leads there yet");
    world.buses(1, 1);
    assert_eq!((vendor(1, 0), vendor(1, 1), vendor(2, 0)), (0x1234, 0xffff, 0xffff));
    world.buses(0x80, 0x90);
    assert_eq!((vendor(1, 0), vendor(0x80, 0), vendor(0x81, 0)), (0xffff, 0x1234, 0xffff));
    world.buses(3, 2);
    assert_eq!(vendor(3, 0), 0xffff);
    world.buses(0, 5);
    assert_eq!((vendor(0, 0), vendor(0, 1)), (0x1b36, 0xffff), "bus 0 is the root's");
    let second = world.second_port();
    world.buses(4, 4);
    world.root.config_write(second.requester().sid, 0x18, &[0, 4, 4]);
    assert_eq!(vendor(4, 0), 0x1234, "the first of two that claim a bus");
}

#[test]
fn a16_the_unit_hears_of_a_cards_id_before_the_write_is_done_and_of_no_empty_slot() {
    let (world, _) = World::with_card();
    let second = world.second_port();
    assert_eq!(world.told(CARD), None);
    world.buses(7, 9);
    assert_eq!(world.told(CARD), Some(SourceId::new(7, 0, 0)));
    world.root.config_write(world.port.requester().sid, 0x19, &[8]);
    assert_eq!(world.told(CARD), Some(SourceId::new(8, 0, 0)));
    world.buses(8, 7);
    assert_eq!(world.told(CARD), None);
    world.root.config_write(second.requester().sid, 0x18, &[0, 8, 8]);
    assert!(!world.told.0.lock().unwrap().contains_key(&second.name_below().sid), "it has no card");
    // From the moment when one is made, it has its id.
    assert_eq!(second.reserve().unwrap().sid, SourceId::new(2, 0, 0));
    assert_eq!(world.told(second.name_below().sid), Some(SourceId::new(8, 0, 0)));
    assert_eq!(second.reserve(), Err(Occupied(2)));
    second.release();
    assert_eq!(world.told(second.name_below().sid), None);
    assert!(second.reserve().is_ok());
    world.port.release();
    assert_eq!(world.port.reserve(), Err(Occupied(1)), "a card that is there is not given up");
    world.buses(6, 6);
    world.port.reset();
    assert_eq!(world.told(CARD), None);
}

#[test]
fn f6_a_bar_outside_of_what_the_port_forwards_reaches_nothing() {
    let (world, _) = World::with_card();
    world.buses(1, 1);
    world.place(CARD, 0xc010_0000);
    assert!(!world.answers_at(0xc010_0000), "nothing is forwarded");
    // From 0xc0100000 to 0xc01fffff.
    world.write(0x20, 0xc010_c010);
    assert!(!world.answers_at(0xc010_0000), "not while the port's memory is disabled");
    world.write16(COMMAND, COMMAND_MEMORY);
    assert!(world.answers_at(0xc010_0000) && world.answers_at(0xc010_0ffc));
    world.place(CARD, 0xc01f_f000);
    assert!(world.answers_at(0xc01f_f000));
    for address in [0xc00f_f000, 0xc020_0000] {
        world.place(CARD, address);
        assert!(!world.answers_at(address), "{address:#x}");
    }
    world.write(0x20, 0xc020_c010);
    assert!(world.answers_at(0xc020_0000), "the window grew over it");
    world.write(0x20, 0xc010_c020);
    assert!(!world.answers_at(0xc020_0000), "a base above the limit forwards nothing");
    // Prefetchable memory above 4 GiB.
    world.write(0x24, 0x0010_0010);
    world.write(0x28, 0x20);
    world.write(0x2c, 0x20);
    world.place(CARD, 0x20_0010_0000);
    assert!(world.answers_at(0x20_0010_0000));
    world.write(0x2c, 0x1f);
    assert!(!world.answers_at(0x20_0010_0000));
    world.write(0x2c, 0x21);
    assert!(world.answers_at(0x20_0010_0000));
    world.write16(COMMAND, 0);
    assert!(!world.answers_at(0x20_0010_0000));
}

#[test]
fn f6_a_card_that_comes_is_told_and_answers_when_it_has_power() {
    let world = World::new();
    world.enable();
    world.buses(1, 1);
    // The button and the link, as Linux: presence alone is not asked for.
    world.write16(SLOT_CONTROL, 0x17c0 | 1 | 1 << 5);
    world.port.insert(world.card(&world.port));
    assert_eq!(world.interrupts.take(), [Msi { address: 0xfee0_0000, data: 0x31 }]);
    assert_eq!(world.read16(SLOT_STATUS), 1 << 6 | 1 << 3 | 1);
    assert_eq!(world.read(CARD, 0), u32::MAX, "it has no power");
    // Cleared by ones, and the rest stays.
    world.write16(SLOT_STATUS, 1);
    assert_eq!(world.read16(SLOT_STATUS), 1 << 6 | 1 << 3);
    world.write16(SLOT_STATUS, 1 << 3);
    assert_eq!(world.interrupts.take(), []);
    world.write16(SLOT_CONTROL, 0x11c0 | 1 | 1 << 5);
    assert_eq!(world.interrupts.take().len(), 1, "the link is up");
    assert_eq!(world.read16(LINK_STATUS), 0x2011);
    assert_eq!(world.read(CARD, 0), 0x5678_1234);
    assert_eq!(world.port.slot_state(), SlotState { present: true, powered: true, id: Some(CARD) });
    // While there is a reason, another one is no new interrupt; and none without Bus Master.
    world.port.press_button();
    assert_eq!(world.interrupts.take(), []);
    world.write16(SLOT_STATUS, 0xffff);
    world.write16(COMMAND, COMMAND_MEMORY);
    world.port.press_button();
    assert_eq!((world.interrupts.take(), world.read16(SLOT_STATUS) & 1), (vec![], 1));
    world.write16(COMMAND, COMMAND_MASTER);
    assert_eq!(world.interrupts.take().len(), 1);
    // Nor where its interrupt, or all of them, are disabled.
    for control in [1 << 5, 1] {
        world.write16(SLOT_STATUS, 0xffff);
        world.write16(SLOT_CONTROL, control);
        world.port.press_button();
        assert_eq!(world.interrupts.take(), []);
    }
}

#[test]
fn f6_a_card_goes_when_the_guest_took_its_power_and_not_before() {
    let (world, card) = World::with_card();
    world.enable();
    world.buses(1, 1);
    world.write(0x20, 0xc010_c010);
    world.place(CARD, 0xc010_0000);
    world.port.press_button();
    assert!(world.port.take_if_off().is_none());
    assert!(world.answers_at(0xc010_0000));
    let resets = card.resets();
    world.write16(SLOT_CONTROL, POWER_OFF);
    assert_eq!(card.resets(), resets + 1);
    assert_eq!(world.powers.0.load(Ordering::Relaxed), 1);
    world.write16(SLOT_CONTROL, POWER_OFF | 1);
    assert_eq!(world.powers.0.load(Ordering::Relaxed), 1, "told once");
    assert_eq!(card.resets(), resets + 1, "and reset once");
    assert!(!world.answers_at(0xc010_0000));
    assert_eq!((world.read(CARD, 0), world.read16(LINK_STATUS)), (u32::MAX, 0x11));
    assert_eq!(world.read16(SLOT_STATUS) & (1 << 6 | 1 << 8), 1 << 6 | 1 << 8, "it is there, and the link went");
    assert!(world.port.take_if_off().is_some());
    assert_eq!(world.read16(SLOT_STATUS) & (1 << 6 | 1 << 3), 1 << 3);
    assert_eq!((world.told(CARD), world.port.take_if_off().is_none()), (None, true));
    // Another one can come.
    let next = world.card(&world.port);
    world.port.insert(next.clone());
    let nothing = Path { memory: vec![], ports: vec![], buses: Some((1, 1)), masters: false };
    assert_eq!(next.path(), nothing, "it hears so before it has power");
    world.write16(SLOT_CONTROL, 0);
    assert_eq!(world.read(CARD, 0), 0x5678_1234);
    assert!(!world.answers_at(0xc010_0000), "it has no address yet");
}

#[test]
fn f6_a_card_that_goes_by_surprise_is_gone_at_once() {
    let (world, card) = World::with_card();
    world.enable();
    world.buses(1, 1);
    world.write(0x20, 0xc010_c010);
    world.place(CARD, 0xc010_0000);
    world.write16(SLOT_CONTROL, 1 << 5 | 1 << 12);
    let resets = card.resets();
    assert!(world.port.take_by_surprise().is_some());
    assert_eq!((card.resets(), card.path().masters), (resets + 1, false), "whoever still has it has it quiet");
    assert_eq!((world.answers_at(0xc010_0000), world.read(CARD, 0)), (false, u32::MAX));
    assert_eq!(world.read16(SLOT_STATUS), 1 << 3 | 1 << 8);
    assert_eq!(world.interrupts.take().len(), 1);
    assert!(world.port.take_by_surprise().is_none());
}

#[test]
fn f4_a_bus_reset_and_a_link_that_is_disabled_reset_the_card() {
    let (world, card) = World::with_card();
    world.enable();
    world.buses(1, 1);
    world.write(0x20, 0xc010_c010);
    for (offset, on, off) in [(0x3e, 1 << 6, 0), (LINK_CONTROL, 1 << 4, 0)] {
        world.place(CARD, 0xc010_0000);
        assert!(world.answers_at(0xc010_0000));
        let resets = card.resets();
        world.write16(offset, on);
        assert_eq!((world.read(CARD, 0), world.answers_at(0xc010_0000)), (u32::MAX, false));
        world.write16(offset, off);
        assert_eq!(card.resets(), resets + 1);
        assert_eq!(world.read(CARD, 0), 0x5678_1234);
        assert_eq!(world.read(CARD, 0x04) & 0xffff, 0, "it is as after a reset");
    }
}

#[test]
fn f6_nothing_gets_through_a_port_that_sleeps_or_whose_link_is_down() {
    let (world, card) = World::with_card();
    world.enable();
    world.write16(COMMAND, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER);
    world.buses(1, 1);
    world.write(0x20, 0xc010_c010);
    world.write16(0x1c, 0x2020);
    world.place(CARD, 0xc010_0000);
    let awake = Path {
        memory: vec![(0xc010_0000, 0xc01f_ffff), (0, 0xf_ffff)],
        ports: vec![(0x2000, 0x2fff)],
        buses: Some((1, 1)),
        masters: true,
    };
    let nothing = Path { memory: vec![], ports: vec![], masters: false, ..awake.clone() };
    assert_eq!(card.path(), awake);
    let resets = card.resets();
    // Its registers stay meanwhile, and so does its BAR.
    world.write16(POWER + 4, 3);
    assert_eq!((card.path(), world.answers_at(0xc010_0000)), (nothing.clone(), false));
    assert_eq!(world.read(CARD, 0), u32::MAX);
    world.write16(POWER + 4, 0);
    assert_eq!((card.path(), world.answers_at(0xc010_0000)), (awake.clone(), true));
    assert_eq!(card.resets(), resets);
    for (offset, down, up) in [(SLOT_CONTROL, POWER_OFF, 0), (0x3e, 1 << 6, 0), (LINK_CONTROL, 1 << 4, 0)] {
        let resets = card.resets();
        world.write16(offset, down);
        assert_eq!((card.path(), card.resets()), (nothing.clone(), resets + 1), "register {offset:#x}");
        world.write16(offset, up);
        assert_eq!(card.path(), awake, "register {offset:#x}");
    }
    // The command register of the port by itself.
    world.write16(COMMAND, COMMAND_MEMORY);
    assert_eq!(card.path(), Path { ports: vec![], masters: false, ..awake });
}

#[test]
fn f6_after_a_reset_of_the_port_a_card_that_is_there_has_power_and_nothing_is_forwarded() {
    let (world, _) = World::with_card();
    world.enable();
    world.buses(1, 1);
    world.write(0x20, 0xc010_c010);
    world.place(CARD, 0xc010_0000);
    world.write16(SLOT_CONTROL, POWER_OFF);
    world.root.reset();
    assert_eq!((world.read16(SLOT_CONTROL), world.read16(SLOT_STATUS)), (0x1c0, 1 << 6));
    assert_eq!((world.read(CARD, 0), world.answers_at(0xc010_0000)), (u32::MAX, false));
    world.buses(1, 1);
    assert_eq!(world.read(CARD, 0), 0x5678_1234);
    let empty = World::new();
    empty.write16(SLOT_CONTROL, 0);
    empty.root.reset();
    assert_eq!(empty.read16(SLOT_CONTROL), 0x7c0);
}
