use vfio_bridge::model::{HostOp, Kernel};
use vfio_bridge::{GroupId, RegisterError, UnmapRange};
use vtd::{AttachRefused, MapOp, Mapping, Pasid, Perm, Refusal, RefusalCause, SpaceKey, SpaceListener, Stream};

use crate::world::*;

pub const SMALL: Ram = Ram { low: 16 << 20, high: 16 << 20 };

#[test]
fn b3_unmap_of_everything_is_one_operation_at_each_width_on_each_kernel() {
    for width in [39, 48, 57, 64] {
        for kernel in [Kernel::old(width), Kernel::new(width)] {
            let unmap_all = kernel.unmap_all;
            let (world, space) = World::one(kernel, width.min(57));
            let top = u64::MAX >> (64 - width.min(57));
            world.done(&space, &[map(0, 0, KIB4), map(GIB, 0, MIB2), map(top - 4095, 0, KIB4)]);
            world.model.served();
            world.done(&space, &[unmap(0, u64::MAX)]);
            assert!(world.contents().is_empty(), "width {width}");
            let expected = if unmap_all { UnmapRange::All } else { UnmapRange::Span { first: 0, last: top } };
            assert_eq!(world.unmaps(), [expected]);
            assert_eq!((world.stats(1).live_bytes, world.stats(1).splits), (0, 0));
        }
    }
}

#[test]
fn b3_the_upper_half_and_everything_above_a_mapping_never_wrap() {
    let (world, space) = World::one(Kernel::old(64), 57);
    world.done(&space, &[map(0, 0, KIB4), map(1 << 56, 0, MIB2)]);
    world.done(&space, &[unmap(KIB4, u64::MAX)]);
    assert_eq!(world.shape(), [(0, KIB4)]);
}

#[test]
fn b3_a_mapping_that_ends_at_2_to_64_is_refused_rather_than_lost() {
    let (world, space) = World::one(Kernel::old(64), 57);
    let applied = world.apply(&space, &[map(u64::MAX - 4095, 0, KIB4)]);
    assert_eq!(applied.refused.len(), 1);
    assert_eq!(applied.refused[0].cause, RefusalCause::Range);
    assert!(world.contents().is_empty());
}

#[test]
fn b3_what_is_beyond_the_width_of_its_space_is_refused_rather_than_left() {
    for width in [39, 48, 57] {
        let end = 1u64 << width;
        let (world, space) = World::one(Kernel::new(64), width);
        world.done(&space, &[map(end - 4 * MIB2, 0, KIB4)]);
        for beyond in [map(end, 0, KIB4), map(end - MIB2, MIB2, 2 * MIB2)] {
            let refused = world.apply(&space, &[beyond]).refused;
            assert_eq!(refused.iter().map(|r| r.cause).collect::<Vec<_>>(), [RefusalCause::Range]);
        }
        assert_eq!(world.shape(), [(end - 4 * MIB2, KIB4)]);
        world.done(&space, &[unmap(0, u64::MAX)]);
        assert!(world.contents().is_empty());
        // The same function in identity, where addresses have 64 bits, and back.
        world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
        world.attach(1, &space, &[mapping(0, 0, KIB4)]).expect("attached");
        world.done(&space, &[unmap(0, u64::MAX)]);
        assert!(world.contents().is_empty());
    }
}

#[test]
fn b3_unmap_all_is_not_used_while_anything_stays() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4), map(GIB, 0, KIB4), map(2 * GIB, 0, KIB4)]);
    world.model.served();
    world.done(&space, &[unmap(GIB, u64::MAX)]);
    assert_eq!(world.unmaps(), [UnmapRange::Span { first: GIB, last: 2 * GIB + 4095 }]);
    assert_eq!(world.shape(), [(0, KIB4)]);
}

#[test]
fn b4_unmap_of_what_is_not_mapped_asks_nothing_of_the_host() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(GIB, 0, KIB4)]);
    let before = world.model.counts();
    world.done(&space, &[unmap(0, GIB - 1), unmap(GIB + KIB4, u64::MAX)]);
    assert_eq!(world.model.counts(), before);
}

#[test]
fn b5_replay_maps_what_is_live_with_its_boundaries_and_unmaps_nothing() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1), (2, 2)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    let live = [mapping(0, 0, KIB4), mapping(KIB4, KIB4, KIB4), mapping(GIB, MIB2, MIB2)];
    world.done(&space, &live.map(MapOp::Map));
    world.model.served();
    world.attach(2, &space, &live).expect("attached");
    assert_eq!(world.unmaps(), []);
    assert_eq!(world.model.contents(GroupId(2)), world.contents());
    assert_eq!(world.contents().len(), 3);
}

#[test]
fn b6_a_leaf_over_the_interrupt_window_maps_both_sides_right() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(3 * GIB, GIB / 2, GIB)]);
    let target = |iova: u64| world.model.translate(GroupId(1), iova).map(|(hva, _)| hva);
    let expected = |iova: u64| Some(LOW_HVA + GIB / 2 + (iova - 3 * GIB));
    for iova in [3 * GIB, 0xfedf_ffff, 0xfef0_0000, 4 * GIB - 1] {
        assert_eq!(target(iova), expected(iova), "{iova:#x}");
    }
    assert_eq!((target(0xfee0_0000), target(0xfeef_ffff)), (None, None));
    world.done(&space, &[unmap(3 * GIB, 4 * GIB - 1)]);
    assert!(world.contents().is_empty());
}

#[test]
fn b6_a_run_over_a_hole_of_the_hosts_ranges_loses_only_the_hole() {
    let mut kernel = Kernel::new(48);
    kernel.iova_ranges = vec![range(0, 0x9_ffff), range(0xc_0000, 0xffff_ffff_ffff)];
    let (world, space) = World::one(kernel, 48);
    let applied = world.apply(&space, &[map(0, MIB2, MIB2)]);
    assert_eq!(applied.refused, [refusal(0xa_0000, 0xb_ffff, RefusalCause::Range)]);
    assert_eq!(world.shape(), [(0, 0xa_0000), (0xc_0000, MIB2 - 0xc_0000)]);
    assert_eq!(world.model.translate(GroupId(1), 0xc_0000), Some((LOW_HVA + MIB2 + 0xc_0000, Perm::ReadWrite)));
}

fn range(first: u64, last: u64) -> vtd::IovaRange {
    vtd::IovaRange { first, last }
}

pub fn refusal(first: u64, last: u64, cause: RefusalCause) -> Refusal {
    Refusal { range: range(first, last), cause, stream: requester(1).into() }
}

#[test]
fn b7_one_mapping_is_one_host_map_and_neighbours_are_not_merged() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, GIB)]);
    world.done(&space, &[map(GIB, GIB, KIB4), map(GIB + KIB4, GIB + KIB4, KIB4)]);
    assert_eq!(world.shape(), [(0, GIB), (GIB, KIB4), (GIB + KIB4, KIB4)]);
    assert_eq!((world.stats(1).host_maps, world.stats(1).mapped_bytes_total), (3, GIB + 2 * KIB4));
}

#[test]
fn b7_neighbouring_unmaps_are_one_operation_whatever_maps_they_came_from() {
    let (world, space) = World::one(Kernel::new(48), 48);
    // Neighbours with a hole, mapped in three batches, and one that stays behind them.
    world.done(&space, &[map(0, 0, KIB4)]);
    world.done(&space, &[map(KIB4, MIB2, 2 * KIB4), map(16 * KIB4, 0, KIB4)]);
    world.done(&space, &[map(GIB, 0, KIB4)]);
    world.model.served();
    world.done(&space, &[unmap(16 * KIB4, 17 * KIB4 - 1), unmap(0, KIB4 - 1), unmap(KIB4, 3 * KIB4 - 1)]);
    assert_eq!(world.unmaps(), [UnmapRange::Span { first: 0, last: 17 * KIB4 - 1 }]);
    assert_eq!(world.shape(), [(GIB, KIB4)]);
}

#[test]
fn b7_an_extent_that_stays_parts_the_unmaps_around_it() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4), map(KIB4, 0, KIB4), map(2 * KIB4, 0, KIB4)]);
    world.model.served();
    world.done(&space, &[unmap(0, KIB4 - 1), unmap(2 * KIB4, 3 * KIB4 - 1)]);
    assert_eq!(world.unmaps().len(), 2);
    assert_eq!(world.shape(), [(KIB4, KIB4)]);
}

#[test]
fn b7_a_run_over_two_memory_regions_is_one_map_a_region() {
    let world = World::new(Kernel::new(48), Ram { low: HIGH_GPA, high: GIB }, &[(1, 1)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    world.done(&space, &[map(0, HIGH_GPA - MIB2, 2 * MIB2)]);
    assert_eq!(world.shape(), [(0, MIB2), (MIB2, MIB2)]);
    assert_eq!(world.model.translate(GroupId(1), MIB2), Some((HIGH_HVA, Perm::ReadWrite)));
}

#[test]
fn b8_unmap_inside_a_2m_extent_keeps_the_rest() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(GIB, MIB2, MIB2)]);
    world.done(&space, &[unmap(GIB + 5 * KIB4, GIB + 6 * KIB4 - 1)]);
    assert_eq!(world.shape(), [(GIB, 5 * KIB4), (GIB + 6 * KIB4, MIB2 - 6 * KIB4)]);
    assert_eq!(world.model.translate(GroupId(1), GIB + 6 * KIB4), Some((LOW_HVA + MIB2 + 6 * KIB4, Perm::ReadWrite)));
    let stats = world.stats(1);
    assert_eq!((stats.splits, stats.host_unmaps, stats.host_maps), (1, 1, 3));
    assert!(stats.splits_open_ns > 0);
    // The next cut is of the remainder; taking whole extents is no split.
    world.done(&space, &[unmap(GIB, GIB + 5 * KIB4 - 1)]);
    assert_eq!(world.stats(1).splits, 1);
}

#[test]
fn b8_several_holes_in_one_extent_are_one_cut() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, 8 * KIB4)]);
    world.done(&space, &[unmap(KIB4, 2 * KIB4 - 1), unmap(4 * KIB4, 5 * KIB4 - 1), unmap(7 * KIB4, 8 * KIB4 - 1)]);
    assert_eq!(world.shape(), [(0, KIB4), (2 * KIB4, 2 * KIB4), (5 * KIB4, 2 * KIB4)]);
    assert_eq!((world.stats(1).splits, world.stats(1).host_unmaps), (1, 1));
}

#[test]
fn b8_at_the_entry_limit_the_page_goes_and_lost_remainders_are_said() {
    let (world, space) = World::one(Kernel { entries: 2, ..Kernel::new(48) }, 48);
    world.done(&space, &[map(0, 0, KIB4), map(GIB, MIB2, MIB2)]);
    let applied = world.apply(&space, &[unmap(GIB + KIB4, GIB + 2 * KIB4 - 1)]);
    assert_eq!(applied.refused, [refusal(GIB + 2 * KIB4, GIB + MIB2 - 1, RefusalCause::Limit)]);
    assert_eq!(world.shape(), [(0, KIB4), (GIB, KIB4)]);
    assert_eq!(world.stats(1).refused_maps.limit, 1);
}

#[test]
fn b8_whole_extents_of_a_batch_go_first_so_that_a_cut_finds_room() {
    let (world, space) = World::one(Kernel { entries: 3, ..Kernel::new(48) }, 48);
    world.done(&space, &[map(0, 0, 3 * KIB4), map(GIB, 0, KIB4), map(2 * GIB, 0, KIB4)]);
    world.done(&space, &[unmap(KIB4, 2 * KIB4 - 1), unmap(2 * GIB, 2 * GIB + KIB4 - 1)]);
    assert_eq!(world.shape(), [(0, KIB4), (2 * KIB4, KIB4), (GIB, KIB4)]);
}

#[test]
fn b9_permissions_reach_the_host_as_they_are() {
    let (world, space) = World::one(Kernel::new(48), 48);
    for (i, perm) in [(0, Perm::Read), (1, Perm::Write), (2, Perm::ReadWrite)] {
        world.done(&space, &[MapOp::Map(Mapping { perm, ..mapping(i * KIB4, 0, KIB4) })]);
        assert_eq!(world.model.translate(GroupId(1), i * KIB4), Some((LOW_HVA, perm)));
    }
}

#[test]
fn b9_a_change_of_permission_at_a_switch_is_unmapped_and_mapped() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4), map(KIB4, KIB4, KIB4)]);
    let other = paged(2, 48);
    let read_only = Mapping { perm: Perm::Read, ..mapping(0, 0, KIB4) };
    world.model.served();
    world.attach(1, &other, &[read_only, mapping(KIB4, KIB4, KIB4)]).expect("attached");
    assert_eq!(world.model.translate(GroupId(1), 0), Some((LOW_HVA, Perm::Read)));
    assert_eq!(world.unmaps(), [UnmapRange::Span { first: 0, last: KIB4 - 1 }]);
}

#[test]
fn b11_each_cause_is_counted_and_the_rest_goes_on() {
    let kernel = Kernel { entries: 3, memlock: Some(4 * MIB2), ..Kernel::new(48) };
    let (world, space) = World::one(kernel, 48);
    let applied = world.apply(
        &space,
        &[
            map(0, 0, KIB4),
            map(1 << 48, 0, KIB4),
            map(GIB, 3 * GIB, KIB4),
            map(2 * GIB, 0, 4 * MIB2),
            map(3 * GIB, 0, KIB4),
            map(3 * GIB + KIB4, 0, KIB4),
            map(3 * GIB + 2 * KIB4, 0, KIB4),
        ],
    );
    let causes: Vec<_> = applied.refused.iter().map(|r| (r.range.first, r.cause)).collect();
    assert_eq!(
        causes,
        [
            (1 << 48, RefusalCause::Range),
            (GIB, RefusalCause::Target),
            (2 * GIB, RefusalCause::Memlock),
            (3 * GIB + 2 * KIB4, RefusalCause::Limit),
        ]
    );
    let refused = world.stats(1).refused_maps;
    assert_eq!((refused.range, refused.target, refused.memlock, refused.limit, refused.other), (1, 1, 1, 1, 0));
    assert_eq!(world.shape(), [(0, KIB4), (3 * GIB, KIB4), (3 * GIB + KIB4, KIB4)]);

    world.model.inject(|_, op| matches!(op, HostOp::Map(_)).then_some(libc::EPERM));
    world.done(&space, &[unmap(0, KIB4 - 1)]);
    assert_eq!(world.apply(&space, &[map(0, 0, KIB4)]).refused, [refusal(0, KIB4 - 1, RefusalCause::Other)]);
    world.model.stop_injecting();
    world.done(&space, &[map(0, 0, KIB4)]);
}

#[test]
fn b11_what_one_group_cannot_have_no_group_of_the_space_keeps() {
    // The unit forgets what is refused, so it will never say that it must go.
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1), (2, 2)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    world.attach(2, &space, &[]).expect("attached");
    world.model.inject(|space, op| match op {
        HostOp::Map(held) if space.0 == 2 && held.iova == GIB => Some(libc::ENOMEM),
        _ => None,
    });
    let applied = world.apply(&space, &[map(0, 0, KIB4), map(GIB, 0, KIB4)]);
    assert_eq!(
        applied.refused,
        [Refusal { stream: requester(2).into(), ..refusal(GIB, GIB + 4095, RefusalCause::Memlock) }]
    );
    for group in [1, 2] {
        assert_eq!(world.model.translate(GroupId(group), GIB), None);
        assert!(world.model.translate(GroupId(group), 0).is_some());
    }
}

#[test]
fn b11_c2_a_group_that_cannot_have_all_of_a_shared_space_stays_out_and_the_others_keep_it() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1), (2, 2)]);
    let space = paged(1, 48);
    let live = [mapping(0, 0, KIB4), mapping(GIB, 0, KIB4)];
    world.attach(1, &space, &live).expect("attached");
    world.model.inject(|_, op| matches!(op, HostOp::Map(held) if held.iova == GIB).then_some(libc::ENOSPC));
    let before = world.contents();
    let refused = world.attach(2, &space, &live).expect_err("not all of it");
    assert_eq!(
        refused,
        AttachRefused::Shared(vec![Refusal {
            stream: requester(2).into(),
            ..refusal(GIB, GIB + KIB4 - 1, RefusalCause::Limit)
        }])
    );
    assert_eq!(world.contents(), before);
    assert!(world.model.contents(GroupId(2)).is_empty());
    assert_eq!(world.bridge.space_of(requester(2)), Some(SpaceKey::Blocked));
    world.model.stop_injecting();
    world.attach(2, &space, &live).expect("attached");
    assert_eq!(world.model.contents(GroupId(2)), before);
}

#[test]
fn b11_a_group_that_is_alone_in_its_space_has_the_rest_of_it() {
    let world = World::new(Kernel { entries: 1, ..Kernel::new(48) }, SMALL, &[(1, 1)]);
    let attached = world.attach(1, &paged(1, 48), &[mapping(0, 0, KIB4), mapping(GIB, 0, KIB4)]);
    let refused = refusal(GIB, GIB + KIB4 - 1, RefusalCause::Limit);
    assert_eq!(attached, Err(AttachRefused::Partial(vec![refused])));
    assert_eq!(world.shape(), [(0, KIB4)]);
}

#[test]
fn b11_a_refused_unmap_stops_the_function_before_the_call_returns() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4), map(GIB, 0, KIB4)]);
    world.model.inject(|_, op| matches!(op, HostOp::Unmap(_)).then_some(libc::EINVAL));
    world.done(&space, &[unmap(0, KIB4 - 1)]);
    assert_eq!(*world.stopped.functions.lock().expect("whole"), [requester(1)]);
    assert!(!*world.stopped.machine.lock().expect("whole"));
    let stats = world.stats(1);
    assert_eq!((stats.unmaps_refused, stats.quarantined, stats.live_extents), (1, 1, 2), "the ledger keeps the extent");

    // From now on nothing is mapped for it; it is stopped once.
    let before = world.model.counts().0;
    world.done(&space, &[map(2 * GIB, 0, KIB4)]);
    assert!(matches!(world.attach(1, &space, &[mapping(0, 0, KIB4)]), Err(AttachRefused::Host { .. })));
    assert_eq!(world.model.counts().0, before);
    assert_eq!(world.stopped.functions.lock().expect("whole").len(), 1);
    // What the host let go in the end is known again.
    world.model.stop_injecting();
    assert!(world.attach(1, &SpaceKey::Blocked, &[]).is_err());
    assert!(world.contents().is_empty() && world.bridge.holds(requester(1)).is_empty());
}

#[test]
fn b11_an_unmap_that_took_less_than_the_ledger_says_is_refused() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, MIB2)]);
    // Someone else took the mapping away.
    use vfio_bridge::{HostIommu, HostSpaceId};
    world.model.unmap(HostSpaceId(1), UnmapRange::All).expect("unmapped");
    world.done(&space, &[unmap(0, MIB2 - 1)]);
    assert_eq!(world.stats(1).quarantined, 1);
}

#[test]
fn b11_a_function_that_does_not_stop_stops_the_machine() {
    let (world, space) = World::one(Kernel::new(48), 48);
    *world.stopped.stubborn.lock().expect("whole") = true;
    world.done(&space, &[map(0, 0, KIB4)]);
    world.model.inject(|_, _| Some(libc::EIO));
    world.attach(1, &SpaceKey::Blocked, &[]).expect_err("not taken away");
    assert!(*world.stopped.machine.lock().expect("whole"));
}

#[test]
fn b11_a_stopped_group_costs_the_others_nothing() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1), (2, 2)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    world.attach(2, &space, &[]).expect("attached");
    world.done(&space, &[map(0, 0, KIB4)]);
    world.model.inject(|space, op| (space.0 == 2 && matches!(op, HostOp::Unmap(_))).then_some(libc::EIO));
    world.done(&space, &[unmap(0, KIB4 - 1), map(GIB, 0, KIB4)]);
    assert_eq!(*world.stopped.functions.lock().expect("whole"), [requester(2)]);
    assert_eq!(world.shape(), [(GIB, KIB4)]);
    assert_eq!(world.model.translate(GroupId(2), GIB), None);
}

#[test]
fn b12_identity_is_all_ram_around_the_interrupt_window() {
    let ram = Ram { low: HIGH_GPA, high: GIB };
    let world = World::new(Kernel::new(48), ram, &[(1, 1)]);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(world.shape(), [(0, 0xfee0_0000), (0xfef0_0000, HIGH_GPA - 0xfef0_0000), (HIGH_GPA, GIB)]);
    assert_eq!(world.model.translate(GroupId(1), 0xfef0_0000), Some((LOW_HVA + 0xfef0_0000, Perm::ReadWrite)));
}

#[test]
fn b12_leaving_identity_keeps_what_the_new_space_grants_too() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1)]);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    let space = paged(1, 48);
    let high = mapping(HIGH_GPA, HIGH_GPA, SMALL.high);
    world.model.served();
    world.attach(1, &space, &[mapping(0, MIB2, KIB4), high]).expect("attached");
    assert_eq!(world.unmaps(), [UnmapRange::Span { first: 0, last: SMALL.low - 1 }], "high memory is not touched");
    assert_eq!(world.shape(), [(0, KIB4), (HIGH_GPA, SMALL.high)]);
    assert_eq!(world.stats(1).splits, 0);
}

#[test]
fn b14_an_extent_that_several_leaves_grant_is_not_touched_at_a_switch() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, MIB2)]);
    let pages: Vec<Mapping> = (0..512).map(|i| mapping(i * KIB4, i * KIB4, KIB4)).collect();
    let before = world.model.counts();
    world.attach(1, &paged(2, 48), &pages).expect("attached");
    assert_eq!(world.model.counts(), before);
    // And back: 512 pages become one leaf.
    let (world, space) = World::one(Kernel::new(48), 48);
    let maps: Vec<MapOp> = pages.iter().copied().map(MapOp::Map).collect();
    world.done(&space, &maps);
    let before = world.model.counts();
    world.attach(1, &paged(2, 48), &[mapping(0, 0, MIB2)]).expect("attached");
    assert_eq!(world.model.counts(), before);
}

#[test]
fn c1_a_group_with_two_functions_has_one_container_and_both_see_its_counts() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1), (2, 1)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    world.attach(2, &space, &[]).expect("attached");
    world.done(&space, &[map(0, 0, KIB4)]);
    assert_eq!(world.model.counts(), (1, 0), "once for the group, not once a function");
    assert_eq!(world.stats(1), world.stats(2));
}

#[test]
fn c2_the_space_of_a_group_can_be_asked_and_a_second_registration_is_busy() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1)]);
    let of = |device| world.bridge.space_of(requester(device));
    assert_eq!(of(1), Some(SpaceKey::Blocked));
    assert_eq!(of(9), None);
    for space in [SpaceKey::Identity, paged(1, 48), SpaceKey::Blocked] {
        world.attach(1, &space, &[]).expect("attached");
        assert_eq!(of(1), Some(space));
    }
    let again = world.bridge.register(requester(1), GroupId(1));
    assert_eq!(again, Err(RegisterError::Busy(requester(1), GroupId(1))));
    assert_eq!(world.bridge.register(requester(2), GroupId(8)), Err(RegisterError::NotOpen(GroupId(8))));
    assert_eq!(world.attach(9, &SpaceKey::Identity, &[]), Err(AttachRefused::UnknownRequester(requester(9))));
}

#[test]
fn c2_a_pasid_is_refused_and_changes_nothing() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4)]);
    let attached = world.bridge.attach(
        Stream { pasid: Some(Pasid(1)), requester: requester(1) },
        &SpaceKey::Identity,
        &mut std::iter::empty(),
    );
    assert!(matches!(attached, Err(AttachRefused::Host { .. })));
    world.bridge.detach(Stream { pasid: Some(Pasid(1)), requester: requester(1) });
    assert_eq!(world.shape(), [(0, KIB4)]);
}

#[test]
fn c3_a_group_is_blocked_until_its_members_agree() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1), (2, 1)]);
    let space = paged(1, 48);
    let live = [mapping(0, 0, KIB4)];
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    assert!(world.contents().is_empty(), "the second is not attached yet");
    world.attach(2, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(world.contents().len(), 2);
    world.attach(1, &space, &live).expect("attached");
    assert_eq!((world.contents().len(), world.bridge.space_of(requester(2))), (0, Some(SpaceKey::Blocked)));
    world.done(&space, &[map(GIB, 0, KIB4)]);
    assert!(world.contents().is_empty(), "a group that disagrees follows no space");
    world.attach(2, &space, &[live[0], mapping(GIB, 0, KIB4)]).expect("attached");
    assert_eq!(world.shape(), [(0, KIB4), (GIB, KIB4)]);
}

#[test]
fn c3_a_function_that_left_has_no_say() {
    let world = World::new(Kernel::new(48), SMALL, &[(1, 1), (2, 1)]);
    let space = paged(1, 48);
    let live = [mapping(0, 0, KIB4)];
    world.attach(1, &space, &live).expect("attached");
    world.attach(2, &space, &live).expect("attached");
    world.bridge.detach(requester(2).into());
    assert_eq!(world.shape(), [(0, KIB4)], "the other one stays");
    world.bridge.detach(requester(1).into());
    assert!(world.contents().is_empty(), "nobody is left");
    world.attach(1, &space, &live).expect("attached");
    assert_eq!(world.shape(), [(0, KIB4)]);
}

#[test]
fn rule5_malformed_mappings_are_refused_without_a_host_operation() {
    let (world, space) = World::one(Kernel::new(48), 48);
    let ops = [
        map(0, 0, 0),
        map(1, 0, KIB4),
        map(0, 1, KIB4),
        map(0, 0, 1),
        map(u64::MAX - 4095, 0, 2 * KIB4),
        map(0, u64::MAX - 4095, 2 * KIB4),
        unmap(KIB4, 0),
    ];
    assert_eq!(world.apply(&space, &ops).refused.len(), 6);
    assert_eq!(world.model.counts(), (0, 0));
}

#[test]
fn rule4_a_map_over_something_else_is_refused_and_over_itself_is_nothing() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, 4 * KIB4)]);
    let before = world.model.counts();
    world.done(&space, &[map(0, 0, 2 * KIB4)]);
    assert_eq!(world.model.counts(), before);
    let applied = world.apply(&space, &[map(2 * KIB4, 0, 4 * KIB4)]);
    assert_eq!(applied.refused, [refusal(2 * KIB4, 4 * KIB4 - 1, RefusalCause::Other)]);
    assert_eq!(world.model.translate(GroupId(1), 4 * KIB4), Some((LOW_HVA + 2 * KIB4, Perm::ReadWrite)));
}
