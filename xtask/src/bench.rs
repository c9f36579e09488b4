//! `cargo xtask bench`: what is measured. `nested` compares with QEMU in one L1, with the same guest, disk and options,
//! in alternating runs; host operations are counted by L1's kernel, the same way for both, as differences of runs with
//! and without the read.

use crate::cache::{Cache, progress, target};
use crate::crate_benches::{self, Criterion, Valgrind};
use crate::demo::READS;
use crate::l1;
use crate::l1::Host;
use crate::nested::{self, DEFAULT_CPU, DEFAULT_MEMORY, End, Job, Kernel, Limit, Machine};
use crate::programs;
use crate::table::{self, grouped};
use crate::topology::Topology;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const MEASURE: &str = include_str!("../../resources/l1/measure.sh");
const SCRIPT: &str = include_str!("../../resources/l1/bench.sh");
const VMMS: [&str; 2] = ["causeway", "qemu"];
/// The columns of a `run` line. Settled: memory that boot left in descending order is taken out of the way first
/// (`resources/guest/reads.sh`).
const TIMES: [(&str, &str); 6] = [
    ("init", "start to guest's init"),
    ("buffered-unsettled", "64 MiB buffered, memory as boot left it"),
    ("direct-unsettled", "64 MiB O_DIRECT in 1 MiB, memory as boot left it"),
    ("buffered", "64 MiB buffered, settled"),
    ("direct", "64 MiB O_DIRECT in 1 MiB, settled"),
    ("small", "2000 x 4 KiB O_DIRECT, settled"),
];
const COUNTED: [(&str, &str); 5] = [TIMES[1], TIMES[2], TIMES[3], TIMES[4], TIMES[5]];

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Only benchmarks whose name has this in it: `nested`, or a crate's
    filter: Option<String>,
    /// How many runs of each VMM `nested` takes the median of
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Only counts the instructions of what has a limit (a crate's benches/limits.toml); fails where one takes more
    #[arg(long)]
    instructions: bool,
    /// A static `causeway` that is built already
    #[arg(long, value_name = "FILE", env = "CAUSEWAY_BINARY")]
    causeway: Option<PathBuf>,
}

/// What `bench-report.json` holds. Fields are only ever added.
#[derive(Debug, Default, Serialize)]
struct Report {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    nested: Option<Nested>,
    criterion: Vec<Criterion>,
}

#[derive(Debug, Default, Serialize, PartialEq)]
struct Nested {
    rounds: u32,
    l1_boot_seconds: f64,
    qemu_version: String,
    kernel: String,
    /// VMM, measurement: seconds of each run, in order.
    seconds: BTreeMap<String, BTreeMap<String, Vec<f64>>>,
    /// VMM, read: host operations of the whole run (`idle`: without a read).
    operations: BTreeMap<String, BTreeMap<String, Operations>>,
    /// Whether our own statistics said the same as L1's kernel in each counted run.
    statistics_agree: bool,
}

#[derive(Debug, Clone, Copy, Default, Serialize, PartialEq, Eq)]
struct Operations {
    maps: u64,
    unmaps: u64,
}

pub fn command(args: &BenchArgs) -> Result<u8> {
    let wants = |name: &str| args.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()));
    if args.instructions {
        let complaints = crate_benches::check_limits(&Valgrind::find(Cache::open)?, &wants)?;
        complaints.iter().for_each(|complaint| println!("{complaint}"));
        return Ok(u8::from(!complaints.is_empty()));
    }
    let mut report = Report { version: 1, ..Report::default() };
    report.criterion = crate_benches::run(&wants)?;
    if wants("nested") {
        report.nested = Some(nested(args)?);
    }
    ensure!(
        report.nested.is_some() || !report.criterion.is_empty(),
        "no benchmark has '{}' in its name",
        args.filter.as_deref().unwrap_or("")
    );
    let mut markdown = String::from("# Measurements\n");
    if let Some(nested) = &report.nested {
        markdown += &nested_report(nested, table::markdown);
        print!("{}", nested_report(nested, table::plain));
    }
    if !report.criterion.is_empty() {
        let instructions = |c: &Criterion| c.instructions.map_or("-".to_owned(), |count| format!("{count:.0}"));
        let row = |c: &Criterion| vec![c.name.clone(), format!("{:.1}", c.median_ns), instructions(c)];
        let rows: Vec<Vec<String>> = report.criterion.iter().map(row).collect();
        let head = ["benchmark", "median, ns", "instructions"];
        markdown += &format!("\n## The crates' benchmarks\n\n{}", table::markdown(&head, &rows));
        print!("\n{}", table::plain(&head, &rows));
    }
    std::fs::create_dir_all(target())?;
    std::fs::write(target().join("bench-report.json"), serde_json::to_string_pretty(&report)? + "\n")?;
    std::fs::write(target().join("bench-report.md"), markdown)?;
    progress(format_args!("written to {}", target().join("bench-report.{json,md}").display()));
    let agrees = report.nested.is_none_or(|nested| nested.statistics_agree);
    if !agrees {
        println!("the statistics and L1's kernel disagree about the host operations");
    }
    Ok(u8::from(!agrees))
}

/// Keeps what L1 says and shows it as it comes.
struct Tee(Arc<Mutex<Vec<u8>>>);

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if let Ok(mut kept) = self.0.lock() {
            kept.extend_from_slice(bytes);
        }
        std::io::stderr().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

fn nested(args: &BenchArgs) -> Result<Nested> {
    let programs = programs::build(args.causeway.as_deref(), programs::Profile::Release)?;
    let cache = Cache::open()?;
    let images = l1::prepare(&cache, Host::Default)?;
    let out = cache.path("bench");
    let _ = std::fs::remove_dir_all(&out);
    let (measure, reads) = (cache.path("measure.sh"), cache.path("reads.sh"));
    std::fs::write(&measure, MEASURE)?;
    std::fs::write(&reads, READS)?;
    let files = [("causeway/files/measure.sh".to_owned(), measure), ("causeway/files/reads.sh".to_owned(), reads)];
    let script = SCRIPT.replacen("#!/bin/sh\n", &format!("#!/bin/sh\nROUNDS={}\n", args.rounds), 1);
    let machine = Machine {
        host: Host::Default,
        memory: DEFAULT_MEMORY,
        topology: Topology::Flat,
        append: String::new(),
        cpu: DEFAULT_CPU.to_owned(),
        kernel: Kernel::Distribution,
    };
    let kept = Arc::new(Mutex::new(Vec::new()));
    let job = Job {
        machine: &machine,
        name: "bench",
        script: script.as_bytes(),
        files: &files,
        programs: &programs,
        out: Some(&out),
        limit: Limit::Scaled(Duration::from_secs(200 + 60 * u64::from(args.rounds))),
        interactive: false,
        input: None,
    };
    let result = nested::run(&cache, &images, &job, Box::new(Tee(Arc::clone(&kept))))?;
    if result.end != End::Exit(0) {
        nested::show_console(&result.console);
        bail!("the bench ended with {:?}", result.end);
    }
    let text = kept.lock().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let mut measured = parse(&text)?;
    measured.rounds = args.rounds;
    measured.l1_boot_seconds = result.boot.unwrap_or_default().as_secs_f64();
    measured.qemu_version = images.qemu.version()?;
    measured.kernel = images.kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
    measured.statistics_agree = true;
    for (read, counted) in &measured.operations["causeway"] {
        let stats: Value = serde_json::from_slice(&std::fs::read(out.join(format!("{read}.json")))?)?;
        let sum = |key: &str| -> u64 {
            stats["devices"].as_array().into_iter().flatten().filter_map(|d| d[key].as_u64()).sum()
        };
        let own = Operations { maps: sum("host_maps"), unmaps: sum("host_unmaps") };
        if own != *counted {
            progress(format_args!("{read}: the statistics say {own:?}, L1's kernel counted {counted:?}"));
            measured.statistics_agree = false;
        }
    }
    Ok(measured)
}

/// The lines `count VMM READ MAPS UNMAPS` and `run VMM ROUND` with the four times.
fn parse(text: &str) -> Result<Nested> {
    let mut nested = Nested::default();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["count", vmm, read, maps, unmaps] => {
                let operations = Operations { maps: maps.parse()?, unmaps: unmaps.parse()? };
                nested.operations.entry((*vmm).to_owned()).or_default().insert((*read).to_owned(), operations);
            }
            ["run", vmm, _, times @ ..] => {
                ensure!(times.len() == TIMES.len(), "a run with {} times: {line}", times.len());
                for ((key, _), time) in TIMES.iter().zip(times) {
                    let of_vmm = nested.seconds.entry((*vmm).to_owned()).or_default();
                    of_vmm.entry((*key).to_owned()).or_default().push(time.parse().with_context(|| line.to_owned())?);
                }
            }
            _ => {}
        }
    }
    for vmm in VMMS {
        ensure!(nested.operations.contains_key(vmm) && nested.seconds.contains_key(vmm), "no measurements of {vmm}");
    }
    Ok(nested)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

type Tabulate = fn(&[&str], &[Vec<String>]) -> String;

fn nested_report(nested: &Nested, tabulate: Tabulate) -> String {
    let spread = |vmm: &str, key: &str| {
        let values = nested.seconds.get(vmm).and_then(|of_vmm| of_vmm.get(key)).map_or(&[][..], Vec::as_slice);
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(*v), high.max(*v)));
        format!("{:.2} ({low:.2}-{high:.2})", median(values))
    };
    let times: Vec<Vec<String>> = TIMES
        .iter()
        .map(|(key, what)| vec![(*what).to_owned(), spread("causeway", key), spread("qemu", key)])
        .collect();
    let count = |vmm: &str, read: &str| {
        let of =
            |read: &str| nested.operations.get(vmm).and_then(|of_vmm| of_vmm.get(read)).copied().unwrap_or_default();
        let (with, without) = (of(read), of("idle"));
        let difference = |a: u64, b: u64| if a >= b { grouped(a - b) } else { format!("-{}", grouped(b - a)) };
        [difference(with.maps, without.maps), difference(with.unmaps, without.unmaps)]
    };
    let rows = |vmm: &'static str| {
        move |(read, what): &(&str, &str)| {
            let [maps, unmaps] = count(vmm, read);
            vec![(*what).to_owned(), vmm.to_owned(), maps, unmaps]
        }
    };
    let mut operations: Vec<Vec<String>> = Vec::new();
    for vmm in VMMS {
        operations.extend(COUNTED.iter().map(rows(vmm)));
    }
    format!(
        "\n## A guest with an assigned NVMe behind a VT-d, translating\n\nBoth VMMs in one L1 ({}, kernel {}, up after {:.1} s), median of \
         {} alternating runs (least-most), seconds:\n\n{}\nHost operations that the read adds (a run with it less one without), as L1's \
         kernel counts them:\n\n{}",
        nested.qemu_version,
        nested.kernel,
        nested.l1_boot_seconds,
        nested.rounds,
        tabulate(&["what", "Causeway", "QEMU"], &times),
        tabulate(&["read", "VMM", "maps", "unmaps"], &operations),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "count causeway idle 40 30\ncount causeway buffered 140 131\ncount qemu idle 100 90\ncount qemu buffered 16516 16506\n\
                        run causeway 1 2.5 0.4 0.5 0.1 0.2 0.3\nrun qemu 1 4 1 2 3 4 5\nrun causeway 2 1.5 0.4 0.5 0.1 0.2 0.3\nrun causeway 3 9.5 0.4 0.5 0.1 0.2 0.3\n";

    #[test]
    fn differences_and_medians_are_reported() {
        let nested = parse(TEXT).unwrap();
        assert_eq!(nested.operations["qemu"]["buffered"], Operations { maps: 16516, unmaps: 16506 });
        let text = nested_report(&nested, table::markdown);
        assert!(text.contains("| start to guest's init | 2.50 (1.50-9.50) | 4.00 (4.00-4.00) |"), "{text}");
        assert!(text.contains("| 64 MiB buffered, settled | causeway | 100 | 101 |"), "{text}");
        assert!(text.contains("| 64 MiB buffered, settled | qemu | 16,416 | 16,416 |"), "{text}");
    }

    #[test]
    fn a_run_that_lacks_a_time_or_a_vmm_is_an_error() {
        assert!(parse("count causeway idle 1 1\nrun causeway 1 2.5 0.1\n").is_err());
        assert!(parse("count causeway idle 1 1\nrun causeway 1 2.5 0.4 0.5 0.1 0.2 0.3\n").is_err());
    }

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
