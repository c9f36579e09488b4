use std::sync::{Arc, Mutex};

use crate::bus::{Bus, BusDevice, Overlap};

/// Answers with a byte, and remembers where it was asked.
struct Answer(u8, Mutex<Vec<u64>>);

impl BusDevice for Answer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.1.lock().unwrap().push(offset);
        data.fill(self.0);
    }
    fn write(&self, offset: u64, _: &[u8]) {
        self.1.lock().unwrap().push(offset);
    }
}

fn answer(byte: u8) -> Arc<Answer> {
    Arc::new(Answer(byte, Mutex::default()))
}

#[test]
fn bus_ranges_never_overlap() {
    let bus = Bus::default();
    bus.insert(0x100, 0x1ff, answer(1)).unwrap();
    let taken = [(0x100, 0x1ff), (0x1ff, 0x1ff), (0x0, 0x100), (0x180, 0x300), (0x0, 0xfff), (0x140, 0x150)];
    for (first, last) in taken.into_iter().chain([(0x300, 0x2ff)]) {
        assert_eq!(bus.insert(first, last, answer(2)), Err(Overlap { first, last }));
    }
    for (first, last) in [(0xff, 0xff), (0x200, 0x200), (0x300, u64::MAX)] {
        bus.insert(first, last, answer(3)).unwrap();
    }
    assert!(bus.remove(0x101).is_none() && bus.remove(0x100).is_some());
    bus.insert(0x180, 0x1ff, answer(4)).unwrap();
}

#[test]
fn bus_accesses_reach_who_has_all_of_them_and_nobody_else() {
    let bus = Bus::default();
    let (low, high) = (answer(0x11), answer(0x22));
    bus.insert(0x100, 0x107, low.clone()).unwrap();
    bus.insert(0x108, 0x10b, high.clone()).unwrap();
    let read = |address, len| {
        let mut data = vec![0; len];
        (bus.read(address, &mut data), data)
    };
    assert_eq!(read(0x104, 4), (true, vec![0x11; 4]));
    assert_eq!(read(0x108, 4), (true, vec![0x22; 4]));
    // Below, across, behind, and where addresses end.
    for (address, len) in [(0xff, 1), (0x106, 4), (0x10b, 2), (0x10c, 1), (u64::MAX, 2)] {
        assert_eq!(read(address, len), (false, vec![0xff; len]), "{address:#x}");
        assert!(!bus.write(address, &vec![0; len]));
    }
    assert!(bus.write(0x10a, &[1, 2]));
    assert_eq!((&*low.1.lock().unwrap(), &*high.1.lock().unwrap()), (&vec![4], &vec![0, 2]));
}
