//! The ACPI tables that say where things are: the MCFG and the DMAR table, found as firmware leaves them.

use crate::x86::read;

/// Where PCs have the RSDP, at multiples of 16.
const FIRST: u64 = 0xe_0000;
const END: u64 = 0x10_0000;
/// Headers of tables, and of the two that are read here.
const HEADER: u64 = 36;
const MCFG_HEADER: u64 = 44;
const DMAR_HEADER: u64 = 48;
const DRHD: u16 = 0;

/// Numbers need not be aligned in tables.
fn number(at: u64, bytes: u64) -> u64 {
    (0..bytes).fold(0, |number, byte| number | u64::from(read::<u8>(at + byte)) << (8 * byte))
}

/// The table with this signature, from its address to its end.
fn table(signature: &[u8; 4]) -> Option<(u64, u64)> {
    let rsdp = (FIRST..END).step_by(16).find(|at| number(*at, 8) == u64::from_le_bytes(*b"RSD PTR "))?;
    let xsdt = number(rsdp + 24, 8);
    let entries = (xsdt + HEADER..xsdt + number(xsdt + 4, 4)).step_by(8);
    let mut tables = entries.map(|entry| number(entry, 8));
    let found = tables.find(|table| number(*table, 4) as u32 == u32::from_le_bytes(*signature))?;
    Some((found, found + number(found + 4, 4)))
}

/// Where the configuration space of bus 0 of `segment` is in memory, by the MCFG table.
pub fn ecam(segment: u16) -> Option<u64> {
    let (table, end) = table(b"MCFG")?;
    let mut entries = (table + MCFG_HEADER..end).step_by(16);
    let entry = entries.find(|entry| number(entry + 8, 2) == segment.into() && number(entry + 10, 1) == 0)?;
    Some(number(entry, 8))
}

/// The segment of the unit whose registers are at `base`, by the DMAR table.
pub fn segment_of_unit(base: u64) -> Option<u16> {
    let (table, end) = table(b"DMAR")?;
    let mut at = table + DMAR_HEADER;
    while at < end {
        let (kind, length) = (number(at, 2) as u16, number(at + 2, 2));
        if kind == DRHD && number(at + 8, 8) == base {
            return Some(number(at + 6, 2) as u16);
        }
        // A structure has its length at least.
        at += length.max(4);
    }
    None
}
