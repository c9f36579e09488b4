//! Eventfds that KVM signals when the guest writes somewhere, without an exit to this process.

use std::io;
use std::sync::Arc;

use devices::host::Doorbells;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// [`Doorbells`] over KVM.
pub struct KvmDoorbells(Arc<VmFd>);

impl KvmDoorbells {
    /// Of this machine.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self(vm)
    }
}

fn error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

impl Doorbells for KvmDoorbells {
    fn hang(&self, gpa: u64, event: &EventFd) -> io::Result<()> {
        // Without a value to compare, a write of any size is meant.
        self.0.register_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch).map_err(error)
    }

    fn take_down(&self, gpa: u64, event: &EventFd) {
        if let Err(e) = self.0.unregister_ioevent(event, &IoEventAddress::Mmio(gpa), NoDatamatch) {
            // What it signals is there for as long as it hangs, and wakes somebody for nothing.
            log::debug!("the doorbell at {gpa:#x} stays: {}", error(e));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::vm;

    #[test]
    fn a_doorbell_that_was_taken_down_can_hang_again() {
        let Ok(kvm) = vm::open() else {
            eprintln!("no /dev/kvm: nothing to check");
            return;
        };
        let doorbells = KvmDoorbells::new(vm::create(&kvm).unwrap());
        let (one, other) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        doorbells.hang(0xc000_3000, &one).unwrap();
        assert!(doorbells.hang(0xc000_3000, &other).is_err(), "one hangs there");
        doorbells.hang(0xc000_3004, &one).unwrap();
        doorbells.take_down(0xc000_3000, &one);
        doorbells.hang(0xc000_3000, &other).unwrap();
        assert!(doorbells.hang(0xc000_3004, &other).is_err(), "that one was not taken down");
    }
}
