//! What devices of the model wrote. Its dirty bits are in its translations, page by page, as those of hardware are: an
//! unmap that reads them can lose what comes by a cached translation (E-3).

use std::collections::{BTreeMap, BTreeSet};

use vtd::IovaRange;

use super::{Contents, Held, HostOp, Model, State};
use crate::bridge::guest_map::PAGE_SIZE;
use crate::host::dirty::{DirtyBitmap, DirtyKnowledge, DirtySupport, UnmapWindow};
use crate::host::{GroupId, HostSpaceId, HostStream, UnmapRange};

/// Which IOVAs devices write by cached translations of these mappings, before the IOTLB is flushed.
pub(super) type Window = Box<dyn FnMut(&[Held]) -> Vec<u64> + Send>;

/// What a model tracks, and how well.
#[derive(Default)]
pub(super) struct Tracker {
    knowledge: DirtyKnowledge,
    /// The spaces in which it does, each with its dirty pages.
    spaces: BTreeMap<HostSpaceId, BTreeSet<u64>>,
    window: Option<Window>,
    /// Unmaps cannot close it.
    cannot_close: bool,
    /// Nothing is read behind the first hole of a range, and no error says so.
    stops_at_holes: bool,
}

fn pages(range: IovaRange) -> impl Iterator<Item = u64> {
    (range.first - range.first % PAGE_SIZE..=range.last).step_by(PAGE_SIZE as usize)
}

fn inside(contents: &Contents, range: IovaRange) -> impl Iterator<Item = &Held> {
    contents.range(range.first..=range.last).map(|(_, held)| held)
}

impl Model {
    /// It knows no more of what is written than this.
    pub fn set_dirty_knowledge(&self, knowledge: DirtyKnowledge) {
        self.state().tracker.knowledge = knowledge;
    }

    /// While mappings are unmapped and what is dirty in them is read, devices write these IOVAs by cached translations.
    pub fn set_window(&self, window: impl FnMut(&[Held]) -> Vec<u64> + Send + 'static) {
        self.state().tracker.window = Some(Box::new(window));
    }

    /// It has no way to prevent that they are lost.
    pub fn cannot_close_window(&self) {
        self.state().tracker.cannot_close = true;
    }

    /// A read ends at the first hole in its range, and says nothing of it.
    pub fn stop_at_holes(&self) {
        self.state().tracker.stops_at_holes = true;
    }

    /// Whether `space` is tracked.
    pub fn tracks(&self, space: HostSpaceId) -> bool {
        self.state().tracker.spaces.contains_key(&space)
    }

    /// A device of `group` writes at `iova`. Gives back the host address that it wrote to; `None` if it could not.
    pub fn write(&self, group: GroupId, iova: u64) -> Option<u64> {
        self.write_in(self.space_of(group)?, iova)
    }

    /// The same of a device, or a part of one, of a group that is attached device by device.
    pub fn write_stream(&self, stream: HostStream, iova: u64) -> Option<u64> {
        self.write_in(self.space_of_stream(stream)?, iova)
    }

    fn write_in(&self, space: HostSpaceId, iova: u64) -> Option<u64> {
        let mut state = self.state();
        let (_, held) = state.spaces.get(&space)?.range(..=iova).next_back()?;
        let hva = (iova <= held.last() && held.perm.writable()).then(|| held.hva + (iova - held.iova))?;
        state.tracker.note(space, iova);
        Some(hva)
    }

    pub(super) fn start_tracking(&self, space: HostSpaceId) -> Result<DirtySupport, i32> {
        let State { spaces, tracker, .. } = &mut *self.state();
        if !spaces.contains_key(&space) {
            return Err(libc::EBADF);
        }
        let window = match tracker.knowledge {
            DirtyKnowledge::Exact if tracker.cannot_close => UnmapWindow::Lost,
            DirtyKnowledge::Exact => UnmapWindow::Closable,
            DirtyKnowledge::WholeMappings => UnmapWindow::Reported,
            DirtyKnowledge::CannotTell => return Err(libc::EOPNOTSUPP),
        };
        tracker.spaces.insert(space, BTreeSet::new());
        Ok(DirtySupport { knowledge: tracker.knowledge, window, holes: !tracker.stops_at_holes })
    }

    pub(super) fn stop_tracking(&self, space: HostSpaceId) {
        self.state().tracker.spaces.remove(&space);
    }

    pub(super) fn read_dirty(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap) -> Result<(), i32> {
        let State { spaces, tracker, .. } = &mut *self.state();
        tracker.read(space, spaces.get(&space).ok_or(libc::EBADF)?, bitmap)
    }

    pub(super) fn unmap_and_read(&self, space: HostSpaceId, bitmap: &mut DirtyBitmap, close: bool) -> Result<u64, i32> {
        let IovaRange { first, last } = bitmap.range();
        {
            let State { spaces, tracker, .. } = &mut *self.state();
            let contents = spaces.get(&space).ok_or(libc::EBADF)?;
            // Closing, nothing is writable any more; but cached translations are, until the flush. Their dirty bits
            // are in the tables, so this read, which comes after it, has them.
            if close {
                tracker.pass_window(contents, bitmap.range(), |tracker, iova| tracker.note(space, iova));
                tracker.read(space, contents, bitmap)?;
            } else {
                tracker.read(space, contents, bitmap)?;
                // Too late.
                tracker.pass_window(contents, bitmap.range(), |_, _| ());
            }
        }
        self.serve(space, HostOp::Unmap(UnmapRange::Span { first, last }))
    }
}

impl Tracker {
    pub(super) fn forget(&mut self, space: HostSpaceId) {
        self.spaces.remove(&space);
    }

    /// Mappings that go take their dirty bits with them.
    pub(super) fn unmapped(&mut self, space: HostSpaceId, gone: &[Held]) {
        if let Some(dirty) = self.spaces.get_mut(&space) {
            for page in gone.iter().flat_map(|held| pages(IovaRange { first: held.iova, last: held.last() })) {
                dirty.remove(&page);
            }
        }
    }

    fn note(&mut self, space: HostSpaceId, iova: u64) {
        if let Some(dirty) = self.spaces.get_mut(&space) {
            dirty.insert(iova - iova % PAGE_SIZE);
        }
    }

    fn pass_window(&mut self, contents: &Contents, range: IovaRange, mut each: impl FnMut(&mut Self, u64)) {
        let Some(mut window) = self.window.take() else { return };
        let held: Vec<Held> = inside(contents, range).copied().collect();
        window(&held).into_iter().for_each(|iova| each(self, iova));
        self.window = Some(window);
    }

    fn read(&mut self, space: HostSpaceId, contents: &Contents, bitmap: &mut DirtyBitmap) -> Result<(), i32> {
        let dirty = self.spaces.get_mut(&space).ok_or(libc::EINVAL)?;
        let mut range = bitmap.range();
        // As type1, which has its bits by mapping.
        let cut = |held: &Held| held.last() >= range.first && (held.iova < range.first || held.last() > range.last);
        let edges = [contents.range(..range.first).next_back(), contents.range(..=range.last).next_back()];
        if edges.into_iter().flatten().any(|(_, held)| cut(held)) {
            return Err(libc::EINVAL);
        }
        if self.stops_at_holes {
            let held = inside(contents, range).map(|held| IovaRange { first: held.iova, last: held.last() });
            match range.without(held).first() {
                Some(hole) if hole.first == range.first => return Ok(()),
                Some(hole) => range.last = hole.first - 1,
                None => {}
            }
        }
        if self.knowledge == DirtyKnowledge::WholeMappings {
            let all = inside(contents, range).map(|held| IovaRange { first: held.iova, last: held.last() });
            all.for_each(|held| bitmap.mark(held));
        }
        let found: Vec<u64> = dirty.range(range.first..=range.last).copied().collect();
        for page in found {
            bitmap.mark(IovaRange { first: page, last: page + (PAGE_SIZE - 1) });
            dirty.remove(&page);
        }
        Ok(())
    }
}
