//! MSI-X of the assigned function (PCI Express base specification 6.0, section 7.7.2): the guest's table and pending
//! bits are ours, the host's are VFIO's.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use vtd::Msi;

use super::vectors::{SavedVector, Vectors};

/// Control: MSI-X Enable.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Control: Function Mask.
pub const CONTROL_MASK: u16 = 1 << 14;
/// Vector control: masked.
const VECTOR_MASKED: u32 = 1;

/// Where the table and the pending bits are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// How many vectors.
    pub count: usize,
    /// BAR and range of the table in it.
    pub table: (u8, Range<u64>),
    /// BAR and range of the pending bits in it.
    pub pba: (u8, Range<u64>),
}

impl Layout {
    /// From the capability's three registers: control, table and pending-bit array (BAR in bits 2:0 of the last two).
    pub fn new(control: u16, table: u32, pba: u32) -> Self {
        let count = usize::from(control & 0x7ff) + 1;
        let place = |register: u32, len: u64| {
            let first = u64::from(register & !7);
            ((register & 7) as u8, first..first + len)
        };
        Self { count, table: place(table, 16 * count as u64), pba: place(pba, 8 * (count as u64).div_ceil(64)) }
    }

    /// The ranges of `bar` that the guest must not have mapped.
    pub fn trapped(&self, bar: u8) -> impl Iterator<Item = &Range<u64>> {
        [&self.table, &self.pba].into_iter().filter(move |(b, _)| *b == bar).map(|(_, range)| range)
    }
}

/// The guest's view of MSI-X.
pub struct Msix {
    entries: Vec<[u32; 4]>,
    enabled: bool,
    masked: bool,
    vectors: Vectors,
}

/// What is saved of it besides the control register.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMsix {
    entries: Vec<[u32; 4]>,
    vectors: Vec<SavedVector>,
}

impl Msix {
    /// Nothing is delivered, until [`Msix::go_on`].
    pub fn hold(&mut self) {
        self.vectors.hold();
    }

    /// Delivers again.
    pub fn go_on(&mut self) {
        self.vectors.go_on();
    }

    /// What is saved, while it is held.
    pub fn saved(&self) -> SavedMsix {
        SavedMsix { entries: self.entries.clone(), vectors: self.vectors.saved() }
    }

    /// Whether it can be as `saved`.
    pub fn can_be(&self, saved: &SavedMsix) -> bool {
        let is_possible = |entry: &[u32; 4]| entry[3] & !VECTOR_MASKED == 0;
        saved.entries.len() == self.entries.len() && saved.entries.iter().all(is_possible)
    }

    /// As it was, with this control register, and held.
    pub fn restore(&mut self, saved: SavedMsix, control: u16) {
        self.entries = saved.entries;
        (self.enabled, self.masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if self.enabled {
            let messages = (0..self.entries.len()).map(|index| self.message(index)).collect();
            self.vectors.restore(messages, &saved.vectors);
        } else {
            self.vectors.disable();
        }
    }

    /// Disabled, `count` vectors, all masked.
    pub fn new(count: usize, vectors: Vectors) -> Self {
        Self { entries: vec![Self::RESET_ENTRY; count], enabled: false, masked: false, vectors }
    }

    const RESET_ENTRY: [u32; 4] = [0, 0, 0, VECTOR_MASKED];

    /// Back to power-on.
    pub fn reset(&mut self) {
        let Self { entries, enabled, masked, vectors } = self;
        entries.fill(Self::RESET_ENTRY);
        *enabled = false;
        *masked = false;
        vectors.disable();
    }

    /// Whether the guest has it enabled.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The guest writes the control register.
    pub fn set_control(&mut self, control: u16) {
        let enable = control & CONTROL_ENABLE != 0;
        self.masked = control & CONTROL_MASK != 0;
        self.enabled = enable;
        if !enable {
            self.vectors.disable();
            return;
        }
        let messages = (0..self.entries.len()).map(|index| self.message(index)).collect();
        if self.vectors.is_enabled() {
            self.vectors.program_all(messages);
        } else {
            self.vectors.enable(messages);
        }
    }

    fn entry_message(entry: &[u32; 4]) -> Option<Msi> {
        let address = u64::from(entry[0] & !3) | (u64::from(entry[1]) << 32);
        (entry[3] & VECTOR_MASKED == 0).then_some(Msi { address, data: entry[2] })
    }

    fn message(&self, index: usize) -> Option<Msi> {
        if self.enabled && !self.masked { Self::entry_message(&self.entries[index]) } else { None }
    }

    /// Reads 1, 2 or 4 bytes of the table, inside one 32-bit word.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let Some(entry) = self.entries.get((offset / 16) as usize) else { return };
        let word = entry[(offset / 4 % 4) as usize].to_le_bytes();
        for (to, from) in data.iter_mut().zip(&word[(offset % 4) as usize..]) {
            *to = *from;
        }
    }

    /// Writes 1, 2 or 4 bytes of the table, inside one 32-bit word.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let index = (offset / 16) as usize;
        let Some(entry) = self.entries.get_mut(index) else { return };
        let word = &mut entry[(offset / 4 % 4) as usize];
        let mut bytes = word.to_le_bytes();
        for (to, from) in bytes[(offset % 4) as usize..].iter_mut().zip(data) {
            *to = *from;
        }
        *word = u32::from_le_bytes(bytes);
        // Bits 31:1 of the vector control are reserved.
        entry[3] &= VECTOR_MASKED;
        self.vectors.program(index, self.message(index));
    }

    /// Reads 1, 2 or 4 bytes of the pending bits. `device` reads the device's own.
    pub fn read_pba(&mut self, offset: u64, data: &mut [u8], device: impl FnOnce(&mut [u8])) {
        data.fill(0);
        if self.vectors.is_enabled() {
            device(data);
        }
        for (i, byte) in data.iter_mut().enumerate() {
            let (first, device) = (8 * (offset as usize + i), *byte);
            let pending = |bit: usize| self.vectors.is_pending(first + bit, device >> bit & 1 != 0);
            *byte = (0..8).map(pending).zip(0..).fold(0, |bits, (is_pending, bit)| bits | u8::from(is_pending) << bit);
        }
    }
}
