//! Memory of this process that a device reads and writes behind the compiler's back.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail, ensure};

/// Size of a base page, in bytes.
pub const PAGE: usize = 4096;

/// The pages that back a [`DmaMemory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// 4 KiB pages.
    Base,
    /// 2 MiB pages from hugetlbfs; the kernel must have them reserved.
    Huge2M,
    /// 1 GiB pages from hugetlbfs; the kernel must have them reserved.
    Huge1G,
}

/// An anonymous, populated, page-aligned mapping. All accesses are volatile.
pub struct DmaMemory {
    start: NonNull<u8>,
    len: usize,
}

impl DmaMemory {
    /// Maps `len` bytes (rounded up by the caller to the page size of `backing`), all zero and present.
    ///
    /// # Errors
    /// The kernel's error, for instance `ENOMEM` when no huge page is reserved.
    pub fn new(len: usize, backing: Backing) -> io::Result<Self> {
        let huge = match backing {
            Backing::Base => 0,
            Backing::Huge2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            Backing::Huge1G => libc::MAP_HUGETLB | libc::MAP_HUGE_1GB,
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | huge;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of this process.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping is empty; the kernel never makes one that is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The process address of byte `offset`, for the kernel.
    pub fn address(&self, offset: usize) -> u64 {
        assert!(offset < self.len);
        self.start.as_ptr() as u64 + offset as u64
    }

    /// Writes `data` at `offset`.
    pub fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset.checked_add(data.len()).is_some_and(|end| end <= self.len));
        for (i, byte) in data.iter().enumerate() {
            // SAFETY: inside the mapping, as asserted above; u8 has no alignment.
            unsafe { self.start.as_ptr().add(offset + i).write_volatile(*byte) };
        }
    }

    /// Reads `len` bytes at `offset`.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: inside the mapping, as asserted above; u8 has no alignment.
        (0..len).map(|i| unsafe { self.start.as_ptr().add(offset + i).read_volatile() }).collect()
    }

    /// Writes eight bytes at `offset`, which is a multiple of eight, in one access.
    pub fn write_u64(&self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8) && offset.checked_add(8).is_some_and(|end| end <= self.len));
        // SAFETY: inside the mapping and aligned, as asserted above.
        unsafe { self.start.as_ptr().add(offset).cast::<u64>().write_volatile(value) };
    }

    /// Reads eight bytes at `offset`, which is a multiple of eight, in one access.
    pub fn read_u64(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset.checked_add(8).is_some_and(|end| end <= self.len));
        // SAFETY: inside the mapping and aligned, as asserted above.
        unsafe { self.start.as_ptr().add(offset).cast::<u64>().read_volatile() }
    }

    /// The physical address behind byte `offset` as this kernel sees it (in a guest: the guest-physical address).
    ///
    /// # Errors
    /// Without CAP_SYS_ADMIN the kernel shows frame 0; a page that is not present has no frame.
    pub fn physical_address(&self, offset: usize) -> Result<u64> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let address = self.address(offset);
        let pagemap = File::open("/proc/self/pagemap").context("opening /proc/self/pagemap")?;
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, address / PAGE as u64 * 8).context("reading /proc/self/pagemap")?;
        let entry = u64::from_ne_bytes(entry);
        ensure!(entry & PRESENT != 0, "the page at {address:#x} is not present");
        match entry & FRAME {
            0 => bail!("the kernel hides frame numbers: run as root"),
            frame => Ok(frame * PAGE as u64 + address % PAGE as u64),
        }
    }
}

impl Drop for DmaMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// `len` bytes that differ from offset to offset and from `seed` to `seed`.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(7).wrapping_add((i >> 8) as u8).wrapping_add(seed)).collect()
}

/// Page tables of the kernel, kept until this is dropped: memory that it cannot move, as that of a block device's cache
/// is.
pub struct PageTables {
    start: NonNull<u8>,
    len: usize,
}

impl PageTables {
    /// What one page of a table maps, in bytes.
    const SPAN: usize = 2 << 20;

    /// Has the kernel make `count` pages of tables, by reading a byte in as many spans of an empty mapping.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn take(count: usize) -> io::Result<Self> {
        let len = count * Self::SPAN;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of this process.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let taken = Self { start: NonNull::new(start.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?, len };
        // SAFETY: the mapping that was made above; the advice changes nothing that it holds.
        if unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        for span in 0..count {
            // SAFETY: inside the mapping, which may be read; u8 has no alignment.
            unsafe { taken.start.as_ptr().add(span * Self::SPAN).read_volatile() };
        }
        Ok(taken)
    }
}

impl Drop for PageTables {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing points into it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
