//! What firmware would have done for a bare-metal image, and the ports that such images look for.

use std::sync::Arc;

use devices::Bus;
use devices::bus::Overlap;
use devices::debug_exit::DebugExit;
use devices::fw_cfg::FwCfg;
use devices::pci::PciRoot;
use devices::pci::config::{BAR0, COMMAND, COMMAND_MEMORY};
use vtd::SourceId;

use crate::boot::memory_map;
use crate::cli::RunArgs;
use crate::control::{Control, Stop};
use crate::layout::{self, Window};

/// Adds isa-debug-exit and fw_cfg.
pub fn add_ports(ports: &Bus, control: &Arc<Control>, args: &RunArgs) -> Result<(), Overlap> {
    let control = control.clone();
    let exit = DebugExit::new(Box::new(move |value| control.request(Stop::DebugExit(value))));
    ports.insert(DebugExit::FIRST, DebugExit::LAST, Arc::new(exit))?;
    let mut map = Vec::new();
    for (addr, len, kind) in memory_map(args.memory) {
        map.extend_from_slice(&addr.to_le_bytes());
        map.extend_from_slice(&len.to_le_bytes());
        map.extend_from_slice(&kind.to_le_bytes());
    }
    let fw_cfg = FwCfg::new(args.memory, args.cpus.into(), &[("etc/e820", map)]);
    ports.insert(FwCfg::FIRST, FwCfg::LAST, Arc::new(fw_cfg))
}

/// A window of which addresses are handed out from below.
struct Room(Window);

impl Room {
    fn take(&mut self, size: u64) -> Option<u64> {
        let first = self.0.first.checked_next_multiple_of(size)?;
        let last = first.checked_add(size - 1).filter(|last| *last <= self.0.last)?;
        self.0.first = last + 1;
        Some(first)
    }
}

fn read32(root: &PciRoot, sid: SourceId, offset: u16) -> u32 {
    let mut data = [0; 4];
    root.config_read(sid, offset, &mut data);
    u32::from_le_bytes(data)
}

fn write32(root: &PciRoot, sid: SourceId, offset: u16, value: u32) {
    root.config_write(sid, offset, &value.to_le_bytes());
}

/// Gives every memory BAR of every function an address and sets Memory Enable, as firmware does. 64-bit BARs go above 4 GiB only
/// when they do not fit below. I/O BARs stay without an address.
pub fn assign_bars(root: &PciRoot, above: Option<Window>) {
    let mut low = Room(Window { first: layout::PCI32_FIRST, last: layout::PCI32_LAST });
    let mut high = above.map(Room);
    for (sid, _) in root.functions() {
        let command = read32(root, sid, COMMAND) as u16;
        root.config_write(sid, COMMAND, &(command & !COMMAND_MEMORY).to_le_bytes());
        let mut index = 0;
        while index < 6 {
            let at = BAR0 + 4 * index;
            write32(root, sid, at, u32::MAX);
            let low_mask = read32(root, sid, at);
            let is_64 = low_mask & 0x7 == 0x4 && index < 5;
            index += if is_64 { 2 } else { 1 };
            if low_mask & 1 != 0 || low_mask & !0xf == 0 && !is_64 {
                continue;
            }
            let high_mask = if is_64 {
                write32(root, sid, at + 4, u32::MAX);
                read32(root, sid, at + 4)
            } else {
                u32::MAX
            };
            let mask = u64::from(high_mask) << 32 | u64::from(low_mask & !0xf);
            let size = 1u64.checked_shl(mask.trailing_zeros()).unwrap_or(0);
            let place = match size {
                0 => None,
                size => low.take(size.max(0x1000)).or_else(|| high.as_mut().filter(|_| is_64)?.take(size)),
            };
            if place.is_none() {
                log::warn!("BAR {} of {sid} ({size:#x} bytes) has no room", (at - BAR0) / 4);
            }
            let address = place.unwrap_or(0);
            write32(root, sid, at, address as u32);
            if is_64 {
                write32(root, sid, at + 4, (address >> 32) as u32);
            }
        }
        root.config_write(sid, COMMAND, &(command | COMMAND_MEMORY).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rooms_hand_out_aligned_disjoint_ranges_until_they_are_full() {
        let mut room = Room(Window { first: 0xc000_1000, last: 0xc03f_ffff });
        assert_eq!(room.take(0x10_0000), Some(0xc010_0000));
        assert_eq!(room.take(0x1000), Some(0xc020_0000));
        assert_eq!(room.take(0x10_0000), Some(0xc030_0000));
        assert_eq!(room.take(0x1000), None);
        assert_eq!(Room(Window { first: u64::MAX - 5, last: u64::MAX }).take(0x1000), None);
    }
}
