//! Descriptors of the page request queue. Section 7.4.1.1.

use bitfield_struct::bitfield;

/// Bytes of a descriptor.
pub const PAGE_REQUEST_SIZE: u64 = 32;

/// Type of a page request descriptor, the only one.
pub const PAGE_REQUEST: u8 = 1;

/// Bits 63:0 of a page request descriptor; bits 255:128 are reserved.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PageRequestLow {
    /// Type: [`PAGE_REQUEST`].
    pub kind: u8,
    /// PP: `pasid` is valid.
    pub pasid_present: bool,
    #[bits(7)]
    __: u8,
    /// RID.
    pub source: u16,
    #[bits(20)]
    pub pasid: u32,
    /// EXR: never set.
    pub execute: bool,
    /// PMR: never set.
    pub privileged: bool,
    #[bits(10)]
    __: u16,
}

/// Bits 127:64 of a page request descriptor.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PageRequestHigh {
    /// RDR.
    pub read: bool,
    /// WRR.
    pub write: bool,
    /// LPIG: the last of its group, which is answered.
    pub last: bool,
    /// PRGI.
    #[bits(9)]
    pub group: u16,
    /// ADDR: page number.
    #[bits(52)]
    pub page: u64,
}
