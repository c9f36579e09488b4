//! The agreement of tables, shadow and attachments, broken on purpose.

use crate::audit::{Audit, Difference, Piece, Target, compare, disagreements};
use crate::rig::{NVME, Rig, context_device, iotlb_domain, iotlb_pages, mapping};
use crate::{Gpa, Iova, Mapping, Perm, SpaceKey};

const RW: Perm = Perm::ReadWrite;

/// The tables and the shadow only.
fn audit(rig: &Rig) -> Audit {
    rig.unit.audit(&mut |_, _, _, _| {})
}

fn piece(first: u64, last: u64, left: Option<u64>, right: Option<u64>) -> Piece {
    let target = |gpa: Option<u64>| gpa.map(|gpa| Target { gpa: Gpa(gpa), perm: RW });
    Piece { first: Iova(first), last: Iova(last), left: target(left), right: target(right) }
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
        // Each audit sees the tables ahead of the shadow, with the same values, and a completed invalidation lies between any two.
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
    rig.unit.spaces().falsify(0x10_1000, 0x10_2fff);
    assert_eq!((audit(&rig).pending, audit(&rig).differing()), (1, 0));
    rig.unit.spaces().book.covers(&[crate::iotlb::Scope::Pages(crate::DomainId(1), 0x10_1000, 0x10_1fff)], |_| false);
    rig.unit.spaces().look_again(&rig.unit.shared);
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
    rig.unit.spaces().note_contexts(&[crate::spaces::ContextScope::Everything]);
    rig.unit.spaces().look_again(&rig.unit.shared);
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
