//! Random tables of a stage whose pointers lead astray, into the other tables of a function.

use std::collections::BTreeSet;

use crate::rig::{Rig, TABLES};

const LARGE: u64 = 1 << 7;

/// The tables of the stage with this root, of four levels; `place` is where the table is that an entry names.
pub fn tables_of(rig: &Rig, root: u64, place: impl Fn(u64) -> u64 + Copy) -> BTreeSet<u64> {
    let (mut found, mut level) = (BTreeSet::from([root]), BTreeSet::from([root]));
    for _ in 1..4 {
        let entries = level.iter().flat_map(|table| (0..512).map(move |n| table + n * 8)).map(|at| rig.load(at));
        let below = entries.filter(|entry| entry & 3 != 0 && entry & LARGE == 0);
        level = below.map(|entry| place(entry & 0xf_ffff_ffff_f000)).collect();
        found.extend(&level);
    }
    found
}

/// What the tables before `end` hold that are none of `stages`: the entries that lead to a stage. A bit that is flipped
/// there, or a flag that a walk sets there, makes of them what no oracle of a stage knows.
pub fn others(rig: &Rig, end: u64, stages: &BTreeSet<u64>) -> Vec<u64> {
    let tables = (TABLES..end).step_by(4096).filter(|table| !stages.contains(table));
    tables.flat_map(|table| (0..512).map(move |n| table + n * 8)).map(|at| rig.load(at)).collect()
}
