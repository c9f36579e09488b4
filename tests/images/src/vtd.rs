//! A driver for the remapping unit. Section numbers are those of the VT-d specification.

use crate::memory::{page, pages, store};
use crate::pci::SourceId;
use crate::x86::{read, wait_for, write};
use crate::{check, memory};

/// Where the unit of a q35-like machine is, and, in this machine, how far from each other several are.
const BASE: u64 = 0xfed9_0000;
const APART: u64 = 0x4000;

/// Register offsets. Section 11.4.
pub mod offset {
    #![allow(missing_docs)] // Each is named as the specification names it.
    pub const VER: u64 = 0x00;
    pub const CAP: u64 = 0x08;
    pub const ECAP: u64 = 0x10;
    pub const GCMD: u64 = 0x18;
    pub const GSTS: u64 = 0x1c;
    pub const RTADDR: u64 = 0x20;
    pub const CCMD: u64 = 0x28;
    pub const FSTS: u64 = 0x34;
    pub const FECTL: u64 = 0x38;
    pub const FEDATA: u64 = 0x3c;
    pub const FEADDR: u64 = 0x40;
    pub const FEUADDR: u64 = 0x44;
    pub const IQH: u64 = 0x80;
    pub const IQT: u64 = 0x88;
    pub const IQA: u64 = 0x90;
    pub const ICS: u64 = 0x9c;
    pub const IECTL: u64 = 0xa0;
    pub const IEDATA: u64 = 0xa4;
    pub const IEADDR: u64 = 0xa8;
    pub const IEUADDR: u64 = 0xac;
    pub const IQERCD: u64 = 0xb0;
    pub const IRTA: u64 = 0xb8;
    pub const PQH: u64 = 0xc0;
    pub const PQT: u64 = 0xc8;
    pub const PQA: u64 = 0xd0;
    pub const PRS: u64 = 0xdc;
    pub const PECTL: u64 = 0xe0;
}
use offset::*;

/// TE of GCMD and GSTS.
pub const TRANSLATION: u32 = 1 << 31;
/// SRTP, RTPS.
pub const ROOT_POINTER: u32 = 1 << 30;
/// QIE, QIES.
pub const QUEUE: u32 = 1 << 26;
/// IRE, IRES.
pub const INTERRUPT_REMAPPING: u32 = 1 << 25;
/// SIRTP, IRTPS.
pub const INTERRUPT_POINTER: u32 = 1 << 24;
/// CFI, CFIS.
pub const COMPATIBILITY: u32 = 1 << 23;
/// What GSTS shows of commands that are done once: not to be written back.
const ONCE: u32 = ROOT_POINTER | INTERRUPT_POINTER | 1 << 29 | 1 << 27;

/// FSTS: PFO.
pub const OVERFLOW: u32 = 1 << 0;
/// FSTS: PPF.
pub const PENDING: u32 = 1 << 1;
/// FSTS: IQE.
pub const QUEUE_ERROR: u32 = 1 << 4;
/// FSTS: ITE.
pub const TIME_OUT: u32 = 1 << 6;
/// PRS: PPR.
pub const PAGE_REQUEST: u32 = 1 << 0;
/// PRS: PRO.
pub const PAGE_OVERFLOW: u32 = 1 << 1;

/// A fault record. Section 11.4.7.6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Who.
    pub source: SourceId,
    /// Why: the specification's code.
    pub reason: u8,
    /// Bits 63:12 of the address; for an interrupt its index in bits 63:48.
    pub info: u64,
    /// T1: a read.
    pub read: bool,
}

/// A descriptor of the invalidation queue. Section 6.5.2.
pub type Descriptor = [u64; 2];

/// Context-cache invalidation, global. Section 6.5.2.1.
pub const CONTEXT_GLOBAL: Descriptor = [1 | 1 << 4, 0];
/// Context-cache invalidation of a domain.
pub const fn context_domain(domain: u16) -> Descriptor {
    [1 | 2 << 4 | (domain as u64) << 16, 0]
}
/// Context-cache invalidation of a function.
pub const fn context_device(domain: u16, source: SourceId) -> Descriptor {
    [1 | 3 << 4 | (domain as u64) << 16 | (source.0 as u64) << 32, 0]
}
/// IOTLB invalidation, global. Section 6.5.2.3.
pub const IOTLB_GLOBAL: Descriptor = [2 | 1 << 4 | 3 << 6, 0];
/// IOTLB invalidation of a domain.
pub const fn iotlb_domain(domain: u16) -> Descriptor {
    [2 | 2 << 4 | 3 << 6 | (domain as u64) << 16, 0]
}
/// IOTLB invalidation of `2^mask` pages of a domain.
pub const fn iotlb_pages(domain: u16, iova: u64, mask: u8) -> Descriptor {
    [2 | 3 << 4 | 3 << 6 | (domain as u64) << 16, iova | mask as u64]
}
/// Interrupt-entry-cache invalidation, global. Section 6.5.2.7.
pub const ENTRIES_GLOBAL: Descriptor = [4, 0];
/// Interrupt-entry-cache invalidation of `2^mask` entries.
pub const fn entries(index: u16, mask: u8) -> Descriptor {
    [4 | 1 << 4 | (mask as u64) << 27 | (index as u64) << 32, 0]
}
/// Invalidation wait that writes `value` to `address`. Section 6.5.2.8.
pub const fn wait_status(address: u64, value: u32) -> Descriptor {
    [5 | 1 << 5 | (value as u64) << 32, address]
}

/// The unit.
pub struct Unit {
    base: u64,
    queue: u64,
    slots: u64,
    /// Bytes of a descriptor.
    size: u64,
    tail: u64,
    status: u64,
    waits: u32,
}

impl Unit {
    /// The unit as power-on left it.
    pub fn new() -> Self {
        Self::number(0)
    }

    /// The same of one of several.
    pub fn number(number: u64) -> Self {
        let base = BASE + number * APART;
        let unit = Self { base, queue: 0, slots: 0, size: 16, tail: 0, status: page(), waits: 0 };
        check!(!matches!(unit.read32(VER), 0 | u32::MAX), "there is no remapping unit at {base:#x}");
        unit
    }

    /// Where its registers are.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// A register of 32 bits.
    pub fn read32(&self, offset: u64) -> u32 {
        read(self.base + offset)
    }
    /// A register of 64 bits.
    pub fn read64(&self, offset: u64) -> u64 {
        read(self.base + offset)
    }
    /// A register of 32 bits.
    pub fn write32(&self, offset: u64, value: u32) {
        write(self.base + offset, value);
    }
    /// A register of 64 bits.
    pub fn write64(&self, offset: u64, value: u64) {
        write(self.base + offset, value);
    }

    /// `count` bits of CAP from `bit`.
    pub fn capability(&self, bit: u32, count: u32) -> u64 {
        self.read64(CAP) >> bit & ((1 << count) - 1)
    }
    /// `count` bits of ECAP from `bit`.
    pub fn extended(&self, bit: u32, count: u32) -> u64 {
        self.read64(ECAP) >> bit & ((1 << count) - 1)
    }

    /// Gives a command and waits until the status shows it. Section 11.4.4.1.
    pub fn command(&self, bit: u32, on: bool) {
        let kept = self.read32(GSTS) & !ONCE;
        self.write32(GCMD, if on { kept | bit } else { kept & !bit });
        wait_for("a global command", || (self.read32(GSTS) & bit != 0) == on);
    }

    /// Sets the root table.
    pub fn set_root(&self, table: u64) {
        self.write64(RTADDR, table);
        self.command(ROOT_POINTER, true);
    }

    /// Turns the queue on, with `256 << size` descriptors.
    pub fn start_queue(&mut self, size: u8) {
        self.slots = 256 << size;
        self.queue = pages(1 << size, memory::PAGE);
        self.tail = 0;
        self.write64(IQT, 0);
        self.write64(IQA, self.queue | u64::from(size));
        self.command(QUEUE, true);
    }

    /// Turns the queue on, with 128 descriptors of 256 bits.
    pub fn start_wide_queue(&mut self) {
        (self.slots, self.size) = (128, 32);
        self.queue = page();
        self.tail = 0;
        self.write64(IQT, 0);
        self.write64(IQA, self.queue | 1 << 11);
        self.command(QUEUE, true);
    }

    /// Puts descriptors into the queue, without moving the tail.
    pub fn queue(&mut self, descriptors: &[Descriptor]) {
        for [low, high] in descriptors {
            store(self.queue + self.size * self.tail, *low);
            store(self.queue + self.size * self.tail + 8, *high);
            self.tail = (self.tail + 1) % self.slots;
        }
    }

    /// Moves the tail behind what was queued.
    pub fn ring(&self) {
        self.write64(IQT, self.tail * self.size);
    }

    /// The index of the next descriptor, for tests of the queue itself.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Goes on at this index: for tests that moved the tail themselves.
    pub fn set_tail(&mut self, tail: u64) {
        self.tail = tail % self.slots;
    }

    /// Hands over `descriptors` and waits until they are done.
    pub fn invalidate(&mut self, descriptors: &[Descriptor]) {
        self.waits += 1;
        self.queue(descriptors);
        self.queue(&[wait_status(self.status, self.waits)]);
        self.ring();
        let (status, value) = (self.status, self.waits);
        wait_for("the status of a wait descriptor", || read::<u32>(status) == value);
    }

    /// Every cached thing.
    pub fn invalidate_all(&mut self) {
        self.invalidate(&[CONTEXT_GLOBAL, IOTLB_GLOBAL]);
    }

    fn record(&self, index: u64) -> u64 {
        self.capability(24, 10) * 16 + 16 * index
    }

    /// The number of fault recording registers.
    pub fn fault_records(&self) -> u64 {
        self.capability(40, 8) + 1
    }

    /// The fault in record `index`, if it has one.
    pub fn fault_at(&self, index: u64) -> Option<Fault> {
        let at = self.record(index);
        let high = self.read64(at + 8);
        (high >> 63 == 1).then(|| Fault {
            source: SourceId(high as u16),
            reason: (high >> 32) as u8,
            info: self.read64(at),
            read: high >> 62 & 1 == 1,
        })
    }

    /// Frees record `index`.
    pub fn clear_fault(&self, index: u64) {
        self.write32(self.record(index) + 12, 1 << 31);
    }

    /// The first fault, as FSTS points at it; its record is freed.
    pub fn take_fault(&self) -> Option<Fault> {
        let index = self.first_fault()?;
        let fault = self.fault_at(index);
        self.clear_fault(index);
        fault
    }

    /// The same, and of the fault the PASID that its request carried, if any.
    pub fn take_pasid(&self) -> Option<Option<u32>> {
        let index = self.first_fault()?;
        let high = self.read64(self.record(index) + 8);
        self.clear_fault(index);
        Some((high >> 31 & 1 == 1).then_some((high >> 40) as u32 & 0xf_ffff))
    }

    fn first_fault(&self) -> Option<u64> {
        let status = self.read32(FSTS);
        if status & PENDING == 0 {
            return None;
        }
        let first = u64::from(status >> 8 & 0xff);
        let count = self.fault_records();
        (0..count).map(|i| (first + i) % count).find(|index| self.fault_at(*index).is_some())
    }
}

impl Default for Unit {
    fn default() -> Self {
        Self::new()
    }
}
