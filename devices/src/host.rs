//! What device models ask of the virtual machine monitor: memory slots and interrupts. `vmm` implements these over KVM;
//! tests implement them in memory. So no `unsafe` and no KVM is needed here.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use vtd::{Msi, Requester, SourceId};

/// A piece of a file that can be mapped into the guest: part of a BAR of an assigned function.
#[derive(Clone, Debug)]
pub struct HostWindow {
    /// The file (a VFIO device).
    pub fd: Arc<OwnedFd>,
    /// Offset into it, in bytes, a multiple of 4096.
    pub offset: u64,
    /// Length in bytes, a multiple of 4096.
    pub len: u64,
    /// Whether the guest may write.
    pub writable: bool,
    /// The same piece as a dma-buf, by which some hosts map it for the DMA of other functions (B-10).
    pub dma_buf: Option<Arc<File>>,
}

/// A window that is mapped into the guest, until [`MemorySlots::unmap`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SlotId(pub u32);

/// Puts host memory into the guest-physical map while the guest runs. Waits for the queue of the remapping unit.
pub trait MemorySlots: Send + Sync {
    /// Maps `window` at `gpa`, for the DMA of other functions first (B-10). After it returns every vCPU sees it.
    fn map(&self, gpa: u64, window: &HostWindow) -> io::Result<SlotId>;
    /// Takes it out again. After it returns no vCPU reaches it any more, and no DMA of another function (F-1).
    fn unmap(&self, slot: SlotId);
}

/// Signals an eventfd where the guest writes, in place of the write.
pub trait Doorbells: Send + Sync {
    /// A write at `gpa`, of any size and any value, signals `event` from now on, and goes nowhere else.
    ///
    /// # Errors
    /// The host does not take it. Then writes go where they went before.
    fn hang(&self, gpa: u64, event: &EventFd) -> io::Result<()>;
    /// Takes down what hangs there.
    fn take_down(&self, gpa: u64, event: &EventFd);
}

/// A message route: an eventfd whose signal becomes an MSI in the guest.
pub trait IrqRoute: Send + Sync {
    /// The eventfd to hand to VFIO as the trigger. It stays the same for the life of the route.
    fn trigger(&self) -> &EventFd;
    /// Its number, which no other route has that one [`Interrupts`] handed out and that is still there.
    fn number(&self) -> u32;
    /// While masked: whether a signal came since; clears it.
    fn take_pending(&self) -> bool;
}

/// Hands out message routes and delivers single messages.
pub trait Interrupts: Send + Sync {
    /// A new route for `requester`, masked. It goes back when it is dropped.
    ///
    /// # Errors
    /// There is no more of what a route needs, or the requester has its share of it. The message says what helps.
    fn route(&self, requester: Requester) -> io::Result<Arc<dyn IrqRoute>>;
    /// From now on a signal of each of these routes is delivered as its message, remapped by the requester's unit.
    /// `None`: masked; signals stay counted in the eventfd and [`IrqRoute::take_pending`] tells.
    fn set_routes(&self, changes: &[(Arc<dyn IrqRoute>, Option<Msi>)]);
    /// Deliver `msi` of `requester` now, remapped by its unit. What the unit blocks it records as a fault.
    fn signal(&self, requester: Requester, msi: Msi);
}

/// A level-triggered interrupt line into the IOAPIC.
pub trait IrqLine: Send + Sync {
    /// Raise (`true`) or lower the line. Levels of several users of one pin are OR-ed.
    fn set_level(&self, high: bool);
}

/// Hears which source ids the requests of functions below bridges carry.
pub trait SourceIds: Send + Sync {
    /// The requests of the function of this name carry `id` from now on; `None`: no bus number leads to it. When this
    /// returns, no access with another id is under way. Called with the bridge's registers held; waits for the queue of
    /// the remapping unit.
    fn renumbered(&self, name: Requester, id: Option<SourceId>);
}

/// Hears that a guest took the power of a slot whose card is to go.
pub trait SlotPower: Send + Sync {
    /// Some slot lost its power. Returns at once.
    fn powered_off(&self);
}

/// What a guest can do to the whole machine. Called from a vCPU thread; returns at once, the machine stops afterwards.
pub trait PowerControl: Send + Sync {
    /// The guest powers off (ACPI S5).
    fn power_off(&self);
    /// The guest asks for a reset.
    fn reset(&self);
}

/// Hears how the IOAPIC's pins are routed, so that KVM keeps a message route for each: without one the end of a
/// level-triggered interrupt does not leave the guest (F-5).
pub trait IoapicRoutes: Send + Sync {
    /// Pin `pin` (0 to 23) sends this message from now on, level-triggered if `true`; `None`: it is masked. Called only
    /// when something changed.
    fn set_pin(&self, pin: u8, route: Option<(Msi, bool)>);
}
