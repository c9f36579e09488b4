//! Functions that are not where the guest's tables say because the host had no room, or because leaves of the space
//! lead to no memory, and when they are tried again (B-11, B-15).
//!
//! A guest's driver attaches a device once and then believes that it can reach its domain; nothing makes it attach
//! again. So the unit does, without being asked: after a drain that took something away, or that looked at more than
//! pages. A try may be as many host operations as there are mappings, so a function that was refused again sits out
//! twice as many such occasions as before, up to a bound: a guest that unmaps a page at a time makes few tries, and one
//! that waits for room gets it.

use crate::space::SpaceKey;

/// Occasions that a function sits out at most.
const MAX_SAT_OUT: u32 = 63;

/// Now, as far as waiting goes: the round, and how often something was taken away from the host so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Now {
    pub(crate) round: u64,
    pub(crate) freed: u64,
}

/// Why a function that waits may be tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Occasion {
    /// Pages were invalidated: there is room only if something was taken away.
    Pages,
    /// More than pages was invalidated: there may be room.
    MoreThanPages,
    /// The guest-physical map changed: there may be room, and memory.
    MemoryChanged,
}

/// A function that waits for room, or for memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Waiting {
    /// Where it is to be.
    pub(crate) space: SpaceKey,
    /// Room may help. Else leaves of the space lead to no memory, and only a change of the guest-physical map helps.
    pub(crate) for_room: bool,
    /// Occasions that it still sits out.
    left: u32,
    /// Occasions that it sits out after the next refusal.
    next: u32,
    /// When it was refused, or had its last occasion.
    since: Now,
}

impl Waiting {
    /// It was refused `space`; `before` is how it waited until then.
    pub(crate) fn refused(before: Option<Self>, space: SpaceKey, for_room: bool, now: Now) -> Self {
        let (left, next) = match before.filter(|before| before.space == space) {
            Some(Self { next, .. }) => (next, (2 * next + 1).min(MAX_SAT_OUT)),
            None => (0, 1),
        };
        Self { space, for_room, left, next, since: now }
    }

    /// Everything changed: it sits nothing out.
    pub(crate) fn rested(&mut self) {
        self.left = 0;
    }

    /// Whether it is to be tried: there may be room, and it has sat out what it had to. At most once a round, since a
    /// queue may be full of occasions. One that waits for memory is tried whenever that changed, and only then.
    pub(crate) fn is_due(&mut self, now: Now, occasion: Occasion) -> bool {
        let likely = occasion != Occasion::Pages || self.since.freed != now.freed;
        if self.since.round == now.round || !likely {
            return false;
        }
        self.since = now;
        if !self.for_room {
            return occasion == Occasion::MemoryChanged;
        }
        let due = self.left == 0;
        self.left = self.left.saturating_sub(1);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b11_tries_grow_rare_and_never_end() {
        let now = |round| Now { round, freed: 0 };
        let mut waiting = Waiting::refused(None, SpaceKey::Identity, true, now(0));
        let mut tries = Vec::new();
        for round in 1..=400 {
            if waiting.is_due(now(round), Occasion::MoreThanPages) {
                tries.push(round);
                waiting = Waiting::refused(Some(waiting), SpaceKey::Identity, true, now(round));
            }
            assert!(!waiting.is_due(now(round), Occasion::MoreThanPages), "once a round");
        }
        assert_eq!(tries, [1, 3, 7, 15, 31, 63, 127, 191, 255, 319, 383]);
        let mut elsewhere = Waiting::refused(Some(waiting), SpaceKey::Blocked, true, now(400));
        assert!(elsewhere.is_due(now(401), Occasion::MoreThanPages), "another space is tried at once");
        waiting.rested();
        assert!(waiting.is_due(now(401), Occasion::MoreThanPages));
    }

    #[test]
    fn b11_what_was_taken_away_in_the_round_of_a_refusal_counts_in_the_next() {
        let mut waiting = Waiting::refused(None, SpaceKey::Identity, true, Now { round: 1, freed: 5 });
        assert!(!waiting.is_due(Now { round: 2, freed: 5 }, Occasion::Pages), "nothing was");
        assert!(!waiting.is_due(Now { round: 1, freed: 6 }, Occasion::Pages));
        assert!(waiting.is_due(Now { round: 3, freed: 6 }, Occasion::Pages));
    }

    #[test]
    fn b15_who_waits_for_memory_is_tried_when_that_changed_and_only_then() {
        let now = |round| Now { round, freed: round };
        let mut waiting = Waiting::refused(None, SpaceKey::Identity, false, now(0));
        for round in (1..40).step_by(3) {
            assert!(!waiting.is_due(now(round), Occasion::Pages));
            assert!(!waiting.is_due(now(round + 1), Occasion::MoreThanPages));
            assert!(waiting.is_due(now(round + 2), Occasion::MemoryChanged));
            waiting = Waiting::refused(Some(waiting), SpaceKey::Identity, false, now(round + 2));
        }
    }
}
