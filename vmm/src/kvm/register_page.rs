//! The page from which the guest reads a unit's registers without an exit: memory that it can only read, at their
//! place. A write there is an exit, as where there is no memory.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use devices::host::{HostWindow, SlotId};
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

/// The page of a unit, which the guest reads while it is shown.
pub struct ShownPage {
    slots: Arc<KvmSlots>,
    gpa: u64,
    window: HostWindow,
    slot: Mutex<Option<SlotId>>,
}

/// The guest reads the registers of `unit`, which are at `gpa`, without an exit from now on.
///
/// # Errors
/// The host has no memory for it, or KVM no slot. Then reads are exits as before.
pub fn show<M: GuestMemoryBackend + Clone + Send + Sync>(
    slots: &Arc<KvmSlots>,
    unit: &Unit<M>,
    gpa: u64,
) -> io::Result<ShownPage> {
    let len = vtd::REGISTER_WINDOW;
    let file = memory_file(c"causeway-registers", len)?;
    let fd: Arc<OwnedFd> = Arc::new(file.try_clone()?.into());
    let page = MmapRegion::from_file(FileOffset::new(file, 0), len as usize).map_err(io::Error::other)?;
    unit.show_registers(Arc::new(Page(page)));
    let window = HostWindow { fd, offset: 0, len, writable: false, dma_buf: None };
    let page = ShownPage { slots: slots.clone(), gpa, window, slot: Mutex::default() };
    page.show()?;
    Ok(page)
}

impl ShownPage {
    /// The guest's reads are none any more.
    ///
    /// # Errors
    /// KVM has no slot. Then they are exits as before.
    pub fn show(&self) -> io::Result<()> {
        let mut slot = self.slot.lock().unwrap();
        if slot.is_none() {
            *slot = Some(self.slots.show(self.gpa, &self.window)?);
        }
        Ok(())
    }

    /// The guest's reads are exits from now on. No lock that a drain holds is waited for.
    pub fn hide(&self) {
        if let Some(slot) = self.slot.lock().unwrap().take() {
            self.slots.hide(slot);
        }
    }
}
