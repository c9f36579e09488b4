//! Scripts of a guest that does anything at all, as coverage finds them. `fuzz/README.md` has how it is run.
#![no_main]

// Each target has a part of it.
#[allow(dead_code)]
#[path = "../../vtd/tests/hostile/harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|script: &[u8]| {
    // Longer ones are several of these.
    if script.len() <= 4096 {
        harness::run(script);
    }
});
