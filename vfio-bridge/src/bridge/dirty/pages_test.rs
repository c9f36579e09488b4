//! Dirty pages against a set of page numbers.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// Around the border of two chunks.
fn page() -> impl Strategy<Value = u64> {
    prop_oneof![CHUNK - 70..CHUNK + 70, 0u64..70, 4 * CHUNK - 3..4 * CHUNK + 3]
}

fn marks() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((page(), 1u64..100), 0..6)
}

fn dirty(marks: &[(u64, u64)]) -> (DirtyPages, BTreeSet<u64>) {
    let mut pages = DirtyPages::default();
    marks.iter().for_each(|(page, n)| pages.mark(page * PAGE_SIZE + 5, n * PAGE_SIZE - 10));
    (pages, marks.iter().flat_map(|(page, n)| *page..page + n).collect())
}

fn numbers(ranges: &[IovaRange], size: u64) -> BTreeSet<u64> {
    ranges.iter().flat_map(|range| range.first / size..=range.last / size).collect()
}

proptest! {
    #[test]
    fn e4_dirty_pages_are_those_that_were_marked_in_pages_of_any_size(
        a in marks(), b in marks(), shift in 9u32..22, within in (page(), 0u64..300),
    ) {
        let ((mut pages, first), (other, second)) = (dirty(&a), dirty(&b));
        pages.merge(&other);
        let all: BTreeSet<u64> = first.union(&second).copied().collect();
        prop_assert_eq!(pages.count(), all.len() as u64);
        prop_assert_eq!(pages.is_empty(), all.is_empty());
        for page in all.iter().flat_map(|page| [page - page.min(&1), *page, page + 1]) {
            prop_assert_eq!(pages.contains(page * PAGE_SIZE + 77), all.contains(&page));
        }
        let size = 1u64 << shift.max(12);
        let ranges = pages.ranges(1 << shift);
        prop_assert!(ranges.windows(2).all(|pair| pair[0].last + 1 < pair[1].first), "as long as they can be");
        prop_assert_eq!(numbers(&ranges, size), all.iter().map(|page| page * PAGE_SIZE / size).collect());
        // In parts, each from where the one before ended.
        let (mut parts, mut from) = (Vec::new(), 0);
        loop {
            let part = pages.ranges_from(size, from, 2);
            prop_assert!(part.len() <= 2);
            let Some(last) = part.last() else { break };
            from = last.last + 1;
            parts.extend(part);
        }
        prop_assert_eq!(parts, ranges);
        let inside = within.0..=within.0 + within.1;
        let part = pages.within(std::iter::once(bytes(*inside.start(), *inside.end())));
        let expected: BTreeSet<u64> = all.iter().filter(|page| inside.contains(page)).copied().collect();
        prop_assert_eq!(numbers(&part.ranges(PAGE_SIZE), PAGE_SIZE), expected);
    }
}
