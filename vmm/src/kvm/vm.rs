//! The KVM virtual machine: capabilities, interrupt chip, RAM.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::boot::layout;
use crate::kvm::memory::Ram;

/// Why there is no virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// /dev/kvm cannot be opened.
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(io::Error),
    /// This KVM lacks something.
    #[error("this host's KVM has no {0}")]
    Missing(&'static str),
    /// A vCPU that was saved cannot be one of this host.
    #[error("vCPU {index} cannot run here: {why}")]
    Model {
        /// Its number.
        index: u8,
        /// Why, and what helps.
        why: String,
    },
    /// KVM does not take the guest's memory.
    #[error("KVM does not take {mib} MiB of guest memory in one piece: {source}; use a smaller --memory")]
    Ram {
        /// Its size.
        mib: u64,
        /// Why.
        source: io::Error,
    },
    /// A call failed.
    #[error("{what} failed: {source}")]
    Call {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Turns an error of `what` into ours.
pub fn call(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Call { what, source: io::Error::from_raw_os_error(e.errno()) }
}

/// Opens /dev/kvm and checks that it has what we need.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|e| Error::Open(io::Error::from_raw_os_error(e.errno())))?;
    if kvm.get_api_version() != KVM_API_VERSION as i32 {
        return Err(Error::Missing("API version 12"));
    }
    for (cap, name) in [
        (Cap::UserMemory, "user memory regions"),
        (Cap::SplitIrqchip, "split interrupt chip"),
        (Cap::Irqfd, "irqfd"),
        (Cap::SignalMsi, "message signalling"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::MpState, "multiprocessing state"),
        (Cap::ReadonlyMem, "read-only memory regions"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(Error::Missing(name));
        }
    }
    Ok(kvm)
}

/// Makes the virtual machine with local APICs in the kernel and the IOAPIC with us.
pub fn create(kvm: &Kvm) -> Result<Arc<VmFd>, Error> {
    let vm = loop {
        match kvm.create_vm() {
            // The kernel gives up when a signal comes while it makes the machine.
            Err(e) if e.errno() == libc::EINTR => continue,
            other => break other.map_err(call("KVM_CREATE_VM"))?,
        }
    };
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(call("KVM_SET_TSS_ADDR"))?;
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = u64::from(layout::IOAPIC_PINS);
    vm.enable_cap(&split).map_err(call("KVM_CAP_SPLIT_IRQCHIP"))?;
    // Messages with destinations of 32 bits, as the unit remaps them, and none of them a broadcast by its lowest 8
    // bits.
    let flags = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    if vm.check_extension_raw(KVM_CAP_X2APIC_API.into()) as u32 & flags != flags {
        return Err(Error::Missing("APIC ids of 32 bits (x2APIC API)"));
    }
    let mut x2apic = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
    x2apic.args[0] = u64::from(flags);
    vm.enable_cap(&x2apic).map_err(call("KVM_CAP_X2APIC_API"))?;
    Ok(Arc::new(vm))
}

/// Gives the guest its RAM, in slots from 0. Gives back the first slot that is free.
pub fn add_ram(vm: &VmFd, ram: &Ram) -> Result<u32, Error> {
    set_ram(vm, ram, 0)
}

fn set_ram(vm: &VmFd, ram: &Ram, flags: u32) -> Result<u32, Error> {
    let mut slot = 0;
    for region in ram.iter() {
        let memory = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for the whole life of `ram`, which the machine drops after the virtual machine.
        unsafe { vm.set_user_memory_region(memory) }
            .map_err(|e| Error::Ram { mib: region.len() >> 20, source: io::Error::from_raw_os_error(e.errno()) })?;
        slot += 1;
    }
    Ok(slot)
}

/// From now on, or not any more, KVM notes which pages of RAM vCPUs write; nothing is noted yet.
pub fn log_dirty(vm: &VmFd, ram: &Ram, on: bool) -> Result<(), Error> {
    set_ram(vm, ram, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }).map(drop)
}

/// Adds to an error of KVM what the user can do.
pub fn remedy(error: Error) -> anyhow::Error {
    match &error {
        Error::Open(e) if e.kind() == io::ErrorKind::NotFound => anyhow::anyhow!(
            "{error}; turn virtualization on in the firmware and load the module: modprobe kvm-intel or modprobe kvm-amd"
        ),
        Error::Open(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            anyhow::anyhow!("{error}; give it to this user: usermod -aG kvm $USER, then log in again")
        }
        _ => error.into(),
    }
}
