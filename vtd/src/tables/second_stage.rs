//! Walks of second-stage tables: of one address, for a request, and of a range, for a re-sync.
//! Section 3.7.

use vm_memory::GuestMemoryBackend;

use super::blocked::Blocked;
use super::flags::{ATTEMPTS, Flags, Request};
use crate::config::UnitConfig;
use crate::faults::Access;
use crate::ids::{Gpa, Iova};
use crate::listener::Mapping;
use crate::memory::Words;
use crate::range::{GpaRange, IovaRange};
use crate::space::{PagedSpace, Perm, Tables};
use crate::spec::INTERRUPT_WINDOW;
use crate::spec::second_stage::{LEVEL_BITS, PAGE_SIZE, SecondStageEntry, TABLE_ENTRIES, entry_span, levels};

/// Naturally aligned span within which a whole-space re-sync merges leaves (B-7).
const MERGE_SPAN: u64 = 2 << 20;

/// The bits that are reserved in any present entry, as a mask.
#[derive(Clone, Copy)]
pub(crate) struct Reserved(u64);

/// What a present entry leads to.
enum Entry {
    /// A table of the next level.
    Table(Gpa),
    /// A page of the size of this level's span.
    Leaf(Gpa),
}

impl Reserved {
    /// Those of the unit with this `config`.
    pub(crate) const fn of(config: &UnitConfig) -> Self {
        // Snoop control is not offered, so SNP is reserved everywhere. TM is a hint to device-TLBs.
        let reserved = SecondStageEntry::new().with_snoop(true).with_transient(!config.device_tlb);
        let beyond_width = !0 << (config.host_address_width - 12) & ((1 << 40) - 1);
        Self(reserved.with_page(beyond_width).into_bits())
    }

    /// The page of an entry of level 1, if no reserved bit is set.
    #[inline(always)]
    pub(super) fn leaf(self, entry: SecondStageEntry) -> Option<Gpa> {
        match self.check(entry, 1) {
            Ok(Entry::Leaf(page)) => Some(page),
            _ => None,
        }
    }

    /// What `entry`, of `level`, is; an error if a reserved bit is set.
    #[inline(always)]
    fn check(self, entry: SecondStageEntry, level: u8) -> Result<Entry, Blocked> {
        let address = entry.page() << 12;
        if entry.into_bits() & self.0 != 0 {
            return Err(Blocked::Reserved);
        }
        match level {
            1 => Ok(Entry::Leaf(Gpa(address))),
            2 | 3 if entry.page_size() => match address & (entry_span(level) - 1) {
                0 => Ok(Entry::Leaf(Gpa(address))),
                _ => Err(Blocked::Reserved),
            },
            _ if entry.page_size() => Err(Blocked::Reserved),
            _ => Ok(Entry::Table(Gpa(address))),
        }
    }
}

/// The translation of one page, whatever leaf it came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Translated {
    /// Where the page of the IOVA is.
    pub(crate) page: Gpa,
    pub(crate) perm: Perm,
}

/// Whether `perm` lets `access` through.
pub(crate) const fn permits(perm: Perm, access: Access) -> Result<(), Blocked> {
    match access {
        Access::Read if !perm.readable() => Err(Blocked::ReadNotPermitted),
        Access::Write if !perm.writable() => Err(Blocked::WriteNotPermitted),
        _ => Ok(()),
    }
}

/// The second-stage tables that a request is translated by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SecondStage {
    /// Guest-physical address of the root.
    pub(crate) root: Gpa,
    /// Guest address width in bits.
    pub(crate) width: u8,
    pub(crate) flags: Flags,
}

impl SecondStage {
    /// Those of a space.
    pub(crate) const fn of(space: &PagedSpace, flags: Flags) -> Self {
        let Tables::Second { root, width } = space.tables;
        Self { root, width, flags }
    }
}

/// What the entries above level 1 lead to, for the 2 MiB around an address: the part of a walk that neighbours share.
/// Permissions and reserved bits of those entries have been seen to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Directory {
    /// The table of level 1, or of a large leaf, where these 2 MiB lead.
    pub(super) base: Gpa,
    /// A large leaf.
    pub(super) large: bool,
    /// Every entry so far permits it.
    pub(super) read: bool,
    pub(super) write: bool,
    /// The large leaf is dirty, or nobody asks.
    pub(super) dirty: bool,
    pub(super) flags: Flags,
}

/// The page that a second stage leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reached {
    pub(crate) page: Gpa,
    /// All entries permit it.
    pub(crate) read: bool,
    pub(crate) write: bool,
    /// The leaf is dirty, or nobody asks.
    pub(crate) dirty: bool,
}

impl Reached {
    /// The translation for `access`. It permits no write while the leaf is not dirty, so that the write that makes it
    /// so comes to a walk.
    #[inline(always)]
    pub(crate) fn translated(self, access: Access) -> Result<Translated, Blocked> {
        let Self { page, read, write, dirty } = self;
        let perm = Perm::from_bits(read, write).ok_or(Blocked::NothingPermitted)?;
        permits(perm, access)?;
        if INTERRUPT_WINDOW.contains(page.0) {
            return Err(Blocked::OutputInInterruptRange);
        }
        // Only from what was cached before it was dirty is there nothing.
        let perm = Perm::from_bits(read, write && dirty).ok_or(Blocked::WriteNotPermitted)?;
        Ok(Translated { page, perm })
    }
}

/// Bytes that a [`Directory`] leads to.
pub(crate) const DIRECTORY_SPAN: u64 = entry_span(2);

impl Directory {
    /// Walks from the root down to level 2. Section 3.7.
    pub(crate) fn find<M: GuestMemoryBackend>(
        memory: &M,
        config: &UnitConfig,
        SecondStage { root, width, flags }: SecondStage,
        iova: Iova,
        request: Request,
    ) -> Result<Self, Blocked> {
        if iova.0 >> width != 0 {
            return Err(Blocked::BeyondWidth);
        }
        let dirty = flags == Flags::Ignored;
        let mut found = Self { base: root, large: false, read: true, write: true, dirty, flags };
        for level in (2..=levels(width)).rev() {
            let at_root = |blocked| match blocked {
                Blocked::TableAccess if level == levels(width) => Blocked::RootAccess,
                other => other,
            };
            match found.step(memory, config, level, iova, request).map_err(at_root)? {
                Entry::Table(table) => found.base = table,
                Entry::Leaf(leaf) => {
                    let inside = iova.0 & (entry_span(level) - 1) & !(DIRECTORY_SPAN - 1);
                    found = Self { base: Gpa(leaf.0 + inside), large: true, ..found };
                    break;
                }
            }
        }
        Ok(found)
    }

    /// Goes on to the page of `iova`.
    #[inline(always)]
    pub(crate) fn translate<M: GuestMemoryBackend>(
        self,
        memory: &M,
        config: &UnitConfig,
        iova: Iova,
        request: Request,
    ) -> Result<Translated, Blocked> {
        self.reach(memory, config, iova, request)?.translated(request.access)
    }

    /// The same, whatever is permitted there.
    #[inline(always)]
    pub(crate) fn reach<M: GuestMemoryBackend>(
        mut self,
        memory: &M,
        config: &UnitConfig,
        iova: Iova,
        request: Request,
    ) -> Result<Reached, Blocked> {
        let page = if self.large {
            Gpa(self.base.0 + (iova.0 & (DIRECTORY_SPAN - 1) & !(PAGE_SIZE - 1)))
        } else {
            match self.step(memory, config, 1, iova, request)? {
                Entry::Leaf(page) | Entry::Table(page) => page,
            }
        };
        Ok(Reached { page, read: self.read, write: self.write, dirty: self.dirty })
    }

    /// Reads the entry of `level` for `iova` in the table at `base`, takes its permissions in, and sets its flags if
    /// there are any.
    #[inline(always)]
    fn step<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        config: &UnitConfig,
        level: u8,
        iova: Iova,
        request: Request,
    ) -> Result<Entry, Blocked> {
        let index = iova.0 >> (12 + LEVEL_BITS * (u32::from(level) - 1)) & (TABLE_ENTRIES - 1);
        let at = Gpa(self.base.0 + index * 8);
        if self.flags != Flags::Ignored {
            let next;
            (*self, next) = self.step_with_flags(memory, config, at, level, request)?;
            return Ok(next);
        }
        let word = Words::at(memory, at, 1).and_then(|words| words.get(0));
        let entry = SecondStageEntry::from_bits(word.ok_or(Blocked::TableAccess)?);
        let next = Self::check(Reserved::of(config), entry, level)?;
        (self.read, self.write) = (self.read && entry.read(), self.write && entry.write());
        Ok(next)
    }

    /// Where an entry that permits something leads.
    #[inline(always)]
    fn check(reserved: Reserved, entry: SecondStageEntry, level: u8) -> Result<Entry, Blocked> {
        if !entry.read() && !entry.write() {
            return Err(Blocked::NothingPermitted);
        }
        reserved.check(entry, level)
    }

    /// A step of a stage with flags, by the entry at `at`. By itself, so that others are not the slower for it.
    #[inline(never)]
    fn step_with_flags<M: GuestMemoryBackend>(
        mut self,
        memory: &M,
        config: &UnitConfig,
        at: Gpa,
        level: u8,
        request: Request,
    ) -> Result<(Self, Entry), Blocked> {
        let words = Words::at(memory, at, 1).ok_or(Blocked::TableAccess)?;
        // The entry that was checked is the one whose flags are set: another one is looked at anew.
        for _ in 0..ATTEMPTS {
            let word = words.get(0).ok_or(Blocked::TableAccess)?;
            let entry = SecondStageEntry::from_bits(word);
            let next = Self::check(Reserved::of(config), entry, level)?;
            let (read, write) = (entry.read() && self.read, entry.write() && self.write);
            let is_leaf = matches!(next, Entry::Leaf(_));
            let dirties = is_leaf && request.dirties(read, write);
            let used = entry.with_accessed(true).with_dirty(entry.dirty() || dirties);
            if used != entry {
                if self.flags == Flags::NotSnooped {
                    return Err(Blocked::SecondStageFlagsNotSnooped);
                }
                match words.exchange(0, word, used.into_bits()) {
                    None => return Err(Blocked::TableAccess),
                    Some(false) => continue,
                    Some(true) => {}
                }
            }
            (self.read, self.write, self.dirty) = (read, write, is_leaf && used.dirty());
            return Ok((self, next));
        }
        Err(Blocked::SecondStageFlagsNotSet)
    }

    /// Whether it is part of a large leaf.
    pub(crate) const fn large(self) -> bool {
        self.large
    }

    /// Whether it is of a large leaf that this request would make dirty, which takes a walk from the root.
    pub(crate) fn is_too_clean_for(self, request: Request) -> bool {
        self.large && !self.dirty && request.dirties(self.read, self.write)
    }
}

/// How neighbouring leaves become one run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Merge {
    /// As long as they are contiguous: they are of one invalidation.
    Range,
    /// Within naturally aligned 2 MiB: nobody knows which of them belong together.
    Aligned,
}

/// A bound of [`crate::Bounds`] was exhausted; what was found is not all that there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Exhausted;

/// What a walk of a range found.
#[derive(Debug)]
pub(crate) struct Found {
    /// Translations, ascending and disjoint.
    pub(crate) runs: Vec<Mapping>,
    /// What the walk speaks of: whatever of it is in no run is not mapped.
    pub(crate) range: IovaRange,
    /// Leaves seen.
    pub(crate) leaves: u64,
    /// Table entries that may still be visited.
    pub(crate) entries_left: u64,
}

/// Nothing, about everything.
impl Default for Found {
    fn default() -> Self {
        Self { runs: Vec::new(), range: IovaRange::ALL, leaves: 0, entries_left: 0 }
    }
}

/// Walks `range` of `space`, into `found`, whose storage is reused.
///
/// The range that the walk speaks of grows to the whole span of an entry above level 1 at which the walk ended: a
/// cleared directory entry takes away all that it covered (B-1). A table that cannot be read, and an entry with a
/// reserved bit, lead nowhere (rule 1). `found.entries_left` is what the walk may still visit, and goes down.
pub(crate) fn walk_range<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    space: &PagedSpace,
    range: IovaRange,
    merge: Merge,
    found: &mut Found,
) -> Result<(), Exhausted> {
    walk_keeping(memory, config, space, range, merge, Some, found)
}

/// The same, of what leads to `targets` only.
pub(crate) fn walk_range_into<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    space: &PagedSpace,
    range: IovaRange,
    targets: GpaRange,
    merge: Merge,
    found: &mut Found,
) -> Result<(), Exhausted> {
    walk_keeping(memory, config, space, range, merge, |leaf| leaf.leading_into(targets), found)
}

fn walk_keeping<M: GuestMemoryBackend>(
    memory: &M,
    config: &UnitConfig,
    space: &PagedSpace,
    range: IovaRange,
    merge: Merge,
    keep: impl Fn(Mapping) -> Option<Mapping>,
    found: &mut Found,
) -> Result<(), Exhausted> {
    found.runs.clear();
    (found.range, found.leaves) = (range, 0);
    let Tables::Second { root, width } = space.tables;
    let top = (1u64 << width) - 1;
    if range.first > top {
        return Ok(());
    }
    let mut walker = Walker {
        memory,
        reserved: Reserved::of(config),
        range: IovaRange::new(range.first, range.last.min(top)),
        merge,
        keep,
        runs_allowed: config.bounds.shadow_entries,
        found,
    };
    walker.table(root, levels(width), 0, (true, true))
}

/// Entries of the last level that are copied at a time; fewer are read one by one.
const FEW: usize = 64;

struct Walker<'a, M, K> {
    memory: &'a M,
    reserved: Reserved,
    range: IovaRange,
    merge: Merge,
    /// The part of a leaf that is looked for.
    keep: K,
    runs_allowed: usize,
    found: &'a mut Found,
}

impl<M: GuestMemoryBackend, K: Fn(Mapping) -> Option<Mapping>> Walker<'_, M, K> {
    fn table(&mut self, table: Gpa, level: u8, base: u64, (read, write): (bool, bool)) -> Result<(), Exhausted> {
        let span = entry_span(level);
        let table_last = base + (span * TABLE_ENTRIES - 1);
        let from = (self.range.first.max(base) - base) / span;
        let to = (self.range.last.min(table_last) - base) / span;
        let count = to - from + 1;
        self.found.entries_left = self.found.entries_left.checked_sub(count).ok_or(Exhausted)?;
        let Some(words) = Words::at(self.memory, Gpa(table.0 + from * 8), count as usize) else {
            self.speaks_of(base, table_last);
            return Ok(());
        };
        if level == 1 && count >= FEW as u64 {
            return self.pages(&words, count as usize, base + from * span, (read, write));
        }
        for index in 0..count {
            let first = base + (from + index) * span;
            let last = first + (span - 1);
            let entry = SecondStageEntry::from_bits(words.get(index as usize).unwrap_or(0));
            let (read, write) = (read && entry.read(), write && entry.write());
            // An entry whose permissions leave nothing leads nowhere, whatever lies below it.
            let next = Perm::from_bits(read, write).map(|perm| (perm, self.reserved.check(entry, level)));
            match next {
                Some((_, Ok(Entry::Table(next)))) => self.table(next, level - 1, first, (read, write))?,
                Some((perm, Ok(Entry::Leaf(gpa)))) => {
                    self.found.leaves += 1;
                    self.speaks_of(first, last);
                    self.leaf(Mapping { iova: Iova(first), gpa, len: span, perm })?;
                }
                Some((_, Err(_))) | None => self.speaks_of(first, last),
            }
        }
        Ok(())
    }

    /// `count` entries of level 1, the first of which is for `first`. Neighbours that lead to neighbours with one
    /// permission are taken as one leaf.
    fn pages(
        &mut self,
        words: &Words<'_, M>,
        count: usize,
        first: u64,
        (read, write): (bool, bool),
    ) -> Result<(), Exhausted> {
        self.speaks_of(first, first + (count as u64 * PAGE_SIZE - 1));
        let mut copy = [0; FEW];
        for begin in (0..count).step_by(FEW) {
            let copied = &mut copy[..FEW.min(count - begin)];
            if !words.copy(begin, copied) {
                copied.fill(0);
            }
            let mut rest = &*copied;
            let mut iova = first + begin as u64 * PAGE_SIZE;
            while let Some(&word) = rest.first() {
                let entry = SecondStageEntry::from_bits(word);
                let perm = Perm::from_bits(read && entry.read(), write && entry.write());
                let leaf = perm.zip(self.reserved.check(entry, 1).ok());
                let mut len = 1;
                if let Some((perm, Entry::Leaf(gpa))) = leaf {
                    if rest.get(1) == Some(&word.wrapping_add(PAGE_SIZE)) {
                        len = self.neighbours(rest, gpa);
                    }
                    self.found.leaves += len as u64;
                    self.leaf(Mapping { iova: Iova(iova), gpa, len: len as u64 * PAGE_SIZE, perm })?;
                }
                rest = &rest[len..];
                iova += len as u64 * PAGE_SIZE;
            }
        }
        Ok(())
    }

    /// How many of `words` lead to neighbours of the page `gpa`, where the first does, and are like it otherwise.
    fn neighbours(&self, words: &[u64], gpa: Gpa) -> usize {
        let alike = |(word, last): (&u64, &u64)| *word == last.wrapping_add(PAGE_SIZE);
        let len = 1 + words[1..].iter().zip(words).take_while(|pair| alike(*pair)).count();
        // The address may have grown out of its bits: then so it has at the last of them.
        let last = self.reserved.check(SecondStageEntry::from_bits(words[len - 1]), 1);
        let expected = Gpa(gpa.0 + (len as u64 - 1) * PAGE_SIZE);
        if matches!(last, Ok(Entry::Leaf(last)) if last == expected) { len } else { 1 }
    }

    fn speaks_of(&mut self, first: u64, last: u64) {
        let spoken_of = &mut self.found.range;
        *spoken_of = IovaRange::new(spoken_of.first.min(first), spoken_of.last.max(last));
    }

    /// Adds a leaf, without what lies in the interrupt range or leads there (A-12, B-6).
    #[inline(always)]
    fn leaf(&mut self, leaf: Mapping) -> Result<(), Exhausted> {
        let Some(leaf) = (self.keep)(leaf) else { return Ok(()) };
        let window = INTERRUPT_WINDOW;
        let touches = |first: u64| first <= window.last && first + (leaf.len - 1) >= window.first;
        if !touches(leaf.iova.0) && !touches(leaf.gpa.0) {
            return self.run(leaf);
        }
        self.outside_of_interrupts(leaf)
    }

    #[cold]
    #[inline(never)]
    fn outside_of_interrupts(&mut self, leaf: Mapping) -> Result<(), Exhausted> {
        let window = INTERRUPT_WINDOW;
        for piece in outside(leaf, window, |mapping| mapping.iova.0) {
            for piece in outside(piece, window, |mapping| mapping.gpa.0) {
                self.run(piece)?;
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn run(&mut self, piece: Mapping) -> Result<(), Exhausted> {
        if let Some(run) = self.found.runs.last_mut() {
            let contiguous =
                run.iova.0 + run.len == piece.iova.0 && run.gpa.0 + run.len == piece.gpa.0 && run.perm == piece.perm;
            let together = match self.merge {
                Merge::Range => true,
                Merge::Aligned => run.iova.0 / MERGE_SPAN == piece.last().0 / MERGE_SPAN,
            };
            if contiguous && together {
                run.len += piece.len;
                return Ok(());
            }
        }
        if self.found.runs.len() >= self.runs_allowed {
            return Err(Exhausted);
        }
        self.found.runs.push(piece);
        Ok(())
    }
}

/// The parts of `mapping` before and after `window`, by the address that `address` picks. The physical address of the
/// part after it advances with its IOVA.
fn outside(mapping: Mapping, window: IovaRange, address: fn(&Mapping) -> u64) -> impl Iterator<Item = Mapping> {
    let first = address(&mapping);
    let last = first + (mapping.len - 1);
    let before = (first < window.first).then(|| Mapping { len: mapping.len.min(window.first - first), ..mapping });
    let after = (last > window.last).then(|| {
        let skipped = (window.last + 1).saturating_sub(first);
        let moved = |from: u64| from + skipped;
        Mapping {
            iova: Iova(moved(mapping.iova.0)),
            gpa: Gpa(moved(mapping.gpa.0)),
            len: mapping.len - skipped,
            perm: mapping.perm,
        }
    });
    // A mapping on one side of the window is both "before" or "after" as a whole, never twice.
    let (before, after) = if last < window.first { (Some(mapping), None) } else { (before, after) };
    before.into_iter().chain(after)
}
