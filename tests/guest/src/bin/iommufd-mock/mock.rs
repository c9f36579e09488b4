//! A device of Linux's `IOMMUFD_TEST`: its page tables are the kernel's, kept by iommufd as those of hardware are, and
//! what it writes is what `IOMMU_TEST_OP_DIRTY` says.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_bridge::{BoundDevice, HostDevice};
use vtd::Pasid;

const fn ioctl_number(number: libc::c_ulong) -> libc::c_ulong {
    0x3b << 8 | number
}

const IOAS_ALLOC: libc::c_ulong = ioctl_number(0x81);
const HWPT_ALLOC: libc::c_ulong = ioctl_number(0x89);
const TEST: libc::c_ulong = ioctl_number(0xa0);

const OP_MD_CHECK_MAP: u32 = 3;
const OP_MOCK_DOMAIN_REPLACE: u32 = 10;
const OP_MOCK_DOMAIN_FLAGS: u32 = 12;
const OP_DIRTY: u32 = 13;
const OP_PASID_ATTACH: u32 = 18;
const OP_PASID_REPLACE: u32 = 19;
const OP_PASID_DETACH: u32 = 20;
const OP_PASID_CHECK_HWPT: u32 = 21;

const FLAG_NO_DIRTY: u32 = 1;
const FLAG_PASID: u32 = 4;
/// `IOMMU_HWPT_ALLOC_PASID`.
const HWPT_FOR_PASIDS: u32 = 8;

/// Bytes of a page of a mock's page table.
const MOCK_PAGE: u64 = 2048;
/// IOVAs that a mock translates: from 16 MiB to 2 GiB.
pub const FIRST_IOVA: u64 = 1 << 24;

/// `struct iommu_test_cmd`: the union in it as words.
#[repr(C)]
#[derive(Clone, Copy)]
struct Command {
    size: u32,
    op: u32,
    id: u32,
    reserved: u32,
    body: Body,
    last: u32,
}

#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
struct Body([u32; 12]);

impl Body {
    fn words(words: &[u32]) -> Self {
        let mut body = Self::default();
        body.0[..words.len()].copy_from_slice(words);
        body
    }

    /// A word, and numbers of 64 bits behind it.
    fn longs(mut self, at: usize, longs: &[u64]) -> Self {
        for (i, long) in longs.iter().enumerate() {
            self.0[at + 2 * i] = *long as u32;
            self.0[at + 2 * i + 1] = (long >> 32) as u32;
        }
        self
    }
}

/// `struct iommu_ioas_alloc`.
#[repr(C)]
#[derive(Default)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    ioas: u32,
}

/// `struct iommu_hwpt_alloc`.
#[repr(C)]
#[derive(Default)]
struct HwptAlloc {
    size: u32,
    flags: u32,
    device: u32,
    ioas: u32,
    hwpt: u32,
    reserved: u32,
    data_type: u32,
    data_len: u32,
    data: u64,
    fault: u32,
    reserved2: u32,
}

/// What a mock is like.
#[derive(Clone, Copy, Default)]
pub struct Kind {
    /// The unit above it has no dirty bits.
    pub no_dirty_bits: bool,
    /// Its PASIDs can be attached (Linux 6.15).
    pub pasids: bool,
}

/// Where it is attached: page tables, the one of its requests without PASID under `None`.
type Places = BTreeMap<Option<u32>, u32>;

/// The device.
pub struct Mock {
    iommufd: OwnedFd,
    /// The kernel's number of the selftest object.
    object: u32,
    /// iommufd's number of the device.
    id: u32,
    /// An empty page table: the kernel has no detach of a mock.
    nowhere: u32,
    places: Mutex<Places>,
}

impl Mock {
    /// A new one, bound to `iommufd` and attached to nothing.
    pub fn new(iommufd: BorrowedFd<'_>, kind: Kind) -> io::Result<Self> {
        let iommufd = iommufd.try_clone_to_owned()?;
        let mut ioas = IoasAlloc { size: size_of::<IoasAlloc>() as u32, ..Default::default() };
        ioctl(&iommufd, IOAS_ALLOC, &mut ioas)?;
        let flags = if kind.no_dirty_bits { FLAG_NO_DIRTY } else { 0 } | if kind.pasids { FLAG_PASID } else { 0 };
        let made = test(&iommufd, OP_MOCK_DOMAIN_FLAGS, ioas.ioas, Body::words(&[0, 0, 0, flags]))?;
        let (object, id) = (made.0[0], made.0[2]);
        let flags = if kind.pasids { HWPT_FOR_PASIDS } else { 0 };
        let size = size_of::<HwptAlloc>() as u32;
        let mut hwpt = HwptAlloc { size, flags, device: id, ioas: ioas.ioas, ..Default::default() };
        ioctl(&iommufd, HWPT_ALLOC, &mut hwpt)?;
        test(&iommufd, OP_MOCK_DOMAIN_REPLACE, object, Body::words(&[hwpt.hwpt]))?;
        Ok(Self { iommufd, object, id, nowhere: hwpt.hwpt, places: Mutex::default() })
    }

    /// As the bridge numbers it.
    pub fn device(&self) -> HostDevice {
        HostDevice(self.id)
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its requests with `pasid` write the byte at `iova`, whatever the mapping permits; a mock does not ask. Gives back
    /// whether something was mapped there. While it writes it is attached nowhere else.
    pub fn write(&self, pasid: Option<u32>, iova: u64) -> io::Result<bool> {
        let places = self.places();
        let Some(hwpt) = places.get(&pasid) else { return Ok(false) };
        self.write_by(*hwpt, iova)
    }

    fn write_by(&self, hwpt: u32, iova: u64) -> io::Result<bool> {
        let bits = [1u64];
        let page = iova & !(MOCK_PAGE - 1);
        let body = Body::default().longs(2, &[page, MOCK_PAGE, MOCK_PAGE, bits.as_ptr() as u64, 0]);
        let wrote = test(&self.iommufd, OP_DIRTY, hwpt, body)?;
        Ok(wrote.0[10] == 1)
    }

    /// Whether its requests with `pasid` at `iova`, of `len` bytes, reach the memory at `address` of this process.
    pub fn reaches(&self, pasid: Option<u32>, iova: u64, len: u64, address: u64) -> bool {
        let places = self.places();
        let Some(hwpt) = places.get(&pasid) else { return false };
        test(&self.iommufd, OP_MD_CHECK_MAP, *hwpt, Body::default().longs(0, &[iova, len, address])).is_ok()
    }

    /// Whether the kernel has `pasid` where this has it.
    pub fn is_where_it_says(&self, pasid: u32) -> bool {
        let hwpt = self.places().get(&Some(pasid)).copied().unwrap_or(0);
        test(&self.iommufd, OP_PASID_CHECK_HWPT, self.object, Body::words(&[pasid, hwpt])).is_ok()
    }
}

/// As the bridge attaches it.
#[derive(Clone)]
pub struct Attached(pub Arc<Mock>);

impl BoundDevice for Attached {
    fn attach(&self, pasid: Option<Pasid>, hwpt: u32) -> io::Result<()> {
        let pasid = pasid.map(|Pasid(pasid)| pasid);
        let mut places = self.0.places();
        let (op, body) = match pasid {
            None => (OP_MOCK_DOMAIN_REPLACE, Body::words(&[hwpt])),
            Some(pasid) if places.contains_key(&Some(pasid)) => (OP_PASID_REPLACE, Body::words(&[pasid, hwpt])),
            Some(pasid) => (OP_PASID_ATTACH, Body::words(&[pasid, hwpt])),
        };
        test(&self.0.iommufd, op, self.0.object, body)?;
        places.insert(pasid, hwpt);
        Ok(())
    }

    fn detach(&self, pasid: Option<Pasid>) -> io::Result<()> {
        let pasid = pasid.map(|Pasid(pasid)| pasid);
        let mut places = self.0.places();
        if !places.contains_key(&pasid) {
            return Ok(());
        }
        let (op, body) = match pasid {
            None => (OP_MOCK_DOMAIN_REPLACE, Body::words(&[self.0.nowhere])),
            Some(pasid) => (OP_PASID_DETACH, Body::words(&[pasid])),
        };
        test(&self.0.iommufd, op, self.0.object, body)?;
        places.remove(&pasid);
        Ok(())
    }
}

/// A command of the selftest, and its answer.
fn test(iommufd: &OwnedFd, op: u32, id: u32, body: Body) -> io::Result<Body> {
    let mut command = Command { size: size_of::<Command>() as u32, op, id, reserved: 0, body, last: 0 };
    ioctl(iommufd, TEST, &mut command)?;
    Ok(command.body)
}

fn ioctl<T>(iommufd: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller passes the structure that `request` is defined with, with its size in it, so the kernel reads
    // and writes inside `argument`, and reads the bitmap of `OP_DIRTY`, which has the one word that its length asks for.
    let result = unsafe { libc::ioctl(iommufd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
