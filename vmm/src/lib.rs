//! The program `causeway`: KVM, memory, boot, ACPI, vCPUs, the event loop and the command line. Wiring only: every policy has
//! its home in the crates below.

mod acpi;
mod assign;
mod audit;
mod bars;
mod boot;
mod cli;
mod console;
mod control;
mod cpuid;
mod device;
pub mod dmar;
mod dsdt;
mod events;
mod firmware;
mod image;
mod irq;
mod layout;
mod legacy;
mod machine;
mod memory;
mod messages;
mod open_files;
mod options;
mod output;
mod run;
mod signals;
mod slots;
mod stats;
mod suite;
mod terminal;
mod vcpu;
mod vm;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

/// Does what the command line says. Gives back the exit code.
pub fn main() -> ExitCode {
    if std::env::args_os().len() <= 1 {
        return match cli::Cli::command().print_help() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(run::ERROR),
        };
    }
    match cli::Cli::parse().command {
        cli::Command::Run(args) => run::run(&args),
        cli::Command::Test(args) => suite::run(&args),
        cli::Command::Device(args) => device::run(&args),
    }
}
