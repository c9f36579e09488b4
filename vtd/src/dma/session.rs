//! A session: the accesses of an endpoint that an invalidation waits for, as guest memory.

use std::iter::FusedIterator;
use std::ops::Range;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, Permissions,
    VolatileSlice,
};

use super::due::Due;
use super::endpoint::{DmaError, Endpoint, PAGE, Wanted};
use super::iotlb::SessionToken;
use crate::faults::{Access, Fault};
use crate::ids::{Gpa, Iova};

impl<M: GuestMemoryBackend + Clone + Send + Sync> Endpoint<M> {
    /// Opens a session; it ends when the result is dropped.
    #[inline]
    pub fn enter(&self) -> DmaSession<'_, M> {
        DmaSession { endpoint: self, token: self.iotlb.open_session(), due: Due::default() }
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
}

/// Accesses of an endpoint that an invalidation waits for.
pub struct DmaSession<'e, M: GuestMemoryBackend + Clone + Send + Sync> {
    endpoint: &'e Endpoint<M>,
    token: SessionToken,
    /// Sent when the session is over.
    due: Due,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Drop for DmaSession<'_, M> {
    #[inline]
    fn drop(&mut self) {
        self.endpoint.iotlb.close_session(&self.token);
        if let Some(due) = self.due.take() {
            self.endpoint.unit.core.signal(due.fault);
            self.endpoint.unit.core.signal(due.counters);
        }
    }
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> DmaSession<'_, M> {
    /// Where `iova` leads, up to the end of its page.
    ///
    /// # Errors
    /// A fault, which has been recorded, or that the address is one of interrupts.
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Gpa, DmaError> {
        self.translate_for(iova, access.into())
    }

    #[inline]
    fn translate_for(&self, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        match self.endpoint.find(iova, wanted) {
            Some(gpa) => Ok(gpa),
            None => self.translate_by_tables(iova, wanted),
        }
    }

    #[cold]
    fn translate_by_tables(&self, iova: Iova, wanted: Wanted) -> Result<Gpa, DmaError> {
        self.endpoint.walk(iova, wanted, &self.due).inspect_err(|error| {
            if let DmaError::Fault(fault) = error {
                self.record(fault);
            }
        })
    }

    /// Records a fault; its message is sent when the session is over.
    pub(super) fn record(&self, fault: &Fault) {
        self.due.of_faults(self.endpoint.unit.core.record(fault));
    }

    pub(super) fn endpoint(&self) -> &Endpoint<M> {
        self.endpoint
    }

    /// Reads `data.len()` bytes at `iova`. See [`Endpoint::read`].
    pub fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaError> {
        let memory = &self.endpoint.unit.core.memory;
        self.each_page(iova, data.len(), Access::Read, |gpa, part| memory.read_slice(&mut data[part], gpa))
    }

    /// Writes `data` at `iova`. See [`Endpoint::write`].
    pub fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaError> {
        let memory = &self.endpoint.unit.core.memory;
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
        let memory = &self.endpoint.unit.core.memory;
        let mut done = 0;
        while done < count {
            let Some(iova) = after(Iova(addr.0), done) else { return false };
            let len = in_page(iova, count - done);
            let gpa = self.endpoint.look_up(iova, wanted, &self.due);
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
            if !self.session.endpoint.look_up(next, wanted, &self.session.due).is_ok_and(contiguous) {
                break;
            }
            len += in_page(next, left - len);
        }
        let memory: &'a M = &self.session.endpoint.unit.core.memory;
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
