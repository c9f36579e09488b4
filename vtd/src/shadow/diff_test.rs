//! What the tests of a whole unit cannot bring about: the storage itself, and a guest that edits its tables between two
//! walks of one drain.

use proptest::prelude::*;

use super::*;
use crate::space::Perm;

fn mapping(first: u64, gpa: u64, len: u64) -> Mapping {
    Mapping { iova: Iova(first), gpa: Gpa(gpa), len, perm: Perm::ReadWrite }
}

#[test]
fn a_map_that_would_have_to_go_again_ends_the_batch() {
    let (mut shadow, mut changes) = (Shadow::default(), Changes::default());
    assert!(shadow.sync(IovaRange::new(0, 0xffff), &[mapping(0x1000, 0x9000, 0x2000)], &mut changes));
    let told = changes.maps.clone();
    // A second range of the same batch finds the page gone: nothing is done before the batch was given.
    assert!(!shadow.sync(IovaRange::new(0x2000, 0x2fff), &[], &mut changes));
    assert_eq!((&changes.maps, changes.unmaps.len()), (&told, 0));
    assert_eq!(shadow.iter().collect::<Vec<_>>(), told);
    changes.clear();
    assert!(shadow.sync(IovaRange::new(0x2000, 0x2fff), &[], &mut changes));
    assert_eq!(changes.unmaps, [IovaRange::new(0x2000, 0x2fff)]);
    assert_eq!(shadow.iter().collect::<Vec<_>>(), [mapping(0x1000, 0x9000, 0x1000)]);
}

#[test]
fn b7_unmaps_are_joined_over_gaps_but_never_over_what_stays() {
    let (mut shadow, mut changes) = (Shadow::default(), Changes::default());
    let runs = [0x1000, 0x3000, 0x5000, 0x7000].map(|first| mapping(first, first, 0x1000));
    assert!(shadow.sync(IovaRange::new(0, 0xffff), &runs, &mut changes));
    changes.clear();
    assert!(shadow.sync(IovaRange::new(0, 0xffff), &runs[2..3], &mut changes));
    assert_eq!(changes.unmaps, [IovaRange::new(0x1000, 0x3fff), IovaRange::new(0x7000, 0x7fff)]);
    assert!(changes.maps.is_empty());
}

#[test]
fn the_last_page_of_the_address_space() {
    let (mut shadow, mut changes) = (Shadow::default(), Changes::default());
    let last = mapping(u64::MAX - 0xfff, 0x1000, 0x1000);
    assert!(shadow.sync(IovaRange::ALL, &[last], &mut changes));
    changes.clear();
    assert!(shadow.sync(IovaRange::ALL, &[last], &mut changes));
    assert!(changes.is_empty());
    assert!(shadow.sync(IovaRange::new(u64::MAX, u64::MAX), &[], &mut changes));
    assert_eq!(changes.unmaps, [IovaRange::new(u64::MAX, u64::MAX)]);
}

#[test]
fn b8_edges_and_parts_are_of_the_extents_that_a_range_cuts() {
    let (mut shadow, mut changes) = (Shadow::default(), Changes::default());
    let extents = [mapping(0x1000, 0x9000, 0x3000), mapping(0x6000, 0x9000, 0x2000)];
    assert!(shadow.sync(IovaRange::new(0, 0xffff), &extents, &mut changes));
    assert_eq!(
        [0, 0x1000, 0x2000, 0x4000, 0x6000, 0x7000].map(|first| shadow.edge_before(first)),
        [0, 0x1000, 0x1000, 0x4000, 0x6000, 0x6000]
    );
    assert_eq!(
        [0xfff, 0x1fff, 0x3fff, 0x4fff, 0x6fff, 0x7fff, 0x8fff].map(|last| shadow.edge_behind(last)),
        [0xfff, 0x3fff, 0x3fff, 0x4fff, 0x7fff, 0x7fff, 0x8fff]
    );
    let parts: Vec<Mapping> = shadow.part(IovaRange::new(0x2000, 0x6fff)).collect();
    assert_eq!(parts, [mapping(0x2000, 0xa000, 0x2000), mapping(0x6000, 0x9000, 0x1000)]);
}

#[test]
fn what_is_replaced_takes_nothing_else_with_it_and_leaves_nothing() {
    let (mut shadow, mut changes) = (Shadow::default(), Changes::default());
    let before = [mapping(0x1000, 0x9000, 0x1000), mapping(0x2000, 0x20000, 0x1000), mapping(0x3000, 0x9000, 0x1000)];
    let elsewhere = mapping(0x2000, 0x30000, 0x1000);
    assert!(shadow.sync(IovaRange::new(0, 0xffff), &before, &mut changes));
    changes.clear();
    // The page before it goes as well, in one unmap.
    assert!(shadow.sync(IovaRange::new(0x1000, 0x2fff), &[elsewhere], &mut changes));
    assert_eq!((&changes.unmaps[..], &changes.maps[..]), (&[IovaRange::new(0x1000, 0x2fff)][..], &[elsewhere][..]));
    assert_eq!(shadow.iter().collect::<Vec<_>>(), [elsewhere, before[2]]);
    changes.clear();
    assert!(shadow.sync(IovaRange::new(0x2000, 0x2fff), &[before[1]], &mut changes));
    assert_eq!(shadow.iter().collect::<Vec<_>>(), before[1..]);
}

const PAGES: usize = 64;

/// A target and a permission for each page.
type Pages = Vec<Option<(u64, bool)>>;

fn pages() -> impl Strategy<Value = Pages> {
    let page = prop_oneof![2 => Just(None), 3 => (0..2u64, any::<bool>()).prop_map(Some)];
    proptest::collection::vec(page, PAGES)
}

/// The runs of `pages`; a run also ends before each page in `cuts`.
fn runs(pages: &Pages, cuts: &[usize]) -> Vec<Mapping> {
    let mut runs: Vec<Mapping> = Vec::new();
    for (index, page) in pages.iter().enumerate() {
        let Some((target, writable)) = page else { continue };
        let iova = index as u64 * 4096;
        let gpa = iova + (target << 32);
        let perm = if *writable { Perm::ReadWrite } else { Perm::Read };
        match runs.last_mut() {
            Some(run)
                if run.iova.0 + run.len == iova
                    && run.gpa.0 + run.len == gpa
                    && run.perm == perm
                    && !cuts.contains(&index) =>
            {
                run.len += 4096;
            }
            _ => runs.push(Mapping { iova: Iova(iova), gpa: Gpa(gpa), len: 4096, perm }),
        }
    }
    runs
}

proptest! {
    #[test]
    fn rule3_a_diff_touches_just_what_changed(
        worlds in proptest::collection::vec((pages(), proptest::collection::vec(0..PAGES, 0..4)), 1..6),
    ) {
        let mut shadow = Shadow::default();
        let mut told: Pages = vec![None; PAGES];
        for (next, cuts) in worlds {
            let mut changes = Changes::default();
            prop_assert!(shadow.sync(IovaRange::ALL, &runs(&next, &cuts), &mut changes));
            let before = told.clone();
            for range in &changes.unmaps {
                for (index, page) in told.iter_mut().enumerate() {
                    if range.contains(index as u64 * 4096) {
                        prop_assert!(page.is_none() || *page != next[index], "page {} stays", index);
                        *page = None;
                    }
                }
            }
            for map in &changes.maps {
                for page in 0..map.len / 4096 {
                    let index = (map.iova.0 / 4096 + page) as usize;
                    prop_assert!(told[index].is_none(), "page {} was mapped: {:?}", index, before[index]);
                    told[index] = Some(((map.gpa.0 - map.iova.0) >> 32, map.perm == Perm::ReadWrite));
                }
            }
            prop_assert_eq!(&told, &next);
            let extents: Vec<Mapping> = shadow.iter().collect();
            prop_assert!(extents.is_sorted_by(|a, b| a.last() < b.iova));
            prop_assert_eq!(extents.iter().map(|extent| extent.len / 4096).sum::<u64>(), next.iter().flatten().count() as u64);
        }
    }
}
