//! The BARs of the machine's functions, and the windows that have room for them.

use std::cmp::Reverse;

use devices::pci::PciRoot;
use devices::pci::config::{BAR0, COMMAND, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, HEADER_TYPE};
use vtd::SourceId;

use crate::boot::layout::{self, Window};

/// The smallest piece that a BAR is given: a page, so that two functions share none.
const PAGE: u64 = 0x1000;

/// A memory BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bar {
    /// Its function.
    pub sid: SourceId,
    /// Its number, 0 to 5.
    pub index: u8,
    /// Bytes, a power of two.
    pub size: u64,
    /// It may lie above 4 GiB.
    pub is_64: bool,
}

/// A BAR for which the guest has no place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("BAR {} of {} has no place in the guest: {}", .bar.index, named(.bar.size), .full)]
pub struct NoPlace {
    /// Which.
    pub bar: Bar,
    /// Where it was to go.
    pub full: Full,
}

/// Where there is no room left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Full {
    /// Below 4 GiB.
    #[error(
        "the {} below 4 GiB, which all 32-bit BARs share, are not enough; use fewer devices",
        named(LOW.last + 1 - LOW.first)
    )]
    Low,
    /// Above 4 GiB, with this many physical address bits.
    #[error(
        "this host's processor has addresses of {0} bits, and RAM and the other BARs leave too few; use less --memory or fewer devices"
    )]
    High(u8),
}

/// A number of bytes, for messages.
fn named(bytes: u64) -> String {
    let unit = (bytes.trailing_zeros() / 10).min(4);
    format!("{} {}", bytes >> (10 * unit), ["bytes", "KiB", "MiB", "GiB", "TiB"][unit as usize])
}

fn read32(root: &PciRoot, sid: SourceId, offset: u16) -> u32 {
    let mut data = [0; 4];
    root.config_read(sid, offset, &mut data);
    u32::from_le_bytes(data)
}

fn write32(root: &PciRoot, sid: SourceId, offset: u16, value: u32) {
    root.config_write(sid, offset, &value.to_le_bytes());
}

fn register(index: u8) -> u16 {
    BAR0 + 4 * u16::from(index)
}

/// Which bits of a register software can set. The register keeps its value.
fn writable(root: &PciRoot, sid: SourceId, offset: u16) -> u32 {
    let value = read32(root, sid, offset);
    write32(root, sid, offset, u32::MAX);
    let mask = read32(root, sid, offset);
    write32(root, sid, offset, value);
    mask
}

const ENABLES: u16 = COMMAND_IO | COMMAND_MEMORY;

/// Does something to a function's BARs while it does not decode them.
fn undecoded<T>(root: &PciRoot, sid: SourceId, what: impl FnOnce() -> T) -> T {
    let command = read32(root, sid, COMMAND) as u16;
    root.config_write(sid, COMMAND, &(command & !ENABLES).to_le_bytes());
    let result = what();
    root.config_write(sid, COMMAND, &command.to_le_bytes());
    result
}

/// The memory BARs of all functions, found as software finds them; of one behind a root port as if the bus below had
/// the port's number. No vCPU may run.
pub fn all(root: &PciRoot) -> Vec<Bar> {
    number_buses(root, true);
    let (bars, _) = found(root);
    number_buses(root, false);
    bars
}

/// Gives each bus below a port the port's number, or none.
fn number_buses(root: &PciRoot, numbered: bool) {
    for port in root.ports() {
        let number = if numbered { u32::from(port.number()) } else { 0 };
        write32(root, port.requester().sid, BUSES, number << 16 | number << 8);
    }
}

/// Primary, secondary and subordinate bus number of a bridge.
const BUSES: u16 = 0x18;

/// All functions that have BARs and are not bridges.
fn endpoints(root: &PciRoot) -> Vec<SourceId> {
    let on_root = root.functions().into_iter().map(|(sid, _)| sid);
    let is_bridge = |sid: &SourceId| read32(root, *sid, HEADER_TYPE & !3) >> 16 & 0x7f == 1;
    let below = root.ports().into_iter().filter(|port| port.function_below().is_some());
    on_root.filter(|sid| !is_bridge(sid)).chain(below.map(|port| port.name_below().sid)).collect()
}

/// An I/O BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ports {
    sid: SourceId,
    index: u8,
    /// How many, a power of two.
    count: u64,
}

/// The memory BARs and the I/O BARs of all functions.
fn found(root: &PciRoot) -> (Vec<Bar>, Vec<Ports>) {
    let (mut bars, mut ports) = (Vec::new(), Vec::new());
    for sid in endpoints(root) {
        undecoded(root, sid, || of(root, sid, &mut bars, &mut ports));
    }
    (bars, ports)
}

fn of(root: &PciRoot, sid: SourceId, bars: &mut Vec<Bar>, ports: &mut Vec<Ports>) {
    let mut index = 0;
    while index < 6 {
        let low = writable(root, sid, register(index));
        let is_64 = low & 0x7 == 0x4 && index < 5;
        let (this, is_io) = (index, low & 1 != 0);
        index += if is_64 { 2 } else { 1 };
        let high = if is_64 { writable(root, sid, register(this + 1)) } else { u32::MAX };
        let mask = u64::from(high) << 32 | u64::from(low & !0xf);
        // The upper half may be read-only: there are 64 Ki ports.
        let port_mask = low & 0xfffc;
        if is_io && port_mask != 0 {
            ports.push(Ports { sid, index: this, count: 1 << port_mask.trailing_zeros() });
        }
        // A register of which nothing can be set is no BAR: its mask has no bit in the lower half.
        if is_io || (low & !0xf == 0 && !is_64) || mask == 0 {
            continue;
        }
        bars.push(Bar { sid, index: this, size: 1 << mask.trailing_zeros(), is_64 });
    }
}

/// A window of which addresses are handed out from below.
#[derive(Clone, Copy)]
struct Room(Window);

impl Room {
    /// Of memory.
    fn take(&mut self, size: u64) -> Option<u64> {
        self.take_aligned(size.max(PAGE))
    }

    fn take_aligned(&mut self, size: u64) -> Option<u64> {
        self.take_spanning(size, size)
    }

    /// So many bytes from a multiple of `alignment` on.
    fn take_spanning(&mut self, size: u64, alignment: u64) -> Option<u64> {
        let first = self.0.first.checked_next_multiple_of(alignment)?;
        let last = first.checked_add(size - 1).filter(|last| *last <= self.0.last)?;
        // Beyond the last address there is nothing left to take.
        self.0.first = last.saturating_add(1);
        Some(first)
    }
}

/// Where BARs go, those first that have no choice, of them the largest.
fn in_order(bars: &[Bar]) -> Vec<Bar> {
    let mut sorted = bars.to_vec();
    sorted.sort_by_key(|bar| (bar.is_64, Reverse(bar.size), bar.sid, bar.index));
    sorted
}

/// The ports above those of the machine's own devices.
const PORTS: Window = Window { first: 0x1000, last: 0xffff };

const LOW: Window = Window { first: layout::PCI32_FIRST, last: layout::PCI32_LAST };

/// The window above 4 GiB that has room for `bars`, in a guest with `ram` bytes of RAM and `width` physical address
/// bits; `None` when RAM leaves none there, and none is needed.
///
/// # Errors
/// A BAR has no place. The largest of those.
pub fn window(bars: &[Bar], ram: u64, width: u8) -> Result<Option<Window>, NoPlace> {
    let wide: Vec<u64> = bars.iter().filter(|bar| bar.is_64).map(|bar| bar.size.max(PAGE)).collect();
    let window = layout::pci64_window(ram, width, &wide);
    let (mut low, mut high) = (Room(LOW), window.map(Room));
    for bar in in_order(bars) {
        // As guests do it: above 4 GiB what may be there.
        let above = high.as_mut().filter(|_| bar.is_64).and_then(|room| room.take(bar.size));
        if above.or_else(|| low.take(bar.size)).is_none() {
            return Err(NoPlace { bar, full: if bar.is_64 { Full::High(width) } else { Full::Low } });
        }
    }
    Ok(window)
}

/// Gives every BAR an address and sets Memory Enable, and I/O Enable where there is an I/O BAR, as firmware does.
/// 64-bit BARs go above 4 GiB only when they do not fit below. No vCPU may run.
pub fn assign(root: &PciRoot, above: Option<Window>) {
    let (mut low, mut high) = (Room(LOW), above.map(Room));
    number_buses(root, true);
    let (bars, mut ports) = found(root);
    let (bars, below): (Vec<Bar>, Vec<Bar>) = bars.into_iter().partition(|bar| bar.sid.bus() == 0);
    // What no port forwards.
    ports.retain(|bar| bar.sid.bus() == 0);
    assign_ports(root, &mut ports);
    for port in root.ports() {
        let sid = port.name_below().sid;
        let its: Vec<Bar> = below.iter().copied().filter(|bar| bar.sid == sid).collect();
        assign_behind(root, port.requester().sid, &its, &mut low);
    }
    for bar in in_order(&bars) {
        let place = low.take(bar.size).or_else(|| high.as_mut().filter(|_| bar.is_64)?.take(bar.size));
        let Some(address) = place else {
            // The start made sure that this does not happen.
            log::warn!("BAR {} of {} ({:#x} bytes) has no room", bar.index, bar.sid, bar.size);
            continue;
        };
        put(root, &bar, address);
    }
    for sid in endpoints(root) {
        let has_ports = ports.iter().any(|bar| bar.sid == sid);
        let enables = if has_ports { ENABLES } else { COMMAND_MEMORY };
        let command = read32(root, sid, COMMAND) as u16;
        root.config_write(sid, COMMAND, &(command | enables).to_le_bytes());
    }
}

/// Writes a BAR's address.
fn put(root: &PciRoot, bar: &Bar, address: u64) {
    undecoded(root, bar.sid, || {
        write32(root, bar.sid, register(bar.index), address as u32);
        if bar.is_64 {
            write32(root, bar.sid, register(bar.index + 1), (address >> 32) as u32);
        }
    });
}

/// What a bridge forwards begins and ends at multiples of this.
const MIB: u64 = 1 << 20;

/// Gives the BARs behind a bridge addresses below 4 GiB, which the bridge forwards.
fn assign_behind(root: &PciRoot, bridge: SourceId, bars: &[Bar], low: &mut Room) {
    let mut sorted = bars.to_vec();
    sorted.sort_by_key(|bar| (Reverse(bar.size), bar.index));
    let largest = sorted.iter().map(|bar| bar.size).max().unwrap_or(0).max(MIB);
    // Descending sizes need no gaps.
    let all: u64 = sorted.iter().map(|bar| bar.size.max(PAGE)).fold(0, u64::saturating_add);
    let len = all.checked_next_multiple_of(largest).unwrap_or(u64::MAX);
    let command = u32::from(COMMAND_MEMORY | COMMAND_MASTER);
    if sorted.is_empty() {
        write32(root, bridge, COMMAND, command);
        return;
    }
    let Some(first) = low.take_spanning(len, largest) else {
        log::warn!("the BARs behind {bridge} ({all:#x} bytes) have no room");
        return;
    };
    let mut room = Room(Window { first, last: first + (len - 1) });
    for bar in sorted {
        if let Some(address) = room.take(bar.size) {
            put(root, &bar, address);
        }
    }
    write32(root, bridge, MEMORY_WINDOW, (first >> 16) as u32 | ((first + (len - 1)) >> 16 << 16) as u32);
    write32(root, bridge, COMMAND, command);
}

/// Base and limit of what a bridge forwards, in MiB, in the upper 12 bits of each half.
const MEMORY_WINDOW: u16 = 0x20;

fn assign_ports(root: &PciRoot, bars: &mut [Ports]) {
    bars.sort_by_key(|bar| (Reverse(bar.count), bar.sid, bar.index));
    let mut room = Room(PORTS);
    for bar in bars {
        // One without an address is decoded nowhere.
        let Some(first) = room.take_aligned(bar.count) else {
            log::warn!("BAR {} of {} ({} ports) has no room", bar.index, bar.sid, bar.count);
            continue;
        };
        undecoded(root, bar.sid, || write32(root, bar.sid, register(bar.index), first as u32));
    }
}

#[cfg(test)]
#[path = "bars_test.rs"]
mod bars_test;
