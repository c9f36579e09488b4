//! virtio over PCI (virtio 1.2, chapters 2 and 4.1): functions that this process emulates and whose driver every guest
//! has.
//!
//! ```text
//!  function   configuration space, BAR 0, status and reset: in the thread of the vCPU that writes
//!     |
//!  worker     one thread a device; takes the rings when the driver is ready, and has them until it is told to stop
//!     |
//!  a device   what the rings carry: entropy, ...
//! ```
//!
//! Rings and buffers are reached by [`Dma`], which is the function's endpoint of the remapping unit: never by
//! guest-physical addresses. So [`ACCESS_PLATFORM`] and [`VERSION_1`] are always offered, and a driver that does not
//! accept both does not get the function to work. A fault in a ring, or a ring that makes no sense, sets
//! DEVICE_NEEDS_RESET (section 2.1.2): the device touches nothing any more until the driver resets it, and lives on.

pub mod blk;
pub mod console;
pub mod function;
pub mod net;
mod registers;
#[cfg(test)]
pub(crate) mod rig;
pub mod ring;
pub mod rng;
mod saving;
mod vectors;
mod worker;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestMemory, GuestMemoryBackend};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;
use vtd::{DmaSession, Endpoint};

use ring::{Broken, Chain, Ring};

/// Feature bit: compliant with version 1 of the specification.
pub const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Feature bit: addresses are what the platform's IOMMU makes of them.
pub const ACCESS_PLATFORM: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM;
/// Feature bits that every device here has, and their drivers may leave out.
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Feature bits without which a driver is refused.
pub const NEEDED: u64 = VERSION_1 | ACCESS_PLATFORM;

/// The way of a device to rings and buffers.
pub trait Dma: Send + Sync + 'static {
    /// Memory as the device sees it: addresses are IOVAs.
    type Memory<'a>: GuestMemory
    where
        Self: 'a;

    /// Calls `access` in a session that an invalidation waits for: it makes no system call and waits for nothing.
    fn session<R>(&self, access: impl FnOnce(&Self::Memory<'_>) -> R) -> R;
}

impl<M: GuestMemoryBackend + Clone + Send + Sync + 'static> Dma for Endpoint<M> {
    type Memory<'a> = DmaSession<'a, M>;

    fn session<R>(&self, access: impl FnOnce(&Self::Memory<'_>) -> R) -> R {
        access(&self.enter())
    }
}

/// Guest memory without a remapping unit in front of it (`--iommu none`).
pub struct Untranslated<M>(pub M);

impl<M: GuestMemoryBackend + Send + Sync + 'static> Dma for Untranslated<M> {
    type Memory<'a> = M;

    fn session<R>(&self, access: impl FnOnce(&Self::Memory<'_>) -> R) -> R {
        access(&self.0)
    }
}

/// Who a device is, as its driver finds it.
pub struct Kind {
    /// Device type (chapter 5).
    pub device: u16,
    /// PCI class code: base class in bits 23:16.
    pub class: u32,
    /// Feature bits of its own type.
    pub features: u64,
    /// The most entries of each of its queues: powers of two.
    pub queues: &'static [u16],
    /// Its configuration (section 2.5), which does not change.
    pub config: Vec<u8>,
}

/// What the rings carry. It works in the thread of its worker.
pub trait Device<D: Dma>: Send + 'static {
    /// Who it is. Asked once.
    fn kind(&self) -> Kind;
    /// A file that becomes readable when there is something from outside; watched for its edges, so `work` reads it
    /// until it has no more.
    fn input(&self) -> Option<RawFd> {
        None
    }
    /// The driver is ready, with these features.
    fn start(&mut self, features: u64) {
        let _ = features;
    }
    /// The device was reset, or its rings are broken: the driver is not ready any more.
    fn reset(&mut self) {}
    /// It is to be saved: puts back what it took from the rings and did not use, and gives what it has besides. It goes
    /// on as after [`Device::work`].
    ///
    /// # Errors
    /// As those of `work`.
    fn rest(&mut self, work: &mut Work<'_, D>) -> Result<Vec<u8>, Broken> {
        let _ = work;
        Ok(Vec::new())
    }
    /// The driver is ready with these features, as it was where [`Device::rest`] gave `more`.
    fn restored(&mut self, features: u64, more: &[u8]) {
        let _ = more;
        self.start(features);
    }
    /// Does what there is to do: buffers that came, and what came from outside. Looks at [`Work::goes_on`] between
    /// buffers.
    ///
    /// # Errors
    /// A ring or a buffer that cannot be used: nothing is done any more until the driver resets the device.
    fn work(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken>;
}

/// What a device works with, between two stops.
pub struct Work<'a, D: Dma> {
    /// The way to memory.
    pub dma: &'a D,
    rings: &'a mut [Option<Ring>],
    stop: &'a AtomicBool,
    notify: &'a dyn Fn(usize),
    events: &'a Epoll,
    wake: &'a EventFd,
}

impl<D: Dma> Work<'_, D> {
    /// Whether it may go on: not when somebody waits for it to stop.
    pub fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Acquire)
    }

    /// Waits for a kick, or for something from outside ([`Device::input`]). A stop need not end it: for a device that
    /// has something under way, whose end comes from outside.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(&self) -> Result<(), Broken> {
        match self.events.wait(-1, &mut [EpollEvent::default(); 2]) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(Broken("its events cannot be waited for")),
        }
        // Before the rings are looked at: a kick that comes later wakes again.
        let _ = self.wake.read();
        Ok(())
    }

    /// The next buffer of queue `index`. Where there is none, a kick is asked for, unless one came just now.
    pub fn next(&mut self, index: usize) -> Result<Option<Chain>, Broken> {
        let found = self.with(index, |ring, memory| match ring.pop(memory)? {
            None if ring.enable_kicks(memory)? => ring.pop(memory),
            found => Ok(found),
        })?;
        Ok(found.flatten())
    }

    /// How many entries queue `index` has.
    pub fn entries(&self, index: usize) -> usize {
        self.rings.get(index).and_then(Option::as_ref).map_or(0, |ring| ring.entries().into())
    }

    /// Calls `access` with queue `index` in a session. `None` when the driver does not use it.
    pub fn with<R>(
        &mut self,
        index: usize,
        access: impl FnOnce(&mut Ring, &D::Memory<'_>) -> Result<R, Broken>,
    ) -> Result<Option<R>, Broken> {
        let Some(ring) = self.rings.get_mut(index).and_then(Option::as_mut) else { return Ok(None) };
        self.dma.session(|memory| access(ring, memory)).map(Some)
    }

    /// Interrupts the driver for what queue `index` has used since, if it wants that. Outside of sessions.
    pub fn interrupt(&mut self, index: usize) -> Result<(), Broken> {
        if self.with(index, |ring, memory| ring.wants_interrupt(memory))? == Some(true) {
            (self.notify)(index);
        }
        Ok(())
    }
}
