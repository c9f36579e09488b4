//! An open PCI function of the host: regions, interrupts and reset, through its VFIO device.
//!
//! Every access is a read or write of the file. A mapping of a region is never touched from this process, so the device
//! going away cannot raise SIGBUS (F-2).

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use log::debug;
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, VFIO_TYPE, vfio_device_info,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

use super::{Function, IrqKind, RegionInfo, RegionKind, mappable_pages};
use crate::function::check::{Bdf, CheckedFunction};
use crate::function::reset::{GroupFiles, ResetScope, ResetWay, Resetter};
use crate::host::GroupId;

ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE.into(), VFIO_BASE + 10);

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

/// What is asked of the interrupts of a kind: flags of `VFIO_DEVICE_SET_IRQS`.
const SIGNAL: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
const DISABLE: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
const MASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_MASK;
const UNMASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;

/// `struct vfio_irq_set` { argsz, flags, index, start, count } and its payload, all 32-bit words. `None` where a number
/// does not fit.
fn irq_set(kind: IrqKind, flags: u32, start: u32, count: usize, fds: &[i32]) -> Option<Vec<u32>> {
    let argsz = u32::try_from((5 + fds.len()) * size_of::<u32>()).ok()?;
    let mut words = vec![argsz, flags, kind.index(), start, u32::try_from(count).ok()?];
    words.extend(fds.iter().map(|fd| fd.cast_unsigned()));
    Some(words)
}

/// What the result of `VFIO_DEVICE_SET_IRQS` says.
fn irqs_were_set(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        // Nothing is enabled: the host has only this many vectors.
        1.. => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The command register, and its bit that keeps the function from raising its line.
const COMMAND: u64 = 4;
const COMMAND_INTX_OFF: u16 = 1 << 10;

/// An assigned function: its VFIO device, open.
pub struct HostFunction {
    // Dropped before the device, which leaves its group only when no file of it is open.
    file: File,
    window: Arc<OwnedFd>,
    device: VfioDevice,
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
    pub(crate) fn open(
        checked: &CheckedFunction,
        container: Arc<VfioContainer>,
        groups: Arc<GroupFiles>,
    ) -> Result<Self, vfio_ioctls::VfioError> {
        let device = VfioDevice::new(checked.path(), container.clone(), false)?;
        groups.add(checked.group(), &container);
        // SAFETY: `device` owns the file and outlives the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) };
        let duplicate = || fd.try_clone_to_owned().map_err(|_| vfio_ioctls::VfioError::VfioDeviceDupFd);
        let (file, window) = (File::from(duplicate()?), Arc::new(duplicate()?));
        // vfio-ioctls keeps the flags to itself.
        let mut info = vfio_device_info { argsz: size_of::<vfio_device_info>() as u32, ..Default::default() };
        // SAFETY: `info` is what the call takes and writes its answer to.
        let known = unsafe { ioctl_with_mut_ref(&file, VFIO_DEVICE_GET_INFO(), &mut info) } >= 0;
        let offered = known && info.flags & VFIO_DEVICE_FLAGS_RESET != 0;
        let resetter = Resetter::new(checked.bdf(), checked.path(), offered, groups);
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

    fn set(&self, kind: IrqKind, flags: u32, start: u32, count: usize, fds: &[i32]) -> io::Result<()> {
        let words = irq_set(kind, flags, start, count, fds);
        let words = words.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the words are a `vfio_irq_set` with `argsz` bytes, which live until the call returns; the kernel only
        // reads them.
        irqs_were_set(unsafe { ioctl_with_ptr(&self.file, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) })
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
        self.set(kind, SIGNAL, start, triggers.len(), &fds)
    }

    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.set(kind, DISABLE, 0, 0, &[])
    }

    fn mask_intx(&self) -> io::Result<()> {
        self.set(IrqKind::Intx, MASK, 0, 1, &[])
    }

    fn unmask_intx(&self) -> io::Result<()> {
        self.set(IrqKind::Intx, UNMASK, 0, 1, &[])
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
