//! A bridge from PCI Express to conventional PCI (PCI Express to PCI bridge specification 1.0), with up to 32 devices
//! on the bus below it.
//!
//! A conventional bus has no source ids: whatever a function below asks for, the bridge asks for with the one id of its
//! secondary bus, device 0, function 0 (section 2.3). So all of them have one context entry, and Linux has them in one
//! group with the bridge (C-5). The name that this id goes by is [`PciePciBridge::alias`].
//!
//! The bridge forwards what its registers say, of that what gets through the bridges above it. Configuration requests
//! become conventional ones, which know 256 bytes of a function and no more.
//!
//! # Locks
//! As a root port's: `state` is held while functions below are reset and told, and while the unit is told of a new id;
//! `below` comes after it, and is held shared while configuration space below is accessed.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use vtd::{Requester, SourceId};

use super::bridge::power::Power;
use super::bridge::{Bridge, Path, header};
use super::config::CAP_EXPRESS;
use super::{ConfigSpace, Decoder, Identity, PciFunction};
use crate::host::SourceIds;

/// Version 2, PCI Express to PCI bridge.
const IS_BRIDGE: u16 = 2 | 7 << 4;
/// Role-based error reporting.
const DEVICE_CAPABILITIES: u32 = 1 << 15;
/// 2.5 GT/s, one lane: of the link, and what it runs at.
const LINK: u16 = 1 | 1 << 4;
/// Bytes of configuration space of a conventional function.
const CONVENTIONAL_SIZE: u16 = 0x100;

/// What a bridge is wired to.
pub struct PciePciBridgeWiring {
    /// The number of the bus below in the names of functions there.
    pub bus: u8,
    /// PCI segment.
    pub segment: u16,
    /// Knows where BARs are.
    pub decoder: Arc<Decoder>,
    /// Knows where I/O BARs are.
    pub port_decoder: Arc<Decoder>,
    /// Hears which id the functions below have; none without a remapping unit.
    pub ids: Option<Arc<dyn SourceIds>>,
}

/// The bridge.
pub struct PciePciBridge {
    wiring: PciePciBridgeWiring,
    state: Mutex<State>,
    below: RwLock<Below>,
}

#[derive(Default)]
struct Below {
    /// By device and function.
    functions: BTreeMap<u8, Arc<dyn PciFunction>>,
    /// Configuration requests reach them.
    answers: bool,
}

struct State {
    config: ConfigSpace,
    power: Power,
    /// What gets through the bridges above; `None`: nothing was said, and nothing does.
    above: Option<Path>,
    /// The bus below is held in reset.
    held: bool,
    id: Option<SourceId>,
    /// What the functions below were told.
    path: Option<Path>,
}

impl PciePciBridge {
    /// A bridge with nothing below it, which nothing gets to yet.
    pub fn new(wiring: PciePciBridgeWiring) -> Arc<Self> {
        let id = Identity { vendor: 0x1b36, device: 0x000e, revision: 0, class: 0x06_04_00, subsystem: (0, 0) };
        let mut config = header::new(&id);
        let mut body = [0; 0x3a];
        body[..2].copy_from_slice(&IS_BRIDGE.to_le_bytes());
        body[2..6].copy_from_slice(&DEVICE_CAPABILITIES.to_le_bytes());
        body[0x0a..0x0c].copy_from_slice(&LINK.to_le_bytes());
        body[0x10..0x12].copy_from_slice(&LINK.to_le_bytes());
        let express = config.add_capability(CAP_EXPRESS, &body, &[]);
        // Error reports, payload and request sizes: nothing here depends on them.
        config.allow(express + 8, &0x7fffu16.to_le_bytes());
        let power = Power::add(&mut config);
        let state = State { config, power, above: None, held: false, id: None, path: None };
        let bridge = Self { wiring, state: Mutex::new(state), below: RwLock::default() };
        bridge.tell_id(None);
        Arc::new(bridge)
    }

    /// The name of the id that the requests of all functions below carry.
    pub fn alias(&self) -> Requester {
        Requester { segment: self.wiring.segment, sid: SourceId::new(self.wiring.bus, 0, 0) }
    }

    /// The name of the function that is, or is to be, `function` of device `device` below.
    pub fn name_of(&self, device: u8, function: u8) -> Requester {
        Requester { sid: SourceId::new(self.wiring.bus, device, function), ..self.alias() }
    }

    /// The id that requests of functions below carry now; `None`: no bus number leads there.
    pub fn id(&self) -> Option<SourceId> {
        self.lock().id
    }

    /// Puts `function`, which has the name of that place, below the bridge. Gives it back if there is one already.
    ///
    /// # Errors
    /// The function, where the place is taken.
    pub fn insert(&self, device: u8, number: u8, function: Arc<dyn PciFunction>) -> Result<(), Arc<dyn PciFunction>> {
        let state = &mut *self.lock();
        let name = self.name_of(device, number).sid;
        let mut below = self.below.write().unwrap();
        if below.functions.contains_key(&name.devfn()) {
            return Err(function);
        }
        below.functions.insert(name.devfn(), function);
        drop(below);
        state.path = None;
        self.follow(state);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn tell_id(&self, id: Option<SourceId>) {
        if let Some(ids) = &self.wiring.ids {
            ids.renumbered(self.alias(), id);
        }
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        self.below.read().unwrap().functions.values().cloned().collect()
    }

    fn reset_below(&self) {
        let functions = self.functions();
        functions.iter().for_each(|function| function.quiesce());
        functions.iter().for_each(|function| function.reset());
    }

    /// Makes true what the registers, and the bridges above, say.
    fn follow(&self, state: &mut State) {
        let held = header::holds_in_reset(&state.config);
        let begins = held && !state.held;
        state.held = held;
        let is_on = state.power.is_on(&state.config);
        if held || !is_on {
            // From here on no configuration request is under way, and none gets through.
            self.below.write().unwrap().answers = false;
        }
        if begins {
            self.reset_below();
        }
        let own = header::path(&state.config, is_on && !held);
        let path = state.above.as_ref().map(|above| above.through(&own));
        let id = path.as_ref().and_then(|path| path.buses).map(|(secondary, _)| SourceId::new(secondary, 0, 0));
        if id != state.id {
            state.id = id;
            self.tell_id(id);
        }
        let path = path.unwrap_or(Path { memory: Vec::new(), ports: Vec::new(), buses: None, masters: false });
        if state.path.as_ref() != Some(&path) {
            for (sid, function) in self.below() {
                let name = Requester { sid, ..self.alias() };
                self.wiring.decoder.forward(name, &path.memory);
                self.wiring.port_decoder.forward(name, &path.ports);
                function.path_changed(&path);
            }
            state.path = Some(path);
        }
        if is_on && !held {
            self.below.write().unwrap().answers = true;
        }
    }
}

impl PciFunction for PciePciBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let state = &mut *self.lock();
        state.power.write(&mut state.config, offset, data);
        self.follow(state);
    }

    fn path_changed(&self, path: &Path) {
        let state = &mut *self.lock();
        state.above = Some(path.clone());
        self.follow(state);
    }

    fn as_bridge(&self) -> Option<&dyn Bridge> {
        Some(self)
    }

    fn quiesce(&self) {
        self.functions().iter().for_each(|function| function.quiesce());
    }

    /// With all that is below, which is reset first.
    fn reset(&self) {
        let state = &mut *self.lock();
        self.reset_below();
        state.config.reset();
        self.follow(state);
    }
}

impl Bridge for PciePciBridge {
    fn bus(&self) -> u8 {
        self.wiring.bus
    }

    fn buses(&self) -> (u8, u8) {
        header::buses(&self.lock().config)
    }

    fn with_below(&self, sid: SourceId, act: &mut dyn FnMut(&dyn PciFunction)) {
        // Below there is no further bridge.
        if header::id_below(&self.lock().config).is_none_or(|id| id.bus() != sid.bus()) {
            return;
        }
        // Held meanwhile, so that who resets them waits.
        let below = self.below.read().unwrap();
        if let Some(function) = below.functions.get(&sid.devfn()).filter(|_| below.answers) {
            act(&Conventional(&**function));
        }
    }

    fn below(&self) -> Vec<(SourceId, Arc<dyn PciFunction>)> {
        let below = self.below.read().unwrap();
        let name = |devfn: &u8| SourceId(self.alias().sid.0 | u16::from(*devfn));
        below.functions.iter().map(|(devfn, function)| (name(devfn), function.clone())).collect()
    }
}

/// A function as a conventional configuration request reaches it: without what lies beyond 256 bytes.
struct Conventional<'a>(&'a dyn PciFunction);

impl PciFunction for Conventional<'_> {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        match offset {
            CONVENTIONAL_SIZE.. => data.fill(0xff),
            _ => self.0.config_read(offset, data),
        }
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        if offset < CONVENTIONAL_SIZE {
            self.0.config_write(offset, data);
        }
    }
    fn reset(&self) {
        self.0.reset();
    }
}

#[cfg(test)]
#[path = "pcie_pci_bridge_test.rs"]
mod pcie_pci_bridge_test;
