//! Takes any PCI function through this kernel's VFIO. At each line on stdin some mappings come and others go at random;
//! what is mapped then stays until the next line, so that it can be looked at from outside. The function does no DMA.

use std::io::BufRead;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use guest_programs::memory::{Backing, DmaMemory, PAGE};
use guest_programs::random::Random;
use guest_programs::vfio::{self, Access, Container};

/// Maps and unmaps at random for a function, at each line on stdin.
#[derive(Parser)]
struct Arguments {
    /// The function, as DDDD:BB:DD.F. It is bound to vfio-pci and stays bound.
    bdf: String,
    /// Changes at each line.
    #[arg(long, default_value_t = 40)]
    steps: u32,
    /// Starts the sequence; the same seed gives the same steps.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const IOVA: u64 = 1 << 30;
const SLOTS: usize = 16;
/// Of 4 KiB, as the IOVA space of a slot has room for.
const SLOT_PAGES: usize = 512;
const SLOT: usize = SLOT_PAGES * PAGE;

fn main() -> Result<()> {
    let Arguments { bdf, steps, seed } = Arguments::parse();
    let small = DmaMemory::new(SLOT, Backing::Base).context("memory")?;
    let large = DmaMemory::new(SLOT, Backing::Huge2M).context("a page of 2 MiB")?;
    vfio::bind(&bdf)?;
    let container = Container::open(&bdf)?;
    let _device = container.device(&bdf)?;
    let mut random = Random::new(seed);
    // What is mapped in each slot, as (offset, bytes).
    let mut slots: [Option<(usize, usize)>; SLOTS] = [None; SLOTS];
    for line in std::io::stdin().lock().lines() {
        line?;
        for _ in 0..steps {
            let slot = random.below(SLOTS);
            let at = |offset: usize| IOVA + (slot * SLOT + offset) as u64;
            if let Some((offset, size)) = slots[slot].take() {
                let unmapped = container.unmap(at(offset), size as u64).context("UNMAP_DMA")?;
                ensure!(unmapped == size as u64, "UNMAP_DMA of {size:#x} bytes took away {unmapped:#x}");
                continue;
            }
            let first = random.below(SLOT_PAGES);
            let pages = (first, 1 + random.below(SLOT_PAGES - first));
            let (memory, (first, count)) =
                if random.below(4) == 0 { (&large, (0, SLOT_PAGES)) } else { (&small, pages) };
            let access = if random.below(3) == 0 { Access::ReadOnly } else { Access::ReadWrite };
            container.map(at(first * PAGE), memory, first * PAGE, count * PAGE, access).context("MAP_DMA")?;
            slots[slot] = Some((first * PAGE, count * PAGE));
        }
        let held: Vec<usize> = slots.iter().flatten().map(|(_, size)| size / PAGE).collect();
        println!("vfio-churn: {bdf}: {} mappings of {} pages", held.len(), held.iter().sum::<usize>());
    }
    Ok(())
}
