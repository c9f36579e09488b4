//! Faults: what a guest's device did wrong, and how it is told to the guest. Sections 7.2 and 7.3.

use crate::ids::{Iova, Pasid, Requester};
use crate::spec::fault::FaultReason;

/// What a device wants to do. The bits are those of [`Perm`](crate::Perm) that it needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read.
    Read = 1,
    /// Write.
    Write = 2,
    /// A read of no bytes: it needs no more than a present translation. Section 3.7.
    ZeroLengthRead = 0,
}

/// What kind of request it is, beside what it wants. Sections 4.1 and 7.4.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RequestType {
    /// A read or a write whose address is to be translated: AT is 00.
    #[default]
    Untranslated,
    /// What a device-TLB asks a translation with: AT is 01.
    Translation,
    /// A read or a write whose address comes from a device-TLB: AT is 10.
    Translated,
    /// A page request.
    Page,
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
    /// Which kind of request it was.
    pub request: RequestType,
    /// Why it was blocked.
    pub reason: FaultReason,
    /// FPD of an entry that led there silences it: it is not recorded.
    pub silenced: bool,
}
