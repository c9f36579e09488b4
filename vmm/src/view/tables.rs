//! `iommu tables`: the guest's own tables.

use std::fmt;

use serde::{Deserialize, Serialize};
use vtd::Requester;
use vtd::inspect::{FunctionEntries, Leads, Stage, TableItem, TableMode, TableRange, TablesPage};

use super::{Hex, named};
use crate::config::shown;

/// A page of it.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// What all pages have.
    #[serde(flatten)]
    pub head: Head,
    /// By function, PASID and IOVA.
    pub items: Vec<Item>,
    /// Where the next page begins.
    pub next: Option<String>,
}

/// What the unit has in use.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// The unit, where there are several.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unit: Option<String>,
    /// Translation is on.
    pub enabled: bool,
    /// legacy, scalable, abort or unknown.
    pub mode: String,
    /// The root table.
    pub root: Hex,
}

/// Something that is there.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
#[serde(rename_all = "kebab-case")]
pub enum Item {
    /// A function, or a PASID of one. What follows is in its tables.
    Function(Function),
    /// What entries say about a run of IOVAs.
    Range(Range),
}

/// The entries that lead to paging tables, and where they lead.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Function {
    /// Address in the guest.
    pub addr: String,
    /// The id of the device that is there.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<String>,
    /// Of scalable mode.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pasid: Option<Hex>,
    /// The PASID is that of requests without one.
    #[serde(skip_serializing_if = "is_false", default)]
    pub is_rid_pasid: bool,
    /// Its words, the lowest first, as those of the others.
    pub root_entry: Vec<Hex>,
    /// Its words.
    pub context_entry: Vec<Hex>,
    /// Of the PASID directory.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub directory_entry: Option<Hex>,
    /// Its words.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub pasid_entry: Vec<Hex>,
    /// Domain id.
    pub domain: Option<u16>,
    /// none, pass-through, first, second, or the number of another type.
    pub stage: String,
    /// The topmost table.
    pub table: Option<Hex>,
    /// Levels of its tables.
    pub levels: Option<u8>,
    /// What the unit has against it.
    pub fault: Option<Fault>,
}

/// A fault reason.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// As fault records have it.
    pub reason: Hex,
    /// Its name.
    pub name: String,
}

/// A run of IOVAs.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub struct Range {
    /// First IOVA.
    pub first: Hex,
    /// Last IOVA.
    pub last: Hex,
    /// Level of the entries; 1 is that of 4 KiB pages.
    pub level: u8,
    /// How many entries.
    pub entries: u64,
    /// Where the first IOVA leads.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub gpa: Option<Hex>,
    /// r, w or rw.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub perm: Option<String>,
    /// Why it leads nowhere.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub nowhere: Option<String>,
    /// The entries from the topmost table down to the first of them.
    pub path: Vec<Hex>,
}

fn is_false(what: &bool) -> bool {
    !what
}

fn words(words: &[u64]) -> Vec<Hex> {
    words.iter().copied().map(Hex).collect()
}

impl Page {
    /// The page, of a unit of `segment`, with the ids that `id_of` gives by address.
    pub fn new(page: &TablesPage, segment: u16, id_of: &dyn Fn(vtd::SourceId) -> Option<String>) -> Self {
        let mode = match page.mode {
            TableMode::Legacy => "legacy",
            TableMode::Scalable => "scalable",
            TableMode::Abort => "abort",
            TableMode::Unknown => "unknown",
        };
        let item = |item: &TableItem| match item {
            TableItem::Function(entries) => Item::Function(Function::new(entries, segment, id_of(entries.source))),
            TableItem::Range(range) => Item::Range(Range::new(range)),
        };
        let head = Head { unit: None, enabled: page.enabled, mode: mode.to_owned(), root: Hex(page.root.0) };
        Self { head, items: page.items.iter().map(item).collect(), next: page.next.map(|next| next.to_string()) }
    }
}

impl Function {
    fn new(of: &FunctionEntries, segment: u16, id: Option<String>) -> Self {
        let (stage, table, levels) = match of.stage {
            Stage::None => ("none".to_owned(), None, None),
            Stage::PassThrough => ("pass-through".to_owned(), None, None),
            Stage::First { root, levels } => ("first".to_owned(), Some(root), Some(levels)),
            Stage::Second { root, levels } => ("second".to_owned(), Some(root), Some(levels)),
            Stage::Other(kind) => (kind.to_string(), None, None),
        };
        let fault = of.fault.map(|reason| Fault { reason: Hex(reason.code().into()), name: format!("{reason:?}") });
        Self {
            addr: shown(Requester { segment, sid: of.source }),
            id,
            pasid: of.pasid.map(|pasid| Hex(pasid.0.into())),
            is_rid_pasid: of.is_rid_pasid,
            root_entry: words(&of.root_entry),
            context_entry: words(&of.context_entry),
            directory_entry: of.directory_entry.map(Hex),
            pasid_entry: words(&of.pasid_entry),
            domain: of.domain.map(|domain| domain.0),
            stage,
            table: table.map(|table| Hex(table.0)),
            levels,
            fault,
        }
    }
}

impl Range {
    fn new(of: &TableRange) -> Self {
        let (gpa, perm, nowhere) = match of.leads {
            Leads::To { gpa, perm } => (Some(Hex(gpa.0)), Some(perm.to_string()), None),
            Leads::Nowhere(why) => (None, None, Some(why.to_owned())),
        };
        let (first, last) = (Hex(of.range.first), Hex(of.range.last));
        Self { first, last, level: of.level, entries: of.entries, gpa, perm, nowhere, path: words(&of.path) }
    }

    /// Makes `next` part of it, when it goes on where this ends: a run that a page ended in is one.
    pub fn join(&mut self, next: &Self) -> bool {
        let len = next.first.0.wrapping_sub(self.first.0);
        let goes_on = match (self.gpa, next.gpa) {
            (Some(gpa), Some(other)) => gpa.0.checked_add(len) == Some(other.0),
            (None, None) => true,
            _ => false,
        };
        let same = (self.level, &self.perm, &self.nowhere) == (next.level, &next.perm, &next.nowhere);
        let joins = goes_on && same && self.last.0.checked_add(1) == Some(next.first.0);
        if joins {
            self.last = next.last;
            self.entries += next.entries;
        }
        joins
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { unit, enabled, mode, root } = self;
        if let Some(unit) = unit {
            write!(f, "{unit}: ")?;
        }
        match (enabled, mode.as_str()) {
            (false, _) => f.write_str("translation is off: functions reach all of the guest's memory"),
            (true, "abort") => f.write_str("translation is on, in abort mode: every request is blocked"),
            (true, "unknown") => {
                f.write_str("translation is on, in a mode that there is not: every request is blocked")
            }
            (true, _) => write!(f, "translation is on, {mode} mode, root table {root}"),
        }
    }
}

/// The words of an entry as the specification writes it, the highest first.
fn entry(words: &[Hex]) -> String {
    let words: Vec<String> = words.iter().rev().map(|word| format!("{:016x}", word.0)).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(":") }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&named(&self.addr, self.id.as_deref()))?;
        if let Some(pasid) = self.pasid {
            write!(f, ", PASID {pasid}{}", if self.is_rid_pasid { " (of requests without)" } else { "" })?;
        }
        if let Some(domain) = self.domain {
            write!(f, ", domain {domain}")?;
        }
        match (self.stage.as_str(), self.table, self.levels) {
            ("none", _, _) => f.write_str(", leads nowhere")?,
            ("pass-through", _, _) => f.write_str(", passes through")?,
            (stage, Some(table), Some(levels)) => write!(f, ", {stage} stage at {table}, {levels} levels")?,
            (other, _, _) => write!(f, ", type {other}")?,
        }
        if let Some(Fault { reason, name }) = &self.fault {
            write!(f, "; blocked: fault {reason} {name}")?;
        }
        write!(f, "\n  root entry {}, context entry {}", entry(&self.root_entry), entry(&self.context_entry))?;
        if let Some(directory) = self.directory_entry {
            let (directory, of_table) = (entry(&[directory]), entry(&self.pasid_entry));
            write!(f, "\n  directory entry {directory}, PASID entry {of_table}")?;
        }
        Ok(())
    }
}

/// Bytes that an entry covers, for people.
fn size_of(level: u8) -> &'static str {
    match level {
        1 => "4K",
        2 => "2M",
        3 => "1G",
        4 => "512G",
        5 => "256T",
        _ => "all",
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, level, entries, gpa, perm, nowhere, path } = self;
        let range = format!("{first}-{last}");
        let to = match (gpa, perm, nowhere) {
            (Some(gpa), Some(perm), _) => format!("{gpa} {perm}"),
            (_, _, nowhere) => format!("nowhere: {}", nowhere.as_deref().unwrap_or("it is not said why")),
        };
        let path: Vec<String> = path.iter().map(|entry| format!("{:x}", entry.0)).collect();
        write!(f, "  {range:<35} {to:<20} {entries} x {:<4} {}", size_of(*level), path.join(" "))
    }
}
