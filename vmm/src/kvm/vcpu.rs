//! A virtual CPU: its state at power-on, its thread, and what its exits lead to.

use std::cell::Cell;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use devices::Bus;
use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_run, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use crate::boot::layout;
use crate::boot::{CODE, CODE_32, DATA, GDT_ENTRIES, Mode, Segment, Start};
use crate::kvm::cpuid;
use crate::kvm::vcpu_state::{MSR_TSC, Model, States, VcpuState, read_msrs, write_msrs};
use crate::kvm::vm::{Error, call};
use crate::machine::control;
use crate::machine::control::{Control, Errand, NextStep, Stop};

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, write-back: memory types are left to the page tables.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// KVM had to emulate an instruction, and could not (`KVM_INTERNAL_ERROR_EMULATION`).
const ERROR_EMULATION: u32 = 1;
/// An exception or an interrupt needs memory where there is none (`KVM_INTERNAL_ERROR_SIMUL_EX`,
/// `KVM_INTERNAL_ERROR_DELIVERY_EV`).
const ERRORS_OF_EVENTS: [u32; 2] = [2, 3];

const CR0_PE_PG: u64 = 1 | 1 << 31;
const CR0_PE_ET: u64 = 1 | 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

/// Where the guest's accesses go.
#[derive(Clone)]
pub struct Buses {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Hears the end of level-triggered interrupts.
    pub ioapic: Arc<devices::ioapic::IoApic>,
    /// Bytes of RAM.
    pub ram: u64,
}

/// The state that a vCPU had when it was made, to which a reset returns.
struct PowerOn {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: Option<kvm_xcrs>,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
}

/// A vCPU that has no thread yet.
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    power_on: PowerOn,
    /// The MSRs that KVM lists.
    msrs: Vec<u32>,
    /// What it sees.
    pub model: Model,
}

impl PowerOn {
    fn of(fd: &VcpuFd, msrs: &[u32]) -> Result<Self, kvm_ioctls::Error> {
        Ok(Self {
            regs: fd.get_regs()?,
            sregs: fd.get_sregs()?,
            fpu: fd.get_fpu()?,
            xcrs: fd.get_xcrs().ok(),
            debug: fd.get_debug_regs()?,
            events: fd.get_vcpu_events()?,
            lapic: fd.get_lapic()?,
            // KVM keeps the counters of the vCPUs together, and a write would part them.
            msrs: read_msrs(fd, msrs.iter().copied().filter(|index| *index != MSR_TSC)),
        })
    }

    fn restore(&self, fd: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        fd.set_sregs(&self.sregs)?;
        write_msrs(fd, &self.msrs);
        fd.set_lapic(&self.lapic)?;
        fd.set_regs(&self.regs)?;
        fd.set_fpu(&self.fpu)?;
        if let Some(xcrs) = &self.xcrs {
            fd.set_xcrs(xcrs)?;
        }
        fd.set_debug_regs(&self.debug)?;
        fd.set_vcpu_events(&self.events)
    }
}

fn segment(of: Segment) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: of.selector,
        type_: of.access & 0xf,
        s: of.access >> 4 & 1,
        dpl: of.access >> 5 & 3,
        present: of.access >> 7,
        avl: of.flags & 1,
        l: of.flags >> 1 & 1,
        db: of.flags >> 2 & 1,
        g: of.flags >> 3 & 1,
        ..Default::default()
    }
}

/// `power_on` with what the boot protocols want: flat segments; and for 64 bits long mode with the identity map.
fn boot_sregs(power_on: &kvm_sregs, mode: Mode) -> kvm_sregs {
    let mut sregs = *power_on;
    sregs.cs = segment(if mode == Mode::Long { CODE } else { CODE_32 });
    let data = segment(DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (GDT_ENTRIES * 8 - 1) as u16;
    if mode == Mode::Protected {
        sregs.cr0 = CR0_PE_ET;
        return sregs;
    }
    sregs.cr0 |= CR0_PE_PG;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME_LMA;
    sregs
}

/// Makes vCPU `index` of `cpus`; one that was saved with `model`.
pub fn create(kvm: &Kvm, vm: &VmFd, index: u8, cpus: u8, model: Option<&Model>) -> Result<Vcpu, Error> {
    let fd = vm.create_vcpu(index.into()).map_err(call("KVM_CREATE_VCPU"))?;
    let supported = cpuid::supported(kvm).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_khz = fd.get_tsc_khz().ok().filter(|khz| *khz > 0);
    let here = Model::new(&cpuid::for_vcpu(&supported, index, cpus, tsc_khz), tsc_khz);
    let model = match model {
        None => here,
        Some(saved) => {
            saved.fits(&here, &fd).map_err(|why| Error::Model { index, why })?;
            saved.clone()
        }
    };
    let seen = model.cpuid().ok_or(Error::Model { index, why: "it has too many CPUID leaves".to_owned() })?;
    fd.set_cpuid2(&seen).map_err(call("KVM_SET_CPUID2"))?;
    let initial = [(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK)];
    write_msrs(&fd, &initial.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }));
    let msrs = kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
    let power_on = PowerOn::of(&fd, msrs.as_slice()).map_err(call("reading the state of a vCPU"))?;
    Ok(Vcpu { fd, index, power_on, msrs: msrs.as_slice().to_vec(), model })
}

thread_local! {
    // The running vCPU's shared page, for the handler of the kick signal.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn kicked(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: the page belongs to the vCPU of this very thread, which clears RUN_PAGE before it lets go of it. The
        // kernel reads this byte at the entry into the guest, so a kick that comes just before the entry is not lost.
        unsafe { (&raw mut (*page).immediate_exit).write_volatile(1) };
    }
}

/// Registers the handler of the kick. Once, before the first vCPU thread.
pub fn register_kick() -> Result<(), Error> {
    register_signal_handler(control::kick_signal(), kicked).map_err(call("sigaction"))
}

impl Vcpu {
    /// Starts the thread. The vCPU enters the guest when `control` lets it; `entry` says how the boot
    /// processor starts.
    pub fn start(
        self,
        control: Arc<Control>,
        buses: Buses,
        entry: Arc<Mutex<Start>>,
        states: Arc<States>,
    ) -> std::io::Result<JoinHandle<()>> {
        thread::Builder::new().name(format!("vcpu{}", self.index)).spawn(move || {
            let mut fd = self.fd;
            let _enrolled = control.enroll();
            RUN_PAGE.set(std::ptr::from_mut(fd.get_kvm_run()));
            let state = State { index: self.index, power_on: self.power_on, msrs: self.msrs, entry, states };
            run(&mut fd, &state, &control, &buses);
            RUN_PAGE.set(std::ptr::null_mut());
        })
    }
}

struct State {
    index: u8,
    power_on: PowerOn,
    msrs: Vec<u32>,
    entry: Arc<Mutex<Start>>,
    states: Arc<States>,
}

impl State {
    /// The state in which the guest starts: the boot processor at the kernel's entry, the others waiting for INIT and
    /// SIPI.
    fn set(&self, fd: &VcpuFd, restore: bool) -> Result<(), kvm_ioctls::Error> {
        if restore {
            self.power_on.restore(fd)?;
        }
        let boot = self.index == 0;
        if boot {
            let Start { mode, rip, rsp, rax, rbx, rsi } = *self.entry.lock().unwrap();
            fd.set_sregs(&boot_sregs(&self.power_on.sregs, mode))?;
            fd.set_regs(&kvm_regs { rflags: 2, rip, rsp, rax, rbx, rsi, ..Default::default() })?;
        }
        let mp_state = if boot { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        fd.set_mp_state(kvm_mp_state { mp_state })
    }
}

fn run(fd: &mut VcpuFd, state: &State, control: &Control, buses: &Buses) {
    let mut resets = 0;
    let mut ran = false;
    loop {
        match control.next_step(&mut resets) {
            NextStep::Quit => return,
            NextStep::Do(errand) => {
                let stop = match errand {
                    Errand::Reset => {
                        if ran {
                            finish_access(fd);
                        }
                        let failed = |e| Stop::Error(format!("vCPU {} could not be reset: {e}", state.index));
                        state.set(fd, ran).err().map(failed)
                    }
                    Errand::Settle if ran => settle(fd, state.index, buses),
                    Errand::Settle => None,
                    Errand::Save => {
                        state.states.put(state.index, VcpuState::of(fd, &state.msrs));
                        None
                    }
                    Errand::Restore => {
                        ran = true;
                        state.states.restore(state.index, |saved| saved.restore(fd));
                        None
                    }
                };
                stop.into_iter().for_each(|stop| control.request(stop));
                control.errand_done();
            }
            NextStep::Run => {
                ran = true;
                if let Left::Stopped(stop) = enter(fd, state.index, buses, || control.left()) {
                    control.request(stop);
                }
            }
        }
    }
}

/// Completes the access of the last exit, which KVM does at the next entry, without running the guest.
fn finish_access(fd: &mut VcpuFd) {
    fd.set_kvm_immediate_exit(1);
    if let Err(e) = fd.run() {
        log::trace!("completing the last access: {e}");
    }
    fd.set_kvm_immediate_exit(0);
}

/// Completes the access of the last exit, and what that leads to: an instruction may have several accesses. They are
/// bounded, for KVM goes back to the guest after each instruction, and here does not enter it.
fn settle(fd: &mut VcpuFd, index: u8, buses: &Buses) -> Option<Stop> {
    loop {
        fd.set_kvm_immediate_exit(1);
        match enter(fd, index, buses, || ()) {
            Left::Served => {}
            Left::Interrupted => return None,
            Left::Stopped(stop) => {
                fd.set_kvm_immediate_exit(0);
                return Some(stop);
            }
        }
    }
}

/// How a vCPU left the guest.
enum Left {
    /// With something that is done.
    Served,
    /// Because it was kicked.
    Interrupted,
    /// It does not go on.
    Stopped(Stop),
}

/// Runs the guest until its next exit. `left` is called before anything else is done with that.
fn enter(fd: &mut VcpuFd, index: u8, buses: &Buses, left: impl FnOnce()) -> Left {
    let exit = fd.run();
    left();
    match exit {
        Ok(VcpuExit::IoIn(port, data)) => {
            let (at, len) = (data.as_mut_ptr(), data.len());
            port_access(fd, at, len, |unit| {
                if !buses.pio.read(port.into(), unit) {
                    log::trace!("read of port {port:#x}, {} bytes: nothing there", unit.len());
                }
            });
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            let (at, len) = (data.as_ptr().cast_mut(), data.len());
            port_access(fd, at, len, |unit| {
                if !buses.pio.write(port.into(), unit) {
                    log::trace!("write to port {port:#x}: {unit:02x?}: nothing there");
                }
            });
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            if !buses.mmio.read(address, data) {
                log::trace!("read at {address:#x}, {} bytes: nothing there", data.len());
            }
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            if !buses.mmio.write(address, data) {
                log::trace!("write at {address:#x}: {data:02x?}: nothing there");
            }
        }
        Ok(VcpuExit::IoapicEoi(vector)) => buses.ioapic.eoi(vector),
        Ok(VcpuExit::Shutdown) => return Left::Stopped(Stop::Crash(format!("vCPU {index} stopped by a triple fault"))),
        Ok(VcpuExit::Intr | VcpuExit::Hlt) => {}
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return Left::Stopped(Stop::Error(format!(
                "the processor refused to run vCPU {index} (reason {reason:#x}, on host CPU {cpu})"
            )));
        }
        Ok(VcpuExit::InternalError) => return Left::Stopped(internal_error(fd, index, buses.ram)),
        Ok(other) => {
            return Left::Stopped(Stop::Error(format!("vCPU {index} left the guest for an unknown reason: {other:?}")));
        }
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
            // Cleared before the next look at what is wanted: a kick after this counts for the next entry.
            fd.set_kvm_immediate_exit(0);
            return Left::Interrupted;
        }
        Err(e) => return Left::Stopped(Stop::Error(format!("KVM_RUN of vCPU {index} failed: {e}"))),
    }
    Left::Served
}

/// Calls `access` for each unit of a port access: string instructions bring several at once.
fn port_access(fd: &mut VcpuFd, at: *mut u8, len: usize, access: impl FnMut(&mut [u8])) {
    // SAFETY: the last exit was KVM_EXIT_IO, so this is the member in use.
    let size = usize::from(unsafe { fd.get_kvm_run().__bindgen_anon_1.io }.size).max(1);
    // SAFETY: `at` and `len` are the data of that exit in the vCPU's shared page, which only this thread uses until it
    // enters the guest again; no other reference to it is alive.
    let data = unsafe { std::slice::from_raw_parts_mut(at, len) };
    data.chunks_exact_mut(size).for_each(access);
}

/// Why KVM gave up: the guest went where there is nothing to execute, which a processor would end by exceptions without
/// end; or KVM lacks something.
fn internal_error(fd: &mut VcpuFd, index: u8, ram: u64) -> Stop {
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so this is the member in use.
    let error = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal }.suberror;
    let rip = fd.get_regs().map_or(0, |regs| regs.rip);
    if ERRORS_OF_EVENTS.contains(&error) {
        return Stop::Crash(format!("vCPU {index} could not take an exception or interrupt at {rip:#x}"));
    }
    let base = fd.get_sregs().map_or(0, |sregs| sregs.cs.base);
    let code = fd.translate_gva(base.wrapping_add(rip)).ok().filter(|code| code.valid != 0);
    match code {
        Some(code) if error == ERROR_EMULATION && !layout::is_ram(code.physical_address, ram) => Stop::Crash(format!(
            "vCPU {index} went to {rip:#x}, where there is no memory (guest-physical {:#x})",
            code.physical_address
        )),
        _ => Stop::Error(format!("KVM cannot run vCPU {index} any further (internal error {error} at {rip:#x})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_segments_are_what_the_boot_protocol_wants() {
        let sregs = boot_sregs(&kvm_sregs::default(), Mode::Long);
        assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
        assert_eq!(
            (sregs.cs.type_, sregs.cs.l, sregs.cs.db, sregs.cs.g, sregs.cs.s, sregs.cs.present),
            (0xb, 1, 0, 1, 1, 1)
        );
        assert_eq!((sregs.ss.type_, sregs.ss.l, sregs.ss.db, sregs.ss.g), (3, 0, 1, 1));
        assert_eq!((sregs.cr0 & CR0_PE_PG, sregs.efer & EFER_LME_LMA), (CR0_PE_PG, EFER_LME_LMA));
        assert_eq!(sregs.cr3, layout::PAGE_TABLES);

        let sregs = boot_sregs(&kvm_sregs::default(), Mode::Protected);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cr0, sregs.cr4, sregs.efer), (0, 1, CR0_PE_ET, 0, 0));
    }
}
