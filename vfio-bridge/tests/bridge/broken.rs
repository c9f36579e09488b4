//! A container whose host refused an unmap: nothing is mapped in it any more, whatever its functions are attached to.

use vfio_bridge::UnmapRange;
use vfio_bridge::model::{HostOp, Kernel};
use vtd::{AttachRefused, SpaceKey, SpaceListener, Stream};

use crate::world::*;

const RAM: Ram = Ram { low: 16 << 20, high: 16 << 20 };

/// Two functions in a group, and one alone in the same space, into which three pages apart are mapped; the group's host
/// refuses unmaps.
fn broken() -> (World, SpaceKey) {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 1), (3, 2)]);
    let space = paged(1, 48);
    for device in [1, 2, 3] {
        world.attach(device, &space, &[]).expect("attached");
    }
    world.done(&space, &[map(0, 0, KIB4), map(MIB2, MIB2, KIB4), map(GIB, 0, KIB4)]);
    world.model.inject(|space, op| (space.0 == 1 && matches!(op, HostOp::Unmap(_))).then_some(libc::EIO));
    world.model.served();
    world.done(&space, &[unmap(0, KIB4 - 1)]);
    assert_eq!(*world.stopped.functions.lock().expect("whole"), [requester(1), requester(2)]);
    world.model.served();
    (world, space)
}

fn host_refuses(result: Result<(), AttachRefused>) {
    assert!(matches!(result, Err(AttachRefused::Host { .. })), "{result:?}");
}

#[test]
fn b11_a_broken_container_gets_no_space_any_more() {
    let (world, space) = broken();
    let before = world.contents();
    let other = paged(2, 48);
    for (space, live) in [(space, vec![]), (other, vec![mapping(MIB2, 0, KIB4)]), (SpaceKey::Identity, vec![])] {
        for device in [1, 2] {
            host_refuses(world.attach(device, &space, &live));
        }
        world.apply(&space, &[map(2 * GIB, 0, KIB4)]);
    }
    // Also when its host would unmap again.
    world.model.stop_injecting();
    host_refuses(world.attach(1, &other, &[mapping(4 * MIB2, 0, KIB4)]));
    host_refuses(world.attach(2, &other, &[mapping(4 * MIB2, 0, KIB4)]));
    let maps = world.model.served().into_iter().filter(|s| s.space.0 == 1 && matches!(s.op, HostOp::Map(_)));
    assert_eq!(maps.count(), 0);
    assert!(world.contents().len() <= before.len());
    assert_eq!(world.bridge.space_of(requester(1)), Some(SpaceKey::Blocked));
    // They are stopped once.
    assert_eq!(world.stopped.functions.lock().expect("whole").len(), 2);
    assert_eq!((world.stats(1).quarantined, world.stats(3).quarantined), (1, 0));
}

#[test]
fn b11_the_others_in_the_space_go_on() {
    let (world, space) = broken();
    world.done(&space, &[unmap(MIB2, MIB2 + KIB4 - 1), map(2 * GIB, KIB4, KIB4)]);
    let held: Vec<u64> = world.model.contents(vfio_bridge::GroupId(2)).into_keys().collect();
    assert_eq!(held, [GIB, 2 * GIB]);
    world.attach(3, &SpaceKey::Identity, &[]).expect("attached");
    assert_eq!(world.model.contents(vfio_bridge::GroupId(2)).len(), 2);
}

#[test]
fn b11_nothing_is_mapped_in_the_place_of_what_did_not_go() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1)]);
    let (one, two) = (paged(1, 48), paged(2, 48));
    let pages = |gpa: u64| [0, MIB2, GIB].map(|iova| mapping(iova, gpa, KIB4));
    world.attach(1, &one, &pages(0)).expect("attached");
    // The first of three unmaps of the move is refused.
    let mut first = true;
    world.model.inject(move |_, op| {
        let unmap = matches!(op, HostOp::Unmap(_));
        (unmap && std::mem::take(&mut first)).then_some(libc::EIO)
    });
    world.model.served();
    host_refuses(world.attach(1, &two, &pages(KIB4)));
    let served = world.model.served();
    assert!(served.iter().all(|served| matches!(served.op, HostOp::Unmap(_))), "{served:?}");
    // What else had to go is gone.
    assert_eq!(served.len(), 3);
    assert_eq!(world.shape(), [(0, KIB4)]);
    assert_eq!(*world.stopped.functions.lock().expect("whole"), [requester(1)]);
}

#[test]
fn b11_what_waited_for_room_is_not_mapped_when_the_unmap_that_makes_it_is_refused() {
    let world = World::new(Kernel { entries: 1, ..Kernel::new(48) }, RAM, &[(1, 1)]);
    world.attach(1, &paged(1, 48), &[mapping(0, 0, KIB4)]).expect("attached");
    world.model.inject(|_, op| matches!(op, HostOp::Unmap(_)).then_some(libc::EIO));
    world.model.served();
    host_refuses(world.attach(1, &paged(2, 48), &[mapping(GIB, 0, KIB4)]));
    let served = world.model.served();
    assert!(matches!(&served[..], [only] if matches!(only.op, HostOp::Unmap(_))), "{served:?}");
    assert_eq!(world.shape(), [(0, KIB4)]);
}

#[test]
fn b11_a_host_that_unmaps_less_or_more_than_the_ledger_has_is_not_believed() {
    // The model has one mapping that the ledger does not know of, and then lacks one.
    for foreign in [true, false] {
        let (world, space) = World::one(Kernel::new(48), 48);
        world.done(&space, &[map(0, 0, KIB4), map(2 * KIB4, 0, KIB4)]);
        let (host_space, held) = (vfio_bridge::HostSpaceId(1), RAM.map());
        let host: &dyn vfio_bridge::HostIommu = &*world.model;
        if foreign {
            let mem = held.host_mem(0, KIB4).expect("RAM");
            host.map(host_space, KIB4, mem, vtd::Perm::Read).expect("mapped");
        } else {
            host.unmap(host_space, UnmapRange::Span { first: 0, last: KIB4 - 1 }).expect("unmapped");
        }
        world.apply(&space, &[unmap(0, 3 * KIB4 - 1)]);
        assert_eq!((world.stats(1).quarantined, world.stats(1).unmaps_refused), (1, 1), "foreign: {foreign}");
    }
}

#[test]
fn c2_a_function_without_a_say_leaves_its_group_to_the_others() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 1)]);
    for device in [1, 2] {
        world.attach(device, &SpaceKey::Identity, &[]).expect("attached");
    }
    world.model.served();
    world.bridge.detach(requester(1).into());
    assert_eq!(world.model.served(), [], "the space is the same");
    assert_eq!(world.bridge.space_of(requester(2)), Some(SpaceKey::Identity));
    world.bridge.detach(requester(2).into());
    assert_eq!((world.contents().len(), world.bridge.space_of(requester(2))), (0, Some(SpaceKey::Blocked)));
    // Detaching a PASID, or a function that is not there, is nothing.
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    world.bridge.detach(Stream { pasid: Some(vtd::Pasid(3)), requester: requester(1) });
    world.bridge.detach(requester(9).into());
    assert_eq!(world.contents().len(), 2);
    host_refuses(world.bridge.attach(
        Stream { pasid: Some(vtd::Pasid(3)), requester: requester(1) },
        &SpaceKey::Identity,
        &mut std::iter::empty(),
    ));
    let unknown = world.attach(9, &SpaceKey::Identity, &[]);
    assert!(matches!(unknown, Err(AttachRefused::UnknownRequester(r)) if r == requester(9)), "{unknown:?}");
    assert_eq!(world.contents().len(), 2);
}
