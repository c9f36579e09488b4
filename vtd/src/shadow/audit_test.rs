//! The agreement of tables, shadow and attachments, broken on purpose.

use crate::audit::book::{Book, LOOKS, REMEMBERED, RememberedFunction};
use crate::audit::{Audit, Difference, Piece, Target, compare, disagreements};
use crate::range::IovaRange;
use crate::rig::{NVME, Rig, context_device, iotlb_domain, iotlb_pages, mapping};
use crate::scope::Scope;
use crate::space::{PagedSpace, Tables};
use crate::{DomainId, Gpa, Mapping, Perm, SpaceKey};

const RW: Perm = Perm::ReadWrite;

/// The tables and the shadow only.
fn audit(rig: &Rig) -> Audit {
    rig.unit.audit(&mut |_, _, _, _| {})
}

fn piece(first: u64, last: u64, left: Option<u64>, right: Option<u64>) -> Piece {
    let target = |gpa: Option<u64>| gpa.map(|gpa| Target { gpa: Gpa(gpa), perm: RW });
    Piece { range: IovaRange::new(first, last), left: target(left), right: target(right) }
}

#[test]
fn translations_are_compared_and_not_shapes() {
    let whole = [mapping(0x1000, 0x9000, 0x4000, RW)];
    let cut = [mapping(0x1000, 0x9000, 0x1000, RW), mapping(0x2000, 0xa000, 0x3000, RW)];
    let mut checked = 0;
    assert_eq!(disagreements(whole, cut, &mut checked), []);
    assert_eq!(checked, 2);
}

#[test]
fn disagreements_are_joined_where_they_go_on() {
    let left =
        [mapping(0x1000, 0x9000, 0x1000, RW), mapping(0x2000, 0xa000, 0x3000, RW), mapping(0x8000, 0, 0x1000, RW)];
    let right = [mapping(0x3000, 0x5000, 0x1000, RW), mapping(0x8000, 0, 0x1000, Perm::Read)];
    let found = disagreements(left, right, &mut 0);
    let read_only =
        Piece { right: Some(Target { gpa: Gpa(0), perm: Perm::Read }), ..piece(0x8000, 0x8fff, Some(0), None) };
    let expected = [
        piece(0x1000, 0x2fff, Some(0x9000), None),
        piece(0x3000, 0x3fff, Some(0xb000), Some(0x5000)),
        piece(0x4000, 0x4fff, Some(0xc000), None),
        read_only,
    ];
    assert_eq!(found, expected);
}

#[test]
fn comparing_reaches_the_last_address() {
    let last: Mapping = mapping(u64::MAX - 0xfff, 0, 0x1000, RW);
    let mut pieces = Vec::new();
    compare([last], [], |piece| pieces.push(piece));
    assert_eq!(pieces, [piece(u64::MAX - 0xfff, u64::MAX, Some(0), None)]);
}

#[test]
fn a_quiet_guest_has_nothing_pending_and_no_difference() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 32);
    rig.pages(root, 0x20_0000, 0x90_0000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(audit(&rig), Audit { checked: 3, ..Audit::default() });
}

#[test]
fn what_no_invalidation_covered_is_pending_however_often_one_asks() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 32);
    for _ in 0..3 {
        let audit = audit(&rig);
        assert_eq!((audit.pending, audit.differing()), (1, 0));
        // Of another place: it covers nothing of it.
        assert!(rig.submit(&[iotlb_pages(1, 0x40_0000, 3), iotlb_domain(2)]));
    }
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 5)]));
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (0, 0));
}

#[test]
fn the_same_page_mapped_again_and_again_is_never_a_difference() {
    let (mut rig, root) = Rig::with_nvme();
    for _ in 0..5 {
        // Each audit sees the tables ahead of the shadow, with the same values, and a completed invalidation lies
        // between any two.
        rig.pages(root, 0x10_0000, 0x80_0000, 4);
        assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
        assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2)]));
        rig.clear(root, 0x10_0000, 4);
        assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
        assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2)]));
    }
}

#[test]
fn a_mapping_that_invalidations_do_not_bring_is_a_difference() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 4);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2)]));
    // As if the unit had lost it; and the invalidation of the first page finds that the shadow is wrong about it.
    rig.unit.spaces().falsify(IovaRange::new(0x10_1000, 0x10_2fff));
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
    rig.unit.spaces().book.covers(&[Scope::Pages(DomainId(1), IovaRange::new(0x10_1000, 0x10_1fff))], |_| false);
    rig.unit.spaces().recheck_remembered(&rig.unit.core);
    let found = audit(&rig);
    assert_eq!(found.pending, 1, "0x102000 was not covered");
    let [Difference::Shadow(space, said)] = &found.differences[..] else { panic!("{found:?}") };
    assert_eq!(SpaceKey::Paged(*space), rig.unit.attachments()[0].1);
    assert_eq!(*said, piece(0x10_1000, 0x10_1fff, Some(0x80_1000), None));
    let text = found.differences[0].to_string();
    assert!(text.ends_with("0x101000-0x101fff: the guest's tables say 0x801000 rw, the shadow says nothing"), "{text}");
    assert_eq!(audit(&rig).differing(), 1, "for as long as it is so");

    // The re-sync maps it again, and all is well.
    rig.listener.0.lock().unwrap().spaces.values_mut().for_each(|space| space.clear());
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (0, 0));
}

#[test]
fn what_the_host_refuses_is_pending() {
    let (mut rig, root) = Rig::with_nvme();
    rig.listener.0.lock().unwrap().refuse.insert(0x10_0000);
    rig.pages(root, 0x10_0000, 0x80_0000, 1);
    for _ in 0..3 {
        assert!(rig.submit(&[iotlb_domain(1)]));
        let audit = audit(&rig);
        assert_eq!((audit.pending, audit.differing()), (1, 0));
    }
}

#[test]
fn an_attachment_is_pending_until_its_context_entry_is_invalidated() {
    let (mut rig, _) = Rig::with_nvme();
    rig.set_pass_through(NVME, 1);
    for _ in 0..2 {
        assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
        assert!(rig.submit(&[iotlb_domain(1)]));
    }
    // As if the invalidation had not moved it.
    rig.unit.spaces().note_contexts(&[crate::scope::ContextScope::Everything]);
    rig.unit.spaces().recheck_remembered(&rig.unit.core);
    let found = audit(&rig);
    let [Difference::Attachment { requester: NVME, tables: SpaceKey::Identity, attached: SpaceKey::Paged(_) }] =
        &found.differences[..]
    else {
        panic!("{found:?}")
    };
    assert!(rig.submit(&[context_device(1, NVME.sid, 0)]));
    assert_eq!(audit(&rig), Audit { checked: 1, ..Audit::default() });
}

#[test]
fn a_function_that_the_host_does_not_attach_is_pending() {
    let (mut rig, _) = Rig::with_nvme();
    rig.listener.0.lock().unwrap().unattachable.insert(NVME);
    rig.set_pass_through(NVME, 1);
    for _ in 0..3 {
        assert!(rig.submit(&[context_device(1, NVME.sid, 0)]));
        let audit = audit(&rig);
        assert_eq!((audit.pending, audit.differing()), (1, 0));
    }
}

#[test]
fn the_list_of_differences_is_bounded() {
    let mut audit = Audit::default();
    for n in 0..1000 {
        audit.differ(Difference::Other(n.to_string()));
    }
    assert_eq!((audit.differences.len(), audit.more, audit.differing()), (64, 936, 1000));
}

/// The listener's own book against what it was told.
fn with_listener(rig: &Rig) -> Audit {
    let told = rig.listener.0.lock().unwrap();
    rig.unit.audit(&mut |requester, space, granted, audit| {
        let held = told.spaces.get(space).into_iter().flat_map(|space| space.values().copied());
        for piece in disagreements(granted, held, &mut audit.checked) {
            audit.differ(Difference::Host(requester, piece));
        }
    })
}

#[test]
fn what_the_listener_does_not_hold_as_it_was_told_is_a_difference_at_once() {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 4);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2)]));
    assert_eq!(with_listener(&rig), Audit { checked: 3, ..Audit::default() });
    let key = rig.unit.attachments()[0].1;
    let told = |change: &dyn Fn(&mut std::collections::BTreeMap<u64, Mapping>)| {
        change(rig.listener.0.lock().unwrap().spaces.get_mut(&key).unwrap());
    };
    // One that drops a map, and one that keeps an extent.
    told(&|space| space.clear());
    assert_eq!(
        with_listener(&rig).differences,
        [Difference::Host(NVME, piece(0x10_0000, 0x10_3fff, Some(0x80_0000), None))]
    );
    told(&|space| _ = space.insert(0x10_0000, mapping(0x10_0000, 0x80_0000, 0x5000, RW)));
    assert_eq!(
        with_listener(&rig).differences,
        [Difference::Host(NVME, piece(0x10_4000, 0x10_4fff, None, Some(0x80_4000)))]
    );
}

#[test]
fn a_part_of_a_piece_leads_where_the_piece_does() {
    let whole = piece(0x1000, 0x4fff, Some(0x9000), None);
    assert_eq!(whole.within(IovaRange::ALL), Some(whole));
    assert_eq!(whole.within(IovaRange::new(0x2000, 0x2fff)), Some(piece(0x2000, 0x2fff, Some(0xa000), None)));
    assert_eq!(whole.within(IovaRange::new(0x4fff, 0x8000)), Some(piece(0x4fff, 0x4fff, Some(0xcfff), None)));
    assert_eq!(whole.within(IovaRange::new(0, 0x1000)), Some(piece(0x1000, 0x1000, Some(0x9000), None)));
    assert_eq!((whole.within(IovaRange::new(0, 0xfff)), whole.within(IovaRange::new(0x5000, u64::MAX))), (None, None));
}

#[test]
fn pieces_are_joined_only_if_both_books_go_on_in_them() {
    let joined = |left: &[Mapping], right: &[Mapping]| {
        disagreements(left.iter().copied(), right.iter().copied(), &mut 0)
            .iter()
            .map(|piece| (piece.range.first, piece.range.last))
            .collect::<Vec<_>>()
    };
    let page = |iova, gpa| mapping(iova, gpa, 0x1000, RW);
    let none: &[Mapping] = &[];
    for swapped in [false, true] {
        let both = |one: &[Mapping], other: &[Mapping]| if swapped { joined(other, one) } else { joined(one, other) };
        let two = [(0x1000, 0x1fff), (0x2000, 0x2fff)];
        assert_eq!(both(&[page(0x1000, 0x9000), page(0x2000, 0xa000)], none), [(0x1000, 0x2fff)]);
        assert_eq!(both(&[page(0x1000, 0x9000), page(0x2000, 0x2_0000)], none), two);
        let read_only = Mapping { perm: Perm::Read, ..page(0x2000, 0xa000) };
        assert_eq!(both(&[page(0x1000, 0x9000), read_only], none), two);
        // Apart, though the addresses would go on.
        let apart = [page(0x1000, 0x9000), page(0x3000, 0xb000)];
        assert_eq!(both(&apart, none), [(0x1000, 0x1fff), (0x3000, 0x3fff)]);
        // The one goes on and the other does not.
        let whole = mapping(0x1000, 0x9000, 0x2000, RW);
        assert_eq!(both(&[whole], &[page(0x1000, 0), page(0x2000, 0x5000)]), two);
        // The other book begins first.
        assert_eq!(both(&[page(0x3000, 0)], &[page(0x1000, 0)]), [(0x1000, 0x1fff), (0x3000, 0x3fff)]);
    }
}

fn space(domain: u16) -> PagedSpace {
    let unit = crate::UnitId(0);
    PagedSpace { unit, tables: Tables::Second { root: Gpa(0x1000), width: 39 }, domain: DomainId(domain) }
}

/// A book with what is remembered of spaces 1 and 2.
fn book() -> Book {
    let mut book = Book::default();
    book.remember(space(1), piece(0x1000, 0x4fff, Some(0x9000), None), false);
    book.remember(space(1), piece(0x8000, 0x8fff, Some(0x9000), None), true);
    book.remember(space(2), piece(0x1000, 0x1fff, None, Some(0)), false);
    book
}

#[test]
fn an_invalidation_covers_its_domain_and_its_addresses() {
    let looks = |scopes: &[Scope], done: Option<u16>| {
        let mut book = book();
        book.covers(scopes, |space| Some(space.domain.0) == done);
        book.looks.iter().map(|(space, range)| (space.domain.0, range.first, range.last)).collect::<Vec<_>>()
    };
    let (one, other) = (DomainId(1), DomainId(2));
    let of_one = [(1, 0x1000, 0x4fff), (1, 0x8000, 0x8fff)];
    let of_other = [(2, 0x1000, 0x1fff)];
    let all = [&of_one[..], &of_other].concat();
    assert_eq!(looks(&[Scope::Everything], None), all);
    assert_eq!(looks(&[Scope::Everything], Some(1)), of_other);
    assert_eq!(looks(&[Scope::Domain(one)], None), of_one);
    assert_eq!(looks(&[Scope::Domain(one)], Some(1)), []);
    assert_eq!(looks(&[Scope::Domain(DomainId(3))], None), []);
    assert_eq!(looks(&[Scope::Pages(one, IovaRange::new(0x2000, 0x2fff))], None), [(1, 0x2000, 0x2fff)]);
    assert_eq!(
        looks(
            &[Scope::Pages(one, IovaRange::new(0x5000, 0x7fff)), Scope::Pages(other, IovaRange::new(0x2000, u64::MAX))],
            None
        ),
        []
    );
    assert_eq!(
        looks(&[Scope::Pages(one, IovaRange::new(0x4fff, 0x8000))], None),
        [(1, 0x4fff, 0x4fff), (1, 0x8000, 0x8000)]
    );
    // Once, in the order of the addresses, however often and in whatever order they are named.
    assert_eq!(looks(&[Scope::Domain(other), Scope::Domain(one), Scope::Domain(other)], None), all);
    assert_eq!(looks(&[Scope::Domain(one), Scope::Everything, Scope::Domain(other)], None), all);
}

#[test]
fn a_book_that_grows_without_end_is_forgotten() {
    let mut book = book();
    book.functions.insert(
        NVME,
        RememberedFunction { tables: SpaceKey::Identity, attached: SpaceKey::Blocked, reached: false, overdue: false },
    );
    // Each scope has two looks in it.
    let scopes = |looks: usize| vec![Scope::Domain(DomainId(1)); looks / 2];
    book.covers(&scopes(LOOKS), |_| false);
    assert_eq!((book.looks.len(), book.pieces.len()), (2, 3));
    book.looks.clear();
    book.refused.push((space(1), IovaRange::new(0, 1)));
    book.covers(&scopes(LOOKS + 2), |_| false);
    assert!(book.looks.is_empty() && book.pieces.is_empty() && book.functions.is_empty() && book.refused.is_empty());
    for page in 0..2 * REMEMBERED as u64 {
        book.remember(space(1), piece(page << 12, page << 12 | 0xfff, Some(0), None), false);
    }
    assert_eq!(book.pieces.len(), REMEMBERED);
}

#[test]
fn what_is_taken_out_of_a_book_leaves_what_lies_beside_it() {
    let mut book = book();
    assert_eq!(book.take(space(1), IovaRange::new(0x2000, 0x2fff)), [piece(0x2000, 0x2fff, Some(0xa000), None)]);
    let left = |book: &Book| {
        book.pieces
            .iter()
            .map(|((space, at), remembered)| {
                let Piece { range: IovaRange { first, last }, left, .. } = remembered.piece;
                assert_eq!(*at, first);
                (space.domain.0, first, last, left.map(|target| target.gpa.0), remembered.overdue)
            })
            .collect::<Vec<_>>()
    };
    let beside = [
        (1, 0x1000, 0x1fff, Some(0x9000), false),
        (1, 0x3000, 0x4fff, Some(0xb000), false),
        (1, 0x8000, 0x8fff, Some(0x9000), true),
        (2, 0x1000, 0x1fff, None, false),
    ];
    assert_eq!(left(&book), beside);
    assert_eq!(
        (book.take(space(1), IovaRange::new(0x2000, 0x2fff)), book.take(space(3), IovaRange::ALL)),
        (vec![], vec![])
    );
    assert_eq!(left(&book), beside);
    // The last byte of one and the first of another.
    assert_eq!(book.take(space(1), IovaRange::new(0x4fff, 0x8000)).len(), 2);
    let ends = left(&book).iter().map(|(_, first, last, ..)| (*first, *last)).collect::<Vec<_>>();
    assert_eq!(ends, [(0x1000, 0x1fff), (0x3000, 0x4ffe), (0x8001, 0x8fff), (0x1000, 0x1fff)]);
    assert_eq!(book.take(space(1), IovaRange::ALL).len(), 3);
    assert_eq!(book.pieces.len(), 1);
}

#[test]
fn what_is_overdue_is_so_for_as_long_as_it_is_the_same() {
    let mut book = Book::default();
    let now = piece(0x1000, 0x4fff, Some(0x9000), None);
    let part = |first, last| now.within(IovaRange::new(first, last)).expect("in it");
    assert_eq!(book.overdue(space(1), &now), (vec![], true));
    book.remember(space(1), part(0x3000, 0x3fff), true);
    book.remember(space(1), part(0x1000, 0x1fff), true);
    book.remember(space(1), part(0x2000, 0x2fff), false);
    assert_eq!(book.overdue(space(1), &now), (vec![part(0x1000, 0x1fff), part(0x3000, 0x3fff)], true));
    assert_eq!(book.overdue(space(2), &now), (vec![], true));
    assert_eq!(book.overdue(space(1), &part(0x3000, 0x3fff)), (vec![part(0x3000, 0x3fff)], false));
    assert_eq!(book.overdue(space(1), &part(0x3fff, 0x3fff)), (vec![part(0x3fff, 0x3fff)], false));
    let elsewhere = piece(0x3000, 0x3fff, Some(0), None);
    assert_eq!(book.overdue(space(1), &elsewhere), (vec![], true));
    book.remember(space(1), part(0x2000, 0x2fff), true);
    book.remember(space(1), part(0x4000, 0x4fff), true);
    assert!(!book.overdue(space(1), &now).1, "all of it is");
}

/// Page 0x101000 is lost, though an invalidation covered it; an audit saw that.
fn lost() -> (Rig, u64) {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, 4);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 2)]));
    rig.unit.spaces().falsify(IovaRange::new(0x10_1000, 0x10_1fff));
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
    (rig, root)
}

/// An invalidation covers the page, and does not bring it; `meanwhile` comes between.
fn cover(rig: &Rig, meanwhile: impl FnOnce(&mut Book)) {
    let mut spaces = rig.unit.spaces();
    spaces.book.covers(&[Scope::Pages(DomainId(1), IovaRange::new(0x10_1000, 0x10_1fff))], |_| false);
    meanwhile(&mut spaces.book);
    spaces.recheck_remembered(&rig.unit.core);
}

#[test]
fn a_piece_that_changed_meanwhile_is_no_difference_when_it_is_as_before() {
    let (mut rig, root) = lost();
    rig.pages(root, 0x10_1000, 0x90_0000, 1);
    cover(&rig, |_| ());
    rig.pages(root, 0x10_1000, 0x80_1000, 1);
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
    // Without the change it is one.
    cover(&rig, |_| ());
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (0, 1));
}

#[test]
fn a_refusal_of_another_place_or_space_excuses_nothing() {
    let refusal = |first: u64| crate::Refusal {
        range: IovaRange::new(first, first + 0xfff),
        cause: crate::RefusalCause::Limit,
        stream: NVME.into(),
    };
    let (rig, _) = lost();
    let SpaceKey::Paged(own) = rig.unit.attachments()[0].1 else { panic!("translated") };
    cover(&rig, |book| book.refused(own, &[refusal(0x10_1000)]));
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
    cover(&rig, |book| {
        book.refused(own, &[refusal(0x10_0000), refusal(0x10_2000)]);
        book.refused(space(9), &[refusal(0x10_1000)]);
    });
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (0, 1));
}

#[test]
fn an_attachment_that_changed_meanwhile_is_no_difference() {
    let (mut rig, root) = Rig::with_nvme();
    let look = |rig: &Rig| {
        rig.unit.spaces().book.reaches(|requester| requester == NVME);
        rig.unit.spaces().recheck_remembered(&rig.unit.core);
    };
    let counts = |rig: &Rig| (audit(rig).pending, audit(rig).differing());
    rig.set_pass_through(NVME, 1);
    assert_eq!(counts(&rig), (1, 0));
    // Other tables when the invalidation came.
    rig.clear_context(NVME);
    look(&rig);
    rig.set_pass_through(NVME, 1);
    assert_eq!(counts(&rig), (1, 0));
    // The right ones.
    rig.set_paged(NVME, root, 48, 1);
    look(&rig);
    assert_eq!(rig.unit.spaces().book.functions.len(), 0, "there is nothing to remember of it");
    rig.set_pass_through(NVME, 1);
    assert_eq!(counts(&rig), (1, 0));
    // It could not be brought there; then it could.
    rig.unit.spaces().book.attached(NVME, false);
    look(&rig);
    assert_eq!(counts(&rig), (1, 0));
    rig.unit.spaces().book.attached(NVME, true);
    look(&rig);
    assert_eq!(counts(&rig), (0, 1));
    // What is overdue is so for this pair of tables and attachment alone.
    rig.clear_context(NVME);
    assert_eq!(counts(&rig), (1, 0));
}

#[test]
fn a_space_that_no_budget_reaches_the_end_of_is_pending() {
    let mut config = crate::UnitConfig::new(crate::UnitId(0), 48);
    config.bounds.table_entries = 2048;
    let mut rig = Rig::with(config);
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.set_root();
    rig.enable_translation();
    rig.unit.add_requester(NVME).unwrap();
    assert_eq!(audit(&rig), Audit { checked: 1, ..Audit::default() });
    for part in 0..8 {
        rig.pages(root, part << 21, 0x80_0000, 1);
    }
    let found = audit(&rig);
    assert_eq!((found.checked, found.pending, found.differing()), (1, 1, 0));
}
