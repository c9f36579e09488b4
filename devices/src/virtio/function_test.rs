use std::io::{self, Read};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::rig::{BAR, BUFFERS, Driver, MEMORY, SIZE, Way, available, descriptors, eventually, used};
use super::super::ring::Broken;
use super::super::rng::Rng;
use super::super::{ACCESS_PLATFORM, Device, Kind, Untranslated, VERSION_1, Work};
use crate::pci::{Path, PciFunction};

/// Gives 1, 2, 3, ...
#[derive(Default)]
struct Counting(u8);

impl Read for Counting {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        for byte in data.iter_mut() {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        Ok(data.len())
    }
}

fn rng() -> Rng<Counting> {
    Rng::new(Counting::default())
}

#[test]
fn h1_buffers_are_filled_and_the_driver_hears_of_it() {
    for without in [0, 1 << 29, 1 << 28 | 1 << 29] {
        let mut driver = Driver::ready(rng(), without);
        // More buffers than entries, one after the other: the rings wrap.
        for round in 0..20u32 {
            driver.offer(0, 2, &[(BUFFERS, 3, Way::FromDevice), (BUFFERS + 0x100, 2, Way::FromDevice)]);
            assert_eq!(driver.take(0), (2, 5));
            let first = (round * 5) as u8;
            assert_eq!(driver.bytes(BUFFERS, 4), [first + 1, first + 2, first + 3, 0]);
            assert_eq!(driver.bytes(BUFFERS + 0x100, 3), [first + 4, first + 5, 0]);
            assert_eq!(driver.messages(), [1]);
            // What a driver does that wants the next message, too.
            driver.memory.write_obj(round as u16 + 1, GuestAddress(available(0) + 4 + 2 * u64::from(SIZE))).unwrap();
        }
        assert_eq!(driver.status(), 0xf);
    }
}

#[test]
fn h1_a_driver_without_the_platforms_addresses_gets_nothing() {
    for without in [ACCESS_PLATFORM, VERSION_1] {
        let mut driver = Driver::find(rng());
        driver.start(without);
        assert_eq!(driver.status(), 3, "neither FEATURES_OK nor DRIVER_OK");
        driver.offer(0, 0, &[(BUFFERS, 16, Way::FromDevice)]);
        driver.start(0);
        driver.offer(0, 0, &[(BUFFERS, 16, Way::FromDevice)]);
        driver.take(0);
        assert_eq!(driver.bytes(BUFFERS, 2), [1, 2], "the first one was never looked at");
    }
}

#[test]
fn h2_a_broken_ring_needs_a_reset_and_the_device_lives_on() {
    let broken: [&dyn Fn(&mut Driver); 5] = [
        // A buffer out of memory; one that ends nowhere; more of them than entries; a ring that is not there.
        &|driver| driver.offer(0, 0, &[(MEMORY as u64 - 1, 16, Way::FromDevice)]),
        &|driver| {
            driver.offer(0, 0, &[(BUFFERS, 1, Way::FromDevice)]);
            driver.take(0);
            driver.offer(0, 7, &[(BUFFERS, 1, Way::FromDevice), (BUFFERS, 1, Way::FromDevice)]);
        },
        &|driver| {
            driver.memory.write_obj(SIZE + 1, GuestAddress(available(0) + 2)).unwrap();
            driver.kick(0);
        },
        &|driver| {
            driver.write(0x14, 1, 0);
            driver.write(0x08, 4, 1);
            driver.write(0x0c, 4, 3);
            driver.write(0x14, 1, 0xb);
            driver.write(0x20, 8, descriptors(0));
            driver.write(0x28, 8, MEMORY as u64);
            driver.write(0x30, 8, used(0));
            driver.write(0x1c, 2, 1);
            driver.write(0x10, 2, 0);
            driver.write(0x14, 1, 0xf);
        },
        &|driver| {
            driver.write(0x14, 1, 0);
            driver.write(0x08, 4, 1);
            driver.write(0x0c, 4, 3);
            driver.write(0x14, 1, 0xb);
            driver.write(0x28, 8, 0x1001);
            driver.write(0x1c, 2, 1);
            driver.write(0x10, 2, 0);
            driver.write(0x14, 1, 0xf);
        },
    ];
    let mut driver = Driver::find(rng());
    for break_it in broken {
        driver.start(0);
        driver.interrupts.take();
        break_it(&mut driver);
        driver.needs_reset();
        eventually("the message of the configuration", || {
            driver.interrupts.take().iter().any(|m| m.data == 0).then_some(())
        });
        // Nothing is done until the reset.
        let before = driver.bytes(0, MEMORY);
        driver.kick(0);
        driver.function.config_write(4, &[2, 0]);
        driver.function.config_write(4, &[6, 0]);
        assert_eq!(driver.bytes(0, MEMORY), before);
        assert_ne!(driver.status() & 0x40, 0);
        driver.start(0);
        driver.offer(0, 0, &[(BUFFERS, 4, Way::FromDevice)]);
        assert_eq!(driver.take(0), (0, 4));
        assert_eq!(driver.status(), 0xf);
    }
}

/// A gate that a device waits at in the middle of its work, as in a system call.
#[derive(Default)]
struct Gate {
    state: Mutex<(bool, u32)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| !state.0).unwrap());
    }
    fn open(&self, open: bool) {
        self.state.lock().unwrap().0 = open;
        self.changed.notify_all();
    }
    fn passed(&self) -> u32 {
        self.state.lock().unwrap().1
    }
    fn wait_for(&self, passed: u32) {
        drop(self.changed.wait_while(self.state.lock().unwrap(), |state| state.1 < passed).unwrap());
    }
}

/// Reads and writes rings, with the gate in between.
struct Gated(Arc<Gate>);

impl Device<Untranslated<GuestMemoryMmap>> for Gated {
    fn kind(&self) -> Kind {
        Kind { device: 42, class: 0xff_0000, features: 1, queues: &[64, 64], config: vec![1, 2, 3] }
    }
    fn work(&mut self, work: &mut Work<'_, Untranslated<GuestMemoryMmap>>) -> Result<(), Broken> {
        while work.goes_on() {
            let Some(chain) = work.next(1)? else { break };
            self.0.pass();
            work.with(1, |ring, memory| ring.push(memory, chain.head, 0))?;
            work.interrupt(1)?;
        }
        Ok(())
    }
}

#[test]
fn h3_a_stop_waits_for_what_is_under_way_and_nothing_comes_after_it() {
    let gate = Arc::new(Gate::default());
    gate.open(true);
    let mut driver = Driver::ready(Gated(gate.clone()), 0);
    let stops: [&(dyn Fn(&Driver) + Sync); 4] = [
        &|driver| driver.write(0x14, 1, 0),
        &|driver| driver.function.reset(),
        &|driver| driver.function.config_write(4, &[2, 0]),
        &|driver| driver.function.quarantine().unwrap(),
    ];
    for stop in stops {
        // A function that may do DMA again goes on with the rings it had, until they are reset.
        driver.start(0);
        gate.open(false);
        let passed = gate.passed() + 1;
        (0..3).for_each(|first| driver.offer(1, first, &[(BUFFERS, 4, Way::ToDevice)]));
        gate.wait_for(passed);
        let before = driver.bytes(0, MEMORY);
        thread::scope(|scope| {
            let stopping = scope.spawn(|| stop(&driver));
            while !driver.function.shared.link.is_stopping() {
                thread::yield_now();
            }
            assert!(!stopping.is_finished(), "something is under way");
            assert_eq!(driver.bytes(0, MEMORY), before);
            gate.open(true);
        });
        // One was under way; the others are not begun.
        let after = driver.bytes(0, MEMORY);
        driver.kick(1);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(driver.bytes(0, MEMORY), after);
        let used: u16 = driver.memory.read_obj(GuestAddress(used(1) + 2)).unwrap();
        assert_eq!(used, 1);
    }
    assert_eq!(driver.stopped.load(Ordering::SeqCst), 0);
    // It was stopped for good: it takes no reset and no start any more.
    driver.start(0);
    driver.offer(1, 0, &[(BUFFERS, 4, Way::ToDevice)]);
    thread::sleep(Duration::from_millis(20));
    assert_eq!(driver.try_take(1), None);
}

#[test]
fn h3_work_goes_on_when_the_function_may_do_dma_again() {
    let gate = Arc::new(Gate::default());
    gate.open(true);
    // By its own Bus Master, or by that of a bridge above it.
    let own = |driver: &Driver, on: bool| driver.function.config_write(4, &[if on { 6 } else { 2 }, 0]);
    let above = |driver: &Driver, on| driver.function.path_changed(&Path { masters: on, ..Path::of_root() });
    for by_bridge in [false, true] {
        let way = |driver: &Driver, on| if by_bridge { above(driver, on) } else { own(driver, on) };
        let mut driver = Driver::ready(Gated(gate.clone()), 0);
        way(&driver, false);
        driver.offer(1, 0, &[(BUFFERS, 4, Way::ToDevice)]);
        assert_eq!(driver.try_take(1), None);
        way(&driver, true);
        assert_eq!(driver.take(1), (0, 0));
        assert_eq!(driver.messages(), [2]);
    }
    // Neither makes up for the other.
    let mut driver = Driver::ready(Gated(gate), 0);
    above(&driver, false);
    own(&driver, false);
    own(&driver, true);
    driver.offer(1, 0, &[(BUFFERS, 4, Way::ToDevice)]);
    assert_eq!(driver.try_take(1), None);
}

#[test]
fn h3_what_does_not_end_in_time_is_said() {
    let gate = Arc::new(Gate::default());
    let mut driver = Driver::ready(Gated(gate.clone()), 0);
    driver.offer(1, 0, &[(BUFFERS, 4, Way::ToDevice)]);
    gate.wait_for(1);
    assert!(driver.function.quarantine().is_err());
    driver.write(0x14, 1, 0);
    assert_eq!(driver.stopped.load(Ordering::SeqCst), 1);
    gate.open(true);
}

#[test]
fn h1_the_structures_are_where_the_capabilities_say() {
    let driver = Driver::find(Gated(Arc::default()));
    let id = [0, 2, 0x2c].map(|at| u16::from(driver.config(at)) | u16::from(driver.config(at + 1)) << 8);
    assert_eq!(id, [0x1af4, 0x1040 + 42, 0x1af4]);
    let mut found = Vec::new();
    let mut at = u16::from(driver.config(0x34));
    while at != 0 {
        if driver.config(at) == 9 {
            let word =
                |from: u16| (0..4).rev().fold(0, |value, byte| value << 8 | u32::from(driver.config(from + byte)));
            found.push((driver.config(at + 3), driver.config(at + 4), word(at + 8), word(at + 12)));
        }
        at = driver.config(at + 1).into();
    }
    assert_eq!(found, [(1, 0, 0, 0x38), (2, 0, 0x3000, 8), (3, 0, 0x1000, 1), (4, 0, 0x2000, 3), (5, 0, 0, 0)]);
    assert_eq!((driver.read(0x2000, 4), driver.read(0x2002, 8)), (0x03_0201, 3));
    assert_eq!(driver.offered(), 1 | 3 << 28 | 3 << 32);
}

#[test]
fn h1_kicks_are_bells_at_the_place_that_the_capability_says() {
    let gate = Arc::new(Gate::default());
    gate.open(true);
    let mut driver = Driver::ready(Gated(gate), 0);
    assert_eq!(driver.doorbells.hung(), [BAR + 0x3000, BAR + 0x3004]);
    driver.offer(1, 0, &[(BUFFERS, 4, Way::ToDevice)]);
    assert_eq!(driver.take(1), (0, 0), "a bell wakes the device");
    // They go with the BAR, and where none hangs a write does the same.
    driver.function.config_write(4, &[4, 0]);
    assert_eq!(driver.doorbells.hung().len(), 0);
    driver.offer(1, 1, &[(BUFFERS, 4, Way::ToDevice)]);
    assert_eq!(driver.take(1), (1, 0));
}

#[test]
fn h1_configuration_space_reaches_the_structures_by_itself() {
    let driver = Driver::find(Gated(Arc::default()));
    let window = (0..).scan(u16::from(driver.config(0x34)), |at, _| {
        let now = *at;
        *at = driver.config(now + 1).into();
        Some(now)
    });
    let window = window.take(16).find(|at| driver.config(*at) == 9 && driver.config(at + 3) == 5).unwrap();
    let select = |offset: u32, len: u32| {
        driver.function.config_write(window + 8, &offset.to_le_bytes());
        driver.function.config_write(window + 12, &len.to_le_bytes());
    };
    select(0x12, 2);
    let mut data = [0; 2];
    driver.function.config_read(window + 16, &mut data);
    assert_eq!(data, [2, 0]);
    select(0x14, 1);
    driver.function.config_write(window + 16, &[3]);
    assert_eq!(driver.status(), 3);
    // Outside, unaligned, or of another length: nothing.
    for (offset, len) in [(0x8000, 4), (0x13, 2), (0x10, 3), (u32::MAX, 4), (0x14, 0)] {
        select(offset, len);
        let mut data = [0; 4];
        driver.function.config_read(window + 16, &mut data);
        driver.function.config_write(window + 16, &[0; 4]);
        assert_eq!((data, driver.status()), ([0; 4], 3), "{offset:#x} {len}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever is in the rings, and changes there while the device works: it ends, writes nothing but the used ring
    /// and buffers that it was given, and serves the next driver.
    #[test]
    fn h2_a_hostile_driver_gets_nothing_but_its_own_device(
        rings in prop::collection::vec((0u64..0x400, any::<u64>()), 0..64),
        later in prop::collection::vec((0u64..0x400, any::<u64>()), 0..16),
        available in 0u16..=SIZE + 1,
    ) {
        let mut driver = Driver::ready(rng(), 0);
        let guard = driver.bytes(0, 0x1_0000);
        // Descriptors, and both rings; addresses stay above what is guarded.
        let put = |driver: &Driver, all: &[(u64, u64)]| {
            for (at, value) in all {
                let place = descriptors(0) + at * 8 % 0x2100;
                let value = if at % 2 == 0 { (value % MEMORY as u64) | 0x1_0000 } else { value & !(4 << 32) };
                driver.memory.write_obj(value, GuestAddress(place)).unwrap();
            }
        };
        // Those that only have a length from the above, too.
        for index in 0..u64::from(SIZE) {
            driver.memory.write_obj(0x1_0000u64, GuestAddress(descriptors(0) + index * 16)).unwrap();
        }
        put(&driver, &rings);
        driver.memory.write_obj(available, GuestAddress(super::super::rig::available(0) + 2)).unwrap();
        driver.kick(0);
        put(&driver, &later);
        driver.kick(0);
        driver.write(0x14, 1, 0);
        prop_assert_eq!(driver.status(), 0);
        prop_assert_eq!(driver.bytes(0, 0x1_0000), guard);
        prop_assert_eq!(driver.stopped.load(Ordering::SeqCst), 0);
        driver.start(0);
        driver.offer(0, 0, &[(BUFFERS, 4, Way::FromDevice)]);
        prop_assert_eq!(driver.take(0), (0, 4));
    }
}
