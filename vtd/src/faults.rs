//! Faults: what a guest's device did wrong, and how it is told to the guest. Sections 7.2 and 7.3.

use crate::ids::{Iova, Pasid, Requester};
use crate::spec::fault::FaultReason;

/// What a device wants to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read.
    Read,
    /// Write.
    Write,
    /// A read of no bytes: it needs no more than a present translation. Section 3.7.
    ZeroLengthRead,
}

/// A request that the unit blocked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{requester} was blocked at {iova} ({access:?}): {reason:?} ({:#x})", .reason.code())]
pub struct Fault {
    /// Who made it.
    pub requester: Requester,
    /// The PASID that the request carried.
    pub pasid: Option<Pasid>,
    /// Where.
    pub iova: Iova,
    /// What it wanted.
    pub access: Access,
    /// Why it was blocked.
    pub reason: FaultReason,
    /// FPD of an entry that led there silences it: it is not recorded.
    pub silenced: bool,
}
