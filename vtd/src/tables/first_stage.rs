//! Walks of first-stage tables, for requests of emulated functions: all of them are user requests. Section 3.6.
//!
//! Nothing of these tables is in a shadow: see [`Stages`](crate::Stages).

use vm_memory::GuestMemoryBackend;

use super::blocked::Blocked;
use super::flags::{ATTEMPTS, Flags};
use super::second_stage::{DIRECTORY_SPAN, Translated};
use crate::config::UnitConfig;
use crate::ids::{Gpa, Iova};
use crate::memory::Words;
use crate::space::Perm;
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::first_stage::FirstStageEntry;
use crate::spec::second_stage::{PAGE_SIZE, TABLE_ENTRIES, entry_span};

/// The tables of a first stage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FirstStage {
    /// The address of the root: guest-physical, or of the second stage in a nested translation.
    pub(crate) root: Gpa,
    /// 4 or 5.
    pub(crate) levels: u8,
    /// Never ignored.
    pub(crate) flags: Flags,
}

/// Where a first-stage table is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Table {
    pub(crate) at: Gpa,
    /// Its flags may be set, for all that the second stage says.
    pub(crate) writable: bool,
}

/// Where the addresses in a first stage lead: themselves, or through the second stage.
pub(crate) trait Beneath {
    /// There is a second stage.
    const SECOND: bool;

    /// Where a table is.
    fn table(&self, address: Gpa) -> Result<Table, Blocked>;
    /// Whether an address in an entry is one that there is none of.
    fn is_beyond(&self, address: Gpa) -> bool;
}

/// Addresses in a first stage that is the only one.
pub(crate) struct Nothing;

impl Beneath for Nothing {
    const SECOND: bool = false;

    fn table(&self, at: Gpa) -> Result<Table, Blocked> {
        Ok(Table { at, writable: true })
    }

    fn is_beyond(&self, _: Gpa) -> bool {
        false
    }
}

/// What the entries above level 1 lead to, for the 2 MiB around an address. Their permissions and reserved bits have
/// been seen to, and their accessed flags are set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FirstDirectory {
    /// The table of level 1, or the address in a large leaf where these 2 MiB lead.
    pub(super) base: Gpa,
    /// A large leaf.
    pub(super) large: bool,
    /// Every entry so far permits to write.
    pub(super) may_write: bool,
    /// The large leaf is dirty.
    pub(super) dirty: bool,
    /// The second stage lets the flags of the table of level 1 be set.
    pub(super) table_writable: bool,
    /// Where it leads is an address of a second stage.
    pub(super) nested: bool,
    pub(super) flags: Flags,
}

/// Where a first stage leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FirstLeaf {
    pub(crate) page: Gpa,
    /// The write that makes a page dirty has not the permission of one that comes later.
    pub(crate) may_write: bool,
    pub(crate) dirty: bool,
}

impl FirstLeaf {
    /// The translation where there is no other stage. It permits no write while the leaf is not dirty, so that the
    /// write that makes it so comes to a walk.
    #[inline(always)]
    pub(crate) fn translated(self, writes: bool) -> Result<Translated, Blocked> {
        let Self { page, may_write, dirty } = self;
        if writes && !may_write {
            return Err(Blocked::WriteNotPermitted);
        }
        if INTERRUPT_WINDOW.contains(page.0) {
            return Err(Blocked::OutputInInterruptRange);
        }
        let perm = if may_write && dirty { Perm::ReadWrite } else { Perm::Read };
        Ok(Translated { page, perm })
    }
}

impl FirstDirectory {
    /// Walks from the root down to level 2. Sets the accessed flag of each entry on the way, and the dirty flag of a
    /// large leaf if the request writes and may.
    pub(crate) fn find<M: GuestMemoryBackend, B: Beneath>(
        memory: &M,
        config: &UnitConfig,
        tables: FirstStage,
        beneath: &B,
        iova: Iova,
        writes: bool,
    ) -> Result<Self, Blocked> {
        // Bits 63:47, or 63:56, are equal.
        let unused = 64 - (12 + 9 * u32::from(tables.levels));
        if ((iova.0 << unused) as i64 >> unused) as u64 != iova.0 {
            return Err(Blocked::NotCanonical);
        }
        let mut walk = Walk { memory, config, beneath, flags: tables.flags, writes, may_write: true };
        let mut next = tables.root;
        for level in (2..=tables.levels).rev() {
            let is_root = level == tables.levels;
            let table = beneath.table(next).map_err(|blocked| at_root(blocked, is_root))?;
            match walk.step(table, level, iova).map_err(|blocked| at_root(blocked, is_root))? {
                Step::Table(address) => next = address,
                Step::Leaf { address, dirty } => {
                    let inside = iova.0 & (entry_span(level) - 1) & !(DIRECTORY_SPAN - 1);
                    return Ok(Self {
                        base: Gpa(address.0 + inside),
                        large: true,
                        may_write: walk.may_write,
                        dirty,
                        table_writable: false,
                        nested: B::SECOND,
                        flags: tables.flags,
                    });
                }
            }
        }
        let Table { at, writable } = beneath.table(next)?;
        Ok(Self {
            base: at,
            large: false,
            may_write: walk.may_write,
            dirty: false,
            table_writable: writable,
            nested: B::SECOND,
            flags: tables.flags,
        })
    }

    /// Goes on to the page of `iova`. Whether it may be written is up to the caller.
    #[inline(always)]
    pub(crate) fn leaf<M: GuestMemoryBackend>(
        self,
        memory: &M,
        config: &UnitConfig,
        beneath: &impl Beneath,
        iova: Iova,
        writes: bool,
    ) -> Result<FirstLeaf, Blocked> {
        if self.large {
            let page = Gpa(self.base.0 + (iova.0 & (DIRECTORY_SPAN - 1) & !(PAGE_SIZE - 1)));
            return Ok(FirstLeaf { page, may_write: self.may_write, dirty: self.dirty });
        }
        let mut walk = Walk { memory, config, beneath, flags: self.flags, writes, may_write: self.may_write };
        let table = Table { at: self.base, writable: self.table_writable };
        match walk.step(table, 1, iova)? {
            Step::Leaf { address, dirty } => Ok(FirstLeaf { page: address, may_write: walk.may_write, dirty }),
            // Level 1 has leaves only.
            Step::Table(_) => Err(Blocked::FirstStageReserved),
        }
    }

    /// Goes on to the page of `iova` where there is no other stage. What is given back permits no write while the leaf
    /// is not dirty, so that the write that makes it so comes to a walk.
    #[inline(always)]
    pub(crate) fn translate<M: GuestMemoryBackend>(
        self,
        memory: &M,
        config: &UnitConfig,
        iova: Iova,
        writes: bool,
    ) -> Result<Translated, Blocked> {
        self.leaf(memory, config, &Nothing, iova, writes)?.translated(writes)
    }

    /// The same as [`leaf`](Self::leaf) in most cases: in a table of level 1, when no flag is to be set. `None` in
    /// others, and where there is nothing.
    #[inline(always)]
    pub(crate) fn leaf_as_it_is<M: GuestMemoryBackend>(
        self,
        memory: &M,
        config: &UnitConfig,
        beneath: &impl Beneath,
        iova: Iova,
        writes: bool,
    ) -> Option<FirstLeaf> {
        let walk = Walk { memory, config, beneath, flags: self.flags, writes, may_write: self.may_write };
        let at = Gpa(self.base.0 + (iova.0 / PAGE_SIZE % TABLE_ENTRIES) * 8);
        if self.large {
            return None;
        }
        let entry = FirstStageEntry::from_bits(Words::near(memory, at, 1)?.get(0)?);
        walk.check(entry, 1).ok()?;
        let may_write = self.may_write && entry.write();
        let used = entry.accessed() && (entry.dirty() || !(writes && may_write));
        used.then_some(FirstLeaf { page: Gpa(entry.page() << 12), may_write, dirty: entry.dirty() })
    }

    /// Whether there is a second stage.
    pub(crate) const fn nested(self) -> bool {
        self.nested
    }

    /// Whether it is part of a large leaf.
    pub(crate) const fn large(self) -> bool {
        self.large
    }
}

/// What happened at the topmost table has reasons of its own.
fn at_root(blocked: Blocked, is_root: bool) -> Blocked {
    match blocked {
        Blocked::FirstStageAccess if is_root => Blocked::FirstStageRootAccess,
        Blocked::FirstStageTableRead if is_root => Blocked::FirstStageRootRead,
        other => other,
    }
}

enum Step {
    Table(Gpa),
    Leaf { address: Gpa, dirty: bool },
}

struct Walk<'a, M, B> {
    memory: &'a M,
    config: &'a UnitConfig,
    beneath: &'a B,
    flags: Flags,
    writes: bool,
    /// Every entry so far permits it.
    may_write: bool,
}

impl<M: GuestMemoryBackend, B: Beneath> Walk<'_, M, B> {
    /// Uses the entry of `level` for `iova` in `table`: where it leads. Takes its permission in.
    #[inline(always)]
    fn step(&mut self, table: Table, level: u8, iova: Iova) -> Result<Step, Blocked> {
        let index = iova.0 / entry_span(level) % TABLE_ENTRIES;
        let words = Words::at(self.memory, Gpa(table.at.0 + index * 8), 1).ok_or(Blocked::FirstStageAccess)?;
        // The entry that was checked is the one whose flags are set: another one is looked at anew.
        for _ in 0..ATTEMPTS {
            let word = words.get(0).ok_or(Blocked::FirstStageAccess)?;
            let entry = FirstStageEntry::from_bits(word);
            let is_leaf = self.check(entry, level)?;
            let may_write = self.may_write && entry.write();
            let dirties = is_leaf && self.writes && may_write;
            let used = entry.with_accessed(true).with_dirty(entry.dirty() || dirties);
            if used != entry {
                if self.flags == Flags::NotSnooped {
                    return Err(Blocked::FlagsNotSnooped);
                }
                if !table.writable {
                    return Err(Blocked::FirstStageTableWrite);
                }
                match words.exchange(0, word, used.into_bits()) {
                    None => return Err(Blocked::FirstStageAccess),
                    Some(false) => continue,
                    Some(true) => {}
                }
            }
            self.may_write = may_write;
            let address = entry.page() << 12;
            return Ok(if is_leaf {
                // Bit 12 of a large leaf is PAT.
                Step::Leaf { address: Gpa(address & !(entry_span(level) - 1)), dirty: used.dirty() }
            } else {
                Step::Table(Gpa(address))
            });
        }
        Err(Blocked::FlagsNotSet)
    }

    /// Whether the entry is a leaf.
    #[inline(always)]
    fn check(&self, entry: FirstStageEntry, level: u8) -> Result<bool, Blocked> {
        if !entry.present() {
            return Err(Blocked::FirstStageNotPresent);
        }
        let address = entry.page() << 12;
        let large = entry.page_size() && level > 1;
        // Between PAT and the address, in a large leaf.
        let misplaced = large && (level > 3 || address & (entry_span(level) - 1) & !PAGE_SIZE != 0);
        if address >> self.config.host_address_width != 0 || misplaced {
            return Err(Blocked::FirstStageReserved);
        }
        if self.beneath.is_beyond(Gpa(address)) {
            return Err(Blocked::FirstStageBeyondWidth);
        }
        if !entry.user() {
            return Err(Blocked::SupervisorPage);
        }
        Ok(large || level == 1)
    }
}
