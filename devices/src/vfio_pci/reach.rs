//! The one owner of whether the BARs of a function are reached: by trapped accesses of vCPUs, through what is mapped
//! into the guest, and by the DMA of other functions (F-1 to F-3).
//!
//! ```text
//!  goes    gate closed, which waits for accesses in flight ► windows out of the guest, then out of the DMA of other
//!          functions ([`MemorySlots::unmap`]) ► BARs off the bus ► the host's function is told
//!  comes   the host's function is told ► BARs on the bus ► windows into the DMA of others, then into the guest ►
//!          gate opened
//! ```
//!
//! The order cannot be had otherwise:
//! - An access of a BAR needs an [`Access`], which only an open gate gives, and which keeps that gate from closing.
//! - What turns memory or I/O off in the host's function needs a [`Change`], which says what may stay on in it, and a
//!   reset needs a [`Closed`]. Only a [`Reach`] makes them, when what must go is gone.
//! - As long as there is a `Closed`, the `Reach` is lent to it: nothing comes back.
//!
//! A gate is a lock around one bit. Who closes it has the exclusive side for the moment of clearing the bit: no guest
//! memory, no BAR and no vCPU is touched under it, and no other lock is taken.
//!
//! [`MemorySlots::unmap`]: crate::host::MemorySlots::unmap

use std::io;
use std::sync::Arc;

use vfio_bridge::{Function, RegionKind};
use vtd::Requester;

use crate::pci::config::{COMMAND_IO, COMMAND_MEMORY};
use crate::pci::{BarTarget, Decoder};
use crate::sync::{RwLock, RwLockReadGuard};

/// Where a BAR is decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Space {
    /// In memory.
    Memory,
    /// Among the ports.
    Io,
}

impl Space {
    const ALL: [Self; 2] = [Self::Memory, Self::Io];
}

/// In which spaces a function answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Enables {
    /// Memory.
    pub memory: bool,
    /// Ports.
    pub io: bool,
}

impl Enables {
    fn has(self, space: Space) -> bool {
        match space {
            Space::Memory => self.memory,
            Space::Io => self.io,
        }
    }

    /// Memory Space Enable and I/O Space Enable of the command register.
    pub fn bits(self) -> u16 {
        let bit = |on, bit| if on { bit } else { 0 };
        bit(self.memory, COMMAND_MEMORY) | bit(self.io, COMMAND_IO)
    }
}

/// The gates in front of the regions of a host's function: nothing else reads or writes its BARs and its ROM.
pub struct Gates {
    host: Arc<dyn Function>,
    memory: RwLock<bool>,
    io: RwLock<bool>,
}

/// Leave to reach BARs. Memory, or I/O, is on as long as it is there.
pub struct Access<'a> {
    host: &'a dyn Function,
    _open: RwLockReadGuard<'a, bool>,
}

impl Gates {
    /// Closed.
    pub fn new(host: Arc<dyn Function>) -> Arc<Self> {
        Arc::new(Self { host, memory: RwLock::new(false), io: RwLock::new(false) })
    }

    fn of(&self, space: Space) -> &RwLock<bool> {
        match space {
            Space::Memory => &self.memory,
            Space::Io => &self.io,
        }
    }

    /// Leave to access BARs in `space`; `None` while that is disabled. Waits for nobody but who opens or closes it.
    pub fn enter(&self, space: Space) -> Option<Access<'_>> {
        let open = self.of(space).read().unwrap();
        open.then_some(Access { host: &*self.host, _open: open })
    }

    fn set(&self, space: Space, open: bool) {
        *self.of(space).write().unwrap() = open;
    }
}

impl Access<'_> {
    /// Reads `data.len()` bytes at `offset` of `region`; what cannot be read is all ones.
    pub fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        self.host.read(region, offset, data);
    }

    /// Writes `data` at `offset` of `region`.
    pub fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()> {
        self.host.write(region, offset, data)
    }
}

/// How many BARs a function has at most, its expansion ROM among them.
pub const BARS: usize = 7;
/// The ROM's place among them.
pub const ROM_BAR: usize = 6;

/// Where each BAR is to be decoded: first and last address.
pub type Places = [Option<(u64, u64)>; BARS];

/// A BAR as its decoder knows it.
pub struct Decoded {
    space: Space,
    decoder: Arc<Decoder>,
    target: BarTarget,
    /// Where it is now.
    at: Option<(u64, u64)>,
}

impl Decoded {
    /// A BAR in `space` that is decoded nowhere.
    pub fn new(space: Space, decoder: Arc<Decoder>, target: BarTarget) -> Self {
        Self { space, decoder, target, at: None }
    }
}

/// What decides whether the BARs of one function are reached.
pub struct Reach {
    of: Requester,
    bars: [Option<Decoded>; BARS],
    // Behind the windows, which are files of the host's function: where this is its last user, they are closed before.
    gates: Arc<Gates>,
}

/// The host's function may be told what comes: what ends with it is gone.
pub struct Change {
    keeps: Enables,
}

impl Change {
    /// What is still reached, and must stay on in the host's function.
    pub fn keeps(&self) -> Enables {
        self.keeps
    }
}

/// Nothing of the function is reached, for as long as this is there.
pub struct Closed<'a> {
    change: Change,
    _lent: &'a mut Reach,
}

impl Closed<'_> {
    /// Whatever the host's function is told now, nothing is reached meanwhile.
    pub fn change(&self) -> &Change {
        &self.change
    }
}

impl Reach {
    /// Of the function `of`, whose trapped accesses go through `gates`. Nothing is reached.
    pub fn new(of: Requester, gates: Arc<Gates>, bars: [Option<Decoded>; BARS]) -> Self {
        Self { of, gates, bars }
    }

    /// Makes the change `host_write` of the host's function: before it goes what is not wanted after it, and after it
    /// comes what was not wanted before. What is the same stays as it is. A BAR has no place while its space is
    /// disabled, whatever `places` says.
    pub fn change(&mut self, enables: Enables, places: &Places, host_write: impl FnOnce(&Change)) {
        self.take_away(enables, places);
        host_write(&Change { keeps: enables });
        self.put_in_place(enables, places);
    }

    /// Takes everything away.
    pub fn close(&mut self) -> Closed<'_> {
        self.take_away(Enables::default(), &[None; BARS]);
        Closed { change: Change { keeps: Enables::default() }, _lent: self }
    }

    /// What answers for BAR `index`.
    #[cfg(test)]
    pub fn target(&self, index: usize) -> Option<&BarTarget> {
        self.bars[index].as_ref().map(|bar| &bar.target)
    }

    fn take_away(&mut self, enables: Enables, places: &Places) {
        for space in Space::ALL.into_iter().filter(|space| !enables.has(*space)) {
            self.gates.set(space, false);
        }
        self.decode(enables, places, false);
    }

    fn put_in_place(&mut self, enables: Enables, places: &Places) {
        self.decode(enables, places, true);
        for space in Space::ALL.into_iter().filter(|space| enables.has(*space)) {
            self.gates.set(space, true);
        }
    }

    /// Takes BARs from where they are not wanted, or puts them where they are, too.
    fn decode(&mut self, enables: Enables, places: &Places, put: bool) {
        for ((index, bar), place) in (0..).zip(&mut self.bars).zip(places) {
            let Some(bar) = bar else { continue };
            let wanted = place.filter(|_| enables.has(bar.space));
            if bar.at != wanted {
                bar.at = wanted.filter(|_| put);
                bar.decoder.set(self.of, index, bar.at, &bar.target);
            }
        }
    }
}
