//! The page tables of one space, and the dirty bits in them (E-1, E-2).
//!
//! They are made with dirty bits where the unit above a device has them, whether anybody asks or not: a page table that
//! was made without gets none later. What is written through one is read there, also when the device has gone on to
//! another: a page table stays for as long as its space does.
//!
//! The kernel has no unmap that reads. What is dirty is read, and then it is unmapped: what a device writes between the
//! two is not known ([`UnmapWindow::Lost`]), so who must not lose it has all of an unmapped mapping for dirty (E-3).

use std::io;

use super::kernel::Kernel;
use super::sys::{Hwpt, Ioas, With};
use crate::bridge::guest_map::PAGE_SIZE;
use crate::host::HostDevice;
use crate::host::dirty::{DirtyBitmap, DirtyKnowledge, DirtySupport, UnmapWindow};

/// A page table.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub hwpt: Hwpt,
    with: With,
    /// Its dirty bits are kept.
    tracked: bool,
}

/// Those that are filled from the IOAS of one space. Usually one; one more for functions behind a unit of the host that
/// does not take the others.
#[derive(Debug, Default)]
pub struct PageTables {
    tables: Vec<Table>,
    /// What is written by the space is to be tracked.
    tracked: bool,
}

impl PageTables {
    /// Each.
    pub fn iter(&self) -> impl Iterator<Item = Hwpt> {
        self.tables.iter().map(|table| table.hwpt)
    }

    /// Those to which PASIDs can be attached, if they are to be.
    pub fn that_take(&self, pasids: bool) -> impl Iterator<Item = Hwpt> {
        self.tables.iter().filter(move |table| table.with.pasids || !pasids).map(|table| table.hwpt)
    }

    /// One more, for `device`, filled from `ioas`, with dirty bits if it can have them: one that has none is better than
    /// none. It is one of them once [`PageTables::keep`] is told so.
    pub fn alloc(&self, kernel: &impl Kernel, device: HostDevice, ioas: Ioas, with: With) -> io::Result<Table> {
        let made = kernel.alloc_hwpt(device, ioas, with).map(|hwpt| (hwpt, with));
        let (hwpt, with) = made.or_else(|e| {
            let without = With { dirty_bits: false, ..with };
            if with == without { Err(e) } else { Ok((kernel.alloc_hwpt(device, ioas, without)?, without)) }
        })?;
        // Before anything is attached to it. If it is refused it is a page table that cannot tell.
        let tracked = self.tracked && with.dirty_bits && kernel.track_dirty(hwpt, true).is_ok();
        Ok(Table { hwpt, with, tracked })
    }

    /// `table` is one of them from now on.
    pub fn keep(&mut self, table: Table) {
        self.tables.push(table);
    }

    /// Starts to track. `all_have` says whether all devices that may come have dirty bits: who will be attached to a
    /// space without page tables is not known yet.
    pub fn start(&mut self, kernel: &impl Kernel, all_have: bool) -> io::Result<DirtySupport> {
        if !all_have || self.tables.iter().any(|table| !table.with.dirty_bits) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        for table in &mut self.tables {
            if let Err(e) = kernel.track_dirty(table.hwpt, true) {
                self.stop(kernel);
                return Err(e);
            }
            table.tracked = true;
        }
        self.tracked = true;
        Ok(DirtySupport { knowledge: DirtyKnowledge::Exact, window: UnmapWindow::Lost, holes: false })
    }

    /// Tracks no more.
    pub fn stop(&mut self, kernel: &impl Kernel) {
        self.tracked = false;
        for table in self.tables.iter_mut().filter(|table| table.tracked) {
            table.tracked = false;
            if let Err(e) = kernel.track_dirty(table.hwpt, false) {
                log::warn!("iommufd: page table {} goes on to keep dirty bits: {e}", table.hwpt.0);
            }
        }
    }

    /// What any of them has dirty in the range of `bitmap`, in which all is mapped; it is clean afterwards unless it is
    /// to `keep` its bits, which is what the next call, an unmap, does away with.
    ///
    /// # Errors
    /// One of them could not tell, which is never taken for nothing: the kernel says of a page table that is not tracked
    /// that nothing is dirty.
    pub fn read(&self, kernel: &impl Kernel, bitmap: &mut DirtyBitmap, keep: bool) -> io::Result<()> {
        if !self.tracked || self.tables.iter().any(|table| !table.tracked) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        let range = bitmap.range();
        let whole = range.first.is_multiple_of(PAGE_SIZE) && range.last % PAGE_SIZE == PAGE_SIZE - 1;
        if !whole {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let pages = (range.last - range.first) / PAGE_SIZE + 1;
        let mut words = vec![0; pages.div_ceil(64) as usize];
        for table in &self.tables {
            // It sets bits, and clears none.
            kernel.dirty_bitmap(table.hwpt, range, &mut words, keep)?;
        }
        bitmap.mark_words(range.first, PAGE_SIZE, &words);
        Ok(())
    }
}
