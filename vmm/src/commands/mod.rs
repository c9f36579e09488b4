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

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_panic_in_any_thread_ends_the_process() {
        const CHILD: &str = "CAUSEWAY_TEST_PANICS";
        if std::env::var_os(CHILD).is_some() {
            end_at_panics();
            // Without the hook this thread goes on, and the process ends well.
            let _ = std::thread::spawn(|| panic!("as the test asks")).join();
            return;
        }
        let name = "commands::tests::a_panic_in_any_thread_ends_the_process";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let output = child.args(["--exact", name]).env(CHILD, "1").output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    }
}
