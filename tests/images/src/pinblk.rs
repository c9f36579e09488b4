//! A driver for `pinblk`, Causeway's device that reads a file into memory with the host's kernel doing the transfer.

use crate::harness;
use crate::pci::{self, BAR0, MASTER, MEMORY, SourceId};
use crate::x86::{read, wait_for, write};

const IOVA: u64 = 0x08;
const OFFSET: u64 = 0x10;
const LENGTH: u64 = 0x18;
const COMMAND: u64 = 0x20;
const STATUS: u64 = 0x24;
const ARRIVED: u64 = 0x28;
const PINNED: u64 = 0x30;
const START: u32 = 1;
const BUSY: u32 = 1;
const FAILED: u32 = 2;

/// Bytes of the file that a device has which is given none: behind them it begins again.
pub const FILE_SIZE: u64 = 4 << 20;
/// What is added to each offset there.
const PATTERN: u64 = 0x5049_4e00 << 32;

/// The device.
pub struct PinBlk {
    /// Its source id.
    pub sid: SourceId,
    bar: u64,
}

impl PinBlk {
    /// The first one on bus 0, with Bus Master on. The test is skipped where there is none.
    pub fn first() -> Self {
        let Some(sid) = pci::find(0, 0x1234, 0x70b1).next() else { harness::skipped("there is no pinblk") };
        sid.command(MEMORY | MASTER, 0);
        Self { sid, bar: u64::from(sid.read(BAR0) & !0xf) }
    }

    /// What the file has at `offset`, a multiple of 8.
    pub fn content(offset: u64) -> u64 {
        offset % FILE_SIZE + PATTERN
    }

    /// Begins to read `len` bytes at `offset` of the file to `iova`.
    pub fn start(&self, iova: u64, offset: u64, len: u64) {
        write(self.bar + IOVA, iova);
        write(self.bar + OFFSET, offset);
        write(self.bar + LENGTH, len);
        write(self.bar + COMMAND, START);
    }

    /// Whether a transfer goes on.
    pub fn is_busy(&self) -> bool {
        read::<u32>(self.bar + STATUS) & BUSY != 0
    }

    /// Waits for the end: whether all arrived.
    pub fn arrives(&self) -> bool {
        wait_for("the end of a read", || !self.is_busy());
        read::<u32>(self.bar + STATUS) & FAILED == 0
    }

    /// Bytes that arrived.
    pub fn arrived(&self) -> u64 {
        read(self.bar + ARRIVED)
    }

    /// Pages that the device has pinned.
    pub fn pinned(&self) -> u64 {
        read(self.bar + PINNED)
    }
}
