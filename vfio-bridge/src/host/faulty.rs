//! A host one of whose calls fails, in a way that a kernel can fail. For tests: whatever fails, a function reaches
//! nothing that it was not granted.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vtd::{IovaRange, Perm, RefusalCause};

use super::{GroupId, HostIommu, HostSpaceId, HostStream, MapRefused, Placement, UnmapRange};
use crate::bridge::guest_map::{HostMem, PAGE_SIZE};
use crate::bridge::limits::Limits;
use crate::host::dirty::{DirtyBitmap, DirtySupport};

/// How a call fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// It does nothing, and this is its errno.
    Refused(i32),
    /// It is done all the same, and this is its errno. (A map is undone: the kernel does that itself.)
    DoneAndRefused(i32),
    /// An unmap is done, and says this many bytes more than it took away. Any other call does not fail.
    Miscounted(i64),
    /// An unmap takes away what lies in the lower half of its range, and this is its errno; without one it reports as
    /// many bytes as it took. Any other call does not fail.
    InPart(Option<i32>),
}

impl Failure {
    fn is_of_unmaps(self) -> bool {
        matches!(self, Self::Miscounted(_) | Self::InPart(_))
    }
}

/// A call of a [`HostIommu`] that changes something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    /// [`HostIommu::create`].
    Create,
    /// [`HostIommu::attach`].
    Attach,
    /// [`HostIommu::detach`].
    Detach,
    /// [`HostIommu::attach_part`].
    AttachPart,
    /// [`HostIommu::detach_part`].
    DetachPart,
    /// [`HostIommu::map`], also as one of several.
    Map,
    /// [`HostIommu::unmap`] and [`HostIommu::unmap_dirty`].
    Unmap,
    /// [`HostIommu::dirty_start`] and [`HostIommu::dirty_read`].
    Dirty,
}

#[derive(Default)]
struct State {
    made: Vec<Call>,
    /// Which call fails, counted from 1, and how.
    plan: Option<(u64, Failure)>,
    failed: Option<Call>,
}

/// The host. Calls that change something are counted.
pub struct Faulty {
    inner: Arc<dyn HostIommu>,
    state: Mutex<State>,
}

impl Faulty {
    /// `inner`, none of whose calls fails.
    pub fn new(inner: Arc<dyn HostIommu>) -> Arc<Self> {
        Arc::new(Self { inner, state: Mutex::default() })
    }

    /// The `nth` call from the beginning, counted from 1, fails in this way.
    pub fn fail(&self, nth: u64, failure: Failure) {
        self.state().plan = Some((nth, failure));
    }

    /// How many calls there were.
    pub fn calls(&self) -> u64 {
        self.state().made.len() as u64
    }

    /// The calls that there were, in their order.
    pub fn made(&self) -> Vec<Call> {
        self.state().made.clone()
    }

    /// The call that failed, if one did.
    pub fn failed(&self) -> Option<Call> {
        self.state().failed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How this call fails, if it does.
    fn failure(&self, call: Call) -> Option<Failure> {
        let mut state = self.state();
        state.made.push(call);
        let (nth, failure) = state.plan?;
        let fails = state.made.len() as u64 == nth && (call == Call::Unmap || !failure.is_of_unmaps());
        fails.then(|| {
            state.failed = Some(call);
            failure
        })
    }

    /// `part` takes away the lower half, and gives back how many bytes that were.
    fn unmapped(&self, ask: impl FnOnce() -> io::Result<u64>, part: impl FnOnce() -> u64) -> io::Result<u64> {
        match self.failure(Call::Unmap) {
            Some(Failure::Refused(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Failure::DoneAndRefused(errno)) => {
                ask()?;
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(Failure::Miscounted(more)) => Ok(ask()?.wrapping_add_signed(more)),
            Some(Failure::InPart(errno)) => {
                let taken = part();
                errno.map_or(Ok(taken), |errno| Err(io::Error::from_raw_os_error(errno)))
            }
            None => ask(),
        }
    }

    fn simple<T>(&self, call: Call, ask: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self.failure(call) {
            Some(Failure::Refused(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Failure::DoneAndRefused(errno)) => ask().and_then(|_| Err(io::Error::from_raw_os_error(errno))),
            Some(Failure::Miscounted(_) | Failure::InPart(_)) | None => ask(),
        }
    }
}

/// The pages of the lower half; of one page nothing.
fn lower_half(range: UnmapRange) -> Option<UnmapRange> {
    match range {
        UnmapRange::Span { first, last } => {
            let pages = (last - first) / PAGE_SIZE + 1;
            (pages > 1).then(|| UnmapRange::Span { first, last: first + (pages / 2 * PAGE_SIZE - 1) })
        }
        // It began.
        UnmapRange::All => Some(UnmapRange::Span { first: 0, last: PAGE_SIZE - 1 }),
    }
}

impl HostIommu for Faulty {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn placement(&self, group: GroupId) -> Option<Placement> {
        self.inner.placement(group)
    }

    fn limits(&self, space: HostSpaceId) -> Limits {
        self.inner.limits(space)
    }

    fn create(&self) -> io::Result<HostSpaceId> {
        // One that nobody hears of would be the host's leak and not ours.
        match self.failure(Call::Create) {
            Some(Failure::Refused(errno) | Failure::DoneAndRefused(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Failure::Miscounted(_) | Failure::InPart(_)) | None => self.inner.create(),
        }
    }

    fn destroy(&self, space: HostSpaceId) {
        self.inner.destroy(space);
    }

    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        // Done and refused is one that was not undone.
        self.simple(Call::Attach, || self.inner.attach(group, space))
    }

    fn detach(&self, group: GroupId) -> io::Result<()> {
        self.simple(Call::Detach, || self.inner.detach(group))
    }

    fn attach_part(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()> {
        match self.failure(Call::AttachPart) {
            Some(Failure::Refused(errno) | Failure::DoneAndRefused(errno)) => Err(io::Error::from_raw_os_error(errno)),
            Some(Failure::Miscounted(_) | Failure::InPart(_)) | None => self.inner.attach_part(stream, space),
        }
    }

    fn detach_part(&self, stream: HostStream) -> io::Result<()> {
        self.simple(Call::DetachPart, || self.inner.detach_part(stream))
    }

    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        match self.failure(Call::Map) {
            Some(Failure::Refused(errno) | Failure::DoneAndRefused(errno)) => Err(MapRefused::from_errno(errno)),
            Some(Failure::Miscounted(_) | Failure::InPart(_)) | None => self.inner.map(space, iova, mem, perm),
        }
    }

    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        // A host that would cut a mapping takes nothing.
        let part = || lower_half(range).map_or(Ok(0), |half| self.inner.unmap(space, half)).unwrap_or(0);
        self.unmapped(|| self.inner.unmap(space, range), part)
    }

    fn remedy(&self, space: HostSpaceId, cause: RefusalCause) -> String {
        self.inner.remedy(space, cause)
    }

    fn dirty_start(&self, space: HostSpaceId) -> io::Result<DirtySupport> {
        self.simple(Call::Dirty, || self.inner.dirty_start(space))
    }

    fn dirty_stop(&self, space: HostSpaceId) {
        self.inner.dirty_stop(space);
    }

    fn dirty_close(&self, space: HostSpaceId, mapped: &mut dyn Iterator<Item = (IovaRange, Perm)>) -> io::Result<()> {
        self.simple(Call::Dirty, || self.inner.dirty_close(space, mapped))
    }

    fn dirty_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> io::Result<()> {
        // What was read and is not handed on: nothing of it may be believed.
        let mut read = bitmap.clone();
        self.simple(Call::Dirty, || self.inner.dirty_read(space, &mut read))?;
        *bitmap = read;
        Ok(())
    }

    fn unmap_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, close: bool) -> io::Result<u64> {
        let mut read = bitmap.clone();
        let unmapped = self.unmapped(|| self.inner.unmap_dirty(space, &mut read, close), || 0)?;
        *bitmap = read;
        Ok(unmapped)
    }
}
