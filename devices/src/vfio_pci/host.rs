//! What the assigned function asks of the host. [`vfio_bridge::HostFunction`] is a real one,
//! [`vfio_bridge::vfio_user::UserFunction`] one that another process emulates; tests have their own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_bridge::vfio_user::UserFunction;
pub use vfio_bridge::{IrqKind, RegionInfo, RegionKind, ResetScope};
use vmm_sys_util::eventfd::EventFd;

/// A function of the host, open.
pub trait AssignedHost: Send + Sync {
    /// What is known of `region`.
    fn region(&self, region: RegionKind) -> RegionInfo;
    /// Reads; all ones where that fails.
    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]);
    /// Writes; dropped where that fails, and the result says so.
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()>;
    /// The file whose parts become windows into `region`; without one nothing of it is mapped into the guest.
    fn file(&self, region: RegionKind) -> Option<Arc<OwnedFd>>;
    /// How many vectors of `kind` there are.
    fn irq_count(&self, kind: IrqKind) -> u32;
    /// Whether all vectors of `kind` that are ever to be used must be there when it is enabled. Else each can be added
    /// alone.
    fn irq_noresize(&self, kind: IrqKind) -> bool;
    /// Vectors from `start` on signal `triggers` from now on, `None`: nobody; the first call enables the kind. After an
    /// error none of these vectors signals anybody.
    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: &[Option<&EventFd>]) -> io::Result<()>;
    /// Disables `kind`.
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()>;
    /// Masks the legacy line, as the host does when it fires. [`io::ErrorKind::Unsupported`] where it is never masked.
    fn mask_intx(&self) -> io::Result<()>;
    /// Unmasks the legacy line, which the host masks each time it fires.
    fn unmask_intx(&self) -> io::Result<()>;
    /// Resets the function, and no other one that is not in `scope`; its configuration space is afterwards what it was
    /// before. [`io::ErrorKind::Unsupported`] where no way is there.
    fn reset(&self, scope: ResetScope) -> io::Result<()>;
}

impl AssignedHost for vfio_bridge::HostFunction {
    fn region(&self, region: RegionKind) -> RegionInfo {
        self.region(region)
    }
    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        self.read(region, offset, data);
    }
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(region, offset, data)
    }
    fn file(&self, _: RegionKind) -> Option<Arc<OwnedFd>> {
        Some(self.fd().clone())
    }
    fn irq_count(&self, kind: IrqKind) -> u32 {
        self.irq_count(kind)
    }
    fn irq_noresize(&self, kind: IrqKind) -> bool {
        self.irq_noresize(kind)
    }
    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: &[Option<&EventFd>]) -> io::Result<()> {
        self.set_irqs(kind, start, triggers)
    }
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.disable_irqs(kind)
    }
    fn mask_intx(&self) -> io::Result<()> {
        self.mask_intx()
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.unmask_intx()
    }
    fn reset(&self, scope: ResetScope) -> io::Result<()> {
        self.reset(scope)
    }
}

impl AssignedHost for UserFunction {
    fn region(&self, region: RegionKind) -> RegionInfo {
        self.region(region)
    }
    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        self.read(region, offset, data);
    }
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write(region, offset, data)
    }
    fn file(&self, region: RegionKind) -> Option<Arc<OwnedFd>> {
        self.file(region)
    }
    fn irq_count(&self, kind: IrqKind) -> u32 {
        self.irq_count(kind)
    }
    fn irq_noresize(&self, _: IrqKind) -> bool {
        // A process has no vectors of the host to allocate.
        false
    }
    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: &[Option<&EventFd>]) -> io::Result<()> {
        self.set_irqs(kind, start, triggers)
    }
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.disable_irqs(kind)
    }
    fn mask_intx(&self) -> io::Result<()> {
        // Servers need not do it when it fires, and a write of the command register does not touch it.
        Err(io::ErrorKind::Unsupported.into())
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.unmask_intx()
    }
    fn reset(&self, _: ResetScope) -> io::Result<()> {
        self.reset()
    }
}
