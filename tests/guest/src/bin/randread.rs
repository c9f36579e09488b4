//! Reads 4 KiB of a block device at a time, at random and with O_DIRECT, in several threads, and checks each block:
//! `randread DEVICE --mib N --seconds S --threads T`.
//!
//! A first pass reads all of it in order; its checksum is for the caller to compare, and its blocks are what the random
//! reads are compared with.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use sha2::{Digest, Sha256};

/// Reads a block device at random, and checks what it reads.
#[derive(Parser)]
struct Arguments {
    device: PathBuf,
    /// How much of the device, from its start.
    #[arg(long)]
    mib: usize,
    /// How long it is read at random.
    #[arg(long)]
    seconds: u64,
    /// How many threads read.
    #[arg(long, default_value_t = 1)]
    threads: u64,
    /// Another order of the blocks for each number.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
/// The clock is looked at after so many reads.
const READS_AT_ONCE: usize = 64;

/// Page-aligned memory, as O_DIRECT wants it.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let memory = vec![0u8; len + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

fn open(device: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .with_context(|| format!("opening {}", device.display()))
}

/// Numbers that look random (xorshift, with 64 bits of state that must not be 0).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

fn read_at_random(device: &Path, expected: &[u8], mut random: Random, until: Instant) -> Result<u64> {
    let file = open(device)?;
    let mut buffer = Aligned::new(BLOCK);
    let mut reads = 0;
    while Instant::now() < until {
        for _ in 0..READS_AT_ONCE {
            let at = random.below(expected.len() / BLOCK) * BLOCK;
            let block = buffer.bytes();
            // So that a read which brings nothing is not taken for the one before.
            block.fill(0xa5);
            file.read_exact_at(block, at as u64).with_context(|| format!("reading at {at:#x}"))?;
            ensure!(*block == expected[at..at + BLOCK], "the block at {at:#x} is not what it was");
            reads += 1;
        }
    }
    Ok(reads)
}

fn main() -> Result<()> {
    let Arguments { device, mib, seconds, threads, seed } = Arguments::parse();
    ensure!(mib != 0 && threads != 0, "nothing to read");
    let file = open(&device)?;
    let mut expected = vec![0u8; mib * MIB];
    let mut buffer = Aligned::new(MIB);
    for (index, piece) in expected.chunks_exact_mut(MIB).enumerate() {
        file.read_exact_at(buffer.bytes(), (index * MIB) as u64).with_context(|| format!("reading MiB {index}"))?;
        piece.copy_from_slice(buffer.bytes());
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let reads: Result<Vec<u64>> = thread::scope(|scope| {
        let start = |thread: u64| {
            let random = Random((seed << 16 | (thread + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            let (device, expected) = (&device, &expected);
            scope.spawn(move || read_at_random(device, expected, random, until))
        };
        let readers: Vec<_> = (0..threads).map(start).collect();
        readers.into_iter().map(|reader| reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?).collect()
    });
    let reads = reads?;
    ensure!(reads.iter().all(|reads| *reads > 0), "a thread read nothing: {reads:?}");
    println!("reads {}", reads.iter().sum::<u64>());
    println!("sha256 {:x}", Sha256::digest(&expected));
    Ok(())
}
