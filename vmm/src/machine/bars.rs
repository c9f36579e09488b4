//! The BARs of the machine's functions, and the windows that have room for them.

use std::cmp::Reverse;

use devices::pci::config::{BAR0, COMMAND, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, HEADER_TYPE};
use devices::pci::{PciFunction, PciRoot};
use vtd::{Requester, SourceId};

use crate::boot::layout::{self, BarWindows, Window};
use crate::config::shown;

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
    /// It has addresses of 64 bits.
    pub is_64: bool,
    /// It may lie above 4 GiB. Behind a bridge only what is prefetchable does.
    pub may_be_high: bool,
}

/// A BAR for which the guest has no place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("BAR {} of {} has no place in the guest: {}", .bar.index, named(.bar.size), .full)]
pub struct NoPlace {
    /// Whose it is.
    pub of: Requester,
    /// Which.
    pub bar: Bar,
    /// Where it was to go.
    pub full: Full,
}

/// Where there is no room left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Full {
    /// In these bytes below 4 GiB.
    #[error("the {} below 4 GiB, which all 32-bit BARs of a segment share, are not enough; use fewer devices", named(*.0))]
    Low(u64),
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

/// The memory BARs of all functions, found as software finds them; of one behind a bridge as if the bus below had the
/// number in its name. No vCPU may run.
pub fn all(root: &PciRoot) -> Vec<Bar> {
    number_buses(root, true);
    let (bars, _) = found(root);
    number_buses(root, false);
    bars
}

/// Primary, secondary and subordinate bus number of a bridge.
const BUSES: u16 = 0x18;

/// Gives each bus below a bridge the number in the names of functions there, or none.
fn number_buses(root: &PciRoot, numbered: bool) {
    for (sid, function) in root.functions() {
        number_below(root, sid, &*function, numbered);
    }
}

/// Gives back the last bus number below.
fn number_below(root: &PciRoot, sid: SourceId, function: &dyn PciFunction, numbered: bool) -> u8 {
    let Some(bridge) = function.as_bridge() else { return 0 };
    let bus = bridge.bus();
    let write = |last: u8| {
        let number = if numbered { u32::from(last) << 16 | u32::from(bus) << 8 | u32::from(sid.bus()) } else { 0 };
        write32(root, sid, BUSES, number);
    };
    // What is further down is found by its numbers before the bridge above it has none any more.
    if numbered {
        write(u8::MAX);
    }
    let below = bridge.below();
    let last = below.iter().map(|(sid, function)| number_below(root, *sid, &**function, numbered)).max();
    let last = last.unwrap_or(0).max(bus);
    write(last);
    last
}

/// All functions that have BARs and are not bridges.
fn endpoints(root: &PciRoot) -> Vec<SourceId> {
    let mut found = Vec::new();
    root.functions().iter().for_each(|(sid, function)| endpoints_in(*sid, &**function, &mut found));
    let is_bridge = |sid: &SourceId| read32(root, *sid, HEADER_TYPE & !3) >> 16 & 0x7f == 1;
    found.retain(|sid| !is_bridge(sid));
    found
}

fn endpoints_in(sid: SourceId, function: &dyn PciFunction, found: &mut Vec<SourceId>) {
    match function.as_bridge() {
        None => found.push(sid),
        Some(bridge) => bridge.below().iter().for_each(|(sid, below)| endpoints_in(*sid, &**below, found)),
    }
}

/// A bridge at `sid`, and those below it, outermost first; none if it is no bridge.
fn bridges_in(sid: SourceId, function: &dyn PciFunction) -> Vec<SourceId> {
    let Some(bridge) = function.as_bridge() else { return Vec::new() };
    let below = bridge.below();
    let further = below.iter().flat_map(|(sid, function)| bridges_in(*sid, &**function));
    std::iter::once(sid).chain(further).collect()
}

/// What it reads is the same however often.
const PREFETCHABLE: u32 = 8;

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
        let may_be_high = is_64 && (sid.bus() == 0 || low & PREFETCHABLE != 0);
        bars.push(Bar { sid, index: this, size: 1 << mask.trailing_zeros(), is_64, may_be_high });
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
    sorted.sort_by_key(|bar| (bar.may_be_high, Reverse(bar.size), bar.sid, bar.index));
    sorted
}

/// The ports above those of the machine's own devices.
const PORTS: Window = Window { first: 0x1000, last: 0xffff };

/// The windows that have room for the BARs of each of `segments`, segment 0 first, in a guest with `ram` bytes of RAM
/// and `width` physical address bits; none above 4 GiB when RAM and the other segments leave none there, and none is
/// needed.
///
/// # Errors
/// A BAR has no place. The largest of those.
pub fn windows(segments: &[(u16, Vec<Bar>)], ram: u64, width: u8) -> Result<Vec<BarWindows>, NoPlace> {
    let last = segments.iter().map(|(segment, _)| *segment).max().unwrap_or(0);
    let mut end = layout::high_end(ram);
    let of_segment = |(segment, bars): &(u16, Vec<Bar>)| {
        let low = layout::pci32_window(*segment, last);
        let wide: Vec<u64> = bars.iter().filter(|bar| bar.may_be_high).map(|bar| bar.size.max(PAGE)).collect();
        // Only the first one is there for what may come.
        let high = Some(&wide).filter(|wide| *segment == 0 || !wide.is_empty());
        let high = high.and_then(|wide| layout::pci64_window(end, width, wide));
        end = high.map_or(end, |window| window.last + 1);
        let windows = BarWindows { segment: *segment, low, high };
        fit(bars, windows, width).map(|()| windows)
    };
    segments.iter().map(of_segment).collect()
}

/// Whether these BARs of a segment have room.
fn fit(bars: &[Bar], windows: BarWindows, width: u8) -> Result<(), NoPlace> {
    let (mut low, mut high) = (Room(windows.low), windows.high.map(Room));
    for bar in in_order(bars) {
        // As guests do it: above 4 GiB what may be there.
        let above = high.as_mut().filter(|_| bar.may_be_high).and_then(|room| room.take(bar.size));
        if above.or_else(|| low.take(bar.size)).is_none() {
            let of = Requester { segment: windows.segment, sid: bar.sid };
            let bytes = windows.low.last + 1 - windows.low.first;
            return Err(NoPlace { of, bar, full: if bar.may_be_high { Full::High(width) } else { Full::Low(bytes) } });
        }
    }
    Ok(())
}

/// Gives every BAR an address and sets Memory Enable, and I/O Enable where there is an I/O BAR, as firmware does.
/// 64-bit BARs go above 4 GiB only when they do not fit below. Bridges forward what is below them. No vCPU may run.
pub fn assign(root: &PciRoot, windows: &BarWindows) {
    // There is one space of ports, which is segment 0's.
    let ports = Some(Room(PORTS)).filter(|_| root.segment() == 0);
    let mut rooms = Rooms { low: Room(windows.low), high: windows.high.map(Room), ports };
    number_buses(root, true);
    let (mut bars, mut ports) = found(root);
    for (sid, function) in root.functions() {
        let bridges = bridges_in(sid, &*function);
        if bridges.is_empty() {
            continue;
        }
        let mut below = Vec::new();
        endpoints_in(sid, &*function, &mut below);
        let its_bars = bars.extract_if(.., |bar| below.contains(&bar.sid)).collect();
        let its_ports = ports.extract_if(.., |bar| below.contains(&bar.sid)).collect();
        assign_behind(root, &bridges, its_bars, its_ports, &mut rooms);
    }
    if let Some(room) = &mut rooms.ports {
        assign_ports(root, ports, room);
    }
    for bar in in_order(&bars) {
        let place = rooms.low.take(bar.size);
        let place = place.or_else(|| rooms.high.as_mut().filter(|_| bar.may_be_high)?.take(bar.size));
        let Some(address) = place else {
            // The start made sure that this does not happen.
            log::warn!("BAR {} of {} ({:#x} bytes) has no room", bar.index, shown(root.requester(bar.sid)), bar.size);
            continue;
        };
        put(root, &bar, address);
    }
    let (_, ports) = found(root);
    for sid in endpoints(root) {
        let has_ports = rooms.ports.is_some() && ports.iter().any(|bar| bar.sid == sid);
        let enables = if has_ports { ENABLES } else { COMMAND_MEMORY };
        let command = read32(root, sid, COMMAND) as u16;
        root.config_write(sid, COMMAND, &(command | enables).to_le_bytes());
    }
}

/// What is left of the windows.
struct Rooms {
    low: Room,
    high: Option<Room>,
    ports: Option<Room>,
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

/// What a bridge forwards of memory begins and ends at multiples of this.
const MIB: u64 = 1 << 20;
/// The same of ports.
const PORT_GRAIN: u64 = 1 << 12;

/// Base and limit of the ports that a bridge forwards, in 4 Ki, in the upper 4 bits of each byte.
const PORT_WINDOW: u16 = 0x1c;
/// Base and limit of the memory that a bridge forwards, in MiB, in the upper 12 bits of each half.
const MEMORY_WINDOW: u16 = 0x20;
/// The same of prefetchable memory, with the upper halves of base and limit after it.
const PREFETCHABLE_WINDOW: u16 = 0x24;

/// Gives what is behind `bridges`, one below the other, addresses that all of them forward: memory below 4 GiB if it
/// has room there, else what is prefetchable above.
fn assign_behind(root: &PciRoot, bridges: &[SourceId], bars: Vec<Bar>, ports: Vec<Ports>, rooms: &mut Rooms) {
    let write = |register: u16, value: u32| bridges.iter().for_each(|bridge| write32(root, *bridge, register, value));
    // Nothing, until something is behind it: a base above the limit.
    write(PORT_WINDOW, 0x00f0);
    write(MEMORY_WINDOW, 0xfff0);
    write(PREFETCHABLE_WINDOW, 0xfff0);
    let mut low = bars;
    if let Some((first, last)) = place_together(root, &low, &mut rooms.low) {
        write(MEMORY_WINDOW, window_of(first, last));
    } else if !low.is_empty() {
        let high: Vec<Bar> = low.extract_if(.., |bar| bar.may_be_high).collect();
        if let Some((first, last)) = place_together(root, &low, &mut rooms.low) {
            write(MEMORY_WINDOW, window_of(first, last));
        } else if !low.is_empty() {
            log::warn!("the BARs behind {} have no room below 4 GiB", bridges[0]);
        }
        match rooms.high.as_mut().and_then(|room| place_together(root, &high, room)) {
            Some((first, last)) => {
                write(PREFETCHABLE_WINDOW, window_of(first, last));
                write(PREFETCHABLE_WINDOW + 4, (first >> 32) as u32);
                write(PREFETCHABLE_WINDOW + 8, (last >> 32) as u32);
            }
            None if high.is_empty() => {}
            None => log::warn!("the BARs behind {} have no room above 4 GiB", bridges[0]),
        }
    }
    let count = ports.iter().map(|bar| bar.count).sum::<u64>().next_multiple_of(PORT_GRAIN);
    let has_ports = !ports.is_empty();
    let room = rooms.ports.as_mut().filter(|_| has_ports);
    if let Some(first) = room.and_then(|room| room.take_spanning(count, PORT_GRAIN)) {
        let last = first + (count - 1);
        assign_ports(root, ports, &mut Room(Window { first, last }));
        write(PORT_WINDOW, (first >> 8 & 0xf0 | last & 0xf000) as u32);
    }
    let io = if has_ports { COMMAND_IO } else { 0 };
    write(COMMAND, (io | COMMAND_MEMORY | COMMAND_MASTER).into());
}

/// Base and limit as a window's register has them.
fn window_of(first: u64, last: u64) -> u32 {
    (first >> 16 & 0xfff0) as u32 | (last as u32 & 0xfff0_0000)
}

/// Gives these BARs addresses in one range of whole MiB, and says where that is; `None` if there is no room, or no BAR.
fn place_together(root: &PciRoot, bars: &[Bar], room: &mut Room) -> Option<(u64, u64)> {
    let mut sorted = bars.to_vec();
    sorted.sort_by_key(|bar| (Reverse(bar.size), bar.sid, bar.index));
    let largest = sorted.first()?.size.max(MIB);
    // Descending sizes need no gaps.
    let all: u64 = sorted.iter().map(|bar| bar.size.max(PAGE)).fold(0, u64::saturating_add);
    let len = all.checked_next_multiple_of(largest)?;
    let first = room.take_spanning(len, largest)?;
    let last = first + (len - 1);
    let mut room = Room(Window { first, last });
    for bar in sorted {
        if let Some(address) = room.take(bar.size) {
            put(root, &bar, address);
        }
    }
    Some((first, last))
}

fn assign_ports(root: &PciRoot, mut bars: Vec<Ports>, room: &mut Room) {
    bars.sort_by_key(|bar| (Reverse(bar.count), bar.sid, bar.index));
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
