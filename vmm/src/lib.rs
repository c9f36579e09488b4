//! The program `causeway`: KVM, memory, boot, ACPI, vCPUs, the event loop and the command line. Wiring only: every
//! policy has its home in the crates below.

mod acpi;
mod assign;
mod boot;
mod commands;
mod config;
mod console;
mod control_protocol;
mod exit;
mod kvm;
mod listening;
mod machine;
mod messages;
mod open_files;
mod output;
mod signals;
mod terminal;
mod view;

pub use acpi::dmar;
pub use commands::main;
