//! What an iommufd is asked by `ioctl` (`linux/iommufd.h`): a function for each. The crate iommufd-ioctls makes the
//! calls that it has; the others are made here.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use iommufd_bindings::iommufd::{
    IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, IOMMUFD_CMD_IOAS_COPY,
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_TYPE, iommu_hw_info, iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD,
    iommu_hw_info_vtd, iommu_hwpt_alloc, iommu_hwpt_get_dirty_bitmap, iommu_hwpt_set_dirty_tracking, iommu_ioas_alloc,
    iommu_ioas_copy, iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_map_file, iommu_ioas_unmap, iommu_iova_range,
    iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING, iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID,
    iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
};
use iommufd_ioctls::{IommuFd, IommufdError};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_io_nr;
use vtd::{IovaRange, Perm};

use super::kernel::DeviceInfo;
use crate::bridge::guest_map::PAGE_SIZE;
use crate::host::UnmapRange;

ioctl_io_nr!(IOMMU_IOAS_COPY, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_COPY);
ioctl_io_nr!(IOMMU_IOAS_IOVA_RANGES, IOMMUFD_TYPE as u32, IOMMUFD_CMD_IOAS_IOVA_RANGES);
ioctl_io_nr!(IOMMU_HWPT_SET_DIRTY_TRACKING, IOMMUFD_TYPE as u32, IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING);
ioctl_io_nr!(IOMMU_HWPT_GET_DIRTY_BITMAP, IOMMUFD_TYPE as u32, IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP);

/// An IOAS, by the number that the iommufd gave it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ioas(pub u32);

/// A page table of the host's IOMMU, filled from one IOAS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hwpt(pub u32);

/// What a page table is made with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct With {
    /// It can be attached to PASIDs, and to a function of which PASIDs are attached (Linux 6.15).
    pub pasids: bool,
    /// What is written through it can be tracked.
    pub dirty_bits: bool,
}

/// Memory in an IOAS: where it begins there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// In which.
    pub ioas: Ioas,
    /// First IOVA.
    pub iova: u64,
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The errno that a call of the crate failed with.
pub fn io_error(error: IommufdError) -> io::Error {
    use IommufdError as E;
    match error {
        E::OpenIommufd(e) | E::AttachHwpt(e) => e,
        E::IommuDestroy(e)
        | E::IommuIoasAlloc(e)
        | E::IommuIoasMap(e)
        | E::IommuIoasMapFile(e)
        | E::IommuIoasUnmap(e)
        | E::IommuHwptAlloc(e)
        | E::IommuGetHwInfo(e) => io::Error::from_raw_os_error(e.errno()),
        other => io::Error::other(other),
    }
}

/// The flags that let a device do exactly what `perm` says, at the IOVA that is asked for.
fn map_flags(perm: Perm) -> u32 {
    let read = if perm.readable() { iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE } else { 0 };
    let write = if perm.writable() { iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE } else { 0 };
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA | read | write
}

/// A new, empty IOAS.
pub fn alloc_ioas(fd: &IommuFd) -> io::Result<Ioas> {
    let mut alloc = iommu_ioas_alloc { size: size_of::<iommu_ioas_alloc>() as u32, flags: 0, out_ioas_id: 0 };
    fd.alloc_iommu_ioas(&mut alloc).map_err(io_error)?;
    Ok(Ioas(alloc.out_ioas_id))
}

/// An IOAS, or a page table, goes. Nothing may use it any more.
pub fn destroy(fd: &IommuFd, id: u32) -> io::Result<()> {
    fd.destroy_iommu_object(id).map_err(io_error)
}

/// `len` bytes at `at` lead to the memory at `hva` of this process. With a page table the memory is pinned and charged
/// to its user; without one that waits until there is one.
///
/// # Safety
/// Devices will read and write the memory. It must be the guest's alone, stay for as long as it is mapped, and no Rust
/// reference to it may exist.
pub unsafe fn map(fd: &IommuFd, at: Place, hva: u64, len: u64, perm: Perm) -> io::Result<()> {
    let (size, flags) = (size_of::<iommu_ioas_map>() as u32, map_flags(perm));
    let map =
        iommu_ioas_map { size, flags, ioas_id: at.ioas.0, __reserved: 0, user_va: hva, length: len, iova: at.iova };
    fd.map_iommu_ioas(&map).map_err(io_error)
}

/// `len` bytes at `at` lead to those of `file` from `offset` on (Linux 6.13; a memfd). Charged as [`map`].
///
/// # Safety
/// As [`map`].
pub unsafe fn map_file(fd: &IommuFd, at: Place, file: &File, offset: u64, len: u64, perm: Perm) -> io::Result<()> {
    let (size, flags) = (size_of::<iommu_ioas_map_file>() as u32, map_flags(perm));
    let (fd_of_file, start) = (file.as_raw_fd(), offset);
    let map =
        iommu_ioas_map_file { size, flags, ioas_id: at.ioas.0, fd: fd_of_file, start, length: len, iova: at.iova };
    fd.map_iommu_ioas_file(&map).map_err(io_error)
}

/// `len` bytes at `to` lead to where those at `from` do. Memory that is pinned there is not pinned again.
pub fn copy(fd: &IommuFd, to: Place, from: Place, len: u64, perm: Perm) -> io::Result<()> {
    let (size, flags) = (size_of::<iommu_ioas_copy>() as u32, map_flags(perm));
    let copy = iommu_ioas_copy {
        size,
        flags,
        dst_ioas_id: to.ioas.0,
        src_ioas_id: from.ioas.0,
        length: len,
        dst_iova: to.iova,
        src_iova: from.iova,
    };
    // SAFETY: `copy` is what the call takes; the kernel only reads it. No memory becomes reachable that was not given
    // to `map` before.
    check(unsafe { ioctl_with_ref(fd, IOMMU_IOAS_COPY(), &copy) })
}

/// First IOVA and length of an unmap. Everything is (0, 2^64 - 1), which has a meaning of its own.
fn span(range: UnmapRange) -> io::Result<(u64, u64)> {
    match range {
        UnmapRange::All => Ok((0, u64::MAX)),
        UnmapRange::Span { first, last } => {
            let len = last.checked_sub(first).and_then(|n| n.checked_add(1));
            let len = len.filter(|len| first.checked_add(*len).is_some());
            Ok((first, len.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?))
        }
    }
}

/// What is mapped in `range` goes, in whole mappings. Returns how many bytes that were. `ENOENT` means that there was
/// nothing, or that a mapping would have to be cut, and then others may have gone: it is an error as any other.
pub fn unmap(fd: &IommuFd, ioas: Ioas, range: UnmapRange) -> io::Result<u64> {
    let (iova, length) = span(range)?;
    let mut unmap = iommu_ioas_unmap { size: size_of::<iommu_ioas_unmap>() as u32, ioas_id: ioas.0, iova, length };
    fd.unmap_iommu_ioas(&mut unmap).map_err(io_error)?;
    Ok(unmap.length)
}

/// A page table for `device`, which has all that `ioas` has now and follows it from then on.
pub fn alloc_hwpt(fd: &IommuFd, device: u32, ioas: Ioas, with: With) -> io::Result<Hwpt> {
    let size = size_of::<iommu_hwpt_alloc>() as u32;
    let pasids = if with.pasids { iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID } else { 0 };
    let dirty_bits = if with.dirty_bits { iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING } else { 0 };
    let flags = pasids | dirty_bits;
    let mut alloc = iommu_hwpt_alloc { size, flags, dev_id: device, pt_id: ioas.0, ..Default::default() };
    fd.alloc_iommu_hwpt(&mut alloc).map_err(io_error)?;
    Ok(Hwpt(alloc.out_hwpt_id))
}

/// Has `hwpt`, which was made with dirty bits, keep them, all clean; or no more.
pub fn track_dirty(fd: &IommuFd, hwpt: Hwpt, on: bool) -> io::Result<()> {
    let flags = if on { iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE } else { 0 };
    let size = size_of::<iommu_hwpt_set_dirty_tracking>() as u32;
    let track = iommu_hwpt_set_dirty_tracking { size, flags, hwpt_id: hwpt.0, ..Default::default() };
    // SAFETY: `track` is what the call takes; the kernel only reads it.
    check(unsafe { ioctl_with_ref(fd, IOMMU_HWPT_SET_DIRTY_TRACKING(), &track) })
}

/// Sets a bit of `words` for each page of 4 KiB of `range` that `hwpt` has dirty, and makes it clean unless it is to
/// `keep` them. `range` is one of whole pages in which all is mapped: the kernel ends at the first hole, and up to Linux
/// 6.12 without an error. Nor has it one for a page table that is not tracked, in which nothing is dirty.
pub fn dirty_bitmap(fd: &IommuFd, hwpt: Hwpt, range: IovaRange, words: &mut [u64], keep: bool) -> io::Result<()> {
    let (iova, length) = span(UnmapRange::Span { first: range.first, last: range.last })?;
    if words.len() as u64 != length.div_ceil(PAGE_SIZE).div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let get = iommu_hwpt_get_dirty_bitmap {
        size: size_of::<iommu_hwpt_get_dirty_bitmap>() as u32,
        hwpt_id: hwpt.0,
        flags: if keep { iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR } else { 0 },
        __reserved: 0,
        iova,
        length,
        page_size: PAGE_SIZE,
        data: words.as_mut_ptr() as u64,
    };
    // SAFETY: `get` is what the call takes. The kernel sets bits at `data`, as many as there are pages and no others;
    // `words` has room for them, and outlives the call.
    check(unsafe { ioctl_with_ref(fd, IOMMU_HWPT_GET_DIRTY_BITMAP(), &get) })
}

/// More ranges than any host has.
const MOST_RANGES: usize = 1 << 16;

/// Where mappings may be in `ioas`: the intersection of what the devices that are attached to it allow. And what every
/// IOVA is a multiple of.
pub fn iova_ranges(fd: &IommuFd, ioas: Ioas) -> io::Result<(Vec<IovaRange>, u64)> {
    ranges_by(|room, asked| {
        let size = size_of::<iommu_ioas_iova_ranges>() as u32;
        *asked = iommu_ioas_iova_ranges {
            size,
            ioas_id: ioas.0,
            num_iovas: u32::try_from(room.len()).map_err(io::Error::other)?,
            allowed_iovas: room.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: `room` has `num_iovas` entries, outlives the call, and the kernel writes no more than that.
        check(unsafe { ioctl_with_mut_ref(fd, IOMMU_IOAS_IOVA_RANGES(), asked) })
    })
}

/// Asks with ever more room for the answer, which says how much there is.
fn ranges_by(
    mut ask: impl FnMut(&mut [iommu_iova_range], &mut iommu_ioas_iova_ranges) -> io::Result<()>,
) -> io::Result<(Vec<IovaRange>, u64)> {
    let mut room = 16;
    loop {
        let mut ranges = vec![iommu_iova_range::default(); room];
        let mut asked = iommu_ioas_iova_ranges::default();
        match ask(&mut ranges, &mut asked) {
            Ok(()) => {
                ranges.truncate(asked.num_iovas as usize);
                let mut ranges: Vec<_> =
                    ranges.iter().map(|range| IovaRange { first: range.start, last: range.last }).collect();
                ranges.sort_unstable();
                return Ok((ranges, asked.out_iova_alignment));
            }
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) && room < MOST_RANGES => {
                room = (asked.num_iovas as usize).max(2 * room).min(MOST_RANGES);
            }
            Err(e) => return Err(e),
        }
    }
}

/// What is known of `device`: nothing, if the kernel does not say.
pub fn device_info(fd: &IommuFd, device: u32) -> DeviceInfo {
    let mut vtd = iommu_hw_info_vtd::default();
    let mut info = iommu_hw_info {
        size: size_of::<iommu_hw_info>() as u32,
        dev_id: device,
        data_len: size_of::<iommu_hw_info_vtd>() as u32,
        data_uptr: std::ptr::from_mut(&mut vtd) as u64,
        ..Default::default()
    };
    if fd.get_hw_info(&mut info).is_err() {
        return DeviceInfo::default();
    }
    // SAFETY: the union holds one `__u32` under either name.
    let kind = unsafe { info.__bindgen_anon_1.out_data_type };
    let is_vtd = kind == iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD;
    let dirty_bits = u64::from(iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING);
    DeviceInfo {
        page_sizes: is_vtd.then(|| vtd_page_sizes(vtd.cap_reg)),
        // A kernel before 6.15 leaves it at 0.
        pasid_bits: info.out_max_pasid_log2,
        dirty_bits: info.out_capabilities & dirty_bits != 0,
    }
}

/// 4 KiB, and what `CAP.SLLPS` has: bit 34 for 2 MiB, bit 35 for 1 GiB.
fn vtd_page_sizes(capabilities: u64) -> u64 {
    1 << 12 | (capabilities >> 34 & 1) << 21 | (capabilities >> 35 & 1) << 30
}

#[cfg(test)]
#[path = "sys_test.rs"]
mod sys_test;
