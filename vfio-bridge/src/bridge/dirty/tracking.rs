//! Dirty tracking in one space of the host: what is dirty there is guest-physical as soon as it is known, because the
//! mappings that say so may be gone a moment later (E-4).

use std::io;

use log::warn;
use vtd::IovaRange;

use super::pages::DirtyPages;
use crate::bridge::guest_map::PAGE_SIZE;
use crate::bridge::ledger::{Extent, Ledger, Run};
use crate::host::dirty::{DirtyBitmap, DirtyKnowledge, DirtySupport, UnmapWindow};
use crate::host::{HostIommu, HostSpaceId};
use crate::stats::Counters;

/// From the first to the last IOVA of what one bitmap is asked for, if it is more than one extent: 2 MiB of bitmap.
/// (Type1 takes 256 MiB.)
const SPAN: u64 = 64 << 30;

/// What a tracked space found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Found {
    pub pages: DirtyPages,
    pub knowledge: DirtyKnowledge,
}

/// A space of the host that is tracked.
#[derive(Debug)]
pub(crate) struct Tracking {
    /// What the host can say: `None`, nothing.
    support: Option<DirtySupport>,
    /// Whether unmaps lose nothing, whatever it costs (E-3).
    close: bool,
    /// What was found since the last time that somebody asked.
    found: Found,
}

impl Tracking {
    /// The host is asked to track. One that cannot is one that cannot tell (E-1).
    pub fn start(host: &dyn HostIommu, space: HostSpaceId, close: bool, owner: &str) -> Self {
        let support = host.dirty_start(space).inspect_err(|e| {
            warn!("{owner}: the host cannot tell what is written ({e}): everything that can be is taken for dirty");
        });
        Self { support: support.ok(), close, found: Found::default() }
    }

    pub fn set_close(&mut self, close: bool) {
        self.close = close;
    }

    /// What the host can say of it.
    pub fn knowledge(&self) -> DirtyKnowledge {
        self.support.map_or(DirtyKnowledge::CannotTell, |support| support.knowledge)
    }

    /// Unmaps the whole extents of `run`, and keeps what was dirty (E-2): by extents and never all at once, which type1
    /// gives no bitmap for. Gives back how many bytes the host says that it took away. After an error the ledger keeps
    /// the extents, so all of them are taken for dirty at the next read.
    pub fn unmap(
        &mut self,
        host: &dyn HostIommu,
        space: HostSpaceId,
        run: &Run,
        counters: &Counters,
    ) -> io::Result<u64> {
        let size = |extents: &[Extent]| extents.iter().map(Extent::size).sum();
        let Some(support) = self.support else {
            let bytes = counters.time_unmap(size(&run.extents), || host.unmap(space, run.range))?;
            self.all_of(&run.extents, DirtyKnowledge::CannotTell);
            return Ok(bytes);
        };
        let close = self.close && support.window == UnmapWindow::Closable;
        let mut total = 0u64;
        for extents in spans(&run.extents, support.holes) {
            let mut bitmap = bitmap_of(extents)?;
            let expected = size(extents);
            let bytes = counters.time_unmap(expected, || host.unmap_dirty(space, &mut bitmap, close))?;
            total = total.wrapping_add(bytes);
            if bytes != expected {
                break;
            }
            if self.close && support.window == UnmapWindow::Lost {
                // What came by a cached translation is not known.
                self.all_of(extents, DirtyKnowledge::WholeMappings);
            } else {
                self.note(extents, &bitmap, support.knowledge);
            }
        }
        Ok(total)
    }

    /// What is dirty since the last time: of what is mapped, and of what was. Nothing that the host says is believed
    /// once the books are not (`broken`).
    pub fn read(&mut self, host: &dyn HostIommu, space: HostSpaceId, ledger: &Ledger, broken: bool) -> Found {
        let all: Vec<Extent> = ledger.extents().collect();
        // Also where nothing can be written: how it is known does not change with what is mapped.
        self.found.knowledge = self.found.knowledge.max(self.knowledge());
        match self.support.filter(|_| !broken) {
            None => {
                self.found.knowledge = DirtyKnowledge::CannotTell;
                self.all_of(&all, DirtyKnowledge::CannotTell);
            }
            Some(support) => {
                for extents in spans(&all, support.holes) {
                    let read = bitmap_of(extents).and_then(|mut bitmap| {
                        host.dirty_read(space, &mut bitmap)?;
                        Ok(bitmap)
                    });
                    match read {
                        Ok(bitmap) => self.note(extents, &bitmap, support.knowledge),
                        Err(e) => {
                            warn!("what is written cannot be read ({e}): everything that can be is taken for dirty");
                            self.all_of(extents, DirtyKnowledge::CannotTell);
                        }
                    }
                }
            }
        }
        std::mem::take(&mut self.found)
    }

    /// What `bitmap` says of `extents`. What cannot be written is not dirty, whatever the host says: type1 marks all
    /// that is mapped.
    fn note(&mut self, extents: &[Extent], bitmap: &DirtyBitmap, knowledge: DirtyKnowledge) {
        for extent in extents.iter().filter(|extent| extent.perm.writable()) {
            for dirty in bitmap.ranges(extent.range()) {
                let part = extent.part(dirty.first, dirty.last);
                self.found.pages.mark(part.gpa, part.size());
                self.found.knowledge = self.found.knowledge.max(knowledge);
            }
        }
    }

    fn all_of(&mut self, extents: &[Extent], knowledge: DirtyKnowledge) {
        for extent in extents.iter().filter(|extent| extent.perm.writable()) {
            self.found.pages.mark(extent.gpa, extent.size());
            self.found.knowledge = self.found.knowledge.max(knowledge);
        }
    }
}

/// Cuts `extents` (ascending) into what one bitmap is asked for: several in [`SPAN`], with `holes` between them or
/// without, or one.
fn spans(extents: &[Extent], holes: bool) -> impl Iterator<Item = &[Extent]> {
    let mut rest = extents;
    std::iter::from_fn(move || {
        let first = rest.first()?.first;
        let mut next = first;
        let fits = |extent: &&Extent| {
            let goes_on = holes || extent.first == next;
            next = extent.last.wrapping_add(1);
            goes_on && extent.last - first < SPAN
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (span, after) = rest.split_at(count);
        rest = after;
        Some(span)
    })
}

fn bitmap_of(extents: &[Extent]) -> io::Result<DirtyBitmap> {
    let range = extents.first().zip(extents.last()).map(|(a, b)| IovaRange { first: a.first, last: b.last });
    range.and_then(|range| DirtyBitmap::new(range, PAGE_SIZE)).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
