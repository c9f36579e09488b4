//! Random 4 KiB reads of a block device by several threads, each compared with what a first pass read:
//! `randread DEVICE --mib N --seconds N --threads N`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use sha2::{Digest, Sha256};

/// Random 4 KiB reads of a block device, compared with a first pass.
#[derive(Parser)]
struct Arguments {
    device: PathBuf,
    /// How much of the device, from its start.
    #[arg(long, default_value_t = 64)]
    mib: usize,
    /// How long.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// How many threads read at once.
    #[arg(long, default_value_t = 2)]
    threads: u64,
}

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;

/// Bytes whose first is aligned for O_DIRECT.
struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_DIRECT);
        options.open(&arguments.device).with_context(|| format!("opening {}", arguments.device.display()))
    };
    let device = open()?;
    let mut expected = vec![0; arguments.mib * MIB];
    let mut block = Aligned::new(MIB);
    for (i, part) in expected.chunks_mut(MIB).enumerate() {
        device.read_exact_at(block.bytes(), (i * MIB) as u64).with_context(|| format!("reading MiB {i}"))?;
        part.copy_from_slice(block.bytes());
    }
    println!("sha256 {:x}", Sha256::digest(&expected));
    let until = Instant::now() + Duration::from_secs(arguments.seconds);
    let reads = std::thread::scope(|scope| -> Result<u64> {
        let readers: Vec<_> =
            (0..arguments.threads).map(|seed| Ok((seed, open()?))).collect::<Result<Vec<(u64, File)>>>()?;
        let readers: Vec<_> = readers
            .into_iter()
            .map(|(seed, file)| {
                scope.spawn({
                    let expected = &expected;
                    move || read(file, seed + 1, expected, until)
                })
            })
            .collect();
        readers.into_iter().map(|r| r.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?).sum()
    })?;
    println!("reads {reads}");
    Ok(())
}

/// Reads until then; how many blocks.
fn read(device: File, seed: u64, expected: &[u8], until: Instant) -> Result<u64> {
    // xorshift64.
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut block = Aligned::new(BLOCK);
    let mut reads = 0;
    while Instant::now() < until {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let at = (random % (expected.len() / BLOCK) as u64) as usize * BLOCK;
        device.read_exact_at(block.bytes(), at as u64).with_context(|| format!("reading 4 KiB at {at:#x}"))?;
        ensure!(*block.bytes() == expected[at..at + BLOCK], "the 4 KiB at {at:#x} are not what they were");
        reads += 1;
    }
    Ok(reads)
}
