//! The page from which the guest reads a unit's registers without an exit: memory that it can only read, at their
//! place. A write there is an exit, as where there is no memory.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::host::HostWindow;
use vm_memory::mmap::MmapRegion;
use vm_memory::{Bytes, FileOffset, GuestMemoryBackend, VolatileMemory};
use vtd::{RegisterPage, Unit};

use super::memory::memory_file;
use super::slots::KvmSlots;

const _: () = assert!(vtd::REGISTER_WINDOW == 4096, "a page");

/// This process's mapping of the page.
struct Page(MmapRegion);

impl RegisterPage for Page {
    fn store(&self, offset: u64, value: u64) {
        let stored = self.0.as_volatile_slice().store(value, offset as usize, Ordering::Release);
        debug_assert!(stored.is_ok(), "{offset:#x} is in the page, and aligned");
    }
}

/// The guest reads the registers of `unit`, which are at `gpa`, without an exit from now on.
///
/// # Errors
/// The host has no memory for it, or KVM no slot. Then reads are exits as before.
pub fn show<M: GuestMemoryBackend + Clone + Send + Sync>(slots: &KvmSlots, unit: &Unit<M>, gpa: u64) -> io::Result<()> {
    let len = vtd::REGISTER_WINDOW;
    let file = memory_file(c"causeway-registers", len)?;
    let fd: Arc<OwnedFd> = Arc::new(file.try_clone()?.into());
    let page = MmapRegion::from_file(FileOffset::new(file, 0), len as usize).map_err(io::Error::other)?;
    unit.show_registers(Arc::new(Page(page)));
    slots.show(gpa, &HostWindow { fd, offset: 0, len, writable: false, dma_buf: None })
}
