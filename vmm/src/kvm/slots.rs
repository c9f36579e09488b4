//! Pieces of files (BARs, and the registers of units) in the guest-physical map, while the guest runs.
//!
//! # Order (F-3)
//! A piece that goes leaves the guest first, then the DMA of every device ([`Peers::go`]), then this process. One that
//! comes is mapped here, then for devices, then for the guest. Nobody here reads or writes it (F-2).

use std::any::Any;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use devices::Told;
use devices::host::{HostWindow, MemorySlots, SlotId};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vtd::Requester;

/// A part of a BAR of an assigned function: its place in the guest-physical map, and in this process.
pub struct BarWindow {
    /// The function.
    pub of: Requester,
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes, a multiple of 4096.
    pub len: u64,
    /// Where it is in this process. Only the guest and devices touch it.
    hva: u64,
    mapped: Arc<Mapped>,
    /// All of it as a dma-buf, if the host makes one.
    pub dma_buf: Option<Arc<File>>,
}

impl BarWindow {
    /// Where it is in this process: a shared mapping of the BAR, which nothing in this process reads or writes, and
    /// which is there for as long as what comes with it.
    pub fn host_memory(&self) -> (u64, Arc<dyn Any + Send + Sync>) {
        (self.hva, self.mapped.clone())
    }
}

/// The other devices, whose DMA can reach a BAR.
pub trait Peers: Send + Sync {
    /// `window` is there: devices reach it, as far as the guest's tables and the host let them, before this returns.
    ///
    /// # Errors
    /// Something else is there. Then nothing changed.
    fn come(&self, window: &BarWindow) -> io::Result<()>;
    /// What came at `gpa` and `len` bytes long is gone: no device reaches it when this returns.
    fn go(&self, gpa: u64, len: u64);
}

/// A mapping of ours of a piece of a file. Only the guest and devices touch the memory.
struct Mapped {
    at: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and no reference into it is ever made.
unsafe impl Send for Mapped {}
// SAFETY: what it has is read only.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(window: &HostWindow) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(window.len).map_err(|_| invalid())?;
        let offset = libc::off_t::try_from(window.offset).map_err(|_| invalid())?;
        let prot = libc::PROT_READ | if window.writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, window.fd.as_raw_fd(), offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at).map(|at| Self { at, len }).ok_or_else(invalid)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours alone, its memory slot is gone before it is dropped, and who maps it for devices
        // keeps it meanwhile.
        unsafe { libc::munmap(self.at.as_ptr(), self.len) };
    }
}

struct State {
    next: u32,
    free: Vec<u32>,
    mapped: BTreeMap<SlotId, (kvm_userspace_memory_region, Arc<Mapped>)>,
}

/// Sets a memory slot of KVM.
pub(crate) type SetSlot = Box<dyn Fn(kvm_userspace_memory_region) -> io::Result<()> + Send + Sync>;

/// Memory slots of KVM, for BARs.
pub struct KvmSlots {
    set: SetSlot,
    peers: Arc<dyn Peers>,
    // Never held while `peers` are told: they wait for drains.
    state: Mutex<State>,
    told: Told,
}

/// [`MemorySlots`] over KVM, of one function.
pub struct FunctionSlots {
    /// All slots.
    pub slots: Arc<KvmSlots>,
    /// The function whose BARs these are.
    pub of: Requester,
}

impl KvmSlots {
    /// With slots from `first` on. `peers` hear of each window.
    pub fn new(vm: Arc<VmFd>, first: u32, peers: Arc<dyn Peers>) -> Self {
        let set = move |region| {
            // SAFETY: a region that is not empty is a mapping that `state` keeps until the slot is empty again.
            unsafe { vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
        };
        Self::with(Box::new(set), first, peers)
    }

    /// The same with another KVM.
    pub(crate) fn with(set: SetSlot, first: u32, peers: Arc<dyn Peers>) -> Self {
        Self {
            set,
            peers,
            state: Mutex::new(State { next: first, free: Vec::new(), mapped: BTreeMap::new() }),
            told: Told::default(),
        }
    }

    /// Maps `window` at `gpa` for the guest and no device.
    ///
    /// # Errors
    /// It cannot be mapped here, or KVM has something there.
    pub fn show(&self, gpa: u64, window: &HostWindow) -> io::Result<SlotId> {
        self.map_for_guest(gpa, window, Arc::new(Mapped::new(window)?))
    }

    /// Takes away what [`Self::show`] mapped. No device is told: none could reach it.
    pub fn hide(&self, slot: SlotId) {
        self.take_from_guest(slot);
    }

    /// For devices first, then for the guest.
    fn map(&self, of: Requester, gpa: u64, window: &HostWindow) -> io::Result<SlotId> {
        let mapped = Arc::new(Mapped::new(window)?);
        let hva = mapped.at.as_ptr() as u64;
        let (mapped_too, dma_buf) = (mapped.clone(), window.dma_buf.clone());
        self.peers.come(&BarWindow { of, gpa, len: window.len, hva, mapped: mapped_too, dma_buf })?;
        self.map_for_guest(gpa, window, mapped).inspect_err(|_| self.peers.go(gpa, window.len))
    }

    fn map_for_guest(&self, gpa: u64, window: &HostWindow, mapped: Arc<Mapped>) -> io::Result<SlotId> {
        let mut state = self.state.lock().unwrap();
        let slot = state.free.last().copied().unwrap_or(state.next);
        let region = kvm_userspace_memory_region {
            slot,
            flags: if window.writable { 0 } else { KVM_MEM_READONLY },
            guest_phys_addr: gpa,
            memory_size: window.len,
            userspace_addr: mapped.at.as_ptr() as u64,
        };
        (self.set)(region)?;
        if state.free.pop().is_none() {
            state.next += 1;
        }
        state.mapped.insert(SlotId(slot), (region, mapped));
        Ok(SlotId(slot))
    }

    /// Out of the guest first, then out of the DMA of devices.
    fn unmap(&self, slot: SlotId) {
        let Some((region, mapped)) = self.take_from_guest(slot) else { return };
        self.peers.go(region.guest_phys_addr, region.memory_size);
        drop(mapped);
    }

    /// Gives back what was mapped: its mapping is to be there until devices have it no more.
    fn take_from_guest(&self, slot: SlotId) -> Option<(kvm_userspace_memory_region, Arc<Mapped>)> {
        let mut state = self.state.lock().unwrap();
        let (region, mapped) = state.mapped.remove(&slot)?;
        match (self.set)(kvm_userspace_memory_region { memory_size: 0, ..region }) {
            Ok(()) => state.free.push(slot.0),
            Err(e) => {
                // Fail closed: without the mapping behind it the slot gives the guest nothing.
                self.told.once(|| {
                    log::error!(
                        "the memory slot at {:#x} could not be removed ({e}): its memory is unmapped",
                        region.guest_phys_addr
                    );
                });
            }
        }
        Some((region, mapped))
    }
}

impl MemorySlots for FunctionSlots {
    fn map(&self, gpa: u64, window: &HostWindow) -> io::Result<SlotId> {
        self.slots.map(self.of, gpa, window)
    }
    fn unmap(&self, slot: SlotId) {
        self.slots.unmap(slot);
    }
}

#[cfg(test)]
#[path = "slots_test.rs"]
mod slots_test;
