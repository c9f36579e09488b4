//! Emulated DMA: a translation from the cache, one from the tables, an access, and what threads cost each other.
//!
//! With an argument `count NAME ITERATIONS`, which `cargo xtask bench` gives under a tool that counts instructions, one of them is
//! run that often and nothing is timed.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group};
use vtd::{Access, DmaSession, Endpoint, Iova};

#[path = "../tests/unit/rig.rs"]
mod rig;
use rig::{Memory, NIC, NVME, Rig};

const FIRST: u64 = 0x100_0000;
const PAGES: u64 = 16_384;

/// A guest whose NVME and NIC reach `PAGES` pages at `FIRST`, over four levels.
fn rig() -> Rig {
    let (mut rig, root) = Rig::with_nvme();
    (0..PAGES / 8192).for_each(|part| rig.pages(root, FIRST + (part << 25), 0x80_0000, 8192));
    rig.set_paged(NIC, root, 48, 1);
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

/// What one thread does, by name: each makes the operation that is measured.
type Operation<'a> = Box<dyn FnMut() + 'a>;
type Make = for<'a> fn(&'a Endpoint<Memory>) -> Operation<'a>;

const ONE_THREAD: [(&str, Make); 8] = [
    ("translate/hit", |endpoint| {
        let session = endpoint.enter();
        Box::new(move || read(&session, FIRST))
    }),
    ("translate/hit_session_each", |endpoint| Box::new(|| read(&endpoint.enter(), FIRST))),
    ("translate/random_16384", |endpoint| {
        let (session, mut state) = (endpoint.enter(), 0x9e37_79b9_7f4a_7c15);
        (0..PAGES).for_each(|page| read(&session, FIRST + (page << 12)));
        Box::new(move || read(&session, random(&mut state)))
    }),
    ("translate/two_pages_4m_apart", |endpoint| {
        let (session, mut turn) = (endpoint.enter(), 0);
        Box::new(move || {
            turn ^= 0x40_0000;
            read(&session, FIRST + turn);
        })
    }),
    // Every access in another page, more of them than are cached, in order.
    ("translate/walk", |endpoint| {
        let (session, mut page) = (endpoint.enter(), 0);
        Box::new(move || {
            page = (page + 1) % PAGES;
            read(&session, FIRST + (page << 12));
        })
    }),
    ("session/enter", |endpoint| Box::new(|| drop(black_box(endpoint.enter())))),
    ("read/64", |endpoint| {
        let mut data = [0; 64];
        Box::new(move || endpoint.read(black_box(Iova(FIRST)), &mut data).unwrap())
    }),
    ("read/4k", |endpoint| {
        let mut data = [0; 4096];
        Box::new(move || endpoint.read(black_box(Iova(FIRST)), &mut data).unwrap())
    }),
];

fn one_thread(c: &mut Criterion) {
    let rig = rig();
    for (name, make) in ONE_THREAD {
        let endpoint = rig.unit.endpoint(NVME);
        let mut operation = make(&endpoint);
        c.bench_function(name, |b| b.iter(&mut operation));
    }
}

/// The time that this thread takes for `iterations`, while another one does the same on `other`, if there is one.
fn beside(other: Option<&Endpoint<Memory>>, mine: &Endpoint<Memory>, make: Make, iterations: u64) -> Duration {
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

/// Each is the time of an operation of one thread; what two threads do in it is twice as much as one, if they do not cost each
/// other anything.
fn two_threads(c: &mut Criterion) {
    let rig = rig();
    let (one, other) = (rig.unit.endpoint(NVME), rig.unit.endpoint(NIC));
    for (kind, make) in [("hit", ONE_THREAD[0].1), ("hit_session_each", ONE_THREAD[1].1)] {
        for (threads, beside_it) in [
            ("one_thread", None),
            ("two_threads_two_endpoints", Some(&other)),
            ("two_threads_one_endpoint", Some(&one)),
        ] {
            c.bench_function(&format!("threads/{kind}/{threads}"), |b| {
                b.iter_custom(|iterations| beside(beside_it, &one, make, iterations));
            });
        }
    }
}

criterion_group!(benches, one_thread, two_threads);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().position(|argument| argument == "count") {
        Some(at) => count(&arguments[at + 1..]),
        None => {
            benches();
            Criterion::default().configure_from_args().final_summary();
        }
    }
}

/// `NAME ITERATIONS`: does it; without them, prints the names.
fn count(arguments: &[String]) {
    let [name, iterations] = arguments else {
        ONE_THREAD.iter().for_each(|(name, _)| println!("{name}"));
        return;
    };
    let (_, make) = ONE_THREAD.into_iter().find(|(known, _)| known == name).expect("a benchmark of this name");
    let rig = rig();
    let endpoint = rig.unit.endpoint(NVME);
    let mut operation = make(&endpoint);
    (0..iterations.parse::<u64>().expect("a number of iterations")).for_each(|_| operation());
}
