//! Hosts that attach groups to spaces; several hosts; host calls of several spaces at once; a guest-physical map that
//! changes.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use vfio_bridge::model::{HostOp, Kernel, Model};
use vfio_bridge::{
    Bridge, GroupId, HostIommu, HostMem, HostSpaceId, Limits, MapRefused, Placement, Region, UnmapRange,
};
use vtd::{AttachRefused, Perm, RefusalCause, SpaceKey, SpaceListener};

use crate::world::*;

const RAM: Ram = Ram { low: 16 << 20, high: 16 << 20 };

/// What the host was asked for, but for maps and unmaps.
fn moves(world: &World) -> Vec<HostOp> {
    let served = world.model.served().into_iter().map(|served| served.op);
    served.filter(|op| !matches!(op, HostOp::Map(_) | HostOp::Unmap(_))).collect()
}

#[test]
fn c2_a_switch_is_one_attach_to_a_space_that_is_whole() {
    let world = World::per_space(Kernel::new(48), RAM, &[(1, 1), (2, 2)]);
    let (one, two) = (paged(1, 48), paged(2, 48));
    let live = [mapping(0, 0, KIB4), mapping(MIB2, KIB4, KIB4)];
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    world.attach(2, &one, &live[..1]).expect("attached");
    moves(&world);
    // What the group has at each moment is what one of the two spaces has.
    let (before, model) = (world.contents(), Arc::downgrade(&world.model));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    world.model.set_hook(move |_, _| {
        log.lock().expect("whole").push(model.upgrade().expect("it calls").contents(GroupId(1)));
    });
    world.attach(1, &two, &live).expect("attached");
    let after = world.contents();
    assert_eq!(after.keys().copied().collect::<Vec<_>>(), [0, MIB2]);
    let seen = seen.lock().expect("whole").clone();
    assert!(seen.iter().all(|held| *held == before || *held == after), "{seen:x?}");
    // The identity space stays, although nobody else is in it.
    assert_eq!(moves(&world), [HostOp::Create, HostOp::Attach(GroupId(1))]);
    // The third is there already.
    world.attach(1, &one, &live[..1]).expect("attached");
    assert_eq!(moves(&world), [HostOp::Attach(GroupId(1)), HostOp::Destroy]);
    assert_eq!(world.model.space_of(GroupId(1)), world.model.space_of(GroupId(2)));
    // One change is one host operation for both.
    world.model.served();
    world.done(&one, &[map(GIB, 0, KIB4)]);
    assert_eq!(world.model.served().len(), 1);
    assert!(world.model.translate(GroupId(1), GIB).is_some() && world.model.translate(GroupId(2), GIB).is_some());
    for device in [1, 2] {
        world.bridge.detach(requester(device).into());
    }
    assert_eq!((world.model.spaces(), world.contents().len()), (1, 0));
    assert_eq!(world.stats(1), world.stats(2), "its spaces are counted together");
    assert_eq!((world.stats(1).live_extents, world.stats(1).live_bytes), world.model.totals());
}

#[test]
fn c2_a_group_that_cannot_be_attached_reaches_nothing() {
    for fails in [HostOp::Create, HostOp::Attach(GroupId(1))] {
        let world = World::per_space(Kernel::new(48), RAM, &[(1, 1), (2, 2)]);
        let space = paged(1, 48);
        world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
        world.model.inject(move |_, op| (*op == fails).then_some(libc::EINVAL));
        let refused = world.attach(1, &space, &[mapping(0, 0, KIB4)]);
        assert!(matches!(refused, Err(AttachRefused::Host { .. })), "{fails:?}: {refused:?}");
        assert_eq!((world.contents().len(), world.model.spaces()), (0, 1), "{fails:?}: identity stays");
        assert_eq!(world.bridge.space_of(requester(1)), Some(SpaceKey::Blocked));
        assert!(world.stopped.functions.lock().expect("whole").is_empty(), "it reaches nothing, so it goes on");
        world.model.stop_injecting();
        world.attach(1, &space, &[mapping(0, 0, KIB4)]).expect("attached");
        assert_eq!(world.contents().len(), 1);
    }
}

#[test]
fn b11_a_group_that_cannot_be_detached_is_stopped() {
    let world = World::per_space(Kernel::new(48), RAM, &[(1, 1), (2, 1), (3, 2)]);
    for device in [1, 2, 3] {
        world.attach(device, &SpaceKey::Identity, &[]).expect("attached");
    }
    world.model.inject(|_, op| matches!(op, HostOp::Detach(GroupId(1))).then_some(libc::EIO));
    // Its members disagree, so it is to reach nothing (C-3).
    let refused = world.attach(1, &paged(1, 48), &[]);
    assert!(matches!(refused, Err(AttachRefused::Host { .. })), "{refused:?}");
    // Who is in that space with it is stopped, too: nothing is known of the host any more.
    let stopped = world.stopped.functions.lock().expect("whole").clone();
    assert_eq!(stopped, [requester(1), requester(2), requester(3)]);
}

#[test]
fn b11_an_unmap_that_fails_stops_all_groups_of_the_space_and_nobody_else() {
    let world = World::per_space(Kernel::new(48), RAM, &[(1, 1), (2, 2), (3, 3)]);
    let (one, two) = (paged(1, 48), paged(2, 48));
    for (device, space) in [(1, &one), (2, &one), (3, &two)] {
        world.attach(device, space, &[mapping(0, 0, KIB4)]).expect("attached");
    }
    let broken = world.model.space_of(GroupId(1)).expect("attached");
    world.model.inject(move |space, op| (space == broken && matches!(op, HostOp::Unmap(_))).then_some(libc::EIO));
    world.apply(&one, &[unmap(0, 0xfff)]);
    assert_eq!(*world.stopped.functions.lock().expect("whole"), [requester(1), requester(2)]);
    world.done(&two, &[unmap(0, 0xfff), map(MIB2, 0, KIB4)]);
    assert_eq!(world.model.contents(GroupId(3)).len(), 1);
    // Nothing is mapped there any more, and whoever comes has another one.
    world.apply(&one, &[map(GIB, 0, KIB4)]);
    assert_eq!(world.model.translate(GroupId(1), GIB), None);
    world.attach(3, &one, &[mapping(GIB, 0, KIB4)]).expect("attached");
    assert_ne!(world.model.space_of(GroupId(3)), Some(broken));
    let refused = world.attach(1, &two, &[]);
    assert!(matches!(refused, Err(AttachRefused::Host { .. })), "it was stopped: {refused:?}");
    assert_eq!(world.contents().len(), 0, "and it left");
}

#[test]
fn c2_a_space_of_both_kinds_of_hosts_has_its_mappings_everywhere_or_nowhere() {
    let life = Model::new(Kernel { entries: 2, ..Kernel::new(48) }, &[GroupId(1)]);
    let attached = Model::per_space(Kernel::new(48), &[GroupId(2)]);
    let bridge = Bridge::new(vec![life.clone(), attached.clone()], RAM.map(), Arc::new(Stopped::default()));
    assert!(bridge.register(requester(3), GroupId(3)).is_err(), "no host has it");
    for device in [1, 2] {
        bridge.register(requester(device), GroupId(device.into())).expect("new");
    }
    let space = paged(1, 48);
    for device in [1, 2] {
        let mut live = [mapping(0, 0, KIB4)].into_iter();
        bridge.attach(requester(device).into(), &space, &mut live).expect("attached");
    }
    assert_eq!([1, 2].map(|device| bridge.backend(requester(device))), [Some("model"); 2]);
    // The first host has room for one more.
    let refused = bridge.apply(&space, &[map(MIB2, 0, KIB4), map(2 * MIB2, KIB4, KIB4)]).refused;
    assert_eq!(refused.iter().map(|r| (r.range.first, r.cause)).collect::<Vec<_>>(), [(2 * MIB2, RefusalCause::Limit)]);
    for (model, group) in [(&life, 1), (&attached, 2)] {
        let held: Vec<u64> = model.contents(GroupId(group)).into_keys().collect();
        assert_eq!(held, [0, MIB2], "group {group}");
    }
    // A group joins what is there with all of it, or not at all.
    bridge.detach(requester(1).into());
    let three = [mapping(0, 0, KIB4), mapping(MIB2, 0, KIB4), mapping(2 * MIB2, KIB4, KIB4)];
    let joined = bridge.attach(requester(1).into(), &space, &mut three.into_iter());
    assert!(matches!(joined, Err(AttachRefused::Shared(_))), "{joined:?}");
    assert!(life.contents(GroupId(1)).is_empty());
    assert_eq!(attached.contents(GroupId(2)).len(), 2, "the others are not touched");
}

#[test]
fn c2_a_group_is_never_attached_to_less_than_the_others_have() {
    let life = Model::new(Kernel::new(48), &[GroupId(1)]);
    let attached = Model::per_space(Kernel { entries: 1, ..Kernel::new(48) }, &[GroupId(2)]);
    let bridge = Bridge::new(vec![life.clone(), attached.clone()], RAM.map(), Arc::new(Stopped::default()));
    let space = paged(1, 48);
    let live = [mapping(0, 0, KIB4), mapping(MIB2, KIB4, KIB4)];
    for device in [1, 2] {
        bridge.register(requester(device), GroupId(device.into())).expect("new");
    }
    bridge.attach(requester(1).into(), &space, &mut live.into_iter()).expect("attached");
    let joined = bridge.attach(requester(2).into(), &space, &mut live.into_iter());
    assert!(matches!(joined, Err(AttachRefused::Shared(_))), "{joined:?}");
    let moved = attached.served().into_iter().any(|served| matches!(served.op, HostOp::Attach(_)));
    assert!(!moved, "it was there for a moment");
    assert_eq!((attached.spaces(), life.contents(GroupId(1)).len()), (0, 2));
    // Alone it has what there is room for.
    bridge.detach(requester(1).into());
    let alone = bridge.attach(requester(2).into(), &space, &mut live.into_iter());
    assert!(matches!(alone, Err(AttachRefused::Partial(_))), "{alone:?}");
    assert_eq!(attached.contents(GroupId(2)).len(), 1);
}

/// Two threads that are to be in the host at once.
#[derive(Default)]
struct Meeting {
    inside: Mutex<usize>,
    came: Condvar,
}

/// A host whose unmaps wait for each other.
struct Slow {
    inner: Arc<Model>,
    meeting: Meeting,
}

impl HostIommu for Slow {
    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn placement(&self, group: GroupId) -> Option<Placement> {
        self.inner.placement(group)
    }
    fn limits(&self, space: HostSpaceId) -> Limits {
        self.inner.limits(space)
    }
    fn create(&self) -> io::Result<HostSpaceId> {
        self.inner.create()
    }
    fn destroy(&self, space: HostSpaceId) {
        self.inner.destroy(space);
    }
    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        self.inner.attach(group, space)
    }
    fn detach(&self, group: GroupId) -> io::Result<()> {
        self.inner.detach(group)
    }
    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        self.inner.map(space, iova, mem, perm)
    }
    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        let mut inside = self.meeting.inside.lock().expect("whole");
        *inside += 1;
        self.meeting.came.notify_all();
        let waited = self.meeting.came.wait_timeout_while(inside, Duration::from_secs(20), |inside| *inside < 2);
        assert!(!waited.expect("whole").1.timed_out(), "the other one waits for this call");
        self.inner.unmap(space, range)
    }
}

#[test]
fn rule11_host_calls_of_two_spaces_overlap_in_time() {
    let groups = [GroupId(1), GroupId(2)];
    for inner in [Model::new(Kernel::new(48), &groups), Model::per_space(Kernel::new(48), &groups)] {
        let host = Arc::new(Slow { inner: inner.clone(), meeting: Meeting::default() });
        let bridge = Arc::new(Bridge::new(vec![host], RAM.map(), Arc::new(Stopped::default())));
        let spaces = [paged(1, 48), paged(2, 48)];
        for (device, space) in [(1, &spaces[0]), (2, &spaces[1])] {
            bridge.register(requester(device), GroupId(device.into())).expect("new");
            let mut live = [mapping(0, 0, KIB4)].into_iter();
            bridge.attach(requester(device).into(), space, &mut live).expect("attached");
        }
        let changes = spaces.map(|space| {
            let bridge = bridge.clone();
            thread::spawn(move || bridge.apply(&space, &[unmap(0, 0xfff)]))
        });
        for change in changes {
            assert!(change.join().expect("the other one waits for this call").refused.is_empty());
        }
        assert_eq!(groups.map(|group| inner.contents(group).len()), [0, 0]);
    }
}

/// A machine's memory, and a device's of one page at [`DEVICE`] in it.
fn with_device(hva: u64) -> vfio_bridge::GuestMap {
    // SAFETY: the model never uses the address.
    let device = unsafe { Region::ram(DEVICE, KIB4, hva, None) }.expect("a page");
    vfio_bridge::GuestMap::new(RAM.regions().into_iter().chain([device]).collect()).expect("they do not overlap")
}

const DEVICE: u64 = 0xc000_0000;

#[test]
fn identity_follows_a_guest_physical_map_that_changes() {
    for make in [World::new, World::per_space] {
        let world = make(Kernel::new(48), RAM, &[(1, 1), (2, 2)]);
        world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
        world.attach(2, &paged(1, 48), &[mapping(0, KIB4, KIB4)]).expect("attached");
        let (ram, other) = (world.contents(), world.model.contents(GroupId(2)));
        world.model.served();
        for hva in [1u64 << 40, 1 << 41] {
            world.bridge.replace_guest_map(with_device(hva));
            assert_eq!(world.model.translate(GroupId(1), DEVICE), Some((hva, Perm::ReadWrite)));
            assert_eq!(world.contents().len(), ram.len() + 1);
        }
        world.bridge.replace_guest_map(RAM.map());
        assert_eq!(world.contents(), ram);
        assert_eq!(world.model.contents(GroupId(2)), other);
        // It came, moved and went: nothing else was touched.
        assert_eq!(world.model.counts().0, ram.len() as u64 + 1 + 2);
        assert_eq!(world.unmaps().len(), 2);
    }
}

#[test]
fn rule4_what_stays_of_a_cut_is_the_memory_that_was_mapped_or_nothing() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1)]);
    let space = paged(1, 48);
    world.bridge.replace_guest_map(with_device(1 << 40));
    world.attach(1, &space, &[]).expect("attached");
    // SAFETY: the model never uses the address.
    let two = |hva| unsafe { Region::ram(DEVICE, 2 * KIB4, hva, None) }.expect("pages");
    let map_of = |hva| vfio_bridge::GuestMap::new(vec![two(hva)]).expect("one region");
    world.bridge.replace_guest_map(map_of(1 << 40));
    world.done(&space, &[map(0, DEVICE, 2 * KIB4)]);
    world.bridge.replace_guest_map(map_of(1 << 41));
    // The second page is not what the ledger has any more, so it is not mapped again as if it were.
    let refused = world.apply(&space, &[unmap(0, 0xfff)]).refused;
    assert_eq!(refused.iter().map(|r| (r.range.first, r.cause)).collect::<Vec<_>>(), [(KIB4, RefusalCause::Target)]);
    assert!(world.contents().is_empty());
}
