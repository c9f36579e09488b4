use vtd::SourceId;

use super::*;
use crate::testing::{FakeInterrupts, FakeRoutes};

const IOAPIC: Requester = Requester { segment: 0, sid: SourceId::new(0xf0, 0x1f, 0) };

struct Bench {
    ioapic: Arc<IoApic>,
    interrupts: Arc<FakeInterrupts>,
    routes: Arc<FakeRoutes>,
}

impl Bench {
    fn new() -> Self {
        let (interrupts, routes) = (Arc::new(FakeInterrupts::default()), Arc::new(FakeRoutes::default()));
        Self { ioapic: IoApic::new(IOAPIC, interrupts.clone(), Some(routes.clone())), interrupts, routes }
    }
    fn register(&self, select: u8) -> u32 {
        let mut data = [0; 4];
        self.ioapic.write(0, &[select, 0, 0, 0]);
        self.ioapic.read(0x10, &mut data);
        u32::from_le_bytes(data)
    }
    fn set_register(&self, select: u8, value: u32) {
        self.ioapic.write(0, &[select, 0, 0, 0]);
        self.ioapic.write(0x10, &value.to_le_bytes());
    }
    fn entry(&self, pin: u8, entry: u64) {
        self.set_register(0x11 + 2 * pin, (entry >> 32) as u32);
        self.set_register(0x10 + 2 * pin, entry as u32);
    }
}

const LEVEL: u64 = ENTRY_LEVEL;
const MASKED: u64 = ENTRY_MASKED;

#[test]
fn f5_version_says_24_pins_and_an_eoi_register_and_all_pins_come_up_masked() {
    let bench = Bench::new();
    assert_eq!(bench.register(1), 0x0017_0020);
    for pin in 0..24 {
        assert_eq!(bench.register(0x10 + 2 * pin), 0x1_0000);
    }
    assert_eq!(bench.register(0x40), 0, "there is no pin 24");
}

#[test]
fn f5_edge_fires_once_a_rise_and_a_masked_edge_is_lost() {
    let bench = Bench::new();
    let line = bench.ioapic.line(4);
    bench.entry(4, 0x01 << 56 | 0x34);
    line.set_level(true);
    line.set_level(true);
    assert_eq!(bench.interrupts.take(), [Msi { address: 0xfee0_1000, data: 0x34 }]);
    line.set_level(false);
    bench.entry(4, MASKED | 0x34);
    line.set_level(true);
    bench.entry(4, 0x34);
    assert_eq!(bench.interrupts.take(), []);
}

#[test]
fn f5_level_fires_once_until_eoi_and_again_while_the_line_is_still_high() {
    let bench = Bench::new();
    let line = bench.ioapic.line(16);
    bench.entry(16, LEVEL | 0x51);
    line.set_level(true);
    assert_eq!(bench.interrupts.take(), [Msi { address: 0xfee0_0000, data: 0xc051 }]);
    assert_eq!(bench.register(0x30) & 1 << 14, 1 << 14, "remote IRR is set");
    line.set_level(false);
    line.set_level(true);
    assert_eq!(bench.interrupts.take(), [], "in service");
    bench.ioapic.eoi(0x52);
    assert_eq!(bench.interrupts.take(), [], "another vector's end");
    bench.ioapic.eoi(0x51);
    assert_eq!(bench.interrupts.take().len(), 1, "still high at the end: fires again");
    line.set_level(false);
    bench.ioapic.write(0x40, &[0x51, 0, 0, 0]);
    assert_eq!(bench.interrupts.take(), []);
    assert_eq!(bench.register(0x30) & 1 << 14, 0, "the EOI register ends it too");
}

#[test]
fn f5_levels_of_two_users_of_a_pin_are_ored() {
    let bench = Bench::new();
    let (a, b) = (bench.ioapic.line(17), bench.ioapic.line(17));
    bench.entry(17, LEVEL | 0x60);
    a.set_level(true);
    b.set_level(true);
    a.set_level(false);
    assert_eq!(bench.interrupts.take().len(), 1);
    bench.ioapic.eoi(0x60);
    assert_eq!(bench.interrupts.take().len(), 1, "the second user still holds it");
    b.set_level(false);
    bench.ioapic.eoi(0x60);
    assert_eq!(bench.interrupts.take().len(), 0);
}

#[test]
fn f5_a_level_line_that_rose_while_masked_fires_at_unmask() {
    let bench = Bench::new();
    let line = bench.ioapic.line(18);
    bench.entry(18, LEVEL | MASKED | 0x61);
    line.set_level(true);
    assert_eq!(bench.interrupts.take().len(), 0);
    bench.entry(18, LEVEL | 0x61);
    assert_eq!(bench.interrupts.take().len(), 1);
}

#[test]
fn f5_switching_to_edge_and_back_clears_remote_irr() {
    let bench = Bench::new();
    let line = bench.ioapic.line(19);
    bench.entry(19, LEVEL | 0x62);
    line.set_level(true);
    bench.interrupts.take();
    bench.entry(19, MASKED | 0x62);
    bench.entry(19, LEVEL | MASKED | 0x62);
    assert_eq!(bench.register(0x36) & 1 << 14, 0);
}

#[test]
fn f5_every_unmasked_pin_has_a_route_with_its_trigger_mode() {
    let bench = Bench::new();
    bench.entry(16, LEVEL | 0x51);
    bench.entry(4, 0x34);
    let said = bench.routes.0.lock().unwrap().clone();
    assert_eq!(said[&16], Some((Msi { address: 0xfee0_0000, data: 0xc051 }, true)));
    assert_eq!(said[&4], Some((Msi { address: 0xfee0_0000, data: 0x34 }, false)));
    bench.entry(16, LEVEL | MASKED | 0x51);
    assert_eq!(bench.routes.0.lock().unwrap()[&16], None);
    bench.ioapic.reset();
    assert_eq!(bench.routes.0.lock().unwrap()[&4], None);
}

#[test]
fn f5_a_remappable_entry_keeps_its_index_in_the_message() {
    let bench = Bench::new();
    let line = bench.ioapic.line(20);
    // Index 0x8123: bits 14:0 in entry bits 63:49, bit 15 in entry bit 11, format in entry bit 48.
    bench.entry(20, 0x0123 << 49 | 1 << 48 | 1 << 11 | 0x70);
    line.set_level(true);
    let sent = bench.interrupts.take();
    assert_eq!(sent[0].address, 0xfee0_0000 | 0x0123 << 5 | 1 << 4 | 1 << 2);
}

#[test]
fn f5_a_listener_lowers_its_line_before_the_pin_is_looked_at_again() {
    struct Source(Arc<dyn IrqLine>);
    impl EoiListener for Source {
        fn end_of_interrupt(&self) {
            self.0.set_level(false);
        }
    }
    let bench = Bench::new();
    let source: Arc<dyn EoiListener> = Arc::new(Source(bench.ioapic.line(21)));
    bench.ioapic.add_eoi_listener(21, Arc::downgrade(&source));
    let line = bench.ioapic.line(21);
    bench.entry(21, LEVEL | 0x71);
    line.set_level(true);
    drop(line);
    assert_eq!(bench.interrupts.take().len(), 1);
    bench.ioapic.eoi(0x71);
    assert_eq!(bench.interrupts.take().len(), 0);
}

#[test]
fn f5_an_entry_has_the_bits_that_software_may_write() {
    let bench = Bench::new();
    bench.set_register(0x10, u32::MAX);
    bench.set_register(0x11, u32::MAX);
    assert_eq!((bench.register(0x10), bench.register(0x11)), (0x0001_afff, 0xffff_0000));
    bench.set_register(0x11, 0);
    assert_eq!((bench.register(0x10), bench.register(0x11)), (0x0001_afff, 0), "each half alone");
    // In service, and written: the bit is the IOAPIC's own.
    let line = bench.ioapic.line(1);
    bench.entry(1, LEVEL | 0x40);
    line.set_level(true);
    bench.set_register(0x12, (LEVEL | 0x40) as u32);
    assert_eq!((bench.register(0x12) & 1 << 14, bench.interrupts.take().len()), (1 << 14, 1));
}

#[test]
fn f5_the_id_and_the_selector_are_kept_and_go_with_a_reset() {
    let bench = Bench::new();
    bench.set_register(0, u32::MAX);
    assert_eq!((bench.register(0), bench.register(2)), (0x0f00_0000, 0x0f00_0000));
    bench.set_register(1, 0);
    bench.set_register(2, 0);
    assert_eq!((bench.register(0), bench.register(1)), (0x0f00_0000, 0x0017_0020));
    bench.ioapic.write(0, &[0x13]);
    let mut data = [0xaa; 8];
    bench.ioapic.read(0, &mut data);
    assert_eq!(data, [0x13, 0, 0, 0, 0, 0, 0, 0]);
    bench.ioapic.read(0x20, &mut data);
    assert_eq!(data, [0; 8]);
    bench.ioapic.write(0x10, &[0, 0]);
    assert_eq!(bench.register(0x13), 0, "half a word is no write");
    let line = bench.ioapic.line(3);
    line.set_level(true);
    bench.entry(3, LEVEL | 0x44);
    bench.interrupts.take();
    bench.ioapic.reset();
    bench.ioapic.read(0, &mut data);
    assert_eq!((data[0], bench.register(0), bench.register(0x16)), (0, 0, 0x1_0000));
    bench.entry(3, LEVEL | 0x44);
    assert_eq!(bench.interrupts.take().len(), 1, "the line has its level still");
}

#[test]
fn f5_the_end_of_an_interrupt_is_heard_by_those_of_its_pin() {
    struct Ends(Mutex<u32>);
    impl EoiListener for Ends {
        fn end_of_interrupt(&self) {
            *self.0.lock().unwrap() += 1;
        }
    }
    let bench = Bench::new();
    let ends: Vec<_> = (0..3).map(|_| Arc::new(Ends(Mutex::new(0)))).collect();
    for (pin, end) in [20, 20, 21].into_iter().zip(&ends) {
        let listener: Weak<dyn EoiListener> = Arc::<Ends>::downgrade(end);
        bench.ioapic.add_eoi_listener(pin, listener);
    }
    let heard = || ends.iter().map(|end| *end.0.lock().unwrap()).collect::<Vec<_>>();
    let lines = [20, 21].map(|pin| bench.ioapic.line(pin));
    // One vector for both, and the second is not in service: it is edge-triggered.
    bench.entry(20, LEVEL | 0x66);
    bench.entry(21, 0x66);
    bench.ioapic.eoi(0x66);
    assert_eq!(heard(), [0, 0, 0], "nothing was in service");
    lines.iter().for_each(|line| line.set_level(true));
    bench.ioapic.write(0x40, &[0x66]);
    assert_eq!(heard(), [1, 1, 0]);
}

#[test]
fn f5_a_line_that_goes_away_is_low() {
    let bench = Bench::new();
    let line = bench.ioapic.line(22);
    bench.entry(22, LEVEL | 0x67);
    line.set_level(true);
    drop(line);
    bench.interrupts.take();
    bench.ioapic.eoi(0x67);
    assert_eq!(bench.interrupts.take(), []);
}

#[test]
fn f5_an_edge_of_a_line_beside_one_that_is_high_is_none() {
    let bench = Bench::new();
    let (a, b) = (bench.ioapic.line(5), bench.ioapic.line(5));
    bench.entry(5, 0x35);
    a.set_level(true);
    b.set_level(true);
    assert_eq!(bench.interrupts.take().len(), 1);
    a.set_level(false);
    a.set_level(true);
    assert_eq!(bench.interrupts.take().len(), 0);
}

#[test]
fn f5_routes_are_said_when_they_change_and_before_the_message() {
    let bench = Bench::new();
    bench.entry(6, 0x36);
    bench.routes.0.lock().unwrap().clear();
    bench.entry(6, 0x36);
    bench.entry(7, MASKED | 0x37);
    assert!(bench.routes.0.lock().unwrap().is_empty(), "nothing changed");
    bench.entry(6, 0x38);
    assert_eq!(bench.routes.0.lock().unwrap().keys().copied().collect::<Vec<_>>(), [6]);
}
