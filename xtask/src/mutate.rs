//! `cargo xtask mutate`: breaks the code on purpose, one named mutation at a time, and says which tests notice.
//!
//! The mutations of a crate are listed in `tests/mutations/CRATE.toml`. Each is put into a copy of the tree, and the
//! crate's own tests are run there; with `--images` those of `causeway test` too. What no test sees is a missing test,
//! or equivalent to the right code, which the list then says with a reason.

mod lane;
mod list;
mod page;

use crate::cache::{progress, target};
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use lane::{Lane, Verdict};
use list::Mutation;
use regex::Regex;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;

#[derive(Debug, Args)]
pub struct MutateArgs {
    /// Only the mutations of these crates: vtd, vfio-bridge, devices, vmm
    #[arg(value_name = "CRATE")]
    crates: Vec<String>,
    /// Runs the suite of test images too, on this machine's KVM
    #[arg(long)]
    images: bool,
    /// Only what this expression matches: `CRATE: NAME`
    #[arg(long, value_name = "RE")]
    only: Option<Regex>,
    /// Prints the mutations and runs nothing
    #[arg(long)]
    list: bool,
    /// Writes docs/mutations.md anew, of what it has and the lists say, and runs nothing
    #[arg(long)]
    page: bool,
    /// How many mutations are run at a time, each in a copy of the tree and with a target folder of its own
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: Option<u32>,
}

/// What became of a mutation.
#[derive(Debug, Clone)]
struct Outcome {
    mutation: Mutation,
    verdict: Verdict,
    /// Tests of the image suite that failed, where it was run.
    images: Option<Vec<String>>,
}

impl Outcome {
    fn killed(&self) -> bool {
        matches!(self.verdict, Verdict::Killed(_)) || self.images.as_ref().is_some_and(|tests| !tests.is_empty())
    }

    /// `killed`, `survived` or `equivalent`.
    fn word(&self) -> &'static str {
        match (&self.mutation.equivalent, self.killed()) {
            (_, true) => "killed",
            (None, false) => "survived",
            (Some(_), false) => "equivalent",
        }
    }
}

/// The exit status is 0 if everything that is not equivalent was killed, else 1: also if one does not build. The last
/// line has the counts.
pub fn command(args: &MutateArgs) -> Result<u8> {
    if args.page {
        page::update(&[]).context("cannot write docs/mutations.md")?;
        return Ok(0);
    }
    let mut mutations = list::load()?;
    for name in &args.crates {
        ensure!(mutations.iter().any(|mutation| mutation.package == *name), "no mutations of {name} are listed");
    }
    mutations.retain(|mutation| {
        (args.crates.is_empty() || args.crates.contains(&mutation.package))
            && args.only.as_ref().is_none_or(|only| only.is_match(&mutation.title()))
    });
    if args.list {
        mutations.iter().for_each(|mutation| println!("{}", mutation.title()));
        return Ok(0);
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = args.jobs.map_or(processors, |jobs| jobs as usize).min(mutations.len());
    progress(format_args!("{} mutations, {jobs} at a time", mutations.len()));
    let lane_folder = |number: usize| target().join("mutate").join(number.to_string());
    let first = Lane::new(&lane_folder(0))?;
    let packages: BTreeSet<&str> = mutations.iter().map(|mutation| mutation.package.as_str()).collect();
    packages.into_iter().try_for_each(|package| first.unbroken(package))?;
    let queue = Mutex::new(VecDeque::from(mutations));
    let (outcomes, failures) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let lanes: Vec<Result<()>> = std::thread::scope(|scope| {
        let (queue, outcomes, failures, lane_folder) = (&queue, &outcomes, &failures, &lane_folder);
        let work = move |number: usize| {
            let lane = Lane::new(&lane_folder(number))?;
            loop {
                let next = queue.lock().map_err(|_| lane::poisoned())?.pop_front();
                let Some(mutation) = next else { return Ok(()) };
                let title = mutation.title();
                let outcome = match run_one(&lane, mutation, args.images) {
                    Ok(outcome) => outcome,
                    // The others can be run all the same.
                    Err(error) => {
                        println!("not run    {title}\n{error:#}");
                        failures.lock().map_err(|_| lane::poisoned())?.push(title);
                        continue;
                    }
                };
                println!("{}", line(&outcome));
                let mut outcomes = outcomes.lock().map_err(|_| lane::poisoned())?;
                // At once: whoever ends a long run keeps what it found.
                page::update(std::slice::from_ref(&outcome)).context("cannot write docs/mutations.md")?;
                outcomes.push(outcome);
            }
        };
        let threads: Vec<_> = (0..jobs).map(|number| scope.spawn(move || work(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a lane panicked"))).collect()
    });
    let mut outcomes = outcomes.into_inner().map_err(|_| lane::poisoned())?;
    outcomes.sort_by_key(|outcome| outcome.mutation.title());
    lanes.into_iter().collect::<Result<()>>()?;
    let count = |word: &str| outcomes.iter().filter(|outcome| outcome.word() == word).count();
    outcomes.iter().filter(|outcome| outcome.word() == "survived").for_each(|outcome| {
        println!("survived: {}", outcome.mutation.title());
    });
    let mut failures = failures.into_inner().map_err(|_| lane::poisoned())?;
    failures.sort();
    failures.iter().for_each(|title| println!("not run: {title}"));
    let (killed, survived) = (count("killed"), count("survived"));
    println!("{killed} killed, {survived} survived, {} equivalent, {} not run", count("equivalent"), failures.len());
    Ok(u8::from(survived > 0 || !failures.is_empty()))
}

fn run_one(lane: &Lane, mutation: Mutation, images: bool) -> Result<Outcome> {
    let (verdict, images) = lane.with(&mutation, |lane| {
        let verdict = lane.crate_tests(&mutation)?;
        let images = images.then(|| lane.image_tests()).transpose()?;
        Ok((verdict, images))
    })?;
    Ok(Outcome { mutation, verdict, images })
}

fn line(outcome: &Outcome) -> String {
    let mut tests = match &outcome.verdict {
        Verdict::Killed(tests) => tests.clone(),
        Verdict::Survived => Vec::new(),
    };
    tests.extend(outcome.images.iter().flatten().cloned());
    let shown = tests.first().map_or(String::new(), |first| format!(" ({first}{})", page::more(tests.len())));
    format!("{:<10} {}{shown}", outcome.word(), outcome.mutation.title())
}
