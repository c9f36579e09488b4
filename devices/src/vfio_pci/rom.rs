//! The expansion ROM of the assigned function (PCI local bus specification 3.0, sections 6.2.5.2 and 6.3). The host
//! lets it be read and not be mapped, and turns the function's own decoder of it on for each read: so an image is read
//! once, when the guest looks for it.

use std::sync::{Arc, OnceLock};

use vfio_bridge::{Function, RegionKind};

use super::reach::{Access, Gates, Space};
use crate::BusDevice;

/// What a ROM can have, by the bits of its register; and a bound on what is kept of it.
const SIZES: std::ops::RangeInclusive<u64> = 1 << 11..=1 << 24;

/// Vendor and device id of functions that no longer answer when their ROM is read: the BCM57810, as QEMU knows it, too.
const UNREADABLE: [u32; 1] = [0x168e_14e4];

/// Bytes of the ROM that a guest is given of `host`'s function with these ids; `None`: none.
pub fn size(host: &dyn Function, ids: u32) -> Option<u64> {
    let region = host.region(RegionKind::Rom);
    let usable = region.readable && region.size.is_power_of_two() && SIZES.contains(&region.size);
    (usable && !UNREADABLE.contains(&ids)).then_some(region.size)
}

/// A ROM on the bus: read through the gate of memory, as BARs are.
pub struct Rom {
    gates: Arc<Gates>,
    size: u64,
    image: OnceLock<Box<[u8]>>,
}

impl Rom {
    /// Of so many bytes.
    pub fn new(gates: Arc<Gates>, size: u64) -> Self {
        Self { gates, size, image: OnceLock::new() }
    }

    /// The whole ROM; `None` while it has no image: what could not be read may be there later.
    fn image(&self, access: &Access<'_>) -> Option<&[u8]> {
        if let Some(image) = self.image.get() {
            return Some(image);
        }
        let mut begin = [0; 2];
        access.read(RegionKind::Rom, 0, &mut begin);
        if begin != [0x55, 0xaa] {
            return None;
        }
        Some(self.image.get_or_init(|| {
            let mut image = vec![0xff; self.size as usize].into_boxed_slice();
            // Servers of vfio-user bound a message.
            for (index, part) in (0..).zip(image.chunks_mut(0x1000)) {
                access.read(RegionKind::Rom, 0x1000 * index, part);
            }
            image
        }))
    }
}

impl BusDevice for Rom {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Some(access) = self.gates.enter(Space::Memory) else { return };
        let place = offset as usize..(offset as usize).saturating_add(data.len());
        match self.image(&access) {
            Some(image) => {
                if let Some(part) = image.get(place) {
                    data.copy_from_slice(part);
                }
            }
            None => access.read(RegionKind::Rom, offset, data),
        }
    }
    fn write(&self, _: u64, _: &[u8]) {}
}
