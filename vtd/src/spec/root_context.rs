//! Root entries and context entries of legacy mode. Sections 9.1 and 9.3.

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Root entry: one a bus, 4096 bytes of them in a root table. Section 9.1.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RootEntry {
    /// Bits 63:0.
    pub low: RootEntryLow,
    /// Bits 127:64, all reserved.
    pub high: u64,
}

/// Bits 63:0 of a [`RootEntry`].
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RootEntryLow {
    /// P.
    pub present: bool,
    #[bits(11)]
    pub reserved: u16,
    /// CTP: page number of the context table.
    #[bits(52)]
    pub context_table: u64,
}

/// Context entry: one a function, 4096 bytes of them in a context table. Section 9.3.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ContextEntry {
    /// Bits 63:0.
    pub low: ContextEntryLow,
    /// Bits 127:64.
    pub high: ContextEntryHigh,
}

/// Bits 63:0 of a [`ContextEntry`].
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ContextEntryLow {
    /// P.
    pub present: bool,
    /// FPD: qualified faults of this function are not recorded.
    pub fault_processing_disable: bool,
    /// TT: see [`TranslationType`].
    #[bits(2)]
    pub translation_type: u8,
    #[bits(8)]
    pub reserved: u8,
    /// SSPTPTR: page number of the root of the second-stage table.
    #[bits(52)]
    pub second_stage: u64,
}

/// Bits 127:64 of a [`ContextEntry`].
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ContextEntryHigh {
    /// AW: 1 is 39 bits, 2 is 48, 3 is 57.
    #[bits(3)]
    pub address_width: u8,
    /// Ignored by hardware.
    #[bits(4)]
    pub available: u8,
    pub reserved_low: bool,
    /// DID.
    pub domain: u16,
    #[bits(40)]
    pub reserved: u64,
}

/// TT of a context entry. Section 9.3.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TranslationType {
    /// 00: untranslated requests go through the second stage; others are blocked.
    Untranslated,
    /// 01: as 00, and the function may have a device-TLB.
    DeviceTlb,
    /// 10: untranslated requests pass through.
    PassThrough,
}

impl TranslationType {
    /// The type with these two bits; 11 is reserved.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Untranslated),
            1 => Some(Self::DeviceTlb),
            2 => Some(Self::PassThrough),
            _ => None,
        }
    }
}
