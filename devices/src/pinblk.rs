//! `pinblk`, a device that reads a file into guest memory with the host's kernel doing the transfer: what it does is
//! still in flight when the guest takes the memory away. For tests of the remapping unit, and the smallest example of a
//! device whose DMA goes by pinned pages (D).
//!
//! BAR 0 has 4 KiB of registers, of 8 bytes each unless it says otherwise:
//!
//! | offset | register |
//! |---|---|
//! | 0x00 | identification, 4 bytes: [`IDENTIFICATION`]; read only |
//! | 0x08 | IOVA of the first byte, a multiple of 4096 |
//! | 0x10 | offset in the file, a multiple of 4096; behind its end the file begins again |
//! | 0x18 | length in bytes, a multiple of 4096, not 0, at most [`MAX_LENGTH`] |
//! | 0x20 | command, 4 bytes: [`COMMAND_START`], [`COMMAND_IRQ`] with it; ignored while busy |
//! | 0x24 | status, 4 bytes: [`STATUS_BUSY`], [`STATUS_FAILED`]; read only |
//! | 0x28 | bytes that arrived, in no order; read only |
//! | 0x30 | pages that are pinned now; read only |
//!
//! Pages are pinned a piece at a time. When one cannot be, because the guest's tables do not grant it, or do not any
//! more, the transfer ends as failed: what is in flight arrives or does not, and nothing arrives after that.

use std::sync::{Arc, Mutex, MutexGuard};

use vtd::{Iova, Msi, Requester};

use crate::BusDevice;
use crate::host::Interrupts;
use crate::pci::config::CAP_MSI;
use crate::pci::{BarKind, BarTarget, ConfigSpace, Decoder, Identity, Path, PciFunction};

/// Vendor and device.
pub const ID: (u16, u16) = (0x1234, 0x70b1);
/// Bytes of BAR 0.
pub const BAR_SIZE: u64 = 4096;
/// What the first register reads as.
pub const IDENTIFICATION: u32 = 0x0100_70b1;
/// The longest transfer.
pub const MAX_LENGTH: u64 = 1 << 40;
/// Command: start.
pub const COMMAND_START: u32 = 1;
/// Command: a message at the end.
pub const COMMAND_IRQ: u32 = 2;
/// Status: a transfer goes on.
pub const STATUS_BUSY: u32 = 1;
/// Status: the last transfer did not arrive in full.
pub const STATUS_FAILED: u32 = 2;

const PAGE_SIZE: u64 = 4096;

/// One transfer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Read {
    /// Where its first byte goes, a multiple of 4096.
    pub iova: Iova,
    /// Where it comes from in the file, a multiple of 4096.
    pub offset: u64,
    /// Its length in bytes, a multiple of 4096, not 0. `iova + len - 1` does not overflow.
    pub len: u64,
}

/// Hears whether all of a transfer arrived.
pub type Done = Box<dyn FnOnce(bool) + Send>;

/// Carries out transfers, one at a time, through pinned pages and by other threads.
pub trait AsyncReads: Send + Sync {
    /// Begins one. `done` is called once when nothing of it is in flight any more, from another thread, with whether
    /// all of it arrived; not after [`AsyncReads::stop`]. Only when no other goes on.
    fn begin(&self, read: Read, done: Done);
    /// Ends what goes on. Nothing reaches memory after it returns, or the machine does not run on.
    fn stop(&self);
    /// Nothing is begun any more, and what is in flight ends. Waits no longer than a second.
    ///
    /// # Errors
    /// Something is still in flight: it cannot be stopped.
    fn end_for_good(&self) -> Result<(), String>;
    /// Bytes of the transfer that goes on, or of the last one, that arrived.
    fn arrived(&self) -> u64;
    /// Pages that are pinned now.
    fn pinned_pages(&self) -> u64;
}

/// The function.
pub struct PinBlk {
    shared: Arc<Shared>,
    decoder: Arc<Decoder>,
    bar: BarTarget,
}

struct Shared {
    requester: Requester,
    interrupts: Arc<dyn Interrupts>,
    reads: Arc<dyn AsyncReads>,
    state: Mutex<State>,
}

struct State {
    config: ConfigSpace,
    /// Offset of the MSI capability.
    msi: u16,
    iova: u64,
    offset: u64,
    len: u64,
    status: u32,
    /// The transfer that goes on, of all that there were; a reset ends it.
    transfer: u64,
}

impl PinBlk {
    /// The function for `requester`, which reads by `reads`.
    pub fn new(
        requester: Requester,
        decoder: Arc<Decoder>,
        interrupts: Arc<dyn Interrupts>,
        reads: Arc<dyn AsyncReads>,
    ) -> Arc<Self> {
        let id = Identity { vendor: ID.0, device: ID.1, revision: 1, class: 0x00_ff_00, subsystem: (0x1af4, 0x1100) };
        let mut config = ConfigSpace::new(&id);
        config.add_bar(0, BarKind::Memory32, BAR_SIZE);
        // One vector, 64-bit addresses.
        let mut body = [0; 12];
        body[0] = 0x80;
        let mut writable = [0xff; 12];
        writable[..3].copy_from_slice(&[0x01, 0x00, 0xfc]);
        let msi = config.add_capability(CAP_MSI, &body, &writable);
        let state = State { config, msi, iova: 0, offset: 0, len: 0, status: 0, transfer: 0 };
        let shared = Arc::new(Shared { requester, interrupts, reads, state: Mutex::new(state) });
        let bar = BarTarget::of_device(Arc::new(Bar(shared.clone())));
        Arc::new(Self { shared, decoder, bar })
    }

    /// Stops its DMA for good, as that of an assigned function (B-11). After `Ok` it does none, whatever the guest
    /// writes.
    pub fn quarantine(&self) -> Result<(), String> {
        self.shared.reads.end_for_good()
    }

    fn decode(&self, state: &State) {
        self.decoder.set(self.shared.requester, 0, state.config.decoded(0), &self.bar);
    }
}

impl PciFunction for PinBlk {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.shared.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.shared.lock();
        let was_master = state.is_master();
        state.config.write(offset, data);
        self.decode(&state);
        if was_master && !state.is_master() {
            self.shared.stop(state, STATUS_FAILED);
        }
    }

    fn path_changed(&self, path: &Path) {
        let mut state = self.shared.lock();
        let was_master = state.is_master();
        state.config.set_gets_through(path.masters);
        if was_master && !state.is_master() {
            self.shared.stop(state, STATUS_FAILED);
        }
    }

    fn reset(&self) {
        let mut state = self.shared.lock();
        state.config.reset();
        (state.iova, state.offset, state.len) = (0, 0, 0);
        self.decode(&state);
        // After a reset nothing of before it reaches memory: the unit may be reset next (rule 12).
        self.shared.stop(state, 0);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Ends the transfer, if there is one; what its status is then.
    fn stop(&self, mut state: MutexGuard<'_, State>, status: u32) {
        state.transfer += 1;
        if state.status & STATUS_BUSY != 0 || status == 0 {
            state.status = status;
        }
        // Its end is told with the lock.
        drop(state);
        self.reads.stop();
    }

    fn read(&self, offset: u64) -> u64 {
        let state = self.lock();
        match offset {
            0x00 => IDENTIFICATION.into(),
            0x08 => state.iova,
            0x10 => state.offset,
            0x18 => state.len,
            0x24 => state.status.into(),
            0x28 => self.reads.arrived(),
            0x30 => self.reads.pinned_pages(),
            _ => u64::MAX,
        }
    }

    fn write(self: &Arc<Self>, offset: u64, value: u64) {
        let mut state = self.lock();
        if state.status & STATUS_BUSY != 0 {
            return;
        }
        match offset {
            0x08 => state.iova = value,
            0x10 => state.offset = value,
            0x18 => state.len = value,
            0x20 if value as u32 & COMMAND_START != 0 => self.start(state, value as u32 & COMMAND_IRQ != 0),
            _ => {}
        }
    }

    fn start(self: &Arc<Self>, mut state: MutexGuard<'_, State>, interrupt: bool) {
        let Some(read) = state.wanted().filter(|_| state.is_master()) else {
            state.status = STATUS_FAILED;
            let message = state.message().filter(|_| interrupt);
            drop(state);
            self.send(message);
            return;
        };
        state.status = STATUS_BUSY;
        state.transfer += 1;
        let (this, transfer) = (self.clone(), state.transfer);
        // Under the lock, so that none begins after it was stopped. The end is told by another thread.
        self.reads.begin(read, Box::new(move |arrived| this.done(transfer, arrived, interrupt)));
    }

    /// A transfer has ended, unless a reset or the guest ended it before.
    fn done(&self, transfer: u64, arrived: bool, interrupt: bool) {
        let mut state = self.lock();
        if state.transfer != transfer {
            return;
        }
        state.status = if arrived { 0 } else { STATUS_FAILED };
        let message = state.message().filter(|_| interrupt);
        drop(state);
        self.send(message);
    }

    fn send(&self, message: Option<Msi>) {
        if let Some(message) = message {
            self.interrupts.signal(self.requester, message);
        }
    }
}

impl State {
    fn wanted(&self) -> Option<Read> {
        let Self { iova, offset, len, .. } = *self;
        let whole = [iova, offset, len].iter().all(|n| n.is_multiple_of(PAGE_SIZE));
        let fits = (1..=MAX_LENGTH).contains(&len) && iova.checked_add(len).is_some();
        (whole && fits).then_some(Read { iova: Iova(iova), offset, len })
    }

    fn is_master(&self) -> bool {
        self.config.is_master()
    }

    /// The message, while MSI is enabled. A message is a memory write, so it needs Bus Master.
    fn message(&self) -> Option<Msi> {
        let address = u64::from(self.config.u32(self.msi + 4)) | (u64::from(self.config.u32(self.msi + 8)) << 32);
        let data = self.config.u16(self.msi + 12).into();
        let enabled = self.config.u16(self.msi + 2) & 1 != 0;
        (enabled && self.is_master()).then_some(Msi { address, data })
    }
}

/// BAR 0 on the bus.
struct Bar(Arc<Shared>);

fn is_access(offset: u64, len: usize) -> bool {
    match offset {
        0x00 | 0x20 | 0x24 => len == 4,
        _ => len == 8 && offset.is_multiple_of(8),
    }
}

impl BusDevice for Bar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if is_access(offset, data.len()) {
            let len = data.len();
            data.copy_from_slice(&self.0.read(offset).to_le_bytes()[..len]);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if is_access(offset, data.len()) {
            let mut value = [0; 8];
            value[..data.len()].copy_from_slice(data);
            self.0.write(offset, u64::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
#[path = "pinblk_test.rs"]
mod pinblk_test;
