//! Models: the cache of emulated DMA and the posting of interrupts, their code itself, under loom, which tries every
//! order of the threads and every value that the memory model lets a load see. The guest's table is one word here, and
//! guest memory one cell of which loom checks that all accesses of it are ordered.
// The code of the crate is compiled once more, and not all of it is used here.
#![allow(dead_code)]

mod config {
    pub(crate) use vtd::config::MAX_ADDRESS_MASK;
}
mod ids {
    pub(crate) use vtd::{DomainId, Gpa, Pasid, SourceId};
}
#[path = "../../src/dma/iotlb.rs"]
mod iotlb;
#[path = "../../src/tables/posted.rs"]
mod posted;
mod posting;
mod range {
    pub(crate) use vtd::IovaRange;
}
#[path = "../../src/scope.rs"]
mod scope;
mod space {
    pub(crate) use vtd::Perm;
}
mod spec {
    pub(crate) use vtd::spec::{fault, invalidation, irte};
}

/// What `src/sync.rs` has, over loom, and with the smallest tables in which something can go wrong.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};

    pub(crate) const PAGE_SETS: usize = 1;
    pub(crate) const DIRECTORY_SETS: usize = 1;
    pub(crate) const SESSIONS: usize = 2;

    pub(crate) fn fence_after_update() {
        fence(Ordering::SeqCst);
    }

    pub(crate) fn relax(_attempt: u32) {
        loom::thread::yield_now();
    }

    /// All threads begin to look for a session at the same place, which is not the first.
    pub(crate) fn thread_number() -> usize {
        1
    }
}

use std::sync::Arc;

use iotlb::{CachedPage, Iotlb};
use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use scope::Scope;
use vtd::{DomainId, Gpa, IovaRange, Perm};

const DOMAIN: DomainId = DomainId(1);
const PAGE: u64 = 5;
const ONE_PAGE: Scope = Scope::Pages(DOMAIN, IovaRange::new(PAGE << 12, (PAGE << 12) + 0xfff));

/// Tries every order with at most `preemptions` of them, which is what finds faults soonest, and ends them.
fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 20_000;
    builder.check(run);
}

/// An endpoint, the entry of the guest's table that says where `PAGE` leads, and the page that it leads to at first.
struct World {
    iotlb: Iotlb,
    /// 0 is not present.
    entry: AtomicU64,
    memory: UnsafeCell<()>,
}

impl World {
    // loom's threads are turns of one thread, and its cell is made for that.
    #[allow(clippy::arc_with_non_send_sync)]
    fn new(entry: u64) -> Arc<Self> {
        Arc::new(Self { iotlb: Iotlb::default(), entry: AtomicU64::new(entry), memory: UnsafeCell::new(()) })
    }

    /// As `Endpoint::find`: the cache, else a walk, which is cached.
    fn look_up(&self) -> Option<u64> {
        if let Some(page) = self.iotlb.page(PAGE) {
            return Some(page.target().0);
        }
        self.walk()
    }

    fn walk(&self) -> Option<u64> {
        let sampled = self.iotlb.sample();
        if let Some(table) = self.iotlb.directory(sampled, 0) {
            self.iotlb.insert_page(sampled, PAGE, CachedPage::new(Gpa(table), Perm::ReadWrite));
            return Some(table);
        }
        let found = self.entry.load(Ordering::Relaxed);
        if found == 0 {
            return None;
        }
        self.iotlb.note_owner(Some(DOMAIN), None);
        self.iotlb.insert_page(sampled, PAGE, CachedPage::new(Gpa(found), Perm::ReadWrite));
        Some(found)
    }

    /// The device writes where it is led to, in a session.
    fn access(&self) {
        let token = self.iotlb.open_session();
        if self.look_up().is_some() {
            self.memory.with_mut(|_| ());
        }
        self.iotlb.close_session(&token);
    }

    /// The guest takes the page away, and waits.
    fn take_away(&self, scope: Scope) {
        self.entry.store(0, Ordering::Relaxed);
        self.iotlb.invalidate(scope);
        self.iotlb.wait_for_sessions();
    }
}

/// The guest uses the page for itself once its invalidation is done; before that the device may have written it.
fn an_access_and(scope: Scope, cached: bool) {
    model(3, move || {
        let world = World::new(0x9000);
        if cached {
            world.walk();
        }
        let device = thread::spawn({
            let world = world.clone();
            move || world.access()
        });
        world.take_away(scope);
        world.memory.with_mut(|_| ());
        device.join().unwrap();
        assert_eq!(world.look_up(), None);
    });
}

#[test]
fn rule6_an_access_does_not_come_after_an_invalidation_of_its_page() {
    an_access_and(ONE_PAGE, true);
}

#[test]
fn rule6_an_access_does_not_come_after_an_invalidation_of_everything() {
    an_access_and(Scope::Everything, true);
}

#[test]
fn rule6_an_access_that_walks_does_not_come_after_an_invalidation() {
    an_access_and(ONE_PAGE, false);
    an_access_and(Scope::Domain(DOMAIN), false);
}

#[test]
fn rule6_an_access_in_another_session_is_waited_for() {
    model(2, || {
        let world = World::new(0x9000);
        world.walk();
        // One is taken, and stays so until the other is open.
        let first = world.iotlb.open_session();
        let device = thread::spawn({
            let world = world.clone();
            move || {
                let token = world.iotlb.open_session();
                world.iotlb.close_session(&first);
                if world.look_up().is_some() {
                    world.memory.with_mut(|_| ());
                }
                world.iotlb.close_session(&token);
            }
        });
        world.take_away(Scope::Everything);
        world.memory.with_mut(|_| ());
        device.join().unwrap();
    });
}

/// Whatever order the walk and the invalidation come in, what the guest took away is not cached afterwards.
fn a_walk_and(scopes: &'static [Scope], preemptions: usize) {
    model(preemptions, move || {
        let world = World::new(0x9000);
        let walker = thread::spawn({
            let world = world.clone();
            move || world.walk()
        });
        for scope in &scopes[1..] {
            world.iotlb.invalidate(*scope);
        }
        world.take_away(scopes[0]);
        walker.join().unwrap();
        assert_eq!(world.iotlb.page(PAGE), None);
    });
}

#[test]
fn rule6_a_walk_that_an_invalidation_of_its_page_crosses_is_not_cached() {
    a_walk_and(&[ONE_PAGE], 4);
}

#[test]
fn rule6_a_walk_that_an_invalidation_of_its_domain_crosses_is_not_cached() {
    a_walk_and(&[Scope::Domain(DOMAIN)], 4);
}

#[test]
fn rule6_what_a_walk_noted_while_everything_was_forgotten_is_still_noted() {
    a_walk_and(&[Scope::Domain(DOMAIN), Scope::Everything], 4);
    a_walk_and(&[ONE_PAGE, Scope::Everything], 4);
}

#[test]
fn rule6_a_walk_reads_the_tables_of_the_epoch_that_it_began_in() {
    // The guest changes the entry and invalidates; a walk that began afterwards may be cached, and then as it is now.
    model(4, || {
        let world = World::new(0x9000);
        let walker = thread::spawn({
            let world = world.clone();
            move || world.walk()
        });
        world.entry.store(0xa000, Ordering::Relaxed);
        world.iotlb.invalidate(ONE_PAGE);
        walker.join().unwrap();
        assert!(world.iotlb.page(PAGE).is_none_or(|page| page.target() == Gpa(0xa000)));
    });
}

#[test]
fn rule6_a_walk_of_a_large_leaf_is_reached_by_an_invalidation_of_any_part_of_it() {
    model(4, || {
        let world = World::new(0x9000);
        let walker = thread::spawn({
            let world = world.clone();
            move || {
                let sampled = world.iotlb.sample();
                if world.entry.load(Ordering::Relaxed) != 0 {
                    world.iotlb.note_owner(Some(DOMAIN), None);
                    world.iotlb.note_large();
                    world.iotlb.insert_page(sampled, PAGE, CachedPage::new(Gpa(0x9000), Perm::ReadWrite));
                }
            }
        });
        world.iotlb.invalidate(Scope::Everything);
        world.take_away(Scope::Pages(DOMAIN, IovaRange::new(0x6000, 0x6fff)));
        walker.join().unwrap();
        assert_eq!(world.iotlb.page(PAGE), None);
    });
}

#[test]
fn rule6_a_walk_from_a_cached_directory_is_reached_with_it() {
    for scope in [ONE_PAGE, Scope::Domain(DOMAIN)] {
        model(3, move || {
            let world = World::new(0x9000);
            let walkers = [0, 1].map(|number| {
                let world = world.clone();
                thread::spawn(move || {
                    if number == 0 {
                        let sampled = world.iotlb.sample();
                        if world.entry.load(Ordering::Relaxed) != 0 {
                            world.iotlb.note_owner(Some(DOMAIN), None);
                            world.iotlb.insert_directory(sampled, 0, 0x9000);
                        }
                    } else {
                        let sampled = world.iotlb.sample();
                        if let Some(table) = world.iotlb.directory(sampled, 0) {
                            world.iotlb.insert_page(sampled, PAGE, CachedPage::new(Gpa(table), Perm::ReadWrite));
                        }
                    }
                })
            });
            world.take_away(scope);
            for walker in walkers {
                walker.join().unwrap();
            }
            assert_eq!((world.iotlb.page(PAGE), world.iotlb.directory(world.iotlb.sample(), 0)), (None, None));
        });
    }
}

/// Three pages in the two places of one set, so that two threads store in the same; a hit is of the page that was asked
/// for.
#[test]
fn rule6_a_hit_is_of_one_store() {
    model(3, || {
        let iotlb = Arc::new(Iotlb::default());
        let insert = |iotlb: &Iotlb, page: u64| {
            iotlb.insert_page(iotlb.sample(), page, CachedPage::new(Gpa(page << 12), Perm::ReadWrite));
        };
        insert(&iotlb, 1);
        insert(&iotlb, 2);
        let writer = thread::spawn({
            let iotlb = iotlb.clone();
            move || insert(&iotlb, 3)
        });
        for page in [3, 1] {
            let hit = iotlb.page(page);
            assert!(hit.is_none_or(|hit| hit.target() == Gpa(page << 12)), "{page} leads to {hit:?}");
        }
        writer.join().unwrap();
    });
}

#[test]
fn rule6_a_hit_is_of_one_store_when_two_threads_store() {
    model(2, || {
        let iotlb = Arc::new(Iotlb::default());
        let insert = |iotlb: &Iotlb, page: u64| {
            iotlb.insert_page(iotlb.sample(), page, CachedPage::new(Gpa(page << 12), Perm::ReadWrite));
        };
        insert(&iotlb, 1);
        insert(&iotlb, 2);
        let writer = thread::spawn({
            let iotlb = iotlb.clone();
            move || insert(&iotlb, 3)
        });
        insert(&iotlb, 4);
        writer.join().unwrap();
        for page in 1..=4 {
            assert!(iotlb.page(page).is_none_or(|hit| hit.target() == Gpa(page << 12)));
        }
    });
}

/// Two threads open sessions at once, each one of its own; closed, none is waited for.
#[test]
fn rule6_sessions_of_two_threads_are_apart() {
    model(3, || {
        let world = World::new(0x9000);
        let device = thread::spawn({
            let world = world.clone();
            move || world.iotlb.open_session()
        });
        let mine = world.iotlb.open_session();
        let theirs = device.join().unwrap();
        assert_ne!(format!("{mine:?}"), format!("{theirs:?}"));
        [mine, theirs].iter().for_each(|token| world.iotlb.close_session(token));
        world.iotlb.wait_for_sessions();
    });
}
