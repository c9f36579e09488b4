//! `cargo xtask demo`: a guest reads 64 MiB from an NVMe disk that is assigned to it behind our VT-d, and a table says
//! how that went. It boots twice: how many host operations a read takes depends on the order of the guest's free pages.

mod host_device;

use crate::cache::{Cache, progress};
use crate::l1::{self, Host, Images};
use crate::nested::{self, DEFAULT_CPU, DEFAULT_MEMORY, End, Job, Kernel, Limit, Machine};
use crate::programs::{self, Program};
use crate::table::{self, grouped};
use crate::topology::Topology;
use anyhow::{Context, Result, bail};
use clap::Args;
use host_device::HostDevice;
use serde_json::Value;
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

const MEASURE: &str = include_str!("../../resources/l1/measure.sh");
const SCRIPT: &str = include_str!("../../resources/l1/demo.sh");
pub const READS: &str = include_str!("../../resources/guest/reads.sh");
/// The read of each guest, and what it is called: any guest's memory is as its boot left it; put in order, mappings can
/// be joined.
pub const GUESTS: [(&str, &str); 2] =
    [("buffered-unsettled", "memory as boot left it"), ("buffered", "memory settled")];

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// An NVMe disk of this machine instead of the nested bench's; it is only read, and its driver gets it back
    #[arg(long, value_name = "BDF")]
    device: Option<String>,
    /// Whether the guest's kernel drives the remapping unit
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = ["on", "off"])]
    intel_iommu: String,
    /// A static `causeway` that is built already
    #[arg(long, value_name = "FILE", env = "CAUSEWAY_BINARY")]
    causeway: Option<PathBuf>,
}

/// What was seen of one guest, on whichever machine.
#[derive(Debug, Default)]
pub struct Facts {
    /// Of [`GUESTS`].
    pub read: &'static str,
    /// What the guest printed: word and rest.
    pub guest: HashMap<String, String>,
    /// Seen from outside: status, init, counted_maps, counted_unmaps, host_faults, host_device.
    pub outside: HashMap<String, String>,
    pub stats: Option<Value>,
    pub expected_sha256: String,
    /// The ends of the guest's console and of causeway's messages, for a failure.
    pub logs: String,
}

pub fn command(args: &DemoArgs) -> Result<u8> {
    let translated = args.intel_iommu == "on";
    let options = format!("intel_iommu={}", args.intel_iommu);
    let programs = programs::build(args.causeway.as_deref(), programs::Profile::Programs)?;
    let cache = Cache::open()?;
    let images = l1::prepare(&cache, Host::Default)?;
    let guests = match &args.device {
        Some(bdf) => HostDevice::open(bdf)?.demo(&cache, &images, &programs, &options)?,
        None => nested(&cache, &images, &programs, &options)?,
    };
    let judged: Vec<(Vec<Row>, Vec<String>)> = guests.iter().map(|facts| judge(facts, translated)).collect();
    let head: Vec<&str> = std::iter::once("what").chain(GUESTS.iter().map(|(_, name)| *name)).collect();
    print!("{}", table::plain(&head, &beside(judged.iter().map(|(rows, _)| rows.as_slice()))));
    if judged.iter().all(|(_, complaints)| complaints.is_empty()) {
        println!("PASS");
        return Ok(0);
    }
    for ((facts, (_, complaints)), (_, name)) in guests.iter().zip(&judged).zip(GUESTS) {
        if complaints.is_empty() {
            continue;
        }
        eprintln!("{}", facts.logs.trim_end());
        for complaint in complaints {
            println!("- {name}: {complaint}");
        }
    }
    println!("FAIL");
    Ok(1)
}

fn nested(cache: &Cache, images: &Images, programs: &[Program], options: &str) -> Result<Vec<Facts>> {
    let out = cache.path("demo");
    let _ = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out)?;
    let (measure, reads) = (cache.path("measure.sh"), cache.path("reads.sh"));
    std::fs::write(&measure, MEASURE)?;
    std::fs::write(&reads, READS)?;
    let files = [("causeway/files/measure.sh".to_owned(), measure), ("causeway/files/reads.sh".to_owned(), reads)];
    let reads = GUESTS.map(|(read, _)| read).join(" ");
    let head = format!("#!/bin/sh\nDEMO_OPTIONS='{options}'\nDEMO_READS='{reads}'\n");
    let script = SCRIPT.replacen("#!/bin/sh\n", &head, 1);
    let machine = Machine {
        host: Host::Default,
        memory: DEFAULT_MEMORY,
        topology: Topology::Flat,
        append: String::new(),
        cpu: DEFAULT_CPU.to_owned(),
        kernel: Kernel::Distribution,
    };
    let job = Job {
        machine: &machine,
        name: "demo",
        script: script.as_bytes(),
        files: &files,
        programs,
        out: Some(&out),
        limit: Limit::Scaled(Duration::from_secs(300)),
        interactive: false,
        input: None,
    };
    progress("booting a host with KVM and VFIO, and in it a guest, twice");
    let report = nested::run(cache, images, &job, Box::new(std::io::stderr()))?;
    if report.end != End::Exit(0) {
        nested::show_console(&report.console);
        bail!("the bench ended with {:?}", report.end);
    }
    let facts = |(read, _)| {
        let file = |kind: &str| std::fs::read_to_string(out.join(format!("{read}.{kind}"))).unwrap_or_default();
        Facts {
            read,
            guest: words(&file("log")),
            outside: words(&file("facts")),
            stats: serde_json::from_str(&file("json")).ok(),
            expected_sha256: images.content.sha256.clone(),
            logs: logs(&file("log"), &file("err")),
        }
    };
    Ok(GUESTS.map(facts).into())
}

/// The ends of both, for a failure.
pub fn logs(console: &str, messages: &str) -> String {
    format!("--- the guest's console\n{}--- causeway's messages\n{}", tail(console), tail(messages))
}

/// The first word of each line, and the rest.
pub fn words(text: &str) -> HashMap<String, String> {
    let lines = text.lines().filter_map(|line| line.trim_end().split_once(' '));
    lines.map(|(key, value)| (key.trim_end_matches(':').to_owned(), value.to_owned())).collect()
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].iter().map(|line| format!("{line}\n")).collect()
}

/// What is told, and how it is.
type Row = (&'static str, String);

/// A table with a column for each guest; all are told the same, in the same order, unless something is missing.
fn beside<'a>(guests: impl Iterator<Item = &'a [Row]> + Clone) -> Vec<Vec<String>> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in guests.clone().flatten() {
        if !names.contains(name) {
            names.push(name);
        }
    }
    let value =
        |rows: &[Row], name: &str| rows.iter().find(|row| row.0 == name).map_or("-".to_owned(), |row| row.1.clone());
    let line =
        |name: &str| std::iter::once(name.to_owned()).chain(guests.clone().map(|rows| value(rows, name))).collect();
    names.into_iter().map(line).collect()
}

/// The rows, and what is not as it should be.
fn judge(facts: &Facts, translated: bool) -> (Vec<Row>, Vec<String>) {
    let mut rows = Vec::new();
    let mut complaints = Vec::new();
    let mut row = |what: &'static str, value: String| rows.push((what, value));
    let guest = |key: &str| facts.guest.get(key).map_or("", String::as_str);
    let outside = |key: &str| facts.outside.get(key).map_or("", String::as_str);
    let mut demand = |holds: bool, complaint: String| {
        if !holds {
            complaints.push(complaint);
        }
    };

    row("guest kernel", guest("kernel").to_owned());
    row("start to guest's init", format!("{} s", outside("init")));
    demand(outside("status") == "0", format!("causeway ended with status {}", outside("status")));
    row("assigned function", format!("{} as {}", outside("host_device"), guest("function")));
    let width =
        u64::from_str_radix(guest("capabilities"), 16).ok().map(|capabilities| ((capabilities >> 16) & 0x3f) + 1);
    let unit = width.map_or("the guest drives none".to_owned(), |width| format!("VT-d, {width} bits"));
    row("remapping unit", unit);
    row("guest's domain of the function", guest("domain").to_owned());
    if translated {
        demand(width.is_some(), "the guest drives no remapping unit".to_owned());
        demand(
            guest("domain").starts_with("DMA"),
            format!("the function's domain in the guest is '{}', not DMA", guest("domain")),
        );
    }
    let seconds: Option<f64> = guest(facts.read).strip_prefix("seconds ").and_then(|text| text.parse().ok());
    row("64 MiB, buffered", seconds.map_or("not read".to_owned(), |s| format!("{s:.2} s, {:.0} MiB/s", 64.0 / s)));
    let matches = guest("sha256") == facts.expected_sha256 && !facts.expected_sha256.is_empty();
    let short = |sum: &str| sum.chars().take(16).collect::<String>();
    let verdict = if matches { "as on the disk" } else { "NOT as on the disk" };
    row("checksum", format!("{}... {verdict}", short(guest("sha256"))));
    demand(matches, format!("checksum {} instead of {}", guest("sha256"), facts.expected_sha256));

    let device = facts.stats.as_ref().and_then(|stats| stats["devices"].get(0));
    let stat = |key: &str| device.and_then(|device| device[key].as_u64());
    demand(device.is_some(), "no statistics of the device".to_owned());
    for (what, count, bytes, counted) in [
        ("host map operations", "host_maps", "mapped_bytes_total", "counted_maps"),
        ("host unmap operations", "host_unmaps", "unmapped_bytes_total", "counted_unmaps"),
    ] {
        let (Some(number), Some(bytes)) = (stat(count), stat(bytes)) else { continue };
        let mut value = format!("{}, {} KiB", grouped(number), grouped(bytes / 1024));
        if let Ok(seen) = outside(counted).parse::<u64>() {
            value += &format!(" (the kernel counted {})", grouped(seen));
            demand(seen == number, format!("{what}: the statistics say {number}, the kernel counted {seen}"));
        }
        row(what, value);
    }
    if let (Some(live), Some(peak)) = (stat("live_extents"), stat("peak_extents")) {
        row("extents at the end, at most", format!("{}, {}", grouped(live), grouped(peak)));
    }
    if let Some(nanoseconds) = stat("host_time_ns") {
        row("time in host operations", format!("{:.1} ms", nanoseconds as f64 / 1e6));
    }
    if let Some(splits) = stat("splits") {
        row("mappings cut", grouped(splits));
        demand(splits == 0, format!("{splits} live mappings were cut"));
    }
    row("DMA faults, guest and host", format!("{}, {}", guest("faults"), outside("host_faults")));
    demand(guest("faults") == "0", "the guest's kernel reports DMA faults".to_owned());
    demand(matches!(outside("host_faults"), "0"), "the host's kernel reports DMA faults".to_owned());
    (rows, complaints)
}

/// What `HostDevice` needs of a line of the guest's console.
pub fn is_init(line: &str) -> bool {
    line.contains("guest: init at ")
}

/// The initramfs of the demonstration's guest.
pub fn initrd(images: &Images, programs: &[Program]) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(&images.guest_base).context("cannot read the guest's initramfs")?;
    let mut archive = crate::cpio::Archive::new(Vec::new());
    archive.file("script.sh", 0o755, READS.as_bytes())?;
    let reader = programs.iter().find(|program| program.name == "blkread").context("no program blkread")?;
    archive.copy("files/blkread", &reader.file)?;
    bytes.extend(archive.finish()?);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let guest = "kernel 6.12\nfunction 0000:00:01.0\ndomain DMA\ncapabilities d2008c222f0686\nbuffered seconds 0.5\nsha256 abc\nfaults 0\n";
        let outside =
            "status 0\ninit 2.5\ncounted_maps 10\ncounted_unmaps 9\nhost_faults 0\nhost_device 0000:00:09.0\n";
        let stats = serde_json::json!({ "devices": [{ "host_maps": 10, "host_unmaps": 9, "mapped_bytes_total": 4096,
            "unmapped_bytes_total": 4096, "live_extents": 1, "peak_extents": 3, "host_time_ns": 5, "splits": 0 }] });
        Facts {
            read: "buffered",
            guest: words(guest),
            outside: words(outside),
            stats: Some(stats),
            expected_sha256: "abc".to_owned(),
            logs: String::new(),
        }
    }

    #[test]
    fn a_good_run_has_no_complaints() {
        let (rows, complaints) = judge(&facts(), true);
        assert_eq!(complaints, Vec::<String>::new());
        assert!(rows.contains(&("remapping unit", "VT-d, 48 bits".to_owned())), "{rows:?}");
    }

    #[test]
    fn each_thing_that_is_wrong_is_a_complaint() {
        type Spoil = fn(&mut Facts);
        let spoils: [Spoil; 9] = [
            |f| drop(f.guest.insert("sha256".to_owned(), "abd".to_owned())),
            |f| drop(f.guest.remove("sha256")),
            |f| drop(f.guest.insert("domain".to_owned(), "identity".to_owned())),
            |f| drop(f.guest.remove("capabilities")),
            |f| drop(f.guest.insert("faults".to_owned(), "1".to_owned())),
            |f| drop(f.outside.insert("host_faults".to_owned(), "2".to_owned())),
            |f| drop(f.outside.insert("status".to_owned(), "8".to_owned())),
            |f| drop(f.outside.insert("counted_maps".to_owned(), "11".to_owned())),
            |f| f.stats = None,
        ];
        for (index, spoil) in spoils.iter().enumerate() {
            let mut facts = facts();
            spoil(&mut facts);
            assert_eq!(judge(&facts, true).1.len(), 1, "{index}: {:?}", judge(&facts, true).1);
        }
    }

    #[test]
    fn a_guest_of_which_less_is_known_has_gaps() {
        let (rows, _) = judge(&facts(), true);
        let (less, _) = judge(&Facts { stats: None, ..facts() }, true);
        let table = beside([less.as_slice(), rows.as_slice()].into_iter());
        assert!(table.contains(&["mappings cut", "-", "0"].map(str::to_owned).to_vec()), "{table:?}");
        assert!(
            table.contains(&["64 MiB, buffered", "0.50 s, 128 MiB/s", "0.50 s, 128 MiB/s"].map(str::to_owned).to_vec())
        );
        assert_eq!(table.len(), rows.len());
    }

    #[test]
    fn without_the_guests_iommu_driver_no_unit_is_asked_for() {
        let mut facts = facts();
        facts.guest.remove("capabilities");
        facts.guest.insert("domain".to_owned(), "none".to_owned());
        assert!(judge(&facts, false).1.is_empty());
    }
}
