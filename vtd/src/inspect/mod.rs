//! The guest's tables as they stand, for whoever looks at a running machine: what Linux shows of its own in debugfs
//! (`dmar_translation_struct`, `domain_translation_struct`).
//!
//! ```text
//!  root table ─► context entry ─┬───────────────────────► paging entries ─► ranges
//!                               └─► PASID directory ─► PASID entry ─┘
//! ```
//!
//! Nothing waits and nothing is changed: guest memory is read beside the guest, no lock of the unit is taken, and no
//! accessed flag is set. What is shown are the entries; whether the unit takes them is said beside each function.
//!
//! **Bounded.** Tables can be as large as 2^57 bytes of IOVAs, and a table may be its own child. So a listing comes in
//! pages: each looks at [`PageBounds::entries`] entries at most, has [`PageBounds::items`] items at most, and says
//! where the next one begins.

mod functions;
mod paging;
mod spaces;

pub use spaces::SpaceSize;

use std::fmt;
use std::str::FromStr;

use vm_memory::GuestMemoryBackend;

use crate::ids::{DomainId, Gpa, Pasid, SourceId};
use crate::range::IovaRange;
use crate::space::Perm;
use crate::spec::fault::FaultReason;
use crate::spec::registers::table_mode;
use crate::unit::Unit;

/// What one page may cost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageBounds {
    /// Entries that are looked at: a few more are, on the way back to where the page begins.
    pub entries: u64,
    /// Items that are given back.
    pub items: usize,
}

impl Default for PageBounds {
    fn default() -> Self {
        Self { entries: 1 << 16, items: 512 }
    }
}

/// Where a page begins: a function, one of its PASIDs, and where in its paging tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Position {
    /// Source id of the function.
    pub source: u16,
    /// Its PASID; 0 in legacy mode.
    pub pasid: u32,
    /// The IOVA, without the upper half of canonical addresses moved up; `None` before anything of the function.
    pub offset: Option<u64>,
}

/// `0028.0.fffe0000`, or `0028.0.-`: one word.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}.{:x}.", self.source, self.pasid)?;
        match self.offset {
            Some(offset) => write!(f, "{offset:x}"),
            None => f.write_str("-"),
        }
    }
}

/// It is no position.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a position is as the page before it said")]
pub struct NoPosition;

impl FromStr for Position {
    type Err = NoPosition;

    fn from_str(text: &str) -> Result<Self, NoPosition> {
        let mut parts = text.split('.');
        let mut next = || parts.next().filter(|part| !part.starts_with('+')).ok_or(NoPosition);
        let source = u16::from_str_radix(next()?, 16).map_err(|_| NoPosition)?;
        let pasid = u32::from_str_radix(next()?, 16).map_err(|_| NoPosition)?;
        let offset = match next()? {
            "-" => None,
            offset => Some(u64::from_str_radix(offset, 16).map_err(|_| NoPosition)?),
        };
        if parts.next().is_some() || pasid > Pasid::MAX.0 {
            return Err(NoPosition);
        }
        Ok(Self { source, pasid, offset })
    }
}

/// The table mode of the root table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TableMode {
    /// Root and context entries.
    Legacy,
    /// And PASID tables.
    Scalable,
    /// Every request is blocked.
    Abort,
    /// A mode that this unit does not have: every request is blocked.
    Unknown,
}

/// A page of a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TablesPage {
    /// Translation is on. While it is off nothing is looked at.
    pub enabled: bool,
    /// Mode of the tables in use.
    pub mode: TableMode,
    /// The root table in use.
    pub root: Gpa,
    /// What is there, by function, PASID and IOVA.
    pub items: Vec<TableItem>,
    /// Where the next page begins; `None`: this is the last one.
    pub next: Option<Position>,
}

/// Something that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TableItem {
    /// The entries that lead to the paging tables of a function, or of a PASID of it. What follows is in these tables.
    Function(FunctionEntries),
    /// Addresses that lead somewhere, or that a present entry keeps from leading anywhere.
    Range(TableRange),
}

/// The entries that lead to paging tables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FunctionEntries {
    /// Whose requests.
    pub source: SourceId,
    /// Of scalable mode: the PASID, if the context entry leads to a PASID table.
    pub pasid: Option<Pasid>,
    /// That PASID is also the one of requests without PASID.
    pub is_rid_pasid: bool,
    /// The words of the root entry: two, or in scalable mode the half that is used.
    pub root_entry: Vec<u64>,
    /// The words of the context entry, if there is a context table.
    pub context_entry: Vec<u64>,
    /// The entry of the PASID directory.
    pub directory_entry: Option<u64>,
    /// The words of the PASID table's entry.
    pub pasid_entry: Vec<u64>,
    /// The domain id.
    pub domain: Option<DomainId>,
    /// Where requests go by these entries.
    pub stage: Stage,
    /// What the unit has against it: then every request is blocked with this reason.
    pub fault: Option<FaultReason>,
}

/// Where requests go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Nowhere.
    None,
    /// To guest-physical addresses as they are.
    PassThrough,
    /// Through first-stage tables with 4 or 5 levels.
    First {
        /// The topmost table.
        root: Gpa,
        /// Levels.
        levels: u8,
    },
    /// Through second-stage tables with 3 to 5 levels.
    Second {
        /// The topmost table.
        root: Gpa,
        /// Levels.
        levels: u8,
    },
    /// By a type of entry whose tables are not shown.
    Other(u8),
}

/// A run of IOVAs that entries of one level say one thing about. Neighbours that go on are one run, also over the ends
/// of tables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TableRange {
    /// The IOVAs.
    pub range: IovaRange,
    /// Level of the entries: 1 is that of 4 KiB pages.
    pub level: u8,
    /// How many entries.
    pub entries: u64,
    /// The entries on the way to the first of them, from the topmost table down to itself.
    pub path: Vec<u64>,
    /// Where it leads.
    pub leads: Leads,
}

/// Where a run of IOVAs leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leads {
    /// To a run of guest-physical addresses.
    To {
        /// The first.
        gpa: Gpa,
        /// What all entries on the way permit.
        perm: Perm,
    },
    /// Nowhere, although an entry is present.
    Nowhere(&'static str),
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Unit<M> {
    /// A page of what the tables in use have, from `from` on; with `only`, of that function alone. Waits for nothing.
    pub fn tables_page(&self, only: Option<SourceId>, from: Position, bounds: PageBounds) -> TablesPage {
        let translation = **self.core.translation.load();
        let root = Gpa(translation.root.page() << 12);
        let mode = match translation.root.mode() {
            table_mode::LEGACY => TableMode::Legacy,
            _ if self.core.config.scalable.is_none() => TableMode::Unknown,
            table_mode::SCALABLE => TableMode::Scalable,
            table_mode::ABORT => TableMode::Abort,
            _ => TableMode::Unknown,
        };
        let enabled = translation.enabled;
        let (items, next) = match mode {
            TableMode::Legacy | TableMode::Scalable if enabled => {
                functions::list(&self.core, translation, only, from, bounds)
            }
            _ => (Vec::new(), None),
        };
        TablesPage { enabled, mode, root, items, next }
    }
}
