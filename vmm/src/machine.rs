//! The machine: everything wired together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use devices::Bus;
use devices::host::{Interrupts, PowerControl};
use devices::ioapic::IoApic;
use devices::legacy::I8042;
use devices::pci::{ConfigPorts, Ecam, PciRoot};
use devices::pm::PmBlock;
use devices::serial::SerialPort;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vtd::{Requester, SourceId};

use crate::boot::Payload;
use crate::cli::RunArgs;
use crate::control::{Control, Stop};
use crate::irq::KvmInterrupts;
use crate::memory::Ram;
use crate::slots::KvmSlots;
use crate::vcpu::{self, Buses};
use crate::{acpi, cpuid, layout, memory, vm};

impl PowerControl for Control {
    fn power_off(&self) {
        self.request(Stop::PowerOff);
    }
    fn reset(&self) {
        self.request(Stop::Reset);
    }
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// The kernel, the initrd, or what describes the machine to them.
    #[error(transparent)]
    Boot(#[from] crate::boot::Error),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Two things want one address, or there is none left.
    #[error("a device has no place in the guest: {0}")]
    Place(String),
    /// A file descriptor or a thread could not be made.
    #[error("{what} could not be made: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

fn host(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// A machine whose vCPUs do not run yet, or are paused, or run.
pub struct Machine {
    // Threads are joined by `stop`, before anything here is dropped.
    threads: Vec<JoinHandle<()>>,
    control: Arc<Control>,
    entry: Arc<AtomicU64>,
    payload: Payload,
    root: Arc<PciRoot>,
    ioapic: Arc<IoApic>,
    serial: Arc<SerialPort>,
    power: Arc<PmBlock>,
    tables: Tables,
    vm: Arc<VmFd>,
    ram: Arc<Ram>,
    ram_size: u64,
    resets: u64,
}

/// What the ACPI tables are made from, kept because a reset writes them again.
struct Tables {
    cpus: u8,
    pci64: Option<layout::Window>,
}

fn insert(bus: &Bus, first: u64, len: u64, device: Arc<dyn devices::BusDevice>) -> Result<(), Error> {
    bus.insert(first, first + (len - 1), device).map_err(|e| Error::Place(e.to_string()))
}

impl Machine {
    /// Checks everything, then makes everything. On an error nothing is left behind.
    pub fn new(
        args: &RunArgs,
        kvm: &Kvm,
        payload: Payload,
        control: Arc<Control>,
        drained: EventFd,
    ) -> Result<Self, Error> {
        let vm = vm::create(kvm)?;
        let ram = memory::create(args.memory)?;
        let first_free_slot = vm::add_ram(&vm, &ram)?;
        let slots = Arc::new(KvmSlots::new(vm.clone(), first_free_slot));
        let interrupts = KvmInterrupts::new(vm.clone());
        let _ = slots;

        let supported = cpuid::supported(kvm).map_err(vm::call("KVM_GET_SUPPORTED_CPUID"))?;
        let pci64 = layout::pci64_window(args.memory, cpuid::physical_bits(&supported));

        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let root = PciRoot::new(mmio.clone());
        let (bus, device, function) = layout::IOAPIC_SOURCE;
        let ioapic_requester = Requester { segment: 0, sid: SourceId::new(bus, device, function) };
        let messages: Arc<dyn Interrupts> = interrupts.clone();
        let ioapic = IoApic::new(ioapic_requester, messages, Some(interrupts.clone()));
        insert(&mmio, layout::IOAPIC, layout::IOAPIC_SIZE, ioapic.clone())?;
        insert(&mmio, layout::ECAM, layout::ECAM_SIZE, Arc::new(Ecam::new(root.clone())))?;
        let ports = Arc::new(ConfigPorts::new(root.clone(), control.clone()));
        insert(&pio, ConfigPorts::FIRST, ConfigPorts::LAST - ConfigPorts::FIRST + 1, ports)?;
        let power = Arc::new(PmBlock::new(control.clone(), Some(ioapic.line(layout::SCI_GSI as u8))));
        insert(&pio, layout::PM_BLOCK.into(), PmBlock::LEN, power.clone())?;
        let line = ioapic.line(SerialPort::GSI);
        let serial = Arc::new(SerialPort::new(line, Box::new(std::io::stdout()), Some(drained)));
        insert(&pio, SerialPort::FIRST, SerialPort::LAST - SerialPort::FIRST + 1, serial.clone())?;
        let keyboard = Arc::new(I8042::new(control.clone()));
        insert(&pio, I8042::FIRST, I8042::LAST - I8042::FIRST + 1, keyboard)?;

        vcpu::register_kick()?;
        let entry = Arc::new(AtomicU64::new(0));
        let buses = Buses { pio, mmio, ioapic: ioapic.clone() };
        let vcpus =
            (0..args.cpus).map(|index| vcpu::create(kvm, &vm, index, args.cpus)).collect::<Result<Vec<_>, _>>()?;
        let mut machine = Self {
            threads: Vec::new(),
            control,
            entry,
            payload,
            root,
            ioapic,
            serial,
            power,
            tables: Tables { cpus: args.cpus, pci64 },
            vm,
            ram,
            ram_size: args.memory,
            resets: 0,
        };
        machine.load()?;
        for vcpu in vcpus {
            let thread = vcpu.start(machine.control.clone(), buses.clone(), machine.entry.clone());
            match thread {
                Ok(thread) => machine.threads.push(thread),
                Err(e) => {
                    machine.stop();
                    return Err(host("a vCPU thread")(e));
                }
            }
        }
        machine.control.reset_vcpus();
        Ok(machine)
    }

    /// The serial port, for input.
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    /// Resets that the guest went through.
    pub fn resets(&self) -> u64 {
        self.resets
    }

    /// Writes the kernel and what describes the machine into RAM.
    fn load(&mut self) -> Result<(), Error> {
        let description = acpi::Description { cpus: self.tables.cpus, pci64: self.tables.pci64, units: None };
        let rsdp = acpi::write(&self.ram, &description)?;
        let entry = self.payload.load(&self.ram, self.ram_size, rsdp)?;
        self.entry.store(entry, Ordering::Relaxed);
        Ok(())
    }

    fn kick(&self) {
        self.threads.iter().for_each(vcpu::kick);
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Starts the guest anew: vCPUs out, functions quiesced, then everything else, then the boot state.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.control.pause(|| self.kick());
        // Rule 12: functions before the unit, else live DMA hits RAM untranslated.
        self.root.reset();
        self.ioapic.reset();
        self.power.reset();
        self.load()?;
        self.control.reset_vcpus();
        self.resets += 1;
        self.resume();
        Ok(())
    }

    /// Ends the vCPU threads and quiesces the functions.
    pub fn stop(&mut self) {
        self.control.quit(|| self.kick());
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
        self.root.reset();
    }
}
