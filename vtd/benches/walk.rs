//! Emulated DMA: a translation from the cache, one from the tables, an access, and what threads cost each other.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vtd::{Access, DmaSession, Iova, Stages, UnitConfig};

#[allow(dead_code)]
#[path = "../tests/unit/pasid_tables.rs"]
mod pasid_tables;
#[path = "../tests/unit/rig.rs"]
mod rig;
mod runner;
use rig::{MEMORY, Memory, NIC, NVME, Rig};
use runner::Runner;

type Endpoint = vtd::Endpoint<Memory>;

const FIRST: u64 = 0x100_0000;
const PAGES: u64 = 16_384;

/// A guest whose NVME and NIC reach `PAGES` pages at `FIRST`, over four levels.
fn rig() -> Rig {
    let (mut rig, root) = Rig::with_nvme();
    (0..PAGES / 8192).for_each(|part| rig.pages(root, FIRST + (part << 25), 0x80_0000, 8192));
    rig.set_paged(NIC, root, 48, 1);
    rig
}

/// The same pages of an NVME in scalable mode, over four levels of a first stage; `nested`: with four levels of a
/// second one beneath it, both with leaves of 4 KiB.
fn rig_of_first_stage(nested: bool) -> Rig {
    let scalable = Some(Stages::Both);
    let mut rig = Rig::scalable(UnitConfig { scalable, nested: true, ..pasid_tables::config(48) });
    let up = if nested { 1 << 32 } else { 0 };
    let root = rig.table();
    for page in 0..PAGES {
        let (iova, mut table) = (FIRST + (page << 12), root);
        for level in (1..4u32).rev() {
            let entry = table + (iova >> (12 + 9 * level) & 511) * 8;
            if rig.load(entry) == 0 {
                let made = rig.table();
                rig.store(entry, (made + up) | 0x27);
            }
            table = (rig.load(entry) & !0xfff) - up;
        }
        rig.store(table + (iova >> 12 & 511) * 8, (0x80_0000 + ((page % 8192) << 12) + up) | 0x67);
    }
    if nested {
        let second = rig.table();
        rig.pages(second, up, 0, MEMORY >> 12);
        rig.set_entry(NVME, 0, pasid_tables::nested(root + up, second, 48, 1));
    } else {
        rig.set_entry(NVME, 0, pasid_tables::first_stage(root, 4, 1));
    }
    rig
}

fn read(session: &DmaSession<'_, Memory>, iova: u64) {
    black_box(session.translate(black_box(Iova(iova)), Access::Read)).unwrap();
}

/// Pages in an order that no cache foresees.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    FIRST + ((*state % PAGES) << 12)
}

fn hit(endpoint: &Endpoint) -> impl FnMut() {
    let session = endpoint.enter();
    move || read(&session, FIRST)
}

fn hit_session_each(endpoint: &Endpoint) -> impl FnMut() {
    || read(&endpoint.enter(), FIRST)
}

fn one_thread(runner: &mut Runner) {
    let rig = rig();
    let new = || rig.unit.endpoint(NVME);
    let seed = 0x9e37_79b9_7f4a_7c15;
    let endpoint = new();
    runner.operation("translate/hit", || hit(&endpoint));
    let endpoint = new();
    runner.operation("translate/hit_session_each", || hit_session_each(&endpoint));
    let endpoint = new();
    runner.operation("translate/random_16384", || {
        let (session, mut state) = (endpoint.enter(), seed);
        (0..PAGES).for_each(|page| read(&session, FIRST + (page << 12)));
        move || read(&session, random(&mut state))
    });
    // Of the line above, what is not the unit's.
    runner.operation("translate/random_16384_generator_alone", || {
        let mut state = seed;
        move || {
            black_box(black_box(Iova(random(&mut state))));
        }
    });
    let endpoint = new();
    runner.operation("translate/two_pages_4m_apart", || {
        let (session, mut turn) = (endpoint.enter(), 0);
        move || {
            turn ^= 0x40_0000;
            read(&session, FIRST + turn);
        }
    });
    // Every access in another page, more of them than are cached, in order.
    let endpoint = new();
    runner.operation("translate/walk", || {
        let (session, mut page) = (endpoint.enter(), 0);
        move || {
            page = (page + 1) % PAGES;
            read(&session, FIRST + (page << 12));
        }
    });
    for (name, nested) in [("translate/walk_first_stage", false), ("translate/walk_nested", true)] {
        let rig = rig_of_first_stage(nested);
        let endpoint = rig.unit.endpoint(NVME);
        runner.operation(name, || {
            let (session, mut page) = (endpoint.enter(), 0);
            move || {
                page = (page + 1) % PAGES;
                read(&session, FIRST + (page << 12));
            }
        });
    }
    let endpoint = new();
    runner.operation("session/enter", || || drop(black_box(endpoint.enter())));
    let endpoint = new();
    runner.operation("read/64", || {
        let mut data = [0; 64];
        let endpoint = &endpoint;
        move || endpoint.read(black_box(Iova(FIRST)), &mut data).unwrap()
    });
    let endpoint = new();
    runner.operation("read/4k", || {
        let mut data = [0; 4096];
        let endpoint = &endpoint;
        move || endpoint.read(black_box(Iova(FIRST)), &mut data).unwrap()
    });
}

/// The time that this thread takes for `iterations`, while another one does the same on `other`, if there is one.
fn beside<'e, O: FnMut() + 'e>(
    other: Option<&'e Endpoint>,
    mine: &'e Endpoint,
    make: impl Fn(&'e Endpoint) -> O + Sync,
    iterations: u64,
) -> Duration {
    let (ready, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        if let Some(other) = other {
            scope.spawn(|| {
                let mut operation = make(other);
                while !stop.load(Ordering::Relaxed) {
                    (0..1000).for_each(|_| operation());
                    ready.store(1, Ordering::Relaxed);
                }
            });
            while ready.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
        }
        let mut operation = make(mine);
        let start = Instant::now();
        (0..iterations).for_each(|_| operation());
        let time = start.elapsed();
        stop.store(true, Ordering::Relaxed);
        time
    })
}

/// Each is the time of an operation of one thread; what two threads do in it is twice as much as one, if they do not
/// cost each other anything.
fn two_threads<'e, O: FnMut() + 'e>(
    runner: &mut Runner,
    kind: &str,
    (one, other): (&'e Endpoint, &'e Endpoint),
    make: impl Fn(&'e Endpoint) -> O + Copy + Sync,
) {
    for (threads, beside_it) in
        [("one_thread", None), ("two_threads_two_endpoints", Some(other)), ("two_threads_one_endpoint", Some(one))]
    {
        runner.timed(&format!("threads/{kind}/{threads}"), |b| {
            b.iter_custom(|iterations| beside(beside_it, one, make, iterations));
        });
    }
}

fn main() {
    let mut runner = Runner::new();
    one_thread(&mut runner);
    let rig = rig();
    let (one, other) = (rig.unit.endpoint(NVME), rig.unit.endpoint(NIC));
    two_threads(&mut runner, "hit", (&one, &other), hit);
    two_threads(&mut runner, "hit_session_each", (&one, &other), hit_session_each);
    runner.finish();
}
