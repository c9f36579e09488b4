//! What an audit remembers until the next one.

use std::collections::{BTreeMap, BTreeSet};

use super::compare::Piece;
use crate::ids::Requester;
use crate::listener::Refusal;
use crate::range::IovaRange;
use crate::scope::Scope;
use crate::space::{PagedSpace, SpaceKey};

/// Pieces that are remembered from one audit to the next; the rest stays pending.
pub(crate) const REMEMBERED: usize = 1024;
/// Looks that one drain may owe; beyond, everything that was remembered is forgotten.
pub(crate) const LOOKS: usize = 1 << 16;

/// A piece that tables and shadow disagreed about.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remembered {
    pub(crate) piece: Piece,
    /// An invalidation covered it, and did not help.
    pub(crate) overdue: bool,
}

/// An attachment that did not agree with the tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RememberedFunction {
    pub(crate) tables: SpaceKey,
    pub(crate) attached: SpaceKey,
    pub(crate) reached: bool,
    pub(crate) overdue: bool,
}

/// What the last audit found to disagree. Stands behind the unit's queue lock, and is empty unless an audit was taken.
#[derive(Default)]
pub(crate) struct Book {
    /// By space and first IOVA; disjoint.
    pub(crate) pieces: BTreeMap<(PagedSpace, u64), Remembered>,
    pub(crate) functions: BTreeMap<Requester, RememberedFunction>,
    /// What the invalidations of this drain cover of `pieces`.
    pub(crate) looks: Vec<(PagedSpace, IovaRange)>,
    /// What was refused in this drain.
    pub(crate) refused: Vec<(PagedSpace, IovaRange)>,
    /// Functions that are not where their tables say, because that was refused.
    pub(crate) kept_out: BTreeSet<Requester>,
}

impl Book {
    pub(crate) fn forget(&mut self) {
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
                Scope::Everything => Some(IovaRange::ALL),
                Scope::Domain(domain) => (space.domain == domain).then_some(IovaRange::ALL),
                Scope::Pages(domain, range) => (space.domain == domain).then_some(range),
            };
            for ((space, _), remembered) in self.pieces.iter().filter(|((space, _), _)| !done(space)) {
                let part = reached(space).and_then(|range| remembered.piece.within(range));
                self.looks.extend(part.map(|part| (*space, part.range)));
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
            self.refused.extend(refused.iter().map(|refusal| (space, refusal.range)));
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

    pub(crate) fn remember(&mut self, space: PagedSpace, piece: Piece, overdue: bool) {
        if self.pieces.len() < REMEMBERED {
            self.pieces.insert((space, piece.range.first), Remembered { piece, overdue });
        }
    }

    /// Takes out what is remembered of `range`; what lies beside it stays.
    pub(crate) fn take(&mut self, space: PagedSpace, range: IovaRange) -> Vec<Piece> {
        let IovaRange { first, last } = range;
        let overlapping = |(_, remembered): &(&(PagedSpace, u64), &Remembered)| remembered.piece.range.last >= first;
        let hit: Vec<Remembered> =
            self.pieces.range((space, 0)..=(space, last)).rev().take_while(overlapping).map(|(_, r)| *r).collect();
        let mut taken = Vec::with_capacity(hit.len());
        for Remembered { piece, overdue } in hit {
            self.pieces.remove(&(space, piece.range.first));
            let before = first.checked_sub(1).and_then(|end| piece.within(IovaRange::new(0, end)));
            let after = last.checked_add(1).and_then(|start| piece.within(IovaRange::new(start, u64::MAX)));
            before.into_iter().chain(after).for_each(|part| self.remember(space, part, overdue));
            taken.extend(piece.within(range));
        }
        taken
    }

    /// The parts of `piece` that are overdue and still the same; and whether there is anything else in it.
    pub(crate) fn overdue(&self, space: PagedSpace, piece: &Piece) -> (Vec<Piece>, bool) {
        let mut overdue = Vec::new();
        let mut covered = 0;
        let overlapping = |remembered: &&Remembered| remembered.piece.range.last >= piece.range.first;
        let candidates =
            self.pieces.range((space, 0)..=(space, piece.range.last)).rev().map(|(_, remembered)| remembered);
        for remembered in candidates.take_while(overlapping).filter(|remembered| remembered.overdue) {
            let part = piece.within(remembered.piece.range);
            if let Some(part) = part
                && remembered.piece.within(part.range) == Some(part)
            {
                covered += part.range.last - part.range.first + 1;
                overdue.push(part);
            }
        }
        overdue.reverse();
        (overdue, covered <= piece.range.last - piece.range.first)
    }
}
