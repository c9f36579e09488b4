//! virtio devices: emulated here, and behind the unit like every function. Those whose data the host's kernel moves are
//! behind the bridge, too, and pin (D).

use std::fs::File;
use std::io;
use std::sync::Arc;

use devices::host::Doorbells;
use devices::pci::Decoder;
use devices::virtio::blk::{Blk, CALLS};
use devices::virtio::console::{Console, Input};
use devices::virtio::function::{VirtioPci, Wiring};
use devices::virtio::net::Net;
use devices::virtio::rng::Rng;
use devices::virtio::{Device, Dma, Untranslated};
use vfio_bridge::{Bridge, PinClient, Quarantine, Software};
use vmm_sys_util::eventfd::EventFd;
use vtd::{Endpoint, IovaRange, Requester, Unit};

use super::disk::{DiskFile, FileDisk};
use super::pinned_io::{Look, PinnedIo};
use super::quarantine::Breaker;
use super::tap::{Tap, TapLink};
use super::{Error, UserRequests};
use crate::config::VirtioKind;
use crate::kvm::irq::KvmInterrupts;
use crate::kvm::memory::Ram;
use crate::output::OutputWriter;

/// What a device is connected to.
pub struct VirtioWiring<'a> {
    /// Its id.
    pub id: &'a str,
    /// Its name in the guest.
    pub requester: Requester,
    /// The unit that it is behind; without one it reaches all memory.
    pub unit: Option<&'a Arc<Unit<Ram>>>,
    /// Guest memory.
    pub ram: &'a Arc<Ram>,
    /// What the unit tells.
    pub bridge: &'a Bridge,
    /// The host of devices that pin.
    pub software: &'a Software,
    /// Where the guest's output goes. It never waits.
    pub output: &'a OutputWriter,
    /// Signalled when the guest took input.
    pub taken: &'a EventFd,
    /// Stops the machine.
    pub breaker: Arc<Breaker>,
    /// Where its messages go.
    pub interrupts: Arc<KvmInterrupts>,
    /// Where its BAR is decoded.
    pub decoder: Arc<Decoder>,
    /// How kicks of its queues come without an exit.
    pub doorbells: Arc<dyn Doorbells>,
}

/// A device.
pub struct Plugged {
    /// Its function.
    pub function: Arc<VirtioPci>,
    /// Who pins for it.
    pub pins: Option<Arc<PinClient>>,
    /// Where the guest's input goes in.
    pub input: Option<Arc<Input>>,
}

/// The host's entropy. Reading it never waits once the host has booted.
const ENTROPY: &str = "/dev/urandom";

/// A device of this kind. It is behind the unit when this returns.
pub fn plug_virtio(kind: &VirtioKind, wiring: VirtioWiring<'_>) -> Result<Plugged, Error> {
    let id = wiring.id;
    let lacks = |what: String| move |source| Error::Virtio { name: format!("{what} of {id}"), source };
    match kind {
        VirtioKind::Rng => {
            let source = File::open(ENTROPY).map_err(lacks(ENTROPY.into()))?;
            wiring.copying(Rng::new(source))
        }
        VirtioKind::Console => {
            let input = Input::new(wiring.taken.try_clone().map_err(lacks("an event".into()))?);
            let input = input.map_err(lacks("an event".into()))?;
            let device = Console::new(wiring.output.clone(), input.clone());
            Ok(Plugged { input: Some(input), ..wiring.copying(device)? })
        }
        VirtioKind::Blk { file, read_only } => {
            let disk = DiskFile::open(file, *read_only).map_err(lacks(format!("the file {}", file.display())))?;
            wiring.pinning(CALLS as u64, |io| Blk::new(FileDisk::new(disk, id.to_owned(), io)))
        }
        VirtioKind::Net { tap, mac } => {
            let mac = mac.unwrap_or_else(|| mac_of(wiring.requester));
            let tap = Tap::open(tap).map_err(lacks(format!("the tap {tap}")))?;
            wiring.pinning(1, |io| Ok(Net::new(TapLink::new(tap, io), mac)))
        }
    }
}

/// The address of an interface in this slot: one that nobody was given to sell.
fn mac_of(requester: Requester) -> [u8; 6] {
    let Requester { segment, sid } = requester;
    // There are 8 functions, and 8 segments at most.
    [0x52, 0x54, sid.bus(), 0xca, sid.device(), (segment as u8) << 3 | sid.function()]
}

impl VirtioWiring<'_> {
    /// A device that pins, for as many calls at a time.
    fn pinning<V: Device<Endpoint<Ram>>>(
        &self,
        calls: u64,
        device: impl FnOnce(PinnedIo) -> io::Result<V>,
    ) -> Result<Plugged, Error> {
        let Self { id, requester, .. } = *self;
        // It was checked before that there is one.
        let unit = self.unit.ok_or(Error::NoUnit { kind: "virtio" })?;
        self.bridge.register(requester, self.software.open())?;
        let requests = UserRequests { endpoint: unit.endpoint(requester), interrupts: self.interrupts.clone() };
        let looks_at = Arc::downgrade(unit);
        let look = move |ranges: &[IovaRange]| {
            if let Some(unit) = looks_at.upgrade() {
                unit.look_at(requester, ranges);
            }
        };
        let look: Option<Look> = if unit.config().caching_mode { None } else { Some(Box::new(look)) };
        let io = PinnedIo::new(self.bridge, requester, calls, look, Box::new(requests))?;
        let client = io.client().clone();
        let device = device(io).map_err(|source| Error::Virtio { name: format!("the I/O of {id}"), source })?;
        unit.add_requester(requester).map_err(|source| Error::Attach { name: id.to_owned(), source })?;
        let function = self.function(unit.endpoint(requester), device)?;
        Ok(Plugged { function, pins: Some(client), input: None })
    }

    /// A device that copies what it reads and writes.
    fn copying(&self, device: impl Device<Endpoint<Ram>> + Device<Untranslated<Ram>>) -> Result<Plugged, Error> {
        let function = match self.unit {
            Some(unit) => self.function(unit.endpoint(self.requester), device)?,
            None => self.function(Untranslated((**self.ram).clone()), device)?,
        };
        Ok(Plugged { function, pins: None, input: None })
    }

    fn function<D: Dma>(&self, dma: D, device: impl Device<D>) -> Result<Arc<VirtioPci>, Error> {
        let Self { id, requester, .. } = *self;
        let breaker = self.breaker.clone();
        let wiring = Wiring {
            requester,
            decoder: self.decoder.clone(),
            interrupts: self.interrupts.clone(),
            doorbells: Some(self.doorbells.clone()),
            stop_machine: Box::new(move |why| breaker.stop_machine(&[requester], why)),
        };
        let thread = |source| Error::Virtio { name: format!("the thread of {id}"), source };
        let function = VirtioPci::new(wiring, dma, device).map_err(thread)?;
        self.breaker.add(requester, &function);
        Ok(function)
    }
}
