//! Root entries, context entries, the PASID directory and the PASID table of scalable mode. Sections 9.2 and 9.4 to
//! 9.6.

use bitfield_struct::bitfield;

/// Half of a root entry of scalable mode: bits 63:0 are for devices 0 to 15, bits 127:64 for devices 16 to 31. Section
/// 9.2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct RootHalf {
    /// LP, UP.
    pub present: bool,
    #[bits(11)]
    pub reserved: u16,
    /// LCTP, UCTP: page number of the context table.
    #[bits(52)]
    pub context_table: u64,
}

/// Bytes of a context entry of scalable mode; bits 255:128 are reserved.
pub const CONTEXT_ENTRY_SIZE: u64 = 32;

/// Bits 63:0 of a context entry of scalable mode. Section 9.4.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ContextLow {
    /// P.
    pub present: bool,
    /// FPD.
    pub fault_processing_disable: bool,
    /// DTE: reserved unless the unit has a device-TLB.
    pub device_tlb: bool,
    /// PASIDE: reserved unless the unit has PASIDs.
    pub pasid: bool,
    /// PRE: reserved unless the unit has page requests.
    pub page_request: bool,
    /// HPTE, EPTR and reserved bits; the first two belong to what no unit of ours has.
    #[bits(4)]
    pub reserved: u8,
    /// PDTS: the PASID directory has `2^(pdts + 7)` entries.
    #[bits(3)]
    pub directory_size: u8,
    /// PASIDDIRPTR: page number of the PASID directory.
    #[bits(52)]
    pub directory: u64,
}

impl ContextLow {
    /// The largest PASID that the directory has an entry for.
    pub const fn max_pasid(self) -> u32 {
        (1 << (self.directory_size() + 7 + TABLE_BITS)) - 1
    }
}

/// Bits 127:64 of a context entry of scalable mode. Section 9.4.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ContextHigh {
    /// RID_PASID: the PASID of requests without one.
    #[bits(20)]
    pub rid_pasid: u32,
    /// RID_PRIV: reserved unless the unit has it (RPRIVS), and reserved bits.
    #[bits(44)]
    pub reserved: u64,
}

/// Bits of a PASID that the PASID table resolves; the directory resolves those above.
pub const TABLE_BITS: u8 = 6;

/// Entry of a PASID directory. Section 9.5.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct DirectoryEntry {
    /// P.
    pub present: bool,
    /// FPD.
    pub fault_processing_disable: bool,
    #[bits(10)]
    pub reserved: u16,
    /// SMPTBLPTR: page number of the PASID table.
    #[bits(52)]
    pub table: u64,
}

/// 64-bit words of an entry of a PASID table. Those from the fourth on are reserved. Section 9.6.
pub const TABLE_ENTRY_WORDS: usize = 8;

/// Bits 63:0 of an entry of a PASID table. Section 9.6.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EntryLow {
    /// P.
    pub present: bool,
    /// FPD.
    pub fault_processing_disable: bool,
    /// AW: as in a context entry of legacy mode; ignored unless the second stage is used.
    #[bits(3)]
    pub address_width: u8,
    pub reserved_low: bool,
    /// PGTT: see [`TranslationType`].
    #[bits(3)]
    pub translation_type: u8,
    /// SSADE: reserved unless the unit has accessed and dirty bits of the second stage.
    pub second_stage_dirty: bool,
    #[bits(2)]
    pub reserved: u8,
    /// SSPTPTR: page number of the root of the second-stage table; ignored unless the second stage is used.
    #[bits(52)]
    pub second_stage: u64,
}

/// Bits 127:64 of an entry of a PASID table. Section 9.6.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EntryMiddle {
    /// DID.
    pub domain: u16,
    #[bits(7)]
    pub reserved: u8,
    /// PWSNP: walks snoop the processor's caches, as all of ours do.
    pub walk_snoop: bool,
    /// PGSNP, CD, EMTE, PAT and reserved bits; all belong to what no unit of ours has.
    #[bits(40)]
    pub reserved_high: u64,
}

/// Bits 191:128 of an entry of a PASID table; but for what is ignored, reserved unless the unit has a first stage.
/// Section 9.6.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EntryUpper {
    /// SRE, which belongs to what no unit of ours has, and a reserved bit.
    #[bits(2)]
    pub reserved: u8,
    /// FSPM: 0 is 4 levels, 1 is 5; ignored unless the first stage is used.
    #[bits(2)]
    pub paging_mode: u8,
    /// WPE: of supervisor requests, of which there are none.
    pub write_protect: bool,
    #[bits(2)]
    pub ignored: u8,
    /// EAFE, which belongs to what no unit of ours has, and reserved bits.
    #[bits(5)]
    pub reserved_high: u8,
    /// FSPTPTR: page number of the root of the first-stage table; ignored unless the first stage is used.
    #[bits(52)]
    pub first_stage: u64,
}

/// PGTT of an entry of a PASID table. Section 9.6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranslationType {
    /// 001: the first stage only.
    FirstStage,
    /// 010: the second stage only.
    SecondStage,
    /// 011: the first stage, whose addresses are those of the second.
    Nested,
    /// 100: requests pass through.
    PassThrough,
}

impl TranslationType {
    /// The type with these three bits; `None` for a reserved one.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0b001 => Some(Self::FirstStage),
            0b010 => Some(Self::SecondStage),
            0b011 => Some(Self::Nested),
            0b100 => Some(Self::PassThrough),
            _ => None,
        }
    }
}
