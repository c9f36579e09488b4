//! Reads a block device and says how long that took: `blkread DEVICE buffered|direct BLOCK_SIZE COUNT [--sha256]`.
//!
//! The clock is CLOCK_MONOTONIC around each read alone, so hashing is not timed; without `--sha256` the sum of the
//! reads is the time of the whole loop, which is what a benchmark wants.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use guest_programs::memory::{PAGE, PageTables};
use sha2::{Digest, Sha256};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Through the page cache, which the caller has dropped.
    Buffered,
    /// O_DIRECT.
    Direct,
}

/// Reads a block device and says how long that took.
#[derive(Parser)]
struct Arguments {
    device: PathBuf,
    mode: Mode,
    /// Bytes of one read; a multiple of 512, at most 16 MiB.
    block_size: usize,
    /// How many reads, one after the other.
    count: u64,
    /// Prints the checksum of what was read.
    #[arg(long)]
    sha256: bool,
    /// Before that, takes 96 MiB of the kernel's memory and keeps it until the end. So what boot left in the free
    /// lists, single pages in descending order, is not what the reads are given.
    #[arg(long)]
    settle: bool,
}

const ALIGNMENT: usize = 4096;
const LARGEST_BLOCK: usize = 16 << 20;
const SETTLE_MEMORY: usize = 64 << 20;
const SETTLE_TABLES: usize = 32 << 20;
/// Too small to be given as a huge page, and large enough to be a mapping of its own.
const SETTLE_PIECE: usize = 512 << 10;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let size = arguments.block_size;
    ensure!(size != 0 && size.is_multiple_of(512) && size <= LARGEST_BLOCK, "block size {size}");
    let flags = if arguments.mode == Mode::Direct { libc::O_DIRECT } else { 0 };
    let mut device = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(&arguments.device)
        .with_context(|| format!("opening {}", arguments.device.display()))?;

    let _held = if arguments.settle { Some(settle()?) } else { None };
    let mut memory = vec![0u8; size + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let block = &mut memory[start..start + size];
    let mut hash = arguments.sha256.then(Sha256::new);
    let mut spent = Duration::ZERO;
    for i in 0..arguments.count {
        let before = Instant::now();
        device.read_exact(block).with_context(|| format!("reading block {i} of {size} bytes"))?;
        spent += before.elapsed();
        if let Some(hash) = &mut hash {
            hash.update(&*block);
        }
    }
    println!("seconds {:.6}", spent.as_secs_f64());
    if let Some(hash) = hash {
        println!("sha256 {:x}", hash.finalize());
    }
    Ok(())
}

/// Takes memory of both kinds that a read is given: what the kernel can move, as a process's own, and what it cannot,
/// as a block device's cache.
fn settle() -> Result<(Vec<Vec<u8>>, PageTables)> {
    // Written to, so that each page is there.
    let own = (0..SETTLE_MEMORY / SETTLE_PIECE).map(|_| vec![1u8; SETTLE_PIECE]).collect();
    Ok((own, PageTables::take(SETTLE_TABLES / PAGE).context("taking page tables")?))
}
