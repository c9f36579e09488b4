//! Pieces of files (BARs) in the guest-physical map, while the guest runs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use devices::Told;
use devices::host::{HostWindow, MemorySlots, SlotId};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

/// A mapping of ours of a piece of a file. Only the guest touches the memory.
struct Mapped {
    at: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and no reference into it is ever made.
unsafe impl Send for Mapped {}

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
        // SAFETY: this mapping is ours alone, and its memory slot is gone before it is dropped.
        unsafe { libc::munmap(self.at.as_ptr(), self.len) };
    }
}

struct State {
    next: u32,
    free: Vec<u32>,
    mapped: BTreeMap<SlotId, (kvm_userspace_memory_region, Mapped)>,
}

/// [`MemorySlots`] over KVM.
pub struct KvmSlots {
    vm: Arc<VmFd>,
    state: Mutex<State>,
    told: Told,
}

impl KvmSlots {
    /// With slots from `first` on.
    pub fn new(vm: Arc<VmFd>, first: u32) -> Self {
        Self {
            vm,
            state: Mutex::new(State { next: first, free: Vec::new(), mapped: BTreeMap::new() }),
            told: Told::default(),
        }
    }

    fn set(&self, region: kvm_userspace_memory_region) -> io::Result<()> {
        // SAFETY: a region that is not empty is a mapping that `state` keeps until the slot is empty again.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }
}

impl MemorySlots for KvmSlots {
    fn map(&self, gpa: u64, window: &HostWindow) -> io::Result<SlotId> {
        let mapped = Mapped::new(window)?;
        let mut state = self.state.lock().unwrap();
        let slot = state.free.last().copied().unwrap_or(state.next);
        let region = kvm_userspace_memory_region {
            slot,
            flags: if window.writable { 0 } else { KVM_MEM_READONLY },
            guest_phys_addr: gpa,
            memory_size: window.len,
            userspace_addr: mapped.at.as_ptr() as u64,
        };
        self.set(region)?;
        if state.free.pop().is_none() {
            state.next += 1;
        }
        state.mapped.insert(SlotId(slot), (region, mapped));
        Ok(SlotId(slot))
    }

    fn unmap(&self, slot: SlotId) {
        let mut state = self.state.lock().unwrap();
        let Some((region, mapped)) = state.mapped.remove(&slot) else { return };
        match self.set(kvm_userspace_memory_region { memory_size: 0, ..region }) {
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
        drop(mapped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::vm;

    #[test]
    fn a_slot_can_be_used_again_at_once_when_its_window_left() {
        let Ok(kvm) = vm::open() else {
            eprintln!("no /dev/kvm: nothing to check");
            return;
        };
        let slots = KvmSlots::new(vm::create(&kvm).unwrap(), 3);
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(0x3000).unwrap();
        let fd = Arc::new(std::os::fd::OwnedFd::from(file));
        let window = |writable| HostWindow { fd: fd.clone(), offset: 0x1000, len: 0x2000, writable };
        let first = slots.map(0xc000_0000, &window(true)).unwrap();
        // The kernel refuses overlapping slots, so this proves that the first is there, and then that it is gone.
        assert!(slots.map(0xc000_1000, &window(true)).is_err());
        slots.unmap(first);
        slots.unmap(first);
        let again = slots.map(0xc000_1000, &window(false)).unwrap();
        assert_eq!((first, again), (SlotId(3), SlotId(3)));
        assert_eq!(slots.map(0xd000_0000, &window(true)).unwrap(), SlotId(4));
    }
}
