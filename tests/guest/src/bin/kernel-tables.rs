//! Runs beside Causeway, in its host: compares the table that the host kernel's IOMMU driver keeps for a function with
//! what Causeway's trace says it handed out, page by page, both ways. Neither the guest nor Causeway may change it
//! meanwhile.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use guest_programs::host_trace::Replay;
use guest_programs::kernel_tables::{Frames, HostBars, Table};

/// Differences that are shown.
const SHOWN: usize = 10;

/// Compares the host kernel's table of a function with what Causeway handed out.
#[derive(Parser)]
struct Arguments {
    /// The function, as DDDD:BB:DD.F.
    bdf: String,
    /// Causeway's trace, complete up to now, with an audit in it.
    #[arg(long, requires = "pid", required_unless_present = "empty")]
    trace: Option<PathBuf>,
    /// Causeway's process.
    #[arg(long)]
    pid: Option<u32>,
    /// The table must translate nothing.
    #[arg(long, conflicts_with = "trace")]
    empty: bool,
    /// At least this many pages are mapped.
    #[arg(long, default_value_t = 1)]
    pages: usize,
}

fn main() -> Result<()> {
    let Arguments { bdf, trace, pid, empty, pages } = Arguments::parse();
    let table = Table::of(&bdf)?;
    let (Some(trace), Some(pid), false) = (trace, pid, empty) else {
        if let Some((iova, page)) = table.pages.first_key_value() {
            bail!("{bdf}: {} pages are mapped, the first at {iova:#x}000: {page:x?}", table.pages.len());
        }
        println!("kernel-tables: {bdf}: nothing is mapped");
        return Ok(());
    };
    ensure!(table.translates, "{bdf}: the host's kernel does not translate for it");
    let text = fs::read_to_string(&trace).with_context(|| format!("reading {}", trace.display()))?;
    let group = fs::read_link(Path::new("/sys/bus/pci/devices").join(&bdf).join("iommu_group"))?;
    let group = group.file_name().context("an empty group link")?.to_string_lossy().into_owned();
    let container = Replay::container_of(&text, &group)?;
    let replay = Replay::of(&text, &container).context("the trace")?;
    ensure!(replay.ledgers > 0, "the trace has no audit");
    let differences = compare(&bdf, &replay, &table, &Frames::of(pid)?, &HostBars::of_vfio()?)?;
    let count = table.pages.len();
    if !differences.is_empty() {
        for difference in differences.iter().take(SHOWN) {
            println!("kernel-tables: {bdf}: {difference}");
        }
        bail!("{bdf}: {} differences in {count} pages", differences.len());
    }
    ensure!(count >= pages, "{bdf}: only {count} pages are mapped");
    let ([small, large, huge], extents, ledgers) = (table.leaves, replay.extents.len(), replay.ledgers);
    println!(
        "kernel-tables: {bdf}: {count} pages as handed out in {extents} extents: {small} leaves of 4K, {large} of 2M, {huge} of 1G; \
         {ledgers} ledgers agree"
    );
    Ok(())
}

fn compare(bdf: &str, replay: &Replay, table: &Table, frames: &Frames, bars: &HostBars) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    let mut expected = 0;
    for extent in replay.extents.values() {
        let count = (extent.last - extent.first + 1) >> 12;
        expected += count;
        // The address of a BAR has no page behind it until somebody uses it, which nobody does.
        let behind = match replay.is_bar(extent.gpa) {
            true => None,
            false => Some(frames.behind(extent.hva, count)?),
        };
        for at in 0..count {
            let iova = (extent.first >> 12) + at;
            let frame = match (&behind, table.pages.get(&iova)) {
                (Some(frames), _) => frames[at as usize],
                (None, Some(page)) if bars.can_be(extent.gpa + (at << 12), page.frame) => page.frame,
                (None, _) => 0,
            };
            let difference = match table.pages.get(&iova) {
                None => "is not mapped".to_owned(),
                Some(page) if page.frame != frame => format!("leads to frame {:#x} instead of {frame:#x}", page.frame),
                Some(page) if !extent.permission.allows(page.permission) => {
                    format!("may be used for {} instead of {}", page.permission, extent.permission)
                }
                Some(_) => continue,
            };
            differences.push(format!("{iova:#x}000, of {extent}, {difference}"));
        }
    }
    let handed_out = |iova: u64| {
        let before = replay.extents.range(..=(iova << 12)).next_back();
        before.is_some_and(|(_, extent)| iova << 12 <= extent.last)
    };
    for (iova, page) in table.pages.iter().filter(|(iova, _)| !handed_out(**iova)) {
        differences.push(format!("{iova:#x}000 leads to frame {:#x} and was not handed out", page.frame));
    }
    ensure!(
        !differences.is_empty() || expected == table.pages.len() as u64,
        "{bdf}: {expected} pages were handed out, {} are mapped",
        table.pages.len()
    );
    Ok(differences)
}
