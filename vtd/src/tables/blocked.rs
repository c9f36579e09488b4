//! Why a walk does not let a request through.

use crate::faults::Access;
use crate::spec::fault::FaultReason;

/// Why a translation does not let a request through. Which reason that is depends on the table mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Blocked {
    /// Pass-through, and the address is beyond the host address width.
    BeyondHostWidth,
    /// The address is beyond the width of the tables.
    BeyondWidth,
    /// The topmost table could not be read.
    RootAccess,
    /// Another one.
    TableAccess,
    /// A reserved field of a present entry is not zero.
    Reserved,
    /// An entry, or all of them together, permit nothing.
    NothingPermitted,
    /// They do not permit to read.
    ReadNotPermitted,
    /// They do not permit to write.
    WriteNotPermitted,
    /// The translation leads into the interrupt address range.
    OutputInInterruptRange,
    /// The address is not canonical in the first stage.
    NotCanonical,
    /// The topmost first-stage table could not be read.
    FirstStageRootAccess,
    /// Another one.
    FirstStageAccess,
    /// A first-stage entry is not present.
    FirstStageNotPresent,
    /// A reserved field of a present first-stage entry is not zero.
    FirstStageReserved,
    /// A first-stage entry keeps user requests out.
    SupervisorPage,
    /// A first-stage flag is to be set by a walk that does not snoop.
    FlagsNotSnooped,
    /// A first-stage flag could not be set.
    FlagsNotSet,
    /// A first-stage address is beyond the width of the second stage beneath it.
    FirstStageBeyondWidth,
    /// The second stage does not permit to read the topmost first-stage table.
    FirstStageRootRead,
    /// It does not permit to read another one.
    FirstStageTableRead,
    /// It does not permit to set a flag in a first-stage table, nor to read one where it has flags itself.
    FirstStageTableWrite,
    /// A second-stage flag is to be set by a walk that does not snoop.
    SecondStageFlagsNotSnooped,
    /// A second-stage flag could not be set.
    SecondStageFlagsNotSet,
}

impl Blocked {
    /// The reason in a fault record. Section 7.1.3.
    pub(crate) const fn reason(self, access: Access, scalable: bool) -> FaultReason {
        match (self, scalable) {
            // There is a first stage in scalable mode only, and flags of the second.
            (Self::NotCanonical, _) => FaultReason::NotCanonical,
            (Self::FirstStageRootAccess, _) => FaultReason::FirstStageRootAccess,
            (Self::FirstStageAccess, _) => FaultReason::FirstStageAccess,
            (Self::FirstStageNotPresent, _) => FaultReason::FirstStageNotPresent,
            (Self::FirstStageReserved, _) => FaultReason::FirstStageReserved,
            (Self::SupervisorPage, _) => FaultReason::SupervisorPage,
            (Self::FlagsNotSnooped, _) => FaultReason::FirstStageFlagsNotSnooped,
            (Self::FlagsNotSet, _) => FaultReason::FirstStageFlagsNotSet,
            (Self::FirstStageBeyondWidth, _) => FaultReason::FirstStageBeyondWidth,
            (Self::FirstStageRootRead, _) => FaultReason::FirstStageRootRead,
            (Self::FirstStageTableRead, _) => FaultReason::FirstStageTableRead,
            (Self::FirstStageTableWrite, _) => FaultReason::FirstStageTableWrite,
            (Self::SecondStageFlagsNotSnooped, _) => FaultReason::SecondStageFlagsNotSnooped,
            (Self::SecondStageFlagsNotSet, _) => FaultReason::SecondStageFlagsNotSet,
            (Self::BeyondHostWidth | Self::BeyondWidth, false) => FaultReason::AddressBeyondWidth,
            (Self::RootAccess | Self::TableAccess, false) => FaultReason::PagingTableAccess,
            (Self::Reserved, false) => FaultReason::PagingReserved,
            (Self::NothingPermitted, false) => match access {
                Access::Write => FaultReason::WriteNotPermitted,
                Access::Read | Access::ZeroLengthRead => FaultReason::ReadNotPermitted,
            },
            (Self::ReadNotPermitted, false) => FaultReason::ReadNotPermitted,
            (Self::WriteNotPermitted, false) => FaultReason::WriteNotPermitted,
            (Self::OutputInInterruptRange, false) => FaultReason::OutputInInterruptRange,
            (Self::BeyondHostWidth, true) => FaultReason::BeyondHostWidth,
            (Self::BeyondWidth, true) => FaultReason::BeyondSecondStageWidth,
            (Self::RootAccess, true) => FaultReason::SecondStageRootAccess,
            (Self::TableAccess, true) => FaultReason::SecondStageAccess,
            (Self::Reserved, true) => FaultReason::SecondStageReserved,
            (Self::NothingPermitted, true) => FaultReason::SecondStageNotPermitted,
            (Self::ReadNotPermitted, true) => FaultReason::ScalableReadNotPermitted,
            (Self::WriteNotPermitted, true) => FaultReason::ScalableWriteNotPermitted,
            (Self::OutputInInterruptRange, true) => FaultReason::ScalableOutputInInterruptRange,
        }
    }
}
