//! States of devices that were saved and put back into others of their kind: what these do then is what the
//! first ones would have done.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::{Msi, Requester, SourceId};

use crate::dma::DirectMemory;
use crate::edu::Edu;
use crate::ioapic::IoApic;
use crate::pci::{Decoder, PciFunction};
use crate::pit::Pit;
use crate::pm::PmBlock;
use crate::rtc::Rtc;
use crate::saved::{Saves, Unfit};
use crate::serial::SerialPort;
use crate::testing::{FakeClock, FakeInterrupts, FakeLine, FakePower, FakeRoutes};
use crate::timers::{Alarm, HostClock, Timed, Timers};
use crate::virtio::rig::{BUFFERS, Driver, Way, eventually};
use crate::virtio::rng::Rng;
use crate::{Bus, BusDevice};

const REQUESTER: Requester = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };

fn read(device: &dyn BusDevice, offset: u64) -> u8 {
    let mut data = [0];
    device.read(offset, &mut data);
    data[0]
}

fn pit() -> (Arc<Pit>, Arc<FakeClock>, Arc<FakeLine>) {
    let (clock, line) = (Arc::new(FakeClock::default()), Arc::new(FakeLine::default()));
    (Pit::new(clock.clone(), Arc::new(Alarm::default()), line.clone()), clock, line)
}

/// A port, a value, or a read; and time that passes after it.
type Step = (u64, Option<u8>, u32);

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec((0..4u64, prop::option::of(any::<u8>()), 0..3_000_000u32), 0..30)
}

fn run(pit: &Pit, clock: &FakeClock, now: &mut Duration, steps: &[Step]) -> Vec<u8> {
    let mut seen = Vec::new();
    for (port, value, pause) in steps {
        match value {
            Some(value) => pit.write(*port, &[*value]),
            None => seen.push(read(pit, *port)),
        }
        *now += Duration::from_nanos((*pause).into());
        clock.set(*now);
        pit.run();
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whenever it is saved, it counts on in another process, whose clock begins at 0.
    #[test]
    fn a14_a_timer_counts_on_where_it_was(before in steps(), after in steps()) {
        let ((one, clock, line), (other, other_clock, other_line)) = (pit(), pit());
        // A whole number of ticks: what is left of one is lost.
        let mut now = Duration::from_secs(3);
        clock.set(now);
        run(&one, &clock, &mut now, &before);
        now = Duration::from_secs(now.as_secs() + 1);
        clock.set(now);
        one.run();
        other.restore(&one.save()).unwrap();
        prop_assert_eq!(*other_line.rises.lock().unwrap(), 0, "no edge comes of it");
        let rises = *line.rises.lock().unwrap();
        let mut other_now = Duration::ZERO;
        let seconds = |pause: &u32| pause / 1_000_000 * 1_000_000_000;
        let whole: Vec<Step> = after.iter().map(|(port, value, pause)| (*port, *value, seconds(pause))).collect();
        prop_assert_eq!(run(&other, &other_clock, &mut other_now, &whole), run(&one, &clock, &mut now, &whole));
        prop_assert_eq!(*other_line.rises.lock().unwrap(), *line.rises.lock().unwrap() - rises);
    }

    /// Whatever is in a file, nothing panics, and what is taken is what is saved again.
    #[test]
    fn a14_a_timer_takes_what_it_can_be_in(
        path in "(mode|count|written|counted|since|low|edges)",
        value in any::<u64>(),
        now in any::<u32>(),
    ) {
        let (one, clock, _) = pit();
        let mut state = one.save();
        state["state"]["channels"][0][&path] = value.into();
        if one.restore(&state).is_ok() {
            clock.set(Duration::from_secs(now.into()));
            one.run();
            for port in 0..4 {
                read(&*one, port);
            }
            prop_assert!(one.restore(&one.save()).is_ok());
        }
    }
}

#[test]
fn a14_timers_that_are_held_call_nobody() {
    struct Counts(Mutex<u64>);
    impl Timed for Counts {
        fn run(&self) -> Option<Duration> {
            *self.0.lock().unwrap() += 1;
            Some(Duration::ZERO)
        }
    }
    let counts = Arc::new(Counts(Mutex::new(0)));
    let timers = Timers::start(Arc::new(HostClock::new()), Arc::default(), vec![counts.clone()]).unwrap();
    let count = || *counts.0.lock().unwrap();
    eventually("a call", || (count() > 0).then_some(()));
    timers.hold();
    let held = count();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(count(), held);
    timers.go_on();
    eventually("another call", || (count() > held).then_some(()));
}

#[test]
fn a14_a_clock_keeps_its_time_and_what_waits_to_be_read() {
    let rtc = || {
        let (clock, line) = (Arc::new(FakeClock::default()), Arc::new(FakeLine::default()));
        clock.set_epoch(Duration::from_secs(1_000_000_000));
        (Rtc::new(clock.clone(), Arc::new(Alarm::default()), line.clone()), clock, line)
    };
    let ((one, clock, line), (other, _, other_line)) = (rtc(), rtc());
    let set = |index: u8, value: u8| {
        one.write(0, &[index]);
        one.write(1, &[value]);
    };
    // An hour later than the host; an update interrupt that waits; a byte with a battery.
    set(4, 2);
    set(0x40, 0x5a);
    set(11, 0x12);
    clock.set(Duration::from_secs(2));
    one.run();
    assert!(line.is_high());
    let saved = one.save();
    other.restore(&saved).unwrap();
    assert!(other_line.is_high());
    for index in [4, 0x40, 11, 12] {
        one.write(0, &[index]);
        other.write(0, &[index]);
        assert_eq!(read(&*other, 1), read(&*one, 1), "register {index:#x}");
    }
    assert!(!other_line.is_high(), "it was read");
    let mut broken = saved;
    broken["state"]["index"] = 0x80.into();
    assert_eq!(other.restore(&broken), Err(Unfit::Value("index")));
}

#[test]
fn a14_the_power_block_and_the_serial_port_are_as_they_were() {
    let block = |line: &Arc<FakeLine>| PmBlock::new(Arc::new(FakePower::default()), Some(line.clone()));
    let lines = [Arc::new(FakeLine::default()), Arc::new(FakeLine::default())];
    let (one, other) = (block(&lines[0]), block(&lines[1]));
    one.write(PmBlock::EVENT + 2, &0x100u16.to_le_bytes());
    one.press_power_button();
    other.restore(&one.save()).unwrap();
    assert!(lines[1].is_high());
    let ticks = |block: &PmBlock| {
        let mut data = [0; 4];
        block.read(PmBlock::TIMER, &mut data);
        u32::from_le_bytes(data)
    };
    assert!(ticks(&other).wrapping_sub(ticks(&one)).wrapping_add(3_579_545) < 2 * 3_579_545, "within a second");

    let line = Arc::new(FakeLine::default());
    let port = |line: &Arc<FakeLine>| SerialPort::new(line.clone(), Box::new(std::io::sink()), None);
    let (one, other) = (port(&Arc::default()), port(&line));
    one.write(3, &[0x1b]);
    one.write(1, &[1]);
    assert_eq!(one.enqueue(b"xy"), 2);
    let saved = one.save();
    other.restore(&saved).unwrap();
    assert_eq!(*line.rises.lock().unwrap(), 0, "its edge was sent before");
    for offset in [3, 1, 2, 5, 0, 5, 0, 5] {
        assert_eq!(read(&other, offset), read(&one, offset), "register {offset}");
    }
    assert_eq!(other.enqueue(b"z"), 1);
    assert_eq!(*line.rises.lock().unwrap(), 1);
    let mut broken = saved;
    broken["state"]["input"] = "00".repeat(65).into();
    assert_eq!(other.restore(&broken), Err(Unfit::Value("input")));
}

#[test]
fn a14_a_level_in_service_stays_in_service_and_its_end_comes_out() {
    let make = || {
        let (interrupts, routes) = (Arc::new(FakeInterrupts::default()), Arc::new(FakeRoutes::default()));
        (IoApic::new(REQUESTER, interrupts.clone(), Some(routes.clone())), interrupts, routes)
    };
    let ((one, sent, _), (other, other_sent, routes)) = (make(), make());
    let program = |ioapic: &IoApic, pin: u8, low: u32| {
        ioapic.write(0, &[0x10 + 2 * pin]);
        ioapic.write(0x10, &low.to_le_bytes());
    };
    const LEVEL: u32 = 1 << 15;
    const MASKED: u32 = 1 << 16;
    program(&one, 5, 0x55 | LEVEL);
    program(&one, 6, 0x66 | LEVEL);
    program(&one, 7, 0x77);
    let lines: Vec<_> = [5, 6, 7].iter().map(|pin| one.line(*pin)).collect();
    lines.iter().for_each(|line| line.set_level(true));
    assert_eq!(sent.take().len(), 3);
    // A guest masks what it serves.
    program(&one, 6, 0x66 | LEVEL | MASKED);
    let saved = one.save();
    // The devices say their levels before.
    let others: Vec<_> = [5, 6, 7].iter().map(|pin| other.line(*pin)).collect();
    others.iter().for_each(|line| line.set_level(true));
    other.restore(&saved).unwrap();
    other.go_on();
    assert_eq!(other_sent.take(), [], "all of them were sent before");
    assert_eq!(other.save(), saved);
    let said = |pin: u8| routes.0.lock().unwrap().get(&pin).copied();
    assert!(matches!(said(5), Some(Some((Msi { data: 0xc055, .. }, true)))), "{:?}", said(5));
    assert_eq!(said(6), Some(None), "it had a route, which KVM keeps, and is masked");
    other.eoi(0x55);
    assert_eq!(other_sent.take().len(), 1, "the line is high still");
    other.eoi(0x66);
    assert_eq!(other_sent.take(), [], "it is masked");
    program(&other, 6, 0x66 | LEVEL);
    assert_eq!(other_sent.take().len(), 1);
    let mut broken = saved;
    broken["state"]["entries"][7] = (1u64 << 14).into();
    assert_eq!(other.restore(&broken), Err(Unfit::Value("redirection table")));
}

#[test]
fn a14_what_edu_was_told_and_had_not_begun_it_does_where_it_is_put_back() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let make = || {
        let interrupts = Arc::new(FakeInterrupts::default());
        let decoder = Arc::new(Decoder::new(Arc::new(Bus::default())));
        let dma = Box::new(DirectMemory(memory.clone()));
        (Edu::new(REQUESTER, decoder, interrupts.clone(), None, dma).unwrap(), interrupts)
    };
    let ((one, _), (other, sent)) = (make(), make());
    let write = |edu: &Edu, offset: u64, value: u64| edu.bar().write(offset, &value.to_le_bytes());
    let register = |edu: &Edu, offset: u64| {
        let mut data = [0; 8];
        edu.bar().read(offset, &mut data);
        u64::from_le_bytes(data)
    };
    one.config_write(4, &[6, 0]);
    let msi = one.msi_capability();
    one.config_write(msi + 4, &0xfee0_0000u32.to_le_bytes());
    one.config_write(msi + 12, &[0x31, 0]);
    one.config_write(msi + 2, &[1, 0]);
    memory.write_slice(b"buffer", GuestAddress(0x1000)).unwrap();
    let begin = |edu: &Edu, from: u64, to: u64, command: u64| {
        [(0x80, from), (0x88, to), (0x90, 6), (0x98, command)]
            .into_iter()
            .for_each(|(at, value)| write(edu, at, value));
    };
    begin(&one, 0x1000, crate::edu::BUFFER, 1);
    eventually("the end of a transfer", || (register(&one, 0x98) & 1 == 0).then_some(()));
    one.hold().unwrap();
    // Whatever is written while it is held waits.
    begin(&one, crate::edu::BUFFER, 0x2000, 1 | 2 | 4);
    let saved = one.save();
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 0, "it is held");
    other.hold().unwrap();
    other.restore(&saved).unwrap();
    assert_eq!(other.save(), saved);
    other.go_on();
    eventually("the message", || (!sent.take().is_empty()).then_some(()));
    let mut bytes = [0; 6];
    memory.read_slice(&mut bytes, GuestAddress(0x2000)).unwrap();
    assert_eq!((&bytes, register(&other, 0x98) & 1), (b"buffer", 0));
    let broken = |pointer: &str, value: Value| {
        let mut state = saved.clone();
        *state.pointer_mut(pointer).unwrap() = value;
        let before = other.save();
        let refused = other.restore(&state).unwrap_err();
        assert_eq!(other.save(), before, "{pointer}: nothing changed");
        refused
    };
    assert_eq!(broken("/version", 2.into()), Unfit::Version { found: 2, known: 1 });
    assert_eq!(broken("/state/registers/command", 8.into()), Unfit::Value("command"));
    assert_eq!(broken("/state/registers/status", 2.into()), Unfit::Value("status"));
    assert_eq!(broken("/state/registers/pasid", 1.into()), Unfit::Value("PASID register"));
    assert_eq!(broken("/state/buffer", "00".into()), Unfit::Value("buffer"));
    let config = saved["state"]["config"].as_str().unwrap();
    assert_eq!(broken("/state/config", config.replacen("3412", "3413", 1).into()), Unfit::Value("configuration space"));
}

#[test]
fn a14_a_virtio_device_goes_on_with_the_buffer_that_it_did_not_take() {
    // Without VIRTIO_F_EVENT_IDX: each buffer that is used interrupts.
    let mut one = Driver::ready(Rng::new(std::io::repeat(7)), 1 << 29);
    one.offer(0, 0, &[(BUFFERS, 16, Way::FromDevice)]);
    one.take(0);
    one.messages();
    let function = one.function.clone();
    let saves = function.saves().unwrap();
    saves.hold().unwrap();
    one.offer(0, 1, &[(BUFFERS + 0x100, 16, Way::FromDevice)]);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(one.try_take(0), None, "it is held");
    let saved = saves.save();

    let mut other = Driver::find(Rng::new(std::io::repeat(9)));
    other.share(&one);
    let function = other.function.clone();
    let target = function.saves().unwrap();
    target.hold().unwrap();
    target.restore(&saved).unwrap();
    assert_eq!(target.save(), saved);
    assert_eq!(other.status(), one.status());
    target.go_on();
    assert_eq!(other.take(0), (1, 16));
    assert_eq!(other.messages(), [1], "the vector of its queue");
    assert_eq!(other.bytes(BUFFERS + 0x100, 16), [9; 16]);
    for (pointer, value, what) in [
        ("/state/registers/status", 0x1f, "status"),
        ("/state/registers/queues/0/place/size", 3, "queues"),
        ("/state/registers/queues/0/place/used", 1, "rings"),
        ("/state/device/isr", 4, "interrupt status"),
        ("/state/vectors/for_config", 9, "vectors"),
        ("/state/registers/driver", 1, "features"),
    ] {
        let mut broken = saved.clone();
        *broken.pointer_mut(pointer).unwrap() = value.into();
        target.hold().unwrap();
        let before = target.save();
        assert_eq!(target.restore(&broken), Err(Unfit::Value(what)), "{pointer}");
        assert_eq!(target.save(), before, "{pointer}: nothing changed");
        target.go_on();
    }
}
