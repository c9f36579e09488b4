//! What an open VFIO device is asked by `ioctl`, laid out as the kernel reads and writes it (`linux/vfio.h`). It is the
//! same however the device was opened.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_DEVID_NOT_OWNED,
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID, VFIO_TYPE, vfio_device_info,
};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

use super::IrqKind;
use crate::function::check::Bdf;
use crate::host::GroupId;

ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE.into(), VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE.into(), VFIO_BASE + 11);
ioctl_io_nr!(VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, VFIO_TYPE.into(), VFIO_BASE + 12);
ioctl_io_nr!(VFIO_DEVICE_PCI_HOT_RESET, VFIO_TYPE.into(), VFIO_BASE + 13);

/// What is asked of the interrupts of a kind: flags of `VFIO_DEVICE_SET_IRQS`.
pub const SIGNAL: u32 = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
pub const DISABLE: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER;
pub const MASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_MASK;
pub const UNMASK: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK;

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Does `flags` to `count` vectors of `kind` from `start` on, with an eventfd, or -1, for each where `flags` say so.
pub fn set_irqs(device: &File, kind: IrqKind, flags: u32, start: u32, count: usize, fds: &[RawFd]) -> io::Result<()> {
    let words = irq_set(kind, flags, start, count, fds);
    let words = words.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the words are a `vfio_irq_set` with `argsz` bytes, which live until the call returns; the kernel only
    // reads them.
    irqs_were_set(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) })
}

/// `struct vfio_irq_set` { argsz, flags, index, start, count } and its payload, all 32-bit words. `None` where a number
/// does not fit.
fn irq_set(kind: IrqKind, flags: u32, start: u32, count: usize, fds: &[RawFd]) -> Option<Vec<u32>> {
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

/// Whether [`reset`] can work.
pub fn is_resettable(device: &File) -> bool {
    let mut info = vfio_device_info { argsz: size_of::<vfio_device_info>() as u32, ..Default::default() };
    // SAFETY: `info` is what the call takes and writes its answer to.
    let known = unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_INFO(), &mut info) } >= 0;
    known && info.flags & VFIO_DEVICE_FLAGS_RESET != 0
}

/// Resets the function by itself, by a method that the kernel chooses.
pub fn reset(device: &File) -> io::Result<()> {
    // SAFETY: the call takes no argument.
    check(unsafe { ioctl(device, VFIO_DEVICE_RESET()) })
}

/// A function that a reset of a bus reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reached {
    /// Its address on the host.
    pub bdf: Bdf,
    /// Whose it is, as the kernel says it.
    pub owned_by: OwnedBy,
}

/// By what the kernel tells to whom a function belongs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OwnedBy {
    /// Whoever has the file of its group. So it answers a device that was opened through its own group.
    Group(GroupId),
    /// The iommufd that the device is bound to; or nobody, and its group is that iommufd's.
    Iommufd,
    /// Not that iommufd.
    Others,
}

/// More than functions that one reset can reach: 32 devices with 8 functions on each of the 256 buses of a segment.
const MOST_REACHED: usize = 1 << 16;

/// Whom a reset of the function's bus reaches, itself included. An error where the host cannot reset it.
pub fn reached_with(device: &File) -> io::Result<Vec<Reached>> {
    reached_by(|words| {
        // SAFETY: `words` has `argsz` bytes, and the kernel writes no more than that.
        check(unsafe { ioctl_with_mut_ptr(device, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO(), words.as_mut_ptr()) })
    })
}

/// Asks with ever more room for the answer, whose first word says how much there is.
fn reached_by(mut ask: impl FnMut(&mut [u32]) -> io::Result<()>) -> io::Result<Vec<Reached>> {
    let mut room = 8;
    loop {
        let mut words = vec![0u32; 3 + 2 * room];
        words[0] = u32::try_from(words.len() * 4).map_err(io::Error::other)?;
        match ask(&mut words) {
            Ok(()) => return Ok(reached(&words)),
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) && room < MOST_REACHED => {
                room = (words[2] as usize).max(2 * room).min(MOST_REACHED);
            }
            Err(e) => return Err(e),
        }
    }
}

/// The devices of a `struct vfio_pci_hot_reset_info` { argsz, flags, count, devices }: each { group or devid: u32,
/// segment: u16, bus: u8, devfn: u8 }.
fn reached(words: &[u32]) -> Vec<Reached> {
    let has_devids = words.get(1).is_some_and(|flags| flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0);
    let count = words.get(2).map_or(0, |count| *count as usize);
    let owned_by = |word: u32| match word {
        group if !has_devids => OwnedBy::Group(GroupId(group)),
        devid if devid.cast_signed() == VFIO_PCI_DEVID_NOT_OWNED => OwnedBy::Others,
        _ => OwnedBy::Iommufd,
    };
    let bdf = |word: u32| {
        let [low, high, bus, devfn] = word.to_ne_bytes();
        Bdf { domain: u16::from_ne_bytes([low, high]), bus, device: devfn >> 3, function: devfn & 7 }
    };
    let devices = words.get(3..).unwrap_or_default().chunks_exact(2);
    devices.take(count).map(|words| Reached { bdf: bdf(words[1]), owned_by: owned_by(words[0]) }).collect()
}

/// Resets the function's bus. `proof`: the files of the groups that are reached; none where the device is bound to an
/// iommufd.
pub fn reset_bus(device: &File, proof: &[Arc<OwnedFd>]) -> io::Result<()> {
    let fds: Vec<RawFd> = proof.iter().map(|file| file.as_raw_fd()).collect();
    let words = hot_reset(&fds);
    // SAFETY: the words are `argsz` bytes that live until the call returns; the kernel only reads them.
    check(unsafe { ioctl_with_ptr(device, VFIO_DEVICE_PCI_HOT_RESET(), words.as_ptr()) })
}

/// `struct vfio_pci_hot_reset` { argsz, flags, count, group_fds }, all 32-bit words.
fn hot_reset(group_fds: &[RawFd]) -> Vec<u32> {
    // At most one a function, of which there are no more than 2^16.
    let count = group_fds.len() as u32;
    [(3 + count) * 4, 0, count].into_iter().chain(group_fds.iter().map(|fd| fd.cast_unsigned())).collect()
}

#[cfg(test)]
#[path = "sys_test.rs"]
mod sys_test;
