//! The command line, and what each command does.

pub mod cli;
mod client;
mod ctl;
mod describe;
mod device;
mod iommu;
pub mod options;
mod report;
mod run;
mod test;
mod top;
mod units;
mod verbs;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::exit::ERROR;
use cli::{Cli, Command};

/// Does what the command line says. Gives back the exit code.
pub fn main() -> ExitCode {
    end_at_panics();
    if std::env::args_os().len() <= 1 {
        return match Cli::command().print_help() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(ERROR),
        };
    }
    match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Device(args) => device::run(&args),
        Command::Report(args) => report::run(&args),
    }
}

/// A panic in any thread ends the process, in every profile: a machine without one of its threads is none.
fn end_at_panics() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        say(info);
        std::process::abort();
    }));
}
