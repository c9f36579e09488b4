use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::pci::config::STATUS;
use crate::pci::{BarKind, BarTarget, ConfigSpace, Identity};

/// A function with a 4 KiB 32-bit BAR 0 and a 64-bit BAR 2 of 16 MiB.
struct TwoBars {
    of: Requester,
    decoder: Arc<Decoder>,
    config: Mutex<ConfigSpace>,
    bars: [BarTarget; 2],
}

struct Answer(u8);
impl BusDevice for Answer {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn write(&self, _: u64, _: &[u8]) {}
}

impl TwoBars {
    fn at(root: &PciRoot, device: u8, function: u8, answer: u8) {
        let sid = SourceId::new(0, device, function);
        let id = Identity { vendor: 0x1234, device: 0x5678, revision: 1, class: 0xff_00_00, subsystem: (1, 2) };
        let mut config = ConfigSpace::new(&id);
        config.add_bar(0, BarKind::Memory32, 0x1000);
        config.add_bar(2, BarKind::Prefetchable64, 16 << 20);
        config.add_capability(0x09, &[0x04], &[]);
        let bars = [answer, answer + 1].map(|answer| BarTarget::of_device(Arc::new(Answer(answer))));
        let function = Self { of: root.requester(sid), decoder: root.decoder(), config: Mutex::new(config), bars };
        root.insert(sid, Arc::new(function)).unwrap();
    }
}

impl PciFunction for TwoBars {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        config.write(offset, data);
        self.decoder.set(self.of, 0, config.decoded(0), &self.bars[0]);
        self.decoder.set(self.of, 2, config.decoded(2), &self.bars[1]);
    }
    fn reset(&self) {
        self.config.lock().unwrap().reset();
    }
}

#[derive(Default)]
struct Resets(AtomicU32);
impl PowerControl for Resets {
    fn power_off(&self) {}
    fn reset(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn read32(root: &PciRoot, sid: SourceId, offset: u16) -> u32 {
    let mut data = [0; 4];
    root.config_read(sid, offset, &mut data);
    u32::from_le_bytes(data)
}

fn write32(root: &PciRoot, sid: SourceId, offset: u16, value: u32) {
    root.config_write(sid, offset, &value.to_le_bytes());
}

fn mmio8(bus: &Bus, address: u64) -> u8 {
    let mut data = [0];
    bus.read(address, &mut data);
    data[0]
}

const ONE: SourceId = SourceId::new(0, 1, 0);
const TWO: SourceId = SourceId::new(0, 2, 0);

#[test]
fn f6_bar_sizing_gives_size_and_kind() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    for offset in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x30] {
        write32(&root, ONE, offset, u32::MAX);
    }
    assert_eq!(read32(&root, ONE, 0x10), 0xffff_f000);
    assert_eq!(read32(&root, ONE, 0x14), 0, "BAR 1 is not there");
    assert_eq!(read32(&root, ONE, 0x18), 0xff00_000c);
    assert_eq!(read32(&root, ONE, 0x1c), 0xffff_ffff);
    assert_eq!(read32(&root, ONE, 0x30), 0, "there is no ROM");
}

#[test]
fn f6_bars_are_on_the_bus_only_while_memory_is_enabled_and_follow_moves() {
    let bus = Arc::new(Bus::default());
    let root = PciRoot::new(bus.clone());
    TwoBars::at(&root, 1, 0, 0x11);
    write32(&root, ONE, 0x10, 0xe000_0000);
    assert_eq!(mmio8(&bus, 0xe000_0000), 0xff);
    root.config_write(ONE, 4, &[2, 0]);
    assert_eq!(mmio8(&bus, 0xe000_0fff), 0x11);
    write32(&root, ONE, 0x10, 0xe000_2000);
    assert_eq!((mmio8(&bus, 0xe000_0000), mmio8(&bus, 0xe000_2000)), (0xff, 0x11));
    write32(&root, ONE, 0x18, 0x0300_0000);
    write32(&root, ONE, 0x1c, 0x80);
    assert_eq!(mmio8(&bus, 0x80_0300_0000), 0x12);
    root.config_write(ONE, 4, &[0, 0]);
    assert_eq!((mmio8(&bus, 0xe000_2000), mmio8(&bus, 0x80_0300_0000)), (0xff, 0xff));
}

#[test]
fn f6_two_bars_at_one_address_the_second_waits_for_the_first_to_go() {
    let bus = Arc::new(Bus::default());
    let root = PciRoot::new(bus.clone());
    TwoBars::at(&root, 1, 0, 0x11);
    TwoBars::at(&root, 2, 0, 0x22);
    for sid in [ONE, TWO] {
        write32(&root, sid, 0x10, 0xe000_0000);
        root.config_write(sid, 4, &[2, 0]);
    }
    assert_eq!(mmio8(&bus, 0xe000_0000), 0x11);
    write32(&root, ONE, 0x10, 0xe000_1000);
    assert_eq!((mmio8(&bus, 0xe000_0000), mmio8(&bus, 0xe000_1000)), (0x22, 0x11));
}

#[test]
fn f6_multi_function_bit_follows_the_topology() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    assert_eq!(read32(&root, ONE, 0x0c) >> 16 & 0xff, 0x00);
    TwoBars::at(&root, 1, 3, 0x11);
    assert_eq!(read32(&root, ONE, 0x0c) >> 16 & 0xff, 0x80);
    let mut byte = [0];
    root.config_read(ONE, 0x0e, &mut byte);
    assert_eq!(byte, [0x80]);
    // It is function 0 that says so.
    TwoBars::at(&root, 1, 5, 0x11);
    assert_eq!(read32(&root, SourceId::new(0, 1, 3), 0x0c) >> 16 & 0xff, 0x00);
    TwoBars::at(&root, 2, 0, 0x11);
    assert_eq!(read32(&root, TWO, 0x0c) >> 16 & 0xff, 0x00, "the next slot's");
}

#[test]
fn f6_the_last_bytes_of_configuration_space_are_served_and_none_behind_them() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    assert_eq!(read32(&root, ONE, 0xffc), 0);
    let mut data = [0; 4];
    root.config_read(ONE, 0xffd, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn f6_a_bar_of_32_bits_has_nothing_to_do_with_the_next_one() {
    let id = Identity { vendor: 0x1234, device: 0x5678, revision: 1, class: 0xff_00_00, subsystem: (1, 2) };
    let mut config = ConfigSpace::new(&id);
    config.add_bar(0, BarKind::Memory32, 0x1000);
    config.add_bar(1, BarKind::Memory32, 0x1000);
    config.write(0x04, &[2, 0]);
    config.assign(1, 0xe000_1000);
    config.assign(0, 0xe000_0000);
    assert_eq!(config.decoded(0), Some((0xe000_0000, 0xe000_0fff)));
    assert_eq!(config.decoded(1), Some((0xe000_1000, 0xe000_1fff)));
}

#[test]
fn f6_slots_are_given_from_01_and_the_machines_own_are_kept() {
    let root = PciRoot::new(Arc::default());
    assert_eq!(root.allocate(None), Ok(ONE));
    assert_eq!(root.allocate(Some((0, 0))), Err(SlotError::Reserved(SourceId::new(0, 0, 0))));
    assert_eq!(root.allocate(Some((0x1f, 2))), Err(SlotError::Reserved(SourceId::new(0, 0x1f, 2))));
    assert_eq!(root.allocate(Some((5, 1))), Err(SlotError::NoFunctionZero(SourceId::new(0, 5, 1))));
    for device in 1..0x1f {
        TwoBars::at(&root, device, 0, 0);
    }
    assert_eq!(root.allocate(None), Err(SlotError::Full));
    assert_eq!(root.allocate(Some((5, 0))), Err(SlotError::Taken(SourceId::new(0, 5, 0))));
    assert_eq!(root.allocate(Some((5, 1))), Ok(SourceId::new(0, 5, 1)));
    assert_eq!(root.allocate(Some((5, 7))), Ok(SourceId::new(0, 5, 7)));
    assert!(matches!(root.allocate(Some((5, 8))), Err(SlotError::Reserved(_))));
    assert!(root.allocate(Some((0x1e, 1))).is_ok());
}

#[test]
fn f6_config_ports_need_the_enable_bit_and_serve_bytes() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    let ports = ConfigPorts::new(root, Arc::new(Resets::default()));
    let mut word = [0; 2];
    ports.write(0, &0x0000_0800u32.to_le_bytes());
    ports.read(4, &mut word);
    assert_eq!(word, [0xff, 0xff]);
    ports.write(0, &0x8000_0800u32.to_le_bytes());
    ports.read(6, &mut word);
    assert_eq!(word, [0x78, 0x56]);
    // The byte in the address instead of in the port, and never beyond the four.
    ports.write(0, &0x8000_0802u32.to_le_bytes());
    ports.read(4, &mut word);
    assert_eq!(word, [0x78, 0x56]);
    ports.write(0, &0x8000_0803u32.to_le_bytes());
    ports.read(4, &mut word);
    assert_eq!(word, [0xff, 0xff]);
    ports.write(0, &0x8000_f800u32.to_le_bytes());
    ports.read(4, &mut word);
    assert_eq!(word, [0xff, 0xff], "no function there");
    let mut dword = [0; 4];
    ports.read(0, &mut dword);
    assert_eq!(dword, 0x8000_f800u32.to_le_bytes());
}

#[test]
fn f6_the_reset_register_is_between_the_config_ports() {
    let power = Arc::new(Resets::default());
    let ports = ConfigPorts::new(PciRoot::new(Arc::default()), power.clone());
    ports.write(1, &[0x02]);
    assert_eq!(power.0.load(Ordering::Relaxed), 0);
    ports.write(1, &[ConfigPorts::RESET_VALUE]);
    assert_eq!(power.0.load(Ordering::Relaxed), 1);
}

#[test]
fn f6_ecam_reaches_extended_space_and_wide_accesses_are_split() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    let ecam = Ecam::new(root);
    let mut wide = [0; 8];
    ecam.read(8 << 12, &mut wide);
    assert_eq!(wide[..4], [0x34, 0x12, 0x78, 0x56]);
    ecam.read((8 << 12) + 0x100, &mut wide);
    assert_eq!(wide, [0; 8]);
    ecam.read(0xf_f000, &mut wide);
    assert_eq!(wide, [0xff; 8]);
    let mut crossing = [0; 4];
    ecam.read((8 << 12) + 0xffe, &mut crossing);
    assert_eq!(crossing, [0xff; 4], "an access across two functions reaches neither");
}

#[test]
fn f6_reset_takes_the_addresses_and_the_enable_bits() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    write32(&root, ONE, 0x10, 0xe000_0000);
    root.config_write(ONE, 4, &[6, 0]);
    root.reset();
    assert_eq!((read32(&root, ONE, 0x10), read32(&root, ONE, 4) & 0xffff), (0, 0));
    assert_eq!(read32(&root, ONE, 0x34) & 0xff, 0x40, "the capability list stays");
}

#[test]
fn f6_what_software_may_write_of_the_header() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    for offset in (0..0x40).step_by(4).filter(|offset| !(0x10..0x28).contains(offset)) {
        write32(&root, ONE, offset, u32::MAX);
    }
    let header = [0x00, 0x04, 0x08, 0x0c, 0x28, 0x2c, 0x30, 0x34, 0x38, 0x3c].map(|offset| read32(&root, ONE, offset));
    assert_eq!(header, [0x5678_1234, 0x0010_0546, 0xff00_0001, 0xff, 0, 0x0002_0001, 0, 0x40, 0, 0xff]);
    root.reset();
    let after = [0x04, 0x0c, 0x3c].map(|offset| read32(&root, ONE, offset));
    assert_eq!(after, [0x0010_0000, 0, 0xff], "the line is what firmware wrote");
}

#[test]
fn f6_a_bar_without_an_address_or_under_a_probe_is_not_decoded() {
    let mut config = ConfigSpace::new(&Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) });
    config.add_bar(0, BarKind::Memory32, 0x1000);
    config.add_bar(2, BarKind::Memory64, 0x1_0000);
    config.assign(0, 0xe000_0000);
    config.assign(2, 0x81_0000_0000);
    assert_eq!(config.decoded(0), None, "memory is off");
    config.write(4, &[2, 0]);
    assert_eq!(config.decoded(0), Some((0xe000_0000, 0xe000_0fff)));
    assert_eq!(config.decoded(2), Some((0x81_0000_0000, 0x81_0000_ffff)));
    assert_eq!((config.decoded(1), config.decoded(3), config.decoded(6)), (None, None, None));
    config.assign(0, u64::MAX);
    config.assign(2, u64::MAX);
    assert_eq!((config.decoded(0), config.decoded(2)), (None, None), "a probe of its size");
    config.assign(0, 0);
    config.assign(2, 0xffff_0000);
    assert_eq!((config.decoded(0), config.decoded(2)), (None, Some((0xffff_0000, 0xffff_ffff))));
}

#[test]
fn f6_kinds_of_bars_are_told_by_their_low_bits() {
    let kinds: Vec<_> = (0..16).filter_map(|bits| Some((bits, BarKind::of(bits)?))).collect();
    let wanted = [
        (0x0, BarKind::Memory32),
        (0x1, BarKind::Io),
        (0x4, BarKind::Memory64),
        (0x5, BarKind::Io),
        (0x8, BarKind::Prefetchable32),
        (0x9, BarKind::Io),
        (0xc, BarKind::Prefetchable64),
        (0xd, BarKind::Io),
    ];
    assert_eq!(kinds, wanted);
    for (bits, kind) in wanted {
        // Of ports bits 3:2 are bits of the address.
        let (flags, is_64) = if bits & 1 != 0 { (1, false) } else { (bits, bits & 4 != 0) };
        assert_eq!((kind.flags(), kind.is_64()), (flags, is_64));
    }
}

#[test]
fn f6_capabilities_are_linked_one_after_another() {
    let mut config = ConfigSpace::new(&Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) });
    let first = config.add_capability(0x09, &[1, 2, 3], &[0xff]);
    let second = config.add_capability(0x05, &[4, 5], &[]);
    assert_eq!((first, second), (0x40, 0x48));
    assert_eq!((config.u16(0x34), config.u32(0x40), config.u32(0x48)), (0x40, 0x0201_4809, 0x0504_0005));
    config.write(0x42, &[0x77, 0x77]);
    assert_eq!(config.u16(0x42), 0x0277);
}

#[test]
fn f6_status_bits_are_cleared_by_ones() {
    let mut config = ConfigSpace::new(&Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) });
    config.put(STATUS, &[0, 0xff]);
    config.write(STATUS, &[0, 0x81]);
    assert_eq!(config.u16(STATUS), 0x7e00);
    config.write(0xfff, &[1, 2]);
    let mut data = [0; 2];
    config.read(0xfff, &mut data);
    assert_eq!(data, [0, 0xff]);
}

#[test]
fn f6_pins_of_devices_are_spread_over_eight_lines() {
    assert_eq!(
        [(0, 1), (1, 1), (5, 1), (5, 4), (7, 1), (7, 2), (31, 4)].map(|(device, pin)| gsi_of(device, pin)),
        [16, 17, 21, 16, 23, 16, 18]
    );
}

#[test]
fn f6_functions_are_not_put_over_each_other() {
    let root = PciRoot::new(Arc::default());
    TwoBars::at(&root, 1, 0, 0x11);
    let (_, one) = root.functions().pop().unwrap();
    assert_eq!(root.insert(ONE, one.clone()), Err(SlotError::Taken(ONE)));
    assert_eq!(root.allocate(Some((0x1e, 0))), Ok(SourceId::new(0, 0x1e, 0)));
    assert_eq!(root.allocate(Some((5, 8))), Err(SlotError::Reserved(SourceId::new(0, 5, 8))));
    TwoBars::at(&root, 2, 3, 0x22);
    assert_eq!(root.allocate(None), Ok(SourceId::new(0, 3, 0)), "02 has a function");
    let mut data = [0; 8];
    root.config_read(ONE, 0xffc, &mut data);
    assert_eq!(data, [0xff; 8]);
    root.config_write(ONE, 0xffe, &[0; 4]);
}

#[test]
fn a13_segments_have_configuration_space_of_their_own_and_ports_reach_the_first() {
    let mmio = Arc::new(Bus::default());
    let first = PciRoot::new(mmio.clone());
    let other = first.beside(3);
    TwoBars::at(&first, 2, 0, 1);
    TwoBars::at(&other, 2, 0, 5);
    let (sid, command) = (SourceId::new(0, 2, 0), 2u16);
    assert_eq!(other.requester(sid).to_string(), "0003:00:02.0");
    let write = |root: &PciRoot, at: u16, value: u32| root.config_write(sid, at, &value.to_le_bytes());
    let ecam = Ecam::new(other.clone());
    ecam.write(0x1_0010, &0xc000_0000_u32.to_le_bytes());
    ecam.write(0x1_0004, &command.to_le_bytes());
    write(&first, 0x10, 0xc100_0000);
    write(&first, 0x04, command.into());
    let who = |at: u64| {
        let mut data = [0];
        mmio.read(at, &mut data);
        data[0]
    };
    assert_eq!((who(0xc000_0000), who(0xc100_0000)), (5, 1));
    let ports = ConfigPorts::new(first.clone(), Arc::<Resets>::default());
    ports.write(0, &0x8000_1010_u32.to_le_bytes());
    let mut data = [0; 4];
    ports.read(4, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0xc100_0000);
}
