//! A guest's driver of a virtio function, for tests: memory of its own, and no unit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::{Msi, Requester, SourceId};

use super::function::{VirtioPci, Wiring};
use super::{Device, NEEDED, Untranslated};
use crate::Bus;
use crate::pci::{Decoder, PciFunction};
use crate::testing::{FakeDoorbells, FakeInterrupts};

/// Bytes of guest memory. Queue `n` is in the 16 KiB from `0x1_0000 + n * 0x4000` on.
pub const MEMORY: usize = 1 << 20;
/// Where BAR 0 is put.
pub const BAR: u64 = 0xc000_0000;
/// Where buffers of tests can be.
pub const BUFFERS: u64 = 0x8_0000;
/// Entries of each queue.
pub const SIZE: u16 = 8;

/// Direction of a part of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    ToDevice,
    FromDevice,
}

pub struct Driver {
    pub function: Arc<VirtioPci>,
    pub memory: GuestMemoryMmap,
    pub interrupts: Arc<FakeInterrupts>,
    pub doorbells: Arc<FakeDoorbells>,
    pub stopped: Arc<AtomicU32>,
    queues: usize,
    used: Vec<u16>,
    available: Vec<u16>,
}

/// Calls `done` until it gives something: a worker is at it.
pub fn eventually<R>(what: &str, mut done: impl FnMut() -> Option<R>) -> R {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(result) = done() {
            return result;
        }
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::yield_now();
    }
}

pub fn descriptors(queue: usize) -> u64 {
    0x1_0000 + 0x4000 * queue as u64
}

pub fn available(queue: usize) -> u64 {
    descriptors(queue) + 0x1000
}

pub fn used(queue: usize) -> u64 {
    descriptors(queue) + 0x2000
}

impl Driver {
    /// The function of `device`, found and not started.
    pub fn find(device: impl Device<Untranslated<GuestMemoryMmap>>) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let (interrupts, stopped) = (Arc::new(FakeInterrupts::default()), Arc::new(AtomicU32::new(0)));
        let doorbells = Arc::new(FakeDoorbells::default());
        let wiring = Wiring {
            requester: Requester { segment: 0, sid: SourceId::new(0, 3, 0) },
            decoder: Arc::new(Decoder::new(Arc::new(Bus::default()))),
            interrupts: interrupts.clone(),
            doorbells: Some(doorbells.clone()),
            stop_machine: {
                let stopped = stopped.clone();
                Box::new(move |_| {
                    stopped.fetch_add(1, Ordering::SeqCst);
                })
            },
        };
        let function = VirtioPci::new(wiring, Untranslated(memory.clone()), device).unwrap();
        let (used, available) = (vec![], vec![]);
        let mut driver = Self { function, memory, interrupts, doorbells, stopped, queues: 0, used, available };
        driver.queues = driver.read(0x12, 2) as usize;
        driver
    }

    /// The function of `device`, with a driver that is ready and took all features but `without`.
    pub fn ready(device: impl Device<Untranslated<GuestMemoryMmap>>, without: u64) -> Self {
        let mut driver = Self::find(device);
        driver.start(without);
        driver
    }

    pub fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = vec![0; len];
        self.function.bar().read(offset, &mut data);
        data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    pub fn write(&self, offset: u64, len: usize, value: u64) {
        self.function.bar().write(offset, &value.to_le_bytes()[..len]);
    }

    /// The driver of this function is the one of `other`, whose memory is copied.
    pub fn share(&mut self, other: &Self) {
        self.memory.write_slice(&other.bytes(0, MEMORY), GuestAddress(0)).unwrap();
        (self.used, self.available) = (other.used.clone(), other.available.clone());
    }

    pub fn status(&self) -> u64 {
        self.read(0x14, 1)
    }

    pub fn offered(&self) -> u64 {
        let half = |select| {
            self.write(0x00, 4, select);
            self.read(0x04, 4)
        };
        half(0) | half(1) << 32
    }

    /// As a driver does after a reset: empties its rings and says that it is ready.
    pub fn start(&mut self, without: u64) {
        self.function.config_write(0x10, &(BAR as u32).to_le_bytes());
        // Memory and Bus Master.
        self.function.config_write(4, &[6, 0]);
        self.write(0x14, 1, 0);
        (self.used, self.available) = (vec![0; self.queues], vec![0; self.queues]);
        let features = self.offered() & !without;
        assert_eq!(features & NEEDED, NEEDED & !without);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x08, 4, select);
            self.write(0x0c, 4, half);
        }
        self.write(0x14, 1, 1 | 2 | 8);
        self.enable_messages();
        for queue in 0..self.queues {
            self.memory.write_slice(&[0; 0x4000], GuestAddress(descriptors(queue))).unwrap();
            self.write(0x16, 2, queue as u64);
            self.write(0x18, 2, SIZE.into());
            self.write(0x1a, 2, queue as u64 + 1);
            self.write(0x20, 8, descriptors(queue));
            self.write(0x28, 8, available(queue));
            self.write(0x30, 8, used(queue));
            self.write(0x1c, 2, 1);
        }
        self.write(0x10, 2, 0);
        self.write(0x14, 1, 1 | 2 | 8 | 4);
    }

    /// Vector n sends n.
    fn enable_messages(&self) {
        for vector in 0..=self.queues as u64 {
            for (at, value) in [(0, 0xfee0_0000), (8, vector), (12, 0)] {
                self.write(0x4000 + 16 * vector + at, 4, value);
            }
        }
        let capability = self.capability(0x11);
        self.function.config_write(capability + 2, &0x8000u16.to_le_bytes());
    }

    /// Offset of the first capability with this id.
    pub fn capability(&self, id: u8) -> u16 {
        let mut at = self.config(0x34);
        while self.config(at.into()) != id {
            at = self.config(u16::from(at) + 1);
            assert_ne!(at, 0);
        }
        at.into()
    }

    pub fn config(&self, offset: u16) -> u8 {
        let mut byte = [0];
        self.function.config_read(offset, &mut byte);
        byte[0]
    }

    /// Makes a buffer of `parts` available, from descriptor `first` on, and kicks.
    pub fn offer(&mut self, queue: usize, first: u16, parts: &[(u64, u32, Way)]) {
        for (index, (address, len, way)) in (first..).zip(parts) {
            let at = descriptors(queue) + 16 * u64::from(index);
            let more = usize::from(index - first) + 1 < parts.len();
            let flags = u16::from(more) | if *way == Way::FromDevice { 2 } else { 0 };
            self.memory.write_obj(*address, GuestAddress(at)).unwrap();
            self.memory.write_obj(*len, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(index + 1, GuestAddress(at + 14)).unwrap();
        }
        let index = self.available[queue];
        let place = available(queue) + 4 + 2 * u64::from(index % SIZE);
        self.memory.write_obj(first, GuestAddress(place)).unwrap();
        self.available[queue] = index.wrapping_add(1);
        self.memory.store(self.available[queue], GuestAddress(available(queue) + 2), Ordering::Release).unwrap();
        self.kick(queue);
    }

    /// As a write in the guest does it: by the bell, if one hangs there.
    pub fn kick(&self, queue: usize) {
        let at = 0x3000 + 4 * queue as u64;
        if !self.doorbells.ring(BAR + at) {
            self.write(at, 2, queue as u64);
        }
    }

    /// What the device used next: the first descriptor, and the bytes that it wrote.
    pub fn take(&mut self, queue: usize) -> (u32, u32) {
        eventually("the use of a buffer", || self.try_take(queue))
    }

    pub fn try_take(&mut self, queue: usize) -> Option<(u32, u32)> {
        let index: u16 = self.memory.load(GuestAddress(used(queue) + 2), Ordering::Acquire).unwrap();
        if index == self.used[queue] {
            return None;
        }
        let place = used(queue) + 4 + 8 * u64::from(self.used[queue] % SIZE);
        self.used[queue] = self.used[queue].wrapping_add(1);
        let word = |at| self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((word(place), word(place + 4)))
    }

    /// The data of messages that came, once there is one.
    pub fn messages(&self) -> Vec<u32> {
        eventually("a message", || {
            let sent: Vec<u32> = self.interrupts.take().iter().map(|Msi { data, .. }| *data).collect();
            (!sent.is_empty()).then_some(sent)
        })
    }

    /// Waits until the device says that it needs a reset.
    pub fn needs_reset(&self) {
        eventually("DEVICE_NEEDS_RESET", || (self.status() & 0x40 != 0).then_some(()));
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}
