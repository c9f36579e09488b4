//! The cache by itself; what threads do to it is in `tests/models`.

use crate::dma::iotlb::{CachedPage, Iotlb};
use crate::ids::{DomainId, Gpa};
use crate::range::IovaRange;
use crate::scope::Scope;
use crate::space::Perm;
use crate::sync::{DIRECTORY_SETS, PAGE_SETS, SESSIONS};

const DOMAIN: DomainId = DomainId(1);
const CONTEXT: [u64; 2] = [0x88, 0x99];
const TARGET: CachedPage = CachedPage::new(Gpa(0x9000), Perm::ReadWrite);

fn insert(iotlb: &Iotlb, domain: Option<DomainId>, page: u64) {
    let sampled = iotlb.sample();
    iotlb.note_owner(domain, None);
    iotlb.insert_page(sampled, page, TARGET);
}

/// A page, a directory and the context entry, of `DOMAIN`.
fn full() -> Iotlb {
    let iotlb = Iotlb::default();
    insert(&iotlb, Some(DOMAIN), 5);
    iotlb.insert_directory(iotlb.sample(), 0, 0x77);
    iotlb.insert_context(iotlb.sample(), CONTEXT);
    iotlb
}

/// What is there of the page, the directory and the context entry of [`full`].
fn there(iotlb: &Iotlb) -> [bool; 3] {
    let sampled = iotlb.sample();
    let (directory, context) = (iotlb.directory(sampled, 0), iotlb.context(sampled));
    assert!(directory.is_none_or(|value| value == 0x77) && context.is_none_or(|value| value == CONTEXT));
    [iotlb.page(5) == Some(TARGET), directory.is_some(), context.is_some()]
}

#[test]
fn rule6_each_permission_and_address_comes_back() {
    let iotlb = Iotlb::default();
    for (page, perm) in [(1, Perm::Read), (2, Perm::Write), (3, Perm::ReadWrite)] {
        let target = Gpa((page << 40) | 0x5000);
        iotlb.insert_page(iotlb.sample(), page, CachedPage::new(target, perm));
        assert_eq!(iotlb.page(page), Some(CachedPage::new(target, perm)));
    }
    assert_eq!(iotlb.page(0), None, "a slot that was never written");
    assert_eq!(there(&Iotlb::default()), [false; 3]);
}

#[test]
fn rule6_a_walk_that_began_before_an_invalidation_is_never_cached() {
    // Also when the invalidation had nothing of its domain to empty: the walk may be about to find just that.
    let pages = Scope::Pages(DOMAIN, IovaRange::new(0x5000, 0x5fff));
    for scope in [Scope::Everything, Scope::Domain(DOMAIN), pages, Scope::Domain(DomainId(2))] {
        let iotlb = Iotlb::default();
        let sampled = iotlb.sample();
        iotlb.invalidate(scope);
        iotlb.note_owner(Some(DOMAIN), None);
        iotlb.insert_page(sampled, 5, TARGET);
        iotlb.insert_directory(sampled, 0, 0x77);
        iotlb.insert_context(sampled, CONTEXT);
        assert_eq!(there(&iotlb), [false; 3], "{scope:?}");
        insert(&iotlb, Some(DOMAIN), 5);
        assert_eq!(iotlb.page(5), Some(TARGET));
    }
}

#[test]
fn rule6_each_invalidation_reaches_what_it_must() {
    let pages = |domain, first, last| Scope::Pages(domain, IovaRange::new(first, last));
    for (scope, left) in [
        (Scope::Everything, [false; 3]),
        (Scope::Domain(DOMAIN), [false; 3]),
        (Scope::Domain(DomainId(2)), [true; 3]),
        // The page, and with it the directory that leads to it; the context entry is no matter of the IOTLB.
        (pages(DOMAIN, 0x5000, 0x5fff), [false, false, true]),
        (pages(DOMAIN, 0x4000, 0x7fff), [false, false, true]),
        (pages(DOMAIN, 0x6000, 0x6fff), [true, false, true]),
        (pages(DOMAIN, 0x1f_f000, 0x20_0fff), [true, false, true]),
        (pages(DOMAIN, 0x20_0000, 0x20_0fff), [true; 3]),
        (pages(DomainId(2), 0x5000, 0x5fff), [true; 3]),
        // 64 pages are emptied one by one, also the last of them; 65 take everything.
        (pages(DOMAIN, 0x20_0000, 0x23_ffff), [true; 3]),
        (pages(DOMAIN, 0x20_0000, 0x24_0fff), [false; 3]),
        (pages(DOMAIN, 0, u64::MAX), [false; 3]),
    ] {
        let iotlb = full();
        assert_eq!(there(&iotlb), [true; 3]);
        iotlb.invalidate(scope);
        assert_eq!(there(&iotlb), left, "{scope:x?}");
    }
    let iotlb = full();
    insert(&iotlb, Some(DOMAIN), 5 + 63);
    iotlb.invalidate(pages(DOMAIN, 0x5000, 0x4_4fff));
    assert_eq!((iotlb.page(5), iotlb.page(5 + 63)), (None, None), "the first and the last of a range");
}

#[test]
fn rule6_a_part_of_a_large_leaf_reaches_all_of_it() {
    let iotlb = full();
    iotlb.note_large();
    iotlb.invalidate(Scope::Pages(DomainId(2), IovaRange::new(0x8000, 0x8fff)));
    assert_eq!(there(&iotlb), [true; 3]);
    iotlb.invalidate(Scope::Pages(DOMAIN, IovaRange::new(0x8000, 0x8fff)));
    assert_eq!(there(&iotlb), [false; 3]);
    // From then on nothing large is there.
    insert(&iotlb, Some(DOMAIN), 5);
    iotlb.invalidate(Scope::Pages(DOMAIN, IovaRange::new(0x8000, 0x8fff)));
    assert_eq!(iotlb.page(5), Some(TARGET));
}

#[test]
fn rule6_translations_of_several_domains_are_reached_by_each() {
    let other = DomainId(2);
    for reaching in [DOMAIN, other] {
        let iotlb = Iotlb::default();
        insert(&iotlb, Some(DOMAIN), 5);
        insert(&iotlb, Some(other), 6);
        insert(&iotlb, Some(DOMAIN), 5);
        iotlb.invalidate(Scope::Domain(reaching));
        assert_eq!((iotlb.page(5), iotlb.page(6)), (None, None));
        insert(&iotlb, None, 7);
        iotlb.invalidate(Scope::Domain(DomainId(0)));
        assert!(iotlb.page(7).is_some(), "what is not translated belongs to no domain");
        iotlb.invalidate(Scope::Everything);
        assert_eq!(iotlb.page(7), None);
        insert(&iotlb, Some(reaching), 7);
        iotlb.invalidate(Scope::Domain(DomainId(3)));
        assert!(iotlb.page(7).is_some(), "what was noted before everything was forgotten does not count");
    }
}

#[test]
fn rule6_two_pages_of_one_set_do_not_push_each_other_out() {
    let iotlb = Iotlb::default();
    let page = |number: u64| 5 + number * PAGE_SETS as u64;
    let cached = |iotlb: &Iotlb| (0..4).filter(|number| iotlb.page(page(*number)).is_some()).collect::<Vec<_>>();
    for _ in 0..3 {
        insert(&iotlb, Some(DOMAIN), page(0));
        insert(&iotlb, Some(DOMAIN), page(1));
        assert_eq!(cached(&iotlb), [0, 1]);
    }
    // The third takes the place of one, and what is stored again takes its own.
    insert(&iotlb, Some(DOMAIN), page(2));
    let left = cached(&iotlb);
    assert!(left.len() == 2 && left.contains(&2), "{left:?}");
    insert(&iotlb, Some(DOMAIN), page(2));
    assert_eq!(cached(&iotlb), left);
    // By and by, each of them is replaced.
    insert(&iotlb, Some(DOMAIN), page(3));
    assert_eq!(cached(&iotlb), [2, 3]);
    // An invalidation of one leaves the other, and its place is the one that is taken next.
    iotlb.invalidate(Scope::Pages(DOMAIN, IovaRange::new(page(2) << 12, (page(2) << 12) + 0xfff)));
    assert_eq!(cached(&iotlb), [3]);
    insert(&iotlb, Some(DOMAIN), page(0));
    assert_eq!(cached(&iotlb), [0, 3]);
    let number = |number: u64| 1 + number * DIRECTORY_SETS as u64;
    (0..2).for_each(|each| iotlb.insert_directory(iotlb.sample(), number(each), each));
    let sampled = iotlb.sample();
    assert_eq!([0, 1].map(|each| iotlb.directory(sampled, number(each))), [Some(0), Some(1)]);
}

#[test]
fn rule6_as_many_sessions_as_there_are_can_be_open_and_are_waited_for() {
    let iotlb = Iotlb::default();
    for round in 0..3 {
        let mut open: Vec<_> = (0..SESSIONS).map(|_| iotlb.open_session()).collect();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| iotlb.wait_for_sessions());
            let last = open.remove(round * 5);
            open.iter().for_each(|token| iotlb.close_session(token));
            // A word that is free is found wherever it is, while the waiter waits for the last.
            (0..40).for_each(|_| iotlb.close_session(&iotlb.open_session()));
            std::thread::yield_now();
            assert!(!waiter.is_finished());
            iotlb.close_session(&last);
        });
    }
}

#[test]
fn rule6_an_endpoint_costs_less_than_a_mebibyte() {
    let per_set = 64;
    let bytes = (PAGE_SETS + DIRECTORY_SETS) * per_set + size_of::<Iotlb>();
    assert!(bytes < 128 << 10, "{bytes}");
}
