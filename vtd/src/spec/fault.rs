//! Fault recording registers and fault reasons. Sections 7.1 and 11.4.7.6.

use bitfield_struct::bitfield;
use serde::{Deserialize, Serialize};

/// Why a request was blocked. Section 7.1.3; the condition code of those of scalable mode stands in brackets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum FaultReason {
    /// The root entry is not present.
    RootNotPresent = 0x1,
    /// The context entry is not present.
    ContextNotPresent = 0x2,
    /// The context entry has a width or a type that this unit does not have.
    ContextInvalid = 0x3,
    /// The address is beyond the width of the context entry or of the unit.
    AddressBeyondWidth = 0x4,
    /// A write without write permission.
    WriteNotPermitted = 0x5,
    /// A read without read permission.
    ReadNotPermitted = 0x6,
    /// A paging table could not be read.
    PagingTableAccess = 0x7,
    /// The root table could not be read.
    RootTableAccess = 0x8,
    /// The context table could not be read.
    ContextTableAccess = 0x9,
    /// A reserved field of a present root entry is not zero.
    RootReserved = 0xa,
    /// A reserved field of a present context entry is not zero.
    ContextReserved = 0xb,
    /// A reserved field of a present paging entry is not zero.
    PagingReserved = 0xc,
    /// The context entry's type blocks this kind of request.
    RequestTypeBlocked = 0xd,
    /// The translation leads into the interrupt address range.
    OutputInInterruptRange = 0xe,
    /// The table mode of RTADDR is none that this unit has (RTA.1).
    TableModeInvalid = 0x30,
    /// A request with a PASID in legacy mode (RTA.2).
    PasidInLegacyMode = 0x31,
    /// A page request in legacy mode (RTA.3).
    PageRequestInLegacyMode = 0x32,
    /// Abort-DMA mode (RTA.4).
    AbortMode = 0x33,
    /// The root table could not be read (SRT.1).
    ScalableRootAccess = 0x38,
    /// The half of the root entry that the request needs is not present (SRT.2).
    ScalableRootNotPresent = 0x39,
    /// A reserved field of that half is not zero (SRT.3).
    ScalableRootReserved = 0x3a,
    /// The context table could not be read (SCT.1).
    ScalableContextAccess = 0x40,
    /// The context entry is not present (SCT.2).
    ScalableContextNotPresent = 0x41,
    /// A reserved field of a present context entry is not zero (SCT.3).
    ScalableContextReserved = 0x42,
    /// The context entry's RID_PASID is beyond its PASID directory (SCT.4).
    ScalableContextInvalid = 0x43,
    /// A translation request or a translated one, and DTE of the context entry is clear (SCT.5).
    DeviceTlbNotEnabled = 0x44,
    /// The context entry permits no requests with a PASID (SCT.6).
    PasidNotEnabled = 0x45,
    /// The PASID is beyond the context entry's PASID directory (SCT.7).
    PasidBeyondDirectory = 0x46,
    /// A page request, and PRE of the context entry is clear (SCT.8).
    PageRequestNotEnabled = 0x47,
    /// The PASID is the one that requests without PASID have (SCT.9).
    PasidIsRidPasid = 0x48,
    /// The PASID directory could not be read (SPD.1).
    PasidDirectoryAccess = 0x50,
    /// The entry of the PASID directory is not present (SPD.2).
    PasidDirectoryNotPresent = 0x51,
    /// A reserved field of a present entry of the PASID directory is not zero (SPD.3).
    PasidDirectoryReserved = 0x52,
    /// The PASID table could not be read (SPT.1).
    PasidEntryAccess = 0x58,
    /// The entry of the PASID table is not present (SPT.2).
    PasidEntryNotPresent = 0x59,
    /// A reserved field of a present entry of the PASID table is not zero (SPT.3).
    PasidEntryReserved = 0x5a,
    /// The entry of the PASID table has a width or a type that this unit does not have (SPT.4).
    PasidEntryInvalid = 0x5b,
    /// A first-stage table below the topmost could not be read (SFS.1).
    FirstStageAccess = 0x70,
    /// A first-stage entry is not present (SFS.2).
    FirstStageNotPresent = 0x71,
    /// A reserved field of a present first-stage entry is not zero (SFS.3).
    FirstStageReserved = 0x72,
    /// The topmost first-stage table could not be read (SFS.4).
    FirstStageRootAccess = 0x73,
    /// In a nested translation, an address of a first-stage entry is beyond the width of the second stage (SFS.5).
    FirstStageBeyondWidth = 0x74,
    /// In a nested translation, the second stage does not permit to read the topmost first-stage table (SFS.6).
    FirstStageRootRead = 0x75,
    /// In a nested translation, the second stage does not permit to read another first-stage table (SFS.7).
    FirstStageTableRead = 0x76,
    /// In a nested translation, the second stage does not permit to set a flag in a first-stage table (SFS.8).
    FirstStageTableWrite = 0x77,
    /// A second-stage table below the topmost could not be read (SSS.1).
    SecondStageAccess = 0x78,
    /// A second-stage entry, or all entries together, permit neither read nor write (SSS.2).
    SecondStageNotPermitted = 0x79,
    /// A reserved field of a present second-stage entry is not zero (SSS.3).
    SecondStageReserved = 0x7a,
    /// The topmost second-stage table could not be read (SSS.4).
    SecondStageRootAccess = 0x7b,
    /// A second-stage flag is to be set, and PWSNP says that walks do not snoop (SSS.5).
    SecondStageFlagsNotSnooped = 0x7c,
    /// A second-stage flag could not be set (SSS.6).
    SecondStageFlagsNotSet = 0x7d,
    /// The address is not canonical in the first stage (SGN.1).
    NotCanonical = 0x80,
    /// A first-stage entry keeps user requests out, as all of ours are (SGN.2).
    SupervisorPage = 0x81,
    /// The address of a request that passes through is beyond the host address width (SGN.4).
    BeyondHostWidth = 0x83,
    /// The address is beyond the width of the PASID table's entry or of the unit (SGN.5).
    BeyondSecondStageWidth = 0x84,
    /// A write without write permission, in scalable mode (SGN.6).
    ScalableWriteNotPermitted = 0x85,
    /// A read without read permission, in scalable mode (SGN.7).
    ScalableReadNotPermitted = 0x86,
    /// The translation leads into the interrupt address range, in scalable mode (SGN.8).
    ScalableOutputInInterruptRange = 0x87,
    /// The PASID has more bits than this unit's (SGN.10).
    PasidBeyondSize = 0x89,
    /// A first-stage flag is to be set, and PWSNP says that walks do not snoop (SFS.9).
    FirstStageFlagsNotSnooped = 0x90,
    /// A first-stage flag could not be set (SFS.10).
    FirstStageFlagsNotSet = 0x91,
}

impl FaultReason {
    /// Every reason, in ascending order of its code.
    pub const ALL: [Self; 61] = [
        Self::RootNotPresent,
        Self::ContextNotPresent,
        Self::ContextInvalid,
        Self::AddressBeyondWidth,
        Self::WriteNotPermitted,
        Self::ReadNotPermitted,
        Self::PagingTableAccess,
        Self::RootTableAccess,
        Self::ContextTableAccess,
        Self::RootReserved,
        Self::ContextReserved,
        Self::PagingReserved,
        Self::RequestTypeBlocked,
        Self::OutputInInterruptRange,
        Self::TableModeInvalid,
        Self::PasidInLegacyMode,
        Self::PageRequestInLegacyMode,
        Self::AbortMode,
        Self::ScalableRootAccess,
        Self::ScalableRootNotPresent,
        Self::ScalableRootReserved,
        Self::ScalableContextAccess,
        Self::ScalableContextNotPresent,
        Self::ScalableContextReserved,
        Self::ScalableContextInvalid,
        Self::DeviceTlbNotEnabled,
        Self::PasidNotEnabled,
        Self::PasidBeyondDirectory,
        Self::PageRequestNotEnabled,
        Self::PasidIsRidPasid,
        Self::PasidDirectoryAccess,
        Self::PasidDirectoryNotPresent,
        Self::PasidDirectoryReserved,
        Self::PasidEntryAccess,
        Self::PasidEntryNotPresent,
        Self::PasidEntryReserved,
        Self::PasidEntryInvalid,
        Self::FirstStageAccess,
        Self::FirstStageNotPresent,
        Self::FirstStageReserved,
        Self::FirstStageRootAccess,
        Self::FirstStageBeyondWidth,
        Self::FirstStageRootRead,
        Self::FirstStageTableRead,
        Self::FirstStageTableWrite,
        Self::SecondStageAccess,
        Self::SecondStageNotPermitted,
        Self::SecondStageReserved,
        Self::SecondStageRootAccess,
        Self::SecondStageFlagsNotSnooped,
        Self::SecondStageFlagsNotSet,
        Self::NotCanonical,
        Self::SupervisorPage,
        Self::BeyondHostWidth,
        Self::BeyondSecondStageWidth,
        Self::ScalableWriteNotPermitted,
        Self::ScalableReadNotPermitted,
        Self::ScalableOutputInInterruptRange,
        Self::PasidBeyondSize,
        Self::FirstStageFlagsNotSnooped,
        Self::FirstStageFlagsNotSet,
    ];

    /// The code that stands in a fault record.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Whether FPD silences it (the "qualified" faults of section 7.1.3): all that are found at or after a context
    /// entry that could be read, but for a PASID directory or table that could not.
    pub const fn qualified(self) -> bool {
        !matches!(
            self,
            Self::RootNotPresent
                | Self::RootTableAccess
                | Self::ContextTableAccess
                | Self::RootReserved
                | Self::TableModeInvalid
                | Self::PasidInLegacyMode
                | Self::PageRequestInLegacyMode
                | Self::AbortMode
                | Self::ScalableRootAccess
                | Self::ScalableRootNotPresent
                | Self::ScalableRootReserved
                | Self::ScalableContextAccess
                | Self::PasidDirectoryAccess
                | Self::PasidEntryAccess
        )
    }
}

/// Why an interrupt request was blocked. Section 5.1.4.1, table of fault conditions.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum InterruptFaultReason {
    /// A reserved field of a request in remappable format is not zero.
    RequestReserved = 0x20,
    /// The interrupt index is beyond the table.
    IndexBeyondTable = 0x21,
    /// The entry is not present.
    EntryNotPresent = 0x22,
    /// The entry could not be read.
    TableAccess = 0x23,
    /// A reserved field of a present entry is not zero, or a field has a reserved value.
    EntryReserved = 0x24,
    /// A request in compatibility format, while EIME is set or CFIS is clear.
    CompatibilityBlocked = 0x25,
    /// The requester is not who the entry is for.
    SourceBlocked = 0x26,
    /// The posted interrupt descriptor could not be accessed.
    DescriptorAccess = 0x27,
    /// A reserved field of the posted interrupt descriptor is not zero.
    DescriptorReserved = 0x28,
}

impl InterruptFaultReason {
    /// Every reason, in ascending order of its code.
    pub const ALL: [Self; 9] = [
        Self::RequestReserved,
        Self::IndexBeyondTable,
        Self::EntryNotPresent,
        Self::TableAccess,
        Self::EntryReserved,
        Self::CompatibilityBlocked,
        Self::SourceBlocked,
        Self::DescriptorAccess,
        Self::DescriptorReserved,
    ];

    /// The code that stands in a fault record.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Whether FPD of the entry silences it: all that are found in an entry that could be read.
    pub const fn qualified(self) -> bool {
        matches!(
            self,
            Self::EntryNotPresent
                | Self::EntryReserved
                | Self::SourceBlocked
                | Self::DescriptorAccess
                | Self::DescriptorReserved
        )
    }
}

/// Bits 127:64 of a fault recording register; bits 63:12 of the lower half are the faulting page. Section 11.4.7.6.
#[bitfield(u64)]
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultRecordHigh {
    /// SID.
    pub source: u16,
    #[bits(12)]
    __: u16,
    /// T2.
    pub type_2: bool,
    /// PRIV.
    pub privileged: bool,
    /// EXE.
    pub execute: bool,
    /// PP: `pasid` is valid.
    pub pasid_present: bool,
    /// FR: see [`FaultReason`].
    pub reason: u8,
    /// PV.
    #[bits(20)]
    pub pasid: u32,
    /// AT.
    #[bits(2)]
    pub address_type: u8,
    /// T1: with T2 clear, 1 is a read, 0 a write.
    pub type_1: bool,
    /// F (W1C): the record is full.
    pub fault: bool,
}
