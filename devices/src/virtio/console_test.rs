use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::rig::{BUFFERS, Driver, Way, eventually};
use super::{Console, INPUT, Input};

#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console() -> (Driver, Screen, Arc<Input>, EventFd) {
    let taken = EventFd::new(EFD_NONBLOCK).unwrap();
    let (screen, input) = (Screen::default(), Input::new(taken.try_clone().unwrap()).unwrap());
    assert_eq!(input.enqueue(b"early"), None);
    let driver = Driver::ready(Console::new(screen.clone(), input.clone()), 0);
    (driver, screen, input, taken)
}

fn typed(input: &Input, bytes: &[u8]) -> usize {
    eventually("the driver", || input.enqueue(bytes))
}

#[test]
fn h6_what_the_guest_writes_comes_out_in_order() {
    let (mut driver, screen, ..) = console();
    let long: Vec<u8> = (0..10_000).map(|at| (at % 253) as u8).collect();
    driver.memory.write_slice(&long, GuestAddress(BUFFERS)).unwrap();
    let parts = [(BUFFERS, 3, Way::ToDevice), (BUFFERS + 3, 0, Way::ToDevice), (BUFFERS + 3, 9_997, Way::ToDevice)];
    driver.offer(1, 0, &parts);
    driver.offer(1, 4, &[(BUFFERS, 2, Way::ToDevice)]);
    assert_eq!([driver.take(1), driver.take(1)], [(0, 0), (4, 0)]);
    assert_eq!(*screen.0.lock().unwrap(), [&long[..], &long[..2]].concat());
}

#[test]
fn h6_what_is_typed_reaches_the_guest_as_it_has_room() {
    let (mut driver, _, input, taken) = console();
    assert_eq!(typed(&input, b"hello"), 5);
    driver.offer(0, 0, &[(BUFFERS, 2, Way::FromDevice), (BUFFERS + 0x100, 1, Way::FromDevice)]);
    assert_eq!(driver.take(0), (0, 3));
    assert_eq!((driver.bytes(BUFFERS, 3), driver.bytes(BUFFERS + 0x100, 2)), (b"he\0".to_vec(), b"l\0".to_vec()));
    driver.offer(0, 2, &[(BUFFERS, 100, Way::FromDevice)]);
    assert_eq!((driver.take(0), driver.bytes(BUFFERS, 2)), ((2, 2), b"lo".to_vec()));
    // No more waits than there is room for; who waits with it is told.
    assert_eq!(input.enqueue(&[7; INPUT + 1]), Some(INPUT));
    assert_eq!(input.enqueue(&[7]), Some(0));
    let _ = taken.read();
    driver.offer(0, 3, &[(BUFFERS, 10, Way::FromDevice)]);
    driver.take(0);
    eventually("room", || taken.read().ok());
    assert_eq!(input.enqueue(&[7; 11]), Some(10));
    assert_eq!(driver.messages().last(), Some(&1));
}

#[test]
fn h6_a_reset_takes_the_input_back() {
    let (mut driver, _, input, taken) = console();
    typed(&input, b"old");
    let _ = taken.read();
    driver.write(0x14, 1, 0);
    eventually("the driver's leave", || input.enqueue(b"").is_none().then_some(()));
    assert!(taken.read().is_ok());
    driver.start(0);
    typed(&input, b"new");
    driver.offer(0, 0, &[(BUFFERS, 10, Way::FromDevice)]);
    assert_eq!((driver.take(0), driver.bytes(BUFFERS, 3)), ((0, 3), b"new".to_vec()));
}

#[test]
fn h2_a_console_without_memory_needs_a_reset() {
    let (mut driver, screen, input, _) = console();
    driver.offer(1, 0, &[(u64::MAX, 4, Way::ToDevice)]);
    driver.needs_reset();
    driver.start(0);
    typed(&input, b"a");
    driver.offer(0, 0, &[(1 << 40, 4, Way::FromDevice)]);
    driver.needs_reset();
    assert_eq!(*screen.0.lock().unwrap(), b"");
}
