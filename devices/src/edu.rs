//! `edu`, the teaching device that QEMU has too (1234:11e8): a factorial, an interrupt, and DMA between memory and a
//! buffer of 4 KiB. Drivers written for the one work with the other.
//!
//! Where it differs: a transfer that would leave the buffer, has Bus Master clear, or that the remapping unit blocks,
//! is refused and sets [`STATUS_DMA_FAILED`] until the next one starts; addresses have 64 bits; a transfer takes as
//! long as it takes instead of 100 ms.
//!
//! A transfer of four bytes, aligned, into the interrupt address range is a message, like any function's.
//!
//! With [`Pasids`] it has a PASID capability, which QEMU's has not, and a register of ours ([`PASID_REGISTER`]) that
//! says by which PASID a transfer goes. Such a transfer is never a message.
//!
//! With [`Ats`] it has an ATS capability, a device-TLB that its transfers go by while that is enabled, and two
//! registers of ours ([`ATS_REGISTER`], [`TRANSLATIONS_REGISTER`]); and a PRI capability, if asked for: while that is
//! enabled, a transfer that the guest's tables do not permit asks the guest for the page, and goes on when it has
//! answered.
//!
//! A worker thread computes and transfers. Addresses are translated when it transfers, so what was unmapped before the
//! command was written is not reached.

mod addresses;
mod bar;
mod capabilities;
mod saving;
mod translated;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use vtd::{Iova, Msi, Pasid, Requester};

use crate::BusDevice;
use crate::ats::Ats;
use crate::dma::{DmaFailed, DmaTarget};
use crate::host::{Interrupts, IrqLine};
use crate::page_requests::MayAsk;
use crate::pci::config::{CAP_MSI, COMMAND_INTX_OFF, COMMAND_MEMORY, STATUS, STATUS_INTX};
pub use addresses::{BUFFER, BUFFER_SIZE};
use addresses::{in_buffer, message_of};
use bar::Bar;
use capabilities::Capabilities;
use translated::{Bytes, Refused, Way, transfer_by_tlb};

use crate::pci::express::Upstream;
use crate::pci::{BarKind, BarTarget, ConfigSpace, Decoder, Identity, Path, PciFunction};
use crate::saved::Saves;

/// Bytes of BAR 0.
pub const BAR_SIZE: u64 = 1 << 20;

/// Offset of the register, of four bytes, that says by which PASID transfers go: bits 19:0 are the PASID if
/// [`PASID_VALID`] is set; else they go without one. Like the others of a transfer it stays as it is while one goes on.
/// Without [`Pasids`] there is no such register. QEMU's edu has nothing there.
pub const PASID_REGISTER: u64 = 0xa0;
/// PASID register: a transfer carries the PASID. It is refused while the PASID capability is not enabled.
pub const PASID_VALID: u32 = 1 << 31;

/// Offset of the register, of four bytes, by which a test of a guest makes the device misbehave. Without ATS there is
/// no such register.
pub const ATS_REGISTER: u64 = 0xa8;
/// ATS register: invalidations are neither acted on nor answered.
pub const ATS_SILENT: u32 = 1;
/// Offset of the register, of four bytes and read-only, that says how many translations the device has cached.
pub const TRANSLATIONS_REGISTER: u64 = 0xac;

/// Status: a factorial is being computed.
pub const STATUS_COMPUTING: u32 = 0x01;
/// Status: interrupt when a factorial is done.
pub const STATUS_IRQ_FACTORIAL: u32 = 0x80;
/// Status: the last transfer was refused.
pub const STATUS_DMA_FAILED: u32 = 0x100;

/// Command: start; reads as 1 while the transfer goes on.
pub const DMA_START: u64 = 1;
/// Command: from the buffer to memory, instead of the reverse.
pub const DMA_TO_MEMORY: u64 = 2;
/// Command: interrupt at the end.
pub const DMA_IRQ: u64 = 4;

/// Interrupt status: a factorial is done.
const IRQ_FACTORIAL: u32 = 0x001;
/// Interrupt status: a transfer is done.
const IRQ_DMA: u32 = 0x100;

const IDENTIFICATION: u32 = 0x0100_00ed;

/// Where transfers with a PASID go: called once for each PASID that is used in a row.
pub type Pasids = Box<dyn Fn(Pasid) -> Box<dyn DmaTarget> + Send + Sync>;

/// What an edu has that QEMU's has not.
#[derive(Default)]
pub struct Features {
    /// It has PASIDs.
    pub pasids: Option<Pasids>,
    /// It has a device-TLB, of which the unit tells this.
    pub ats: Option<Arc<Ats>>,
    /// It has page requests, too.
    pub page_requests: bool,
    /// What is above it: with any of these it is a function of PCI Express, which says so.
    pub upstream: Upstream,
}

/// The function. Dropping it ends the worker, after the transfer in flight.
pub struct Edu {
    shared: Arc<Shared>,
    decoder: Arc<Decoder>,
    bar: BarTarget,
    worker: Option<JoinHandle<()>>,
}

struct Shared {
    requester: Requester,
    interrupts: Arc<dyn Interrupts>,
    line: Option<Arc<dyn IrqLine>>,
    dma: Box<dyn DmaTarget>,
    features: Features,
    /// The target of the PASID that was used last. Only the worker looks.
    last: Mutex<Option<(Pasid, Box<dyn DmaTarget>)>>,
    state: Mutex<State>,
    /// There is something to do, or something was done.
    changed: Condvar,
}

struct State {
    config: ConfigSpace,
    /// Offset of the MSI capability.
    msi: u16,
    capabilities: Capabilities,
    registers: Registers,
    buffer: Box<[u8; BUFFER_SIZE]>,
    /// The worker has taken a task and works on it without the lock.
    busy: bool,
    /// The worker sends the message of a task that is done.
    signalling: bool,
    /// The worker takes no task.
    held: bool,
    stop: bool,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Registers {
    liveness: u32,
    factorial: u32,
    status: u32,
    irq_status: u32,
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
    pasid: u32,
    ats: u32,
}

/// What the worker does without the lock.
enum Task {
    Factorial(u32),
    /// Memory to buffer: from, and the range of the buffer.
    FromMemory(Iova, Way, std::ops::Range<usize>),
    /// Buffer to memory: the bytes, and to where.
    ToMemory(Vec<u8>, Iova, Way),
    Refuse,
}

impl Edu {
    /// The function for `requester`, whose DMA goes to `dma`. `intx` is the line of pin A and its global system
    /// interrupt (for the interrupt line register); messages go to `interrupts`.
    ///
    /// # Errors
    /// The worker thread could not be started.
    pub fn new(
        requester: Requester,
        decoder: Arc<Decoder>,
        interrupts: Arc<dyn Interrupts>,
        intx: Option<(Arc<dyn IrqLine>, u8)>,
        dma: Box<dyn DmaTarget>,
    ) -> std::io::Result<Arc<Self>> {
        Self::with_features(requester, decoder, interrupts, intx, dma, Features::default())
    }

    /// The same, with `features`.
    ///
    /// # Errors
    /// The worker thread could not be started.
    pub fn with_features(
        requester: Requester,
        decoder: Arc<Decoder>,
        interrupts: Arc<dyn Interrupts>,
        intx: Option<(Arc<dyn IrqLine>, u8)>,
        dma: Box<dyn DmaTarget>,
        features: Features,
    ) -> std::io::Result<Arc<Self>> {
        let id =
            Identity { vendor: 0x1234, device: 0x11e8, revision: 0x10, class: 0x00_ff_00, subsystem: (0x1af4, 0x1100) };
        let mut config = ConfigSpace::new(&id);
        config.add_bar(0, BarKind::Memory32, BAR_SIZE);
        if let Some((_, gsi)) = &intx {
            config.set_interrupt_pin(1, *gsi);
        }
        // One vector, 64-bit addresses.
        let mut body = [0; 12];
        body[0] = 0x80;
        let mut writable = [0xff; 12];
        writable[..3].copy_from_slice(&[0x01, 0x00, 0xfc]);
        let msi = config.add_capability(CAP_MSI, &body, &writable);
        let (pasid, ats) = (features.pasids.is_some(), features.ats.is_some());
        let page_requests = ats && features.page_requests;
        let capabilities = Capabilities::add(&mut config, features.upstream, pasid, ats, page_requests);

        let state = State {
            config,
            msi,
            capabilities,
            registers: Registers::default(),
            buffer: Box::new([0; BUFFER_SIZE]),
            busy: false,
            signalling: false,
            held: false,
            stop: false,
        };
        let line = intx.map(|(line, _)| line);
        let shared = Arc::new(Shared {
            requester,
            interrupts,
            line,
            dma,
            features,
            last: Mutex::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let worker = {
            let shared = shared.clone();
            std::thread::Builder::new().name("edu".to_owned()).spawn(move || shared.work())?
        };
        let bar = BarTarget::of_device(Arc::new(Bar(shared.clone())));
        Ok(Arc::new(Self { shared, decoder, bar, worker: Some(worker) }))
    }

    /// BAR 0, wherever it is decoded.
    pub fn bar(&self) -> &Arc<dyn BusDevice> {
        &self.bar.device
    }

    /// Where the MSI capability is in configuration space.
    pub fn msi_capability(&self) -> u16 {
        self.shared.lock().msi
    }
}

impl Drop for Edu {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.give_up();
        self.shared.changed.notify_all();
        if let Some(Err(_)) = self.worker.take().map(JoinHandle::join) {
            log::error!("{}: the worker ended in a panic", self.shared.requester);
        }
    }
}

impl PciFunction for Edu {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.shared.lock();
        self.shared.take_unexpected(&mut state);
        state.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.shared.lock();
        self.shared.take_unexpected(&mut state);
        state.config.write(offset, data);
        let State { config, capabilities, .. } = &mut *state;
        let off = capabilities.written(config, offset, data);
        if off.ats {
            self.shared.forget_translations();
        }
        if off.requests {
            self.shared.give_up();
        }
        self.decoder.set(self.shared.requester, 0, state.config.decoded(0), &self.bar);
        self.shared.update_line(&mut state);
    }

    fn path_changed(&self, path: &Path) {
        let mut state = self.shared.lock();
        state.config.set_gets_through(path.masters);
        if !path.masters {
            drop(self.shared.changed.wait_while(state, |state| state.busy).unwrap());
        }
    }

    fn reset(&self) {
        let mut state = self.shared.lock();
        state.config.reset();
        state.registers = Registers::default();
        let State { config, capabilities, .. } = &mut *state;
        capabilities.written(config, 0, &[]);
        self.shared.give_up();
        // After a reset nothing of before it reaches memory: the unit may be reset next (rule 12).
        state = self.shared.changed.wait_while(state, |state| state.busy).unwrap();
        let State { config, registers, buffer, .. } = &mut *state;
        *registers = Registers::default();
        buffer.fill(0);
        self.shared.forget_translations();
        if let Some(ats) = &self.shared.features.ats {
            ats.tlb.set_silent(false);
        }
        self.decoder.set(self.shared.requester, 0, config.decoded(0), &self.bar);
        self.shared.update_line(&mut state);
    }

    /// Not with a device-TLB, whose translations and page requests are no state that can be put back.
    fn saves(&self) -> Option<&dyn Saves> {
        self.shared.features.ats.is_none().then_some(self)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            state = self.changed.wait_while(state, |state| !state.stop && (state.held || !state.has_task())).unwrap();
            if state.stop {
                return;
            }
            let may_ask = self.features.ats.as_ref().map(|ats| ats.requests.may_ask());
            let task = state.take_task(may_ask);
            state.busy = true;
            drop(state);
            let (done, failed) = self.perform(&task);
            state = self.lock();
            let State { config, capabilities, .. } = &mut *state;
            capabilities.told(config, failed, false);
            state.busy = false;
            let interrupt = state.finish(task, done);
            let message = self.raise(&mut state, interrupt);
            self.changed.notify_all();
            if let Some(message) = message {
                state.signalling = true;
                drop(state);
                self.interrupts.signal(self.requester, message);
                state = self.lock();
                state.signalling = false;
                self.changed.notify_all();
            }
        }
    }

    /// What came of it: the bytes read, or the factorial's; `None`: refused. And whether the guest said that page
    /// requests fail.
    fn perform(&self, task: &Task) -> (Option<Vec<u8>>, bool) {
        match task {
            Task::Factorial(n) => (Some(factorial(*n).to_le_bytes().to_vec()), false),
            Task::FromMemory(from, way, range) => {
                let mut data = vec![0; range.len()];
                let done = self.transfer(*way, *from, Bytes::Read(&mut data));
                (done.is_ok().then_some(data), done == Err(Refused::ResponseFailure))
            }
            Task::ToMemory(data, to, way) => {
                // With a PASID the interrupt address range is translated like any other. VT-d 3.15.
                if let Some(message) = message_of(*to, data).filter(|_| way.pasid.is_none()) {
                    self.interrupts.signal(self.requester, message);
                    return (Some(Vec::new()), false);
                }
                let done = self.transfer(*way, *to, Bytes::Write(data));
                (done.is_ok().then(Vec::new), done == Err(Refused::ResponseFailure))
            }
            Task::Refuse => (None, false),
        }
    }

    /// Does a transfer by the target of a PASID, or of none.
    fn transfer(&self, way: Way, iova: Iova, bytes: Bytes<'_>) -> Result<(), Refused> {
        let mut last = self.last.lock().unwrap();
        let target = match way.pasid {
            None => &*self.dma,
            Some(pasid) => {
                let make = self.features.pasids.as_ref().ok_or(Refused::Access)?;
                if last.as_ref().is_none_or(|(used, _)| *used != pasid) {
                    *last = Some((pasid, make(pasid)));
                }
                &*last.as_ref().ok_or(Refused::Access)?.1
            }
        };
        match (target.ats(), &self.features.ats) {
            (Some(target), Some(ats)) if way.translated => transfer_by_tlb(target, ats, way, iova, bytes),
            _ => match bytes {
                Bytes::Read(data) => target.read(iova, data),
                Bytes::Write(data) => target.write(iova, data),
            }
            .map_err(|DmaFailed| Refused::Access),
        }
    }

    /// Nothing is asked of the guest any more.
    fn give_up(&self) {
        if let Some(ats) = &self.features.ats {
            ats.requests.give_up();
        }
    }

    fn forget_translations(&self) {
        if let Some(ats) = &self.features.ats {
            ats.tlb.clear();
        }
    }

    /// The status of page requests says if an answer came that nothing waited for.
    fn take_unexpected(&self, state: &mut State) {
        let unexpected = self.features.ats.as_ref().is_some_and(|ats| ats.requests.take_unexpected());
        let State { config, capabilities, .. } = state;
        capabilities.told(config, false, unexpected);
    }

    /// Sets bits of the interrupt status; the message to send, with the lock dropped.
    fn raise(&self, state: &mut State, bits: u32) -> Option<Msi> {
        state.registers.irq_status |= bits;
        self.update_line(state);
        if bits == 0 { None } else { state.message() }
    }

    /// The line is high while there is an interrupt and no message stands for it.
    fn update_line(&self, state: &mut State) {
        let pending = state.registers.irq_status != 0;
        let status = state.config.u16(STATUS) & !STATUS_INTX;
        state.config.put(STATUS, &(status | if pending { STATUS_INTX } else { 0 }).to_le_bytes());
        if let Some(line) = &self.line {
            line.set_level(pending && !state.has_msi() && state.config.command() & COMMAND_INTX_OFF == 0);
        }
    }

    fn read(&self, offset: u64) -> u64 {
        let state = self.lock();
        let registers = &state.registers;
        match offset {
            0x00 => IDENTIFICATION.into(),
            0x04 => registers.liveness.into(),
            0x08 => registers.factorial.into(),
            0x20 => registers.status.into(),
            0x24 => registers.irq_status.into(),
            0x80 => registers.source,
            0x84 => registers.source >> 32,
            0x88 => registers.destination,
            0x8c => registers.destination >> 32,
            0x90 => registers.count,
            0x94 => registers.count >> 32,
            0x98 => registers.command,
            PASID_REGISTER if state.capabilities.has_pasid() => registers.pasid.into(),
            ATS_REGISTER if state.capabilities.has_ats() => registers.ats.into(),
            TRANSLATIONS_REGISTER if state.capabilities.has_ats() => {
                self.features.ats.as_ref().map_or(0, |ats| ats.tlb.len() as u64)
            }
            _ => u64::MAX,
        }
    }

    /// The message to send, if any.
    fn write(&self, offset: u64, value: u64) -> Option<Msi> {
        let mut state = self.lock();
        // Another function's DMA (B-10) found the BAR just before it left the bus.
        if state.config.command() & COMMAND_MEMORY == 0 {
            return None;
        }
        let (has_pasid, has_ats) = (state.capabilities.has_pasid(), state.capabilities.has_ats());
        let registers = &mut state.registers;
        let word = value as u32;
        match offset {
            0x04 => registers.liveness = !word,
            0x08 if registers.status & STATUS_COMPUTING == 0 => {
                registers.factorial = word;
                registers.status |= STATUS_COMPUTING;
                self.changed.notify_all();
            }
            0x20 => registers.status = registers.status & !STATUS_IRQ_FACTORIAL | word & STATUS_IRQ_FACTORIAL,
            0x60 => return self.raise(&mut state, word),
            0x64 => {
                registers.irq_status &= !word;
                self.update_line(&mut state);
            }
            ATS_REGISTER if has_ats => {
                registers.ats = word & ATS_SILENT;
                if let Some(ats) = &self.features.ats {
                    ats.tlb.set_silent(registers.ats & ATS_SILENT != 0);
                }
            }
            // While a transfer goes on its registers do not change.
            _ if registers.command & DMA_START != 0 => {}
            0x80 => registers.source = value,
            0x84 => registers.source = registers.source & 0xffff_ffff | value << 32,
            0x88 => registers.destination = value,
            0x8c => registers.destination = registers.destination & 0xffff_ffff | value << 32,
            0x90 => registers.count = value,
            0x94 => registers.count = registers.count & 0xffff_ffff | value << 32,
            PASID_REGISTER if has_pasid => registers.pasid = word & (PASID_VALID | Pasid::MAX.0),
            0x98 if value & DMA_START != 0 => {
                registers.command = value & (DMA_START | DMA_TO_MEMORY | DMA_IRQ);
                registers.status &= !STATUS_DMA_FAILED;
                self.changed.notify_all();
            }
            _ => {}
        }
        None
    }
}

impl State {
    fn has_task(&self) -> bool {
        self.registers.status & STATUS_COMPUTING != 0 || self.registers.command & DMA_START != 0
    }

    fn take_task(&self, may_ask: Option<MayAsk>) -> Task {
        let registers = &self.registers;
        if registers.status & STATUS_COMPUTING != 0 {
            return Task::Factorial(registers.factorial);
        }
        let to_memory = registers.command & DMA_TO_MEMORY != 0;
        let (inner, outer) = if to_memory {
            (registers.source, registers.destination)
        } else {
            (registers.destination, registers.source)
        };
        let Some(range) = in_buffer(inner, registers.count).filter(|_| self.is_master()) else { return Task::Refuse };
        let pasid = match (registers.pasid & PASID_VALID != 0, self.capabilities.sends_pasids(&self.config)) {
            (false, _) => None,
            (true, true) => Some(Pasid(registers.pasid & Pasid::MAX.0)),
            (true, false) => return Task::Refuse,
        };
        let translated = self.capabilities.translates(&self.config);
        let way =
            Way { pasid, translated, requests: may_ask.filter(|_| self.capabilities.requests_pages(&self.config)) };
        if to_memory {
            Task::ToMemory(self.buffer[range].to_vec(), Iova(outer), way)
        } else {
            Task::FromMemory(Iova(outer), way, range)
        }
    }

    /// Puts the result where it belongs; which interrupts follow. A task that a reset overtook has none.
    fn finish(&mut self, task: Task, done: Option<Vec<u8>>) -> u32 {
        let registers = &mut self.registers;
        if let Task::Factorial(_) = task {
            if registers.status & STATUS_COMPUTING == 0 {
                return 0;
            }
            let bytes = done.and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
            registers.factorial = u32::from_le_bytes(bytes);
            registers.status &= !STATUS_COMPUTING;
            return if registers.status & STATUS_IRQ_FACTORIAL != 0 { IRQ_FACTORIAL } else { 0 };
        }
        if registers.command & DMA_START == 0 {
            return 0;
        }
        match (done, task) {
            (Some(data), Task::FromMemory(_, _, range)) => self.buffer[range].copy_from_slice(&data),
            (Some(_), _) => {}
            (None, _) => registers.status |= STATUS_DMA_FAILED,
        }
        registers.command &= !DMA_START;
        if registers.command & DMA_IRQ != 0 { IRQ_DMA } else { 0 }
    }

    fn is_master(&self) -> bool {
        self.config.is_master()
    }

    fn has_msi(&self) -> bool {
        self.config.u16(self.msi + 2) & 1 != 0
    }

    /// The message, while MSI is enabled. A message is a memory write, so it needs Bus Master.
    fn message(&self) -> Option<Msi> {
        let address = u64::from(self.config.u32(self.msi + 4)) | (u64::from(self.config.u32(self.msi + 8)) << 32);
        let data = self.config.u16(self.msi + 12).into();
        (self.has_msi() && self.is_master()).then_some(Msi { address, data })
    }
}

/// Modulo 2^32: from 34 on it is 0, which saves a guest's 2^32 multiplications.
fn factorial(n: u32) -> u32 {
    if n >= 34 { 0 } else { (1..=n).fold(1, u32::wrapping_mul) }
}

#[cfg(test)]
#[path = "edu_test.rs"]
mod edu_test;
