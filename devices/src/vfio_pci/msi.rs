//! MSI of the assigned function (PCI Express base specification 6.0, section 7.7.1). The capability is ours, kept in
//! the guest's configuration space; this says what it means. Its header is, too, although nobody can write it: when
//! those two bytes are written, Linux's vfio (6.12) also writes the control register that it keeps itself, in which MSI
//! is off.

use vtd::Msi;

use super::vectors::{SavedVector, Vectors};
use crate::pci::ConfigSpace;
use crate::pci::config::CAP_MSI;

const CONTROL_ENABLE: u16 = 1;
const CONTROL_64: u16 = 1 << 7;
const CONTROL_MASKABLE: u16 = 1 << 8;

/// The capability and its vectors.
pub struct MsiCapability {
    at: u16,
    is_64: bool,
    is_maskable: bool,
    /// How many vectors the function has.
    capable: u16,
    vectors: Vectors,
}

impl MsiCapability {
    /// The capability at `at` with the host's `control` register, put into `config` for the guest. `next`: its link.
    pub fn new(at: u16, next: u8, control: u16, config: &mut ConfigSpace, vectors: Vectors) -> Self {
        let control = control & (0x0e | CONTROL_64 | CONTROL_MASKABLE);
        let (is_64, is_maskable) = (control & CONTROL_64 != 0, control & CONTROL_MASKABLE != 0);
        let capable = 1 << (control >> 1 & 7).min(5);
        let this = Self { at, is_64, is_maskable, capable, vectors };
        config.put(at, &[CAP_MSI, next]);
        config.put(at + 2, &control.to_le_bytes());
        // Enable, and how many of the vectors are enabled.
        config.allow(at + 2, &0x71u16.to_le_bytes());
        config.allow(at + 4, &0xffff_fffcu32.to_le_bytes());
        if is_64 {
            config.allow(at + 8, &u32::MAX.to_le_bytes());
        }
        config.allow(this.data_at(), &u16::MAX.to_le_bytes());
        if is_maskable {
            let implemented = u32::MAX >> (32 - u32::from(capable));
            config.allow(this.mask_at(), &implemented.to_le_bytes());
        }
        this
    }

    /// Bytes of a capability with this control register.
    pub fn len(control: u16) -> u16 {
        10 + if control & CONTROL_64 != 0 { 4 } else { 0 } + if control & CONTROL_MASKABLE != 0 { 10 } else { 0 }
    }

    /// The bytes of the capability that are ours.
    pub fn owned(&self) -> std::ops::Range<u16> {
        let end = if self.is_maskable { self.mask_at() + 8 } else { self.data_at() + 2 };
        self.at..end
    }

    fn data_at(&self) -> u16 {
        self.at + if self.is_64 { 12 } else { 8 }
    }
    fn mask_at(&self) -> u16 {
        self.data_at() + 4
    }

    /// Whether the guest has it enabled.
    pub fn is_enabled(&self, config: &ConfigSpace) -> bool {
        config.u16(self.at + 2) & CONTROL_ENABLE != 0
    }

    fn message(&self, config: &ConfigSpace, enabled: u16, index: usize) -> Option<Msi> {
        let mask = if self.is_maskable { config.u32(self.mask_at()) } else { 0 };
        let upper = if self.is_64 { config.u32(self.at + 8) } else { 0 };
        let address = u64::from(config.u32(self.at + 4)) | (u64::from(upper) << 32);
        // The function puts the vector into the low bits of the data.
        let data = u32::from(config.u16(self.data_at()) & !(enabled - 1)) | index as u32;
        (mask >> index & 1 == 0).then_some(Msi { address, data })
    }

    /// Makes real what the registers say.
    pub fn update(&mut self, config: &ConfigSpace) {
        if !self.is_enabled(config) {
            self.vectors.disable();
            return;
        }
        let messages = self.messages(config);
        if self.vectors.is_enabled() && self.vectors.count() == messages.len() {
            self.vectors.program_all(messages);
            return;
        }
        // Another number while it is enabled means nothing (section 7.7.1.2); a host has one for as long as it is.
        self.vectors.disable();
        self.vectors.enable(messages);
    }

    /// What the vectors deliver that are enabled.
    fn messages(&self, config: &ConfigSpace) -> Vec<Option<Msi>> {
        let enabled = (1 << (config.u16(self.at + 2) >> 4 & 7).min(5)).min(self.capable);
        (0..usize::from(enabled)).map(|i| self.message(config, enabled, i)).collect()
    }

    /// The bits that the capability itself keeps: offsets and masks.
    pub fn own_bits(&self) -> Vec<(u16, u16)> {
        let pending = self.mask_at() + 4;
        if self.is_maskable { vec![(pending, u16::MAX), (pending + 2, u16::MAX)] } else { Vec::new() }
    }

    /// Nothing is delivered, until [`MsiCapability::go_on`].
    pub fn hold(&mut self) {
        self.vectors.hold();
    }

    /// Delivers again.
    pub fn go_on(&mut self) {
        self.vectors.go_on();
    }

    /// What is saved besides the registers, while it is held.
    pub fn saved(&self) -> Vec<SavedVector> {
        self.vectors.saved()
    }

    /// As the registers say, and held.
    pub fn restore(&mut self, config: &ConfigSpace, saved: &[SavedVector]) {
        if self.is_enabled(config) {
            self.vectors.restore(self.messages(config), saved);
        } else {
            self.vectors.disable();
        }
    }

    /// Puts the pending bits where the guest reads them.
    pub fn refresh_pending(&mut self, config: &mut ConfigSpace) {
        if !self.is_maskable {
            return;
        }
        let at = self.mask_at() + 4;
        let mut device = [0; 4];
        if self.vectors.is_enabled() {
            self.vectors.read_device(at, &mut device);
        }
        let device = u32::from_le_bytes(device);
        let pending = |i: u16| self.vectors.is_pending(i.into(), device >> i & 1 != 0);
        let bits = (0..self.capable).map(pending).zip(0..).fold(0, |bits, (bit, i)| bits | u32::from(bit) << i);
        config.put(at, &bits.to_le_bytes());
    }

    /// Disables it.
    pub fn disable(&mut self) {
        self.vectors.disable();
    }
}
