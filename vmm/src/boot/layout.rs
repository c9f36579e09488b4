//! Where things are in the guest-physical address space and on the port bus.
//!
//! ```text
//! 0            RAM: BIOS data area, GDT, boot parameters, page tables, command line, kernel from 1 MiB,
//!              initrd at the top
//! 0x9fc00      extended BIOS data area
//! 0xa0000      hole; ACPI tables from 0xe0000
//! 0x100000     RAM, up to 3 GiB
//! 0xc0000000   PCI memory below 4 GiB; of further segments the last parts of it
//! 0xe0000000   ECAM of segment 0: 1 MiB a bus
//! 0xf0000000   ECAM of segments 1 to 7
//! 0xfec00000   IOAPIC
//! 0xfed90000   VT-d units: 16 KiB each
//! 0xfee00000   local APICs and messages
//! 4 GiB        the rest of RAM, then PCI memory above 4 GiB
//! ```

/// First byte above 32-bit addresses.
pub const FOUR_GIB: u64 = 1 << 32;
/// RAM below 4 GiB ends here at the latest, which leaves the interrupt window and all MMIO alone.
pub const LOW_RAM_MAX: u64 = 0xc000_0000;

/// Where the extended BIOS data area is: RAM below it is the first region of the memory map.
pub const EBDA: u64 = 0x9_fc00;
/// Where the legacy hole begins, and the extended BIOS data area ends.
pub const LOW_HOLE_START: u64 = 0xa_0000;
/// Where extended memory begins, and where the kernel is loaded.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The BIOS data area.
pub const BIOS_DATA: u64 = 0x400;
/// The global descriptor table of the boot processor.
pub const GDT: u64 = 0x500;
/// `boot_params`, the "zero page".
pub const BOOT_PARAMS: u64 = 0x7000;
/// The initial stack pointer (grows down, below the page tables).
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page map level 4, then one page directory pointer table, then four page directories: an identity map of 4 GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, with its terminating zero.
pub const CMDLINE_MAX: u64 = 0x1_0000;
/// ACPI tables, the RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// The last byte that ACPI tables may use.
pub const ACPI_LAST: u64 = 0xf_ffff;

/// First address of the 32-bit PCI memory window.
pub const PCI32_FIRST: u64 = 0xc000_0000;
/// Last address of the 32-bit PCI memory window.
pub const PCI32_LAST: u64 = 0xdfff_ffff;
/// The memory-mapped configuration space of buses 0 to the last one.
pub const ECAM: u64 = 0xe000_0000;
/// Its size: 1 MiB a bus.
///
/// The last bus, which MCFG and `_CRS` name too, is that of the last root port: those that are there, and no more.
/// Linux looks for every device of each bus that MCFG names, by two accesses to ports: 16,320 exits, had MCFG all 256.
pub const fn ecam_size(last_bus: u8) -> u64 {
    (last_bus as u64 + 1) << 20
}
/// Where the memory-mapped configuration space of bus 0 of a segment is. Those after the first have this bus alone, and
/// room for 16.
pub const fn ecam_of(segment: u16) -> u64 {
    match segment {
        0 => ECAM,
        further => FURTHER_ECAM + (further as u64 - 1) * FURTHER_ECAM_SIZE,
    }
}
const FURTHER_ECAM: u64 = 0xf000_0000;
const FURTHER_ECAM_SIZE: u64 = 16 << 20;

/// What a segment after the first has of the 32-bit PCI memory window.
const FURTHER_PCI32_SIZE: u64 = 32 << 20;

/// The 32-bit PCI memory window of `segment`, in a machine whose last segment is `last`: segment 0 has what the others
/// leave.
pub const fn pci32_window(segment: u16, last: u16) -> Window {
    let end = PCI32_LAST + 1;
    match segment {
        0 => Window { first: PCI32_FIRST, last: end - last as u64 * FURTHER_PCI32_SIZE - 1 },
        further => {
            let first = end - further as u64 * FURTHER_PCI32_SIZE;
            Window { first, last: first + FURTHER_PCI32_SIZE - 1 }
        }
    }
}

/// Where a guest places the BARs of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BarWindows {
    /// Which segment.
    pub segment: u16,
    /// Below 4 GiB.
    pub low: Window,
    /// Above 4 GiB, if there is room.
    pub high: Option<Window>,
}

/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Their size.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Pins of the IOAPIC, which are the global system interrupts 0 to 23.
pub const IOAPIC_PINS: u32 = 24;
/// The IOAPIC's APIC id, as the MADT and the DMAR table name it.
pub const IOAPIC_ID: u8 = 0;
/// Bus, device and function by which the IOAPIC makes requests to the unit (`00:1f.7`, kept for it).
pub const IOAPIC_SOURCE: (u8, u8, u8) = (0, 0x1f, 7);
/// The remapping unit's registers.
pub const VTD_UNIT: u64 = 0xfed9_0000;
/// What is kept for those of a unit: as much as they are at most.
pub const VTD_UNIT_SIZE: u64 = 0x4000;
/// As many units as a machine can have.
pub const MAX_UNITS: usize = 8;
/// Where the registers of unit `index` are.
pub const fn unit_base(index: usize) -> u64 {
    VTD_UNIT + index as u64 * VTD_UNIT_SIZE
}
/// The local APICs.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page that KVM needs on old Intel processors, then three pages for its task state segment.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on old Intel processors.
pub const KVM_TSS: u64 = KVM_IDENTITY_MAP + 0x1000;

/// First port of the power management block (`devices::PmBlock`).
pub const PM_BLOCK: u16 = 0x600;
/// The system control interrupt's GSI.
pub const SCI_GSI: u32 = 9;
/// A range of addresses, both ends inclusive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// First address.
    pub first: u64,
    /// Last address.
    pub last: u64,
}

/// The regions of RAM for `size` bytes: (guest-physical address, length).
pub fn ram_regions(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(LOW_RAM_MAX);
    let mut regions = vec![(0, low)];
    if size > low {
        regions.push((FOUR_GIB, size - low));
    }
    regions
}

/// Whether there is RAM at `address`, of `size` bytes in all.
pub fn is_ram(address: u64, size: u64) -> bool {
    ram_regions(size).iter().any(|(first, len)| address >= *first && address - first < *len)
}

/// Where RAM of `ram` bytes ends, but not below 4 GiB.
pub fn high_end(ram: u64) -> u64 {
    ram_regions(ram).last().map_or(FOUR_GIB, |(first, len)| first + len).max(FOUR_GIB)
}

/// The PCI memory window above 4 GiB for 64-bit BARs of these sizes (bytes, powers of two), in a guest with RAM, and
/// windows of other segments, below `end` and `width` physical address bits. It begins as low as it can, so that a
/// function with a 39-bit unit reaches what it can of its neighbours' BARs, and has at least 64 GiB and twice what the
/// BARs need if that fits: guests place them in any order. `None` when there is no room left at all; there may be less
/// than the BARs need.
pub fn pci64_window(end: u64, width: u8, bars: &[u64]) -> Option<Window> {
    const LEAST: u64 = 64 << 30;
    const GIB: u64 = 1 << 30;
    let limit = 1u64 << width.min(52);
    let total = bars.iter().fold(0u64, |total, size| total.saturating_add(*size));
    let largest = bars.iter().copied().max().unwrap_or(0);
    let ample = total.checked_next_power_of_two().unwrap_or(u64::MAX).max(LEAST);
    // Where so much does not fit: what is needed, and else what there is, up to the end.
    for (size, alignment, ends) in
        [(ample, largest.max(LEAST), false), (total.max(GIB), largest.max(GIB), true), (GIB, GIB, true)]
    {
        let first = end.checked_next_multiple_of(alignment);
        let ends_at = first.and_then(|first| first.checked_add(size)).filter(|end| *end <= limit);
        if let (Some(first), Some(end)) = (first, ends_at) {
            return Some(Window { first, last: if ends { limit } else { end } - 1 });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_SEGMENTS;

    #[test]
    fn ram_leaves_the_mmio_space_below_4_gib_alone() {
        assert_eq!(ram_regions(512 << 20), [(0, 512 << 20)]);
        assert_eq!(ram_regions(LOW_RAM_MAX), [(0, LOW_RAM_MAX)]);
        assert_eq!(ram_regions(LOW_RAM_MAX + 4096), [(0, LOW_RAM_MAX), (FOUR_GIB, 4096)]);
        for size in [1u64 << 20, 3 << 30, 4 << 30, 1 << 40] {
            let total: u64 = ram_regions(size).iter().map(|(_, len)| len).sum();
            assert_eq!(total, size);
            for (first, len) in ram_regions(size) {
                assert!(first + len <= PCI32_FIRST || first >= FOUR_GIB);
            }
        }
    }

    #[test]
    fn ram_is_where_its_regions_are() {
        let size = LOW_RAM_MAX + 4096;
        for (address, is) in [
            (0, true),
            (LOW_RAM_MAX - 1, true),
            (LOW_RAM_MAX, false),
            (FOUR_GIB - 1, false),
            (FOUR_GIB, true),
            (FOUR_GIB + 4095, true),
            (FOUR_GIB + 4096, false),
        ] {
            assert_eq!(is_ram(address, size), is, "{address:#x}");
        }
    }

    #[test]
    fn pci64_window_is_above_ram_and_inside_the_physical_width() {
        for (ram, width) in [(512u64 << 20, 40u8), (512 << 20, 36), (8 << 30, 36), (100 << 30, 39), (1 << 40, 46)] {
            let window = pci64_window(high_end(ram), width, &[]).unwrap();
            let (first, len) = *ram_regions(ram).last().unwrap();
            assert!(window.first >= (first + len).max(FOUR_GIB));
            assert!(window.last < 1 << width);
            assert!(window.first < window.last);
        }
        assert_eq!(pci64_window(high_end(512 << 20), 32, &[]), None);
        assert_eq!(pci64_window(high_end(512 << 20), 48, &[0x4000, 1 << 30]).unwrap().last, (128 << 30) - 1);
    }

    #[test]
    fn pci64_window_has_room_for_the_bars_where_the_width_has() {
        const GIB: u64 = 1 << 30;
        let window = |ram, width, bars: &[u64]| {
            let window = pci64_window(high_end(ram), width, bars).unwrap();
            (window.first / GIB, (window.last + 1) / GIB)
        };
        assert_eq!(window(GIB / 2, 40, &[128 * GIB]), (128, 256));
        assert_eq!(window(GIB / 2, 40, &[128 * GIB, 0x4000]), (128, 384));
        assert_eq!(window(GIB / 2, 40, &[128 * GIB, 128 * GIB]), (128, 384));
        assert_eq!(window(GIB / 2, 46, &[256 * GIB; 8]), (256, 2304));
        // Less than ample, but enough: 39 bits are 512 GiB.
        assert_eq!(window(GIB / 2, 39, &[128 * GIB, 128 * GIB, GIB]), (128, 512));
        // Not enough: all that there is, for others.
        assert_eq!(window(GIB / 2, 39, &[512 * GIB]), (4, 512));
        assert_eq!(window(GIB / 2, 40, &[u64::MAX, u64::MAX]), (4, 1024));
    }

    #[test]
    fn a13_the_windows_of_segments_below_4_gib_are_beside_each_other() {
        for last in 0..MAX_SEGMENTS {
            let mut windows: Vec<Window> = (0..=last).map(|segment| pci32_window(segment, last)).collect();
            windows.sort_by_key(|window| window.first);
            assert_eq!((windows[0].first, windows[usize::from(last)].last), (PCI32_FIRST, PCI32_LAST));
            assert!(windows.windows(2).all(|pair| pair[0].last + 1 == pair[1].first), "{last}");
            assert!(windows.iter().all(|window| window.last + 1 - window.first >= 32 << 20));
        }
        assert_eq!((ecam_of(0), ecam_of(1), ecam_of(7)), (0xe000_0000, 0xf000_0000, 0xf600_0000));
    }

    #[test]
    fn fixed_ranges_do_not_overlap() {
        let mut ranges = [
            (PCI32_FIRST, PCI32_LAST),
            (ECAM, ECAM + ecam_size(u8::MAX) - 1),
            (ecam_of(1), ecam_of(2) - 1),
            (ecam_of(MAX_SEGMENTS - 1), ecam_of(MAX_SEGMENTS) - 1),
            (IOAPIC, IOAPIC + IOAPIC_SIZE - 1),
            (VTD_UNIT, unit_base(MAX_UNITS) - 1),
            (LOCAL_APIC, LOCAL_APIC + 0xf_ffff),
            (KVM_IDENTITY_MAP, KVM_TSS + 0x2fff),
        ];
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].1 < pair[1].0));
        assert!(ranges.iter().all(|(first, last)| *first >= LOW_RAM_MAX && *last < FOUR_GIB));
    }
}
