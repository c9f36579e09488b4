//! What a vCPU is and is in, as it is saved and put back.

use std::collections::BTreeMap;
use std::sync::Mutex;

use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, VcpuFd};
use serde::{Deserialize, Serialize};

/// The time-stamp counter.
pub const MSR_TSC: u32 = 0x10;
/// VMX is enabled.
const CR4_VMXE: u64 = 1 << 13;
/// SVM is enabled.
const EFER_SVME: u64 = 1 << 12;

/// The vCPU that a guest sees.
#[derive(Serialize, Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Model {
    cpuid: Vec<kvm_cpuid_entry2>,
    /// Rate of its time-stamp counter, if that is known.
    tsc_khz: Option<u32>,
}

impl Model {
    /// What CPUID says, and the rate of the time-stamp counter.
    pub fn new(cpuid: &CpuId, tsc_khz: Option<u32>) -> Self {
        Self { cpuid: cpuid.as_slice().to_vec(), tsc_khz }
    }

    /// What CPUID says; `None`: more than there can be.
    pub fn cpuid(&self) -> Option<CpuId> {
        CpuId::from_entries(&self.cpuid).ok()
    }

    /// Whether a vCPU that is `here` can be this one, which makes its counter count as fast. A sentence says why not.
    pub fn fits(&self, here: &Self, fd: &VcpuFd) -> Result<(), String> {
        if let Some((function, register, bits)) = self.lacks(here) {
            return Err(format!(
                "the guest uses a processor with features that this host's has not (CPUID {function:#x}, {register}: \
                 {bits:#x}); use a host with the same processor"
            ));
        }
        match self.tsc_khz {
            Some(khz) if self.tsc_khz != here.tsc_khz => fd.set_tsc_khz(khz).map_err(|e| {
                format!("its time-stamp counter counts at {khz} kHz, which this host's cannot ({e}); use another host")
            }),
            _ => Ok(()),
        }
    }

    /// The first leaf that says a feature which is not `here`.
    fn lacks(&self, here: &Self) -> Option<(u32, &'static str, u32)> {
        let find = |model: &Self, function, index| {
            model
                .cpuid
                .iter()
                .find(|entry| (entry.function, entry.index) == (function, index))
                .copied()
                .unwrap_or_default()
        };
        // What operating systems turn on by themselves, and each vCPU's own, is none of these.
        const OSXSAVE: u32 = 1 << 27;
        [(1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0008, 0)].iter().find_map(
            |(function, index)| {
                let (saved, here) = (find(self, *function, *index), find(here, *function, *index));
                let registers = match function {
                    1 => [("ecx", saved.ecx & !OSXSAVE, here.ecx), ("edx", saved.edx, here.edx), ("", 0, 0)],
                    7 => [("ebx", saved.ebx, here.ebx), ("ecx", saved.ecx, here.ecx), ("edx", saved.edx, here.edx)],
                    0xd => [("eax", saved.eax, here.eax), ("", 0, 0), ("", 0, 0)],
                    0x8000_0001 => [("ecx", saved.ecx, here.ecx), ("edx", saved.edx, here.edx), ("", 0, 0)],
                    _ => [("ebx", saved.ebx, here.ebx), ("", 0, 0), ("", 0, 0)],
                };
                let lacking = registers.into_iter().find(|(_, saved, here)| saved & !here != 0);
                lacking.map(|(register, saved, here)| (*function, register, saved & !here))
            },
        )
    }
}

/// Reads what can be read of `indices`.
pub(super) fn read_msrs(fd: &VcpuFd, indices: impl Iterator<Item = u32>) -> Vec<kvm_msr_entry> {
    let mut rest: Vec<kvm_msr_entry> = indices.map(|index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut values = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let Ok(mut msrs) = Msrs::from_entries(&rest) else { break };
        let read = fd.get_msrs(&mut msrs).unwrap_or(0).min(rest.len());
        values.extend_from_slice(&msrs.as_slice()[..read]);
        // KVM stops at the first that it lists but cannot read.
        rest.drain(..(read + 1).min(rest.len()));
    }
    values
}

/// Writes what can be written of `entries`. Gives back what cannot.
pub(super) fn write_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Vec<kvm_msr_entry> {
    let (mut rest, mut refused) = (entries, Vec::new());
    while !rest.is_empty() {
        let written = match Msrs::from_entries(rest) {
            Ok(msrs) => fd.set_msrs(&msrs).unwrap_or(0).min(rest.len()),
            Err(_) => 0,
        };
        refused.extend(rest.get(written));
        rest = &rest[(written + 1).min(rest.len())..];
    }
    refused
}

/// What a vCPU is in.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

fn failed(what: &'static str) -> impl Fn(Error) -> String {
    move |e| format!("{what}: {e}")
}

impl VcpuState {
    /// That of a vCPU which has completed its last access. `msrs` are those that KVM lists.
    ///
    /// # Errors
    /// A sentence that says why it cannot be saved.
    pub fn of(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, String> {
        // First, because it takes an INIT or SIPI that waits, which changes what follows.
        let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        if sregs.cr4 & CR4_VMXE != 0 || sregs.efer & EFER_SVME != 0 {
            return Err("the guest runs virtual machines itself, which cannot be saved; end them first".to_owned());
        }
        // The counter first: the deadline of its timer is written after it.
        let others = msrs.iter().copied().filter(|index| *index != MSR_TSC);
        Ok(Self {
            mp_state,
            regs: fd.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs,
            xsave: fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?,
            xcrs: fd.get_xcrs().ok(),
            debug: fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            msrs: read_msrs(fd, std::iter::once(MSR_TSC).chain(others)),
            events: fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Puts it into a vCPU that has not run, or not since its last access was completed.
    ///
    /// # Errors
    /// A sentence that says what KVM does not take.
    pub fn restore(&self, fd: &VcpuFd) -> Result<(), String> {
        let Self { mp_state, regs, sregs, xsave, xcrs, debug, lapic, msrs, events } = self;
        fd.set_mp_state(*mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        fd.set_regs(regs).map_err(failed("KVM_SET_REGS"))?;
        fd.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))?;
        if let Some(xcrs) = xcrs {
            fd.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        }
        // SAFETY: KVM reads more than these 4096 bytes only where the process asked for features that need a
        // permission (arch_prctl), and this one never does.
        unsafe { fd.set_xsave(xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        fd.set_debug_regs(debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
        // After the registers, with which comes its base, and before the deadline of its timer.
        fd.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))?;
        for refused in write_msrs(fd, msrs) {
            // Some that KVM lists cannot be written; what counts is that they are as they were.
            let now = read_msrs(fd, std::iter::once(refused.index));
            if now.first().is_none_or(|now| now.data != refused.data) {
                return Err(format!("KVM_SET_MSRS does not take {:#x} in {:#x}", refused.data, refused.index));
            }
        }
        // After the registers, which take pending exceptions away.
        fd.set_vcpu_events(events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        if let Err(e) = fd.kvmclock_ctrl() {
            log::trace!("the guest has no clock of KVM to be told that it stood still: {e}");
        }
        Ok(())
    }
}

/// The states of all vCPUs, between their threads and the main one.
#[derive(Default)]
pub struct States {
    saved: Mutex<BTreeMap<u8, Result<VcpuState, String>>>,
    wrong: Mutex<Vec<String>>,
}

impl States {
    /// For vCPU threads: the state of vCPU `index`, or why there is none.
    pub fn put(&self, index: u8, state: Result<VcpuState, String>) {
        self.saved.lock().unwrap().insert(index, state);
    }

    /// What was put since the last time, by index. The first reason for which one is missing.
    pub fn take(&self) -> Result<Vec<VcpuState>, String> {
        let saved = std::mem::take(&mut *self.saved.lock().unwrap());
        saved
            .into_iter()
            .map(|(index, state)| state.map_err(|why| format!("vCPU {index} cannot be saved: {why}")))
            .collect()
    }

    /// These are the states for all vCPUs, in their order.
    pub fn give(&self, states: Vec<VcpuState>) {
        *self.saved.lock().unwrap() = (0..).zip(states.into_iter().map(Ok)).collect();
    }

    /// For vCPU threads: puts the state of vCPU `index` back with `restore`.
    pub fn restore(&self, index: u8, restore: impl FnOnce(&VcpuState) -> Result<(), String>) {
        let state = self.saved.lock().unwrap().remove(&index);
        let done = match state {
            Some(Ok(state)) => restore(&state),
            _ => Err("its state is missing".to_owned()),
        };
        if let Err(why) = done {
            self.wrong.lock().unwrap().push(format!("vCPU {index} cannot be put back: {why}"));
        }
    }

    /// The first reason for which a vCPU could not be put back.
    pub fn check(&self) -> Result<(), String> {
        self.wrong.lock().unwrap().drain(..).next().map_or(Ok(()), Err)
    }
}
