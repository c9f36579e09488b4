//! Dirty tracking over the model, case by case: E-1 to E-4.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vfio_bridge::faulty::{Call, Failure, Faulty};
use vfio_bridge::model::{Held, Kernel, Model};
use vfio_bridge::{DirtyError, DirtyKnowledge, DirtyPages, DirtyRace, GroupId, UnmapRange};
use vtd::{MapOp, Mapping, Perm, SpaceKey, SpaceListener};

use crate::world::*;

const RAM: Ram = Ram { low: 64 * KIB4, high: 16 * KIB4 };
pub const GROUPS: [GroupId; 2] = [GroupId(1), GroupId(2)];

const NOTHING: [u64; 0] = [];

/// Guest-physical addresses of pages.
pub fn pages(dirty: &DirtyPages) -> Vec<u64> {
    dirty.ranges(KIB4).iter().flat_map(|range| (range.first..=range.last).step_by(4096)).collect()
}

/// Where a host address is in guest memory.
pub fn gpa(hva: u64) -> u64 {
    if hva >= HIGH_HVA { HIGH_GPA + (hva - HIGH_HVA) } else { hva - LOW_HVA }
}

impl World {
    pub fn read_dirty(&self) -> (Vec<u64>, DirtyKnowledge) {
        let read = self.bridge.dirty_read(None).expect("tracked");
        (pages(&read.pages), read.known.iter().map(|(_, known)| *known).max().unwrap_or_default())
    }

    /// The pages alone.
    fn dirty(&self) -> Vec<u64> {
        self.read_dirty().0
    }

    fn write(&self, group: u32, iova: u64) {
        self.model.write(GroupId(group), iova).expect("mapped, and writable");
    }

    fn start(&self, race: DirtyRace) -> DirtyKnowledge {
        let known = self.bridge.dirty_start(None, race).expect("all");
        known.iter().map(|(_, known)| *known).max().expect("a function")
    }
}

fn read_only(iova: u64, gpa: u64, len: u64) -> MapOp {
    MapOp::Map(Mapping { perm: Perm::Read, ..mapping(iova, gpa, len) })
}

fn one() -> (World, SpaceKey) {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    (world, space)
}

#[test]
fn e1_tracking_is_started_read_and_stopped() {
    let (world, space) = one();
    world.done(&space, &[map(GIB, 8 * KIB4, 8 * KIB4)]);
    assert_eq!(world.bridge.dirty_read(None), Err(DirtyError::Off));
    assert_eq!(world.bridge.dirty_read(Some(requester(1))), Err(DirtyError::NotTracked(requester(1))));
    assert_eq!(world.bridge.dirty_read(Some(requester(9))), Err(DirtyError::Unknown(requester(9))));
    world.write(1, GIB);
    assert_eq!(world.start(DirtyRace::Open), DirtyKnowledge::Exact);
    assert_eq!(world.dirty(), NOTHING, "it was written before");
    world.write(1, GIB + 3 * KIB4 + 5);
    world.write(1, GIB + KIB4);
    assert_eq!(world.read_dirty(), (vec![9 * KIB4, 11 * KIB4], DirtyKnowledge::Exact));
    assert_eq!(world.dirty(), NOTHING, "read is clean");
    world.write(1, GIB);
    assert_eq!(world.start(DirtyRace::Open), DirtyKnowledge::Exact, "it goes on");
    assert_eq!(world.dirty(), [8 * KIB4]);
    world.write(1, GIB);
    assert_eq!(world.bridge.dirty_stop(None), Ok(()));
    assert!(!world.model.tracks(world.model.space_of(GroupId(1)).expect("for life")));
    assert_eq!(world.bridge.dirty_read(None), Err(DirtyError::Off));
    world.start(DirtyRace::Open);
    assert_eq!(world.dirty(), NOTHING, "what was not read is forgotten");
}

#[test]
fn e1_a_function_that_comes_is_tracked_with_all_and_a_single_one_without_the_others() {
    let model = Model::new(Kernel::new(48), &GROUPS);
    let world = World::through(model.clone(), model, RAM, &[(1, 1)]);
    world.bridge.dirty_start(None, DirtyRace::Open).expect("all");
    world.bridge.register(requester(2), GroupId(2)).expect("new");
    world.attach(2, &SpaceKey::Identity, &[]).expect("attached");
    world.write(2, 5 * KIB4);
    assert_eq!(world.dirty(), [5 * KIB4]);
    world.bridge.dirty_stop(None).expect("all");

    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    world.bridge.dirty_start(Some(requester(2)), DirtyRace::Open).expect("known");
    world.write(1, KIB4);
    world.write(2, 2 * KIB4);
    let read = world.bridge.dirty_read(None).expect("one");
    assert_eq!((pages(&read.pages), read.known), (vec![2 * KIB4], vec![(requester(2), DirtyKnowledge::Exact)]));
    assert_eq!(world.bridge.dirty_read(Some(requester(1))), Err(DirtyError::NotTracked(requester(1))));
}

#[test]
fn e1_a_host_that_cannot_tell_has_all_that_can_be_written_dirty_at_each_read() {
    let (world, space) = one();
    world.model.set_dirty_knowledge(DirtyKnowledge::CannotTell);
    world.done(&space, &[map(GIB, 0, 2 * KIB4), read_only(2 * GIB, 8 * KIB4, 2 * KIB4)]);
    assert_eq!(world.start(DirtyRace::Open), DirtyKnowledge::CannotTell);
    for _ in 0..2 {
        assert_eq!(world.read_dirty(), (vec![0, KIB4], DirtyKnowledge::CannotTell));
    }
    // What could be written until it went.
    world.done(&space, &[map(3 * GIB, 20 * KIB4, KIB4)]);
    world.done(&space, &[unmap(0, u64::MAX)]);
    assert_eq!(world.read_dirty(), (vec![0, KIB4, 20 * KIB4], DirtyKnowledge::CannotTell));
    assert_eq!(world.read_dirty(), (vec![], DirtyKnowledge::CannotTell), "nothing can be written");
}

#[test]
fn e1_where_whole_mappings_are_dirty_what_is_read_only_is_not() {
    let (world, space) = one();
    world.model.set_dirty_knowledge(DirtyKnowledge::WholeMappings);
    world.done(&space, &[map(GIB, 0, 2 * KIB4), read_only(GIB + 2 * KIB4, 8 * KIB4, 2 * KIB4)]);
    assert_eq!(world.start(DirtyRace::Closed), DirtyKnowledge::WholeMappings);
    assert_eq!(world.read_dirty(), (vec![0, KIB4], DirtyKnowledge::WholeMappings));
    world.done(&space, &[unmap(GIB + 2 * KIB4, GIB + 4 * KIB4 - 1)]);
    assert_eq!(world.dirty(), [0, KIB4]);
    world.done(&space, &[unmap(0, u64::MAX)]);
    assert_eq!(world.dirty(), [0, KIB4]);
    assert_eq!(world.dirty(), NOTHING);
}

#[test]
fn e1_a_host_that_ends_at_the_first_hole_is_asked_for_what_has_none() {
    let (world, space) = one();
    world.model.stop_at_holes();
    // Two that touch, one behind a hole of a page, and one far away.
    world.done(&space, &[map(GIB, 0, 2 * KIB4), map(GIB + 2 * KIB4, 8 * KIB4, KIB4)]);
    world.done(&space, &[map(GIB + 4 * KIB4, 16 * KIB4, KIB4), map(8 * GIB, 24 * KIB4, 2 * KIB4)]);
    let all = [GIB, GIB + KIB4, GIB + 2 * KIB4, GIB + 4 * KIB4, 8 * GIB, 8 * GIB + KIB4];
    let gpas = [0, KIB4, 8 * KIB4, 16 * KIB4, 24 * KIB4, 25 * KIB4];
    world.start(DirtyRace::Open);
    all.iter().for_each(|iova| world.write(1, *iova));
    assert_eq!(world.read_dirty(), (gpas.to_vec(), DirtyKnowledge::Exact));
    // And when they go, together.
    all.iter().for_each(|iova| world.write(1, *iova));
    world.done(&space, &[unmap(0, u64::MAX)]);
    assert_eq!(world.dirty(), gpas);
    assert_eq!(world.dirty(), NOTHING);
}

#[test]
fn e1_what_cannot_be_started_or_read_is_never_clean() {
    for nth in 1..3 {
        let model = Model::new(Kernel::new(48), &GROUPS[..1]);
        let faulty = Faulty::new(model.clone());
        let world = World::through(faulty.clone(), model, RAM, &[(1, 1)]);
        let space = paged(1, 48);
        world.attach(1, &space, &[]).expect("attached");
        world.done(&space, &[map(GIB, 0, 2 * KIB4), read_only(2 * GIB, 8 * KIB4, 2 * KIB4)]);
        faulty.fail(faulty.calls() + nth, Failure::DoneAndRefused(libc::EINVAL));
        world.start(DirtyRace::Open);
        world.write(1, GIB);
        assert_eq!(world.read_dirty(), (vec![0, KIB4], DirtyKnowledge::CannotTell), "call {nth}");
        assert_eq!(faulty.failed(), Some(Call::Dirty));
    }
}

#[test]
fn e2_pages_that_are_unmapped_between_two_reads_are_reported() {
    let (world, space) = one();
    world.start(DirtyRace::Open);
    world.done(&space, &[map(GIB, 0, 4 * KIB4), map(2 * GIB, HIGH_GPA, 4 * KIB4)]);
    world.write(1, GIB + KIB4);
    world.write(1, 2 * GIB + 3 * KIB4);
    // One page is cut out of the first, and all of the second goes.
    world.done(&space, &[unmap(GIB + 2 * KIB4, GIB + 3 * KIB4 - 1), unmap(2 * GIB, 3 * GIB - 1)]);
    assert_eq!(world.stats(1).splits, 1);
    // The same IOVA leads elsewhere now.
    world.done(&space, &[map(2 * GIB, 20 * KIB4, 4 * KIB4)]);
    assert_eq!(world.dirty(), [KIB4, HIGH_GPA + 3 * KIB4]);
    world.write(1, 2 * GIB + 3 * KIB4);
    assert_eq!(world.dirty(), [23 * KIB4]);
}

#[test]
fn e2_unmaps_of_everything_go_by_extents_while_devices_are_tracked() {
    let (world, space) = one();
    let all = || {
        world.done(&space, &[map(GIB, 0, KIB4), map(1 << 46, 8 * KIB4, KIB4)]);
        world.model.served();
        world.done(&space, &[unmap(0, u64::MAX)]);
        world.unmaps()
    };
    assert_eq!(all(), [UnmapRange::All]);
    world.start(DirtyRace::Open);
    // And no bitmap spans the hole between them.
    let page = |first| UnmapRange::Span { first, last: first + (KIB4 - 1) };
    assert_eq!(all(), [page(GIB), page(1 << 46)]);
    world.bridge.dirty_stop(None).expect("all");
    assert_eq!(all(), [UnmapRange::All]);
}

/// A device writes by cached translations until the IOTLB is flushed.
fn written_in_the_window(world: &World, space: &SpaceKey) -> Vec<u64> {
    world.model.set_window(|held: &[Held]| held.iter().map(|held| held.iova + KIB4).collect());
    world.done(space, &[map(GIB, 0, 4 * KIB4)]);
    world.write(1, GIB + 2 * KIB4);
    world.done(space, &[unmap(0, u64::MAX)]);
    world.dirty()
}

#[test]
fn e3_a_write_in_the_window_of_an_unmap_is_lost_unless_it_is_closed() {
    let (world, space) = one();
    world.start(DirtyRace::Open);
    assert_eq!(written_in_the_window(&world, &space), [2 * KIB4], "the race");
    world.start(DirtyRace::Closed);
    assert_eq!(written_in_the_window(&world, &space), [KIB4, 2 * KIB4]);
    world.start(DirtyRace::Open);
    assert_eq!(written_in_the_window(&world, &space), [2 * KIB4], "the option can be taken back");
}

#[test]
fn e3_where_the_window_cannot_be_closed_the_whole_mapping_is_dirty() {
    let (world, space) = one();
    world.model.cannot_close_window();
    assert_eq!(world.start(DirtyRace::Closed), DirtyKnowledge::Exact);
    world.done(&space, &[read_only(2 * GIB, 8 * KIB4, KIB4)]);
    assert_eq!(written_in_the_window(&world, &space), [0, KIB4, 2 * KIB4, 3 * KIB4]);
    world.start(DirtyRace::Open);
    assert_eq!(written_in_the_window(&world, &space), [2 * KIB4], "as it was asked for");
}

#[test]
fn e4_nothing_is_lost_when_a_group_moves_whatever_the_host_is() {
    for per_space in [false, true] {
        let make = if per_space { World::per_space } else { World::new };
        let world = make(Kernel::new(48), RAM, &[(1, 1), (2, 2)]);
        let (a, b) = (paged(1, 48), paged(2, 48));
        world.start(DirtyRace::Open);
        world.attach(1, &a, &[mapping(GIB, 0, 4 * KIB4)]).expect("attached");
        world.attach(2, &a, &[mapping(GIB, 0, 4 * KIB4)]).expect("attached");
        let device = |n: u8| pages(&world.bridge.dirty_read(Some(requester(n))).expect("tracked").pages);
        world.write(1, GIB);
        world.attach(1, &b, &[mapping(GIB, 8 * KIB4, 4 * KIB4)]).expect("a switch");
        world.write(1, GIB + KIB4);
        world.attach(1, &SpaceKey::Identity, &[]).expect("identity");
        world.write(1, 20 * KIB4);
        world.bridge.detach(requester(1).into());
        assert_eq!(device(1), [0, 9 * KIB4, 20 * KIB4]);
        // What was written by a space that both were in is known of both.
        assert_eq!(device(2), if per_space { vec![0] } else { vec![] });
        // Who comes to a space has not written what was written there before.
        world.write(2, GIB + 2 * KIB4);
        world.attach(1, &a, &[mapping(GIB, 0, 4 * KIB4)]).expect("joins");
        assert_eq!((device(1), device(2)), (vec![], vec![2 * KIB4]));
        world.write(2, GIB + 3 * KIB4);
        world.attach(2, &SpaceKey::Blocked, &[]).expect("blocked");
        assert_eq!(world.dirty(), [3 * KIB4]);
        // A space that nobody is in any more is given back with its dirty bits.
        world.write(1, GIB);
        world.attach(1, &SpaceKey::Blocked, &[]).expect("blocked");
        // Identity stays.
        assert_eq!(world.model.spaces(), if per_space { 1 } else { 2 });
        assert_eq!(world.dirty(), [0]);
        assert_eq!(world.dirty(), NOTHING);
    }
}

#[test]
fn e4_of_a_space_whose_unmap_failed_everything_that_can_be_written_is_dirty() {
    let (world, space) = one();
    world.start(DirtyRace::Open);
    world.done(&space, &[map(GIB, 0, 2 * KIB4), read_only(2 * GIB, 8 * KIB4, KIB4)]);
    world.model.inject(|_, op| matches!(op, vfio_bridge::model::HostOp::Unmap(_)).then_some(libc::EIO));
    world.apply(&space, &[unmap(0, u64::MAX)]);
    assert_eq!(*world.stopped.functions.lock().expect("whole"), [requester(1)]);
    for _ in 0..2 {
        assert_eq!(world.read_dirty(), (vec![0, KIB4], DirtyKnowledge::CannotTell));
    }
}

/// Reads while the guest maps and unmaps without pause and its device writes: each write is in one of the reads, and
/// nothing else is.
#[test]
fn e4_nothing_is_lost_to_unmaps_while_another_thread_reads() {
    for per_space in [false, true] {
        let make = if per_space { World::per_space } else { World::new };
        let world = Arc::new(make(Kernel::new(48), RAM, &[(1, 1)]));
        let space = paged(1, 48);
        world.attach(1, &space, &[]).expect("attached");
        world.start(DirtyRace::Closed);
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (world, done) = (Arc::clone(&world), Arc::clone(&done));
            std::thread::spawn(move || {
                let mut found: Vec<Vec<u64>> = Vec::new();
                while !done.load(Ordering::Acquire) {
                    found.push(world.dirty());
                }
                found
            })
        };
        let mut written = Vec::new();
        for round in 0..2000u64 {
            let (target, write) = (round * 7 % 60, round * 5 % 4);
            world.done(&space, &[map(GIB, target * KIB4, 4 * KIB4)]);
            world.write(1, GIB + write * KIB4);
            written.push((target + write) * KIB4);
            world.done(&space, &[unmap(GIB, GIB + 4 * KIB4 - 1)]);
        }
        done.store(true, Ordering::Release);
        let mut found = reader.join().expect("reads");
        found.push(world.dirty());
        // Every page was written more than once: each time in a read, or in the one that an earlier write was in.
        let total: usize = found.iter().map(Vec::len).sum();
        assert!(total <= written.len(), "{total} pages for {} writes", written.len());
        let (found, written): (BTreeSet<u64>, BTreeSet<u64>) =
            (found.into_iter().flatten().collect(), written.into_iter().collect());
        assert_eq!(found, written);
    }
}
