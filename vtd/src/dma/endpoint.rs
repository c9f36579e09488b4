//! The way of an emulated device to guest memory (rule 6): sessions, translation, and access.
//!
//! An [`Endpoint`] is a requester. Each access happens inside a [`DmaSession`](super::DmaSession); an invalidation
//! waits for the sessions that are open, so what it took away is not touched any more when the guest sees that it is
//! done. A session must not span a system call, MMIO dispatch, or a wait for the guest. How a hit gets by without a
//! lock is told in [`super::iotlb`].

use std::iter;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, Permissions};

use super::due::Due;
use super::iotlb::Iotlb;
use super::noted::Noted;
use crate::faults::{Access, Fault};
use crate::ids::{Gpa, Iova, Pasid, Requester, Stream};
use crate::space::Perm;
use crate::tables::blocked::Blocked;
use crate::tables::flags::Request;
use crate::tables::second_stage::{Reserved, permits};
use crate::unit::Unit;

pub(super) const PAGE: u64 = 4096;

/// Why a DMA access did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DmaError {
    /// The unit blocked it. It has been recorded.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The interrupt address range is no memory: a write there is a message, which a device sends otherwise. No fault.
    #[error("{0} lies in the interrupt address range")]
    InterruptRange(Iova),
    /// The device has no source id, because no bus number leads to it, and translation is on. No fault: there is no id
    /// to record.
    #[error("{0} was asked for by a device without a source id")]
    NoSourceId(Iova),
    /// A translated request to this address where the unit takes none: it has no device-TLBs, translation is off, or
    /// the device has no source id. No fault. Section 4.2.1.
    #[error("a translated request to {0} is not supported")]
    Unsupported(Gpa),
    /// The translation leads to no memory. No fault: hardware would end such a request elsewhere. Nor is there memory
    /// for what goes on beyond the last address that there is, [`u64::MAX`].
    #[error("{iova} leads to {gpa}, where there is no memory")]
    NoMemory {
        /// The address of the request.
        iova: Iova,
        /// Where it leads.
        gpa: Gpa,
    },
}

/// What a look-up is for, as bits of [`Perm`]; none for a read of no bytes. There is no look-up for nothing: what asks
/// for no access gets no address.
#[derive(Clone, Copy)]
pub(super) struct Wanted(u8);

impl Wanted {
    /// What `permissions` stand for; `None` for none.
    pub(super) fn of(permissions: Permissions) -> Option<Self> {
        match permissions {
            Permissions::No => None,
            Permissions::Read => Some(Access::Read.into()),
            Permissions::Write => Some(Access::Write.into()),
            Permissions::ReadWrite => Some(Self(Perm::ReadWrite as u8)),
        }
    }

    /// The bits of [`Perm`] that are wanted.
    #[inline(always)]
    pub(super) const fn bits(self) -> u8 {
        self.0
    }

    /// What is asked for first: to read, where that is wanted.
    pub(super) const fn first(self) -> Access {
        match (self.reads(), self.writes()) {
            (true, _) => Access::Read,
            (false, true) => Access::Write,
            (false, false) => Access::ZeroLengthRead,
        }
    }

    const fn reads(self) -> bool {
        self.0 & Perm::Read as u8 != 0
    }

    pub(super) const fn writes(self) -> bool {
        self.0 & Perm::Write as u8 != 0
    }

    /// The same, as a walk is told.
    #[inline(always)]
    pub(super) const fn request(self) -> Request {
        Request { access: self.first(), writes: self.writes() }
    }

    /// Whether `perm` lets all of it through; else the access that it does not.
    pub(super) fn permitted(self, perm: Perm) -> Result<(), (Access, Blocked)> {
        let mut accesses = iter::once(self.first()).chain(self.writes().then_some(Access::Write));
        accesses.try_for_each(|access| permits(perm, access).map_err(|blocked| (access, blocked)))
    }
}

impl From<Access> for Wanted {
    fn from(access: Access) -> Self {
        Self(access as u8)
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Unit<M> {
    /// The way to guest memory for an emulated device. The device is there for as long as the endpoint is: when it is
    /// dropped, another function that core its source id has that alone. So it is not to be dropped inside a
    /// [`crate::DmaSession`] of another endpoint, or by a listener or a sink that the unit calls.
    pub fn endpoint(self: &Arc<Self>, requester: Requester) -> Endpoint<M> {
        self.endpoint_of(requester.into())
    }

    /// The same for requests that carry a PASID, or that do not.
    ///
    /// Each endpoint caches translations of its own, some 80 KiB, so a device has as many of them as it uses at a time.
    pub fn endpoint_of(self: &Arc<Self>, stream: Stream) -> Endpoint<M> {
        let iotlb = Arc::default();
        let Stream { requester, pasid } = stream;
        self.spaces().add_endpoint(&self.core, requester, &iotlb);
        let reserved = Reserved::of(&self.core.config);
        Endpoint { unit: self.clone(), requester, pasid, iotlb, reserved, noted: Noted::default() }
    }
}

/// A requester that is emulated, and its cached translations.
pub struct Endpoint<M: GuestMemoryBackend + Clone + Send + Sync> {
    pub(super) unit: Arc<Unit<M>>,
    pub(super) requester: Requester,
    pub(super) pasid: Option<Pasid>,
    pub(super) iotlb: Arc<Iotlb>,
    /// Of the unit's second-stage entries.
    pub(super) reserved: Reserved,
    pub(super) noted: Noted,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    /// The requester, by the name that the endpoint was made with ([`Unit::renumber`]).
    pub fn requester(&self) -> Requester {
        self.requester
    }

    /// The PASID that its requests carry.
    pub fn pasid(&self) -> Option<Pasid> {
        self.pasid
    }

    /// The unit that it stands behind.
    pub fn unit(&self) -> &Arc<Unit<M>> {
        &self.unit
    }

    /// What `iova`'s page leads to, from the cache or the tables; faults are not recorded.
    ///
    /// All that is wanted is asked of one translation: of two, each could be of another moment, and allow half of it.
    #[inline]
    pub(super) fn look_up(&self, iova: Iova, wanted: Wanted, due: &Due) -> Result<Gpa, DmaError> {
        match self.find(iova, wanted) {
            Some(gpa) => Ok(gpa),
            None => self.walk(iova, wanted, due),
        }
    }

    /// The same from what is cached, of pages or of the tables. `None` where that is not enough.
    #[inline(always)]
    pub(super) fn find(&self, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        let page = match self.iotlb.page(iova.0 / PAGE) {
            Some(page) if page.permits(wanted.bits()) => page.target(),
            _ => self.miss(iova, wanted)?,
        };
        Some(Gpa(page.0 + iova.0 % PAGE))
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Drop for Endpoint<M> {
    fn drop(&mut self) {
        self.unit.spaces().remove_endpoint(&self.unit.core, self.requester, &self.iotlb);
    }
}
