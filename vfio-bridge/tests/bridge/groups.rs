//! Groups that share a space or join it, and operations in an order that the unit does not give.

use vfio_bridge::GroupId;
use vfio_bridge::model::{HostOp, Kernel};
use vtd::{AttachRefused, RefusalCause, SpaceKey, SpaceListener};

use crate::world::*;

const RAM: Ram = Ram { low: 16 << 20, high: 16 << 20 };

fn refuses_unmaps_of(world: &World, group: u32) {
    world.model.inject(move |space, op| (space.0 == group && matches!(op, HostOp::Unmap(_))).then_some(libc::EIO));
}

fn stopped(world: &World) -> Vec<vtd::Requester> {
    world.stopped.functions.lock().expect("whole").clone()
}

/// Functions 1 to `groups` in groups of their own, all in one space.
fn sharing(groups: u8) -> (World, SpaceKey) {
    let functions: Vec<(u8, u32)> = (1..=groups).map(|n| (n, n.into())).collect();
    let world = World::new(Kernel::new(48), RAM, &functions);
    let space = paged(1, 48);
    for device in 1..=groups {
        world.attach(device, &space, &[]).expect("attached");
    }
    world.model.served();
    (world, space)
}

#[test]
fn c3_a_function_that_is_registered_later_takes_its_group_along() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1)]);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(world.contents().len(), 2);
    world.bridge.register(requester(2), GroupId(1)).expect("new");
    assert_eq!((world.contents().len(), world.bridge.space_of(requester(1))), (0, Some(SpaceKey::Blocked)));
    world.attach(2, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(world.contents().len(), 2);
    // And where the host does not let go of it, both are stopped before the call returns.
    refuses_unmaps_of(&world, 1);
    world.bridge.register(requester(3), GroupId(1)).expect("new");
    assert_eq!(stopped(&world), [1, 2, 3].map(requester));
}

#[test]
fn b11_a_function_that_leaves_a_host_that_does_not_let_go_is_stopped() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4)]);
    refuses_unmaps_of(&world, 1);
    world.bridge.detach(requester(1).into());
    assert_eq!(stopped(&world), [requester(1)]);
}

#[test]
fn b11_a_group_that_may_not_join_and_cannot_leave_is_stopped() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 2)]);
    let (space, other) = (paged(1, 48), paged(2, 48));
    world.attach(1, &space, &[mapping(MIB2, 0, KIB4)]).expect("attached");
    world.attach(2, &other, &[mapping(0, 0, KIB4)]).expect("attached");
    refuses_unmaps_of(&world, 2);
    let refused = world.attach(2, &space, &[mapping(MIB2, RAM.low, KIB4)]);
    assert!(matches!(refused, Err(AttachRefused::Shared(_))), "{refused:?}");
    assert_eq!(stopped(&world), [requester(2)]);
    assert!(!*world.stopped.machine.lock().expect("whole"));
}

#[test]
fn b11_c3_a_function_that_may_not_join_keeps_its_group_out() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 2), (3, 2)]);
    let space = paged(1, 48);
    let live = [mapping(0, 0, KIB4)];
    for device in [1, 2] {
        world.attach(device, &space, if device == 1 { &live } else { &[] }).expect("attached");
    }
    world.attach(3, &SpaceKey::Identity, &[]).expect("its group disagrees");
    // Function 3 would agree with function 2; the host refuses what it takes to join.
    world.model.inject(|space, op| (space.0 == 2 && matches!(op, HostOp::Map(_))).then_some(libc::ENOSPC));
    assert!(matches!(world.attach(3, &space, &live), Err(AttachRefused::Shared(_))));
    world.model.stop_injecting();
    // The unit has function 3 in no space now. That the other one is attached again changes nothing for it.
    world.attach(2, &space, &live).expect("attached");
    assert_eq!(world.bridge.space_of(requester(3)), Some(SpaceKey::Blocked));
    assert!(world.model.contents(GroupId(2)).is_empty());
    world.attach(3, &space, &live).expect("attached");
    assert_eq!(world.model.contents(GroupId(2)).len(), 1);
}

#[test]
fn b11_a_group_that_is_attached_again_to_a_space_of_its_own_has_the_rest_of_it() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.model.inject(|_, op| matches!(op, HostOp::Map(held) if held.iova == GIB).then_some(libc::ENOMEM));
    let refused = world.attach(1, &space, &[mapping(0, 0, KIB4), mapping(GIB, 0, KIB4)]);
    assert!(matches!(&refused, Err(AttachRefused::Partial(lost)) if lost.len() == 1), "{refused:?}");
    assert_eq!(world.shape(), [(0, KIB4)]);
}

#[test]
fn b11_what_no_group_can_have_is_refused_once() {
    let (world, space) = sharing(3);
    // No RAM behind the middle ones; they are apart, and beside what is granted.
    let hole = RAM.low;
    let ops = [
        map(0, 0, KIB4),
        map(KIB4, hole, KIB4),
        map(2 * KIB4, KIB4, KIB4),
        map(MIB2, hole, 2 * KIB4),
        map(MIB2 + 2 * KIB4, 0, KIB4),
        map(GIB, hole + MIB2, KIB4),
        map(GIB + KIB4, MIB2, KIB4),
    ];
    let refused: Vec<_> =
        world.apply(&space, &ops).refused.iter().map(|r| (r.range.first, r.range.last, r.cause)).collect();
    let target = |first: u64, pages: u64| (first, first + pages * KIB4 - 1, RefusalCause::Target);
    assert_eq!(refused, [target(KIB4, 1), target(MIB2, 2), target(GIB, 1)]);
    for group in 1..=3 {
        let held: Vec<u64> = world.model.contents(GroupId(group)).into_keys().collect();
        assert_eq!(held, [0, 2 * KIB4, MIB2 + 2 * KIB4, GIB + KIB4]);
    }
}

#[test]
fn b11_what_one_group_lost_the_next_ones_are_not_asked_for() {
    let (world, space) = sharing(3);
    let lost = [KIB4, MIB2, GIB];
    world.model.inject(move |space, op| {
        let refuse = space.0 == 1 && matches!(op, HostOp::Map(held) if lost.contains(&held.iova));
        refuse.then_some(libc::ENOMEM)
    });
    let at = [0, KIB4, 2 * KIB4, MIB2 - KIB4, MIB2, MIB2 + KIB4, GIB, 2 * GIB];
    let refused = world.apply(&space, &at.map(|iova| map(iova, 0, KIB4))).refused;
    assert_eq!(
        refused.iter().map(|r| (r.range.first, r.stream.requester)).collect::<Vec<_>>(),
        lost.map(|iova| (iova, requester(1)))
    );
    let asked = |group: u32| -> Vec<u64> {
        let served = world.model.served();
        let of_group = served.into_iter().filter(|served| served.space.0 == group);
        of_group
            .filter_map(|served| match served.op {
                HostOp::Map(held) => Some(held.iova),
                _ => None,
            })
            .collect()
    };
    assert_eq!(asked(3), [0, 2 * KIB4, MIB2 - KIB4, MIB2 + KIB4, 2 * GIB]);
    // A mapping that reaches over what was lost is granted around it, in every group.
    let refused = world.apply(&space, &[unmap(0, u64::MAX), map(0, 0, 4 * KIB4)]).refused;
    assert_eq!(refused, []);
    world.model.inject(move |space, op| {
        (space.0 == 1 && matches!(op, HostOp::Map(held) if held.iova == MIB2)).then_some(libc::ENOMEM)
    });
    world.model.served();
    let over = [map(MIB2, 0, KIB4), map(MIB2 + KIB4, KIB4, 3 * KIB4)];
    assert_eq!(world.apply(&space, &over).refused.len(), 1);
    assert_eq!(asked(2), [MIB2 + KIB4]);
    assert_eq!(world.model.contents(GroupId(2)).into_keys().collect::<Vec<_>>(), [0, MIB2 + KIB4]);
}

#[test]
fn rule3_operations_take_effect_in_their_order_whatever_it_is() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(
        &space,
        &[
            map(0, 0, KIB4),
            unmap(0, KIB4 - 1),
            map(0, KIB4, KIB4),
            map(MIB2, 0, KIB4),
            unmap(MIB2, MIB2 + KIB4 - 1),
            unmap(0, KIB4 - 1),
            map(0, 2 * KIB4, KIB4),
        ],
    );
    assert_eq!(world.model.translate(GroupId(1), 0), Some((LOW_HVA + 2 * KIB4, vtd::Perm::ReadWrite)));
    assert_eq!(world.model.translate(GroupId(1), MIB2), None);
}

#[test]
fn rule5_an_unmap_that_ends_before_it_begins_is_nothing() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, 4 * KIB4)]);
    world.model.served();
    world.done(&space, &[unmap(2 * KIB4, KIB4 - 1)]);
    assert_eq!((world.model.served(), world.shape()), (vec![], vec![(0, 4 * KIB4)]));
}

#[test]
fn rule4_a_mapping_that_comes_twice_at_once_is_made_once() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.model.served();
    let page = map(KIB4, KIB4, KIB4);
    let whole = map(0, 0, 4 * KIB4);
    // The ledger knows of the first when the second comes, and of what it leaves to be mapped.
    world.done(&space, &[page, page, whole, map(MIB2, 0, KIB4)]);
    let served = world.model.served();
    assert_eq!(served.len(), 4, "{served:x?}");
    assert_eq!(world.shape(), [(0, KIB4), (KIB4, KIB4), (2 * KIB4, 2 * KIB4), (MIB2, KIB4)]);
    // Another target in the same turn is a conflict.
    let refused = world.apply(&space, &[map(GIB, 0, 2 * KIB4), map(GIB + KIB4, 0, KIB4)]).refused;
    assert_eq!(
        refused.iter().map(|r| (r.range.first, r.cause)).collect::<Vec<_>>(),
        [(GIB + KIB4, RefusalCause::Other)]
    );
    assert_eq!(world.model.translate(GroupId(1), GIB + KIB4), None, "what is refused, no group has");
    assert!(world.model.translate(GroupId(1), GIB).is_some());
}

#[test]
fn f6_of_a_function_that_is_gone_nothing_is_left_and_it_can_come_again() {
    let (world, space) = World::one(Kernel::new(48), 48);
    world.done(&space, &[map(0, 0, KIB4)]);
    assert_eq!(world.bridge.sharing(requester(1)), 1);
    world.bridge.detach(requester(1).into());
    world.bridge.unregister(requester(1));
    assert!(world.contents().is_empty());
    assert_eq!((world.bridge.space_of(requester(1)), world.bridge.backend(requester(1))), (None, None));
    assert!(matches!(world.attach(1, &space, &[]), Err(AttachRefused::UnknownRequester(_))));
    world.apply(&space, &[map(MIB2, 0, KIB4)]);
    assert!(world.contents().is_empty(), "what comes later is none of its");
    world.bridge.unregister(requester(1));
    world.bridge.register(requester(1), GroupId(1)).expect("it is new again");
    world.attach(1, &space, &[mapping(0, 0, KIB4)]).expect("attached");
    assert_eq!((world.contents().len(), stopped(&world).len()), (1, 0));
}

#[test]
fn f6_a_function_that_is_gone_without_a_detach_is_blocked_first() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 1)]);
    let space = paged(1, 48);
    for device in [1, 2] {
        world.attach(device, &space, &[mapping(0, 0, KIB4)]).expect("attached");
    }
    assert_eq!((world.contents().len(), world.bridge.sharing(requester(2))), (1, 2));
    world.bridge.unregister(requester(1));
    assert_eq!(world.contents().len(), 1, "the other one of its group is where it was");
    assert_eq!(world.bridge.sharing(requester(2)), 1);
    world.bridge.unregister(requester(2));
    assert!(world.contents().is_empty());
}
