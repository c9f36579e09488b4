//! The command line of edu-vfio.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Drives an edu function through this kernel's VFIO type1.
#[derive(Parser)]
pub struct Arguments {
    /// The function, as DDDD:BB:DD.F; the first edu if not given. It is bound to vfio-pci and stays bound.
    #[arg(long)]
    pub bdf: Option<String>,
    /// Where mappings begin, in the device's address space.
    #[arg(long, default_value = "0x1000000", value_parser = number)]
    pub iova: u64,
    /// Blocked DMA must show as a fault in this kernel's own log, with the function and the address.
    #[arg(long)]
    pub expect_fault: bool,
    #[command(subcommand)]
    pub scenario: Scenario,
}

#[derive(Clone, Subcommand)]
pub enum Scenario {
    /// A page goes into the device and comes back into another page.
    Roundtrip,
    /// The function's MSI reaches an eventfd, for a raised interrupt and for the end of a DMA.
    Msi,
    /// The message of the function's MSI, written by DMA, reaches the eventfd once.
    MsiByDma,
    /// DATA is written to ADDRESS by DMA, without a mapping of it: as a message that may not be sent.
    Message {
        /// Where, of the interrupt address range.
        #[arg(value_parser = number)]
        address: u64,
        /// The four bytes.
        #[arg(value_parser = number)]
        data: u64,
    },
    /// DMA to IOVAs that were never mapped changes nothing and reads nothing.
    Outside,
    /// DMA that was programmed (and one whose doorbell was rung) while mapped, fired after UNMAP, changes nothing.
    Armed,
    /// The device reads a read-only mapping and cannot write it.
    Readonly,
    /// 1 GiB of IOVA space, in the largest pages that this kernel has reserved; unmapped whole, and in two halves.
    Big,
    /// Pages go into the device and come back, each through a mapping of its own, until a file is there. No DMA aims
    /// elsewhere.
    Busy {
        /// The file.
        until: PathBuf,
        /// From when on this file is there, one page goes into the device and comes back, at the IOVA that is its
        /// guest-physical address: the same place with translation and without. Another one stays mapped where it is
        /// not, and no DMA aims at it.
        #[arg(long)]
        at_home_from: Option<PathBuf>,
    },
    /// Random mappings come and go; the device reaches those that are there and no other.
    Loop {
        /// How many steps.
        #[arg(default_value_t = 20)]
        steps: u32,
        /// Starts the sequence; the same seed gives the same steps.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// More mappings, or more memory, than the host below this kernel takes: this kernel must not notice, the device
    /// reaches what the host took and nothing else, and what is unmapped makes room. What is mapped first must fit.
    Crowded {
        /// How many mappings.
        pieces: u64,
        /// Mappings of 2 MiB (two reserved pages are needed) instead of 4 KiB.
        #[arg(long)]
        huge: bool,
    },
    /// MSIs while the interrupt moves between the first two processors: each arrives, once, and after a move at the new
    /// processor.
    Storm {
        /// Until it moved that often.
        moves: u64,
        /// That many may arrive twice, where the processor is known to do so; how many did is said.
        #[arg(long, default_value_t = 0)]
        twice: u64,
    },
}

fn number(text: &str) -> Result<u64, std::num::ParseIntError> {
    text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16))
}
