//! The way of an emulated device to guest memory (rule 6): sessions, translation, and access.
//!
//! An [`Endpoint`] is a requester. Each access happens inside a [`DmaSession`](super::DmaSession); an invalidation
//! waits for the sessions that are open, so what it took away is not touched any more when the guest sees that it is
//! done. A session must not span a system call, MMIO dispatch, or a wait for the guest. How a hit gets by without a
//! lock is told in [`super::iotlb`].

use std::iter;
use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, Permissions};

use super::iotlb::{Iotlb, Sampled};
use crate::core::Core;
use crate::faults::{Access, Fault};
use crate::ids::{Gpa, Iova, Pasid, Requester, Stream};
use crate::source_ids::Source;
use crate::space::Perm;
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::fault::FaultReason;
use crate::tables::blocked::Blocked;
use crate::tables::context::{Resolved, Unresolved};
use crate::tables::first_stage;
use crate::tables::resolve::resolve;
use crate::tables::second_stage::{DIRECTORY_SPAN, Directory, Translated, permits};
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

/// What a look-up is for. There is no look-up for nothing: what asks for no access gets no address.
#[derive(Clone, Copy)]
pub(super) struct Wanted {
    first: Access,
    also: Option<Access>,
}

impl Wanted {
    /// What `permissions` stand for; `None` for none.
    pub(super) fn of(permissions: Permissions) -> Option<Self> {
        match permissions {
            Permissions::No => None,
            Permissions::Read => Some(Access::Read.into()),
            Permissions::Write => Some(Access::Write.into()),
            Permissions::ReadWrite => Some(Self { first: Access::Read, also: Some(Access::Write) }),
        }
    }

    fn writes(self) -> bool {
        self.first == Access::Write || self.also == Some(Access::Write)
    }

    /// Whether `perm` lets all of it through; else the access that it does not.
    fn permitted(self, perm: Perm) -> Result<(), (Access, Blocked)> {
        let mut accesses = iter::once(self.first).chain(self.also);
        accesses.try_for_each(|access| permits(perm, access).map_err(|blocked| (access, blocked)))
    }
}

impl From<Access> for Wanted {
    fn from(access: Access) -> Self {
        Self { first: access, also: None }
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
        Endpoint { unit: self.clone(), requester, pasid, iotlb }
    }
}

/// A requester that is emulated, and its cached translations.
pub struct Endpoint<M: GuestMemoryBackend + Clone + Send + Sync> {
    pub(super) unit: Arc<Unit<M>>,
    requester: Requester,
    pasid: Option<Pasid>,
    pub(super) iotlb: Arc<Iotlb>,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    /// The requester, by the name that the endpoint was made with ([`Unit::renumber`]).
    pub fn requester(&self) -> Requester {
        self.requester
    }

    /// The unit that it stands behind.
    pub fn unit(&self) -> &Arc<Unit<M>> {
        &self.unit
    }

    /// What `iova`'s page leads to, from the cache or the tables; faults are not recorded.
    ///
    /// All that is wanted is asked of one translation: of two, each could be of another moment, and allow half of it.
    pub(super) fn look_up(&self, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        let offset = iova.0 % PAGE;
        if let Some((page, perm)) = self.iotlb.get(iova.0 / PAGE)
            && wanted.permitted(perm).is_ok()
        {
            return Ok(Gpa(page.0 + offset));
        }
        self.walk(iova, wanted).map(|page| Gpa(page.0 + offset))
    }

    /// The slow way. The cache's epoch is sampled before the first table read.
    fn walk(&self, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        // Requests without PASID to this range are interrupts, also with translation off, when a PASID is ignored.
        // Section 3.15.
        if INTERRUPT_WINDOW.contains(iova.0) && (self.pasid.is_none() || !self.unit.core.translation.load().enabled) {
            return Err(DmaError::InterruptRange(iova));
        }
        let sampled = self.iotlb.sample();
        self.walk_cached(sampled, iova, wanted).map_or_else(|| self.walk_tables(sampled, iova, wanted), Ok)
    }

    /// A walk from what is cached of the tables. `None` where that is not enough, and where the access is not
    /// permitted: what is told about that is as the tables are now.
    fn walk_cached(&self, sampled: Sampled, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        let Core { memory, config, .. } = &self.unit.core;
        let found = match self.iotlb.directory(sampled, iova.0 / DIRECTORY_SPAN) {
            Some(word) => Directory::unpack(word).translate(memory, config, iova, wanted.first),
            None => self.walk_from(sampled, Resolved::unpack(self.iotlb.context(sampled)?, config), iova, wanted),
        };
        let found = found.ok().filter(|found| wanted.permitted(found.perm).is_ok())?;
        self.iotlb.insert_page(sampled, iova.0 / PAGE, found.page, found.perm);
        Some(found.page)
    }

    /// A walk from the root table.
    fn walk_tables(&self, sampled: Sampled, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        let core = &self.unit.core;
        // Sampled before: an id that changes takes the epoch forward.
        let source = core.sources.load().of(self.requester);
        let translation = **core.translation.load();
        let resolved = match source {
            Source::Own(id) => resolve(&core.memory, &core.config, translation, id, self.pasid),
            Source::Shared(_) | Source::None if !translation.enabled => Ok(Resolved::Off),
            // Of two entries, neither is said to be for it.
            Source::Shared(_) => Err(FaultReason::ContextInvalid.into()),
            Source::None => return Err(DmaError::NoSourceId(iova)),
        };
        let fault = |access: Access, reason: FaultReason, disabled: bool| {
            let silenced = disabled && reason.qualified();
            let (requester, pasid) = (source.seen(self.requester), self.pasid);
            DmaError::Fault(Fault { requester, pasid, iova, access, reason, silenced })
        };
        let resolved = resolved.map_err(|Unresolved { reason, fault_processing_disable }| {
            fault(wanted.first, reason, fault_processing_disable)
        })?;
        self.iotlb.note_domain(resolved.domain());
        self.iotlb.insert_context(sampled, resolved.pack());
        let disabled = resolved.fault_processing_disable();
        let blocked =
            |access, blocked: Blocked| fault(access, blocked.reason(access, translation.is_scalable()), disabled);
        let found = self.walk_from(sampled, resolved, iova, wanted);
        let found = found.map_err(|why| blocked(wanted.first, why))?;
        wanted.permitted(found.perm).map_err(|(access, why)| blocked(access, why))?;
        self.iotlb.insert_page(sampled, iova.0 / PAGE, found.page, found.perm);
        Ok(found.page)
    }

    /// A walk from what the tables say about the requester, whose domain has been noted.
    fn walk_from(
        &self,
        sampled: Sampled,
        resolved: Resolved,
        iova: Iova,
        wanted: Wanted,
    ) -> Result<Translated, Blocked> {
        let Core { memory, config, .. } = &self.unit.core;
        let untranslated = Translated { page: Gpa(iova.0 & !(PAGE - 1)), perm: Perm::ReadWrite };
        match resolved {
            Resolved::Off => Ok(untranslated),
            // Pass-through is for addresses of the unit's width, too. Section 3.9.
            Resolved::PassThrough { .. } if iova.0 >> config.host_address_width != 0 => Err(Blocked::BeyondHostWidth),
            // Of requests with a PASID.
            Resolved::PassThrough { .. } if INTERRUPT_WINDOW.contains(iova.0) => Err(Blocked::OutputInInterruptRange),
            Resolved::PassThrough { .. } => Ok(untranslated),
            Resolved::Paged { space, .. } => {
                let directory = Directory::find(memory, config, &space, iova)?;
                if directory.large() {
                    self.iotlb.note_large();
                }
                self.iotlb.insert_directory(sampled, iova.0 / DIRECTORY_SPAN, directory.pack());
                directory.translate(memory, config, iova, wanted.first)
            }
            Resolved::First { tables, .. } => {
                let found = first_stage::translate(memory, config, tables, iova, wanted.writes())?;
                // An IOTLB invalidation of pages, whose addresses are those of the second stage, reaches all of a first
                // stage's domain (section 6.5.2.3). So does then one of a PASID's pages, which need not.
                self.iotlb.note_large();
                Ok(found)
            }
        }
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Drop for Endpoint<M> {
    fn drop(&mut self) {
        self.unit.spaces().remove_endpoint(&self.unit.core, self.requester, &self.iotlb);
    }
}
