//! The root of the PCI hierarchy: which function has which source id, and the two ways to configuration space.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock};

use serde_json::Value;
use vtd::{Requester, SourceId};

use super::config::{CONFIG_SIZE, HEADER_TYPE};
use super::{Decoder, HostBridge, Path, PciFunction, RootPort};
use crate::host::PowerControl;
use crate::saved::{Saves, Unfit, decode, encode, fits};
use crate::{Bus, BusDevice};

/// The IOAPIC pin (global system interrupt, 16 to 23) of pin `pin` (1 for INTA to 4 for INTD) of device `device` (0 to
/// 31) on the root bus. The DSDT's interrupt routing says the same.
pub const fn gsi_of(device: u8, pin: u8) -> u32 {
    16 + (device as u32 + pin as u32 - 1) % 8
}

/// Why a function could not get its address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SlotError {
    /// The address is 00.0 (the host bridge) or 1f.x.
    #[error("{0} is kept for the machine's own functions")]
    Reserved(SourceId),
    /// Another function is there.
    #[error("{0} is taken")]
    Taken(SourceId),
    /// Function 1 to 7 without a function 0: guests would not find it.
    #[error("{0} needs a function 0 in the same slot first")]
    NoFunctionZero(SourceId),
    /// Devices 01 to 1e are all taken.
    #[error("there is no free slot on bus 0")]
    Full,
}

/// A segment of the PCI hierarchy.
pub struct PciRoot {
    segment: u16,
    decoder: Arc<Decoder>,
    port_decoder: Arc<Decoder>,
    /// Of bus 0.
    functions: RwLock<BTreeMap<SourceId, Arc<dyn PciFunction>>>,
    ports: RwLock<Vec<Arc<RootPort>>>,
}

impl PciRoot {
    /// Segment 0: a root bus with the host bridge on it. Memory BARs of functions are decoded on `mmio`; I/O BARs
    /// nowhere.
    pub fn new(mmio: Arc<Bus>) -> Arc<Self> {
        Self::with_ports(mmio, Arc::default())
    }

    /// The same, with I/O BARs on `ports`.
    pub fn with_ports(mmio: Arc<Bus>, ports: Arc<Bus>) -> Arc<Self> {
        Self::of_segment(0, Arc::new(Decoder::new(mmio)), ports)
    }

    /// Another segment beside this one, with a root bus and a host bridge of its own. BARs of both are on one memory
    /// bus: where two have one address the first has it, whichever segment it is in. I/O BARs of it are decoded
    /// nowhere: there is one space of ports, which is segment 0's.
    pub fn beside(&self, segment: u16) -> Arc<Self> {
        Self::of_segment(segment, self.decoder(), Arc::default())
    }

    fn of_segment(segment: u16, decoder: Arc<Decoder>, ports: Arc<Bus>) -> Arc<Self> {
        let host_bridge: Arc<dyn PciFunction> = Arc::new(HostBridge::default());
        let functions = RwLock::new(BTreeMap::from([(SourceId::new(0, 0, 0), host_bridge)]));
        let port_decoder = Arc::new(Decoder::new(ports));
        Arc::new(Self { segment, decoder, port_decoder, functions, ports: RwLock::default() })
    }

    /// Which segment it is.
    pub fn segment(&self) -> u16 {
        self.segment
    }

    /// Puts `bridge` at `sid` of bus 0, with nothing above it.
    pub fn insert_bridge(&self, sid: SourceId, bridge: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        bridge.path_changed(&Path::of_root());
        self.insert(sid, bridge)
    }

    /// The decoder that functions put their memory BARs on the bus with.
    pub fn decoder(&self) -> Arc<Decoder> {
        self.decoder.clone()
    }

    /// The same for I/O BARs.
    pub fn port_decoder(&self) -> Arc<Decoder> {
        self.port_decoder.clone()
    }

    /// The requester of the function at `sid`.
    pub fn requester(&self, sid: SourceId) -> Requester {
        Requester { segment: self.segment, sid }
    }

    /// An address on bus 0 for a new function: `wanted` (device, function) if it may have it, else the lowest free slot
    /// from 01.0. Nothing is reserved: put the function there before asking again.
    pub fn allocate(&self, wanted: Option<(u8, u8)>) -> Result<SourceId, SlotError> {
        let functions = self.functions.read().unwrap();
        let Some((device, function)) = wanted else {
            let free = |device: &u8| (0..8).all(|f| !functions.contains_key(&SourceId::new(0, *device, f)));
            return (1..0x1f).find(free).map(|device| SourceId::new(0, device, 0)).ok_or(SlotError::Full);
        };
        let sid = SourceId::new(0, device, function);
        if device == 0 || device >= 0x1f || function > 7 {
            return Err(SlotError::Reserved(sid));
        }
        if functions.contains_key(&sid) {
            return Err(SlotError::Taken(sid));
        }
        if function != 0 && !functions.contains_key(&SourceId::new(0, device, 0)) {
            return Err(SlotError::NoFunctionZero(sid));
        }
        Ok(sid)
    }

    /// Puts `function` at `sid`.
    pub fn insert(&self, sid: SourceId, function: Arc<dyn PciFunction>) -> Result<(), SlotError> {
        let mut functions = self.functions.write().unwrap();
        if functions.contains_key(&sid) {
            return Err(SlotError::Taken(sid));
        }
        functions.insert(sid, function);
        Ok(())
    }

    /// Puts `port` where its requester says, and leads to what is below it.
    pub fn insert_port(&self, port: &Arc<RootPort>) -> Result<(), SlotError> {
        self.insert(port.requester().sid, port.clone())?;
        self.ports.write().unwrap().push(port.clone());
        Ok(())
    }

    /// The root ports, in the order in which they were put there.
    pub fn ports(&self) -> Vec<Arc<RootPort>> {
        self.ports.read().unwrap().clone()
    }

    /// The functions of bus 0, by source id. What is below bridges is found by them.
    pub fn functions(&self) -> Vec<(SourceId, Arc<dyn PciFunction>)> {
        self.functions.read().unwrap().iter().map(|(sid, function)| (*sid, function.clone())).collect()
    }

    /// Makes every function quiet.
    pub fn quiesce(&self) {
        for function in self.all() {
            function.quiesce();
        }
    }

    /// Makes every function quiet, then resets them (rule 12: before the remapping unit).
    pub fn reset(&self) {
        self.quiesce();
        for function in self.all() {
            function.reset();
        }
    }

    /// What is below ports, then what is on bus 0. Other bridges make quiet and reset what is below them.
    fn all(&self) -> Vec<Arc<dyn PciFunction>> {
        let below = self.ports().into_iter().filter_map(|port| port.function_below());
        below.chain(self.functions().into_iter().map(|(_, function)| function)).collect()
    }

    /// Does something with the function that a configuration request for `sid` reaches. Meanwhile no lock of the
    /// hierarchy is held, but that of its slot.
    fn with<T>(&self, sid: SourceId, act: impl FnOnce(&dyn PciFunction) -> T) -> Option<T> {
        if sid.bus() == 0 {
            let function = self.functions.read().unwrap().get(&sid).cloned();
            return function.map(|function| act(&*function));
        }
        // Where a guest gave one bus to two bridges, the first has it.
        let leads =
            |function: &&Arc<dyn PciFunction>| function.as_bridge().is_some_and(|bridge| bridge.leads_to(sid.bus()));
        let bridge = self.functions.read().unwrap().values().find(leads).cloned()?;
        let (mut act, mut result) = (Some(act), None);
        bridge.as_bridge()?.with_below(sid, &mut |function| result = act.take().map(|act| act(function)));
        result
    }

    /// Whether the slot of `sid`, a function 0, has further functions.
    fn is_multi_function(&self, sid: SourceId) -> bool {
        let is_there = |function| self.with(SourceId(sid.0 | function), |_| ()).is_some();
        sid.function() == 0 && (1..8).any(is_there)
    }

    /// Reads configuration space; ones where there is no function.
    pub fn config_read(&self, sid: SourceId, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if usize::from(offset) + data.len() > CONFIG_SIZE {
            return;
        }
        if self.with(sid, |function| function.config_read(offset, data)).is_none() {
            return;
        }
        // Whether a slot has several functions is our topology's business, not the function's.
        if let Some(header) = HEADER_TYPE.checked_sub(offset).and_then(|at| data.get_mut(usize::from(at))) {
            *header = *header & 0x7f | u8::from(self.is_multi_function(sid)) << 7;
        }
    }

    /// Writes configuration space; dropped where there is no function.
    pub fn config_write(&self, sid: SourceId, offset: u16, data: &[u8]) {
        if usize::from(offset) + data.len() > CONFIG_SIZE {
            return;
        }
        self.with(sid, |function| function.config_write(offset, data));
    }
}

/// The memory-mapped way to configuration space (ECAM): 1 MiB a bus, on the MMIO bus where MCFG says.
pub struct Ecam(Arc<PciRoot>);

impl Ecam {
    /// ECAM of `root`, from bus 0.
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self(root)
    }

    fn split(offset: u64) -> (SourceId, u16) {
        (SourceId((offset >> 12) as u16), (offset & 0xfff) as u16)
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, part) in data.chunks_mut(4).enumerate() {
            let (sid, register) = Self::split(offset + 4 * i as u64);
            self.0.config_read(sid, register, part);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        for (i, part) in data.chunks(4).enumerate() {
            let (sid, register) = Self::split(offset + 4 * i as u64);
            self.0.config_write(sid, register, part);
        }
    }
}

/// The port way to configuration space, at ports [`ConfigPorts::FIRST`] to [`ConfigPorts::LAST`]; the reset register
/// 0xcf9 lies between them and is here too.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    power: Arc<dyn PowerControl>,
    address: Mutex<u32>,
}

impl ConfigPorts {
    /// First port.
    pub const FIRST: u64 = 0xcf8;
    /// Last port.
    pub const LAST: u64 = 0xcff;
    /// The reset register, for the FADT.
    pub const RESET_PORT: u16 = 0xcf9;
    /// What resets the machine when it is written there, for the FADT.
    pub const RESET_VALUE: u8 = 0x06;

    /// The ports of `root`; a write to the reset register reaches `power`.
    pub fn new(root: Arc<PciRoot>, power: Arc<dyn PowerControl>) -> Self {
        Self { root, power, address: Mutex::new(0) }
    }

    /// What an access at `offset` into the ports reaches: `None` while the enable bit is clear.
    fn target(&self, offset: u64, len: usize) -> Option<(SourceId, u16)> {
        let address = *self.address.lock().unwrap();
        // Bits 1:0 are reserved, and zero on hardware. Images written for QEMU put the byte there instead of into the
        // port.
        let byte = offset.checked_sub(4)? | u64::from(address & 3);
        let inside = byte as usize + len <= 4;
        (address >> 31 == 1 && inside).then(|| (SourceId((address >> 8) as u16), (address & 0xfc) as u16 + byte as u16))
    }
}

impl Saves for ConfigPorts {
    fn save(&self) -> Value {
        encode(1, &*self.address.lock().unwrap())
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let address: u32 = decode(1, state)?;
        fits("address", address & !ADDRESS == 0)?;
        *self.address.lock().unwrap() = address;
        Ok(())
    }
}

/// What the address register keeps: bits 30:24 are reserved.
const ADDRESS: u32 = 0x80ff_ffff;

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.lock().unwrap().to_le_bytes());
        } else if offset == 1 && data.len() == 1 {
            data[0] = 0;
        } else if let Some((sid, register)) = self.target(offset, data.len()) {
            self.root.config_read(sid, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                *self.address.lock().unwrap() = u32::from_le_bytes([a, b, c, d]) & ADDRESS;
            }
            (1, &[value]) => {
                if value & 0x04 != 0 {
                    self.power.reset();
                }
            }
            _ => {
                if let Some((sid, register)) = self.target(offset, data.len()) {
                    self.root.config_write(sid, register, data);
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "root_test.rs"]
mod root_test;
