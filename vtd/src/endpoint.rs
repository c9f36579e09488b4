//! The way of an emulated device to guest memory (rule 6): sessions, translation, and access.
//!
//! An [`Endpoint`] is a requester. Each access happens inside a [`DmaSession`]; an invalidation waits for the sessions
//! that are open, so what it took away is not touched any more when the guest sees that it is done. A session must not
//! span a system call, MMIO dispatch, or a wait for the guest. How a hit gets by without a lock is told in `iotlb.rs`.

use std::iter::FusedIterator;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, Permissions,
    VolatileSlice,
};

use crate::fault::{Access, Fault};
use crate::ids::{Gpa, Iova, Requester};
use crate::iotlb::{Iotlb, SessionToken};
use crate::space::Perm;
use crate::spaces::Source;
use crate::spec::fault::FaultReason;
use crate::spec::{INTERRUPT_FIRST, INTERRUPT_LAST};
use crate::tables::{Resolved, Unresolved, resolve};
use crate::unit::Unit;
use crate::walk::{Translated, permits, translate};

const PAGE: u64 = 4096;

/// Why a DMA access did not happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DmaError {
    /// The unit blocked it. It has been recorded.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The interrupt address range is no memory: a write there is a message, which a device sends otherwise. No fault.
    #[error("{0} lies in the interrupt address range")]
    InterruptRange(Iova),
    /// The device has no source id, because no bus number leads to it, and translation is on. No fault: there is no id to record.
    #[error("{0} was asked for by a device without a source id")]
    NoSourceId(Iova),
    /// The translation leads to no memory. No fault: hardware would end such a request elsewhere.
    #[error("{iova} leads to {gpa}, where there is no memory")]
    NoMemory {
        /// The address of the request.
        iova: Iova,
        /// Where it leads.
        gpa: Gpa,
    },
}

/// A requester that is emulated, and its cached translations.
pub struct Endpoint<M> {
    unit: Arc<Unit<M>>,
    requester: Requester,
    iotlb: Arc<Iotlb>,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    pub(crate) fn new(unit: Arc<Unit<M>>, requester: Requester) -> Self {
        Self { unit, requester, iotlb: Arc::default() }
    }

    pub(crate) fn iotlb(&self) -> &Arc<Iotlb> {
        &self.iotlb
    }

    /// The requester, by the name that the endpoint was made with ([`Unit::renumber`]).
    pub fn requester(&self) -> Requester {
        self.requester
    }

    /// The unit that it stands behind.
    pub fn unit(&self) -> &Arc<Unit<M>> {
        &self.unit
    }

    /// Opens a session; it ends when the result is dropped.
    pub fn enter(&self) -> DmaSession<'_, M> {
        DmaSession { endpoint: self, token: self.iotlb.open_session() }
    }

    /// Reads `data.len()` bytes at `iova`, in a session of its own.
    ///
    /// # Errors
    /// The first page that cannot be read; a fault has been recorded. What came before it was read.
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        self.enter().read(iova, data)
    }

    /// Writes `data` at `iova`, in a session of its own.
    ///
    /// # Errors
    /// The first page that cannot be written; a fault has been recorded. What came before it was written.
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        self.enter().write(iova, data)
    }

    /// What `iova`'s page leads to, from the cache or the tables; faults are not recorded.
    fn look_up(&self, iova: Iova, access: Access) -> Result<Gpa, DmaError> {
        let offset = iova.0 % PAGE;
        if let Some((page, perm)) = self.iotlb.get(iova.0 / PAGE)
            && permits(perm, access).is_ok()
        {
            return Ok(Gpa(page.0 + offset));
        }
        self.walk(iova, access).map(|page| Gpa(page.0 + offset))
    }

    /// The slow way. The cache's epoch is sampled before the first table read.
    fn walk(&self, iova: Iova, access: Access) -> Result<Gpa, DmaError> {
        // Untranslated requests to this range are interrupts, also with translation off. Section 3.14.
        if (INTERRUPT_FIRST..=INTERRUPT_LAST).contains(&iova.0) {
            return Err(DmaError::InterruptRange(iova));
        }
        let sampled = self.iotlb.sample();
        let shared = &self.unit.shared;
        // Sampled before: an id that changes takes the epoch forward.
        let source = shared.sources.load().of(self.requester);
        let fault = |reason: FaultReason, disabled: bool| {
            let silenced = disabled && reason.qualified();
            DmaError::Fault(Fault { requester: source.seen(self.requester), iova, access, reason, silenced })
        };
        let page = Gpa(iova.0 & !(PAGE - 1));
        let untranslated = Translated { page, perm: Perm::ReadWrite, large: false };
        let translation = **shared.translation.load();
        let resolved = match source {
            Source::Own(id) => resolve(&shared.memory, &shared.config, translation, id),
            Source::Shared(_) | Source::None if !translation.enabled => Ok(Resolved::Off),
            // Of two entries, neither is said to be for it.
            Source::Shared(_) => Err(FaultReason::ContextInvalid.into()),
            Source::None => return Err(DmaError::NoSourceId(iova)),
        };
        let (domain, found) = match resolved {
            Ok(Resolved::Off) => (None, untranslated),
            Ok(Resolved::PassThrough { domain, fault_processing_disable }) => {
                // Pass-through is for addresses of the unit's width, too. Section 3.9.
                if iova.0 >> shared.config.host_address_width != 0 {
                    return Err(fault(FaultReason::AddressBeyondWidth, fault_processing_disable));
                }
                (Some(domain), untranslated)
            }
            Ok(Resolved::Paged { space, fault_processing_disable }) => {
                let found = translate(&shared.memory, &shared.config, &space, iova, access);
                (Some(space.domain), found.map_err(|reason| fault(reason, fault_processing_disable))?)
            }
            Err(Unresolved { reason, fault_processing_disable }) => {
                return Err(fault(reason, fault_processing_disable));
            }
        };
        self.iotlb.insert(sampled, domain, iova.0 / PAGE, found);
        Ok(found.page)
    }
}

/// Accesses of an endpoint that an invalidation waits for.
pub struct DmaSession<'e, M> {
    endpoint: &'e Endpoint<M>,
    token: SessionToken,
}

impl<M> Drop for DmaSession<'_, M> {
    fn drop(&mut self) {
        self.endpoint.iotlb.close_session(&self.token);
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> DmaSession<'_, M> {
    /// Where `iova` leads, up to the end of its page.
    ///
    /// # Errors
    /// A fault, which has been recorded, or that the address is one of interrupts.
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Gpa, DmaError> {
        self.endpoint.look_up(iova, access).inspect_err(|error| {
            if let DmaError::Fault(fault) = error {
                self.endpoint.unit.shared.record(fault);
            }
        })
    }

    /// Reads `data.len()` bytes at `iova`. See [`Endpoint::read`].
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        let mut rest = data;
        let mut iova = iova;
        while !rest.is_empty() {
            let gpa = self.translate(iova, Access::Read)?;
            let (part, after) = rest.split_at_mut(in_page(iova, rest.len()));
            let memory = &self.endpoint.unit.shared.memory;
            memory.read_slice(part, GuestAddress(gpa.0)).map_err(|_| DmaError::NoMemory { iova, gpa })?;
            iova = Iova(iova.0.wrapping_add(part.len() as u64));
            rest = after;
        }
        Ok(())
    }

    /// Writes `data` at `iova`. See [`Endpoint::write`].
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        let mut rest = data;
        let mut iova = iova;
        while !rest.is_empty() {
            let gpa = self.translate(iova, Access::Write)?;
            let (part, after) = rest.split_at(in_page(iova, rest.len()));
            let memory = &self.endpoint.unit.shared.memory;
            memory.write_slice(part, GuestAddress(gpa.0)).map_err(|_| DmaError::NoMemory { iova, gpa })?;
            iova = Iova(iova.0.wrapping_add(part.len() as u64));
            rest = after;
        }
        Ok(())
    }
}

/// How many of `len` bytes at `iova` are in its page.
fn in_page(iova: Iova, len: usize) -> usize {
    len.min((PAGE - iova.0 % PAGE) as usize)
}

/// The accesses that `permissions` stands for.
fn accesses(permissions: Permissions) -> impl Iterator<Item = Access> {
    let wanted = [(Permissions::Read, Access::Read), (Permissions::Write, Access::Write)];
    wanted.into_iter().filter(move |(each, _)| permissions.allow(*each)).map(|(_, access)| access)
}

type Slice<'a, M> = VolatileSlice<'a, BS<'a, <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B>>;

/// Addresses are IOVAs. The slices live no longer than the session, so the compiler keeps the access inside it.
impl<M: GuestMemoryBackend + Clone + Send + Sync> GuestMemory for DmaSession<'_, M> {
    type PhysicalMemory = M;
    type Bitmap = <M::R as GuestMemoryRegion>::B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let memory = &self.endpoint.unit.shared.memory;
        let mut iova = Iova(addr.0);
        let mut left = count;
        while left > 0 {
            let len = in_page(iova, left);
            let reachable = |access| {
                let gpa = self.endpoint.look_up(iova, access);
                gpa.is_ok_and(|gpa| GuestMemoryBackend::check_range(memory, GuestAddress(gpa.0), len))
            };
            if !accesses(access).all(reachable) {
                return false;
            }
            iova = Iova(iova.0.wrapping_add(len as u64));
            left -= len;
        }
        true
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        Ok(Slices { session: self, iova: Iova(addr.0), left: count, access })
    }
}

/// The slices of a range of IOVAs, one a run of contiguous guest memory.
struct Slices<'a, 'e, M> {
    session: &'a DmaSession<'e, M>,
    iova: Iova,
    left: usize,
    access: Permissions,
}

impl<'a, M: GuestMemoryBackend + Clone + Send + Sync> Slices<'a, '_, M> {
    fn translate(&self, iova: Iova) -> Result<Gpa, GuestMemoryError> {
        let mut gpa = Gpa(iova.0);
        for access in accesses(self.access) {
            let translated = self.session.translate(iova, access);
            gpa = translated.map_err(|_| GuestMemoryError::InvalidGuestAddress(GuestAddress(iova.0)))?;
        }
        Ok(gpa)
    }

    fn slice(&mut self) -> Result<Slice<'a, M>, GuestMemoryError> {
        let gpa = self.translate(self.iova)?;
        let mut len = in_page(self.iova, self.left);
        while len < self.left {
            let next = Iova(self.iova.0.wrapping_add(len as u64));
            // A page that cannot be reached ends this slice; its fault is recorded when its turn comes.
            let reached = |access| self.session.endpoint.look_up(next, access);
            if !accesses(self.access).all(|access| reached(access).is_ok_and(|next| next.0 == gpa.0 + len as u64)) {
                break;
            }
            len += in_page(next, self.left - len);
        }
        let memory: &'a M = &self.session.endpoint.unit.shared.memory;
        let mut slices = GuestMemoryBackend::get_slices(memory, GuestAddress(gpa.0), len);
        let slice = slices.next().unwrap_or(Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(self.iova.0))))?;
        // Where regions of memory meet, the next call begins at the second one.
        self.iova = Iova(self.iova.0.wrapping_add(slice.len() as u64));
        self.left -= slice.len();
        Ok(slice)
    }
}

impl<'a, M: GuestMemoryBackend + Clone + Send + Sync> Iterator for Slices<'a, '_, M> {
    type Item = Result<Slice<'a, M>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let slice = self.slice();
        if slice.is_err() {
            self.left = 0;
        }
        Some(slice)
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> FusedIterator for Slices<'_, '_, M> {}

impl<'a, M: GuestMemoryBackend + Clone + Send + Sync>
    GuestMemorySliceIterator<'a, BS<'a, <M::R as GuestMemoryRegion>::B>> for Slices<'a, '_, M>
{
}
