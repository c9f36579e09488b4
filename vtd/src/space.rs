//! Spaces: what an endpoint is attached to.

use std::fmt;

use crate::ids::{DomainId, Gpa, UnitId};
use crate::spec::second_stage::levels;

/// What an endpoint is attached to.
///
/// Two entries that differ in unit, tables or domain id never share a space: a guest may give one domain id two roots.
/// An invalidation of a domain id reaches every space that has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SpaceKey {
    /// Untranslated: all guest RAM at its guest-physical addresses. Belongs to the virtual machine, not to a unit.
    Identity,
    /// Nothing is reachable.
    Blocked,
    /// A page table of the guest.
    Paged(PagedSpace),
}

/// The identity of a space that a guest page table describes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PagedSpace {
    /// The unit whose tables name it.
    pub unit: UnitId,
    /// The page tables.
    pub tables: Tables,
    /// The domain id that tags its cached translations.
    pub domain: DomainId,
}

/// The page tables of a space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Tables {
    /// Second-stage tables (VT-d specification, section 3.7).
    Second {
        /// Guest-physical address of the root.
        root: Gpa,
        /// Guest address width in bits: 39, 48 or 57.
        width: u8,
    },
}

impl Tables {
    /// Levels of the tables.
    pub(crate) const fn levels(self) -> u8 {
        let Self::Second { width, .. } = self;
        levels(width)
    }
}

impl fmt::Display for SpaceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identity => f.write_str("identity"),
            Self::Blocked => f.write_str("blocked"),
            Self::Paged(space) => space.fmt(f),
        }
    }
}

/// `unit0/domain1/root0x1000/48bit`: one word.
impl fmt::Display for PagedSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { unit, tables: Tables::Second { root, width }, domain } = self;
        write!(f, "unit{}/domain{}/root{root}/{width}bit", unit.0, domain.0)
    }
}

/// What a mapping lets a device do. A mapping that lets it do nothing does not exist.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Perm {
    /// Read only.
    Read = 1,
    /// Write only.
    Write = 2,
    /// Read and write.
    ReadWrite = 3,
}

impl Perm {
    /// The permission with these two bits, `None` when neither is set.
    pub const fn from_bits(read: bool, write: bool) -> Option<Self> {
        match (read, write) {
            (true, true) => Some(Self::ReadWrite),
            (true, false) => Some(Self::Read),
            (false, true) => Some(Self::Write),
            (false, false) => None,
        }
    }
    /// Whether a device may read.
    pub const fn readable(self) -> bool {
        self as u8 & Self::Read as u8 != 0
    }
    /// Whether a device may write.
    pub const fn writable(self) -> bool {
        self as u8 & Self::Write as u8 != 0
    }
}

/// `r`, `w` or `rw`.
impl fmt::Display for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "r",
            Self::Write => "w",
            Self::ReadWrite => "rw",
        })
    }
}
