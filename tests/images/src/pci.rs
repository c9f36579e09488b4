//! PCI: configuration space by ports, the scan of a bus, and bridges.

use crate::x86::{self, inl, outl};

/// Source id of a function: bus in bits 15:8, device in 7:3, function in 2:0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SourceId(pub u16);

/// Offset of the command register.
pub const COMMAND: u16 = 0x04;
/// Command: Memory Enable.
pub const MEMORY: u32 = 1 << 1;
/// Command: Bus Master.
pub const MASTER: u32 = 1 << 2;
/// Offset of BAR 0.
pub const BAR0: u16 = 0x10;
const CAPABILITIES: u16 = 0x34;
/// Where Causeway's machine has configuration space in memory.
const ECAM: u64 = 0xe000_0000;
/// Offset of the first extended capability.
const EXTENDED: u16 = 0x100;

impl SourceId {
    fn select(self, offset: u16) {
        outl(0xcf8, 1 << 31 | u32::from(self.0) << 8 | u32::from(offset & 0xfc));
    }

    /// Reads four bytes of configuration space.
    pub fn read(self, offset: u16) -> u32 {
        self.select(offset);
        inl(0xcfc)
    }

    /// Writes four bytes of configuration space.
    pub fn write(self, offset: u16, value: u32) {
        self.select(offset);
        outl(0xcfc, value);
    }

    /// Reads four bytes of extended configuration space.
    pub fn read_extended(self, offset: u16) -> u32 {
        x86::read(ECAM + (u64::from(self.0) << 12) + u64::from(offset))
    }

    /// Writes four bytes of extended configuration space.
    pub fn write_extended(self, offset: u16, value: u32) {
        x86::write(ECAM + (u64::from(self.0) << 12) + u64::from(offset), value);
    }

    /// Sets and clears bits of the command register.
    pub fn command(self, set: u32, clear: u32) {
        let command = self.read(COMMAND) & 0xffff;
        self.write(COMMAND, command & !clear | set);
    }

    /// The offset of the extended capability with this id.
    pub fn extended_capability(self, id: u16) -> Option<u16> {
        let mut at = EXTENDED;
        // A list of so many would fill configuration space.
        for _ in 0..0x3c0 {
            let header = self.read_extended(at);
            if matches!(header, 0 | u32::MAX) {
                return None;
            }
            if header as u16 == id {
                return Some(at);
            }
            at = (header >> 20 & 0xffc) as u16;
            if at < EXTENDED {
                return None;
            }
        }
        None
    }

    /// The offset of the capability with this id.
    pub fn capability(self, id: u8) -> Option<u16> {
        capability(&|offset| self.read(offset), id)
    }
}

/// The offset of the capability with this id, in configuration space that `read` reads.
pub fn capability(read: &dyn Fn(u16) -> u32, id: u8) -> Option<u16> {
    let mut at = (read(CAPABILITIES) & 0xfc) as u16;
    // A list of 48 capabilities would fill configuration space.
    for _ in 0..48 {
        if at == 0 {
            return None;
        }
        let header = read(at);
        if header as u8 == id {
            return Some(at);
        }
        at = (header >> 8 & 0xfc) as u16;
    }
    None
}

/// A function's configuration space in memory: of one in any segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InMemory(u64);

impl InMemory {
    /// Of the function at `sid` of the segment whose bus 0 is at `ecam`.
    pub fn new(ecam: u64, sid: SourceId) -> Self {
        Self(ecam + (u64::from(sid.0) << 12))
    }

    /// Reads four bytes.
    pub fn read(self, offset: u16) -> u32 {
        x86::read(self.0 + u64::from(offset))
    }

    /// Writes four bytes.
    pub fn write(self, offset: u16, value: u32) {
        x86::write(self.0 + u64::from(offset), value);
    }
}

/// The functions of `bus` with this vendor and device, in the order of their addresses.
pub fn find(bus: u8, vendor: u16, device: u16) -> impl Iterator<Item = SourceId> {
    let wanted = u32::from(device) << 16 | u32::from(vendor);
    let first = u16::from(bus) << 8;
    (first..=first | 0xff).map(SourceId).filter(move |function| function.read(0) == wanted)
}

/// Offset of primary, secondary and subordinate bus number.
const BUSES: u16 = 0x18;
/// Offset of the interrupt line; the bridge's control register is above it.
const BRIDGE_CONTROL: u16 = 0x3c;
/// Vendor and device of Causeway's root ports and of its PCIe-to-PCI bridge.
const BRIDGES: [(u16, u16); 2] = [(0x1b36, 0x000c), (0x1b36, 0x000e)];

impl SourceId {
    /// The root ports of Causeway's machine.
    pub fn root_ports() -> impl Iterator<Item = Self> {
        find(0, BRIDGES[0].0, BRIDGES[0].1)
    }

    /// The PCIe-to-PCI bridges on `bus`.
    pub fn bridges(bus: u8) -> impl Iterator<Item = Self> {
        find(bus, BRIDGES[1].0, BRIDGES[1].1)
    }

    /// The bus below a bridge, and the last one that it leads to.
    pub fn buses(self) -> (u8, u8) {
        let [_, secondary, subordinate, _] = self.read(BUSES).to_le_bytes();
        (secondary, subordinate)
    }

    /// Gives the bus below a bridge its number, and those further down.
    pub fn set_buses(self, secondary: u8, subordinate: u8) {
        self.write(BUSES, u32::from_le_bytes([0, secondary, subordinate, 0]));
    }

    /// Holds what is below a bridge in reset, or lets go of it.
    pub fn hold_in_reset(self, hold: bool) {
        let control = self.read(BRIDGE_CONTROL) & !(1 << 22);
        self.write(BRIDGE_CONTROL, control | u32::from(hold) << 22);
    }
}
