//! A PCI function of the host, assigned to the guest through VFIO.
//!
//! Configuration space is the host's, as VFIO virtualises it, but for what is ours: BARs, MSI, MSI-X, the interrupt
//! line, the command register's enables, and the capabilities that are hidden.
//!
//! Whether BARs are reached, and the order in which that begins and ends (F-3), is `reach.rs`'s.
//!
//! # Locks
//! `config` serialises configuration writes and resets and is held while windows are mapped and unmapped, which waits
//! for the queue of the unit: nothing that a drain calls may take it, and no access of a BAR. Under it come, one after
//! the other and not inside each other, a gate and the decoder; an access has a gate, and takes MSI-X under it.
//! `HostCommand` is held for one host access only, so [`VfioPci::quarantine`], which takes nothing else, can be called
//! from inside anything that an unmapped window leads to.

mod bars;
mod capabilities;
mod command;
mod express;
mod intx;
mod msi;
mod msix;
mod reach;
mod rom;
mod saving;
mod vectors;

use std::io;
use std::sync::{Arc, Mutex};

use vfio_bridge::{Function, IrqKind, RegionKind, ResetScope};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vtd::Requester;

use self::bars::{Bar, Decoders, Trapped, Wiring};
use self::command::HostCommand;
use self::express::Seen;
use self::intx::Intx;
use self::msi::MsiCapability;
use self::msix::{Layout, Msix};
use self::reach::{Change, Closed, Decoded, Enables, Gates, Places as BarPlaces, ROM_BAR, Reach, Space};
use self::rom::Rom;
use self::vectors::Vectors;
use crate::host::{Interrupts, IrqLine, MemorySlots};
use crate::ioapic::EoiListener;
use crate::pci::config::{
    BAR0, CAP_ADVANCED, CAP_EXPRESS, CAP_MSI, CAP_MSIX, CAP_POWER, COMMAND, COMMAND_IO, COMMAND_MEMORY, CONFIG_SIZE,
    INTERRUPT_LINE, INTERRUPT_PIN, ROM, STATUS,
};
use crate::pci::express::Upstream;
use crate::pci::{BarKind, BarTarget, ConfigSpace, Decoder, Identity, Path, PciFunction};
use crate::saved::Saves;

/// What an assigned function is wired to.
pub struct VfioPciWiring {
    /// Its address in the guest.
    pub requester: Requester,
    /// What is above it there.
    pub upstream: Upstream,
    /// The function of the host.
    pub host: Arc<dyn Function>,
    /// Puts its memory BARs on the MMIO bus.
    pub decoder: Arc<Decoder>,
    /// Puts its I/O BARs on the bus of ports.
    pub port_decoder: Arc<Decoder>,
    /// Puts its BARs into the guest's memory.
    pub slots: Arc<dyn MemorySlots>,
    /// Message routes.
    pub interrupts: Arc<dyn Interrupts>,
    /// The line of its interrupt pin (see [`VfioPci::pin_of`]), and what the interrupt line register says: the pin's
    /// global system interrupt. `None`: no legacy interrupt.
    pub intx: Option<(Arc<dyn IrqLine>, u8)>,
}

/// Why a function cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum VfioPciError {
    /// A BAR that PCI does not allow.
    #[error("BAR {bar} has {size:#x} bytes, which is no size of a BAR")]
    BarSize {
        /// Which.
        bar: u8,
        /// Bytes.
        size: u64,
    },
    /// An eventfd could not be made.
    #[error("no eventfd could be made")]
    Event(#[source] io::Error),
}

/// The assigned function.
pub struct VfioPci {
    requester: Requester,
    host: Arc<dyn Function>,
    trapped: Arc<Trapped>,
    bars: Vec<Bar>,
    intx: Option<Intx>,
    error: Option<EventFd>,
    request: Option<EventFd>,
    /// Which bytes of configuration space are ours.
    owned: Box<[bool; CONFIG_SIZE]>,
    places: Places,
    command: HostCommand,
    identity: saving::Identity,
    moving: Mutex<saving::Moving>,
    config: Mutex<Config>,
}

/// Where the capabilities are whose registers do something here.
#[derive(Default)]
struct Places {
    msix: Option<u16>,
    /// The power-management control and status register.
    power: Option<u16>,
    /// The byte with the bit that starts a function-level reset, and the bit.
    resets: Vec<(u16, u8)>,
}

/// The bits of the command register that mean something; the others read as 0.
const COMMAND_BITS: u16 = 0x07ff;

/// What configuration writes change.
struct Config {
    /// Our bytes; only those that `owned` names mean anything.
    space: ConfigSpace,
    /// The guest's command register; the host's may have less.
    command: u16,
    /// In power state D0.
    is_d0: bool,
    msi: Option<MsiCapability>,
    reach: Reach,
}

impl VfioPci {
    /// The interrupt pin of `host`'s function: 1 (INTA) to 4; `None` when it has no legacy interrupt.
    pub fn pin_of(host: &dyn Function) -> Option<u8> {
        let mut pin = [0];
        host.read(RegionKind::Config, INTERRUPT_PIN.into(), &mut pin);
        (host.irq_count(IrqKind::Intx) > 0 && (1..=4).contains(&pin[0])).then_some(pin[0])
    }

    /// Assigns the function. Its memory is disabled, it masters no bus, and no vector is enabled.
    pub fn new(wiring: VfioPciWiring) -> Result<Arc<Self>, VfioPciError> {
        let VfioPciWiring { requester, upstream, host, decoder, port_decoder, slots, interrupts, intx } = wiring;
        let mut snapshot = [0xff; CONFIG_SIZE];
        let size = host.region(RegionKind::Config).size.min(CONFIG_SIZE as u64) as usize;
        for (index, word) in snapshot[..size & !3].chunks_mut(4).enumerate() {
            host.read(RegionKind::Config, 4 * index as u64, word);
        }

        // The identity is the host's: those bytes are not ours.
        let id = Identity { vendor: 0, device: 0, revision: 0, class: 0, subsystem: (0, 0) };
        let mut space = ConfigSpace::new(&id);
        let mut owned = Box::new([false; CONFIG_SIZE]);
        let mut own = |range: std::ops::Range<u16>| owned[usize::from(range.start)..usize::from(range.end)].fill(true);
        own(BAR0..BAR0 + 24);
        own(ROM..ROM + 4);
        own(INTERRUPT_LINE..INTERRUPT_PIN + 1);
        space.set_interrupt_pin(
            if intx.is_some() { Self::pin_of(&*host).unwrap_or(0) } else { 0 },
            intx.as_ref().map_or(0xff, |(_, line)| *line),
        );
        // A capability that VFIO does not serve would lose interrupts.
        let mut unusable: Vec<u8> = [(CAP_MSI, IrqKind::Msi), (CAP_MSIX, IrqKind::Msix)]
            .into_iter()
            .filter_map(|(id, kind)| (host.irq_count(kind) == 0).then_some(id))
            .collect();
        let mut patches = match express::seen(&snapshot, upstream) {
            Seen::With(patches) => patches,
            Seen::Hidden => {
                unusable.push(CAP_EXPRESS);
                Vec::new()
            }
        };
        let mut places = Places::default();
        let mut msi = None;
        let mut msix = None;
        let word = |at: u16| u16::from_le_bytes([snapshot[usize::from(at)], snapshot[usize::from(at) + 1]]);
        let dword = |at: u16| u32::from(word(at)) | (u32::from(word(at + 2)) << 16);
        let vectors =
            |kind| Vectors::new(kind, requester, Arc::clone(&host), Arc::<dyn Interrupts>::clone(&interrupts));
        for capability in capabilities::list(&snapshot) {
            let at = capability.at;
            match (capability.id as u8, 0x100 - at) {
                // Device Control, Initiate Function Level Reset: the host has it also where the guest does not see it.
                (CAP_EXPRESS, 20..) if dword(at + 4) >> 28 & 1 == 1 => places.resets.push((at + 9, 0x80)),
                (id, _) if unusable.contains(&id) => {}
                (CAP_MSI, 4..) if msi.is_none() && at + MsiCapability::len(word(at + 2)) <= 0x100 => {
                    let found =
                        MsiCapability::new(at, capability.next as u8, word(at + 2), &mut space, vectors(IrqKind::Msi));
                    own(found.owned());
                    msi = Some(found);
                }
                (CAP_MSIX, 12..) if msix.is_none() => {
                    let layout = Layout::new(word(at + 2), dword(at + 4), dword(at + 8));
                    let count = layout.count.min(host.irq_count(IrqKind::Msix) as usize);
                    msix = Some((layout, Msix::new(count, vectors(IrqKind::Msix))));
                    own(at + 2..at + 4);
                    space.put(at + 2, &(word(at + 2) & 0x7ff).to_le_bytes());
                    space.allow(at + 2, &(msix::CONTROL_ENABLE | msix::CONTROL_MASK).to_le_bytes());
                    places.msix = Some(at + 2);
                }
                (CAP_POWER, 8..) => places.power = Some(at + 4),
                // The same in Advanced Features.
                (CAP_ADVANCED, 6..) => places.resets.push((at + 4, 0x01)),
                _ => {}
            }
        }

        // Last: a link that leaves a capability out may be in one that is ours.
        patches.extend(capabilities::hide(&snapshot, &unusable));
        for patch in patches {
            own(patch.at..patch.at + patch.bytes.len() as u16);
            space.put(patch.at, &patch.bytes);
        }

        let layout = msix.as_ref().map(|(layout, _)| layout.clone());
        let gates = Gates::new(host.clone());
        let trapped = Trapped::new(gates.clone(), msix);
        let decoders = Decoders { memory: &decoder, io: &port_decoder };
        let wiring = Wiring { host: &host, trapped: &trapped, slots: &slots, decoders };
        let (bars, mut decoded) = bars::find(&wiring, &snapshot, layout.as_ref(), &mut space)?;
        if let Some(size) = rom::size(&*host, dword(0)) {
            space.add_rom(size);
            let target = BarTarget::of_device(Arc::new(Rom::new(gates.clone(), size)));
            decoded[ROM_BAR] = Some(Decoded::new(Space::Memory, decoder.clone(), target));
        }
        let reach = Reach::new(requester, gates, decoded);
        let intx = match intx {
            Some((line, _)) => Some(Intx::new(host.clone(), line).map_err(VfioPciError::Event)?),
            None => None,
        };
        let event = |kind| -> Result<_, VfioPciError> {
            if host.irq_count(kind) == 0 {
                return Ok(None);
            }
            let event = EventFd::new(EFD_NONBLOCK).map_err(VfioPciError::Event)?;
            Ok(host.set_irqs(kind, 0, &[Some(&event)]).is_ok().then_some(event))
        };
        let (error, request) = (event(IrqKind::Error)?, event(IrqKind::Request)?);

        let command = HostCommand::new(host.clone());
        let is_d0 = places.power.is_none_or(|at| word(at) & 3 == 0);
        let config = Config { space, command: 0, is_d0, msi, reach };
        let config = Mutex::new(config);
        if let Some(intx) = &intx {
            intx.enable(&command);
        }
        let (identity, moving) = (saving::Identity::of(&*host, &snapshot), Mutex::default());
        Ok(Arc::new(Self {
            requester,
            host,
            trapped,
            bars,
            intx,
            error,
            request,
            owned,
            places,
            command,
            identity,
            moving,
            config,
        }))
    }

    /// Signalled by VFIO when the device raises its legacy interrupt: the event loop then calls
    /// [`VfioPci::intx_fired`].
    pub fn intx_event(&self) -> Option<&EventFd> {
        self.intx.as_ref().map(Intx::event)
    }

    /// The legacy interrupt's eventfd is readable.
    pub fn intx_fired(&self) {
        if let Some(intx) = &self.intx {
            intx.fired();
        }
    }

    /// Signalled when the device reported an error that it cannot correct.
    pub fn error_event(&self) -> Option<&EventFd> {
        self.error.as_ref()
    }

    /// Signalled when the host wants the device back.
    pub fn request_event(&self) -> Option<&EventFd> {
        self.request.as_ref()
    }

    /// Its address in the guest, and how many vectors it can use at a time.
    pub fn vectors(&self) -> (Requester, usize) {
        let count = |kind| self.host.irq_count(kind) as usize;
        (self.requester, count(IrqKind::Msi).max(count(IrqKind::Msix)))
    }

    /// The BARs: number, kind, size in bytes.
    pub fn bar_sizes(&self) -> Vec<(u8, BarKind, u64)> {
        self.bars.iter().map(|bar| (bar.index, bar.kind, bar.size)).collect()
    }

    /// Stops the function's DMA for good (B-11): Bus Master off, then reset. After `Ok` it does none, whatever the
    /// guest writes. Takes no lock that is held while anything outside is called.
    pub fn quarantine(&self) -> Result<(), String> {
        log::error!("{}: the function is quarantined: it does no more DMA", self.requester);
        self.command.quarantine()
    }

    /// Makes the change `host_write` of the host's configuration space between taking away what must not be there after
    /// it and putting in place what must not be there before it, with the guest's registers as they are.
    fn change(config: &mut Config, host_write: impl FnOnce(&Change)) {
        let Config { space, command, is_d0, reach, .. } = config;
        // The overlay decodes by its own copy of the bits.
        space.put(COMMAND, &command.to_le_bytes());
        let on = |bit| *is_d0 && *command & bit != 0;
        let enables = Enables { memory: on(COMMAND_MEMORY), io: on(COMMAND_IO) };
        let places: BarPlaces =
            std::array::from_fn(|index| if index == ROM_BAR { space.decoded_rom() } else { space.decoded(index) });
        reach.change(enables, &places, host_write);
    }

    /// Mappings out, no bus mastering, no interrupt.
    fn quiesce_function<'a>(
        &self,
        reach: &'a mut Reach,
        command: &mut u16,
        space: &mut ConfigSpace,
        msi: &mut Option<MsiCapability>,
    ) -> Closed<'a> {
        let closed = reach.close();
        *command = 0;
        space.put(COMMAND, &command.to_le_bytes());
        self.write_host_command(0, closed.change());
        if let Some(msix) = self.trapped.msix() {
            msix.lock().unwrap().reset();
        }
        if let Some(msi) = msi {
            msi.disable();
        }
        if let Some(intx) = &self.intx {
            intx.disable(&self.command);
        }
        closed
    }

    /// Everything to the state after a reset (F-4): mappings out, quiesce, reset, restore.
    fn reset_function(&self, config: &mut Config, scope: ResetScope) {
        let Config { space, command, is_d0, msi, reach } = config;
        let closed = self.quiesce_function(reach, command, space, msi);
        if let Some(at) = self.places.power.filter(|_| !*is_d0) {
            // A reset that goes by power state, or none, would leave it asleep.
            let mut power = [0; 2];
            self.host.read(RegionKind::Config, at.into(), &mut power);
            // The whole register: libvfio-user takes no part of it. A 1 would clear PME Status.
            self.write_power(at, &[power[0] & !3, power[1] & !0x80], closed.change());
        }
        self.command.reset(scope, self.requester, &closed);
        space.reset();
        *is_d0 = true;
        if let Some(intx) = &self.intx {
            intx.enable(&self.command);
        }
    }

    fn write_host_command(&self, value: u16, change: &Change) {
        match &self.intx {
            Some(intx) => intx.write_command(&self.command, value, change),
            None => self.command.write(value, change),
        }
    }

    /// Writes of the power-management control and status register, which may put the function to sleep.
    fn write_power(&self, offset: u16, data: &[u8], _: &Change) {
        self.forward(offset, data);
    }

    /// Writes what decides nothing about BARs.
    fn forward(&self, offset: u16, data: &[u8]) {
        if let Err(e) = self.host.write(RegionKind::Config, offset.into(), data) {
            log::debug!("{}: a configuration write at {offset:#x} was dropped: {e}", self.requester);
        }
    }

    /// A write of 1, 2 or 4 bytes whose bytes are all ours, or all the host's and not the command register's.
    fn write_uniform(&self, config: &mut Config, offset: u16, data: &[u8]) {
        let touches = |at: u16, len: u16| offset < at + len && at < offset + data.len() as u16;
        if self.owned[usize::from(offset)] {
            config.space.write(offset, data);
            if touches(BAR0, 24) || touches(ROM, 4) {
                Self::change(config, |_| {});
            }
            if let Some(at) = self.places.msix.filter(|at| touches(*at, 2)) {
                self.switch_msix(config, config.space.u16(at));
            }
            self.update_msi(config, offset);
            return;
        }
        if let Some((at, bit)) = self.places.resets.iter().copied().find(|(at, _)| touches(*at, 1)) {
            let index = usize::from(at - offset);
            let mut data = data.to_vec();
            let starts = data[index] & bit != 0;
            data[index] &= !bit;
            self.forward(offset, &data);
            if starts {
                self.reset_function(config, ResetScope::Function);
            }
            return;
        }
        if let Some(at) = self.places.power.filter(|at| touches(*at, 1)) {
            config.is_d0 = data[usize::from(at - offset)] & 3 == 0;
            Self::change(config, |change| self.write_power(offset, data, change));
            return;
        }
        self.forward(offset, data);
    }

    fn write_command(&self, config: &mut Config, offset: u16, data: &[u8]) {
        let mut bytes = config.command.to_le_bytes();
        for (i, byte) in data.iter().enumerate() {
            bytes[usize::from(offset - COMMAND) + i] = *byte;
        }
        // Without an I/O BAR there is nothing to enable.
        let has_io = self.bars.iter().any(|bar| bar.kind == BarKind::Io);
        let absent = if has_io { 0 } else { COMMAND_IO };
        config.command = u16::from_le_bytes(bytes) & COMMAND_BITS & !absent;
        let command = config.command;
        Self::change(config, |change| self.write_host_command(command, change));
    }

    /// VFIO has one kind of interrupt at a time: the legacy one gives way to messages and comes back after them.
    fn switch_msix(&self, config: &Config, control: u16) {
        let Some(msix) = self.trapped.msix() else { return };
        if control & msix::CONTROL_ENABLE != 0 {
            self.disable_intx();
        }
        msix.lock().unwrap().set_control(control);
        self.enable_intx_without_messages(config);
    }

    fn update_msi(&self, config: &mut Config, offset: u16) {
        let Config { msi: Some(msi), space, .. } = config else { return };
        if !msi.owned().contains(&offset) {
            return;
        }
        if msi.is_enabled(space) {
            self.disable_intx();
        }
        msi.update(space);
        self.enable_intx_without_messages(config);
    }

    fn disable_intx(&self) {
        if let Some(intx) = &self.intx {
            intx.disable(&self.command);
        }
    }

    fn enable_intx_without_messages(&self, config: &Config) {
        let msi = config.msi.as_ref().is_some_and(|msi| msi.is_enabled(&config.space));
        let msix = self.trapped.msix().is_some_and(|msix| msix.lock().unwrap().is_enabled());
        if let Some(intx) = self.intx.as_ref().filter(|_| !msi && !msix) {
            intx.enable(&self.command);
        }
    }

    /// The end of the longest run from `start` with one owner (ours, the command register, the host's).
    fn run(&self, offset: u16, len: usize, start: usize) -> usize {
        let owner = |i: usize| {
            let at = offset + i as u16;
            (self.owned[usize::from(at)], (COMMAND..STATUS).contains(&at))
        };
        (start + 1..len).find(|i| owner(*i) != owner(start)).unwrap_or(len)
    }
}

impl PciFunction for VfioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut config = self.config.lock().unwrap();
        if let Config { msi: Some(msi), space, .. } = &mut *config
            && msi.owned().contains(&offset)
        {
            msi.refresh_pending(space);
        }
        let places = usize::from(offset)..usize::from(offset) + data.len();
        if !self.owned[places.clone()].iter().all(|owned| *owned) {
            self.host.read(RegionKind::Config, offset.into(), data);
        }
        for (at, byte) in places.zip(data) {
            let at = at as u16;
            if self.owned[usize::from(at)] {
                config.space.read(at, std::slice::from_mut(byte));
            } else if (COMMAND..STATUS).contains(&at) {
                *byte = config.command.to_le_bytes()[usize::from(at - COMMAND)];
            }
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut config = self.config.lock().unwrap();
        let mut start = 0;
        while start < data.len() {
            let mut end = self.run(offset, data.len(), start);
            // The host takes aligned accesses of 1, 2 and 4 bytes.
            let at = offset + start as u16;
            let len = [4, 2, 1].into_iter().find(|n| *n <= end - start && usize::from(at) % n == 0).unwrap_or(1);
            end = start + len;
            let part = &data[start..end];
            if (COMMAND..STATUS).contains(&at) {
                self.write_command(&mut config, at, part);
            } else {
                self.write_uniform(&mut config, at, part);
            }
            start = end;
        }
    }

    fn path_changed(&self, path: &Path) {
        match &self.intx {
            Some(intx) => intx.set_gets_through(&self.command, path.masters),
            None => self.command.set_gets_through(path.masters),
        }
    }

    fn quiesce(&self) {
        let config = &mut *self.config.lock().unwrap();
        let Config { space, command, msi, reach, .. } = config;
        self.quiesce_function(reach, command, space, msi);
    }

    fn reset(&self) {
        self.reset_function(&mut self.config.lock().unwrap(), ResetScope::Machine);
    }

    /// Of a function whose own state can be had.
    fn saves(&self) -> Option<&dyn Saves> {
        self.host.migration().is_some().then_some(self)
    }
}

impl EoiListener for VfioPci {
    fn end_of_interrupt(&self) {
        if let Some(intx) = &self.intx {
            intx.end_of_interrupt();
        }
    }
}

impl Drop for VfioPci {
    fn drop(&mut self) {
        let mut config = self.config.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let closed = config.reach.close();
        self.write_host_command(0, closed.change());
    }
}

#[cfg(test)]
mod config_test;
#[cfg(test)]
mod gate_test;
#[cfg(test)]
mod intx_test;
#[cfg(test)]
mod messages_test;
#[cfg(test)]
mod reset_test;
#[cfg(test)]
mod saving_test;
#[cfg(test)]
mod test_bench;
