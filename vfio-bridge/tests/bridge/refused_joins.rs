//! Joins of a space of others that are refused when an extent was cut for them already. Found at random; here they are
//! done each time.

use vtd::Perm::ReadWrite;

use crate::property::Run;
use crate::scenario::{Host, Step};

/// A host that takes `entries` mappings; the steps, of which the last is the join of device 3; how many extents it
/// cuts.
fn turned_back(entries: usize, steps: &[Step], splits: u64) {
    let mut run = Run::new(&Host { width: 39, old: false, entries, memlock: None, per_space: false });
    let (join, before) = steps.split_last().expect("steps");
    before.iter().for_each(|step| run.step(step).expect("right"));
    let splits_before = run.world.stats(3).splits;
    run.step(join).expect("right");
    assert_eq!(
        run.world.stats(3).splits - splits_before,
        splits,
        "what was cut was away for a moment, whatever came of it"
    );
    assert_eq!(run.world.stats(3).live_extents, 0, "it did not join");
}

fn map(space: usize, iova: u64, pages: u64) -> Step {
    Step::Apply { space, unmaps: vec![], maps: vec![(iova, pages, 0, ReadWrite)] }
}

fn unmap(space: usize, iova: u64, pages: u64) -> Step {
    Step::Apply { space, unmaps: vec![(iova, pages)], maps: vec![] }
}

fn attach(device: usize, space: usize) -> Step {
    Step::Attach { device, space }
}

fn resemble(space: usize, pages_a_leaf: u64) -> Step {
    Step::Resemble { space, pages_a_leaf, but: (0, 0) }
}

#[test]
fn b8_a_cut_for_a_join_that_is_refused_counts_1() {
    let steps = [
        attach(2, 1),
        Step::Detach { device: 1 },
        map(1, 0xa000, 300),
        resemble(0, 4),
        unmap(1, 0x6000, 5),
        attach(0, 0),
        attach(2, 0),
    ];
    turned_back(2, &steps, 1);
}

#[test]
fn b8_a_cut_for_a_join_that_is_refused_counts_2() {
    let steps = [
        map(0, 0x9000, 15),
        resemble(1, 5),
        unmap(0, 0x5000, 5),
        attach(2, 0),
        attach(0, 1),
        attach(1, 1),
        attach(2, 1),
    ];
    turned_back(2, &steps, 1);
}

#[test]
fn b8_a_cut_for_a_join_that_is_refused_counts_3() {
    let steps = [
        map(0, 0x13000, 3),
        attach(0, 0),
        attach(2, 1),
        resemble(1, 2),
        attach(1, 0),
        unmap(0, 0xb000, 9),
        attach(2, 0),
    ];
    turned_back(1, &steps, 1);
}

#[test]
fn b8_a_cut_for_a_join_that_is_refused_counts_4() {
    let steps = [
        attach(1, 0),
        attach(0, 0),
        map(1, 0x3c000, 4),
        resemble(0, 3),
        unmap(1, 0x28000, 21),
        attach(2, 1),
        attach(2, 0),
    ];
    turned_back(1, &steps, 1);
}
