//! A-6 with a thread that serves the queue (`worker=on`, `worker=always`): what a guest's invalidations cost, and that
//! each is done. They need /dev/kvm.

#[path = "rig/invalidations.rs"]
mod invalidations;

use invalidations::{QUEUE_OFF, QUEUE_ON, READ_TAIL, has_kvm, invalidate, queue, run};
use serde_json::Value;

/// Tails that are exits before bells hang.
const WATCHED: u64 = 64;

/// Tails that were exits, tails that were none, and wait descriptors.
fn counts(stats: &Value) -> [u64; 3] {
    let unit = &stats["units"][0];
    let wait = unit["descriptors"]["wait"].as_u64().unwrap();
    [unit["tail_writes"].as_u64().unwrap(), unit["tails_taken"].as_u64().unwrap(), wait]
}

#[test]
fn a6_an_invalidation_costs_no_exit_where_a_worker_serves_the_queue() {
    if !has_kvm() {
        return;
    }
    const COUNT: u64 = 5000;
    for (unit, step, exits) in [
        ("vtd", 1, COUNT),
        ("vtd,worker=off", 2, COUNT),
        ("vtd,worker=always", 1, WATCHED),
        ("vtd,worker=always", 2, WATCHED),
    ] {
        let stats = run(unit, &[queue(step), QUEUE_ON, &invalidate(COUNT as u32, step, &[])]);
        // The tail that was 0 before the queue was on is one more.
        assert_eq!(counts(&stats), [exits + 1, COUNT - exits, COUNT], "{unit}, by {step}");
        let iotlb = stats["units"][0]["descriptors"]["iotlb"].as_u64();
        assert_eq!(iotlb, Some(COUNT * u64::from(step - 1)), "{unit}, by {step}");
    }
}

#[test]
fn a6_a_worker_that_adapts_serves_each_invalidation_once() {
    if !has_kvm() {
        return;
    }
    const COUNT: u64 = 20_000;
    let stats = run("vtd,worker=on", &[queue(2), QUEUE_ON, &invalidate(COUNT as u32, 2, &[])]);
    let [exits, bells, waits] = counts(&stats);
    assert_eq!((exits + bells, waits), (COUNT + 1, COUNT), "{exits} exits, {bells} bells");
}

#[test]
fn a6_a_guest_that_goes_on_from_the_tail_register_gets_no_bells() {
    if !has_kvm() {
        return;
    }
    const COUNT: u64 = 1000;
    let stats = run("vtd,worker=always", &[queue(1), QUEUE_ON, &invalidate(COUNT as u32, 1, READ_TAIL)]);
    assert_eq!(counts(&stats), [COUNT + 1, 0, COUNT]);
    // Once that is known it reads them without exits: IQT before each tail and FSTS behind it until then.
    let reads = stats["units"][0]["register_reads"].as_u64().unwrap();
    assert!((2 * WATCHED - 1..=2 * WATCHED).contains(&reads), "{reads}");
}

#[test]
fn a6_a_queue_that_is_turned_off_and_on_is_watched_anew() {
    if !has_kvm() {
        return;
    }
    const COUNT: u64 = 1000;
    let again = [QUEUE_OFF, QUEUE_ON].concat();
    let count = invalidate(COUNT as u32, 1, &[]);
    let stats = run("vtd,worker=always", &[queue(1), QUEUE_ON, &count, &again, &count]);
    assert_eq!(counts(&stats), [2 * (WATCHED + 1), 2 * (COUNT - WATCHED), 2 * COUNT]);
}
