//! Builders of second-stage tables. Sections 3.7 and 9.8 of the VT-d specification.

use crate::memory::{load, page, store};

/// Entry: R.
pub const READ: u64 = 1 << 0;
/// Entry: W.
pub const WRITE: u64 = 1 << 1;
/// Entry: both.
pub const READ_WRITE: u64 = READ | WRITE;
/// Entry: PS, a leaf above level 1.
pub const LARGE: u64 = 1 << 7;

/// Bytes that an entry of `level` covers (1: 4 KiB, 2: 2 MiB, 3: 1 GiB).
pub const fn span(level: u8) -> u64 {
    1 << (12 + 9 * (level as u64 - 1))
}

/// A domain: its id and its second-stage table.
#[derive(Clone, Copy, Debug)]
pub struct Domain {
    /// DID.
    pub id: u16,
    /// Levels: 3, 4 or 5.
    pub levels: u8,
    /// Address of the root of the table.
    pub root: u64,
}

impl Domain {
    /// An empty domain.
    pub fn new(id: u16, levels: u8) -> Self {
        Self { id, levels, root: page() }
    }

    /// Where the entry of `level` for `iova` is. Tables above it are made if they are missing, with all permissions.
    pub fn entry(&self, iova: u64, level: u8) -> u64 {
        let mut table = self.root;
        for above in (level + 1..=self.levels).rev() {
            let at = Self::slot(table, iova, above);
            if load(at) & READ_WRITE == 0 {
                store(at, page() | READ_WRITE);
            }
            table = load(at) & 0x000f_ffff_ffff_f000;
        }
        Self::slot(table, iova, level)
    }

    fn slot(table: u64, iova: u64, level: u8) -> u64 {
        table + 8 * (iova / span(level) % 512)
    }

    /// Writes a leaf of `level` for `iova`. The caller invalidates.
    pub fn map_at(&self, iova: u64, gpa: u64, level: u8, permissions: u64) {
        let large = if level > 1 { LARGE } else { 0 };
        store(self.entry(iova, level), gpa | permissions | large);
    }

    /// Writes a leaf of 4 KiB. The caller invalidates.
    pub fn map(&self, iova: u64, gpa: u64, permissions: u64) {
        self.map_at(iova, gpa, 1, permissions);
    }

    /// Clears the entry of `level` for `iova`. The caller invalidates.
    pub fn clear(&self, iova: u64, level: u8) {
        store(self.entry(iova, level), 0);
    }
}
