//! Models: pinning and the unmap that waits for clients, the code itself, under loom, which tries every order of the
//! threads (with a bound on how often one is interrupted). What is mapped is one flag here, guarded by the lock that
//! guards the pins; guest memory is a cell of which loom checks that all accesses of it are ordered.
// The code of the crate is compiled once more, and not all of it is used here.
#![allow(dead_code)]
// loom's threads are turns of one thread, and its cell is made for that.
#![allow(clippy::arc_with_non_send_sync)]

mod vfio_user {
    pub(crate) use vfio_bridge::vfio_user::CALL_DEADLINE;
}
#[path = "../../src/bridge/pin/book.rs"]
mod book;
#[path = "../../src/bridge/pin/clear.rs"]
mod clear;
#[path = "../../src/bridge/pin/client.rs"]
mod client;

/// What `src/bridge/pin/sync.rs` has, over loom.
mod sync {
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    use std::io;
    use std::time::Duration;

    /// Loom has no time: a deadline of less than a second is over at once, any other never.
    #[derive(Clone, Copy)]
    pub(crate) struct Deadline {
        over: bool,
    }

    impl Deadline {
        pub(crate) fn after(time: Duration) -> Self {
            Self { over: time < Duration::from_secs(1) }
        }
    }

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap()
    }

    pub(crate) fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        changed.wait(guard).unwrap()
    }

    pub(crate) fn wait_until<'a, T>(
        changed: &Condvar,
        guard: MutexGuard<'a, T>,
        deadline: Deadline,
    ) -> Option<MutexGuard<'a, T>> {
        if deadline.over { None } else { Some(wait(changed, guard)) }
    }

    pub(crate) fn start(_name: String, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        drop(loom::thread::spawn(run));
        Ok(())
    }

    /// What lasts as long as it is there.
    pub(crate) struct Inside;

    pub(crate) fn inside() -> Inside {
        Inside
    }
}

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use book::{ClientId, Going, PinError, Pins};
use clear::{HasPins, clear};
use client::{Client, Notice, PinLimits, UnmapNotifier};
use loom::cell::UnsafeCell;
use loom::thread;
use sync::{Mutex, lock};
use vtd::{IovaRange, Requester, SourceId};

const PAGE: u64 = 0x5000;
const OTHER: u64 = 0x9000;
const GOING: [IovaRange; 1] = [IovaRange::new(PAGE, PAGE + 0xfff)];

fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(run);
}

struct State {
    /// Whether [`PAGE`] is mapped; [`OTHER`] always is.
    mapped: bool,
    pins: Pins,
}

impl HasPins for State {
    fn pins(&mut self) -> &mut Pins {
        &mut self.pins
    }
}

/// Memory that one thread at a time may access.
struct Memory(UnsafeCell<()>);

// SAFETY: loom's threads are turns of one thread; what the cell is for is to find accesses that are not ordered.
unsafe impl Sync for Memory {}
// SAFETY: as above.
unsafe impl Send for Memory {}

impl Memory {
    fn access(&self) {
        self.0.with_mut(|_| ());
    }
}

/// A space of the host with its clients, and the memory that [`PAGE`] leads to.
struct World {
    state: Mutex<State>,
    memory: Memory,
}

impl World {
    fn new() -> Arc<Self> {
        let state = State { mapped: true, pins: Pins::default() };
        Arc::new(Self { state: Mutex::new(state), memory: Memory(UnsafeCell::new(())) })
    }

    fn client(&self, notifier: Arc<dyn UnmapNotifier>, deadline: Duration) -> (ClientId, Arc<Client>) {
        let requester = Requester { segment: 0, sid: SourceId(8) };
        let client = Client::start(requester, notifier, PinLimits { pages: 4, deadline }).unwrap();
        (lock(&self.state).pins.add(Arc::clone(&client)), client)
    }

    /// As `PinClient::pin`.
    fn pin(&self, id: ClientId, iova: u64) -> Result<(), PinError> {
        let mut state = lock(&self.state);
        if iova == PAGE && !state.mapped {
            return Err(PinError::NotMapped(iova));
        }
        state.pins.pin(id, &[(iova, iova)])
    }

    fn unpin(&self, id: ClientId, iova: u64) -> Result<(), PinError> {
        lock(&self.state).pins.unpin(id, &[iova])
    }

    /// I/O to a page that is pinned meanwhile.
    fn transfer(&self, id: ClientId) {
        if self.pin(id, PAGE).is_ok() {
            self.memory.access();
            // It may have been told to let go in between; then it has nothing to do any more.
            let _ = self.unpin(id, PAGE);
        }
    }

    /// As the bridge unmaps. Who was cut off.
    fn unmap(&self) -> Vec<String> {
        let (mut state, cut_off) = clear(&self.state, lock(&self.state), Going::Ranges(&GOING));
        state.mapped = false;
        assert!(state.pins.pages().all(|(iova, _)| iova != PAGE));
        cut_off
    }

    fn leave(&self, (id, client): &(ClientId, Arc<Client>)) {
        lock(&self.state).pins.remove(*id);
        client.close();
    }
}

/// Long enough for loom: for ever.
const PATIENCE: Duration = Duration::from_secs(30);

/// A device that keeps its page pinned until it is told, and what it does then.
struct Device {
    world: Arc<World>,
    id: OnceLock<ClientId>,
    told: std::sync::atomic::AtomicU32,
    then: fn(&World, ClientId),
}

impl UnmapNotifier for Device {
    fn notify(&self, notice: &Notice) {
        let Notice::Unmap { ranges } = notice;
        assert_eq!(ranges[..], GOING);
        self.told.fetch_add(1, Relaxed);
        (self.then)(&self.world, *self.id.get().unwrap());
    }
}

fn device(
    world: &Arc<World>,
    deadline: Duration,
    then: fn(&World, ClientId),
) -> (Arc<Device>, (ClientId, Arc<Client>)) {
    let device = Arc::new(Device { world: Arc::clone(world), id: OnceLock::new(), told: 0.into(), then });
    let client = world.client(device.clone(), deadline);
    device.id.set(client.0).unwrap();
    (device, client)
}

/// The last of the device's I/O, then it lets go.
fn ends(world: &World, id: ClientId) {
    world.memory.access();
    world.unpin(id, PAGE).unwrap();
}

#[test]
fn d3_after_an_unmap_memory_is_the_guests_alone() {
    model(2, || {
        let world = World::new();
        let (device, client) = device(&world, PATIENCE, ends);
        world.pin(client.0, PAGE).unwrap();
        assert_eq!(world.unmap(), [""; 0]);
        // The guest uses it for itself.
        world.memory.access();
        assert_eq!((device.told.load(Relaxed), world.pin(client.0, PAGE)), (1, Err(PinError::NotMapped(PAGE))));
        world.leave(&client);
    });
}

/// Pins, unpins and unmaps in three threads, of a device that answers only when its I/O is over.
#[test]
fn d3_pin_unpin_and_unmap_in_three_threads() {
    model(2, || {
        let world = World::new();
        // Its I/O is what the other threads do, each under a lock of the device that its answer waits for.
        struct Locked {
            world: Arc<World>,
            id: OnceLock<ClientId>,
            io: Mutex<()>,
        }
        impl UnmapNotifier for Locked {
            fn notify(&self, _: &Notice) {
                let _io = lock(&self.io);
                let id = *self.id.get().unwrap();
                while self.world.unpin(id, PAGE).is_ok() {}
            }
        }
        let device = Arc::new(Locked { world: Arc::clone(&world), id: OnceLock::new(), io: Mutex::new(()) });
        let client = world.client(device.clone(), PATIENCE);
        device.id.set(client.0).unwrap();
        world.pin(client.0, PAGE).unwrap();
        let threads = [0, 1].map(|number| {
            let (world, device, id) = (Arc::clone(&world), Arc::clone(&device), client.0);
            thread::spawn(move || {
                let _io = lock(&device.io);
                if number == 0 {
                    world.transfer(id);
                } else {
                    let _ = world.unpin(id, PAGE);
                }
            })
        });
        assert_eq!(world.unmap(), [""; 0]);
        world.memory.access();
        for thread in threads {
            thread.join().unwrap();
        }
        world.leave(&client);
    });
}

#[test]
fn d3_a_client_that_pins_again_while_it_is_told_is_refused_there_only() {
    model(2, || {
        let world = World::new();
        let (_, client) = device(&world, PATIENCE, |world, id| {
            assert_eq!(world.pin(id, PAGE), Err(PinError::GoingAway(PAGE)));
            world.pin(id, OTHER).unwrap();
            ends(world, id);
            assert_eq!(world.pin(id, PAGE), Err(PinError::GoingAway(PAGE)));
        });
        world.pin(client.0, PAGE).unwrap();
        assert_eq!(world.unmap(), [""; 0]);
        assert_eq!(lock(&world.state).pins.pages().collect::<Vec<_>>(), [(OTHER, 1)]);
        world.leave(&client);
    });
}

#[test]
fn d3_a_client_that_never_unpins_is_cut_off() {
    model(2, || {
        let world = World::new();
        let (_, client) = device(&world, PATIENCE, |_, _| ());
        let racing = thread::spawn({
            let (world, id) = (Arc::clone(&world), client.0);
            move || {
                let _ = world.pin(id, PAGE);
            }
        });
        let cut_off = world.unmap();
        racing.join().unwrap();
        // Unless it pinned too late.
        let left = client.1.counters.left_pinned.load(Relaxed);
        assert_eq!(cut_off.len() as u64, left);
        assert_eq!(left == 1, world.pin(client.0, OTHER) == Err(PinError::CutOff));
        world.leave(&client);
    });
}

#[test]
fn d3_a_client_that_never_answers_is_cut_off_when_its_time_is_over() {
    model(2, || {
        let world = World::new();
        let (_, client) = device(&world, Duration::from_millis(1), |_, _| ());
        world.pin(client.0, PAGE).unwrap();
        assert_eq!(world.unmap().len(), 1);
        assert_eq!(world.pin(client.0, OTHER), Err(PinError::CutOff));
        world.leave(&client);
    });
}

#[test]
fn d4_a_client_that_leaves_while_it_is_told_is_not_waited_for() {
    model(2, || {
        let world = World::new();
        let (_, client) = device(&world, PATIENCE, ends);
        world.pin(client.0, OTHER).unwrap();
        let leaves = thread::spawn({
            let world = Arc::clone(&world);
            move || world.leave(&client)
        });
        assert_eq!(world.unmap(), [""; 0]);
        leaves.join().unwrap();
        assert_eq!(lock(&world.state).pins.pages().count(), 0);
    });
}
