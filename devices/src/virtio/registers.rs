//! The common configuration structure (section 4.1.4.3): features, status and where the queues are.

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK,
};

use serde::{Deserialize, Serialize};

use super::ring::Place;
use crate::saved::{Unfit, fits};

/// Bytes of the structure.
pub const SIZE: u64 = 0x38;
/// Status bit: the driver is ready.
pub const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// Status bit: the features are agreed on.
pub const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// Status bits that a driver sets.
const DRIVER_BITS: u8 = (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED) as u8;

/// A queue as the driver set it up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSetup {
    /// Where it is.
    pub place: Place,
    /// The driver uses it.
    pub enabled: bool,
}

/// What a write asks for, besides what the registers remember.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing.
    None,
    /// The device is to be reset.
    Reset,
    /// The driver is ready.
    Start,
    /// This vector is for configuration changes.
    ConfigVector(u16),
    /// This vector is for that queue.
    QueueVector(usize, u16),
}

/// What of the structure is kept elsewhere.
pub struct Elsewhere {
    /// The vector for configuration changes.
    pub config_vector: u16,
    /// The vector of the selected queue.
    pub queue_vector: u16,
    /// Status bits that the device sets.
    pub status: u8,
}

/// The registers as they are saved.
#[derive(Serialize, Deserialize, Debug)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    device_select: u32,
    driver_select: u32,
    driver: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

/// The registers.
pub struct Registers {
    offered: u64,
    needed: u64,
    most: &'static [u16],
    device_select: u32,
    driver_select: u32,
    driver: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
}

impl Registers {
    /// A device that offers the features `offered`, works only for drivers that accept all of `needed`, and has queues
    /// of at most so many entries.
    pub fn new(offered: u64, needed: u64, most: &'static [u16]) -> Self {
        let queues = vec![QueueSetup::default(); most.len()];
        let mut registers = Self {
            offered,
            needed,
            most,
            device_select: 0,
            driver_select: 0,
            driver: 0,
            status: 0,
            queue_select: 0,
            queues,
        };
        registers.reset();
        registers
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        let Self { offered: _, needed: _, most, device_select, driver_select, driver, status, queue_select, queues } =
            self;
        (*device_select, *driver_select, *driver, *status, *queue_select) = (0, 0, 0, 0, 0);
        for (queue, most) in queues.iter_mut().zip(*most) {
            *queue = QueueSetup { place: Place { size: *most, ..Place::default() }, enabled: false };
        }
    }

    /// What a driver has written there.
    pub fn save(&self) -> Saved {
        let Self { offered: _, needed: _, most: _, device_select, driver_select, driver, status, queue_select, queues } =
            self;
        Saved {
            device_select: *device_select,
            driver_select: *driver_select,
            driver: *driver,
            status: *status,
            queue_select: *queue_select,
            queues: queues.clone(),
        }
    }

    /// Those of a device of this kind that were saved.
    ///
    /// # Errors
    /// No driver can bring them about.
    pub fn restored(&self, saved: Saved) -> Result<Self, Unfit> {
        let Saved { device_select, driver_select, driver, status, queue_select, queues } = saved;
        let Self { offered, needed, most, .. } = *self;
        let agreed = driver & !offered == 0 && driver & needed == needed;
        fits("features", status & FEATURES_OK == 0 || agreed)?;
        let ready = status & DRIVER_OK == 0 || status & FEATURES_OK != 0;
        fits("status", status & !(DRIVER_BITS | FEATURES_OK | DRIVER_OK) == 0 && ready)?;
        let possible =
            |(queue, most): (&QueueSetup, &u16)| queue.place.size.is_power_of_two() && queue.place.size <= *most;
        fits("queues", queues.len() == most.len() && queues.iter().zip(most).all(possible))?;
        Ok(Self { offered, needed, most, device_select, driver_select, driver, status, queue_select, queues })
    }

    /// The features that driver and device agreed on.
    pub fn features(&self) -> u64 {
        self.driver & self.offered
    }

    /// Whether the driver is ready.
    pub fn is_started(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// The queues.
    pub fn queues(&self) -> &[QueueSetup] {
        &self.queues
    }

    /// Which queue is selected.
    pub fn selected(&self) -> usize {
        self.queue_select.into()
    }

    /// Reads `data.len()` bytes at `offset`, which are inside.
    pub fn read(&self, offset: u64, data: &mut [u8], elsewhere: &Elsewhere) {
        let mut bytes = [0; SIZE as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        put(0x00, &self.device_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_select).to_le_bytes());
        put(0x08, &self.driver_select.to_le_bytes());
        put(0x0c, &half(self.driver, self.driver_select).to_le_bytes());
        put(0x10, &elsewhere.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status | elsewhere.status]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x1a, &elsewhere.queue_vector.to_le_bytes());
        // A queue that is not there has size 0.
        let queue = self.queues.get(self.selected()).copied().unwrap_or_default();
        put(0x18, &queue.place.size.to_le_bytes());
        put(0x1c, &u16::from(queue.enabled).to_le_bytes());
        // Each queue has a place of its own to be kicked at.
        put(0x1e, &self.queue_select.to_le_bytes());
        put(0x20, &queue.place.descriptors.to_le_bytes());
        put(0x28, &queue.place.available.to_le_bytes());
        put(0x30, &queue.place.used.to_le_bytes());
        let at = offset as usize;
        data.copy_from_slice(&bytes[at..at + data.len()]);
    }

    /// Writes one register, or one half of one of 8 bytes; another write is dropped.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        match (offset, data.len()) {
            (0x00, 4) => self.device_select = value as u32,
            (0x08, 4) => self.driver_select = value as u32,
            (0x0c, 4) if self.status & FEATURES_OK == 0 => match self.driver_select {
                0 => self.driver = self.driver & !0xffff_ffff | value,
                1 => self.driver = self.driver & 0xffff_ffff | value << 32,
                _ => {}
            },
            (0x10, 2) => return Effect::ConfigVector(value as u16),
            (0x14, 1) => return self.set_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) => return Effect::QueueVector(self.selected(), value as u16),
            _ => self.set_up_queue(offset, data.len(), value),
        }
        Effect::None
    }

    /// Bits are set one after another and taken back by a reset alone (section 2.1.1).
    fn set_status(&mut self, wanted: u8) -> Effect {
        if wanted == 0 {
            return Effect::Reset;
        }
        self.status |= wanted & DRIVER_BITS;
        // A driver that wants what was not offered, or leaves out what is needed, reads back that it may not.
        if wanted & FEATURES_OK != 0 && self.driver & !self.offered == 0 && self.driver & self.needed == self.needed {
            self.status |= FEATURES_OK;
        }
        let starts = wanted & self.status & FEATURES_OK != 0 && wanted & DRIVER_OK != 0 && !self.is_started();
        if starts {
            self.status |= DRIVER_OK;
            return Effect::Start;
        }
        Effect::None
    }

    /// A queue is set up before the driver enables it and says that it is ready (section 3.1.1).
    fn set_up_queue(&mut self, offset: u64, len: usize, value: u64) {
        let (selected, started) = (self.selected(), self.is_started());
        let Some(queue) = self.queues.get_mut(selected).filter(|queue| !queue.enabled && !started) else { return };
        let most = self.most[selected];
        let place = &mut queue.place;
        match (offset, len) {
            (0x18, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= most {
                    place.size = size;
                }
            }
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(len as u64) => {
                let address = match offset {
                    0x20..0x28 => &mut place.descriptors,
                    0x28..0x30 => &mut place.available,
                    _ => &mut place.used,
                };
                *address = match (len, offset % 8) {
                    (8, _) => value,
                    (_, 0) => *address & !0xffff_ffff | value,
                    _ => *address & 0xffff_ffff | value << 32,
                };
            }
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "registers_test.rs"]
mod registers_test;
