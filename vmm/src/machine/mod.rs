//! The machine: everything wired together, and started anew.

pub mod audit;
mod bars;
pub mod control;
pub mod control_socket;
pub mod dirty;
pub mod events;
mod hotplug;
mod iommu;
mod legacy;
pub mod migration;
mod peers;
mod plug;
mod ports;
pub mod saving;
mod segments;
pub mod snapshot;
mod source_ids;
pub mod stats;
mod steering;
mod top;
mod units;
mod worker;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use devices::bus::Overlap;
use devices::host::PowerControl;
use devices::ioapic::IoApic;
use devices::pci::{ConfigPorts, Ecam, Occupied, PciRoot, SlotError};
use devices::pm::PmBlock;
use devices::serial::SerialPort;
use devices::vfio_pci::VfioPci;
use devices::{Bus, BusDevice};
use kvm_ioctls::{Kvm, VmFd};
use vfio_bridge::{Bridge, Trace, TracedListener};
use vmm_sys_util::eventfd::EventFd;
use vtd::{Audit, SpaceListener, Unit};

use crate::acpi;
use crate::acpi::dmar::Remapping;
use crate::assign::{self, Checked};
use crate::boot::firmware::ImageDevices;
use crate::boot::layout;
use crate::boot::{Payload, Start};
use crate::config::{BusNumbers, MachineConfig, Place, segments, shown};
use crate::console::GuestInput;
use crate::kvm::cpuid;
use crate::kvm::doorbells::KvmDoorbells;
use crate::kvm::irq::{self, KvmInterrupts, Remapper};
use crate::kvm::memory;
use crate::kvm::memory::Ram;
use crate::kvm::register_page;
use crate::kvm::slots::KvmSlots;
use crate::kvm::vcpu::{self, Buses};
use crate::kvm::vcpu_state::{Model, States};
use crate::kvm::vm;
use crate::machine::control::{Control, Errand, Stop};
use crate::machine::legacy::Legacy;
use crate::open_files;
use crate::output::OutputWriter;
use bars::NoPlace;
use peers::PeerMemory;
use plug::{Placed, Plug};
use ports::Ports;
use saving::Description;
use segments::Segments;
use stats::{Device, Stats};
use units::{MadeUnit, UnitWindow, Units, integrated_tlbs};
use worker::Worker;

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
    /// An assigned function.
    #[error(transparent)]
    Assign(#[from] assign::Error),
    /// The remapping unit.
    #[error("the remapping unit cannot be built: {0}")]
    Unit(#[from] vtd::ConfigError),
    /// A device got no address in the guest.
    #[error("{id} has no place in the guest: {source}")]
    Slot {
        /// Its id.
        id: String,
        /// Why.
        source: SlotError,
    },
    /// There is no such root port.
    #[error("there is no root port {0}; use a lower port=, or more --root-ports")]
    NoPort(u8),
    /// There is no such segment, or no unit in it.
    #[error(
        "segment {0} has no function or no unit; give it a device with addr={0:04x}:00:DD.F and --iommu vtd,segment={0}"
    )]
    NoSegment(u16),
    /// It was saved with other segments.
    #[error("the machine was saved with {saved} PCI segments, and there are {here}")]
    OtherSegments {
        /// Those of the machine.
        saved: usize,
        /// Those that its devices are in.
        here: usize,
    },
    /// It has a device already.
    #[error(transparent)]
    Occupied(#[from] Occupied),
    /// The root ports have nothing to wake the main thread with.
    #[error("the root ports cannot be made: {0}")]
    PortEvent(std::io::Error),
    /// A function was not opened.
    #[error("{0} was not opened")]
    NotOpen(String),
    /// A BAR has no address in the guest.
    #[error("{id}: {source}")]
    NoPlace {
        /// The device's id.
        id: String,
        /// Which BAR.
        source: NoPlace,
    },
    /// Two things want one address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// It was saved on another host.
    #[error(
        "the guest has physical addresses of {saved} bits, and this host's processor of {here}; use a host with the \
         same processor"
    )]
    PhysicalBits {
        /// The guest's.
        saved: u8,
        /// The host's.
        here: u8,
    },
    /// Interrupts cannot be delivered.
    #[error("interrupts cannot be set up: {0}")]
    Interrupts(std::io::Error),
    /// A thread could not be made.
    #[error("a thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// A machine whose vCPUs do not run yet, or are paused, or run.
pub struct Machine {
    // Threads are joined by `stop`, before anything here is dropped.
    threads: Vec<JoinHandle<()>>,
    control: Arc<Control>,
    entry: Arc<Mutex<Start>>,
    payload: Payload,
    platform: Platform,
    placed: Vec<Placed>,
    plug: Plug,
    ports: Ports,
    interrupts: Arc<KvmInterrupts>,
    units: Option<Arc<Units>>,
    /// The threads of units. They end with the vCPUs, not before.
    workers: Vec<Worker>,
    bridge: Arc<Bridge>,
    peers: Arc<PeerMemory>,
    tables: Tables,
    ram: Arc<Ram>,
    ram_size: u64,
    resets: u64,
    paused: bool,
    /// It may have moved, and nobody knows: it stays held, until somebody who does resumes it.
    unsure: Option<saving::Held>,
    dirty: dirty::Dirty,
    vm: Arc<VmFd>,
    /// The states of vCPUs, when they are saved and put back.
    states: Arc<States>,
    models: Vec<Model>,
    physical_bits: u8,
}

/// The devices that every machine has.
struct Platform {
    pio: Arc<Bus>,
    mmio: Arc<Bus>,
    segments: Arc<Segments>,
    ioapic: Arc<IoApic>,
    serial: Arc<SerialPort>,
    power: Arc<PmBlock>,
    config: Arc<ConfigPorts>,
    legacy: Legacy,
    /// What bare-metal images find besides.
    tests: Option<ImageDevices>,
}

/// What the ACPI tables are made from, kept because a reset writes them again.
struct Tables {
    cpus: u8,
    /// Of each segment, the first one first.
    windows: Vec<layout::BarWindows>,
    root_ports: u8,
    last_bus: u8,
    remapping: Option<Remapping>,
}

fn insert(bus: &Bus, first: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Overlap> {
    bus.insert(first, first + (len - 1), device)
}

impl Platform {
    fn new(
        interrupts: &Arc<KvmInterrupts>,
        control: &Arc<Control>,
        output: OutputWriter,
        drained: EventFd,
        last_bus: u8,
        numbers: &std::collections::BTreeSet<u16>,
    ) -> Result<Self, Error> {
        let (pio, mmio) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let root = PciRoot::with_ports(mmio.clone(), pio.clone());
        let ioapic = IoApic::new(irq::ioapic_requester(), interrupts.clone(), Some(interrupts.clone()));
        let power = Arc::new(PmBlock::new(control.clone(), Some(ioapic.line(layout::SCI_GSI as u8))));
        let serial = Arc::new(SerialPort::new(ioapic.line(SerialPort::GSI), Box::new(output), Some(drained)));
        let config = Arc::new(ConfigPorts::new(root.clone(), control.clone()));

        insert(&mmio, layout::IOAPIC, layout::IOAPIC_SIZE, ioapic.clone())?;
        insert(&mmio, layout::ECAM, layout::ecam_size(last_bus), Arc::new(Ecam::new(root.clone())))?;
        pio.insert(ConfigPorts::FIRST, ConfigPorts::LAST, config.clone())?;
        insert(&pio, layout::PM_BLOCK.into(), PmBlock::LEN, power.clone())?;
        pio.insert(SerialPort::FIRST, SerialPort::LAST, serial.clone())?;
        let legacy = Legacy::add(&pio, &ioapic, &power, control)?;
        let segments = Arc::new(Segments::new(root, numbers, &mmio)?);
        Ok(Self { pio, mmio, segments, ioapic, serial, power, config, legacy, tests: None })
    }
}

/// What a machine is made from: all of it checked.
pub struct Parts<'a> {
    /// What the user described.
    pub config: &'a MachineConfig,
    /// The devices' ids, in the order of the command line.
    pub names: &'a [String],
    /// Where they are, in the same order.
    pub places: &'a [Place],
    /// Kernel, initrd and command line.
    pub payload: Payload,
    /// The assigned functions, in the order of the command line.
    pub checked: &'a [Checked],
    /// Stops and starts the vCPUs.
    pub control: Arc<Control>,
    /// Where the guest's serial output goes. It never waits.
    pub output: OutputWriter,
    /// Signalled when the guest took its serial input.
    pub drained: EventFd,
    /// Where notifications and host operations are traced.
    pub trace: Option<Arc<Trace>>,
    /// What it was when it was saved: then it starts with empty memory, and [`Machine::restore`] gives it its state.
    pub saved: Option<&'a Description>,
}

impl Machine {
    /// Makes everything. On an error nothing ran and nothing is left behind.
    pub fn new(kvm: &Kvm, parts: Parts<'_>) -> Result<Self, Error> {
        let Parts { config: wanted, names, places, payload, checked, control, output, drained, trace, saved } = parts;
        let vm = vm::create(kvm)?;
        let buses = BusNumbers::new(wanted.root_ports, &wanted.devices, places);
        // A process may come later.
        let for_processes =
            wanted.root_ports > 0 || checked.iter().any(|function| matches!(function, Checked::User { .. }));
        let ram = memory::create(wanted.memory, for_processes)?;
        let supported = cpuid::supported(kvm).map_err(vm::call("KVM_GET_SUPPORTED_CPUID"))?;
        let physical_bits = saving::physical_bits(saved, cpuid::physical_bits(&supported))?;

        let assigned = assign::open(&vm, &ram, wanted, checked, &control, trace.as_ref())?;
        let width = assign::unit_width(wanted.vtd().and_then(|unit| unit.aw_bits), &assigned.limits)?;
        assign::report(&assigned.limits, assigned.pinning, wanted.memory);
        assign::report_functions(&assigned.functions);

        let first_free_slot = vm::add_ram(&vm, &ram)?;
        let interrupts = KvmInterrupts::new(vm.clone()).map_err(Error::Interrupts)?;
        let taken = drained.try_clone().map_err(Error::Interrupts)?;
        let mut platform =
            Platform::new(&interrupts, &control, output.clone(), drained, buses.last, &segments(places))?;

        let mut workers = BTreeMap::new();
        let units = match wanted.vtd() {
            None => None,
            Some(option) => {
                let listener: Arc<dyn SpaceListener> = match trace.clone() {
                    Some(trace) => Arc::new(TracedListener::new(assigned.bridge.clone(), trace)),
                    None => assigned.bridge.clone(),
                };
                let mut unit = |index: usize, segment: u16| -> Result<Arc<Unit<Ram>>, Error> {
                    let config = units::config(option, index, segment, width, physical_bits);
                    let unit = Unit::new(config, (*ram).clone(), listener.clone(), interrupts.clone())?;
                    unit.set_remap_listener(interrupts.clone());
                    let (base, window) = (layout::unit_base(index), unit.config().register_window());
                    let device: Arc<dyn BusDevice> = match worker::of(&vm, &unit, base, option.worker) {
                        None => Arc::new(UnitWindow(unit.clone())),
                        Some(worker) => workers.entry(index).or_insert(worker).window(unit.clone()),
                    };
                    insert(&platform.mmio, base, window, device)?;
                    Ok(unit)
                };
                let further = wanted.further_units.iter().enumerate();
                let further =
                    further.map(|(index, it)| Ok(MadeUnit { unit: unit(index + 1, it.segment)?, parts: &it.parts }));
                let further = further.collect::<Result<_, Error>>()?;
                let units = Arc::new(Units::new(unit(0, 0)?, further, &buses, places));
                let remapper: Weak<dyn Remapper> = Arc::<Units>::downgrade(&units);
                interrupts.remap_by(remapper);
                Some(units)
            }
        };
        let bridge = assigned.bridge.clone();
        let peers = Arc::new(PeerMemory::new(assigned.guest.clone(), bridge.clone(), units.clone(), trace));
        let slots = Arc::new(KvmSlots::new(vm.clone(), first_free_slot, peers.clone()));
        for (index, unit) in units.iter().flat_map(|units| units.all()).enumerate() {
            let at = layout::unit_base(index);
            match (register_page::show(&slots, unit, at), workers.get(&index)) {
                (Ok(page), Some(worker)) => worker.watch(page),
                (Ok(_), None) => {}
                (Err(e), _) => log::warn!("the guest's reads of a remapping unit's registers will be exits: {e}"),
            }
        }
        let ports = Ports::new(platform.segments.first(), &buses.ports, &interrupts, units.as_deref())?;
        let mut plug = Plug {
            segments: platform.segments.clone(),
            ioapic: platform.ioapic.clone(),
            units: units.clone(),
            interrupts: interrupts.clone(),
            slots,
            doorbells: Arc::new(KvmDoorbells::new(vm.clone())),
            ram: ram.clone(),
            output,
            taken,
            bridge: assigned.bridge,
            software: assigned.software,
            breaker: assigned.breaker,
            opener: assigned.opener,
            input: None,
            assigned: Vec::new(),
        };
        let placed = plug.devices(&wanted.devices, names, places, &buses, assigned.functions)?;
        let of_host = placed.iter().filter_map(|device| {
            let bus = device.bridge.as_ref().map(|bridge| bridge.alias().sid.bus());
            device.host.map(|(_, group)| (device.id.as_str(), group, bus))
        });
        assign::report_groups(&of_host.collect::<Vec<_>>());
        // What the host's driver, or the guest before, left in them is not this guest's. All of a bus are open and
        // quiet now.
        platform.segments.reset();
        let no_place = |source: NoPlace| {
            let device = placed.iter().find(|device| device.requester == source.of);
            Error::NoPlace { id: device.map_or_else(|| shown(source.of), |device| device.id.clone()), source }
        };
        let fitting = platform.segments.fitting(wanted.memory, physical_bits).map_err(no_place)?;
        let tables = Tables {
            cpus: wanted.cpus,
            windows: match saved {
                Some(saved) => platform.segments.as_saved(fitting, &saved.windows())?,
                None => fitting,
            },
            root_ports: wanted.root_ports,
            last_bus: buses.last,
            remapping: units.as_ref().map(|units| Remapping {
                width: physical_bits,
                interrupts: units.rest().config().interrupt_remapping,
                device_tlbs: units.rest().config().device_tlb,
                integrated_tlbs: integrated_tlbs(&wanted.devices, places),
                units: units.describe(),
            }),
        };

        if let Payload::Image(_) = &payload {
            platform.tests = Some(ImageDevices::add(
                &platform.pio,
                &platform.mmio,
                &platform.ioapic,
                &control,
                wanted.memory,
                wanted.cpus,
            )?);
        }
        vcpu::register_kick()?;
        let buses = Buses {
            pio: platform.pio.clone(),
            mmio: platform.mmio.clone(),
            ioapic: platform.ioapic.clone(),
            ram: wanted.memory,
        };
        let model_of = |index: u8| saved.and_then(|saved| saved.models.get(usize::from(index)));
        let vcpus = (0..wanted.cpus).map(|index| vcpu::create(kvm, &vm, index, wanted.cpus, model_of(index)));
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;
        let mut machine = Self {
            threads: Vec::new(),
            control,
            entry: Arc::default(),
            payload,
            platform,
            placed,
            plug,
            ports,
            interrupts,
            units,
            workers: workers.into_values().collect(),
            bridge,
            peers,
            tables,
            ram,
            ram_size: wanted.memory,
            resets: 0,
            paused: false,
            unsure: None,
            dirty: dirty::Dirty::default(),
            vm,
            states: Arc::default(),
            models: vcpus.iter().map(|vcpu| vcpu.model.clone()).collect(),
            physical_bits,
        };
        if saved.is_none() {
            machine.load()?;
        }
        for vcpu in vcpus {
            let (control, entry, states) = (machine.control.clone(), machine.entry.clone(), machine.states.clone());
            match vcpu.start(control, buses.clone(), entry, states) {
                Ok(thread) => machine.threads.push(thread),
                Err(e) => {
                    machine.stop();
                    return Err(Error::Thread(e));
                }
            }
        }
        machine.share_vectors_out().map_err(Error::Interrupts)?;
        if saved.is_none() {
            machine.control.send(Errand::Reset);
        }
        Ok(machine)
    }

    /// Where input goes.
    pub fn input(&self) -> GuestInput {
        GuestInput { serial: self.platform.serial.clone(), console: self.plug.input.clone() }
    }

    /// The interrupts, for those that the unit blocks.
    pub fn interrupts(&self) -> &Arc<KvmInterrupts> {
        &self.interrupts
    }

    /// The assigned functions with their ids, for their events.
    pub fn assigned(&self) -> &[(String, Arc<VfioPci>)] {
        &self.plug.assigned
    }

    /// Writes the kernel and what describes the machine into RAM.
    fn load(&mut self) -> Result<(), Error> {
        let Tables { cpus, windows, root_ports, last_bus, remapping } = &self.tables;
        let description = acpi::Description {
            cpus: *cpus,
            windows,
            root_ports: *root_ports,
            last_bus: *last_bus,
            remapping: remapping.as_ref(),
        };
        let rsdp = acpi::write(&self.ram, &description)?;
        let start = self.payload.load(&self.ram, self.ram_size, rsdp)?;
        *self.entry.lock().unwrap() = start;
        if let Payload::Image(_) = self.payload {
            self.platform.segments.assign(windows);
        }
        Ok(())
    }

    /// Deals out what vectors need, now that all else is open.
    fn share_vectors_out(&self) -> std::io::Result<()> {
        let wants: Vec<_> = self.plug.assigned.iter().map(|(_, function)| function.vectors()).collect();
        if wants.is_empty() {
            return Ok(());
        }
        let room = open_files::room_for_vectors()?;
        open_files::report(wants.iter().map(|(_, vectors)| vectors).sum(), room);
        self.interrupts.share_out(open_files::shares(&wants, room.min(irq::MAX_VECTORS)));
        Ok(())
    }

    /// Starts the guest anew: vCPUs out, functions quiesced, then the unit, then the rest, then the boot state. What is
    /// paused stays so.
    pub fn reset(&mut self) -> Result<(), Error> {
        self.control.pause();
        if let Some(held) = self.unsure.take() {
            self.begin(held);
        }
        self.take_what_was_asked_for();
        // Rule 12: functions before the unit, else live DMA hits RAM untranslated.
        self.platform.segments.reset();
        self.units.iter().flat_map(|units| units.all()).for_each(|unit| unit.reset());
        self.platform.ioapic.reset();
        self.platform.power.reset();
        self.platform.serial.reset();
        self.platform.legacy.reset();
        if let Some(tests) = &self.platform.tests {
            tests.reset();
        }
        self.load()?;
        self.control.send(Errand::Reset);
        self.resets += 1;
        if !self.paused {
            self.control.resume();
        }
        Ok(())
    }

    /// Compares the guest's tables, the shadows, and what the host was handed. A trace gets the ledgers.
    pub fn audit(&self, trace: Option<&Trace>) -> Audit {
        let bridge = &self.bridge;
        let _unchanged = self.peers.hold();
        if let Some(trace) = trace {
            bridge.trace_ledgers(trace);
        }
        let of_unit = |unit: &Arc<Unit<Ram>>| {
            unit.audit(&mut |requester, space, granted, audit| bridge.audit(requester, space, granted, audit))
        };
        self.units.as_ref().map(|units| units.audit(of_unit)).unwrap_or_default()
    }

    /// Ends the vCPU threads.
    pub fn halt(&mut self) {
        self.control.quit();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
        self.workers.clear();
    }

    /// What the guest asked of its units is done, of vCPUs that do not run.
    fn serve_units(&self) {
        self.units.iter().flat_map(|units| units.all()).for_each(|unit| unit.serve_tails());
    }

    /// Ends the vCPU threads and quiesces the functions.
    pub fn stop(&mut self) {
        self.halt();
        self.platform.segments.reset();
        // The host's lines are given up while all functions are open: one that cannot be reset and is closed may raise
        // its own.
        self.platform.segments.quiesce();
    }

    /// What the whole run did so far.
    pub fn stats(&self) -> Stats {
        let devices = self.placed.iter().map(|placed| Device {
            id: placed.id.clone(),
            kind: placed.kind.name(),
            host: placed.host.map(|(bdf, _)| bdf.to_string()),
            addr: self.ports.address(placed),
            port: placed.port,
            group: placed.host.map(|(_, group)| group.0.into()),
            bridge: self
                .bridge
                .stats(placed.requester)
                .zip(self.bridge.backend(placed.requester))
                .map(|(counts, backend)| stats::Bridge { backend, counts }),
            dma_messages: placed.process.as_ref().and_then(|function| function.dma_messages()),
            pins: placed.pins.as_ref().map(|pins| pins.stats()),
        });
        let units = self.units.iter().flat_map(|units| units.all());
        let units = units.map(|unit| stats::Unit { id: units::name(unit), counts: unit.stats() });
        Stats {
            version: 1,
            guest_resets: self.resets,
            devices: devices.collect(),
            ports: self.ports.stats(&self.placed),
            units: units.collect(),
            ..Default::default()
        }
    }
}
