//! A driver for `edu`, the teaching device of QEMU, which Causeway has too: DMA between memory and its buffer, and
//! interrupts.

use crate::harness;
use crate::memory::{load, page, store};
use crate::pci::{self, BAR0, COMMAND, InMemory, MASTER, MEMORY, SourceId};
use crate::x86::{self, pause, read, wait_for, write};

const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const PASID: u64 = 0xa0;
const PASID_VALID: u32 = 1 << 31;
const ATS: u64 = 0xa8;
const TRANSLATIONS: u64 = 0xac;
const RAISE: u64 = 0x60;
const ACKNOWLEDGE: u64 = 0x64;
const BUFFER: u64 = 0x40000;
const START: u64 = 1;
const TO_MEMORY: u64 = 2;
const INTERRUPT: u64 = 4;
const MSI: u8 = 5;
const VENDOR: u16 = 0x1234;
const DEVICE: u16 = 0x11e8;

/// The device. QEMU's takes a tenth of a second for each transfer, and trusts the guest that it stays in the buffer of
/// 4 KiB.
pub struct Edu {
    /// Its source id.
    pub sid: SourceId,
    /// Whether it is assigned: what it reaches is what the bridge mapped for it, in a host or in another process.
    pub assigned: bool,
    /// Whether the guest's unit records the faults of its DMA. Those of a function of the host are the host's; those of
    /// its interrupts are the guest's all the same.
    pub recorded: bool,
    bar: u64,
    /// Its configuration space, of one that ports do not reach.
    in_memory: Option<InMemory>,
    /// A page through which the processor fills and reads the device's buffer; domains of a test map it one to one.
    pub scratch: u64,
}

impl Edu {
    /// Every one on bus 0, with Bus Master on.
    pub fn all() -> impl Iterator<Item = Self> {
        pci::find(0, VENDOR, DEVICE).map(Self::at)
    }

    /// Every one on this bus, with Bus Master on.
    pub fn on_bus(bus: u8) -> impl Iterator<Item = Self> {
        pci::find(bus, VENDOR, DEVICE).map(Self::at)
    }

    /// That at `sid`, with Bus Master on.
    pub fn at(sid: SourceId) -> Self {
        sid.command(MEMORY | MASTER, 0);
        let (assigned, recorded) = (harness::is_assigned(sid), !harness::is_unrecorded(sid));
        Self { sid, assigned, recorded, bar: u64::from(sid.read(BAR0) & !0xf), in_memory: None, scratch: page() }
            .acknowledged()
    }

    /// That at `sid` of the segment whose configuration space is at `ecam`, with Bus Master on: an emulated one.
    pub fn in_segment(ecam: u64, sid: SourceId) -> Option<Self> {
        let config = InMemory::new(ecam, sid);
        if config.read(0) != u32::from(DEVICE) << 16 | u32::from(VENDOR) {
            return None;
        }
        config.write(COMMAND, config.read(COMMAND) & 0xffff | MEMORY | MASTER);
        let (bar, scratch) = (u64::from(config.read(BAR0) & !0xf), page());
        Some(Self { sid, assigned: false, recorded: true, bar, in_memory: Some(config), scratch }.acknowledged())
    }

    fn acknowledged(self) -> Self {
        // On a bus that nothing resets, a function still has what the guest of before raised.
        self.write(ACKNOWLEDGE, u32::MAX);
        self
    }

    /// The device that the tests are about: an assigned one, if there is one.
    pub fn first() -> Self {
        let first = Self::all().find(|edu| edu.assigned).or_else(|| Self::all().next());
        first.unwrap_or_else(|| panic!("there is no edu"))
    }

    /// The first one whose faults the unit records: the same, but where that is a function of the host.
    pub fn recorded() -> Self {
        Self::all().find(|edu| edu.recorded).unwrap_or_else(|| panic!("there is no edu whose faults are the guest's"))
    }

    /// Register of four bytes.
    pub fn read(&self, offset: u64) -> u32 {
        read(self.bar + offset)
    }

    /// Register of four bytes.
    pub fn write(&self, offset: u64, value: u32) {
        write(self.bar + offset, value);
    }

    fn begin(&self, from: u64, to: u64, len: u64, command: u64) {
        write(self.bar + SOURCE, from);
        write(self.bar + DESTINATION, to);
        write(self.bar + COUNT, len);
        write(self.bar + DMA_COMMAND, command | START);
    }

    fn transfer(&self, from: u64, to: u64, len: u64, command: u64) {
        self.begin(from, to, len, command);
        self.finish();
    }

    /// The device is to write `len` bytes of its buffer to `iova`; it is not waited for.
    pub fn begin_write(&self, iova: u64, len: u64) {
        self.begin(BUFFER, iova, len, TO_MEMORY);
    }

    /// As [`Edu::begin_write`], with an interrupt at its end, until [`Edu::acknowledge_transfer`].
    pub fn begin_write_that_interrupts(&self, iova: u64, len: u64) {
        self.begin(BUFFER, iova, len, TO_MEMORY | INTERRUPT);
    }

    /// Ends the interrupt of a transfer.
    pub fn acknowledge_transfer(&self) {
        self.write(ACKNOWLEDGE, 0x100);
    }

    /// Waits for the end of what [`Edu::begin_write`] began.
    pub fn finish(&self) {
        wait_for("the end of a transfer", || {
            let ended = read::<u64>(self.bar + DMA_COMMAND) & START == 0;
            if !ended && !self.recorded {
                // QEMU's lock is taken by each look at the register, and by the transfer.
                pause(5);
            }
            ended
        });
    }

    /// The device writes `len` bytes of its buffer to `iova`.
    pub fn dma_write(&self, iova: u64, len: u64) {
        self.transfer(BUFFER, iova, len, TO_MEMORY);
    }

    /// The device reads `len` bytes at `iova` into its buffer.
    pub fn dma_read(&self, iova: u64, len: u64) {
        self.transfer(iova, BUFFER, len, 0);
    }

    /// Puts eight bytes into the device's buffer, by DMA from the scratch page.
    pub fn fill(&self, value: u64) {
        store(self.scratch, value);
        self.dma_read(self.scratch, 8);
    }

    /// The first eight bytes of the device's buffer, by DMA to the scratch page.
    pub fn content(&self) -> u64 {
        store(self.scratch + 8, 0);
        self.dma_write(self.scratch + 8, 8);
        load(self.scratch + 8)
    }

    /// Turns message-signalled interrupts on, with this message.
    pub fn set_message(&self, address: u64, data: u16) {
        let read = |at| self.in_memory.map_or_else(|| self.sid.read(at), |config| config.read(at));
        let write = |at, value| match self.in_memory {
            Some(config) => config.write(at, value),
            None => self.sid.write(at, value),
        };
        let at = pci::capability(&read, MSI).unwrap_or_else(|| panic!("the device has no MSI capability"));
        write(at + 4, address as u32);
        write(at + 8, (address >> 32) as u32);
        write(at + 12, data.into());
        write(at, read(at) | 1 << 16);
    }

    /// Raises an interrupt, and acknowledges it: the next one is a new message.
    pub fn interrupt(&self) {
        self.raise();
        self.acknowledge();
    }

    /// Raises an interrupt. A line stays high until it is acknowledged.
    pub fn raise(&self) {
        self.write(RAISE, 1);
    }

    /// Ends it.
    pub fn acknowledge(&self) {
        self.write(ACKNOWLEDGE, 1);
    }

    /// Every interrupt is acknowledged at this device by its handler, as a driver does it, before its end is told. For
    /// an assigned one, whose registers are mapped.
    pub fn acknowledge_in_the_handler(&self) {
        x86::write_at_interrupts(self.bar + ACKNOWLEDGE);
    }

    /// Lets pass what an interrupt of the device may need to arrive: for one that must not. That of an assigned one
    /// comes by way of the host's kernel.
    pub fn settle(&self) {
        pause(if self.assigned { 50 } else { 2 });
    }

    /// Turns PASIDs on, if the device has them, as Causeway's has with `pasid=on`.
    pub fn enable_pasids(&self) -> bool {
        let has = self.sid.extended_capability(0x1b);
        if let Some(at) = has {
            self.sid.write_extended(at + 4, 1 << 16);
        }
        has.is_some()
    }

    /// Turns its device-TLB on, if it has one, as Causeway's has with `ats=on`.
    pub fn enable_ats(&self) -> bool {
        let has = self.sid.extended_capability(0x0f);
        if let Some(at) = has {
            self.sid.write_extended(at + 4, 1 << 31);
        }
        has.is_some()
    }

    /// Turns it off.
    pub fn disable_ats(&self) {
        if let Some(at) = self.sid.extended_capability(0x0f) {
            self.sid.write_extended(at + 4, 0);
        }
    }

    /// Turns page requests on, one outstanding at a time, if the device has them, as Causeway's has with `pri=on`.
    pub fn enable_page_requests(&self) -> bool {
        let has = self.sid.extended_capability(0x13);
        if let Some(at) = has {
            self.sid.write_extended(at + 12, 1);
            self.sid.write_extended(at + 4, 1);
        }
        has.is_some()
    }

    /// Turns them off: whatever waits for an answer is given up.
    pub fn disable_page_requests(&self) {
        if let Some(at) = self.sid.extended_capability(0x13) {
            self.sid.write_extended(at + 4, 0);
        }
    }

    /// The status register of page requests.
    pub fn page_request_status(&self) -> u16 {
        self.sid.extended_capability(0x13).map_or(0, |at| (self.sid.read_extended(at + 4) >> 16) as u16)
    }

    /// Clears bits of it.
    pub fn clear_page_request_status(&self, bits: u16) {
        if let Some(at) = self.sid.extended_capability(0x13) {
            self.sid.write_extended(at + 4, u32::from(bits) << 16 | self.sid.read_extended(at + 4) & 0xffff);
        }
    }

    /// The device acts on no invalidation of its device-TLB and answers none, or does again.
    pub fn set_silent(&self, silent: bool) {
        self.write(ATS, silent.into());
    }

    /// How many translations its device-TLB has.
    pub fn translations(&self) -> u32 {
        self.read(TRANSLATIONS)
    }

    /// Whether the last transfer was refused.
    pub fn failed(&self) -> bool {
        self.read(0x20) & 0x100 != 0
    }

    /// The device is to read `len` bytes at `iova` into its buffer; it is not waited for.
    pub fn begin_read(&self, iova: u64, len: u64) {
        self.begin(iova, BUFFER, len, 0);
    }

    /// Turns them off.
    pub fn disable_pasids(&self) {
        if let Some(at) = self.sid.extended_capability(0x1b) {
            self.sid.write_extended(at + 4, 0);
        }
    }

    /// Transfers carry this PASID from now on, or none.
    pub fn set_pasid(&self, pasid: Option<u32>) {
        self.write(PASID, pasid.map_or(0, |pasid| pasid | PASID_VALID));
    }

    /// The command register of configuration space.
    pub fn command(&self) -> u32 {
        self.sid.read(COMMAND) & 0xffff
    }
}
