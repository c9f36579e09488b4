//! Paging tables of either stage, from an offset on.

use std::ops::ControlFlow;

use vm_memory::GuestMemoryBackend;

use super::{Leads, Stage, TableItem, TableRange};
use crate::ids::Gpa;
use crate::memory::Words;
use crate::range::IovaRange;
use crate::space::Perm;
use crate::spec::first_stage::FirstStageEntry;
use crate::spec::second_stage::{SecondStageEntry, TABLE_ENTRIES, entry_span};

/// What all entries on the way permit.
#[derive(Clone, Copy)]
struct Permitted {
    read: bool,
    write: bool,
}

/// What a present entry is.
enum Entry {
    Table(Gpa),
    Leaf(Gpa),
    Nowhere(&'static str),
}

/// Which stage, for what differs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    First,
    Second,
}

impl Kind {
    /// What `word`, of `level`, is and permits by itself; `None`: it is not present.
    fn parse(self, word: u64, level: u8, width: u8) -> Option<(Entry, Permitted)> {
        let (permitted, address, large) = match self {
            Self::Second => {
                let entry = SecondStageEntry::from_bits(word);
                let permitted = Permitted { read: entry.read(), write: entry.write() };
                if !permitted.read && !permitted.write {
                    return None;
                }
                if entry.snoop() || entry.transient() {
                    return Some((Entry::Nowhere("a reserved bit is set"), permitted));
                }
                (permitted, entry.page() << 12, entry.page_size() && level > 1)
            }
            Self::First => {
                let entry = FirstStageEntry::from_bits(word);
                let permitted = Permitted { read: true, write: entry.write() };
                if !entry.present() {
                    return None;
                }
                if !entry.user() {
                    return Some((Entry::Nowhere("for the supervisor only"), permitted));
                }
                let large = entry.page_size() && level > 1;
                // Bit 12 of a large leaf is PAT.
                let address = (entry.page() << 12) & if large { !(1 << 12) } else { u64::MAX };
                (permitted, address, large)
            }
        };
        let entry = if address >> width != 0 {
            Entry::Nowhere("an address beyond the host's width")
        } else if large && level > 3 {
            Entry::Nowhere("a page of a size that there is not")
        } else if large && address & (entry_span(level) - 1) != 0 {
            Entry::Nowhere("a large page that is not aligned")
        } else if large || level == 1 {
            Entry::Leaf(Gpa(address))
        } else {
            Entry::Table(Gpa(address))
        };
        Some((entry, permitted))
    }
}

/// A listing under way.
pub(super) struct Pager<'a, M> {
    pub(super) memory: &'a M,
    pub(super) host_address_width: u8,
    pub(super) entries_left: u64,
    pub(super) items_left: usize,
    pub(super) items: Vec<TableItem>,
}

impl<M: GuestMemoryBackend> Pager<'_, M> {
    /// Adds an item; breaks, without, where there is no room for it.
    pub(super) fn push(&mut self, item: TableItem) -> ControlFlow<()> {
        match self.items_left.checked_sub(1) {
            None => ControlFlow::Break(()),
            Some(left) => {
                self.items_left = left;
                self.items.push(item);
                ControlFlow::Continue(())
            }
        }
    }

    /// Counts an entry that is looked at; breaks where no more may be.
    pub(super) fn look(&mut self) -> ControlFlow<()> {
        match self.entries_left.checked_sub(1) {
            None => ControlFlow::Break(()),
            Some(left) => {
                self.entries_left = left;
                ControlFlow::Continue(())
            }
        }
    }

    /// Lists the tables of `stage` from `offset` on; breaks with the offset at which it is to go on.
    pub(super) fn stage(&mut self, stage: Stage, offset: u64) -> ControlFlow<u64> {
        let (kind, root, levels) = match stage {
            Stage::First { root, levels } => (Kind::First, root, levels),
            Stage::Second { root, levels } => (Kind::Second, root, levels),
            Stage::None | Stage::PassThrough | Stage::Other(_) => return ControlFlow::Continue(()),
        };
        let mut path = Vec::with_capacity(usize::from(levels));
        let permitted = Permitted { read: true, write: true };
        let mut walk = Walk { pager: self, kind, levels, offset, path: &mut path, begun: false };
        walk.table(root, levels, 0, permitted)
    }
}

struct Walk<'w, 'a, M> {
    pager: &'w mut Pager<'a, M>,
    kind: Kind,
    levels: u8,
    /// What is before it was listed.
    offset: u64,
    path: &'w mut Vec<u64>,
    /// A range of these tables is the last item.
    begun: bool,
}

impl<M: GuestMemoryBackend> Walk<'_, '_, M> {
    fn table(&mut self, table: Gpa, level: u8, base: u64, above: Permitted) -> ControlFlow<u64> {
        let span = entry_span(level);
        let from = self.offset.saturating_sub(base) / span;
        let Some(words) = Words::at(self.pager.memory, Gpa(table.0 + from * 8), (TABLE_ENTRIES - from) as usize) else {
            let last = base + (span * TABLE_ENTRIES - 1);
            return self.range(
                base.max(self.offset),
                last,
                level + 1,
                Leads::Nowhere("there is no memory for a table"),
            );
        };
        for index in from..TABLE_ENTRIES {
            let first = base + index * span;
            if self.pager.look().is_break() {
                return ControlFlow::Break(first.max(self.offset));
            }
            let word = words.get((index - from) as usize).unwrap_or(0);
            let Some((entry, own)) = self.kind.parse(word, level, self.pager.host_address_width) else { continue };
            let permitted = Permitted { read: above.read && own.read, write: above.write && own.write };
            self.path.push(word);
            let perm = Perm::from_bits(permitted.read, permitted.write);
            let done = match (entry, perm) {
                (Entry::Nowhere(why), _) => self.range(first, first + (span - 1), level, Leads::Nowhere(why)),
                (_, None) => {
                    let why = "what the entries permit has nothing in common";
                    self.range(first, first + (span - 1), level, Leads::Nowhere(why))
                }
                (Entry::Leaf(gpa), Some(perm)) => self.range(first, first + (span - 1), level, Leads::To { gpa, perm }),
                (Entry::Table(next), Some(_)) => self.table(next, level - 1, first, permitted),
            };
            self.path.pop();
            done?;
        }
        ControlFlow::Continue(())
    }

    /// Adds what entries of `level` say about `first` to `last`.
    fn range(&mut self, first: u64, last: u64, level: u8, leads: Leads) -> ControlFlow<u64> {
        // A leaf that the page before ended in is whole there.
        if first < self.offset && level <= self.levels {
            return ControlFlow::Continue(());
        }
        let range = IovaRange::new(self.canonical(first), self.canonical(last));
        if self.begun
            && let Some(TableItem::Range(open)) = self.pager.items.last_mut()
            && open.level == level
            && open.range.last.checked_add(1) == Some(range.first)
        {
            let goes_on = match (open.leads, leads) {
                (Leads::To { gpa: from, perm }, Leads::To { gpa, perm: other }) => {
                    let len = range.first - open.range.first;
                    perm == other && from.0.checked_add(len) == Some(gpa.0)
                }
                (Leads::Nowhere(why), Leads::Nowhere(other)) => why == other,
                _ => false,
            };
            if goes_on {
                open.range.last = range.last;
                open.entries += 1;
                return ControlFlow::Continue(());
            }
        }
        let item = TableRange { range, level, entries: 1, path: self.path.clone(), leads };
        if self.pager.push(TableItem::Range(item)).is_break() {
            return ControlFlow::Break(first);
        }
        self.begun = true;
        ControlFlow::Continue(())
    }

    /// The address that a device issues.
    fn canonical(&self, offset: u64) -> u64 {
        let unused = 64 - (12 + 9 * u32::from(self.levels));
        match self.kind {
            Kind::First => ((offset << unused) as i64 >> unused) as u64,
            Kind::Second => offset,
        }
    }
}
