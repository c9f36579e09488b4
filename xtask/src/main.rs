//! `cargo xtask`: what the project needs around the product.

mod ahead;
mod apt;
#[cfg(test)]
mod behaviours;
mod bench;
mod browser;
mod cache;
mod cases;
mod children;
mod cpio;
mod crate_benches;
mod crate_tests;
mod demo;
#[cfg(test)]
mod documents;
mod fuzz;
mod images;
mod kernel_modules;
mod l1;
mod lanes;
mod monitor;
mod mutate;
mod nested;
mod oracle;
mod own_kernel;
#[cfg(test)]
mod packages;
mod pages;
mod pool;
mod programs;
mod report;
#[cfg(test)]
mod rust_files;
mod screenshots;
mod stored_kernel;
#[cfg(test)]
mod structure;
mod table;
mod terminal;
mod test;
mod topology;
mod traced;
mod unpacked;

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
    /// Boots a guest with an NVMe disk assigned behind the emulated VT-d, reads 64 MiB, and says how that went
    ///
    /// The exit status is 0 for PASS, 1 for FAIL, 125 if the bench could not start.
    Demo(demo::DemoArgs),
    /// Runs a script in the nested bench: a Linux host with KVM, VFIO and assignable functions
    ///
    /// The exit status is the script's (0 to 123); 124 is its time limit, 125 a bench that failed.
    Nested(nested::NestedArgs),
    /// Builds the kernel with iommufd and the IOMMU's debugfs, which `nested --own-kernel` and some cases run on
    ///
    /// Needs packages of this system, which it installs as root and names otherwise, and 8 GB meanwhile. What is built
    /// stays in the cache.
    OwnKernel(own_kernel::OwnKernelArgs),
    /// Measures: the crates' criterion benchmarks, and `nested`, a guest under Causeway and under QEMU
    ///
    /// Writes bench-report.json and bench-report.md into the target folder.
    Bench(bench::BenchArgs),
    /// Breaks the code on purpose, one listed mutation at a time, and says which tests notice
    ///
    /// Writes docs/mutations.md. The exit status is 0 if everything that is not equivalent was noticed, else 1.
    Mutate(mutate::MutateArgs),
    /// Fuzzes the remapping unit by coverage, with the stable compiler
    ///
    /// Needs a C++ compiler. The exit status is 1 if a script made it fail.
    Fuzz(fuzz::FuzzArgs),
    /// Runs the test images under QEMU's intel-iommu and edu, and compares with what is listed in
    /// tests/images/differences.txt
    Oracle(oracle::OracleArgs),
    /// Makes the documents' pictures anew: the page of `causeway report`, and `causeway ctl PATH top` at a terminal
    Screenshots(screenshots::ScreenshotsArgs),
    /// Runs every check and test; the last line is `N passed, N failed, N skipped`
    Test(test::TestArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Demo(args) => demo::command(&args).map_err(|error| (error, nested::BENCH_FAILURE)),
        Task::Nested(args) => nested::command(&args).map_err(|error| (error, nested::BENCH_FAILURE)),
        Task::OwnKernel(args) => own_kernel::command(&args).map_err(|error| (error, nested::BENCH_FAILURE)),
        Task::Bench(args) => bench::command(&args).map_err(|error| (error, nested::BENCH_FAILURE)),
        Task::Mutate(args) => mutate::command(&args).map_err(|error| (error, 2)),
        Task::Fuzz(args) => fuzz::command(&args).map_err(|error| (error, 2)),
        Task::Oracle(args) => oracle::command(&args).map_err(|error| (error, nested::BENCH_FAILURE)),
        Task::Screenshots(args) => screenshots::command(&args).map_err(|error| (error, nested::BENCH_FAILURE)),
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
