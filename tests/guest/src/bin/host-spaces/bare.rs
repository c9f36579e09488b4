//! An IOAS of this program's own: what a mapping costs without the bridge.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use guest_programs::memory::PAGE;
use vfio_bridge::GuestMap;

const fn ioctl_number(number: libc::c_ulong) -> libc::c_ulong {
    0x3b << 8 | number
}

const IOAS_ALLOC: libc::c_ulong = ioctl_number(0x81);
const IOAS_COPY: libc::c_ulong = ioctl_number(0x83);
const IOAS_MAP: libc::c_ulong = ioctl_number(0x85);
const IOAS_UNMAP: libc::c_ulong = ioctl_number(0x86);
/// FIXED_IOVA, WRITEABLE and READABLE.
const READ_WRITE: u32 = 7;

/// `struct iommu_ioas_alloc`.
#[repr(C)]
#[derive(Default)]
struct Alloc {
    size: u32,
    flags: u32,
    ioas: u32,
}

/// `struct iommu_ioas_map`.
#[repr(C)]
#[derive(Default)]
struct Map {
    size: u32,
    flags: u32,
    ioas: u32,
    reserved: u32,
    address: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_ioas_copy`.
#[repr(C)]
#[derive(Default)]
struct Copy {
    size: u32,
    flags: u32,
    to: u32,
    from: u32,
    length: u64,
    to_iova: u64,
    from_iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[repr(C)]
#[derive(Default)]
struct Unmap {
    size: u32,
    ioas: u32,
    iova: u64,
    length: u64,
}

/// The two IOAS.
pub struct Bare {
    file: File,
    memory: u32,
    space: u32,
}

impl Bare {
    /// With the first region of `guest` in one of them.
    pub fn new(guest: &GuestMap) -> Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/iommu").context("opening /dev/iommu")?;
        let mut bare = Self { file, memory: 0, space: 0 };
        let mut ids = [0; 2];
        for id in &mut ids {
            let mut alloc = Alloc { size: size_of::<Alloc>() as u32, ..Default::default() };
            bare.ioctl(IOAS_ALLOC, &mut alloc)?;
            *id = alloc.ioas;
        }
        [bare.memory, bare.space] = ids;
        let region = guest.regions().first().context("no memory")?;
        let memory = guest.host_mem(region.gpa(), region.size()).context("no memory")?;
        let (address, length, ioas) = (memory.hva(), memory.size(), bare.memory);
        let size = size_of::<Map>() as u32;
        bare.ioctl(IOAS_MAP, &mut Map { size, flags: READ_WRITE, ioas, reserved: 0, address, length, iova: 0 })?;
        Ok(bare)
    }

    /// Maps the first page of memory at `iova`.
    pub fn copy(&self, iova: u64) -> io::Result<()> {
        let (size, length) = (size_of::<Copy>() as u32, PAGE as u64);
        let (to, from) = (self.space, self.memory);
        self.ioctl(IOAS_COPY, &mut Copy { size, flags: READ_WRITE, to, from, length, to_iova: iova, from_iova: 0 })
    }

    /// Takes the page at `iova` away.
    pub fn unmap(&self, iova: u64) -> io::Result<()> {
        let (size, length) = (size_of::<Unmap>() as u32, PAGE as u64);
        self.ioctl(IOAS_UNMAP, &mut Unmap { size, ioas: self.space, iova, length })
    }

    fn ioctl<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: each caller passes the structure that `request` is defined with, with its size in it, so the kernel
        // reads and writes inside `argument` only. What is mapped is never attached to a device.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
