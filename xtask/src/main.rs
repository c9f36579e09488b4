//! `cargo xtask`: what the project needs around the product.

mod apt;
mod cache;
mod cases;
mod cpio;
mod crate_tests;
mod kernel_modules;
mod l1;
mod nested;
mod programs;
mod report;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Tests, demonstration and measurements of Causeway")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Runs a script in the nested bench: a Linux host with KVM, VFIO and assignable functions
    ///
    /// The exit status is the script's (0 to 123); 124 is its time limit, 125 a bench that failed.
    Nested(nested::NestedArgs),
    /// Runs every check and test; the last line is `N passed, N failed, N skipped`
    Test(test::TestArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Nested(args) => nested::command(&args).map_err(|error| (error, nested::BENCH_FAILURE)),
        Task::Test(args) => test::command(&args).map_err(|error| (error, 1)),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err((error, status)) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(status)
        }
    }
}
