//! A space: an IOAS with its page tables, and two of each while no write of a device may be lost to an unmap (E-3).
//!
//! ```text
//!   front  ◄── attached ── functions        back  (nobody)           both hold the same
//!   unmap:  the range leaves the back ── functions are attached to the back, each in one step ──
//!           what is dirty in the front is read: nobody writes by it any more ── the range leaves the front
//!           and what was the back is the front
//! ```
//!
//! The kernel has no unmap that reads, and cannot take write permission away from what is mapped. But it switches a
//! function from one page table to another in one step, so a page table without the range takes the place of one that
//! has it, and what is in both is never away.

use std::io;

use log::{debug, error, warn};
use vtd::{IovaRange, Perm};

use super::dirty::PageTables;
use super::kernel::Kernel;
use super::sys::{Ioas, Place, With};
use crate::host::dirty::{DirtyBitmap, DirtySupport};
use crate::host::{HostStream, UnmapRange};

/// An IOAS, and the page tables that are filled from it.
#[derive(Debug)]
pub struct Half {
    pub ioas: Ioas,
    pub tables: PageTables,
}

impl Half {
    /// Attaches `stream` to a page table: to one that there is, or, if its unit takes none of these, to one that is
    /// made for it `with` what it needs, and has all that the space holds before it is switched to it.
    pub fn attach(&mut self, kernel: &impl Kernel, stream: HostStream, with: With) -> io::Result<()> {
        for hwpt in self.tables.that_take(with.pasids) {
            // Whatever the reason is: where another page table would not help either, its attach says so.
            if kernel.attach(stream, hwpt).is_ok() {
                return Ok(());
            }
        }
        let table = self.tables.alloc(kernel, stream.device, self.ioas, with)?;
        if let Err(e) = kernel.attach(stream, table.hwpt) {
            give_back(kernel, table.hwpt.0);
            return Err(e);
        }
        self.tables.keep(table);
        Ok(())
    }

    /// It goes. Nothing is attached to it.
    fn destroy(&self, kernel: &impl Kernel) {
        self.tables.iter().map(|hwpt| hwpt.0).chain([self.ioas.0]).for_each(|id| give_back(kernel, id));
    }
}

/// An object of the iommufd goes.
pub fn give_back(kernel: &impl Kernel, id: u32) {
    if let Err(e) = kernel.destroy(id) {
        error!("iommufd: object {id} could not be given back: {e}");
    }
}

/// A space.
#[derive(Debug)]
pub struct Space {
    /// What functions are attached to.
    front: Half,
    /// Holds what the front does, and has nobody, while unmaps are to lose nothing.
    back: Option<Half>,
}

impl Space {
    /// An empty one.
    pub fn new(kernel: &impl Kernel) -> io::Result<Self> {
        let front = Half { ioas: kernel.alloc_ioas()?, tables: PageTables::default() };
        Ok(Self { front, back: None })
    }

    /// What functions are attached to.
    pub fn front(&mut self) -> &mut Half {
        &mut self.front
    }

    /// It goes with all that is mapped in it.
    pub fn destroy(&mut self, kernel: &impl Kernel) {
        self.drop_back(kernel);
        self.front.destroy(kernel);
    }

    /// `map` maps `len` bytes at a place; at `iova` of this space.
    pub fn map(
        &mut self,
        kernel: &impl Kernel,
        iova: u64,
        len: u64,
        perm: Perm,
        map: impl FnOnce(Place) -> io::Result<()>,
    ) -> io::Result<()> {
        let from = Place { ioas: self.front.ioas, iova };
        map(from)?;
        if let Some(back) = &self.back
            && let Err(e) = kernel.copy(Place { ioas: back.ioas, iova }, from, len, perm)
        {
            warn!("iommufd: what is written while something is unmapped is not known any more: {e}");
            self.drop_back(kernel);
        }
        Ok(())
    }

    /// Unmaps `range`, and says nothing of what was written.
    pub fn unmap(&mut self, kernel: &impl Kernel, range: UnmapRange) -> io::Result<u64> {
        let unmapped = kernel.unmap(self.front.ioas, range);
        let of_back = self.back.as_ref().map(|back| kernel.unmap(back.ioas, range));
        if of_back.is_some_and(|of_back| of_back.ok() != unmapped.as_ref().ok().copied()) {
            self.drop_back(kernel);
        }
        unmapped
    }

    /// Tracks what is written.
    pub fn track(&mut self, kernel: &impl Kernel, all_have: bool) -> io::Result<DirtySupport> {
        self.front.tables.start(kernel, all_have)
    }

    /// Tracks no more.
    pub fn untrack(&mut self, kernel: &impl Kernel) {
        self.drop_back(kernel);
        self.front.tables.stop(kernel);
    }

    /// From now on unmaps can lose nothing. `mapped` is what it holds.
    pub fn close(
        &mut self,
        kernel: &impl Kernel,
        mapped: &mut dyn Iterator<Item = (IovaRange, Perm)>,
    ) -> io::Result<()> {
        if self.back.is_some() {
            return Ok(());
        }
        let back = Half { ioas: kernel.alloc_ioas()?, tables: self.front.tables.of_the_same_kind() };
        let mut copied = Ok(());
        for (range, perm) in mapped {
            let place = |ioas| Place { ioas, iova: range.first };
            copied = kernel.copy(place(back.ioas), place(self.front.ioas), range.last - range.first + 1, perm);
            if copied.is_err() {
                break;
            }
        }
        if copied.is_err() {
            back.destroy(kernel);
        } else {
            self.back = Some(back);
        }
        copied
    }

    /// What was written in the range of `bitmap`, in which all is mapped.
    pub fn read(&self, kernel: &impl Kernel, bitmap: &mut DirtyBitmap, keep: bool) -> io::Result<()> {
        [Some(&self.front), self.back.as_ref()]
            .into_iter()
            .flatten()
            .try_for_each(|it| it.tables.read(kernel, bitmap, keep))
    }

    /// What was written in the range of `bitmap`, in which all is mapped; or all of it, if that is not known.
    fn read_or_mark(&self, kernel: &impl Kernel, bitmap: &mut DirtyBitmap) {
        if let Err(e) = self.read(kernel, bitmap, true) {
            debug!("iommufd: what was written in {} before it is unmapped is not known: {e}", bitmap.range());
            bitmap.mark_unknown();
        }
    }

    /// Unmaps the range of `bitmap`, in which all is mapped, and says what was written before that. `attached`, if no
    /// write may be lost, is who is attached to it, with what page tables they need.
    ///
    /// # Errors
    /// Nothing may be concluded about what is still mapped.
    pub fn unmap_dirty(
        &mut self,
        kernel: &impl Kernel,
        bitmap: &mut DirtyBitmap,
        attached: Option<&[(HostStream, With)]>,
    ) -> io::Result<u64> {
        let IovaRange { first, last } = bitmap.range();
        let range = UnmapRange::Span { first, last };
        // Also what was written by the back while that was the front.
        self.read_or_mark(kernel, bitmap);
        let Some(attached) = attached else { return self.unmap(kernel, range) };
        if !self.turn(kernel, range, last - first + 1, attached)? {
            bitmap.mark_unknown();
            return self.unmap(kernel, range);
        }
        // The range is in the back only, by which nobody writes any more.
        let Some(back) = &self.back else { return Err(io::ErrorKind::NotFound.into()) };
        if back.tables.read(kernel, bitmap, true).is_err() {
            bitmap.mark_unknown();
        }
        kernel.unmap(back.ioas, range)
    }

    /// Takes `range`, which has `len` bytes, out of the back, and has back and front change places. `false`: it could
    /// not; all are where they were, and there is no back any more.
    fn turn(
        &mut self,
        kernel: &impl Kernel,
        range: UnmapRange,
        len: u64,
        attached: &[(HostStream, With)],
    ) -> io::Result<bool> {
        let Some(mut back) = self.back.take() else { return Ok(false) };
        let taken = kernel.unmap(back.ioas, range);
        if taken.as_ref().ok() != Some(&len) {
            debug!("iommufd: {range:x?} does not leave the copy of its space: {taken:?}");
            back.destroy(kernel);
            return Ok(false);
        }
        for (n, (stream, with)) in attached.iter().enumerate() {
            let Err(e) = back.attach(kernel, *stream, *with) else { continue };
            warn!("iommufd: {stream} does not go to the copy of its space: {e}");
            let mut again = attached[..n].iter().rev();
            if let Err(e) = again.try_for_each(|(stream, with)| self.front.attach(kernel, *stream, *with)) {
                self.back = Some(back);
                return Err(e);
            }
            back.destroy(kernel);
            return Ok(false);
        }
        self.back = Some(std::mem::replace(&mut self.front, back));
        Ok(true)
    }

    fn drop_back(&mut self, kernel: &impl Kernel) {
        if let Some(back) = self.back.take() {
            back.destroy(kernel);
        }
    }
}
