//! The header of a PCI-to-PCI bridge (type 1; PCI Express base specification 6.0, section 7.5.1.3): bus numbers, what
//! it forwards downwards, and the reset of what is below it.

use vtd::SourceId;

use super::{Path, Range};
use crate::pci::config::{COMMAND, COMMAND_INTX_OFF, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, HEADER_TYPE};
use crate::pci::{ConfigSpace, Identity};

/// Primary, secondary and subordinate bus number, one byte each.
const BUSES: u16 = 0x18;
/// Base, and one byte further the limit, of ports.
const PORTS: u16 = 0x1c;
const SECONDARY_STATUS: u16 = 0x1e;
/// Base, and two bytes further the limit, of memory that is not prefetchable.
const MEMORY: u16 = 0x20;
/// The same of prefetchable memory.
const PREFETCHABLE: u16 = 0x24;
const PREFETCHABLE_BASE_UPPER: u16 = 0x28;
const PREFETCHABLE_LIMIT_UPPER: u16 = 0x2c;
const BRIDGE_CONTROL: u16 = 0x3e;
/// Bridge control: what is below is held in reset.
const SECONDARY_RESET: u16 = 1 << 6;

/// Configuration space of a bridge, with 16-bit addresses of ports and 64-bit addresses of prefetchable memory.
pub fn new(id: &Identity) -> ConfigSpace {
    let mut config = ConfigSpace::new(&Identity { subsystem: (0, 0), ..*id });
    config.put(HEADER_TYPE, &[1]);
    let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF | 0x0140;
    config.allow(COMMAND, &command.to_le_bytes());
    config.allow(BUSES, &[0xff; 3]);
    config.allow(PORTS, &[0xf0; 2]);
    config.clear_on_one(SECONDARY_STATUS, &0xf900u16.to_le_bytes());
    for register in [MEMORY, MEMORY + 2, PREFETCHABLE, PREFETCHABLE + 2] {
        config.allow(register, &0xfff0u16.to_le_bytes());
    }
    for register in [PREFETCHABLE, PREFETCHABLE + 2] {
        config.put(register, &[0x01, 0]);
    }
    config.allow(PREFETCHABLE_BASE_UPPER, &[0xff; 4]);
    config.allow(PREFETCHABLE_LIMIT_UPPER, &[0xff; 4]);
    // Parity and SERR# enables, which do nothing as no error is ever forwarded, and the reset.
    config.allow(BRIDGE_CONTROL, &(SECONDARY_RESET | 0x0003).to_le_bytes());
    config
}

/// Secondary and subordinate bus number.
pub fn buses(config: &ConfigSpace) -> (u8, u8) {
    let numbers = config.u32(BUSES).to_le_bytes();
    (numbers[1], numbers[2])
}

/// The source id of function 0 of device 0 on the bus below: `None` while no bus number leads there.
pub fn id_below(config: &ConfigSpace) -> Option<SourceId> {
    let (secondary, subordinate) = buses(config);
    // Bus 0 is the root's.
    (secondary != 0 && secondary <= subordinate).then(|| SourceId::new(secondary, 0, 0))
}

/// The addresses that are forwarded downwards. None while Memory Enable is clear.
pub fn forwarded(config: &ConfigSpace) -> Vec<Range> {
    if config.command() & COMMAND_MEMORY == 0 {
        return Vec::new();
    }
    // Both are in units of 1 MiB, whose lower bits count as zeros in a base and as ones in a limit.
    let ends = |register: u16| {
        let part = |at: u16| u64::from(config.u16(at) & 0xfff0) << 16;
        (part(register), part(register + 2) | 0xf_ffff)
    };
    let upper = |register: u16| u64::from(config.u32(register)) << 32;
    let (base, limit) = ends(PREFETCHABLE);
    let prefetchable = (base | upper(PREFETCHABLE_BASE_UPPER), limit | upper(PREFETCHABLE_LIMIT_UPPER));
    // A base above its limit: nothing is forwarded.
    [ends(MEMORY), prefetchable].into_iter().filter(|(base, limit)| base <= limit).collect()
}

/// The ports that are forwarded downwards. None while I/O Enable is clear.
pub fn forwarded_ports(config: &ConfigSpace) -> Vec<Range> {
    let [base, limit] = config.u16(PORTS).to_le_bytes().map(|byte| u64::from(byte & 0xf0) << 8);
    let enabled = config.command() & COMMAND_IO != 0 && base <= limit;
    if enabled { vec![(base, limit | 0xfff)] } else { Vec::new() }
}

/// What gets through a bridge that is in D0, or is not.
pub fn path(config: &ConfigSpace, is_on: bool) -> Path {
    let (secondary, subordinate) = buses(config);
    Path {
        memory: if is_on { forwarded(config) } else { Vec::new() },
        ports: if is_on { forwarded_ports(config) } else { Vec::new() },
        buses: id_below(config).map(|_| (secondary, subordinate)),
        masters: is_on && config.command() & COMMAND_MASTER != 0,
    }
}

/// Whether what is below is held in reset.
pub fn holds_in_reset(config: &ConfigSpace) -> bool {
    config.u16(BRIDGE_CONTROL) & SECONDARY_RESET != 0
}
