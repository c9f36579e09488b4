//! Bare-metal images that drive a VT-d unit and a DMA device: start-up into 64-bit user mode, interrupts, PCI, a driver
//! for the unit with builders for its tables, and one for `edu`. `docs/writing-images.md` shows how to write one.
//!
//! The body of an image runs in ring 3, with all of the first 4 GiB and every port at its disposal: there compiled code
//! with its SSE instructions and red zone needs no special target, and a KVM that emulates the kernel's mode in
//! software runs it at full speed. An image has one processor and one thread; a test that asks for `--cpus 2` can have
//! a second one do something beside it, see [`smp`].
#![no_std]

pub mod acpi;
pub mod edu;
pub mod harness;
mod intrinsics;
pub mod memory;
pub mod pci;
pub mod pinblk;
pub mod scalable;
pub mod serial;
pub mod smp;
mod start;
pub mod tables;
pub mod vtd;
pub mod world;
pub mod x86;

pub use world::World;

/// Ends the test as failed, with a message, unless the condition holds.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            panic!($($text)+);
        }
    };
}

/// Ends the test as failed unless both are equal.
#[macro_export]
macro_rules! check_eq {
    ($left:expr, $right:expr, $what:literal) => {{
        let (left, right) = ($left, $right);
        if left != right {
            panic!("{}: {left:x?}, not {right:x?}", $what);
        }
    }};
}
