//! Address buses: which device answers at which address. One for port I/O, one for MMIO.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// A device that answers at a range of addresses. Called from any vCPU thread.
pub trait BusDevice: Send + Sync {
    /// Read `data.len()` bytes (1, 2, 4 or 8) at `offset` into the device's range. Every byte of `data` is written.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Write `data` (1, 2, 4 or 8 bytes) at `offset` into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The range was taken already.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{first:#x}-{last:#x} overlaps what is on the bus already")]
pub struct Overlap {
    /// First address.
    pub first: u64,
    /// Last address, inclusive.
    pub last: u64,
}

/// A map from disjoint address ranges to devices.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<Ranges>,
}

/// First address -> (last address, device).
type Ranges = BTreeMap<u64, (u64, Arc<dyn BusDevice>)>;

impl Bus {
    /// Puts `device` at `first` to `last`, both inclusive.
    pub fn insert(&self, first: u64, last: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
        let mut ranges = self.ranges.write().unwrap();
        let below = ranges.range(..=last).next_back();
        if last < first || below.is_some_and(|(_, (below_last, _))| *below_last >= first) {
            return Err(Overlap { first, last });
        }
        ranges.insert(first, (last, device));
        Ok(())
    }

    /// Takes away the device whose range begins at `first`.
    pub fn remove(&self, first: u64) -> Option<Arc<dyn BusDevice>> {
        self.ranges.write().unwrap().remove(&first).map(|(_, device)| device)
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap();
        let (first, (last, device)) = ranges.range(..=address).next_back()?;
        let end = address.checked_add(len as u64 - 1)?;
        (end <= *last).then(|| (address - first, device.clone()))
    }

    /// Reads; `false`, and all ones, when nothing answers. No lock is held while the device works.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes; `false` when nothing answers. No lock is held while the device works.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

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
}
