//! States to restore that say anything at all, as coverage finds them. `fuzz/README.md` has how it is run.
#![no_main]

// Each target has a part of it.
#[allow(dead_code)]
#[path = "../../vtd/tests/hostile/harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    if script.len() <= 4096 {
        harness::run_state(script);
    }
});
