//! The register file. Section 11.4. What of it is saved is serialised as its bits.

use bitfield_struct::bitfield;
use serde::{Deserialize, Serialize};

/// Offsets of the registers, in bytes from the base of the unit. Section 11.4, table of registers.
pub mod offset {
    /// Version.
    pub const VER: u64 = 0x00;
    /// Capability, 64 bits.
    pub const CAP: u64 = 0x08;
    /// Extended capability, 64 bits.
    pub const ECAP: u64 = 0x10;
    /// Global command.
    pub const GCMD: u64 = 0x18;
    /// Global status.
    pub const GSTS: u64 = 0x1c;
    /// Root table address, 64 bits.
    pub const RTADDR: u64 = 0x20;
    /// Context command, 64 bits.
    pub const CCMD: u64 = 0x28;
    /// Fault status.
    pub const FSTS: u64 = 0x34;
    /// Fault event control.
    pub const FECTL: u64 = 0x38;
    /// Fault event data.
    pub const FEDATA: u64 = 0x3c;
    /// Fault event address.
    pub const FEADDR: u64 = 0x40;
    /// Fault event upper address.
    pub const FEUADDR: u64 = 0x44;
    /// Invalidation queue head, 64 bits.
    pub const IQH: u64 = 0x80;
    /// Invalidation queue tail, 64 bits.
    pub const IQT: u64 = 0x88;
    /// Invalidation queue address, 64 bits.
    pub const IQA: u64 = 0x90;
    /// Invalidation completion status.
    pub const ICS: u64 = 0x9c;
    /// Invalidation event control.
    pub const IECTL: u64 = 0xa0;
    /// Invalidation event data.
    pub const IEDATA: u64 = 0xa4;
    /// Invalidation event address.
    pub const IEADDR: u64 = 0xa8;
    /// Invalidation event upper address.
    pub const IEUADDR: u64 = 0xac;
    /// Invalidation queue error record, 64 bits.
    pub const IQERCD: u64 = 0xb0;
    /// Interrupt remapping table address, 64 bits.
    pub const IRTA: u64 = 0xb8;
    /// Page request queue head, 64 bits.
    pub const PQH: u64 = 0xc0;
    /// Page request queue tail, 64 bits.
    pub const PQT: u64 = 0xc8;
    /// Page request queue address, 64 bits.
    pub const PQA: u64 = 0xd0;
    /// Page request status.
    pub const PRS: u64 = 0xdc;
    /// Page request event control.
    pub const PECTL: u64 = 0xe0;
    /// Page request event data.
    pub const PEDATA: u64 = 0xe4;
    /// Page request event address.
    pub const PEADDR: u64 = 0xe8;
    /// Page request event upper address.
    pub const PEUADDR: u64 = 0xec;
    /// Invalidate address, 64 bits; placed by ECAP.IRO.
    pub const IVA: u64 = 0xf0;
    /// IOTLB invalidate, 64 bits; 8 bytes after [`IVA`].
    pub const IOTLB: u64 = 0xf8;
    /// First fault recording register, 128 bits each; placed by CAP.FRO.
    pub const FRCD: u64 = 0x220;
}

/// Capability register (64 bits, RO). Section 11.4.2.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Capability {
    /// ND: domain ids have `4 + 2 * nd` bits.
    #[bits(3)]
    pub number_of_domains: u8,
    /// AFL.
    pub advanced_fault_logging: bool,
    /// RWBF: the guest must flush write buffers.
    pub write_buffer_flush: bool,
    /// PLMR.
    pub protected_low: bool,
    /// PHMR.
    pub protected_high: bool,
    /// CM.
    pub caching_mode: bool,
    /// SAGAW: bit 1 is 39 bits (3 levels), bit 2 is 48 (4 levels), bit 3 is 57 (5 levels).
    #[bits(5)]
    pub adjusted_widths: u8,
    #[bits(3)]
    __: u8,
    /// MGAW: widest guest address, less 1.
    #[bits(6)]
    pub max_guest_width: u8,
    /// ZLR.
    pub zero_length_read: bool,
    __: bool,
    /// FRO: offset of the first fault recording register, in units of 16 bytes.
    #[bits(10)]
    pub fault_record_offset: u16,
    /// SLLPS: bit 0 is 2 MiB, bit 1 is 1 GiB.
    #[bits(4)]
    pub large_pages: u8,
    __: bool,
    /// PSI: page-selective invalidation.
    pub page_selective: bool,
    /// NFR: number of fault recording registers, less 1.
    pub fault_records: u8,
    /// MAMV: largest address mask of a page-selective invalidation.
    #[bits(6)]
    pub max_address_mask: u8,
    /// DWD.
    pub drain_writes: bool,
    /// DRD.
    pub drain_reads: bool,
    /// FL1GP.
    pub first_stage_1g: bool,
    #[bits(2)]
    __: u8,
    /// PI.
    pub posted_interrupts: bool,
    /// FL5LP.
    pub first_stage_5_levels: bool,
    /// ECMDS: enhanced commands.
    pub enhanced_commands: bool,
    /// ESIRTPS.
    pub enhanced_sirtp: bool,
    /// ESRTPS: setting the root pointer invalidates every cache.
    pub enhanced_srtp: bool,
}

/// Extended capability register (64 bits, RO). Section 11.4.3.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct ExtendedCapability {
    /// C: page walks snoop the processor's caches.
    pub coherent: bool,
    /// QI: queued invalidation.
    pub queued_invalidation: bool,
    /// DT: device-TLB.
    pub device_tlb: bool,
    /// IR: interrupt remapping.
    pub interrupt_remapping: bool,
    /// EIM: extended interrupt mode.
    pub extended_interrupt_mode: bool,
    __: bool,
    /// PT: pass-through translation type.
    pub pass_through: bool,
    /// SC: snoop control.
    pub snoop_control: bool,
    /// IRO: offset of the IVA register, in units of 16 bytes.
    #[bits(10)]
    pub iotlb_offset: u16,
    #[bits(2)]
    __: u8,
    /// MHMV.
    #[bits(4)]
    pub max_handle_mask: u8,
    #[bits(2)]
    __: u8,
    /// NEST: nested translation.
    pub nested: bool,
    #[bits(2)]
    __: u8,
    /// PRS: page requests.
    pub page_requests: bool,
    #[bits(3)]
    __: u8,
    /// NWFS: a translation request with the no-write flag gets no write permission, and makes no page dirty.
    pub no_write_flag: bool,
    __: bool,
    /// PSS: bits of a PASID, less 1.
    #[bits(5)]
    pub pasid_size: u8,
    /// PASID: requests may carry one.
    pub pasid: bool,
    __: bool,
    /// PDS: a wait descriptor may ask that the page requests before it are in their queue.
    pub page_request_drain: bool,
    /// SMTS: scalable mode.
    pub scalable_mode: bool,
    __: bool,
    /// SSADS: accessed and dirty flags of the second stage.
    pub second_stage_dirty: bool,
    /// SSTS: second-stage translation in scalable mode.
    pub second_stage: bool,
    /// FSTS: first-stage translation in scalable mode.
    pub first_stage: bool,
    /// SMPWC: page walks of scalable mode snoop the processor's caches where the entry of the PASID table asks for it.
    pub scalable_coherent: bool,
    /// RPS: RID_PASID of the scalable-mode context entry is honoured.
    pub rid_pasid: bool,
    __: bool,
    /// PMS: performance monitoring.
    pub performance_monitoring: bool,
    /// ADMS: abort-DMA mode.
    pub abort_mode: bool,
    #[bits(11)]
    __: u16,
}

/// Global command and global status, which have their bits in the same places (32 bits; WO and RO). Sections 11.4.4.1
/// and 11.4.4.2.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct Global {
    #[bits(23)]
    __: u32,
    /// CFI.
    pub compatibility_format: bool,
    /// SIRTP / IRTPS.
    pub interrupt_table_pointer: bool,
    /// IRE.
    pub interrupt_remapping: bool,
    /// QIE.
    pub queued_invalidation: bool,
    /// WBF.
    pub write_buffer_flush: bool,
    /// EAFL.
    pub advanced_fault_log: bool,
    /// SFL.
    pub fault_log_pointer: bool,
    /// SRTP / RTPS.
    pub root_table_pointer: bool,
    /// TE.
    pub translation: bool,
}

/// TTM of [`RootTableAddress`]. Section 11.4.5.
pub mod table_mode {
    /// Root and context tables of legacy mode.
    pub const LEGACY: u8 = 0b00;
    /// Root, context and PASID tables of scalable mode.
    pub const SCALABLE: u8 = 0b01;
    /// Every request is blocked, whatever the tables say.
    pub const ABORT: u8 = 0b11;
}

/// Root table address register (64 bits, RW). Section 11.4.5.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct RootTableAddress {
    #[bits(10)]
    __: u16,
    /// TTM: see [`table_mode`].
    #[bits(2)]
    pub mode: u8,
    /// RTA: page number of the root table.
    #[bits(52)]
    pub page: u64,
}

/// Context command register (64 bits, RW). Section 11.4.6.1.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextCommand {
    /// DID.
    pub domain: u16,
    /// SID.
    pub source: u16,
    /// FM.
    #[bits(2)]
    pub function_mask: u8,
    #[bits(25)]
    __: u32,
    /// CAIG: the granularity performed, 0 when the request was refused.
    #[bits(2)]
    pub actual: u8,
    /// CIRG: the granularity asked for: 1 global, 2 domain, 3 device.
    #[bits(2)]
    pub granularity: u8,
    /// ICC.
    pub invalidate: bool,
}

/// IOTLB invalidate register (64 bits, RW). Section 11.4.6.4.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct IotlbInvalidate {
    __: u32,
    /// DID.
    pub domain: u16,
    /// DW.
    pub drain_writes: bool,
    /// DR.
    pub drain_reads: bool,
    #[bits(7)]
    __: u8,
    /// IAIG: the granularity performed, 0 when the request was refused.
    #[bits(2)]
    pub actual: u8,
    __: bool,
    /// IIRG: the granularity asked for: 1 global, 2 domain, 3 page.
    #[bits(2)]
    pub granularity: u8,
    __: bool,
    /// IVT.
    pub invalidate: bool,
}

/// Invalidate address register (64 bits, WO). Section 11.4.6.3.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct InvalidateAddress {
    /// AM.
    #[bits(6)]
    pub address_mask: u8,
    /// IH.
    pub leaf_only: bool,
    #[bits(5)]
    __: u8,
    /// ADDR: page number.
    #[bits(52)]
    pub page: u64,
}

/// Fault status register (32 bits, RO and W1C). Section 11.4.7.1.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultStatus {
    /// PFO (W1C).
    pub overflow: bool,
    /// PPF (RO): some fault recording register is full.
    pub pending: bool,
    /// AFO.
    pub advanced_overflow: bool,
    /// APF.
    pub advanced_pending: bool,
    /// IQE (W1C).
    pub queue_error: bool,
    /// ICE (W1C).
    pub completion_error: bool,
    /// ITE (W1C).
    pub timeout_error: bool,
    __: bool,
    /// FRI (RO): index of the first record, while `pending`.
    pub record: u8,
    __: u16,
}

/// Fault event control and invalidation event control (32 bits). Sections 11.4.7.2 and 11.4.8.6.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct EventControl {
    #[bits(30)]
    __: u32,
    /// IP (RO): a message is held back by the mask.
    pub pending: bool,
    /// IM.
    pub masked: bool,
}

/// Invalidation queue address register (64 bits, RW). Section 11.4.8.3.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueAddress {
    /// QS: the queue has `2^size` pages of 4 KiB.
    #[bits(3)]
    pub size: u8,
    __: u8,
    /// DW: descriptors have 256 bits.
    pub wide: bool,
    /// IQA: page number.
    #[bits(52)]
    pub page: u64,
}

/// Page request queue address register (64 bits, RW). Section 11.4.11.3.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRequestAddress {
    /// PQS: the queue has `2^size` pages of 4 KiB.
    #[bits(3)]
    pub size: u8,
    #[bits(9)]
    __: u16,
    /// PQA: page number.
    #[bits(52)]
    pub page: u64,
}

/// Page request status register (32 bits, W1C). Section 11.4.11.4.
#[bitfield(u32)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRequestStatus {
    /// PPR: a request was put into the queue.
    pub pending: bool,
    /// PRO: there was no room for one.
    pub overflow: bool,
    #[bits(30)]
    __: u32,
}

/// Interrupt remapping table address register (64 bits, RW). Section 11.4, IRTA_REG.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct InterruptTableAddress {
    /// S: the table has `2^(size + 1)` entries.
    #[bits(4)]
    pub size: u8,
    #[bits(7)]
    __: u8,
    /// EIME: destinations have 32 bits. Reserved unless the unit has extended interrupt mode.
    pub extended_mode: bool,
    /// IRTA: page number of the table.
    #[bits(52)]
    pub page: u64,
}

impl InterruptTableAddress {
    /// Number of entries, 2 to 65536.
    pub const fn entries(self) -> u32 {
        2 << self.size()
    }
}

/// Invalidation queue error record register (64 bits, RO). Section 11.4.8.10.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueErrorRecord {
    /// IQEI: see [`super::invalidation::QueueError`].
    #[bits(4)]
    pub queue_error: u8,
    #[bits(28)]
    __: u32,
    /// ITESID.
    pub timeout_source: u16,
    /// ICESID.
    pub completion_source: u16,
}
