//! Drives an edu function of Causeway's through this kernel's iommufd: what only a unit for emulated devices offers.
//!
//! One scenario a run. Each line of output names the scenario; exit code 0 if everything held, 1 if not, 2 for usage.
//! The kernel's own driver programs the unit; a unit that does not offer what a scenario needs fails it.

mod counted;
mod dirty;
mod faults;
mod nested;
mod pasids;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use guest_programs::edu::{self, Direction, Edu};
use guest_programs::iommufd::{Function, Iommufd};
use guest_programs::memory::{DmaMemory, PAGE, pattern};
use guest_programs::vfio;

/// Drives an edu function through this kernel's iommufd.
#[derive(Parser)]
struct Arguments {
    /// The function, as DDDD:BB:DD.F; the first edu if not given. It is bound to vfio-pci and stays bound.
    #[arg(long)]
    bdf: Option<String>,
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Clone, Subcommand)]
enum Scenario {
    /// A page table that tracks what is written has exactly the pages that the device wrote since it was read last.
    /// For a unit with `slads=on`.
    Dirty {
        /// Random DMAs.
        #[arg(default_value_t = 200)]
        transfers: u32,
    },
    /// First-stage tables of this program over a page table of the kernel's: the device reaches what both grant, and
    /// nothing else once what was cached is invalidated. For a unit with `stage=both,nest=on`.
    Nested,
    /// Two PASIDs of one device reach what each was attached to, and requests without one a third page table. For
    /// `pasid-bits=20` and an edu with `pasid=on`; Linux 6.15.
    Pasids,
    /// Pages that are not there are asked for, come here as faults, and are reached once they are answered. For
    /// `nest=on,ats=on,pri=on` and an edu with the same and `pasid=on`; Linux 6.15.
    Faults,
    /// The counters of perf move by exactly what the device's DMAs need. For a unit with `perf=on`.
    Counted {
        /// The unit's name there.
        #[arg(long, default_value = "dmar0")]
        unit: String,
    },
}

/// A function that is bound to an iommufd.
struct Rig {
    bdf: String,
    iommufd: Iommufd,
    function: Function,
}

impl Rig {
    /// The function's registers. It must be attached to something.
    fn edu(&self) -> Result<Edu> {
        Edu::new(self.function.device()?).with_context(|| format!("{} is not an edu", self.bdf))
    }
}

/// The device writes a page of `seed`'s pattern from `from` to `to`, both of its address space.
fn copy(edu: &Edu, from: u64, to: u64) -> Result<()> {
    edu.dma(Direction::FromMemory, from, PAGE)?;
    edu.dma(Direction::ToMemory, to, PAGE)
}

/// The page at `offset` holds what `seed` gives.
fn holds(memory: &DmaMemory, offset: usize, seed: u8) -> bool {
    memory.read(offset, PAGE) == pattern(seed, PAGE)
}

/// Fails unless the page at `offset` holds what `seed` gives.
fn expect(what: &str, memory: &DmaMemory, offset: usize, seed: u8) -> Result<()> {
    ensure!(holds(memory, offset, seed), "{what}: the page at {offset:#x} does not hold what it should");
    Ok(())
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let bdf = arguments.bdf.map_or_else(|| vfio::find_function(edu::VENDOR, edu::DEVICE), Ok)?;
    vfio::bind(&bdf)?;
    let iommufd = Iommufd::open()?;
    let function = iommufd.bind(&bdf)?;
    let rig = Rig { bdf, iommufd, function };
    match arguments.scenario {
        Scenario::Dirty { transfers } => dirty::run(&rig, transfers),
        Scenario::Nested => nested::run(&rig),
        Scenario::Pasids => pasids::run(&rig),
        Scenario::Faults => faults::run(&rig),
        Scenario::Counted { unit } => counted::run(&rig, &unit),
    }
}
