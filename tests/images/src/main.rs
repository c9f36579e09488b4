//! The suite of `causeway test`. Each test is named by the behaviour that it checks.
#![no_std]
#![no_main]

mod rests_on;

mod suite {
    pub mod ats;
    pub mod bridges;
    pub mod concurrent;
    pub mod counters;
    pub mod device;
    pub mod faults;
    pub mod hostile;
    pub mod interrupts;
    pub mod invalidation;
    pub mod machine;
    pub mod peers;
    pub mod pinning;
    pub mod plug;
    pub mod posting;
    pub mod processors;
    pub mod queue;
    pub mod registers;
    pub mod remapping;
    pub mod reserved;
    pub mod reset;
    pub mod saving;
    pub mod scalable;
    pub mod translation;
    pub mod units;
    pub mod unmapping;
}

use suite::*;

images::image!(
    ats::TESTS,
    bridges::TESTS,
    concurrent::TESTS,
    counters::TESTS,
    device::TESTS,
    faults::TESTS,
    hostile::TESTS,
    interrupts::TESTS,
    invalidation::TESTS,
    machine::TESTS,
    peers::TESTS,
    pinning::TESTS,
    plug::TESTS,
    posting::TESTS,
    processors::TESTS,
    queue::TESTS,
    registers::TESTS,
    remapping::TESTS,
    reserved::TESTS,
    reset::TESTS,
    saving::TESTS,
    scalable::TESTS,
    translation::TESTS,
    units::TESTS,
    unmapping::TESTS,
);
