//! The state of a machine: what is held, saved and put back, and in which order (A-14).
//!
//! ```text
//!  saved     vCPUs parked ► their last accesses completed ► devices and timers held ► devices, unit ► vCPUs
//!  put back  devices held ► RAM ► root ports ► unit ► functions, the rest ► IOAPIC ► vCPUs ► devices go on
//! ```
//!
//! Ports first: they say which id a function has. The unit before the IOAPIC, whose routes it remaps; the levels of
//! lines before the IOAPIC, too, where they would be edges. vCPUs last: their local APICs have every interrupt that was
//! sent.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::pci::PciFunction;
use devices::saved::{Saves, Unfit};
use kvm_bindings::kvm_clock_data;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vtd::Requester;

use super::{Error, Machine};
use crate::config::{DeviceOption, RootSlot, Slot, shown};
use crate::kvm::vcpu_state::{Model, VcpuState};
use crate::machine::control::Errand;

/// What a machine is made from again, before it gets its state.
#[derive(Serialize, Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// What `causeway run` was told of it, with every device that is there now.
    pub options: Vec<String>,
    /// Bits of a physical address.
    pub physical_bits: u8,
    /// The window for BARs above 4 GiB, as the ACPI tables name it: first and last address.
    pub pci64: Option<[u64; 2]>,
    /// The same of the segments after the first, in their order. Machines with one segment say nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub further_pci64: Vec<Option<[u64; 2]>>,
    /// The vCPUs, in their order.
    pub models: Vec<Model>,
}

impl Description {
    /// The windows above 4 GiB of all segments.
    pub(super) fn windows(&self) -> Vec<Option<[u64; 2]>> {
        std::iter::once(self.pci64).chain(self.further_pci64.iter().copied()).collect()
    }
}

/// What a machine is in.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    clock: kvm_clock_data,
    vcpus: Vec<VcpuState>,
    units: Vec<vtd::State>,
    /// By number.
    ports: BTreeMap<u8, PortState>,
    /// By place: an address on a bus 0, that of segment 0 without its number, or a root port.
    functions: BTreeMap<String, Value>,
    ioapic: Value,
    /// The devices that every machine has, and those of images.
    platform: BTreeMap<String, Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortState {
    state: Value,
    /// The guest was asked for what is in the slot.
    asked: bool,
}

/// A function of the machine that is not a root port.
struct Found {
    /// Where it is: its address on a bus 0, or the port that it is behind.
    place: String,
    /// Its device for people: `edu0 (edu)`.
    name: String,
    function: Arc<dyn PciFunction>,
    /// Another process or the host has its state.
    is_elsewhere: bool,
    /// A process.
    of_process: bool,
}

/// Physical address bits of the guest: those of the machine that was saved, if this host has as many.
pub(super) fn physical_bits(saved: Option<&Description>, here: u8) -> Result<u8, Error> {
    match saved.map(|saved| saved.physical_bits) {
        Some(saved) if saved > here => Err(Error::PhysicalBits { saved, here }),
        Some(saved) => Ok(saved),
        None => Ok(here),
    }
}

fn of(name: &str) -> impl Fn(Unfit) -> String {
    move |why| format!("{name}: {why}")
}

/// A machine of which nothing moves, until [`Machine::let_go`].
#[must_use]
pub(super) struct Held(());

impl Machine {
    /// What it is made from; `options` are those of its command line.
    pub fn description(&self, options: Vec<String>) -> Description {
        let mut windows = self.tables.windows.iter().map(|it| it.high.map(|window| [window.first, window.last]));
        let pci64 = windows.next().flatten();
        let (physical_bits, models) = (self.physical_bits, self.models.clone());
        Description { options, physical_bits, pci64, further_pci64: windows.collect(), models }
    }

    /// The devices that are there now, each with its id and its place.
    pub fn device_options(&self) -> Vec<DeviceOption> {
        let option = |placed: &super::Placed| {
            let Requester { segment, sid } = placed.requester;
            let addr = RootSlot { segment, slot: Slot { device: sid.device(), function: sid.function() } };
            let addr = Some(addr).filter(|_| placed.port.is_none());
            // A machine with a bridge is not saved.
            let (port, bus) = (placed.port, None);
            DeviceOption { id: Some(placed.id.clone()), addr, port, bus, kind: placed.kind.clone() }
        };
        self.placed.iter().map(option).collect()
    }

    /// The width of the guest's addresses that its unit was made with.
    pub fn unit_width(&self) -> Option<u8> {
        self.units.as_ref().map(|units| units.rest().config().aw_bits)
    }

    fn found(&self) -> Vec<Found> {
        let segments = &self.platform.segments;
        let ports = segments.first().ports();
        let is_port = |name| ports.iter().any(|port| port.requester() == name);
        let on_root = segments.functions().into_iter().filter(|(name, _)| !is_port(*name));
        let on_root = on_root.map(|(name, function)| (shown(name), name, function));
        let below = ports.iter().filter_map(|port| {
            let function = port.function_below()?;
            Some((format!("port {}", port.number()), port.name_below(), function))
        });
        let found = on_root.chain(below).map(|(place, requester, function)| {
            let placed = self.placed.iter().find(|placed| placed.requester == requester);
            let name = placed.map_or_else(|| place.clone(), |placed| format!("{} ({})", placed.id, placed.kind.name()));
            let is_elsewhere = placed.is_some_and(|placed| placed.host.is_some() || placed.process.is_some());
            let of_process = placed.is_some_and(|placed| placed.process.is_some());
            Found { place, name, function, is_elsewhere, of_process }
        });
        found.collect()
    }

    fn platform_saves(&self) -> Vec<(&'static str, &dyn Saves)> {
        let platform = &self.platform;
        let mut all: Vec<(&'static str, &dyn Saves)> =
            vec![("serial", &*platform.serial), ("power", &*platform.power), ("config-ports", &*platform.config)];
        all.extend(platform.legacy.saves());
        all.extend(platform.tests.iter().flat_map(|tests| tests.saves()));
        all
    }

    /// Why it cannot be saved, whatever it does at the moment.
    ///
    /// # Errors
    /// A sentence with the device, and what helps.
    pub(super) fn can_be_saved(&self) -> Result<(), String> {
        match self.found().iter().find(|found| found.function.saves().is_none()) {
            None => Ok(()),
            Some(Found { name, is_elsewhere: true, of_process, .. }) => Err(format!(
                "{name} cannot be saved: its state is {}; put it behind a root port, and `remove` it before",
                if *of_process { "in a process that has no migration, or is gone" } else { "in the host" }
            )),
            Some(Found { name, .. }) => Err(format!("{name} cannot be saved; start the machine without it")),
        }
    }

    /// Brings the machine to rest: no vCPU runs, and nothing of any device is under way.
    ///
    /// # Errors
    /// A sentence with the reason. Then it goes on as before.
    pub(super) fn hold(&mut self) -> Result<Held, String> {
        self.control.pause();
        // An access that completes reaches devices, and so perhaps another vCPU.
        self.control.send(Errand::Settle);
        self.serve_units();
        if self.control.is_stopping() {
            self.let_go(Held(()));
            return Err("the guest ends or resets just now; ask again when it runs".to_owned());
        }
        let held = self.hold_devices(|_| true);
        if let Err(why) = held {
            self.let_go(Held(()));
            return Err(why);
        }
        Ok(Held(()))
    }

    fn hold_devices(&self, which: fn(&Found) -> bool) -> Result<(), String> {
        for Found { name, function, .. } in self.found().into_iter().filter(which) {
            if let Some(saves) = function.saves() {
                saves.hold().map_err(|why| format!("{name} cannot be saved: {why}"))?;
            }
        }
        self.platform.legacy.hold();
        Ok(())
    }

    fn release_devices(&self) {
        self.platform.legacy.go_on();
        self.platform.ioapic.go_on();
        for found in self.found() {
            found.function.saves().into_iter().for_each(Saves::go_on);
        }
    }

    /// The machine goes on, unless it is paused. One that may be elsewhere stays held.
    pub(super) fn let_go(&mut self, _: Held) {
        if self.unsure.is_some() {
            return;
        }
        self.release_devices();
        if !self.paused {
            self.control.resume();
        }
    }

    /// The state of a machine that is held.
    ///
    /// # Errors
    /// A sentence with what has none.
    pub(super) fn state(&self, _: &Held) -> Result<MachineState, String> {
        let functions = self.found().into_iter().map(|Found { place, name, function, .. }| {
            let saves = function.saves().ok_or_else(|| format!("{name} cannot be saved"))?;
            saves.gather().map_err(|why| format!("{name} cannot be saved: {why}"))?;
            Ok::<_, String>((place, saves.save()))
        });
        let functions = functions.collect::<Result<_, _>>()?;
        let ports = self.platform.segments.first().ports();
        let port = |number: u8, state| PortState { state, asked: self.ports.asked(number).is_some() };
        let ports = ports.iter().map(|of| (of.number(), port(of.number(), Saves::save(&**of)))).collect();
        let platform = self.platform_saves().into_iter().map(|(name, saves)| (name.to_owned(), saves.save())).collect();
        let ioapic = self.platform.ioapic.save();
        let units = self.units.iter().flat_map(|units| units.all()).map(|unit| unit.save()).collect();
        self.control.send(Errand::Save);
        let vcpus = self.states.take()?;
        let mut clock = self.vm.get_clock().map_err(|e| format!("KVM_GET_CLOCK: {e}"))?;
        // Not its relation to this host's time: the guest's stands still.
        (clock.flags, clock.realtime, clock.host_tsc) = (0, 0, 0);
        Ok(MachineState { clock, vcpus, units, ports, functions, ioapic, platform })
    }

    /// Puts a state into a machine that was made from its description, that has not run, and whose RAM is as it was.
    /// Its devices are held until [`Machine::begin`].
    ///
    /// # Errors
    /// A sentence with what does not fit. Then the machine is not to be run.
    pub(super) fn restore(&mut self, state: MachineState) -> Result<Held, String> {
        // A function of another process is as new, and begins nothing. While it is stopped its process may refuse to
        // hear of memory.
        self.hold_devices(|found| !found.is_elsewhere)?;
        self.put_back(state)?;
        Ok(Held(()))
    }

    /// The devices of a machine that was put back go on; its vCPUs follow.
    pub(super) fn begin(&mut self, _: Held) {
        self.release_devices();
    }

    fn put_back(&mut self, state: MachineState) -> Result<(), String> {
        let MachineState { clock, vcpus, units, mut ports, mut functions, ioapic, mut platform } = state;
        for port in self.platform.segments.first().ports() {
            let name = format!("root port {}", port.number());
            let saved = ports.remove(&port.number()).ok_or_else(|| format!("{name}: its state is missing"))?;
            Saves::restore(&*port, &saved.state).map_err(of(&name))?;
            if saved.asked {
                self.ports.ask(port.number());
            }
        }
        let there: Vec<_> = self.units.iter().flat_map(|there| there.all()).collect();
        if there.len() != units.len() {
            return Err(format!("{} remapping units were saved, and there are {}", units.len(), there.len()));
        }
        for (unit, state) in there.into_iter().zip(units) {
            unit.restore(state).map_err(|e| format!("the remapping unit {}: {e}", super::units::name(unit)))?;
        }
        for Found { place, name, function, .. } in self.found() {
            let state = functions.remove(&place).ok_or_else(|| format!("{name}: its state is missing"))?;
            let saves = function.saves().ok_or_else(|| format!("{name}: it cannot be put back"))?;
            saves.restore(&state).map_err(of(&name))?;
        }
        for (name, saves) in self.platform_saves() {
            let state = platform.remove(name).ok_or_else(|| format!("{name}: its state is missing"))?;
            saves.restore(&state).map_err(of(name))?;
        }
        let numbers = ports.into_keys().map(|number| format!("root port {number}"));
        if let Some(name) = numbers.chain(functions.into_keys()).chain(platform.into_keys()).next() {
            return Err(format!("{name}: this machine has no such device"));
        }
        self.platform.ioapic.restore(&ioapic).map_err(of("ioapic"))?;
        if vcpus.len() != usize::from(self.tables.cpus) {
            return Err(format!("the states of {} vCPUs were saved, of {}", vcpus.len(), self.tables.cpus));
        }
        self.states.give(vcpus);
        self.control.send(Errand::Restore);
        self.states.check()?;
        self.vm.set_clock(&clock).map_err(|e| format!("KVM_SET_CLOCK: {e}"))
    }
}

#[cfg(test)]
impl MachineState {
    /// That of a machine of nothing, for tests of what it is written to.
    pub(super) fn of_nothing() -> Self {
        let (ports, functions, platform) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (clock, vcpus, ioapic) = (kvm_clock_data::default(), Vec::new(), Value::Null);
        Self { clock, vcpus, units: Vec::new(), ports, functions, ioapic, platform }
    }
}
