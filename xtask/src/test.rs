//! `cargo xtask test`: everything that can be wrong, by name.

use crate::ahead::{Ahead, Wanted};
use crate::cache::{Cache, progress};
use crate::cases::{self, Case};
use crate::crate_benches;
use crate::crate_tests::{self, cargo};
use crate::images;
use crate::l1::Host;
use crate::lanes::{self, Bench};
use crate::pages;
use crate::programs::Profile;
use crate::report::{Outcome, Reporter};
use anyhow::{Context, Result, bail};
use clap::Args;
use regex::Regex;
use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

#[derive(Debug, Args)]
pub struct TestArgs {
    /// Prints the names and runs nothing
    #[arg(long)]
    list: bool,
    /// Only what this matches (`crate::test`, `images::test`, `browser::test`, `nested::case`, `check::name`)
    #[arg(long, value_name = "RE")]
    only: Option<Regex>,
    /// Not what this expression matches
    #[arg(long, value_name = "RE")]
    skip: Option<Regex>,
    /// Without the nested bench
    #[arg(long)]
    no_nested: bool,
    /// Also what takes longer than a minute
    #[arg(long)]
    long: bool,
    /// Runs the nested cases on this host, all of them; those that ask for `new` otherwise need --long or --only
    #[arg(long, value_enum, default_value = "default")]
    host: Host,
    /// At most so many L1s at a time, instead of one a processor where memory allows (6 GiB each)
    #[arg(long, value_name = "N")]
    jobs: Option<NonZero<usize>>,
    /// A static `causeway` that is built already
    #[arg(long, value_name = "FILE", env = "CAUSEWAY_BINARY")]
    causeway: Option<PathBuf>,
}

impl TestArgs {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.is_match(name))
            && !self.skip.as_ref().is_some_and(|skip| skip.is_match(name))
    }

    /// Whether any test of the images can match, which is known only after building the program.
    fn may_want_images(&self) -> bool {
        let only = self.only.as_ref().map_or("", |only| only.as_str()).trim_start_matches('^');
        !["nested::", "check::", "browser::"].iter().any(|other| only.starts_with(other))
    }

    /// Whether any crate's test can match, which is known only after building them all.
    fn may_want_crates(&self) -> bool {
        let only = self.only.as_ref().map_or("", |only| only.as_str()).trim_start_matches('^');
        !["nested::", "check::", "images::", "browser::"].iter().any(|other| only.starts_with(other))
    }
}

/// A check of the whole tree by one command.
struct Check {
    name: &'static str,
    arguments: &'static [&'static str],
    environment: Option<(&'static str, &'static str)>,
}

const CHECKS: &[Check] = &[
    Check { name: "check::format", arguments: &["fmt", "--all", "--check"], environment: None },
    Check {
        name: "check::clippy",
        arguments: &[
            "clippy",
            "--quiet",
            "--workspace",
            "--exclude",
            "images",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ],
        environment: None,
    },
    // An image has no standard library, so it cannot unwind.
    Check {
        name: "check::clippy_of_images",
        arguments: &["clippy", "--quiet", "--package", "images", "--release", "--", "-D", "warnings"],
        environment: None,
    },
    Check {
        name: "check::documentation",
        arguments: &["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"],
        environment: Some(("RUSTDOCFLAGS", "-D warnings")),
    },
    Check {
        name: "check::examples_in_documentation",
        arguments: &["test", "--quiet", "--workspace", "--doc"],
        environment: None,
    },
    Check { name: "check::dependencies", arguments: &["deny", "check"], environment: None },
];

/// What the checks are called in a list of all.
pub fn check_names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|check| check.name).chain([crate_benches::CHECK])
}

pub fn command(args: &TestArgs) -> Result<u8> {
    let (files, cases) = cases::load()?;
    let mut cases: Vec<Case> = cases.into_iter().filter(|case| args.wants(&case.full_name())).collect();
    let reporter = Reporter::new(true);
    let (mut cache, mut ahead) = (None, None);
    if !args.list {
        cases = to_run(args, cases, &reporter);
    }
    if !args.list && !cases.is_empty() {
        let cache = cache.insert(Cache::open()?);
        // Some of the long cases measure.
        let profile = if args.long { Profile::Release } else { Profile::Programs };
        ahead = Some(Ahead::start(cache, Wanted::by(&cases, args.causeway.clone(), profile), &reporter)?);
    }
    let built = if args.may_want_crates() { crate_tests::build() } else { Ok(Vec::new()) };
    let mut executables = match built {
        Ok(executables) => executables,
        Err(error) if args.list => return Err(error),
        Err(error) => {
            reporter.add("check::tests_build", Outcome::Failed(format!("{error:#}")), None);
            Vec::new()
        }
    };
    for executable in &mut executables {
        let tests = std::mem::take(&mut executable.tests);
        executable.tests = tests.into_iter().filter(|test| args.wants(&executable.full_name(test))).collect();
    }
    let suite = if args.may_want_images() { images::build(args.long) } else { Ok(images::Suite::default()) };
    let suite = match suite {
        Ok(suite) => suite.only(|name| args.wants(name)),
        Err(error) if args.list => return Err(error),
        Err(error) => {
            reporter.add("check::images_build", Outcome::Failed(format!("{error:#}")), None);
            images::Suite::default()
        }
    };
    if args.list {
        let checks = check_names().map(str::to_owned).filter(|name| args.wants(name));
        let tests = executables.iter().flat_map(|e| e.tests.iter().map(|test| e.full_name(test)));
        let pages = pages::names().filter(|name| args.wants(name));
        for name in checks.chain(tests).chain(suite.full_names()).chain(pages).chain(cases.iter().map(Case::full_name))
        {
            println!("{name}");
        }
        return Ok(0);
    }
    for check in CHECKS.iter().filter(|check| args.wants(check.name)) {
        run_check(check, &reporter)?;
    }
    for executable in &executables {
        crate_tests::run(executable, args.long, &reporter)?;
    }
    images::run(&suite, &reporter)?;
    if args.wants(crate_benches::CHECK) {
        if args.long {
            crate_benches::check(|| cache.clone().map_or_else(Cache::open, Ok), &reporter);
        } else {
            let reason = "building the benchmarks takes minutes: --long".to_owned();
            reporter.add(crate_benches::CHECK, Outcome::Skipped(reason), None);
        }
    }
    pages::run(|| cache.map_or_else(Cache::open, Ok), |name| args.wants(name), &reporter);
    if let Some(ahead) = ahead
        && let Err(error) = run_nested(args, &files, cases, ahead, &reporter)
    {
        reporter.add("nested::bench", Outcome::Failed(format!("{error:#}")), None);
    }
    Ok(u8::from(!reporter.finish()))
}

/// The nested cases that this run has; tells of the others.
fn to_run(args: &TestArgs, mut cases: Vec<Case>, reporter: &Reporter) -> Vec<Case> {
    if args.host == Host::New {
        cases.iter_mut().for_each(|case| case.machine.host = Host::New);
    }
    cases.retain(|case| {
        let reason = if args.no_nested {
            "--no-nested"
        } else if case.long && !args.long {
            "takes more than a minute: --long"
        } else if case.machine.host == Host::New && args.host != Host::New && !args.long && args.only.is_none() {
            "is for the newer host: --long"
        } else {
            return true;
        };
        reporter.add(&case.full_name(), Outcome::Skipped(reason.to_owned()), None);
        false
    });
    cases
}

fn run_check(check: &Check, reporter: &Reporter) -> Result<()> {
    let subcommand = check.arguments[0];
    if check.name == "check::dependencies" && !available("cargo-deny") {
        reporter.add(check.name, Outcome::Skipped("cargo-deny is not installed".to_owned()), None);
        return Ok(());
    }
    progress(format_args!("cargo {subcommand}"));
    let start = Instant::now();
    let mut command = cargo();
    command.args(check.arguments).envs(check.environment);
    let result = command.output().with_context(|| format!("cannot run cargo {subcommand}"))?;
    let outcome = if result.status.success() {
        Outcome::Passed
    } else {
        Outcome::Failed(format!(
            "{}{}",
            String::from_utf8_lossy(&result.stdout),
            String::from_utf8_lossy(&result.stderr)
        ))
    };
    reporter.add(check.name, outcome, Some(start.elapsed()));
    Ok(())
}

fn available(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|result| result.status.success())
}

fn run_nested(
    args: &TestArgs,
    files: &[(String, PathBuf)],
    mut cases: Vec<Case>,
    ahead: Ahead,
    reporter: &Reporter,
) -> Result<()> {
    progress("the nested cases: making ready what they need");
    let (ready, own_kernels) = ahead.wait()?;
    let mut images = BTreeMap::new();
    for (host, made) in &ready.images {
        match made {
            Ok(made) => {
                images.insert(*host, made);
            }
            // Whoever asked for it is told; otherwise this machine's archive may not have it.
            Err(error) if *host == Host::New && args.host != Host::New => {
                let reason = Outcome::Skipped(format!("there is no newer host: {error:#}").replace('\n', " "));
                cases.extract_if(.., |case| case.machine.host == *host).for_each(|case| {
                    reporter.add(&case.full_name(), reason.clone(), None);
                });
            }
            Err(error) => bail!("{error:#}"),
        }
    }
    let cache = &ready.cache;
    cache.forget_logs("cases-")?;
    let bench = Bench { cache, images: &images, programs: &ready.programs, files, reporter };
    lanes::run(&bench, cases, own_kernels, args.jobs.map_or_else(lanes::default_lanes, NonZero::get));
    Ok(())
}
