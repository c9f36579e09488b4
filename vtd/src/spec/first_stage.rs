//! First-stage paging entries, which are those of the processor. Sections 3.6 and 9.7.

use bitfield_struct::bitfield;

/// An entry of a first-stage table of any level. Section 9.7.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct FirstStageEntry {
    /// P.
    pub present: bool,
    /// R/W: writes of user requests are permitted.
    pub write: bool,
    /// U/S: user requests are permitted.
    pub user: bool,
    /// PWT, PCD: ignored without memory types.
    #[bits(2)]
    pub memory_type: u8,
    /// A.
    pub accessed: bool,
    /// D, of a leaf.
    pub dirty: bool,
    /// PS: a leaf at levels 2 and 3; reserved above them; at level 1 it is PAT, which is ignored.
    pub page_size: bool,
    #[bits(4)]
    pub ignored: u8,
    /// ADDR: page number of the next table or of the page. The lowest bit is PAT in a large leaf.
    #[bits(40)]
    pub page: u64,
    #[bits(12)]
    pub ignored_high: u16,
}
