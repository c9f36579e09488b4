//! Takes any PCI function through this kernel's VFIO, maps huge pages for it, takes them away in several ways, and lets
//! go of it. The function does no DMA: whoever drives it afterwards finds out whether it still reaches what it should.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use guest_programs::memory::{Backing, DmaMemory};
use guest_programs::vfio::{self, Access, Container};

/// Takes a function through VFIO and maps huge pages for it.
#[derive(Parser)]
struct Arguments {
    /// The function, as DDDD:BB:DD.F; bound to vfio-pci already.
    bdf: String,
    /// How many pages of 2 MiB the kernel has reserved for this.
    #[arg(default_value_t = 16)]
    pages: usize,
}

const HUGE: usize = 2 << 20;
const IOVA: u64 = 1 << 30;

fn main() -> Result<()> {
    let Arguments { bdf, pages } = Arguments::parse();
    ensure!(pages >= 2, "at least two pages");
    let memory = DmaMemory::new(pages * HUGE, Backing::Huge2M).context("huge pages")?;
    vfio::bind(&bdf)?;
    let container = Container::open(&bdf)?;
    let _device = container.device(&bdf)?;
    let map = |first: usize, count: usize| {
        container
            .map(IOVA + (first * HUGE) as u64, &memory, first * HUGE, count * HUGE, Access::ReadWrite)
            .with_context(|| format!("MAP_DMA of {count} pages from page {first}"))
    };
    let unmap = |first: usize, count: usize| -> Result<()> {
        let size = (count * HUGE) as u64;
        let unmapped = container.unmap(IOVA + (first * HUGE) as u64, size).context("UNMAP_DMA")?;
        ensure!(unmapped == size, "UNMAP_DMA of {size:#x} bytes took away {unmapped:#x}");
        Ok(())
    };
    // All in one call and away in one.
    map(0, pages)?;
    unmap(0, pages)?;
    // Page by page, every second one away and back, all away in one call.
    (0..pages).try_for_each(|page| map(page, 1))?;
    (0..pages).step_by(2).try_for_each(|page| unmap(page, 1))?;
    (0..pages).step_by(2).try_for_each(|page| map(page, 1))?;
    unmap(0, pages)?;
    // What is still mapped at the end goes away with the container.
    map(0, pages)?;
    println!("vfio-huge: {bdf}: {pages} pages of 2 MiB mapped and unmapped");
    Ok(())
}
