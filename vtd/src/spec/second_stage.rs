//! Second-stage paging entries. Sections 3.7 and 9.8.

use bitfield_struct::bitfield;

/// An entry of a second-stage table of any level. Section 9.8.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SecondStageEntry {
    /// R.
    pub read: bool,
    /// W.
    pub write: bool,
    /// X: ignored in legacy mode.
    pub execute: bool,
    /// EMT, IPAT: ignored in legacy mode.
    #[bits(4)]
    pub memory_type: u8,
    /// PS: a leaf above level 1; reserved at levels 4 and 5; ignored at level 1.
    pub page_size: bool,
    /// A: ignored without accessed/dirty support.
    pub accessed: bool,
    /// D: ignored without accessed/dirty support.
    pub dirty: bool,
    pub ignored: bool,
    /// SNP: reserved unless the unit has snoop control, and in an entry that is no leaf.
    pub snoop: bool,
    /// ADDR: page number of the next table or of the page.
    #[bits(40)]
    pub page: u64,
    #[bits(10)]
    pub ignored_high: u16,
    /// TM: reserved unless the unit has a device-TLB.
    pub transient: bool,
    pub ignored_top: bool,
}

/// Bits of an address that a table of one level resolves.
pub const LEVEL_BITS: u32 = 9;
/// Entries of a table.
pub const TABLE_ENTRIES: u64 = 512;
/// Size of a page and of a table in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes that one entry of a table of `level` (1 is the level of 4 KiB pages) covers.
pub const fn entry_span(level: u8) -> u64 {
    1 << (12 + LEVEL_BITS * (level as u32 - 1))
}

/// Levels of a table for a guest address width of 39, 48 or 57 bits.
pub const fn levels(width: u8) -> u8 {
    (width - 12).div_ceil(9)
}
