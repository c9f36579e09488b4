//! Bitmaps against a set of bytes.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange { first, last }
}

#[test]
fn e2_a_bitmap_has_pages_of_a_power_of_two_and_a_bounded_number_of_them() {
    for page_size in [0, 1, 256, 4095, 6000] {
        assert_eq!(DirtyBitmap::new(range(0, 0xffff), page_size), None, "{page_size}");
    }
    assert!(DirtyBitmap::new(range(1, 0), 4096).is_none());
    assert!(DirtyBitmap::new(range(0, u64::MAX), 4096).is_none(), "2^52 pages");
    assert_eq!(DirtyBitmap::new(range(0, u64::MAX), 1 << 40).map(|bitmap| bitmap.pages()), Some(0));
}

#[test]
fn e2_the_last_page_that_there_is_can_be_dirty() {
    let mut bitmap = DirtyBitmap::new(range(u64::MAX - 0x1fff, u64::MAX), 4096).unwrap();
    bitmap.mark(range(u64::MAX, u64::MAX));
    assert_eq!(bitmap.ranges(range(0, u64::MAX)).collect::<Vec<_>>(), [range(u64::MAX - 0xfff, u64::MAX)]);
}

proptest! {
    /// What a host says in its pages, in pages of ours: coarser, finer or the same, wherever the ranges begin and end.
    #[test]
    fn e2_pages_of_the_host_become_pages_of_the_caller(
        first in 0u64..0x40, len in 1u64..0x200, ours in 9u32..14, theirs in 9u32..14,
        dirty in prop::collection::btree_set(0u64..64, 0..12), within in (0u64..0x240, 0u64..0x240),
    ) {
        // In units of 512 bytes.
        let unit = 512;
        let whole = range(first * unit, (first + len) * unit - 1);
        let mut bitmap = DirtyBitmap::new(whole, 1 << ours).unwrap();
        let mut words = [0u64];
        dirty.iter().for_each(|n| words[0] |= 1 << n);
        bitmap.mark_words(0, 1 << theirs, &words);
        let page = |n: u64, size: u32| (n * unit) >> size;
        let mut expected = BTreeSet::new();
        for n in first..first + len {
            if dirty.contains(&page(n, theirs)) {
                expected.insert(page(n, ours));
            }
        }
        prop_assert_eq!(bitmap.pages(), expected.len() as u64);
        for n in 0..0x280 {
            let inside = (first..first + len).contains(&n);
            prop_assert_eq!(bitmap.is_dirty(n * unit + 7), inside && expected.contains(&page(n, ours)), "{:#x}", n);
        }
        let within = range(within.0.min(within.1) * unit, within.0.max(within.1) * unit + unit - 1);
        let found: Vec<IovaRange> = bitmap.ranges(within).collect();
        prop_assert!(found.windows(2).all(|pair| pair[0].last + 1 < pair[1].first), "as long as they can be");
        let bytes: BTreeSet<u64> = found.iter().flat_map(|r| (r.first..=r.last).step_by(unit as usize)).collect();
        let wanted: BTreeSet<u64> = (first..first + len)
            .filter(|n| expected.contains(&page(*n, ours)) && within.contains(n * unit))
            .map(|n| n * unit)
            .collect();
        prop_assert_eq!(bytes, wanted);
    }

    #[test]
    fn e2_what_is_marked_is_dirty_and_nothing_else(
        marks in prop::collection::vec((0u64..0x9000, 0u64..0x3000), 0..6), page in 9u32..14,
    ) {
        let mut bitmap = DirtyBitmap::new(range(0x1200, 0x87ff), 1 << page).unwrap();
        let mut expected = BTreeSet::new();
        for (first, len) in marks {
            bitmap.mark(range(first, first + len));
            expected.extend((first.max(0x1200)..=(first + len).min(0x87ff)).map(|byte| byte >> page));
        }
        for byte in (0..0x9000).step_by(256) {
            let inside = (0x1200..0x8800).contains(&byte);
            prop_assert_eq!(bitmap.is_dirty(byte), inside && expected.contains(&(byte >> page)), "{:#x}", byte);
        }
    }
}
