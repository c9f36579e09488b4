//! What an invalidation costs a guest that waits for each, with `worker=off`, `on` and `always`, in rounds by turns: on
//! this machine as it is, and while every processor has one more thread that spins. `ROUNDS=N` says how many, 5
//! without.

#[path = "../tests/rig/invalidations.rs"]
mod invalidations;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use invalidations::{QUEUE_ON, has_kvm, invalidate, queue, run};

const COUNT: u32 = 100_000;
const UNITS: [&str; 3] = ["vtd,worker=off", "vtd,worker=on", "vtd,worker=always"];

/// Microseconds of an invalidation, and how many of a thousand were exits. What the machine takes beside them is not
/// counted.
fn one(unit: &str) -> (f64, u64) {
    let of = |count: u32| run(unit, &[queue(2), QUEUE_ON, &invalidate(count, 2, &[])]);
    let (few, many) = (of(COUNT / 10), of(COUNT));
    let ms = |stats: &serde_json::Value| stats["wall_ms"].as_f64().unwrap_or(f64::NAN);
    let exits = many["units"][0]["tail_writes"].as_u64().unwrap_or(0);
    ((ms(&many) - ms(&few)) * 1000.0 / f64::from(COUNT - COUNT / 10), exits * 1000 / u64::from(COUNT))
}

fn rounds(what: &str, rounds: usize) {
    println!("{what}: us an invalidation, and exits of 1000");
    let mut times = vec![Vec::new(); UNITS.len()];
    for _ in 0..rounds {
        let results = UNITS.map(one);
        let line: Vec<String> = UNITS.iter().zip(results).map(|(u, (us, n))| format!("{u} {us:.2} ({n})")).collect();
        println!("  {}", line.join("   "));
        times.iter_mut().zip(results).for_each(|(times, (us, _))| times.push(us));
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let medians: Vec<f64> = times.iter_mut().map(median).collect();
    println!("  of the medians: on {:.2} times, always {:.2} times", medians[0] / medians[1], medians[0] / medians[2]);
}

fn main() {
    // `count` asks for operations whose instructions can be counted: those of several threads cannot.
    if !has_kvm() || std::env::args().any(|argument| argument == "count") {
        return;
    }
    let count = std::env::var("ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5).max(1);
    let load = || std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let processors = thread::available_parallelism().map_or(1, usize::from);
    println!("{processors} processors, load {}", load().trim());
    rounds("as it is", count);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..processors {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        rounds("beside a thread that spins for each processor", count);
        stop.store(true, Ordering::Relaxed);
    });
    println!("load {}", load().trim());
}
