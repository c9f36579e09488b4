//! From the root table to the paging tables of each function, in either mode. Sections 3.4.2 and 3.4.3.
//!
//! What an entry is taken for is read here from the entry; whether the unit takes it, by the unit's own look-up.

use std::ops::ControlFlow;

use vm_memory::GuestMemoryBackend;

use super::paging::Pager;
use super::{FunctionEntries, PageBounds, Position, Stage, TableItem};
use crate::core::Core;
use crate::faults::RequestType;
use crate::ids::{DomainId, Gpa, Pasid, SourceId};
use crate::memory::{Words, read_pair, read_words};
use crate::spec::fault::FaultReason;
use crate::spec::pasid::{
    CONTEXT_ENTRY_SIZE, ContextHigh, ContextLow, DirectoryEntry, EntryLow, EntryMiddle, EntryUpper, RootHalf,
    TABLE_BITS, TABLE_ENTRY_WORDS, TranslationType,
};
use crate::spec::root_context::{
    ContextEntryHigh, ContextEntryLow, RootEntryLow, TranslationType as LegacyTranslationType,
};
use crate::spec::second_stage::levels;
use crate::tables::context::Translation;
use crate::tables::resolve::resolve;

/// The page, and where the next one begins.
pub(super) fn list<M: GuestMemoryBackend>(
    core: &Core<M>,
    translation: Translation,
    only: Option<SourceId>,
    from: Position,
    bounds: PageBounds,
) -> (Vec<TableItem>, Option<Position>) {
    let pager = Pager {
        memory: &core.memory,
        host_address_width: core.config.host_address_width,
        // A page that looks at nothing would have no next one.
        entries_left: bounds.entries.max(64),
        items_left: bounds.items.max(1),
        items: Vec::new(),
    };
    let mut listing = Listing { core, translation, only, from, pager };
    let next = listing.run().break_value();
    (listing.pager.items, next)
}

/// Goes on at the next page.
type Page = ControlFlow<Position>;

struct Listing<'a, M> {
    core: &'a Core<M>,
    translation: Translation,
    only: Option<SourceId>,
    from: Position,
    pager: Pager<'a, M>,
}

/// The width that an AW field names, in levels of its tables; other values have none.
fn levels_of(address_width: u8) -> Option<u8> {
    (1..=3).contains(&address_width).then(|| levels(30 + 9 * address_width))
}

impl<M: GuestMemoryBackend> Listing<'_, M> {
    fn run(&mut self) -> Page {
        match self.only {
            Some(only) if self.from.source > only.0 => ControlFlow::Continue(()),
            Some(only) => {
                if self.from.source < only.0 {
                    self.from = Position { source: only.0, ..Position::default() };
                }
                self.function(only)
            }
            None => {
                let mut source = self.from.source;
                loop {
                    let here = SourceId(source);
                    self.look_at(here)?;
                    // Without a context table there is none of the functions that it has.
                    let next = if self.has_context_table(here) {
                        self.function(here)?;
                        source.checked_add(1)
                    } else {
                        let together = if self.translation.is_scalable() { 0x80 } else { 0x100 };
                        (source & !(together - 1)).checked_add(together)
                    };
                    match next {
                        Some(next) => source = next,
                        None => return ControlFlow::Continue(()),
                    }
                    self.from = Position { source, ..Position::default() };
                }
            }
        }
    }

    /// Counts an entry.
    fn look_at(&mut self, source: SourceId) -> Page {
        let here = Position { source: source.0, ..Position::default() };
        let here = if self.from.source == source.0 { self.from } else { here };
        self.pager.look().map_break(|()| here)
    }

    /// The words of the root entry that leads to `source`.
    fn root_entry(&self, source: SourceId) -> Vec<u64> {
        let entry = Gpa((self.translation.root.page() << 12) + u64::from(source.bus()) * 16);
        let memory = &self.core.memory;
        if self.translation.is_scalable() {
            let half = Gpa(entry.0 + u64::from(source.devfn() >> 7) * 8);
            Words::at(memory, half, 1).and_then(|words| words.get(0)).into_iter().collect()
        } else {
            read_pair(memory, entry).map_or_else(Vec::new, |(low, high)| vec![low, high])
        }
    }

    /// Whether there is one, or something in its place.
    fn has_context_table(&self, source: SourceId) -> bool {
        let root = self.root_entry(source);
        root.first().is_none_or(|low| RootEntryLow::from_bits(*low).present())
    }

    /// Lists `source`, if it is asked for or has a context entry.
    fn function(&mut self, source: SourceId) -> Page {
        if self.translation.is_scalable() { self.scalable(source) } else { self.legacy(source) }
    }

    fn fault(&self, source: SourceId, pasid: Option<Pasid>) -> Option<FaultReason> {
        let Core { memory, config, .. } = self.core;
        let request = RequestType::Untranslated;
        resolve(memory, config, self.translation, source, pasid, request).err().map(|unresolved| unresolved.reason)
    }

    fn empty(&self, source: SourceId, root_entry: Vec<u64>) -> FunctionEntries {
        FunctionEntries {
            source,
            pasid: None,
            is_rid_pasid: false,
            root_entry,
            context_entry: Vec::new(),
            directory_entry: None,
            pasid_entry: Vec::new(),
            domain: None,
            stage: Stage::None,
            fault: self.fault(source, None),
        }
    }

    /// One without a context entry is an item only if it is asked for; one whose root entry cannot be used, too, but
    /// once for all of its table.
    fn unreachable(&mut self, entries: FunctionEntries) -> Page {
        let source = entries.source;
        let together = if self.translation.is_scalable() { 0x7f } else { 0xff };
        let is_present = entries.root_entry.first().is_some_and(|low| RootEntryLow::from_bits(*low).present());
        let first_of_broken = is_present && entries.context_entry.is_empty() && source.0 & together == 0;
        let wanted = self.only.is_some() || first_of_broken;
        if wanted && self.begins(source, 0) { self.head(entries) } else { ControlFlow::Continue(()) }
    }

    /// Whether what is to be listed begins before the tables of this PASID.
    fn begins(&self, source: SourceId, pasid: u32) -> bool {
        self.from <= Position { source: source.0, pasid, offset: None }
    }

    fn head(&mut self, entries: FunctionEntries) -> Page {
        let pasid = entries.pasid.map_or(0, |pasid| pasid.0);
        let here = Position { source: entries.source.0, pasid, offset: None };
        self.pager.push(TableItem::Function(entries)).map_break(|()| here)
    }

    /// The item of a function, and what is in its paging tables.
    fn list(&mut self, entries: FunctionEntries) -> Page {
        let (source, pasid, stage) = (entries.source.0, entries.pasid.map_or(0, |pasid| pasid.0), entries.stage);
        let offset = if self.begins(entries.source, pasid) {
            self.head(entries)?;
            0
        } else {
            self.from.offset.unwrap_or(0)
        };
        self.pager.stage(stage, offset).map_break(|offset| Position { source, pasid, offset: Some(offset) })
    }

    fn legacy(&mut self, source: SourceId) -> Page {
        let root_entry = self.root_entry(source);
        let root = RootEntryLow::from_bits(root_entry.first().copied().unwrap_or(0));
        let mut entries = self.empty(source, root_entry);
        let context = Gpa((root.context_table() << 12) + u64::from(source.devfn()) * 16);
        let context = root.present().then(|| read_pair(&self.core.memory, context)).flatten();
        let Some((low, high)) = context else { return self.unreachable(entries) };
        entries.context_entry = vec![low, high];
        let (low, high) = (ContextEntryLow::from_bits(low), ContextEntryHigh::from_bits(high));
        if !low.present() {
            return self.unreachable(entries);
        }
        entries.domain = Some(DomainId(high.domain()));
        let root = Gpa(low.second_stage() << 12);
        entries.stage = match LegacyTranslationType::from_bits(low.translation_type()) {
            Some(LegacyTranslationType::PassThrough) => Stage::PassThrough,
            Some(LegacyTranslationType::Untranslated | LegacyTranslationType::DeviceTlb) => {
                levels_of(high.address_width()).map_or(Stage::None, |levels| Stage::Second { root, levels })
            }
            None => Stage::Other(low.translation_type()),
        };
        self.list(entries)
    }

    fn scalable(&mut self, source: SourceId) -> Page {
        let memory = &self.core.memory;
        let root_entry = self.root_entry(source);
        let root = RootHalf::from_bits(root_entry.first().copied().unwrap_or(0));
        let mut entries = self.empty(source, root_entry);
        let context = Gpa((root.context_table() << 12) + u64::from(source.devfn() & 0x7f) * CONTEXT_ENTRY_SIZE);
        let context = root.present().then(|| read_words::<_, 4>(memory, context)).flatten();
        let Some(words) = context else { return self.unreachable(entries) };
        entries.context_entry = words.to_vec();
        let (low, high) = (ContextLow::from_bits(words[0]), ContextHigh::from_bits(words[1]));
        if !low.present() {
            return self.unreachable(entries);
        }
        let rid_pasid = high.rid_pasid();
        if rid_pasid > low.max_pasid() && self.begins(source, 0) {
            // Nothing else of it is looked at.
            return self.head(entries);
        }

        let most = low.max_pasid().min(Pasid::MAX.0);
        let mut pasid = if self.from.source == source.0 { self.from.pasid } else { 0 };
        let mut listed =
            self.from.source == source.0 && self.from != Position { source: source.0, ..Default::default() };
        let table_pasids = 1u32 << TABLE_BITS;
        while pasid <= most {
            let here = Position { source: source.0, pasid, offset: None };
            let here = if self.from.source == source.0 && self.from.pasid == pasid { self.from } else { here };
            self.pager.look().map_break(|()| here)?;
            let at = Gpa((low.directory() << 12) + u64::from(pasid >> TABLE_BITS) * 8);
            let word = Words::at(memory, at, 1).and_then(|words| words.get(0));
            let directory = DirectoryEntry::from_bits(word.unwrap_or(0));
            if !directory.present() {
                pasid = (pasid & !(table_pasids - 1)) + table_pasids;
                continue;
            }
            let end = (pasid | (table_pasids - 1)).min(most);
            while pasid <= end {
                let here = Position { source: source.0, pasid, offset: None };
                let here = if self.from.source == source.0 && self.from.pasid == pasid { self.from } else { here };
                self.pager.look().map_break(|()| here)?;
                let at = u64::from(pasid & (table_pasids - 1)) * TABLE_ENTRY_WORDS as u64 * 8;
                let words = read_words::<_, TABLE_ENTRY_WORDS>(memory, Gpa((directory.table() << 12) + at));
                if let Some(words) = words.filter(|words| EntryLow::from_bits(words[0]).present()) {
                    let rid = pasid == rid_pasid;
                    let of = (!rid).then_some(Pasid(pasid));
                    let (stage, domain) = stage_of(&words);
                    let entries = FunctionEntries {
                        pasid: Some(Pasid(pasid)),
                        is_rid_pasid: rid,
                        directory_entry: word,
                        pasid_entry: words.to_vec(),
                        domain: Some(domain),
                        stage,
                        fault: self.fault(source, of),
                        ..entries.clone()
                    };
                    listed = true;
                    self.list(entries)?;
                }
                pasid += 1;
            }
        }
        // A context entry that leads to no PASID is there all the same.
        if listed { ControlFlow::Continue(()) } else { self.head(entries) }
    }
}

/// Where an entry of a PASID table leads.
fn stage_of(words: &[u64; TABLE_ENTRY_WORDS]) -> (Stage, DomainId) {
    let (low, middle) = (EntryLow::from_bits(words[0]), EntryMiddle::from_bits(words[1]));
    let upper = EntryUpper::from_bits(words[2]);
    let stage = match TranslationType::from_bits(low.translation_type()) {
        Some(TranslationType::PassThrough) => Stage::PassThrough,
        Some(TranslationType::FirstStage) if upper.paging_mode() <= 1 => {
            Stage::First { root: Gpa(upper.first_stage() << 12), levels: 4 + upper.paging_mode() }
        }
        Some(TranslationType::SecondStage) => {
            let root = Gpa(low.second_stage() << 12);
            levels_of(low.address_width()).map_or(Stage::None, |levels| Stage::Second { root, levels })
        }
        _ => Stage::Other(low.translation_type()),
    };
    (stage, DomainId(middle.domain()))
}
