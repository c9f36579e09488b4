//! The suite of `causeway test`. Each test is named by the behaviour that it checks.
#![no_std]
#![no_main]

mod suite {
    pub mod device;
    pub mod faults;
    pub mod hostile;
    pub mod interrupts;
    pub mod invalidation;
    pub mod queue;
    pub mod registers;
    pub mod remapping;
    pub mod reserved;
    pub mod translation;
    pub mod unmapping;
}

use suite::*;

images::image!(
    device::TESTS,
    faults::TESTS,
    hostile::TESTS,
    interrupts::TESTS,
    invalidation::TESTS,
    queue::TESTS,
    registers::TESTS,
    remapping::TESTS,
    reserved::TESTS,
    translation::TESTS,
    unmapping::TESTS,
);
