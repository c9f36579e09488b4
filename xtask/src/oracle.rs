//! `cargo xtask oracle`: the same test images under QEMU's intel-iommu and edu, emulated (TCG), as a second opinion.
//! Every test whose result differs from ours is in `tests/images/differences.txt`, with who is right.

use crate::cache::{Cache, progress, target};
use crate::crate_tests::cargo;
use crate::l1::Host;
use crate::l1::{self, Qemu};
use crate::report::{Outcome, Reporter};
use anyhow::{Context, Result, ensure};
use clap::Args;
use regex::Regex;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

#[derive(Debug, Args)]
pub struct OracleArgs {
    /// Only tests whose name this expression matches
    #[arg(long, value_name = "RE")]
    only: Option<Regex>,
}

const DIFFERENCES: &str = include_str!("../../tests/images/differences.txt");
/// For one test: QEMU's edu takes a tenth of a second for each transfer, and emulation is slow.
const LIMIT: Duration = Duration::from_secs(120);

/// A test and what it asks of its machine.
#[derive(Debug, Default, PartialEq, Eq)]
struct Test {
    name: String,
    reboots: bool,
    options: Vec<String>,
}

/// Names and reasons, from lines `NAME reason`.
fn differences(text: &str) -> BTreeMap<&str, &str> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter_map(|line| line.split_once(' ')).collect()
}

fn parse(list: &str) -> Vec<Test> {
    let test = |line: &str| {
        let mut words = line.split_ascii_whitespace().map(str::to_owned).peekable();
        let name = words.next()?;
        let reboots = words.next_if(|word| word == "reboots").is_some();
        Some(Test { name, reboots, options: words.collect() })
    };
    list.lines().filter_map(test).collect()
}

/// Our options in QEMU's words.
fn machine(options: &[String]) -> Vec<String> {
    let mut unit = BTreeMap::from([("intremap", "on"), ("caching-mode", "on"), ("eim", "on"), ("aw-bits", "48")]);
    let (mut edus, mut cpus, mut memory) = (1, "1", "64M");
    for option in options.chunks(2) {
        match option {
            [key, value] if key == "--iommu" => {
                // QEMU's IOAPIC has no source id that could be checked, and its unit posts nothing, so it has no such
                // options.
                let pairs = value.split(',').filter_map(|pair| pair.split_once('='));
                unit.extend(pairs.filter(|(key, _)| !["ioapic-check", "posted"].contains(key)));
                if unit["intremap"] == "off" {
                    unit.insert("eim", "off");
                }
            }
            [key, _] if key == "--device" => edus += 1,
            [key, value] if key == "--cpus" => cpus = value,
            [key, value] if key == "--memory" => memory = value,
            _ => {}
        }
    }
    let unit = unit.iter().map(|(key, value)| format!(",{key}={value}")).collect::<String>();
    let mut arguments = ["-smp", cpus, "-m", memory, "-device"].map(str::to_owned).to_vec();
    arguments.push(format!("intel-iommu{unit}"));
    for slot in 1..=edus {
        // The mask of addresses is 28 bits wide unless it is said.
        arguments.extend(["-device".to_owned(), format!("edu,dma_mask=0xffffffffffffffff,addr={slot:02x}.0")]);
    }
    arguments
}

/// Runs the image. Gives back what it printed, once it or the time limit ended it.
fn run(qemu: &Qemu, image: &Path, words: &str, test: &Test) -> Result<String> {
    let mut command = qemu.command();
    command.args(["-accel", "tcg", "-M", "q35,kernel-irqchip=split", "-cpu", "max"]);
    command.args(["-display", "none", "-nodefaults", "-serial", "stdio"]);
    if !test.reboots {
        command.arg("-no-reboot");
    }
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]).args(machine(&test.options));
    command.arg("-kernel").arg(image).args(["-append", words]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("cannot start QEMU")?;
    let mut output = child.stdout.take().context("QEMU has no output")?;
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        // What it printed until its end is all that there is.
        let _ = output.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > LIMIT {
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(reader.join().unwrap_or_default())
}

fn judge(output: &str, difference: Option<&str>) -> Outcome {
    let passed = output.lines().any(|line| line == "ok");
    let skipped = output.lines().find_map(|line| line.strip_prefix("skipped: "));
    match (passed, skipped, difference) {
        (true, _, None) => Outcome::Passed,
        (true, _, Some(_)) => Outcome::Failed("it passes, and is listed as a difference".to_owned()),
        (false, Some(why), None) => Outcome::Skipped(why.to_owned()),
        (false, _, Some(reason)) => Outcome::Skipped(format!("a known difference: {reason}")),
        (false, None, None) => Outcome::Failed(format!("a difference that is not explained\n{output}")),
    }
}

pub fn command(args: &OracleArgs) -> Result<u8> {
    progress("building the test images");
    let built = cargo().args(["build", "--quiet", "--release", "--package", "images"]).status()?;
    ensure!(built.success(), "the test images do not build");
    let image = target().join("release").join("suite");
    let cache = Cache::open()?;
    let qemu = l1::prepare(&cache, Host::Default)?.qemu;
    progress(qemu.version()?);
    let reporter = Reporter::new(true);
    let known = differences(DIFFERENCES);
    let list = parse(&run(&qemu, &image, "list", &Test::default())?);
    ensure!(!list.is_empty(), "the image prints no list under QEMU");
    for name in known.keys().filter(|name| !list.iter().any(|test| test.name == **name)) {
        reporter.add(name, Outcome::Failed("listed as a difference, and not a test".to_owned()), None);
    }
    for test in list.iter().filter(|test| args.only.as_ref().is_none_or(|only| only.is_match(&test.name))) {
        let start = Instant::now();
        let output = run(&qemu, &image, &format!("test={}", test.name), test)?;
        reporter.add(&test.name, judge(&output, known.get(test.name.as_str()).copied()), Some(start.elapsed()));
    }
    Ok(u8::from(!reporter.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_options_become_qemus() {
        let list = parse("a1_x --iommu vtd,aw-bits=57 --device edu\nb2_y reboots --cpus 2 --memory 5G\n");
        assert_eq!(list[1].options, ["--cpus", "2", "--memory", "5G"]);
        assert!(list[1].reboots && !list[0].reboots);
        assert!(machine(&list[1].options).join(" ").contains("-smp 2 -m 5G"));
        let arguments = machine(&list[0].options).join(" ");
        assert!(arguments.contains("aw-bits=57,caching-mode=on,eim=on,intremap=on"), "{arguments}");
        assert!(arguments.contains("-smp 1 -m 64M"));
        assert!(arguments.contains("addr=02.0") && !arguments.contains("addr=03.0"), "{arguments}");
        let off = machine(&["--iommu".to_owned(), "vtd,intremap=off".to_owned()]).join(" ");
        assert!(off.contains("eim=off,intremap=off"), "{off}");
    }

    #[test]
    fn every_difference_has_a_reason_and_is_wanted() {
        let known = differences(DIFFERENCES);
        for (name, reason) in &known {
            let explained = reason.strip_prefix("as for ").unwrap_or(name);
            assert!(known.get(explained).is_some_and(|reason| reason.ends_with("right")), "{name}: {reason}");
        }
        assert_eq!(judge("test x\nok\n", None), Outcome::Passed);
        assert!(matches!(judge("test x\nok\n", Some("because")), Outcome::Failed(_)));
        assert!(matches!(judge("FAILED: y\n", None), Outcome::Failed(_)));
        assert!(matches!(judge("FAILED: y\n", Some("because")), Outcome::Skipped(_)));
        assert!(matches!(judge("", None), Outcome::Failed(_)));
    }
}
