//! The audit of a unit (see [`crate::audit`]): the guest's tables, walked afresh, beside the shadows, and those beside
//! the host's book.

use std::collections::BTreeSet;

use vm_memory::GuestMemoryBackend;

use super::Spaces;
use super::members::resolve_requester;
use crate::audit::book::{Book, RememberedFunction};
use crate::audit::{Audit, AuditHost, Difference, compare, disagreements};
use crate::core::Core;
use crate::ids::Requester;
use crate::range::IovaRange;
use crate::scope::ContextScope;
use crate::space::{PagedSpace, SpaceKey};
use crate::tables::second_stage::{Found, Merge, walk_range};

impl Spaces {
    /// The audit; `host` is called for each function with what it is attached to and what it was granted there.
    pub(crate) fn audit<M: GuestMemoryBackend>(&mut self, core: &Core<M>, host: &mut AuditHost<'_>) -> Audit {
        let mut audit = Audit::default();
        let before = std::mem::take(&mut self.book);
        let mut book = Book { kept_out: before.kept_out.clone(), ..Book::default() };

        for (requester, attached) in self.attachments() {
            audit.checked += 1;
            let (tables, ..) = resolve_requester(core, requester);
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
            found.entries_left = core.config.bounds.table_entries;
            let walked = walk_range(&core.memory, &core.config, &space, IovaRange::ALL, Merge::Range, &mut found);
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
                    rest.take(space, part.range);
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
    pub(crate) fn recheck_remembered<M: GuestMemoryBackend>(&mut self, core: &Core<M>) {
        let reached: Vec<Requester> =
            self.book.functions.iter().filter(|(_, function)| function.reached).map(|(r, _)| *r).collect();
        for requester in reached {
            let (tables, ..) = resolve_requester(core, requester);
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
        let mut found = Found { entries_left: core.config.bounds.table_entries, ..Found::default() };
        let looks = std::mem::take(&mut self.book.looks);
        let refused = std::mem::take(&mut self.book.refused);
        for (space, range) in looks {
            let taken = self.book.take(space, range);
            let memory = &core.memory;
            if walk_range(memory, &core.config, &space, range, Merge::Range, &mut found).is_err() {
                return self.book.forget();
            }
            let mut overdue = Vec::new();
            let Some(shadow) = self.open_shadow(space, range) else { continue };
            compare(found.runs.iter().copied(), shadow, |now| {
                let Some(now) = now.within(range).filter(|now| !now.agrees()) else { return };
                // Still what it was?
                let then = taken.iter().filter_map(|piece| piece.within(now.range));
                overdue.extend(then.filter(|then| now.within(then.range) == Some(*then)));
            });
            overdue.retain(|piece| {
                let hit = |refused: &(PagedSpace, IovaRange)| refused.0 == space && piece.within(refused.1).is_some();
                !refused.iter().any(hit)
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

#[cfg(test)]
#[path = "audit_test.rs"]
mod audit_test;
