//! The PCI function of a virtio device (H-1; section 4.1): configuration space, BAR 0, and who stops what.
//!
//! BAR 0 has a page for each structure:
//!
//! | offset | |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | interrupt status |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | where queues are kicked: 4 bytes each |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |
//!
//! It has no interrupt line: every driver of virtio 1 uses MSI-X.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vtd::Requester;

use super::registers::{self, Effect, Elsewhere, Registers};
use super::ring::{Broken, Ring};
use super::vectors::{Cause, Vectors};
use super::worker::{Link, spawn};
use super::{Device, Dma, Kind, NEEDED, RING_FEATURES};
use crate::BusDevice;
use crate::host::{Doorbells, Interrupts};
use crate::pci::config::CAP_MSIX;
use crate::pci::{BarKind, BarTarget, Bells, ConfigSpace, Decoder, Identity, Path, PciFunction};
use crate::saved::Saves;

const VENDOR: u16 = 0x1af4;
/// Device ids begin here; the device type is added.
const FIRST_DEVICE: u16 = 0x1040;
/// Capability id: vendor-specific.
const CAP_VENDOR: u8 = 0x09;

const PAGE: u64 = 0x1000;
const BAR_SIZE: u64 = 8 * PAGE;
const COMMON: u64 = 0;
const INTERRUPT_STATUS: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const KICKS: u64 = 3 * PAGE;
const TABLE: u64 = 4 * PAGE;
const PENDING: u64 = 5 * PAGE;
/// Bytes from the place of one queue's kicks to the next one's.
const KICK_SIZE: u64 = 4;

// Types of the structures (section 4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// What a function is connected to.
pub struct Wiring {
    /// Its name in the guest.
    pub requester: Requester,
    /// Where its BAR is decoded.
    pub decoder: Arc<Decoder>,
    /// Where its messages go.
    pub interrupts: Arc<dyn Interrupts>,
    /// Wakes the device when a queue is kicked, without an exit.
    pub doorbells: Option<Arc<dyn Doorbells>>,
    /// Stops the machine, because what the device does in the host's kernel does not end.
    pub stop_machine: Box<dyn Fn(&str) + Send + Sync>,
}

/// The function.
pub struct VirtioPci {
    pub(super) shared: Arc<Shared>,
    decoder: Arc<Decoder>,
    bar: BarTarget,
}

pub(super) struct Shared {
    requester: Requester,
    pub(super) link: Arc<Link>,
    config: Vec<u8>,
    pub(super) most: &'static [u16],
    stop_machine: Box<dyn Fn(&str) + Send + Sync>,
    /// Held while the worker is waited for, which never takes it.
    state: Mutex<State>,
}

pub(super) struct State {
    pub(super) space: ConfigSpace,
    /// Offset of the MSI-X capability.
    pub(super) msix: u16,
    /// Offset of the capability by which configuration space reaches BAR 0.
    window: u16,
    pub(super) registers: Registers,
}

impl VirtioPci {
    /// The function of `device`, whose rings and buffers are reached by `dma`.
    ///
    /// # Errors
    /// Its thread could not be started.
    pub fn new<D: Dma>(wiring: Wiring, dma: D, device: impl Device<D>) -> io::Result<Arc<Self>> {
        let Wiring { requester, decoder, interrupts, doorbells, stop_machine } = wiring;
        let Kind { device: id, class, features, queues, config } = device.kind();
        let vectors = Vectors::new(requester, interrupts, queues.len());
        let identity =
            Identity { vendor: VENDOR, device: FIRST_DEVICE + id, revision: 1, class, subsystem: (VENDOR, 0x1100) };
        let mut space = ConfigSpace::new(&identity);
        space.add_bar(0, BarKind::Memory32, BAR_SIZE);
        let msix = add_msix(&mut space, vectors.count());
        let window = add_structures(&mut space, queues.len(), config.len());
        let registers = Registers::new(features | RING_FEATURES | NEEDED, NEEDED, queues);
        let link = Link::new(requester, vectors)?;
        spawn(link.clone(), dma, device, &format!("virtio {}", requester.sid))?;
        let state = Mutex::new(State { space, msix, window, registers });
        let shared = Arc::new(Shared { requester, link, config, most: queues, stop_machine, state });
        let kicks = (0..queues.len() as u64).map(|queue| KICKS + queue * KICK_SIZE).collect();
        let bells = doorbells.map(|by| Bells { by, event: shared.link.wake().clone(), offsets: kicks });
        let bar = BarTarget { bells, ..BarTarget::of_device(Arc::new(Bar(shared.clone()))) };
        Ok(Arc::new(Self { shared, decoder, bar }))
    }

    /// BAR 0, wherever it is decoded.
    pub fn bar(&self) -> &Arc<dyn BusDevice> {
        &self.bar.device
    }

    /// Stops its DMA for good, as that of an assigned function (B-11). After `Ok` it does none, whatever the guest
    /// writes.
    ///
    /// # Errors
    /// Something is still in flight in the host's kernel.
    pub fn quarantine(&self) -> Result<(), String> {
        if self.shared.link.end_for_good() { Ok(()) } else { Err("what it does in the host does not end".into()) }
    }

    pub(super) fn decode(&self, state: &State) {
        self.decoder.set(self.shared.requester, 0, state.space.decoded(0), &self.bar);
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.shared.link.close();
    }
}

fn add_msix(space: &mut ConfigSpace, vectors: usize) -> u16 {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&(vectors as u16 - 1).to_le_bytes());
    body[2..6].copy_from_slice(&(TABLE as u32).to_le_bytes());
    body[6..10].copy_from_slice(&(PENDING as u32).to_le_bytes());
    space.add_capability(CAP_MSIX, &body, &[0x00, 0xc0])
}

/// The capabilities that say where the structures are. Gives the offset of the one that reaches BAR 0 by itself.
fn add_structures(space: &mut ConfigSpace, queues: usize, config: usize) -> u16 {
    let kicks = KICK_SIZE as u32 * queues as u32;
    let mut add = |kind: u8, offset: u64, len: u32, more: &[u8], writable: &[u8]| {
        // Length of the capability, type, BAR 0, then offset and length of the structure.
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend(len.to_le_bytes());
        body.extend(more);
        space.add_capability(CAP_VENDOR, &body, writable)
    };
    add(CFG_COMMON, COMMON, registers::SIZE as u32, &[], &[]);
    add(CFG_NOTIFY, KICKS, kicks, &(KICK_SIZE as u32).to_le_bytes(), &[]);
    add(CFG_ISR, INTERRUPT_STATUS, 1, &[], &[]);
    if config > 0 {
        add(CFG_DEVICE, DEVICE, config as u32, &[], &[]);
    }
    // BAR, offset and length are the driver's to choose.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..14].fill(0xff);
    add(CFG_PCI, 0, 0, &[0; 4], &writable)
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let state = self.shared.lock();
        state.space.read(offset, data);
        let Some((at, len)) = state.window(offset) else { return };
        drop(state);
        let mut value = [0; 4];
        self.bar.device.read(at, &mut value[..len]);
        data.copy_from_slice(&value[..data.len()]);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.shared.lock();
        let window = state.window(offset);
        state.space.write(offset, data);
        self.decode(&state);
        let stopped = self.shared.follow_master(&state);
        drop(state);
        self.shared.judge(stopped);
        if let Some((at, len)) = window
            && data.len() >= len
        {
            self.bar.device.write(at, &data[..len]);
        }
    }

    fn path_changed(&self, path: &Path) {
        let mut state = self.shared.lock();
        state.space.set_gets_through(path.masters);
        let stopped = self.shared.follow_master(&state);
        drop(state);
        self.shared.judge(stopped);
    }

    fn reset(&self) {
        let mut state = self.shared.lock();
        state.space.reset();
        state.registers.reset();
        self.decode(&state);
        // After a reset nothing of before it reaches memory: the unit may be reset next (rule 12).
        let stopped = self.shared.link.set_master(false) && self.shared.link.reset();
        self.shared.link.vectors.reset();
        drop(state);
        self.shared.judge(stopped);
    }

    fn saves(&self) -> Option<&dyn Saves> {
        Some(self)
    }
}

impl State {
    /// What an access to the data of the window is for: an offset in BAR 0, and a length. Section 4.1.4.9.
    fn window(&self, offset: u16) -> Option<(u64, usize)> {
        let (bar, at) = (self.space.u16(self.window + 4) & 0xff, u64::from(self.space.u32(self.window + 8)));
        let wanted = self.space.u32(self.window + 12) as usize;
        let fits = offset == self.window + 16 && bar == 0 && matches!(wanted, 1 | 2 | 4);
        (fits && at < BAR_SIZE && at.is_multiple_of(wanted as u64)).then_some((at, wanted))
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Messages and transfers go as the registers, and the bridges above, allow it. `false`: what goes on did not end
    /// in time.
    fn follow_master(&self, state: &State) -> bool {
        let master = state.space.is_master();
        self.link.vectors.set_control(state.space.u16(state.msix + 2), master);
        self.link.set_master(master)
    }

    /// Whether it stopped in time; if not, it may still reach memory that is not its any more.
    fn judge(&self, stopped: bool) {
        if !stopped {
            (self.stop_machine)("what a virtio device does in the host does not end");
        }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let elsewhere = Elsewhere {
            config_vector: self.link.vectors.vector_of(Cause::Config),
            queue_vector: self.link.vectors.vector_of(Cause::Queue(state.registers.selected())),
            status: self.link.status(),
        };
        state.registers.read(offset, data, &elsewhere);
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let mut stopped = true;
        match state.registers.write(offset, data) {
            Effect::None => {}
            Effect::ConfigVector(vector) => self.link.vectors.set_vector_of(Cause::Config, vector),
            Effect::QueueVector(queue, vector) => self.link.vectors.set_vector_of(Cause::Queue(queue), vector),
            Effect::Reset => {
                state.registers.reset();
                stopped = self.link.reset();
                self.link.vectors.forget();
            }
            Effect::Start => self.link.start(self.rings(&state.registers), state.registers.features()),
        }
        drop(state);
        self.judge(stopped);
    }

    fn rings(&self, registers: &Registers) -> Result<Vec<Option<Ring>>, Broken> {
        let event_idx = registers.features() & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let rings = registers.queues().iter().zip(self.most).map(|(queue, most)| match queue.enabled {
            true => Ring::new(*most, &queue.place, event_idx).map(Some),
            false => Ok(None),
        });
        rings.collect()
    }
}

/// BAR 0 on the bus.
struct Bar(Arc<Shared>);

/// Page and offset in it of an access that lies in one page.
fn place(offset: u64, len: usize) -> (u64, u64) {
    (offset / PAGE * PAGE, if offset % PAGE + len as u64 <= PAGE { offset % PAGE } else { PAGE })
}

impl BusDevice for Bar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (page, at) = place(offset, data.len());
        data.fill(0xff);
        match page {
            COMMON if at + data.len() as u64 <= registers::SIZE => self.0.read_common(at, data),
            INTERRUPT_STATUS if at == 0 => {
                data.fill(0);
                data[0] = self.0.link.take_isr();
            }
            DEVICE => {
                let bytes = self.0.config.iter().skip(at as usize).copied().chain(std::iter::repeat(0));
                data.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
            }
            TABLE => self.0.link.vectors.read_table(at, data),
            PENDING => self.0.link.vectors.read_pending(at, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (page, at) = place(offset, data.len());
        match page {
            COMMON if at + data.len() as u64 <= registers::SIZE => self.0.write_common(at, data),
            KICKS => self.0.link.kick(),
            TABLE => self.0.link.vectors.write_table(at, data),
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "function_test.rs"]
mod function_test;
