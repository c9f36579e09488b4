use std::sync::{Arc, Mutex};

use devices::Bus;
use devices::host::{Interrupts, IrqRoute};
use devices::pci::{
    BarKind, ConfigSpace, Identity, PciFunction, PciePciBridge, PciePciBridgeWiring, RootPort, RootPortWiring,
};
use vtd::{Msi, Requester};

use super::*;

const GIB: u64 = 1 << 30;

/// A function with nothing but BARs.
struct Fake(Mutex<ConfigSpace>);

impl Fake {
    fn new(bars: &[(usize, BarKind, u64)]) -> Arc<Self> {
        let id = Identity { vendor: 1, device: 2, revision: 0, class: 0xff0000, subsystem: (0, 0) };
        let mut config = ConfigSpace::new(&id);
        bars.iter().for_each(|(index, kind, size)| config.add_bar(*index, *kind, *size));
        Arc::new(Self(Mutex::new(config)))
    }
}

impl PciFunction for Fake {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().unwrap().write(offset, data);
    }
    fn reset(&self) {}
}

/// The window above 4 GiB of a machine with one segment.
fn window(bars: &[Bar], ram: u64, width: u8) -> Result<Option<Window>, NoPlace> {
    windows(&[(0, bars.to_vec())], ram, width).map(|windows| windows[0].high)
}

/// The windows of one segment, with this one above 4 GiB.
fn windows_with(high: Option<Window>) -> BarWindows {
    BarWindows { segment: 0, low: layout::pci32_window(0, 0), high }
}

/// A root with these functions, from 01.0 on.
fn root(functions: &[&[(usize, BarKind, u64)]]) -> Arc<PciRoot> {
    let root = PciRoot::new(Arc::new(Bus::default()));
    for bars in functions {
        let sid = root.allocate(None).unwrap();
        root.insert(sid, Fake::new(bars)).unwrap();
    }
    root
}

fn sid(device: u8) -> SourceId {
    SourceId::new(0, device, 0)
}

/// The address in a BAR.
fn address(root: &PciRoot, bar: &Bar) -> u64 {
    let low = read32(root, bar.sid, register(bar.index));
    let high = if bar.is_64 { read32(root, bar.sid, register(bar.index + 1)) } else { 0 };
    u64::from(high) << 32 | u64::from(low & !0xf)
}

#[test]
fn bars_are_found_with_their_sizes_and_keep_their_addresses() {
    let root = root(&[
        &[(0, BarKind::Memory32, 0x10_0000), (2, BarKind::Prefetchable64, 128 * GIB), (5, BarKind::Memory32, 16)],
        &[(4, BarKind::Memory64, 4 * GIB)],
    ]);
    let bar = |device, index, size, is_64| Bar { sid: sid(device), index, size, is_64, may_be_high: is_64 };
    let expected =
        [bar(1, 0, 0x10_0000, false), bar(1, 2, 128 * GIB, true), bar(1, 5, 16, false), bar(2, 4, 4 * GIB, true)];
    assert_eq!(all(&root), expected);
    write32(&root, sid(1), register(0), 0xc120_0000);
    write32(&root, sid(1), COMMAND, COMMAND_MEMORY.into());
    assert_eq!(all(&root), expected);
    assert_eq!(read32(&root, sid(1), register(0)), 0xc120_0000);
    assert_eq!(read32(&root, sid(1), COMMAND) as u16, COMMAND_MEMORY);
}

#[test]
fn window_has_room_for_several_bars_of_128_gib() {
    let root = root(&[
        &[(0, BarKind::Memory64, 0x4000)],
        &[(0, BarKind::Prefetchable64, 128 * GIB)],
        &[(0, BarKind::Prefetchable64, 128 * GIB), (2, BarKind::Memory32, 0x1000)],
    ]);
    let bars = all(&root);
    let window = window(&bars, GIB / 2, 40).unwrap();
    assign(&root, &windows_with(window));
    let mut places: Vec<(u64, u64)> = bars.iter().map(|bar| (address(&root, bar), bar.size.max(PAGE))).collect();
    places.sort_unstable();
    assert!(places.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{places:x?}");
    for (at, size) in places {
        assert!(at.is_multiple_of(size) && at + size <= 1 << 40);
        let inside = |window: Window| at >= window.first && at + size - 1 <= window.last;
        assert!(inside(layout::pci32_window(0, 0)) || window.is_some_and(inside), "{at:#x}");
    }
    let enabled = |device| read32(&root, sid(device), COMMAND) as u16 & COMMAND_MEMORY != 0;
    assert!((1..4).all(enabled));
}

#[test]
fn window_that_cannot_be_is_an_error_that_names_the_largest_bar_without_a_place() {
    let wide = all(&root(&[
        &[(0, BarKind::Memory64, 0x4000)],
        &[(0, BarKind::Prefetchable64, 128 * GIB)],
        &[(2, BarKind::Prefetchable64, 256 * GIB)],
    ]));
    let place = |ram, width| window(&wide, ram, width).map_err(|place| (place.bar.sid, place.bar.index));
    assert!(place(GIB / 2, 40).is_ok_and(|window| window.is_some()));
    assert!(place(GIB / 2, 39).is_err_and(|bar| bar == (sid(3), 2) || bar == (sid(2), 0)));
    assert!(place(300 * GIB, 40).is_ok());
    assert_eq!(place(900 * GIB, 40), Err((sid(3), 2)));
    assert_eq!(place(GIB / 2, 32), Err((sid(3), 2)), "there is no window at all");

    let low = all(&root(&[&[(0, BarKind::Memory32, GIB / 4)], &[(0, BarKind::Memory32, GIB / 2)]]));
    let refused = window(&low, GIB / 2, 46).unwrap_err();
    assert_eq!((refused.bar.sid, refused.full), (sid(1), Full::Low(GIB / 2)), "512 MiB are all that is below 4 GiB");
    let message = refused.to_string();
    assert!(message.starts_with("BAR 0 of 256 MiB has no place") && message.contains("the 512 MiB below"), "{message}");
    let message = window(&wide, GIB / 2, 36).unwrap_err().to_string();
    assert!(message.starts_with("BAR 2 of 256 GiB has") && message.contains("of 36 bits"), "{message}");
    assert!(window(&low[..1], GIB / 2, 46).is_ok());
}

#[test]
fn window_above_is_not_needed_for_what_fits_below() {
    let bars = all(&root(&[&[(0, BarKind::Memory64, 0x4000)]]));
    assert_eq!(window(&bars, GIB / 2, 32), Ok(None));
}

#[test]
fn ports_are_given_to_io_bars_and_enabled_where_there_are_some() {
    let root = root(&[
        &[(0, BarKind::Io, 8), (1, BarKind::Memory32, 0x1000), (5, BarKind::Io, 0x100)],
        &[(0, BarKind::Memory32, 0x1000)],
        &[(2, BarKind::Io, 4), (3, BarKind::Io, 0x100)],
    ]);
    // Sizing leaves what was there.
    write32(&root, sid(1), register(0), 0x3000);
    write32(&root, sid(1), COMMAND, COMMAND_IO.into());
    assert_eq!(all(&root).len(), 2);
    assert_eq!((read32(&root, sid(1), register(0)), read32(&root, sid(1), COMMAND)), (0x3001, COMMAND_IO.into()));
    assign(&root, &windows_with(None));
    let port = |device, index| read32(&root, sid(device), register(index));
    assert_eq!([port(1, 5), port(3, 3), port(1, 0), port(3, 2)], [0x1001, 0x1101, 0x1201, 0x1209]);
    let enables = [1, 2, 3].map(|device| read32(&root, sid(device), COMMAND) as u16 & ENABLES);
    assert_eq!(enables, [ENABLES, COMMAND_MEMORY, ENABLES]);
}

#[test]
fn ports_that_are_too_many_stay_without_an_address() {
    let most: &[_] = &[(0, BarKind::Io, 0x8000), (1, BarKind::Io, 0x8000), (2, BarKind::Io, 0x4000)];
    let root = root(&[most, &[(0, BarKind::Io, 4)]]);
    assign(&root, &windows_with(None));
    let port = |device, index| read32(&root, sid(device), register(index));
    assert_eq!([port(1, 0), port(1, 1), port(1, 2), port(2, 0)], [0x8001, 1, 1, 1]);
}

#[test]
fn rooms_hand_out_aligned_disjoint_ranges_until_they_are_full() {
    let mut room = Room(Window { first: 0xc000_1000, last: 0xc03f_ffff });
    assert_eq!(room.take(0x10_0000), Some(0xc010_0000));
    assert_eq!(room.take(0x10), Some(0xc020_0000));
    assert_eq!(room.take(0x1000), Some(0xc020_1000));
    assert_eq!(room.take(0x10_0000), Some(0xc030_0000));
    assert_eq!(room.take(0x1000), None);
    assert_eq!(Room(Window { first: u64::MAX - 5, last: u64::MAX }).take(0x1000), None);
}

/// A root port of this number, with a function with these BARs.
fn port(root: &PciRoot, number: u8, bars: &[(usize, BarKind, u64)]) {
    let port = RootPort::new(RootPortWiring {
        requester: root.requester(sid(0x0f + number)),
        number,
        bus: number,
        decoder: root.decoder(),
        port_decoder: root.port_decoder(),
        interrupts: Arc::new(NoInterrupts),
        ids: None,
        power: None,
    });
    root.insert_port(&port).unwrap();
    if !bars.is_empty() {
        port.reserve().unwrap();
        port.fill(Fake::new(bars));
    }
}

#[test]
fn f6_bridges_forward_ports_and_what_lies_above_4_gib_and_one_behind_the_other_the_same() {
    let root = root(&[&[(0, BarKind::Io, 8)]]);
    // One whose memory is too much below 4 GiB, and a port with a bridge behind it.
    let large = &[(0, BarKind::Io, 0x20), (1, BarKind::Memory32, 0x1000), (2, BarKind::Prefetchable64, 2 * GIB)];
    port(&root, 1, large);
    port(&root, 2, &[]);
    let bridge = PciePciBridge::new(PciePciBridgeWiring {
        bus: 3,
        segment: 0,
        decoder: root.decoder(),
        port_decoder: root.port_decoder(),
        ids: None,
    });
    let behind = root.ports()[1].clone();
    behind.reserve().unwrap();
    behind.fill(bridge.clone());
    for device in [1, 2] {
        let function = Fake::new(&[(0, BarKind::Io, 8), (1, BarKind::Memory32, 0x1000)]);
        assert!(bridge.insert(device, 0, function).is_ok());
    }
    let bars = all(&root);
    let window = window(&bars, GIB / 2, 40).unwrap();
    assert_eq!(bars.iter().filter(|bar| bar.may_be_high).count(), 1);
    assign(&root, &windows_with(window));
    let (one, two, inner) = (sid(0x10), sid(0x11), SourceId::new(2, 0, 0));
    assert_eq!([one, two, inner].map(|at| read32(&root, at, BUSES)), [0x01_0100, 0x03_0200, 0x03_0302]);
    let memory = |at: SourceId| {
        let register = read32(&root, at, MEMORY_WINDOW);
        u64::from(register & 0xfff0) << 16..=u64::from(register & 0xfff0_0000 | 0xf_ffff)
    };
    let ports = |at: SourceId| {
        let register = read32(&root, at, PORT_WINDOW);
        (register & 0xf0) << 8..=register & 0xf000 | 0xfff
    };
    let above = |at: SourceId| {
        let [low, base, limit] = [0, 4, 8].map(|more| u64::from(read32(&root, at, PREFETCHABLE_WINDOW + more)));
        base << 32 | (low & 0xfff0) << 16..=limit << 32 | low & 0xfff0_0000 | 0xf_ffff
    };
    let io = |at, index| read32(&root, at, register(index)) & !3;
    for bar in &bars {
        let (at, bridges) = (address(&root, bar), if bar.sid.bus() == 1 { vec![one] } else { vec![two, inner] });
        let last = at + bar.size - 1;
        for bridge in bridges.into_iter().filter(|_| bar.sid.bus() != 0) {
            let window = if bar.may_be_high { above(bridge) } else { memory(bridge) };
            assert!(at != 0 && window.contains(&at) && window.contains(&last), "{bar:?} at {at:#x}, {window:x?}");
        }
        assert!(!bar.may_be_high || window.is_some_and(|window| window.first <= at && last <= window.last));
    }
    for (function, bridges) in [(SourceId::new(1, 0, 0), vec![one]), (SourceId::new(3, 2, 0), vec![two, inner])] {
        for bridge in bridges {
            assert!(ports(bridge).contains(&io(function, 0)), "{function}");
            assert_eq!(read32(&root, bridge, COMMAND) & 7, 7);
        }
        assert_eq!(read32(&root, function, COMMAND) as u16 & ENABLES, ENABLES);
    }
    assert!(ports(one).is_empty() || !ports(one).contains(&io(sid(1), 0)), "nobody else's ports");
    assert_ne!(io(SourceId::new(3, 1, 0), 0), io(SourceId::new(3, 2, 0), 0));
    // Nothing is forwarded where nothing is.
    assert!(above(two).is_empty());
}

struct NoInterrupts;
impl Interrupts for NoInterrupts {
    fn route(&self, _: Requester) -> std::io::Result<Arc<dyn IrqRoute>> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn set_routes(&self, _: &[(Arc<dyn IrqRoute>, Option<Msi>)]) {}
    fn signal(&self, _: Requester, _: Msi) {}
}

#[test]
fn f6_bars_behind_root_ports_are_found_and_an_images_ports_forward_them() {
    let root = root(&[&[(0, BarKind::Memory32, 0x1000)]]);
    port(&root, 1, &[(0, BarKind::Memory32, 0x10_0000), (2, BarKind::Memory64, 0x4000)]);
    port(&root, 2, &[]);
    port(&root, 3, &[(0, BarKind::Memory32, 0x1000)]);
    let bars = all(&root);
    let found: Vec<_> = bars.iter().map(|bar| (bar.sid, bar.index, bar.size)).collect();
    let behind = |number, index, size| (SourceId::new(number, 0, 0), index, size);
    let expected = [(sid(1), 0, 0x1000), behind(1, 0, 0x10_0000), behind(1, 2, 0x4000), behind(3, 0, 0x1000)];
    assert_eq!(found, expected, "a port's registers are no BARs");
    assert_eq!(read32(&root, sid(0x10), BUSES), 0, "a guest numbers buses itself");
    assign(&root, &windows_with(None));
    let window = |number| read32(&root, sid(0x0f + number), MEMORY_WINDOW);
    assert_eq!([1, 2, 3].map(|number| read32(&root, sid(0x0f + number), BUSES)), [0x01_0100, 0x02_0200, 0x03_0300]);
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for bar in &bars {
        let at = address(&root, bar);
        assert!(at != 0 && at.is_multiple_of(bar.size), "{bar:?}");
        spans.push((at, at + bar.size));
        if bar.sid.bus() != 0 {
            let window = window(bar.sid.bus());
            let (first, last) = (u64::from(window & 0xfff0) << 16, u64::from(window >> 16 & 0xfff0) << 16 | 0xf_ffff);
            assert!(first <= at && at + bar.size - 1 <= last, "{bar:?} in {first:#x}-{last:#x}");
        }
        assert_eq!(read32(&root, bar.sid, COMMAND) & 0x7, u32::from(COMMAND_MEMORY));
    }
    spans.sort_unstable();
    assert!(spans.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{spans:x?}");
    // From one port's window to the next no MiB is shared.
    assert!(window(1) >> 16 & 0xfff0 < window(3) & 0xfff0);
}

#[test]
fn a13_each_segment_has_windows_of_its_own_and_none_overlap() {
    let first = root(&[&[(0, BarKind::Prefetchable64, 16 * GIB)]]);
    let other = first.beside(2);
    for (device, kind, size) in
        [(1, BarKind::Memory64, 128 * GIB), (2, BarKind::Memory32, 16 << 20), (3, BarKind::Io, 32)]
    {
        other.insert(SourceId::new(0, device, 0), Fake::new(&[(0, kind, size)])).unwrap();
    }
    let bars = [(0, all(&first)), (2, all(&other))];
    let both = windows(&bars, GIB, 46).unwrap();
    let at = |window: Window| (window.first, window.last + 1);
    assert_eq!(both.iter().map(|it| it.segment).collect::<Vec<_>>(), [0, 2]);
    assert_eq!((at(both[0].low), at(both[1].low)), ((0xc000_0000, 0xdc00_0000), (0xdc00_0000, 0xde00_0000)));
    let high = both.iter().map(|it| it.high.map(at)).collect::<Vec<_>>();
    assert_eq!(high, [Some((64 * GIB, 128 * GIB)), Some((128 * GIB, 256 * GIB))]);
    // What a segment does not need above it does not take, and what it needs is refused where there is none.
    let none = [(0, bars[0].1.clone()), (2, bars[1].1[1..].to_vec())];
    assert_eq!(windows(&none, GIB, 46).unwrap()[1].high, None);
    let refused = windows(&bars, GIB, 37).unwrap_err();
    assert_eq!((refused.of.to_string(), refused.full), ("0002:00:01.0".to_owned(), Full::High(37)));
    // Firmware places them there; ports it has none for.
    for (root, windows) in [&first, &other].into_iter().zip(&both) {
        assign(root, windows);
    }
    let read = |device, at| read32(&other, SourceId::new(0, device, 0), at);
    assert_eq!((read(1, BAR0) & !0xf, read(1, BAR0 + 4)), (0, 32), "128 GiB");
    assert_eq!(read(2, BAR0), 0xdc00_0000);
    assert_eq!((read(3, BAR0) & !3, read(3, COMMAND) as u16 & ENABLES), (0, COMMAND_MEMORY));
}
