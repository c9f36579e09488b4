//! Descriptors of the invalidation queue: 128 bits, or 256, of which those that need no more than 128 leave the upper
//! half zero. Section 6.5.2.

use bitfield_struct::bitfield;

/// Type fields of the descriptors (bits 11:9 are the upper part, bits 3:0 the lower).
pub mod kind {
    /// Context-cache invalidate. Section 6.5.2.1.
    pub const CONTEXT_CACHE: u8 = 1;
    /// IOTLB invalidate. Section 6.5.2.3.
    pub const IOTLB: u8 = 2;
    /// Device-TLB invalidate. Section 6.5.2.5.
    pub const DEVICE_TLB: u8 = 3;
    /// Interrupt-entry-cache invalidate. Section 6.5.2.7.
    pub const INTERRUPT_ENTRY: u8 = 4;
    /// Invalidation wait. Section 6.5.2.8.
    pub const WAIT: u8 = 5;
    /// PASID-based IOTLB invalidate, 256 bits. Section 6.5.2.4.
    pub const PASID_IOTLB: u8 = 6;
    /// PASID-cache invalidate, 256 bits. Section 6.5.2.2.
    pub const PASID_CACHE: u8 = 7;
    /// PASID-based device-TLB invalidate, 256 bits. Section 6.5.2.6.
    pub const PASID_DEVICE_TLB: u8 = 8;
    /// Page group response, 256 bits. Section 7.6.1.
    pub const PAGE_RESPONSE: u8 = 9;
}

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Descriptor {
    /// Bits 63:0.
    pub low: u64,
    /// Bits 127:64.
    pub high: u64,
    /// Bits 255:128, which no descriptor uses; zero in a queue of 128-bit descriptors.
    pub upper: [u64; 2],
}

impl Descriptor {
    /// Size in bytes, of 256 bits or of 128.
    pub const fn size(wide: bool) -> u64 {
        if wide { 32 } else { 16 }
    }

    /// The seven bits of the type.
    pub const fn kind(self) -> u8 {
        (self.low & 0xf) as u8 | ((self.low >> 5) & 0x70) as u8
    }
}

/// Granularity of a context-cache or IOTLB invalidation, in a descriptor (G) and in a register (CIRG, IIRG).
pub mod granularity {
    /// Everything.
    pub const GLOBAL: u8 = 1;
    /// One domain.
    pub const DOMAIN: u8 = 2;
    /// One device (context cache) or a range of pages of one domain (IOTLB).
    pub const SELECTIVE: u8 = 3;
}

/// Bits 63:0 of a context-cache invalidate descriptor; bits 127:64 are reserved. Section 6.5.2.1.
#[bitfield(u64)]
pub struct ContextCacheLow {
    #[bits(4)]
    pub kind: u8,
    #[bits(2)]
    pub granularity: u8,
    #[bits(10)]
    pub reserved: u16,
    pub domain: u16,
    pub source: u16,
    /// FM: 1 ignores bit 2 of the function, 2 bits 2:1, 3 all of it.
    #[bits(2)]
    pub function_mask: u8,
    #[bits(14)]
    pub reserved_high: u16,
}

/// Bits 63:0 of an IOTLB invalidate descriptor. Section 6.5.2.3.
#[bitfield(u64)]
pub struct IotlbLow {
    #[bits(4)]
    pub kind: u8,
    #[bits(2)]
    pub granularity: u8,
    pub drain_writes: bool,
    pub drain_reads: bool,
    pub reserved: u8,
    pub domain: u16,
    pub reserved_high: u32,
}

/// Bits 127:64 of an IOTLB invalidate descriptor.
#[bitfield(u64)]
pub struct IotlbHigh {
    /// AM: the range has `2^am` pages.
    #[bits(6)]
    pub address_mask: u8,
    /// IH: only leaf entries changed.
    pub leaf_only: bool,
    #[bits(5)]
    pub reserved: u8,
    /// ADDR: page number.
    #[bits(52)]
    pub page: u64,
}

/// G of a PASID-cache invalidate descriptor. Section 6.5.2.2.
pub mod pasid_cache {
    /// All PASIDs of one domain.
    pub const DOMAIN: u8 = 0;
    /// One PASID of one domain.
    pub const PASID: u8 = 1;
    /// Everything.
    pub const GLOBAL: u8 = 3;
}

/// G of a PASID-based IOTLB invalidate descriptor. Section 6.5.2.4.
pub mod pasid_iotlb {
    /// One PASID of one domain.
    pub const PASID: u8 = 2;
    /// A range of pages of one PASID.
    pub const PAGES: u8 = 3;
}

/// Bits 63:0 of a PASID-cache and of a PASID-based IOTLB invalidate descriptor; the other bits of the first are
/// reserved, and bits 127:64 of the second are [`IotlbHigh`]. Sections 6.5.2.2 and 6.5.2.4.
#[bitfield(u64)]
pub struct PasidLow {
    #[bits(4)]
    pub kind: u8,
    /// See [`pasid_cache`] and [`pasid_iotlb`].
    #[bits(2)]
    pub granularity: u8,
    #[bits(10)]
    pub reserved: u16,
    pub domain: u16,
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    pub reserved_high: u16,
}

/// Bits 63:0 of a device-TLB invalidate descriptor. Section 6.5.2.5. The physical function of a virtual one (PFSID) is
/// reserved, as throttling (DIT) is not offered.
#[bitfield(u64)]
pub struct DeviceTlbLow {
    #[bits(4)]
    pub kind: u8,
    #[bits(12)]
    pub reserved: u16,
    /// MIP: a hint that throttles invalidations, which come one at a time.
    #[bits(5)]
    pub max_pending: u8,
    #[bits(11)]
    pub reserved_middle: u16,
    /// SID.
    pub source: u16,
    pub reserved_high: u16,
}

/// Bits 127:64 of a device-TLB invalidate descriptor.
#[bitfield(u64)]
pub struct DeviceTlbHigh {
    /// S: more than 4 KiB, see [`super::ats::sized_range`].
    pub large: bool,
    #[bits(11)]
    pub reserved: u16,
    /// ADDR: page number.
    #[bits(52)]
    pub page: u64,
}

/// Bits 63:0 of a PASID-based device-TLB invalidate descriptor. Section 6.5.2.6.
#[bitfield(u64)]
pub struct PasidDeviceTlbLow {
    #[bits(4)]
    pub kind: u8,
    /// MIP, as of [`DeviceTlbLow`].
    #[bits(5)]
    pub max_pending: u8,
    #[bits(7)]
    pub reserved: u8,
    /// SID.
    pub source: u16,
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    pub reserved_high: u16,
}

/// Bits 127:64 of a PASID-based device-TLB invalidate descriptor.
#[bitfield(u64)]
pub struct PasidDeviceTlbHigh {
    /// GI: every PASID.
    pub global: bool,
    #[bits(10)]
    pub reserved: u16,
    /// S, as of [`DeviceTlbHigh`].
    pub large: bool,
    /// ADDR: page number.
    #[bits(52)]
    pub page: u64,
}

/// Bits 63:0 of a page group response descriptor. Section 7.6.1.
#[bitfield(u64)]
pub struct PageResponseLow {
    #[bits(4)]
    pub kind: u8,
    /// PP: `pasid` is valid.
    pub pasid_present: bool,
    #[bits(7)]
    pub reserved: u8,
    /// RC: see [`crate::ResponseCode`].
    #[bits(4)]
    pub code: u8,
    /// RID.
    pub source: u16,
    #[bits(20)]
    pub pasid: u32,
    #[bits(12)]
    pub reserved_high: u16,
}

/// Bits 127:64 of a page group response descriptor.
#[bitfield(u64)]
pub struct PageResponseHigh {
    #[bits(3)]
    pub ignored: u8,
    /// PRGI.
    #[bits(9)]
    pub group: u16,
    #[bits(52)]
    pub reserved: u64,
}

/// Bits 63:0 of an interrupt-entry-cache invalidate descriptor; bits 127:64 are reserved. Section 6.5.2.7.
#[bitfield(u64)]
pub struct InterruptEntryLow {
    #[bits(4)]
    pub kind: u8,
    /// G: 0 is global, 1 index-selective.
    pub selective: bool,
    #[bits(22)]
    pub reserved: u32,
    /// IM: `2^im` entries.
    #[bits(5)]
    pub index_mask: u8,
    /// IIDX.
    pub index: u16,
    pub reserved_high: u16,
}

/// Bits 63:0 of an invalidation wait descriptor. Section 6.5.2.8.
#[bitfield(u64)]
pub struct WaitLow {
    #[bits(4)]
    pub kind: u8,
    /// IF: raise the invalidation completion event.
    pub interrupt: bool,
    /// SW: write the status.
    pub status_write: bool,
    /// FN: later descriptors wait for this one.
    pub fence: bool,
    /// PD: page requests before it are in their queue; reserved unless the unit has page requests.
    pub page_request_drain: bool,
    #[bits(24)]
    pub reserved: u32,
    /// The status that is written.
    pub status: u32,
}

/// Bits 127:64 of an invalidation wait descriptor.
#[bitfield(u64)]
pub struct WaitHigh {
    #[bits(2)]
    pub reserved: u8,
    /// Address of the status, in units of 4 bytes.
    #[bits(62)]
    pub address: u64,
}

/// IQEI: why the queue stopped. Section 11.4.8.10.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum QueueError {
    /// The tail is beyond the queue.
    InvalidTail = 1,
    /// The descriptor could not be read.
    Fetch = 2,
    /// No such descriptor type, or one that this unit does not offer.
    InvalidType = 3,
    /// A reserved field is not zero, or a field has a reserved value.
    Reserved = 4,
    /// The descriptor width does not go with the mode.
    InvalidWidth = 5,
    /// The tail is inside a descriptor of 256 bits.
    UnalignedTail = 6,
    /// The table mode of RTADDR is a reserved one.
    InvalidTableMode = 7,
}
