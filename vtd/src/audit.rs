//! The audit: at one quiet moment, a fresh walk of the guest's tables is compared with the shadow of each space, and
//! what each function is attached to with what the guest's root and context tables say. The shadows are handed on, so that
//! whoever holds the host's mappings compares his book in the same moment.
//!
//! **Translations are compared, not shapes**: leaves, extents and host mappings may be cut and joined as they like.
//!
//! **Pending or a difference.** A guest edits its tables first and invalidates later, so tables and shadow may disagree at any
//! moment without anybody being wrong. One look cannot tell; two can. What an audit finds to disagree it counts as pending,
//! and remembers: where, what the tables said, what the shadow said. When an invalidation that covers a remembered piece
//! has taken effect (before its wait status is written), the piece is looked at again:
//!
//! ```text
//!              audit: tables and shadow disagree              next audit: still so
//!   (nothing) ────────────────────────────────► remembered          ▲
//!       ▲                                           │ an invalidation │
//!       │   they agree, or one of them changed      ▼  covered it     │
//!       └──────────────────────────────────────── look ──────────► overdue ──► a difference
//!                                                      both as they were
//! ```
//!
//! So a difference is a piece whose entry was there before an invalidation of it began and is there after it completed, and
//! which the shadow missed. (A guest that changes an entry there and back while one drain runs, without an invalidation of its
//! own, breaks the protocol and could make that up.) What the listener refused in that drain is not overdue: it is tried again at
//! the next invalidation, and counted where it was refused. A space that a bound has blocked is not compared with its tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use vm_memory::GuestMemoryBackend;

use crate::ids::{Gpa, Iova, Requester};
use crate::iotlb::Scope;
use crate::space::{Mapping, PagedSpace, Perm, Refusal, SpaceKey};
use crate::spaces::{ContextScope, Spaces, look_up};
use crate::unit::Shared;
use crate::walk::{Found, Merge, walk_range};

/// Differences that are listed; the rest is counted.
const LISTED: usize = 64;
/// Pieces that are remembered from one audit to the next; the rest stays pending.
const REMEMBERED: usize = 1024;
/// Looks that one drain may owe; beyond, everything that was remembered is forgotten.
const LOOKS: usize = 1 << 16;

/// Where a book says that a run of IOVAs leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Guest-physical address of the first byte.
    pub gpa: Gpa,
    /// What the device may do.
    pub perm: Perm,
}

impl Target {
    fn after(self, skipped: u64) -> Self {
        Self { gpa: Gpa(self.gpa.0.wrapping_add(skipped)), ..self }
    }
}

/// A run of IOVAs, inclusive, about which each of two books says one thing: where it leads, or that it is not mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First IOVA.
    pub first: Iova,
    /// Last IOVA.
    pub last: Iova,
    /// What the first book says.
    pub left: Option<Target>,
    /// What the second book says.
    pub right: Option<Target>,
}

impl Piece {
    /// Whether the books agree.
    pub fn agrees(&self) -> bool {
        self.left == self.right
    }

    /// The part of it within `first` to `last`, if there is one.
    fn within(&self, first: u64, last: u64) -> Option<Self> {
        let (from, to) = (self.first.0.max(first), self.last.0.min(last));
        (from <= to).then(|| {
            let skipped = from - self.first.0;
            let side = |target: Option<Target>| target.map(|target| target.after(skipped));
            Self { first: Iova(from), last: Iova(to), left: side(self.left), right: side(self.right) }
        })
    }

    /// Makes `next` part of it, when it goes on where this ends.
    fn join(&mut self, next: &Self) -> bool {
        let len = next.first.0.wrapping_sub(self.first.0);
        let goes_on = |from: Option<Target>, to: Option<Target>| from.map(|from| from.after(len)) == to;
        let joins = self.last.0.checked_add(1) == Some(next.first.0)
            && goes_on(self.left, next.left)
            && goes_on(self.right, next.right);
        if joins {
            self.last = next.last;
        }
        joins
    }
}

/// Compares two books of one space, each ascending and disjoint: `each` is called for every run of IOVAs that at least one of them
/// maps, in ascending order, cut where either of them is.
pub fn compare(
    left: impl IntoIterator<Item = Mapping>,
    right: impl IntoIterator<Item = Mapping>,
    mut each: impl FnMut(Piece),
) {
    let (mut lefts, mut rights) = (left.into_iter(), right.into_iter());
    let (mut left, mut right) = (lefts.next(), rights.next());
    let target = |mapping: Mapping| Some(Target { gpa: mapping.gpa, perm: mapping.perm });
    while let Some(first) = left.iter().chain(&right).map(|mapping| mapping.iova).min() {
        let (l, r) = (left.filter(|m| m.iova == first), right.filter(|m| m.iova == first));
        // Up to the end of what begins here, and not into what the other book has next.
        let ends = l.iter().chain(&r).map(|mapping| mapping.last().0);
        let begins = left.iter().chain(&right).filter(|mapping| mapping.iova > first).map(|mapping| mapping.iova.0 - 1);
        let Some(last) = ends.chain(begins).min() else { return };
        each(Piece { first, last: Iova(last), left: l.and_then(target), right: r.and_then(target) });
        if let Some(mapping) = l {
            left = rest(mapping, last).or_else(|| lefts.next());
        }
        if let Some(mapping) = r {
            right = rest(mapping, last).or_else(|| rights.next());
        }
    }
}

/// What is left of `mapping` behind `last`, which is in it.
fn rest(mapping: Mapping, last: u64) -> Option<Mapping> {
    let gone = last - mapping.iova.0 + 1;
    (gone < mapping.len).then(|| Mapping {
        iova: Iova(last + 1),
        gpa: Gpa(mapping.gpa.0.wrapping_add(gone)),
        len: mapping.len - gone,
        perm: mapping.perm,
    })
}

/// The disagreements between two books, joined where they go on; each comparison is counted in `checked`.
pub fn disagreements(
    left: impl IntoIterator<Item = Mapping>,
    right: impl IntoIterator<Item = Mapping>,
    checked: &mut u64,
) -> Vec<Piece> {
    let mut found: Vec<Piece> = Vec::new();
    compare(left, right, |piece| {
        *checked += 1;
        if !piece.agrees() && !found.last_mut().is_some_and(|last| last.join(&piece)) {
            found.push(piece);
        }
    });
    found
}

/// Two books that do not say the same.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Difference {
    /// About where IOVAs of a space lead. The guest's tables are the left side of the piece, the shadow its right.
    Shadow(PagedSpace, Piece),
    /// About what a function is attached to.
    Attachment {
        /// The function.
        requester: Requester,
        /// What the guest's tables say.
        tables: SpaceKey,
        /// What it is attached to.
        attached: SpaceKey,
    },
    /// About what a function reaches in the host. What it was granted is the left side of the piece, what the host was handed its right.
    Host(Requester, Piece),
    /// Anything else, in words.
    Other(String),
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let says = |target: &Option<Target>| match target {
            Some(Target { gpa, perm }) => format!("{gpa} {perm}"),
            None => "nothing".to_owned(),
        };
        match self {
            Self::Shadow(space, Piece { first, last, left, right }) => write!(
                f,
                "{space}: {first}-{last}: the guest's tables say {}, the shadow says {}",
                says(left),
                says(right)
            ),
            Self::Attachment { requester, tables, attached } => {
                write!(f, "{requester}: the guest's tables say {tables}, it is attached to {attached}")
            }
            Self::Host(requester, Piece { first, last, left, right }) => {
                write!(f, "{requester}: {first}-{last}: granted is {}, the host holds {}", says(left), says(right))
            }
            Self::Other(text) => f.write_str(text),
        }
    }
}

/// What an audit found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Audit {
    /// Comparisons made: runs of IOVAs, and attachments.
    pub checked: u64,
    /// What the guest's tables say and no completed invalidation has covered yet: runs of IOVAs, and attachments.
    pub pending: u64,
    /// What differs: the first of them.
    pub differences: Vec<Difference>,
    /// Differences that are not listed.
    pub more: u64,
}

impl Audit {
    /// Adds a difference.
    pub fn differ(&mut self, difference: Difference) {
        if self.differences.len() < LISTED {
            self.differences.push(difference);
        } else {
            self.more += 1;
        }
    }

    /// Number of differences.
    pub fn differing(&self) -> u64 {
        self.differences.len() as u64 + self.more
    }
}

/// A piece that tables and shadow disagreed about.
#[derive(Clone, Copy, Debug)]
struct Remembered {
    piece: Piece,
    /// An invalidation covered it, and did not help.
    overdue: bool,
}

/// An attachment that did not agree with the tables.
#[derive(Clone, Copy, Debug)]
struct RememberedFunction {
    tables: SpaceKey,
    attached: SpaceKey,
    reached: bool,
    overdue: bool,
}

/// What the last audit found to disagree. Stands behind the unit's queue lock, and is empty unless an audit was taken.
#[derive(Default)]
pub(crate) struct Book {
    /// By space and first IOVA; disjoint.
    pieces: BTreeMap<(PagedSpace, u64), Remembered>,
    functions: BTreeMap<Requester, RememberedFunction>,
    /// What the invalidations of this drain cover of `pieces`.
    looks: Vec<(PagedSpace, u64, u64)>,
    /// What was refused in this drain.
    refused: Vec<(PagedSpace, u64, u64)>,
    /// Functions that are not where their tables say, because that was refused.
    kept_out: BTreeSet<Requester>,
}

impl Book {
    fn forget(&mut self) {
        self.pieces.clear();
        self.functions.clear();
        self.looks.clear();
        self.refused.clear();
    }

    /// Notes what these invalidations cover, before they take effect, except in spaces that are `done` already.
    pub(crate) fn covers(&mut self, scopes: &[Scope], done: impl Fn(&PagedSpace) -> bool) {
        if self.pieces.is_empty() {
            return;
        }
        for scope in scopes {
            let reached = |space: &PagedSpace| match *scope {
                Scope::Everything => Some((0, u64::MAX)),
                Scope::Domain(domain) => (space.domain == domain).then_some((0, u64::MAX)),
                Scope::Pages(domain, first, last) => (space.domain == domain).then_some((first, last)),
            };
            for ((space, _), remembered) in self.pieces.iter().filter(|((space, _), _)| !done(space)) {
                let part = reached(space).and_then(|(first, last)| remembered.piece.within(first, last));
                self.looks.extend(part.map(|part| (*space, part.first.0, part.last.0)));
            }
            if self.looks.len() > LOOKS {
                return self.forget();
            }
            if *scope == Scope::Everything {
                break;
            }
        }
        self.looks.sort_unstable();
        self.looks.dedup();
    }

    /// Notes that a context-cache invalidation reaches these functions.
    pub(crate) fn reaches(&mut self, mut reached: impl FnMut(Requester) -> bool) {
        for (requester, function) in &mut self.functions {
            function.reached |= reached(*requester);
        }
    }

    /// The listener refused these.
    pub(crate) fn refused(&mut self, space: PagedSpace, refused: &[Refusal]) {
        if !self.looks.is_empty() {
            self.refused.extend(refused.iter().map(|refusal| (space, refusal.first.0, refusal.last.0)));
        }
    }

    /// `requester` is where its tables say, or could not be brought there.
    pub(crate) fn attached(&mut self, requester: Requester, as_told: bool) {
        if as_told {
            self.kept_out.remove(&requester);
        } else {
            self.kept_out.insert(requester);
        }
    }

    fn remember(&mut self, space: PagedSpace, piece: Piece, overdue: bool) {
        if self.pieces.len() < REMEMBERED {
            self.pieces.insert((space, piece.first.0), Remembered { piece, overdue });
        }
    }

    /// Takes out what is remembered of `first` to `last`; what lies beside it stays.
    fn take(&mut self, space: PagedSpace, first: u64, last: u64) -> Vec<Piece> {
        let overlapping = |(_, remembered): &(&(PagedSpace, u64), &Remembered)| remembered.piece.last.0 >= first;
        let hit: Vec<Remembered> =
            self.pieces.range((space, 0)..=(space, last)).rev().take_while(overlapping).map(|(_, r)| *r).collect();
        let mut taken = Vec::with_capacity(hit.len());
        for Remembered { piece, overdue } in hit {
            self.pieces.remove(&(space, piece.first.0));
            let before = first.checked_sub(1).and_then(|end| piece.within(0, end));
            let after = last.checked_add(1).and_then(|start| piece.within(start, u64::MAX));
            before.into_iter().chain(after).for_each(|part| self.remember(space, part, overdue));
            taken.extend(piece.within(first, last));
        }
        taken
    }

    /// The parts of `piece` that are overdue and still the same; and whether there is anything else in it.
    fn overdue(&self, space: PagedSpace, piece: &Piece) -> (Vec<Piece>, bool) {
        let mut overdue = Vec::new();
        let mut covered = 0;
        let overlapping = |remembered: &&Remembered| remembered.piece.last >= piece.first;
        let candidates = self.pieces.range((space, 0)..=(space, piece.last.0)).rev().map(|(_, remembered)| remembered);
        for remembered in candidates.take_while(overlapping).filter(|remembered| remembered.overdue) {
            let part = piece.within(remembered.piece.first.0, remembered.piece.last.0);
            if let Some(part) = part
                && remembered.piece.within(part.first.0, part.last.0) == Some(part)
            {
                covered += part.last.0 - part.first.0 + 1;
                overdue.push(part);
            }
        }
        overdue.reverse();
        (overdue, covered <= piece.last.0 - piece.first.0)
    }
}

impl Spaces {
    /// The audit; `host` is called for each function with what it is attached to and what it was granted there.
    pub(crate) fn audit<M: GuestMemoryBackend>(&mut self, shared: &Shared<M>, host: &mut AuditHost<'_>) -> Audit {
        let mut audit = Audit::default();
        let before = std::mem::take(&mut self.book);
        let mut book = Book { kept_out: before.kept_out.clone(), ..Book::default() };

        for (requester, attached) in self.attachments() {
            audit.checked += 1;
            let (tables, _) = look_up(shared, requester);
            if tables != attached {
                let same = |old: &&RememberedFunction| old.overdue && (old.tables, old.attached) == (tables, attached);
                let overdue = before.functions.get(&requester).filter(same).is_some();
                if overdue {
                    audit.differ(Difference::Attachment { requester, tables, attached });
                } else {
                    audit.pending += 1;
                }
                let remembered = RememberedFunction { tables, attached, reached: false, overdue };
                book.functions.insert(requester, remembered);
            }
            if let SpaceKey::Paged(space) = attached
                && !self.is_member(space, requester)
            {
                audit.differ(Difference::Other(format!("{requester} is attached to {space}, which does not have it")));
            }
        }

        let mut found = Found::default();
        for (space, shadow) in self.open_shadows() {
            found.entries_left = shared.config.bounds.table_entries;
            let walked = walk_range(&shared.memory, &shared.config, &space, (0, u64::MAX), Merge::Range, &mut found);
            if walked.is_err() {
                // More than the bounds allow: the invalidation that says so will block the space.
                audit.pending += 1;
                continue;
            }
            for piece in disagreements(found.runs.iter().copied(), shadow, &mut audit.checked) {
                let (overdue, others) = before.overdue(space, &piece);
                let mut rest = Book::default();
                rest.remember(space, piece, false);
                for part in &overdue {
                    rest.take(space, part.first.0, part.last.0);
                    audit.differ(Difference::Shadow(space, *part));
                    book.remember(space, *part, true);
                }
                rest.pieces.values().for_each(|remembered| book.remember(space, remembered.piece, false));
                audit.pending += u64::from(others);
            }
        }
        self.book = book;

        for (requester, attached) in self.attachments() {
            let mut granted = self.granted(&attached);
            host(requester, &attached, &mut *granted, &mut audit);
        }
        audit
    }

    /// What an audit remembered is looked at again, where the invalidations that took effect just now cover it.
    pub(crate) fn look_again<M: GuestMemoryBackend>(&mut self, shared: &Shared<M>) {
        let reached: Vec<Requester> =
            self.book.functions.iter().filter(|(_, function)| function.reached).map(|(r, _)| *r).collect();
        for requester in reached {
            let (tables, _) = look_up(shared, requester);
            let attached = self.attached_to(requester);
            let kept_out = self.book.kept_out.contains(&requester);
            let Some(function) = self.book.functions.get_mut(&requester) else { continue };
            let same = function.tables == tables && Some(function.attached) == attached && !kept_out;
            if same && tables != function.attached {
                (function.reached, function.overdue) = (false, true);
            } else {
                self.book.functions.remove(&requester);
            }
        }

        if self.book.looks.is_empty() {
            return;
        }
        // One budget for all, as for the re-sync itself.
        let mut found = Found { entries_left: shared.config.bounds.table_entries, ..Found::default() };
        let looks = std::mem::take(&mut self.book.looks);
        let refused = std::mem::take(&mut self.book.refused);
        for (space, first, last) in looks {
            let taken = self.book.take(space, first, last);
            let memory = &shared.memory;
            if walk_range(memory, &shared.config, &space, (first, last), Merge::Range, &mut found).is_err() {
                return self.book.forget();
            }
            let mut overdue = Vec::new();
            let Some(shadow) = self.open_shadow(space, (first, last)) else { continue };
            compare(found.runs.iter().copied(), shadow, |now| {
                let Some(now) = now.within(first, last).filter(|now| !now.agrees()) else { return };
                // Still what it was?
                let then = taken.iter().filter_map(|piece| piece.within(now.first.0, now.last.0));
                overdue.extend(then.filter(|then| now.within(then.first.0, then.last.0) == Some(*then)));
            });
            overdue.retain(|piece| {
                let hit = |refused: &&(PagedSpace, u64, u64)| {
                    refused.0 == space && piece.within(refused.1, refused.2).is_some()
                };
                refused.iter().find(hit).is_none()
            });
            overdue.into_iter().for_each(|piece| self.book.remember(space, piece, true));
        }
    }

    /// Which functions a context-cache invalidation reaches, for the book.
    pub(crate) fn note_contexts(&mut self, scopes: &[ContextScope]) {
        if self.book.functions.is_empty() {
            return;
        }
        let reached: BTreeSet<Requester> = scopes.iter().flat_map(|scope| self.reached_by(*scope)).collect();
        self.book.reaches(|requester| reached.contains(&requester));
    }
}

/// Compares one function's book of the host with what the function was granted: the space that it is attached to, and
/// what is mapped there, ascending; empty unless the space is a paged one.
pub type AuditHost<'a> = dyn FnMut(Requester, &SpaceKey, &mut dyn Iterator<Item = Mapping>, &mut Audit) + 'a;

#[cfg(test)]
#[path = "audit_test.rs"]
mod audit_test;
