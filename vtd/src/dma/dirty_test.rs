use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 150;

proptest! {
    /// Marks by the log and by its slices, against a set of pages.
    #[test]
    fn e1_a_log_has_the_pages_that_were_marked_while_it_was_on(
        marks in prop::collection::vec((any::<bool>(), 0u64..PAGES * PAGE, 0u64..80 * PAGE, 0u64..PAGE), 1..12),
    ) {
        let log = DirtyLog::with_len((PAGES * PAGE) as usize);
        let mut expected = BTreeSet::new();
        for (on, at, len, base) in marks {
            if on { log.start() } else { log.stop() }
            let base = base.min(at);
            log.slice_at(base as usize).slice_at(0).mark_dirty((at - base) as usize, len as usize);
            if on && len > 0 {
                expected.extend(at / PAGE..=((at + len - 1) / PAGE));
            } else if !on {
                // What a start forgets.
                expected.clear();
                log.take().for_each(drop);
            }
        }
        // The log ends with its last word.
        expected.retain(|page| *page < PAGES.next_multiple_of(64));
        for page in 0..PAGES {
            let at = (page * PAGE + 9) as usize;
            prop_assert_eq!(log.dirty_at(at), expected.contains(&page));
            prop_assert_eq!(log.slice_at(9).dirty_at(at - 9), expected.contains(&page));
        }
        let bits = |word: (usize, u64)| (0..64).filter(move |n| word.1 & (1 << n) != 0).map(move |n| word.0 as u64 * 64 + n);
        prop_assert_eq!(log.take().enumerate().flat_map(bits).collect::<BTreeSet<u64>>(), expected);
        prop_assert!(log.take().all(|word| word == 0), "what was taken is clean");
    }
}

#[test]
fn e1_a_start_forgets_what_was_before_and_a_second_one_forgets_nothing() {
    let log = DirtyLog::with_len(1 << 20);
    log.mark_dirty(0, 1);
    assert!(!log.dirty_at(0), "it is off");
    log.start();
    log.mark_dirty(0, 1);
    log.start();
    assert!(log.dirty_at(0));
    log.stop();
    log.start();
    assert!(!log.dirty_at(0));
}
