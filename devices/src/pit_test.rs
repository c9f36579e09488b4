use super::*;
use crate::testing::{FakeClock, FakeLine};

/// Ports, a clock and a line.
struct Rig {
    pit: Arc<Pit>,
    port: SystemPort,
    clock: Arc<FakeClock>,
    line: Arc<FakeLine>,
}

impl Rig {
    fn new() -> Self {
        let (clock, line) = (Arc::new(FakeClock::default()), Arc::new(FakeLine::default()));
        let pit = Pit::new(clock.clone(), Arc::default(), line.clone());
        Self { port: SystemPort::new(pit.clone()), pit, clock, line }
    }

    /// Lets ticks pass.
    fn pass(&self, ticks: u64) {
        let now = self.pit.ticks();
        self.clock.set(Pit::moment(now + ticks));
        assert_eq!(self.pit.ticks(), now + ticks);
    }

    fn read(&self, port: u64) -> u8 {
        let mut data = [0];
        self.pit.read(port, &mut data);
        data[0]
    }

    fn write(&self, port: u64, values: &[u8]) {
        values.iter().for_each(|value| self.pit.write(port, &[*value]));
    }

    /// Low byte, then high byte.
    fn count(&self, channel: u64) -> u16 {
        u16::from_le_bytes([self.read(channel), self.read(channel)])
    }

    fn system(&self) -> u8 {
        let mut data = [0];
        self.port.read(0, &mut data);
        data[0]
    }

    fn gate(&self, high: bool) {
        self.port.write(0, &[high.into()]);
    }

    /// The output of channel 2.
    fn output(&self) -> bool {
        self.system() & 0x20 != 0
    }

    fn rises(&self) -> u32 {
        *self.line.rises.lock().unwrap()
    }
}

const CONTROL: u64 = 3;

/// Control word of channel 2 with both halves.
const fn channel2(mode: u8) -> u8 {
    0xb0 | mode << 1
}

#[test]
fn pit_outputs_and_counts_of_each_mode_follow_the_data_sheet() {
    // Mode, count, (ticks since the start, output, what the counter shows).
    type Row = (u64, bool, u16);
    let table: &[(u8, u16, &[Row])] = &[
        (0, 10, &[(0, false, 10), (9, false, 1), (10, true, 0), (11, true, 0xffff), (70_000, true, 61_082)]),
        (0, 0, &[(0, false, 0), (1, false, 0xffff), (65_535, false, 1), (65_536, true, 0)]),
        (1, 10, &[(0, false, 10), (9, false, 1), (10, true, 0), (12, true, 0xfffe)]),
        (2, 10, &[(0, true, 10), (8, true, 2), (9, false, 1), (10, true, 10), (19, false, 1), (20, true, 10)]),
        (3, 10, &[(0, true, 10), (4, true, 2), (5, false, 10), (9, false, 2), (10, true, 10)]),
        (3, 5, &[(0, true, 5), (2, true, 1), (3, false, 4), (4, false, 2), (5, true, 5)]),
        (4, 10, &[(0, true, 10), (9, true, 1), (10, false, 0), (11, true, 0xffff), (30, true, 0xffec)]),
        (5, 10, &[(0, true, 10), (10, false, 0), (11, true, 0xffff)]),
        (6, 10, &[(9, false, 1), (10, true, 10)]),
        (7, 10, &[(5, false, 10), (10, true, 10)]),
    ];
    for (mode, count, rows) in table {
        for (ticks, output, shown) in *rows {
            let rig = Rig::new();
            rig.gate(!matches!(mode, 1 | 5));
            rig.write(CONTROL, &[channel2(*mode)]);
            rig.write(2, &count.to_le_bytes());
            rig.gate(true);
            rig.pass(*ticks);
            assert_eq!((rig.output(), rig.count(2)), (*output, *shown), "mode {mode}, count {count}, {ticks} ticks");
        }
    }
}

#[test]
fn pit_output_before_the_count_is_low_in_mode_0_only() {
    for mode in 0..6 {
        let rig = Rig::new();
        rig.gate(true);
        rig.write(CONTROL, &[channel2(mode)]);
        rig.pass(100);
        assert_eq!(rig.output(), mode != 0, "mode {mode}");
        rig.write(2, &[1]);
        rig.pass(100);
        assert_eq!(rig.output(), mode != 0, "mode {mode}: half of the count is there");
    }
    let rig = Rig::new();
    rig.gate(true);
    rig.write(CONTROL, &[channel2(0)]);
    rig.write(2, &[5, 0]);
    rig.pass(9);
    assert!(rig.output());
    rig.write(2, &[5]);
    assert!(!rig.output(), "the first half of the next count ends the last one");
    rig.write(2, &[0]);
    rig.pass(4);
    assert!(!rig.output());
    rig.pass(1);
    assert!(rig.output());
}

#[test]
fn pit_gate_holds_starts_or_triggers() {
    // Modes 0 and 4 stand still while the gate is low.
    let rig = Rig::new();
    rig.write(CONTROL, &[channel2(0)]);
    rig.write(2, &[10, 0]);
    rig.pass(20);
    assert_eq!((rig.output(), rig.count(2)), (false, 10));
    rig.gate(true);
    rig.pass(4);
    rig.gate(false);
    rig.pass(50);
    assert_eq!((rig.output(), rig.count(2)), (false, 6));
    rig.gate(true);
    rig.pass(5);
    assert!(!rig.output());
    rig.pass(1);
    assert!(rig.output());

    // Modes 2 and 3 are high while it is low, and begin anew when it rises.
    for mode in [2, 3] {
        let rig = Rig::new();
        rig.gate(true);
        rig.write(CONTROL, &[channel2(mode)]);
        rig.write(2, &[10, 0]);
        rig.pass(9);
        assert!(!rig.output());
        rig.gate(false);
        assert!(rig.output(), "mode {mode}");
        rig.pass(5);
        rig.gate(true);
        rig.pass(9);
        assert!(!rig.output(), "mode {mode}");
    }

    // Modes 1 and 5 begin with each rise, whatever its level is then.
    for (mode, under_way) in [(1, false), (5, true)] {
        let rig = Rig::new();
        rig.write(CONTROL, &[channel2(mode)]);
        rig.write(2, &[10, 0]);
        rig.pass(30);
        assert!(rig.output(), "mode {mode}: not triggered");
        rig.gate(true);
        rig.gate(false);
        rig.pass(8);
        rig.gate(true);
        rig.pass(8);
        assert_eq!((rig.output(), rig.count(2)), (under_way, 2), "mode {mode}: triggered again");
    }
}

#[test]
fn pit_latches_hold_until_they_are_read() {
    let rig = Rig::new();
    rig.write(CONTROL, &[0x34]);
    rig.write(0, &[0x34, 0x12]);
    rig.pass(4);
    rig.write(CONTROL, &[0x00]);
    rig.pass(100);
    rig.write(CONTROL, &[0x00]);
    assert_eq!(rig.count(0), 0x1230, "the second latch changes nothing");
    assert_eq!(rig.count(0), 0x11cc, "and then it is the counter again");

    // Read back: status first, then the count, of both channels that were named.
    rig.gate(true);
    rig.write(CONTROL, &[channel2(0)]);
    rig.write(CONTROL, &[0xca]);
    rig.pass(1000);
    assert_eq!(rig.read(0), 0xb4, "output high, both halves, mode 2");
    assert_eq!(rig.count(0), 0x11cc);
    assert_eq!(rig.read(2), 0x70, "output low, no count yet, both halves, mode 0");
    rig.write(CONTROL, &[0xe8]);
    rig.write(2, &[2, 0]);
    assert_eq!(rig.read(2), 0x70, "the status as it was");
    rig.write(CONTROL, &[0xe8]);
    assert_eq!(rig.read(2), 0x30);
    rig.write(CONTROL, &[0xd4]);
    rig.pass(1);
    assert_ne!(rig.count(0), 0x11cc, "channel 0 was not named");
}

#[test]
fn pit_access_modes_read_and_write_the_halves_they_name() {
    let rig = Rig::new();
    rig.write(CONTROL, &[0x14]);
    rig.write(0, &[0x80]);
    assert_eq!((rig.read(0), rig.read(0)), (0x80, 0x80));
    rig.write(CONTROL, &[0x24]);
    rig.write(0, &[0x80]);
    assert_eq!((rig.read(0), rig.read(0)), (0x80, 0x80));
    rig.pass(0x7f00);
    assert_eq!(rig.read(0), 0x01);
    assert_eq!(rig.read(3), 0xff, "the control word cannot be read");
}

#[test]
fn pit_decimal_counts_are_decimal() {
    let rig = Rig::new();
    rig.gate(true);
    rig.write(CONTROL, &[0xb1]);
    rig.write(2, &[0x00, 0x10]);
    rig.pass(1);
    assert_eq!(rig.count(2), 0x0999);
    rig.pass(999);
    assert!(rig.output());
    rig.pass(1);
    assert_eq!(rig.count(2), 0x9999);
    rig.write(CONTROL, &[0xb5]);
    rig.write(2, &[0, 0]);
    rig.pass(9_998);
    assert_eq!((rig.output(), rig.count(2)), (true, 2));
    rig.pass(1);
    assert_eq!((rig.output(), rig.count(2)), (false, 1));
}

#[test]
fn pit_periods_of_channel_0_are_edges_of_its_line() {
    for mode in [2, 3] {
        let rig = Rig::new();
        assert_eq!(rig.pit.run(), None, "nothing is programmed");
        rig.write(CONTROL, &[0x30 | mode << 1]);
        rig.write(0, &1000u16.to_le_bytes());
        assert_eq!(rig.pit.run(), Some(Pit::moment(1000)));
        rig.pass(999);
        assert_eq!((rig.pit.run(), rig.rises()), (Some(Pit::moment(1000)), 0));
        rig.pass(1);
        assert_eq!((rig.pit.run(), rig.rises()), (Some(Pit::moment(2000)), 1));
        assert_eq!((rig.pit.run(), rig.rises()), (Some(Pit::moment(2000)), 1), "an edge is there once");
        rig.pass(2500);
        assert_eq!((rig.pit.run(), rig.rises()), (Some(Pit::moment(4000)), 2), "two that came late are one");
        assert!(!rig.line.is_high());
        rig.pit.reset();
        rig.pass(5000);
        assert_eq!((rig.pit.run(), rig.rises()), (None, 2));
    }
}

#[test]
fn pit_single_shots_of_channel_0_are_one_edge() {
    for (mode, at) in [(0, 1000), (4, 1001)] {
        let rig = Rig::new();
        rig.write(CONTROL, &[0x30 | mode << 1]);
        assert_eq!(rig.pit.run(), None, "no count yet");
        rig.write(0, &1000u16.to_le_bytes());
        assert_eq!((rig.pit.run(), rig.rises()), (Some(Pit::moment(at)), 0));
        rig.pass(at - 1);
        assert_eq!((rig.pit.run(), rig.rises()), (Some(Pit::moment(at)), 0));
        rig.pass(1);
        assert_eq!((rig.pit.run(), rig.rises()), (None, 1), "mode {mode}");
        rig.pass(200_000);
        assert_eq!((rig.pit.run(), rig.rises()), (None, 1), "mode {mode}: not at each wrap");
        rig.write(0, &1000u16.to_le_bytes());
        rig.pass(at);
        assert_eq!((rig.pit.run(), rig.rises()), (None, 2), "mode {mode}: a new count");
    }
    let rig = Rig::new();
    rig.write(CONTROL, &[0x32]);
    rig.write(0, &[1, 0]);
    rig.pass(100);
    assert_eq!((rig.pit.run(), rig.rises()), (None, 0), "nothing can trigger channel 0");
}

#[test]
fn pit_accepts_every_access_at_every_moment() {
    // No count, mode or moment makes it panic; what it says is due lies in the future.
    let rig = Rig::new();
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for _ in 0..100_000 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let [port, value, kind, time, ..] = random.to_le_bytes();
        match kind % 4 {
            0 => rig.write(u64::from(port % 4), &[if value & 0x80 != 0 { value % 4 } else { value }]),
            1 => drop(rig.read(u64::from(port % 4))),
            2 => rig.gate(value & 1 != 0),
            _ => rig.pass(u64::from(time) * u64::from(value)),
        }
        rig.system();
        let next = rig.pit.run();
        assert!(next.is_none_or(|next| next > rig.clock.now()));
    }
}

#[test]
fn pit_system_port_shows_gate_speaker_and_refresh() {
    let rig = Rig::new();
    rig.port.write(0, &[0xff]);
    assert_eq!(rig.system() & 0xcf, 0x03);
    rig.port.write(0, &[0]);
    assert_eq!(rig.system() & 0xcf, 0);
    let first = rig.system() & 0x10;
    rig.pass(REFRESH);
    assert_eq!(rig.system() & 0x10, first ^ 0x10);
}

#[test]
fn pit_shortest_periods_and_a_count_that_is_written_again() {
    let rig = Rig::new();
    rig.gate(true);
    for (count, levels) in [(1, [true; 4]), (2, [true, false, true, false])] {
        rig.write(CONTROL, &[channel2(2)]);
        rig.write(2, &[count, 0]);
        for level in levels {
            assert_eq!(rig.output(), level, "count {count}");
            rig.pass(1);
        }
    }
    // What was counted before the gate held it is not counted of the next one.
    rig.write(CONTROL, &[channel2(0)]);
    rig.write(2, &[10, 0]);
    rig.pass(4);
    rig.gate(false);
    rig.pass(3);
    assert_eq!(rig.count(2), 6);
    rig.write(2, &[10, 0]);
    assert_eq!(rig.count(2), 10);
    rig.gate(true);
    rig.pass(9);
    assert_eq!((rig.count(2), rig.output()), (1, false));
    rig.pass(1);
    assert!(rig.output());
}

#[test]
fn pit_read_back_latches_what_it_names() {
    let rig = Rig::new();
    rig.gate(true);
    for channel in 0..3u8 {
        rig.write(CONTROL, &[channel << 6 | 0x34]);
        rig.write(channel.into(), &[100 + channel, 0]);
    }
    rig.pass(1);
    // The count of channel 1 alone, then the status of channel 2 alone.
    rig.write(CONTROL, &[0xd4, 0xe8]);
    rig.pass(1);
    assert_eq!([0, 1, 2].map(|channel| rig.read(channel)), [98, 100, 0xb4]);
    assert_eq!([0, 1, 2].map(|channel| rig.read(channel)), [0, 0, 100]);
    // Both of all: status first, then the count as it was then.
    rig.read(2);
    rig.write(CONTROL, &[0xce]);
    rig.pass(10);
    for channel in 0..3 {
        assert_eq!(rig.read(channel), 0xb4);
        assert_eq!(rig.count(channel), 98 + channel as u16);
        assert_eq!(rig.count(channel), 88 + channel as u16, "the latch is open again");
    }
    // A status that is latched stays until it is read: there was no count, and mode 0 began low.
    rig.write(CONTROL, &[0xb0, 0xe8]);
    rig.write(2, &[5, 0]);
    rig.write(CONTROL, &[0xe8]);
    assert_eq!(rig.read(2), 0x70);
    rig.write(CONTROL, &[0xe8]);
    assert_eq!(rig.read(2), 0x30);
}

#[test]
fn pit_a_latch_begins_with_the_lower_half() {
    let rig = Rig::new();
    rig.gate(true);
    rig.write(CONTROL, &[0xb4]);
    rig.write(2, &[0x34, 0x12]);
    // One half was read; the latch is read from its beginning all the same.
    assert_eq!(rig.read(2), 0x34);
    rig.write(CONTROL, &[0x80]);
    assert_eq!(rig.count(2), 0x1234);
    // A channel of lower halves has its latch open after one.
    rig.write(CONTROL, &[0x94]);
    rig.write(2, &[50]);
    rig.write(CONTROL, &[0x80]);
    rig.pass(3);
    assert_eq!((rig.read(2), rig.read(2)), (50, 47));
}

#[test]
fn pit_counts_that_a_low_gate_holds_back() {
    let rig = Rig::new();
    // Modes 0 and 4 take the count and wait with it; modes 2 and 3 have none until the gate rises; 1 and 5 are started
    // by it.
    for (mode, no_count) in [(0, false), (4, false), (2, true), (3, true), (1, true), (5, true)] {
        rig.gate(false);
        rig.write(CONTROL, &[channel2(mode)]);
        rig.write(2, &[8, 0]);
        rig.pass(5);
        rig.write(CONTROL, &[0xe8]);
        assert_eq!(rig.read(2) & 0x40 != 0, no_count, "mode {mode}");
        rig.gate(true);
        rig.write(CONTROL, &[0xe8]);
        assert_eq!(rig.read(2) & 0x40, 0, "mode {mode}: the gate rose");
        assert_eq!(rig.count(2), 8, "mode {mode}");
        rig.pass(2);
        assert_eq!(rig.count(2), if mode == 3 { 4 } else { 6 }, "mode {mode}");
    }
}
