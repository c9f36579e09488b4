//! First-stage page tables of a program's own, in memory that a device's unit walks: 4 levels of 4 KiB pages.

use std::ops::Range;

use crate::memory::{DmaMemory, PAGE};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// How many pages the tables of one 2 MiB take.
pub const TABLES: usize = 4;

/// Tables for the 2 MiB around one address, in the first pages of a memory that is at `at` in the address space below.
pub struct Tables<'m> {
    memory: &'m DmaMemory,
    at: u64,
    iova: u64,
}

/// What a unit noted in an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted {
    /// A request went through it.
    pub accessed: bool,
    /// A write did.
    pub dirty: bool,
}

impl<'m> Tables<'m> {
    /// Empty tables for the 2 MiB from `iova` on.
    pub fn new(memory: &'m DmaMemory, at: u64, iova: u64) -> Self {
        assert!(iova.is_multiple_of(2 << 20) && memory.len() >= TABLES * PAGE);
        memory.write(0, &vec![0; TABLES * PAGE]);
        let tables = Self { memory, at, iova };
        for (level, shift) in [39, 30, 21].into_iter().enumerate() {
            let next = at + ((level + 1) * PAGE) as u64;
            tables.put(level, index(iova, shift), next | PRESENT | WRITABLE | USER);
        }
        tables
    }

    /// Where they begin, in the address space below.
    pub fn root(&self) -> u64 {
        self.at
    }

    fn put(&self, level: usize, index: usize, entry: u64) {
        self.memory.write_u64(level * PAGE + index * size_of::<u64>(), entry);
    }

    fn entry_of(&self, page: usize) -> usize {
        (TABLES - 1) * PAGE + (index(self.iova, 12) + page) * size_of::<u64>()
    }

    /// The page with this number leads to `target` of the address space below, or nowhere.
    pub fn set(&self, page: usize, target: Option<u64>, writable: bool) {
        let writable = if writable { WRITABLE } else { 0 };
        let entry = target.map_or(0, |target| target | PRESENT | USER | writable);
        self.memory.write_u64(self.entry_of(page), entry);
    }

    /// What the unit noted of the page with this number.
    pub fn noted(&self, page: usize) -> Noted {
        let entry = self.memory.read_u64(self.entry_of(page));
        Noted { accessed: entry & ACCESSED != 0, dirty: entry & DIRTY != 0 }
    }

    /// Of the pages in `range` those that the unit noted a write of.
    pub fn dirty(&self, range: Range<usize>) -> Vec<usize> {
        range.filter(|page| self.noted(*page).dirty).collect()
    }
}

fn index(iova: u64, shift: u32) -> usize {
    (iova >> shift & 511) as usize
}
