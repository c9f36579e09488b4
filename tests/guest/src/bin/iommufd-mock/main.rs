//! Runs in Causeway's host, in the place of Causeway: devices of Linux's `IOMMUFD_TEST` below the bridge. Whether what
//! they write, by page tables that the kernel's iommufd keeps, is what the bridge reports; and whether the requests of
//! one device with two PASIDs reach what each is to reach.

mod dirty;
mod mock;
mod parts;
mod rig;

use anyhow::Result;
use clap::Parser;
use vfio_bridge::Bdf;

/// Drives the bridge's iommufd backend with devices of IOMMUFD_TEST.
#[derive(Parser)]
struct Arguments {
    /// Random maps, unmaps, writes, switches and reads of each run.
    #[arg(long, default_value_t = 3000)]
    steps: u32,
    /// PASIDs too: Linux 6.15.
    #[arg(long)]
    pasids: bool,
    /// Says how it is known what this function of the host writes; bound to vfio-pci already.
    #[arg(long)]
    function: Option<Bdf>,
}

fn main() -> Result<()> {
    let Arguments { steps, pasids, function } = Arguments::parse();
    if let Some(function) = function {
        return dirty::of_function(function);
    }
    dirty::run(steps)?;
    if pasids {
        parts::run()?;
    }
    Ok(())
}
