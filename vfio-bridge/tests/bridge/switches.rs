//! A group moves from one space to another: in which order the host is asked, and what a refusal in the middle leaves.

use std::sync::{Arc, Mutex};

use vfio_bridge::model::{HostOp, Kernel, Served};
use vfio_bridge::{RefusedMaps, UnmapRange};
use vtd::{AttachRefused, Mapping, RefusalCause, SpaceKey};

use crate::behaviours::{SMALL, refusal};
use crate::world::*;

#[test]
fn rule3_unmaps_come_before_maps_and_a_remap_follows_its_cut_at_once() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, 4 * KIB4), map(GIB, 0, KIB4)]);
    let seen: Arc<Mutex<Vec<bool>>> = Arc::default();
    let log = Arc::clone(&seen);
    world.model.set_hook(move |served, _| log.lock().expect("whole").push(matches!(served.op, HostOp::Map(_))));
    world.done(&space, &[unmap(KIB4, 2 * KIB4 - 1), unmap(GIB, GIB + KIB4 - 1), map(2 * GIB, 0, KIB4)]);
    // Unmap of the whole extent and of the cut one are neighbours, so one operation; then its two remainders; then the
    // new one.
    assert_eq!(*seen.lock().expect("whole"), [false, true, true, true]);
}

/// The operations of the model since the last look, as `+first..=last` and `-first..=last` in pages; a map that was
/// refused has a `!`.
fn operations(world: &World) -> Vec<String> {
    let said = |first: u64, last: u64| format!("{}..={}", first / KIB4, last / KIB4);
    let operation = |served: &Served| match (served.op, served.result) {
        (HostOp::Map(held), Ok(_)) => format!("+{}", said(held.iova, held.last())),
        (HostOp::Map(held), Err(_)) => format!("!{}", said(held.iova, held.last())),
        (HostOp::Unmap(UnmapRange::Span { first, last }), _) => format!("-{}", said(first, last)),
        (HostOp::Unmap(UnmapRange::All), _) => "-all".into(),
        (other, _) => format!("{other:?}"),
    };
    world.model.served().iter().map(operation).collect()
}

/// A page at each of these page numbers, which leads to the page `to` later.
fn pages(at: impl IntoIterator<Item = u64>, to: u64) -> Vec<Mapping> {
    at.into_iter().map(|page| mapping(page * KIB4, (page + to) * KIB4, KIB4)).collect()
}

#[test]
fn rule3_a_switch_maps_what_is_free_first_and_replaces_the_rest_one_by_one() {
    let world = World::new(Kernel::new(48), Ram { low: 1 << 20, high: KIB4 }, &[(1, 1)]);
    // Two that touch, one alone, one whose translation stays, and one that only the old space has.
    let old = [pages([16, 17, 32], 1), pages([48], 0), pages([1000], 0x10_0000 - 1000)].concat();
    world.attach(1, &paged(1, 48), &old).expect("attached");
    operations(&world);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(
        operations(&world),
        [
            "+0..=15",
            "+18..=31",
            "+33..=47",
            "+49..=255",
            "+1048576..=1048576", // around what is held
            "-1000..=1000",       // leaves nothing, makes room
            "-16..=17",
            "+16..=17",
            "-32..=32",
            "+32..=32",
        ]
    );
    assert_eq!((world.stats(1).splits, world.stats(1).refused_maps), (0, RefusedMaps::default()));

    // And back: the pages under one old extent share its run. What was mapped first is not taken away with what goes.
    world.attach(1, &paged(1, 48), &old).expect("attached");
    assert_eq!(
        operations(&world),
        [
            "+1000..=1000",
            "-0..=15",
            "-18..=31",
            "-33..=47",
            "-49..=255",
            "-1048576..=1048576",
            "-16..=17",
            "+16..=16",
            "+17..=17",
            "-32..=32",
            "+32..=32",
        ]
    );
    assert_eq!(world.stats(1).splits, 0);
}

#[test]
fn rule3_extents_share_a_run_only_if_something_new_spans_them() {
    let (world, _) = World::one(Kernel::new(48), 48);
    world.attach(1, &paged(1, 48), &pages(0..6, 0)).expect("attached");
    operations(&world);
    let new = [mapping(0, 64 * KIB4, KIB4), mapping(KIB4, 65 * KIB4, KIB4), mapping(2 * KIB4, 80 * KIB4, 2 * KIB4)];
    world.attach(1, &paged(2, 48), &new).expect("attached");
    let expected = ["-4..=5", "-0..=0", "+0..=0", "-1..=1", "+1..=1", "-2..=3", "+2..=3"];
    assert_eq!(operations(&world), expected);
}

#[test]
fn rule3_b8_what_stays_of_a_cut_extent_comes_before_what_takes_the_place_of_the_rest() {
    let (world, _) = World::one(Kernel::new(48), 48);
    world.attach(1, &paged(1, 48), &[mapping(0, 0, 8 * KIB4)]).expect("attached");
    operations(&world);
    let new = [mapping(0, 0, 2 * KIB4), mapping(2 * KIB4, 64 * KIB4, KIB4), mapping(6 * KIB4, 6 * KIB4, 4 * KIB4)];
    world.attach(1, &paged(2, 48), &new).expect("attached");
    assert_eq!(operations(&world), ["+8..=9", "-0..=7", "+0..=1", "+6..=7", "+2..=2"]);
    assert_eq!(world.stats(1).splits, 1);
}

#[test]
fn rule3_many_pieces_under_one_new_extent_go_at_once() {
    let ram = Ram { low: 1 << 20, high: KIB4 };
    for (pieces, around) in [(64, true), (65, false)] {
        let world = World::new(Kernel::new(48), ram, &[(1, 1)]);
        let old = pages((0..pieces).map(|n| 2 * n + 1), 1);
        world.attach(1, &paged(1, 48), &old).expect("attached");
        operations(&world);
        world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
        let last = 2 * pieces - 1;
        if around {
            assert_eq!(world.contents().len() as u64, 2 * pieces + 2);
            assert_eq!(world.stats(1).host_unmaps, pieces);
        } else {
            let expected = ["+1048576..=1048576", &format!("-1..={last}"), "+0..=255"];
            assert_eq!(operations(&world), expected);
        }
    }
}

#[test]
fn rule3_near_the_entry_limit_nothing_is_cut() {
    let ram = Ram { low: 1 << 20, high: KIB4 };
    // The old page, the new extent in three pieces, and the high page.
    for (entries, shape) in [(5, 4), (4, 2)] {
        let world = World::new(Kernel { entries, ..Kernel::new(48) }, ram, &[(1, 1)]);
        world.attach(1, &paged(1, 48), &pages([16], 1)).expect("attached");
        world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
        assert_eq!((world.contents().len(), world.stats(1).refused_maps), (shape, RefusedMaps::default()));
    }
}

#[test]
fn b11_what_finds_no_room_before_the_unmaps_is_mapped_after_them_and_not_refused() {
    let ram = Ram { low: MIB2, high: KIB4 };
    // All RAM may be locked, and a page: not all RAM and two pages.
    let world = World::new(Kernel { memlock: Some(MIB2 + 2 * KIB4), ..Kernel::new(48) }, ram, &[(1, 1)]);
    world.attach(1, &paged(1, 48), &[mapping(GIB, 0, KIB4), mapping(2 * GIB, 0, KIB4)]).expect("attached");
    operations(&world);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    let expected = ["+0..=511", "!1048576..=1048576", "-262144..=524288", "+1048576..=1048576"];
    assert_eq!(operations(&world), expected);
    let stats = world.stats(1);
    assert_eq!((stats.host_maps, stats.host_unmaps), world.model.counts());
    assert_eq!(stats.refused_maps, RefusedMaps::default(), "what came in the end was not refused");

    // What is not there in the end is refused, once. It is the last one, though it would have found room before the
    // unmaps.
    let kernel = Kernel { memlock: Some(MIB2), ..Kernel::new(48) };
    let world = World::new(kernel, ram, &[(1, 1)]);
    world.attach(1, &paged(1, 48), &[mapping(GIB, 0, KIB4)]).expect("attached");
    let attached = world.attach(1, &SpaceKey::Identity, &[]);
    assert_eq!(
        attached,
        Err(AttachRefused::Partial(vec![refusal(HIGH_GPA, HIGH_GPA + KIB4 - 1, RefusalCause::Memlock)]))
    );
    assert_eq!(world.stats(1).refused_maps, RefusedMaps { memlock: 1, ..RefusedMaps::default() });
    assert_eq!((world.stats(1).host_maps, world.stats(1).host_unmaps), world.model.counts());
}

#[test]
fn b8_what_stays_of_a_cut_extent_keeps_its_entry_before_anything_new() {
    // Two entries are free, and both remainders need one of them.
    let (world, _) = World::one(Kernel { entries: 4, ..Kernel::new(48) }, 48);
    world.attach(1, &paged(1, 48), &[mapping(0, 0, 8 * KIB4), mapping(GIB, 0, KIB4)]).expect("attached");
    operations(&world);
    let new = [
        mapping(0, 0, 3 * KIB4),
        mapping(4 * KIB4, 4 * KIB4, KIB4),
        mapping(6 * KIB4, 6 * KIB4, 2 * KIB4),
        mapping(GIB, 0, KIB4),
        mapping(2 * GIB, 0, KIB4),
    ];
    let attached = world.attach(1, &paged(2, 48), &new);
    let lost = refusal(2 * GIB, 2 * GIB + KIB4 - 1, RefusalCause::Limit);
    assert_eq!(attached, Err(AttachRefused::Partial(vec![lost])));
    assert_eq!(operations(&world), ["-0..=7", "+0..=2", "+4..=4", "+6..=7", "!524288..=524288"]);
}

#[test]
fn b11_c2_a_group_that_joins_others_ends_at_the_first_real_refusal() {
    let world = World::new(Kernel { memlock: Some(6 * KIB4), ..Kernel::new(48) }, SMALL, &[(1, 1), (2, 2)]);
    let space = paged(1, 48);
    let live = [mapping(0, 0, KIB4), mapping(KIB4, 8 * KIB4, KIB4), mapping(GIB, 0, KIB4)];
    world.attach(1, &space, &live).expect("attached");
    // It leaves a space whose pages and these do not fit at once.
    world.attach(2, &paged(2, 48), &[mapping(2 * GIB, 0, 2 * KIB4)]).expect("attached");
    operations(&world);
    world.attach(2, &space, &live).expect("attached");
    let expected = ["+0..=0", "!1..=1", "-524288..=524289", "+1..=1", "+262144..=262144"];
    assert_eq!(operations(&world), expected);
    assert_eq!(world.stats(2).refused_maps, RefusedMaps::default());

    // With less, the second of three is the first that does not come, and the third is not tried again.
    world.attach(2, &paged(2, 48), &[mapping(2 * GIB, 0, KIB4)]).expect("attached");
    world.model.inject(|_, op| matches!(op, HostOp::Map(held) if held.iova >= KIB4).then_some(libc::ENOMEM));
    operations(&world);
    assert!(matches!(world.attach(2, &space, &live), Err(AttachRefused::Shared(refused)) if refused.len() == 1));
    let expected = ["+0..=0", "!1..=1", "-524288..=524288", "!1..=1", "-all"];
    assert_eq!(operations(&world), expected);
    assert_eq!(world.stats(2).refused_maps.memlock, 1);
}

#[test]
fn b11_after_a_refused_unmap_a_switch_maps_nothing_more() {
    let (world, _) = World::one(Kernel::new(48), 48);
    world.attach(1, &paged(1, 48), &pages([0, 2, 4], 0)).expect("attached");
    world.model.inject(|_, op| match op {
        HostOp::Unmap(UnmapRange::Span { first, .. }) if *first == 2 * KIB4 => Some(libc::EIO),
        _ => None,
    });
    operations(&world);
    let attached = world.attach(1, &paged(2, 48), &pages([0, 2, 4, 8], 16));
    assert!(matches!(attached, Err(AttachRefused::Host { .. })));
    assert_eq!(operations(&world), ["+8..=8", "-0..=0", "+0..=0", "-2..=2", "-4..=4"]);
    assert_eq!(*world.stopped.functions.lock().expect("whole"), [requester(1)]);
}
