//! What a hostile guest does again and again, or as much of as it can, costs the bridge a bounded amount of memory,
//! time and log (rule 5). Every allocation of the test's thread is counted, and so is every line that it logs.

#[path = "../bridge/world.rs"]
// The tests of behaviours use the rest of it.
#[allow(dead_code)]
mod world;

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use allocation_counter::measure;
use vfio_bridge::ledger::{Extent, Ledger};
use vfio_bridge::model::{HostOp, Kernel, Model};
use vfio_bridge::{Bridge, GroupId, Trace, TracedHost, TracedListener};
use vtd::{MapOp, Mapping, Perm, SpaceKey, SpaceListener};

use world::{GIB, KIB4, Ram, Stopped, World, map, mapping, paged, requester, unmap};

const RAM: Ram = Ram { low: 2 * GIB, high: 4 * GIB };

thread_local! {
    static LINES: Cell<u64> = const { Cell::new(0) };
}

struct Count;

impl log::Log for Count {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Info
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.set(LINES.get() + 1);
        }
    }

    fn flush(&self) {}
}

/// What the second half of the rounds took.
struct Cost {
    /// The most memory on top of what was there before it, in bytes.
    most: u64,
    /// Log lines of both halves.
    lines: u64,
}

/// Does `round` `rounds` times, and as often again, and no memory may be left of the second half: less than a byte for
/// each round.
fn flat(rounds: u64, round: impl FnMut(u64)) -> Cost {
    // Only the first of the tests that do this succeeds.
    let _ = log::set_logger(&Count);
    log::set_max_level(log::LevelFilter::Trace);
    LINES.set(0);
    let round = RefCell::new(round);
    (0..rounds).for_each(|number| (round.borrow_mut())(number));
    let second = measure(|| (rounds..2 * rounds).for_each(|number| (round.borrow_mut())(number)));
    assert!(
        second.bytes_current < rounds as i64,
        "{} bytes are left of {rounds} rounds, in {} pieces",
        second.bytes_current,
        second.count_current
    );
    Cost { most: second.bytes_max, lines: LINES.get() }
}

#[test]
#[should_panic(expected = "bytes are left of 100 rounds")]
fn what_is_kept_is_seen() {
    let mut kept = Vec::new();
    flat(100, |number| kept.push(Box::new(number)));
}

#[test]
fn rule5_memory_is_flat_over_maps_and_unmaps_without_end() {
    let (world, space) = World::one(Kernel::new(48), 48);
    let cost = flat(2000, |round| {
        // Pages that do not touch, elsewhere each round, and at last everything at once.
        let base = (round % 1000) << 24;
        let maps: Vec<MapOp> = (0..16).map(|page| map(base + page * 2 * KIB4, page * KIB4, KIB4)).collect();
        world.done(&space, &maps);
        let unmaps: Vec<MapOp> =
            (0..8).map(|page| unmap(base + page * 2 * KIB4, base + page * 2 * KIB4 + 0xfff)).collect();
        world.done(&space, &unmaps);
        world.done(&space, &[unmap(0, u64::MAX)]);
        world.model.served();
    });
    assert_eq!((world.stats(1).live_extents, world.stats(1).host_maps), (0, 64_000));
    assert!(cost.most < 1 << 16, "{} bytes", cost.most);
    assert_eq!(cost.lines, 0);
}

#[test]
fn rule5_memory_is_flat_over_spaces_without_end() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 2)]);
    let cost = flat(2000, |round| {
        for device in [1, 2] {
            let space = paged((round * 2 + u64::from(device)) as u16, 48);
            let live: Vec<Mapping> =
                (0..16).map(|page| mapping((round + page * 2) * KIB4, page * KIB4, KIB4)).collect();
            world.attach(device, &space, &live).expect("attached");
        }
        if round % 100 == 0 {
            world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
            world.attach(2, &SpaceKey::Blocked, &[]).expect("attached");
        }
        world.model.served();
    });
    assert_eq!(world.stats(1).live_extents, 16);
    assert!(cost.most < 1 << 16, "{} bytes", cost.most);
    assert_eq!(cost.lines, 0);
}

#[test]
fn rule5_memory_is_flat_over_refusals_of_every_kind_and_each_is_said_once() {
    let entries = 64;
    let world = World::new(Kernel { entries, ..Kernel::new(39) }, RAM, &[(1, 1)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    let cost = flat(1000, |round| {
        // More than the host takes; behind its ranges; to where no RAM is; twice what is there already.
        let mut maps: Vec<MapOp> = (0..100).map(|page| map(page * 2 * KIB4, page * KIB4, KIB4)).collect();
        maps.push(map((1 << 40) + round * KIB4, 0, KIB4));
        maps.push(map(GIB, (3 * GIB) + round * KIB4, KIB4));
        maps.push(map(0, KIB4, KIB4));
        assert_eq!(world.apply(&space, &maps).refused.len(), 36 + 3);
        world.done(&space, &[unmap(0, u64::MAX)]);
        world.model.served();
    });
    let refused = world.stats(1).refused_maps;
    assert_eq!((refused.limit, refused.range, refused.target, refused.other), (72_000, 2000, 2000, 2000));
    assert!(cost.most < 1 << 16, "{} bytes", cost.most);
    assert_eq!(cost.lines, 4, "one for each cause");
}

#[test]
fn rule5_memory_and_log_are_flat_over_groups_that_never_agree() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 1)]);
    let cost = flat(1000, |round| {
        let [one, other] = [paged((round * 2) as u16, 48), paged((round * 2 + 1) as u16, 48)];
        let live = [mapping(round % 512 * KIB4, 0, KIB4)];
        // They differ, they agree, one of them leaves: what the other one has is not known any more.
        let _ = world.attach(1, &one, &live);
        let _ = world.attach(2, &other, &live);
        let _ = world.attach(1, &other, &live);
        let _ = world.attach(2, &one, &live);
        world.bridge.detach(requester(1).into());
        world.model.served();
    });
    assert!(cost.most < 1 << 16, "{} bytes", cost.most);
    assert_eq!(cost.lines, 1, "that the group stays blocked is said once");
}

#[test]
fn rule5_memory_and_log_are_flat_over_a_function_that_was_stopped() {
    let (world, space) = World::one(Kernel::new(48), 48);
    *world.stopped.stubborn.lock().expect("whole") = true;
    world.done(&space, &[map(0, 0, KIB4)]);
    world.model.inject(|_, op| matches!(op, HostOp::Unmap(_)).then_some(libc::EIO));
    let cost = flat(1000, |round| {
        world.apply(&space, &[unmap(0, u64::MAX), map(round * KIB4, 0, KIB4)]);
        let _ = world.attach(1, &paged(round as u16, 48), &[mapping(0, 0, KIB4)]);
        world.model.served();
    });
    assert_eq!(world.stats(1).quarantined, 1);
    assert!(*world.stopped.machine.lock().expect("whole"));
    assert!(cost.most < 1 << 16, "{} bytes", cost.most);
    assert_eq!(cost.lines, 2, "the host's refusal, and that it could not be stopped");
}

#[test]
fn rule5_memory_of_a_trace_is_flat() {
    let trace = Trace::new(Box::new(io::sink()));
    let model = Model::new(Kernel::new(48), &[GroupId(1)]);
    let host = Arc::new(TracedHost::new(model.clone(), trace.clone()));
    let bridge = Arc::new(Bridge::new(vec![host], RAM.map(), Arc::new(Stopped::default())));
    bridge.register(requester(1), GroupId(1)).expect("new");
    let listener = TracedListener::new(bridge, trace);
    let space = paged(1, 48);
    listener.attach(requester(1).into(), &space, &mut std::iter::empty()).expect("attached");
    let cost = flat(2000, |round| {
        listener.apply(&space, &[unmap(0, u64::MAX), map(round * KIB4, 0, KIB4), map(GIB, 3 * GIB, KIB4)]);
        model.served();
    });
    assert!(cost.most < 1 << 16, "{} bytes", cost.most);
    assert_eq!(cost.lines, 1);
}

#[test]
fn rule5_refusals_in_a_space_of_two_groups_take_time_by_their_number() {
    const MAPS: u64 = 1 << 17;
    let world = World::new(Kernel { entries: 16, ..Kernel::new(48) }, RAM, &[(1, 1), (2, 2)]);
    let space = paged(1, 48);
    world.attach(1, &space, &[]).expect("attached");
    world.attach(2, &space, &[]).expect("attached");
    let maps: Vec<MapOp> = (0..MAPS).map(|page| map(page * 2 * KIB4, 0, KIB4)).collect();
    let start = Instant::now();
    let applied = world.apply(&space, &maps);
    let time = start.elapsed();
    assert_eq!(applied.refused.len() as u64, MAPS - 16);
    // With a look at each refusal for each map it is minutes.
    assert!(time < Duration::from_secs(20), "{time:?}");
}

#[test]
fn rule5_an_extent_takes_at_most_80_bytes() {
    const EXTENTS: u64 = 300_000;
    let extent = |n: u64| {
        let first = n * 2 * KIB4;
        Extent { first, last: first + KIB4 - 1, gpa: first, hva: 1 << 45 | first, perm: Perm::ReadWrite }
    };
    // Ascending, as a unit tells of a range; and in an order of a guest's own.
    let orders: [fn(u64) -> u64; 3] = [|n| n, |n| EXTENTS - 1 - n, |n| n * 70_001 % EXTENTS];
    for (number, order) in orders.into_iter().enumerate() {
        let mut ledger = Ledger::default();
        let cost = measure(|| (0..EXTENTS).for_each(|n| ledger.insert(extent(order(n)))));
        let each = cost.bytes_current as u64 / EXTENTS;
        assert_eq!(ledger.len() as u64, EXTENTS);
        assert!(each <= 80, "order {number}: {each} bytes an extent");
        println!("order {number}: {each} bytes an extent");
    }
}
