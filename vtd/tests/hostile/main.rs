//! Scripts of a guest that does anything at all (rules 1, 5 and 7; A-14), at random. `fuzz/` has the same harness under
//! a fuzzer, which finds its scripts by what they reach.

mod harness;

use std::time::{Duration, Instant};

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rule5_whatever_a_guest_does_is_survived_within_the_bounds(script in proptest::collection::vec(any::<u8>(), 0..1500)) {
        harness::run(&script);
    }

    #[test]
    fn rule5_whatever_a_state_says_it_is_refused_or_survived(script in proptest::collection::vec(any::<u8>(), 0..300)) {
        harness::run_state(&script);
    }
}

/// What a fuzzer found (`cargo xtask fuzz`), that each reaches something which the others do not: a script a line.
const FOUND: [(&str, Run); 2] =
    [(include_str!("corpus/unit.txt"), harness::run), (include_str!("corpus/state.txt"), harness::run_state)];

type Run = fn(&[u8]) -> harness::Outcome;

#[test]
fn rule5_what_a_fuzzer_found_is_survived() {
    for (scripts, run) in FOUND {
        let mut restored = 0;
        for line in scripts.lines() {
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            let script: Vec<u8> = line.as_bytes().chunks(2).map(byte).collect();
            let result = std::panic::catch_unwind(|| run(&script));
            restored += result.unwrap_or_else(|_| panic!("script {line}")).restored;
        }
        assert!(restored > 0);
    }
}

/// A minute of other scripts with `CAUSEWAY_LONG=1`, and as many seconds as a larger number says.
#[test]
fn rule5_the_same_for_as_long_as_is_asked_for() {
    let seconds = match std::env::var("CAUSEWAY_LONG").ok().and_then(|text| text.parse().ok()) {
        None => 1,
        Some(0 | 1) => 60,
        Some(more) => more,
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut seed =
        std::env::var("CAUSEWAY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x1234_5678_9abc_def1u64);
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed >> 11
    };
    let (mut scripts, mut all) = (0u64, harness::Outcome::default());
    // So that each outcome is there, however slow the machine is.
    while Instant::now() < end || all.led == 0 || all.restored == 0 || all.extents == 0 {
        let script: Vec<u8> = (0..next() % 3000).map(|_| next() as u8).collect();
        let result = std::panic::catch_unwind(|| harness::run(&script));
        let outcome = result.unwrap_or_else(|_| panic!("script {scripts}: {script:?}"));
        scripts += 1;
        all.look_ups = all.look_ups.max(outcome.look_ups);
        all.extents = all.extents.max(outcome.extents);
        all.led += outcome.led;
        all.faults += outcome.faults;
        all.restored += outcome.restored;
    }
    println!("{scripts} scripts in {seconds} s: {all:?}");
}
