//! The storage against a map of one element a page.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 2048;

/// What a page leads to, by its number.
type Plain = BTreeMap<u64, (u64, Perm)>;

fn extent(first: u64, pages: u64, gpa: u64, perm: Perm) -> Extent {
    Extent { first: first << 12, last: ((first + pages) << 12) - 1, gpa, perm }
}

fn by_page(extents: &Extents) -> Plain {
    let pages = |extent: &Extent| {
        let Extent { first, last, gpa, perm } = *extent;
        (first >> 12..=last >> 12).map(move |page| (page, (gpa + ((page << 12) - first), perm)))
    };
    extents.iter().flat_map(pages).collect()
}

/// What the module's head promises of chunks.
fn check(extents: &Extents) {
    let Extents { firsts, chunks, len } = extents;
    assert_eq!(firsts.len(), chunks.len());
    assert!(chunks.iter().zip(firsts).all(|(chunk, first)| chunk[0].first == *first), "{firsts:x?}");
    assert!(chunks.iter().all(|chunk| chunk.len() <= FULL && chunk.capacity() <= FULL));
    assert!(chunks.windows(2).all(|two| two[0].len() + two[1].len() > FULL / 2));
    assert_eq!(extents.iter().count(), *len);
    assert!(extents.iter().all(|extent| extent.first <= extent.last));
    assert!(extents.iter().is_sorted_by(|a, b| a.last < b.first));
}

#[derive(Clone, Debug)]
enum Step {
    /// From, how many, pages each, distance, order, target.
    Insert(u64, u64, u64, u64, bool, u64),
    Remove(u64, u64),
    Replace(u64, u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let few_or_many = || prop_oneof![2 => 1..4u64, 1 => 1..400u64];
    prop_oneof![
        2 => (0..PAGES, few_or_many(), 1..4u64, 0..3u64, any::<bool>(), 0..4u64)
            .prop_map(|(first, count, pages, gap, down, target)| Step::Insert(first, count, pages, pages + gap, down, target)),
        3 => (0..PAGES, few_or_many()).prop_map(|(first, pages)| Step::Remove(first, pages)),
        1 => (0..PAGES, 1..4u64, 0..4u64).prop_map(|(first, pages, target)| Step::Replace(first, pages, target)),
    ]
}

proptest! {
    #[test]
    fn it_holds_what_a_plain_map_holds(steps in proptest::collection::vec(step(), 1..60), looks in proptest::collection::vec(0..PAGES, 8)) {
        let (mut extents, mut plain) = (Extents::default(), Plain::new());
        for step in steps {
            match step {
                Step::Insert(first, count, pages, distance, down, target) => {
                    let perm = if target % 2 == 0 { Perm::ReadWrite } else { Perm::Read };
                    let numbers: Vec<u64> = (0..count).collect();
                    let ordered: Vec<u64> = if down { numbers.into_iter().rev().collect() } else { numbers };
                    for at in ordered.into_iter().map(|number| first + number * distance) {
                        if plain.range(at..at + pages).next().is_some() {
                            continue;
                        }
                        let gpa = (target << 40) + (at << 12);
                        extents.insert(extent(at, pages, gpa, perm));
                        plain.extend((at..at + pages).map(|page| (page, ((target << 40) + (page << 12), perm))));
                    }
                }
                Step::Remove(first, pages) => {
                    extents.remove(first << 12, ((first + pages) << 12) - 1);
                    plain.retain(|page, _| !(first..first + pages).contains(page));
                }
                Step::Replace(first, pages, target) => {
                    let new = extent(first, pages, target << 40, Perm::Write);
                    let is_there = extents.iter().any(|there| (there.first, there.last) == (new.first, new.last));
                    prop_assert_eq!(extents.replace(new), is_there);
                    if is_there {
                        plain.extend((0..pages).map(|page| (first + page, ((target << 40) + (page << 12), Perm::Write))));
                    }
                }
            }
            check(&extents);
            prop_assert_eq!(&by_page(&extents), &plain);
            for at in &looks {
                let from: Vec<&Extent> = extents.from(at << 12).collect();
                let expected: Vec<&Extent> = extents.iter().filter(|extent| extent.last >= at << 12).collect();
                prop_assert_eq!(from, expected);
            }
        }
        extents.remove(0, u64::MAX);
        check(&extents);
        prop_assert!(extents.chunks.is_empty());
    }
}

#[test]
fn ascending_extents_fill_their_chunks() {
    let mut extents = Extents::default();
    (0..1000).for_each(|page| extents.insert(extent(2 * page, 1, page << 12, Perm::Read)));
    assert_eq!(extents.chunks.len(), 1000usize.div_ceil(FULL));
    check(&extents);
}

#[test]
fn few_extents_that_are_left_of_many_take_little() {
    let mut extents = Extents::default();
    (0..8192).for_each(|page| extents.insert(extent(2 * page, 1, page << 12, Perm::Read)));
    (0..8192).filter(|page| page % 64 != 0).for_each(|page| extents.remove(page << 13, (page << 13) + 0xfff));
    check(&extents);
    assert_eq!(extents.len(), 128);
    assert!(extents.chunks.len() <= 8, "{} chunks", extents.chunks.len());
}

#[test]
fn the_last_page_of_the_address_space() {
    let mut extents = Extents::default();
    let last = Extent { first: u64::MAX - 0xfff, last: u64::MAX, gpa: 0x1000, perm: Perm::Read };
    extents.insert(last);
    assert_eq!(extents.from(u64::MAX).collect::<Vec<_>>(), [&last]);
    extents.remove(0, u64::MAX - 0x800);
    let rest = Extent { first: u64::MAX - 0x7ff, last: u64::MAX, gpa: 0x1800, perm: Perm::Read };
    assert_eq!(extents.iter().collect::<Vec<_>>(), [&rest]);
    extents.remove(u64::MAX, u64::MAX);
    assert_eq!(extents.iter().collect::<Vec<_>>(), [&Extent { last: u64::MAX - 1, ..rest }]);
}
