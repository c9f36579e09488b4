//! Address buses: which device answers at which address. One for port I/O, one for MMIO.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::sync::RwLock;

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
