//! An open PCI function of the host: regions, interrupts and reset, through its VFIO device.
//!
//! Every access is a read or write of the file. A mapping of a region is never touched from this process, so the device
//! going away cannot raise SIGBUS (F-2).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use log::debug;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_ioctls::{VfioDevice, VfioError, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::{Function, IrqKind, RegionInfo, RegionKind, mappable_pages};
use crate::function::check::{Bdf, CheckedFunction};
use crate::function::reset::{ResetOwner, ResetScope, ResetWay, Resetter};
use crate::function::sys;
use crate::host::{GroupId, HostDevice};

/// Where the `len` bytes at `offset` of a region are in the device file. `None` unless all of them are in the region.
fn place(file_offset: u64, size: u64, offset: u64, len: usize) -> Option<u64> {
    let inside = offset.checked_add(len as u64).is_some_and(|end| end <= size);
    file_offset.checked_add(offset).filter(|_| inside)
}

/// Reads at `at`, if there is such a place. What cannot be read is all ones.
fn read_or_ones(file: &File, at: Option<u64>, data: &mut [u8]) -> io::Result<()> {
    let at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput));
    let result = at.and_then(|at| file.read_exact_at(data, at));
    if result.is_err() {
        data.fill(0xff);
    }
    result
}

/// Vectors of which VFIO says `flags` and `count`: without an eventfd they are of no use.
fn vectors(flags: u32, count: u32) -> u32 {
    if flags & VFIO_IRQ_INFO_EVENTFD != 0 { count } else { 0 }
}

/// The command register, and its bit that keeps the function from raising its line.
const COMMAND: u64 = 4;
const COMMAND_INTX_OFF: u16 = 1 << 10;

/// An assigned function: its VFIO device, open.
pub struct HostFunction {
    // Dropped before the device, whose group is closed only when no file of it is open.
    file: File,
    window: Arc<OwnedFd>,
    device: Arc<VfioDevice>,
    bdf: Bdf,
    group: GroupId,
    resetter: Resetter,
}

impl std::fmt::Debug for HostFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostFunction").field("bdf", &self.bdf).field("group", &self.group).finish_non_exhaustive()
    }
}

impl HostFunction {
    /// The function of `device`, however that was opened. `owner` is who its bus is reset for.
    pub(crate) fn new(
        device: Arc<VfioDevice>,
        checked: &CheckedFunction,
        owner: Arc<dyn ResetOwner>,
    ) -> Result<Self, VfioError> {
        // SAFETY: `device` owns the file and outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
        let duplicate = || fd.try_clone_to_owned().map_err(|_| VfioError::VfioDeviceDupFd);
        let (file, window) = (File::from(duplicate()?), Arc::new(duplicate()?));
        let resetter = Resetter::new(checked, &file, owner);
        let function = Self { file, window, device, bdf: checked.bdf(), group: checked.group(), resetter };
        function.hold_line();
        Ok(function)
    }

    /// Sets INTx Disable, which opening the function cleared. Its line may be that of functions whose interrupts are
    /// heard before its own, and what had it before may have left it with its level up.
    fn hold_line(&self) {
        let mut command = [0; 2];
        self.read(RegionKind::Config, COMMAND, &mut command);
        let held = u16::from_le_bytes(command) | COMMAND_INTX_OFF;
        // A failure is said by `write`; only a function that has no command register gives one.
        let _ = self.write(RegionKind::Config, COMMAND, &held.to_le_bytes());
    }

    fn place(&self, region: RegionKind, offset: u64, len: usize) -> Option<u64> {
        let index = region.index();
        place(self.device.get_region_offset(index), self.device.get_region_size(index), offset, len)
    }
}

impl Function for HostFunction {
    fn name(&self) -> String {
        self.bdf.to_string()
    }

    fn group(&self) -> GroupId {
        self.group
    }

    fn bdf(&self) -> Option<Bdf> {
        Some(self.bdf)
    }

    fn device(&self) -> Option<HostDevice> {
        // One that was opened through its group has none.
        self.device.iommufd_dev_id().map(HostDevice)
    }

    fn region(&self, region: RegionKind) -> RegionInfo {
        let index = region.index();
        let flags = self.device.get_region_flags(index);
        let size = self.device.get_region_size(index);
        let mut mappable = Vec::new();
        if flags & VFIO_REGION_INFO_FLAG_MMAP != 0 {
            let sparse = self.device.get_region_caps(index).into_iter().find_map(|cap| match cap {
                VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
                _ => None,
            });
            mappable = match sparse {
                Some(areas) => areas.iter().map(|a| (a.offset, a.size)).collect(),
                None => vec![(0, size)],
            };
            mappable = mappable_pages(size, mappable);
        }
        RegionInfo {
            size,
            file_offset: self.device.get_region_offset(index),
            readable: flags & VFIO_REGION_INFO_FLAG_READ != 0,
            writable: flags & VFIO_REGION_INFO_FLAG_WRITE != 0,
            mappable,
        }
    }

    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        if let Err(e) = read_or_ones(&self.file, self.place(region, offset, data.len()), data) {
            debug!("{}: read of {region:?} at {offset:#x} failed: {e}", self.bdf);
        }
    }

    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.place(region, offset, data.len()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput));
        let result = at.and_then(|at| self.file.write_all_at(data, at));
        if let Err(e) = &result {
            debug!("{}: write of {region:?} at {offset:#x} failed: {e}", self.bdf);
        }
        result
    }

    fn file(&self, _: RegionKind) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.window))
    }

    fn irq_count(&self, kind: IrqKind) -> u32 {
        self.device.get_irq_info(kind.index()).map_or(0, |irq| vectors(irq.flags, irq.count))
    }

    fn irq_noresize(&self, kind: IrqKind) -> bool {
        self.device.get_irq_info(kind.index()).is_some_and(|irq| irq.flags & VFIO_IRQ_INFO_NORESIZE != 0)
    }

    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: &[Option<&EventFd>]) -> io::Result<()> {
        let fds: Vec<i32> = triggers.iter().map(|t| t.map_or(-1, AsRawFd::as_raw_fd)).collect();
        sys::set_irqs(&self.file, kind, sys::SIGNAL, start, triggers.len(), &fds)
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        sys::set_irqs(&self.file, kind, sys::DISABLE, 0, 0, &[])
    }

    fn mask_intx(&self) -> io::Result<()> {
        sys::set_irqs(&self.file, IrqKind::Intx, sys::MASK, 0, 1, &[])
    }

    fn unmask_intx(&self) -> io::Result<()> {
        sys::set_irqs(&self.file, IrqKind::Intx, sys::UNMASK, 0, 1, &[])
    }

    fn reset_way(&self) -> ResetWay {
        self.resetter.way(&self.file)
    }

    fn reset(&self, scope: ResetScope) -> io::Result<()> {
        self.resetter.reset(&self.file, scope)
    }
}

#[cfg(test)]
#[path = "vfio_test.rs"]
mod vfio_test;
