//! The way of an emulated device to guest memory (rule 6): sessions, translation, and access.
//!
//! An [`Endpoint`] is a requester. Each access happens inside a [`DmaSession`]; an invalidation waits for the sessions
//! that are open, so what it took away is not touched any more when the guest sees that it is done. A session must not
//! span a system call, MMIO dispatch, or a wait for the guest. How a hit gets by without a lock is told in `iotlb.rs`.

use std::iter::{self, FusedIterator};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, Permissions,
    VolatileSlice,
};

use crate::fault::{Access, Fault};
use crate::ids::{Gpa, Iova, Requester};
use crate::iotlb::{Iotlb, Sampled, SessionToken};
use crate::space::{Msi, Perm};
use crate::spaces::Source;
use crate::spec::fault::FaultReason;
use crate::spec::{INTERRUPT_FIRST, INTERRUPT_LAST};
use crate::tables::{Resolved, Unresolved, resolve};
use crate::unit::{Shared, Unit};
use crate::walk::{DIRECTORY_SPAN, Directory, Translated, permits};

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
    /// The translation leads to no memory. No fault: hardware would end such a request elsewhere. Nor is there memory for
    /// what goes on beyond the last address that there is, [`u64::MAX`].
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
struct Wanted {
    first: Access,
    also: Option<Access>,
}

impl Wanted {
    /// What `permissions` stand for; `None` for none.
    fn of(permissions: Permissions) -> Option<Self> {
        match permissions {
            Permissions::No => None,
            Permissions::Read => Some(Access::Read.into()),
            Permissions::Write => Some(Access::Write.into()),
            Permissions::ReadWrite => Some(Self { first: Access::Read, also: Some(Access::Write) }),
        }
    }

    /// Whether `perm` lets all of it through; else the access that it does not, and the reason.
    fn permitted(self, perm: Perm) -> Result<(), (Access, FaultReason)> {
        let mut accesses = iter::once(self.first).chain(self.also);
        accesses.try_for_each(|access| permits(perm, access).map_err(|reason| (access, reason)))
    }
}

impl From<Access> for Wanted {
    fn from(access: Access) -> Self {
        Self { first: access, also: None }
    }
}

/// A requester that is emulated, and its cached translations.
pub struct Endpoint<M: GuestMemoryBackend + Clone + Send + Sync> {
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
        DmaSession { endpoint: self, token: self.iotlb.open_session(), message: Mutex::default() }
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
    ///
    /// All that is wanted is asked of one translation: of two, each could be of another moment, and allow half of it.
    fn look_up(&self, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
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
        // Untranslated requests to this range are interrupts, also with translation off. Section 3.14.
        if (INTERRUPT_FIRST..=INTERRUPT_LAST).contains(&iova.0) {
            return Err(DmaError::InterruptRange(iova));
        }
        let sampled = self.iotlb.sample();
        self.walk_cached(sampled, iova, wanted).map_or_else(|| self.walk_tables(sampled, iova, wanted), Ok)
    }

    /// A walk from what is cached of the tables. `None` where that is not enough, and where the access is not permitted: what is
    /// told about that is as the tables are now.
    fn walk_cached(&self, sampled: Sampled, iova: Iova, wanted: Wanted) -> Option<Gpa> {
        let Shared { memory, config, .. } = &self.unit.shared;
        let found = match self.iotlb.directory(sampled, iova.0 / DIRECTORY_SPAN) {
            Some(word) => Directory::unpack(word).translate(memory, config, iova, wanted.first),
            None => self.walk_from(sampled, Resolved::unpack(self.iotlb.context(sampled)?, config), iova, wanted.first),
        };
        let found = found.ok().filter(|found| wanted.permitted(found.perm).is_ok())?;
        self.iotlb.insert_page(sampled, iova.0 / PAGE, found.page, found.perm);
        Some(found.page)
    }

    /// A walk from the root table.
    fn walk_tables(&self, sampled: Sampled, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        let shared = &self.unit.shared;
        // Sampled before: an id that changes takes the epoch forward.
        let source = shared.sources.load().of(self.requester);
        let translation = **shared.translation.load();
        let resolved = match source {
            Source::Own(id) => resolve(&shared.memory, &shared.config, translation, id),
            Source::Shared(_) | Source::None if !translation.enabled => Ok(Resolved::Off),
            // Of two entries, neither is said to be for it.
            Source::Shared(_) => Err(FaultReason::ContextInvalid.into()),
            Source::None => return Err(DmaError::NoSourceId(iova)),
        };
        let fault = |access: Access, reason: FaultReason, disabled: bool| {
            let silenced = disabled && reason.qualified();
            DmaError::Fault(Fault { requester: source.seen(self.requester), iova, access, reason, silenced })
        };
        let resolved = resolved.map_err(|Unresolved { reason, fault_processing_disable }| {
            fault(wanted.first, reason, fault_processing_disable)
        })?;
        self.iotlb.note_domain(resolved.domain());
        self.iotlb.insert_context(sampled, resolved.pack());
        let disabled = resolved.fault_processing_disable();
        let found = self.walk_from(sampled, resolved, iova, wanted.first);
        let found = found.map_err(|reason| fault(wanted.first, reason, disabled))?;
        wanted.permitted(found.perm).map_err(|(access, reason)| fault(access, reason, disabled))?;
        self.iotlb.insert_page(sampled, iova.0 / PAGE, found.page, found.perm);
        Ok(found.page)
    }

    /// A walk from what the tables say about the requester, whose domain has been noted.
    fn walk_from(
        &self,
        sampled: Sampled,
        resolved: Resolved,
        iova: Iova,
        access: Access,
    ) -> Result<Translated, FaultReason> {
        let Shared { memory, config, .. } = &self.unit.shared;
        let untranslated = Translated { page: Gpa(iova.0 & !(PAGE - 1)), perm: Perm::ReadWrite };
        match resolved {
            Resolved::Off => Ok(untranslated),
            // Pass-through is for addresses of the unit's width, too. Section 3.9.
            Resolved::PassThrough { .. } if iova.0 >> config.host_address_width != 0 => {
                Err(FaultReason::AddressBeyondWidth)
            }
            Resolved::PassThrough { .. } => Ok(untranslated),
            Resolved::Paged { space, .. } => {
                let directory = Directory::find(memory, config, &space, iova, access)?;
                if directory.large() {
                    self.iotlb.note_large();
                }
                if let Some(word) = directory.pack() {
                    self.iotlb.insert_directory(sampled, iova.0 / DIRECTORY_SPAN, word);
                }
                directory.translate(memory, config, iova, access)
            }
        }
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Drop for Endpoint<M> {
    fn drop(&mut self) {
        self.unit.spaces().remove_endpoint(&self.unit.shared, self.requester, &self.iotlb);
    }
}

/// Accesses of an endpoint that an invalidation waits for.
pub struct DmaSession<'e, M: GuestMemoryBackend + Clone + Send + Sync> {
    endpoint: &'e Endpoint<M>,
    token: SessionToken,
    /// The fault event's, to be sent when the session is over: that may be a system call.
    message: Mutex<Option<Msi>>,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Drop for DmaSession<'_, M> {
    fn drop(&mut self) {
        self.endpoint.iotlb.close_session(&self.token);
        let message = self.message.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
        self.endpoint.unit.shared.signal(message);
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> DmaSession<'_, M> {
    /// Where `iova` leads, up to the end of its page.
    ///
    /// # Errors
    /// A fault, which has been recorded, or that the address is one of interrupts.
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Gpa, DmaError> {
        self.translate_for(iova, access.into())
    }

    fn translate_for(&self, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        self.endpoint.look_up(iova, wanted).inspect_err(|error| {
            if let DmaError::Fault(fault) = error
                && let Some(message) = self.endpoint.unit.shared.record(fault)
            {
                *self.message.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(message);
            }
        })
    }

    /// Reads `data.len()` bytes at `iova`. See [`Endpoint::read`].
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        let memory = &self.endpoint.unit.shared.memory;
        self.each_page(iova, data.len(), Access::Read, |gpa, part| memory.read_slice(&mut data[part], gpa))
    }

    /// Writes `data` at `iova`. See [`Endpoint::write`].
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        let memory = &self.endpoint.unit.shared.memory;
        self.each_page(iova, data.len(), Access::Write, |gpa, part| memory.write_slice(&data[part], gpa))
    }

    /// Calls `transfer` for the part of each page of `len` bytes at `iova`, in order.
    fn each_page(
        &self,
        iova: Iova,
        len: usize,
        access: Access,
        mut transfer: impl FnMut(GuestAddress, Range<usize>) -> Result<(), GuestMemoryError>,
    ) -> Result<(), DmaError> {
        let mut done = 0;
        while done < len {
            let at = after(iova, done).ok_or(DmaError::NoMemory { iova, gpa: Gpa(u64::MAX) })?;
            let gpa = self.translate(at, access)?;
            let part = done..done + in_page(at, len - done);
            done = part.end;
            transfer(GuestAddress(gpa.0), part).map_err(|_| DmaError::NoMemory { iova: at, gpa })?;
        }
        Ok(())
    }
}

/// The address `len` bytes behind `iova`, if there is one.
fn after(iova: Iova, len: usize) -> Option<Iova> {
    iova.0.checked_add(len as u64).map(Iova)
}

/// How many of `len` bytes at `iova` are in its page.
fn in_page(iova: Iova, len: usize) -> usize {
    len.min((PAGE - iova.0 % PAGE) as usize)
}

type Slice<'a, M> = VolatileSlice<'a, BS<'a, <<M as GuestMemoryBackend>::R as GuestMemoryRegion>::B>>;

/// Addresses are IOVAs. The slices live no longer than the session, so the compiler keeps the access inside it. Without
/// a permission there is no access, and nothing is reachable.
impl<M: GuestMemoryBackend + Clone + Send + Sync> GuestMemory for DmaSession<'_, M> {
    type PhysicalMemory = M;
    type Bitmap = <M::R as GuestMemoryRegion>::B;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let Some(wanted) = Wanted::of(access) else { return false };
        let memory = &self.endpoint.unit.shared.memory;
        let mut done = 0;
        while done < count {
            let Some(iova) = after(Iova(addr.0), done) else { return false };
            let len = in_page(iova, count - done);
            let gpa = self.endpoint.look_up(iova, wanted);
            if !gpa.is_ok_and(|gpa| GuestMemoryBackend::check_range(memory, GuestAddress(gpa.0), len)) {
                return false;
            }
            done += len;
        }
        true
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        Ok(Slices { session: self, first: Iova(addr.0), done: 0, count, wanted: Wanted::of(access) })
    }
}

/// The slices of `count` bytes from `first` on, one a run of contiguous guest memory.
struct Slices<'a, 'e, M: GuestMemoryBackend + Clone + Send + Sync> {
    session: &'a DmaSession<'e, M>,
    first: Iova,
    done: usize,
    count: usize,
    wanted: Option<Wanted>,
}

impl<'a, M: GuestMemoryBackend + Clone + Send + Sync> Slices<'a, '_, M> {
    fn slice(&self) -> Result<Slice<'a, M>, GuestMemoryError> {
        let iova = after(self.first, self.done).ok_or(GuestMemoryError::GuestAddressOverflow)?;
        let unreachable = || GuestMemoryError::InvalidGuestAddress(GuestAddress(iova.0));
        let wanted = self.wanted.ok_or_else(unreachable)?;
        let left = self.count - self.done;
        let gpa = self.session.translate_for(iova, wanted).map_err(|_| unreachable())?;
        let mut len = in_page(iova, left);
        while len < left {
            // A page that cannot be reached ends this slice; its fault is recorded when its turn comes.
            let Some(next) = after(iova, len) else { break };
            let contiguous = |page: Gpa| Some(page.0) == gpa.0.checked_add(len as u64);
            if !self.session.endpoint.look_up(next, wanted).is_ok_and(contiguous) {
                break;
            }
            len += in_page(next, left - len);
        }
        let memory: &'a M = &self.session.endpoint.unit.shared.memory;
        // Where regions of memory meet, the next call begins at the second one.
        GuestMemoryBackend::get_slices(memory, GuestAddress(gpa.0), len).next().unwrap_or_else(|| Err(unreachable()))
    }
}

impl<'a, M: GuestMemoryBackend + Clone + Send + Sync> Iterator for Slices<'a, '_, M> {
    type Item = Result<Slice<'a, M>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done == self.count {
            return None;
        }
        let slice = self.slice();
        self.done = slice.as_ref().map_or(self.count, |slice| self.done + slice.len());
        Some(slice)
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> FusedIterator for Slices<'_, '_, M> {}

impl<'a, M: GuestMemoryBackend + Clone + Send + Sync>
    GuestMemorySliceIterator<'a, BS<'a, <M::R as GuestMemoryRegion>::B>> for Slices<'a, '_, M>
{
}
