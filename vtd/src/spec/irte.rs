//! Interrupt requests and the interrupt remapping table. Sections 5.1.2 (formats of requests), 5.1.5.1 (I/OxAPIC) and
//! 9.10 to 9.12 (interrupt remapping table entries, and the descriptors that those for posted interrupts lead to).

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bits 31:20 of the address of every interrupt request.
pub const ADDRESS_PREFIX: u16 = 0xfee;

/// Address of an interrupt request in remappable format. Section 5.1.2.2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct RemappableAddress {
    /// Don't care.
    #[bits(2)]
    pub ignored: u8,
    /// HANDLE\[15\].
    pub handle_high: bool,
    /// SHV: the data has a subhandle that is added to the handle.
    pub subhandle_valid: bool,
    /// Interrupt format: 1 is remappable, 0 is compatibility format.
    pub remappable: bool,
    /// HANDLE\[14:0\].
    #[bits(15)]
    pub handle_low: u16,
    /// [`ADDRESS_PREFIX`].
    #[bits(12, default = ADDRESS_PREFIX)]
    pub prefix: u16,
}

impl RemappableAddress {
    /// The 16 bits of the handle.
    pub const fn handle(self) -> u16 {
        self.handle_low() | (self.handle_high() as u16) << 15
    }

    /// The address of a request with this handle.
    pub const fn with_handle(self, handle: u16) -> Self {
        self.with_remappable(true).with_handle_low(handle & 0x7fff).with_handle_high(handle >> 15 != 0)
    }
}

/// Data of an interrupt request in remappable format. Section 5.1.2.2.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct RemappableData {
    /// Added to the handle if SHV is set, else ignored.
    pub subhandle: u16,
    /// Reserved if SHV is set, else ignored.
    pub reserved: u16,
}

/// Address of an interrupt request in compatibility format (section 5.1.2.1), which is what the processors' interrupt
/// controllers understand.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct CompatibilityAddress {
    /// Don't care.
    #[bits(2)]
    pub ignored: u8,
    /// Destination mode: 0 is physical, 1 is logical.
    pub logical: bool,
    /// Redirection hint.
    pub redirection_hint: bool,
    /// Interrupt format: 0.
    pub remappable: bool,
    #[bits(7)]
    __: u8,
    /// Destination, bits 7:0.
    pub destination: u8,
    /// [`ADDRESS_PREFIX`].
    #[bits(12, default = ADDRESS_PREFIX)]
    pub prefix: u16,
    __: u8,
    /// Destination, bits 31:8. No bus has it; KVM takes it here (KVM_X2APIC_API_USE_32BIT_IDS).
    #[bits(24)]
    pub destination_high: u32,
}

/// Data of an interrupt request in compatibility format. Section 5.1.2.1.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CompatibilityData {
    /// Vector.
    pub vector: u8,
    /// See [`DeliveryMode`].
    #[bits(3)]
    pub delivery_mode: u8,
    #[bits(3)]
    __: u8,
    /// Level of a level-triggered request: asserted.
    pub assert: bool,
    /// Trigger mode: 1 is level.
    pub level: bool,
    __: u16,
}

/// Redirection table entry of an I/OxAPIC in remappable format. Section 5.1.5.1.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct IoapicEntry {
    /// Vector: what an end of interrupt names; Linux puts the number of the pin here. The processor gets the one of the
    /// IRTE.
    pub vector: u8,
    /// 0 in this format.
    #[bits(3)]
    pub reserved: u8,
    /// Interrupt index, bit 15.
    pub index_high: bool,
    /// Delivery status (RO).
    pub delivery_status: bool,
    /// Polarity: 1 is active low.
    pub active_low: bool,
    /// Remote IRR (RO).
    pub remote_irr: bool,
    /// Trigger mode: 1 is level. Linux leaves the one of the IRTE at edge.
    pub level: bool,
    /// Masked.
    pub masked: bool,
    #[bits(31)]
    pub reserved_high: u32,
    /// Interrupt format: 1 is remappable.
    pub remappable: bool,
    /// Interrupt index, bits 14:0.
    #[bits(15)]
    pub index_low: u16,
}

impl IoapicEntry {
    /// The 16 bits of the interrupt index.
    pub const fn index(self) -> u16 {
        self.index_low() | (self.index_high() as u16) << 15
    }

    /// The address of the request that an I/OxAPIC makes of an entry in remappable format. It never has a subhandle, so
    /// that the data does not matter.
    pub const fn request_address(self) -> RemappableAddress {
        RemappableAddress::new().with_handle(self.index())
    }
}

/// Interrupt remapping table entry: up to 65536 of them in a table. Section 9.10.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Irte {
    /// Bits 63:0.
    pub low: IrteLow,
    /// Bits 127:64.
    pub high: IrteHigh,
}

impl Irte {
    /// Size in bytes.
    pub const SIZE: u64 = 16;
}

/// Bits 63:0 of an [`Irte`] for a remapped interrupt (IM is 0). Section 9.10.
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IrteLow {
    /// P.
    pub present: bool,
    /// FPD: qualified faults of this entry are not recorded, whether it is present or not.
    pub fault_processing_disable: bool,
    /// DM: 1 is logical.
    pub logical: bool,
    /// RH.
    pub redirection_hint: bool,
    /// TM: 1 is level.
    pub level: bool,
    /// DLM: see [`DeliveryMode`].
    #[bits(3)]
    pub delivery_mode: u8,
    /// Ignored by hardware.
    #[bits(4)]
    pub available: u8,
    #[bits(3)]
    pub reserved: u8,
    /// IM: posted, see [`PostedIrteLow`]. Reserved unless the unit has posted interrupts.
    pub posted: bool,
    /// V.
    pub vector: u8,
    pub reserved_high: u8,
    /// DST: with EIME all 32 bits, else bits 15:8, the others reserved.
    pub destination: u32,
}

/// Bits 63:0 of an [`Irte`] for a posted interrupt (IM is 1). Section 9.11.
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PostedIrteLow {
    /// P.
    pub present: bool,
    /// FPD.
    pub fault_processing_disable: bool,
    #[bits(6)]
    pub reserved: u8,
    /// Ignored by hardware.
    #[bits(4)]
    pub available: u8,
    #[bits(2)]
    pub reserved_middle: u8,
    /// URG.
    pub urgent: bool,
    /// IM.
    pub posted: bool,
    /// VV.
    pub vector: u8,
    #[bits(14)]
    pub reserved_high: u16,
    /// PDA\[31:6\]: address of the posted interrupt descriptor; bits 63:32 are bits 127:96 of the entry.
    #[bits(26)]
    pub descriptor_low: u32,
}

/// Bits 127:64 of an [`Irte`] for a remapped interrupt. Those for a posted one are [`PostedIrteHigh`].
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IrteHigh {
    /// SID: a source id, or the first bus in bits 15:8 and the last one in bits 7:0. See [`SourceValidation`].
    pub source: u16,
    /// SQ: 1 ignores bit 2 of the function, 2 bits 2:1, 3 all of it.
    #[bits(2)]
    pub source_qualifier: u8,
    /// SVT: see [`SourceValidation`].
    #[bits(2)]
    pub validation: u8,
    #[bits(44)]
    pub reserved: u64,
}

/// Bits 127:64 of an [`Irte`] for a posted interrupt. Section 9.11.
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PostedIrteHigh {
    /// SID, as in [`IrteHigh`].
    pub source: u16,
    /// SQ, as in [`IrteHigh`].
    #[bits(2)]
    pub source_qualifier: u8,
    /// SVT: see [`SourceValidation`].
    #[bits(2)]
    pub validation: u8,
    #[bits(12)]
    pub reserved: u16,
    /// PDA\[63:32\].
    pub descriptor_high: u32,
}

/// Size in bytes of a posted interrupt descriptor, and its alignment. Section 9.12. Bits 255:0 are PIR, a bit for each
/// vector; the 64 behind them are a [`PostedControl`], and the rest is reserved.
pub const POSTED_DESCRIPTOR_SIZE: u64 = 64;

/// Bits 319:256 of a posted interrupt descriptor. Section 9.12.
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PostedControl {
    /// ON: a notification was sent, and who gets it has not cleared this yet.
    pub outstanding: bool,
    /// SN: only what is urgent is notified of.
    pub suppressed: bool,
    #[bits(14)]
    pub reserved: u16,
    /// NV: vector of the notification.
    pub vector: u8,
    pub reserved_middle: u8,
    /// NDST: the processor that is notified. With EIME all 32 bits, else bits 15:8, the others reserved.
    pub destination: u32,
}

/// SVT of an IRTE: who may use it. Section 9.10.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SourceValidation {
    /// 00: anybody.
    None,
    /// 01: who has the source id in SID, in the bits that SQ says.
    SourceId,
    /// 10: who is on one of the buses from SID\[15:8\] to SID\[7:0\].
    BusRange,
}

impl SourceValidation {
    /// The type with these two bits; 11 is reserved.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::None),
            1 => Some(Self::SourceId),
            2 => Some(Self::BusRange),
            _ => None,
        }
    }
}

/// DLM of an IRTE, and the delivery mode of a message. Section 9.10.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DeliveryMode {
    /// To all processors of the destination.
    Fixed = 0,
    /// To the one with the lowest priority.
    LowestPriority = 1,
    /// System management interrupt.
    Smi = 2,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT.
    Init = 5,
    /// As from an 8259.
    ExtInt = 7,
}

impl DeliveryMode {
    /// The mode with these three bits; 011 and 110 are reserved.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            2 => Some(Self::Smi),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            7 => Some(Self::ExtInt),
            _ => None,
        }
    }
}
