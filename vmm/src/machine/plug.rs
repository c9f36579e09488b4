//! Devices come into the machine: functions of the host, of other processes, and emulated ones.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use devices::ats::Ats;
use devices::dma::{BehindUnit, DirectMemory, DmaTarget};
use devices::edu::{Edu, Features, Pasids};
use devices::host::IrqLine;
use devices::ioapic::{EoiListener, IoApic};
use devices::pci::express::Upstream;
use devices::pci::{Decoder, PciFunction, PciePciBridge, PciePciBridgeWiring, RootPort, SlotError, gsi_of};
use devices::vfio_pci::{VfioPci, VfioPciWiring};
use devices::virtio::console::Input;
use vfio_bridge::{Bdf, Bridge, Function, GroupId, PinClient, Software};
use vmm_sys_util::eventfd::EventFd;
use vtd::{AtsFunction, Pasid, Requester, SourceId, Stream, Unit};

use super::Error;
use super::segments::Segments;
use super::source_ids::ids_of;
use super::units::Units;
use crate::assign::{self, Breaker, Opener, UserRequests};
use crate::config::{BusNumbers, DeviceKind, DeviceOption, Place, RootSlot, slot_of_port};
use crate::kvm::doorbells::KvmDoorbells;
use crate::kvm::irq::KvmInterrupts;
use crate::kvm::memory::Ram;
use crate::kvm::slots::{FunctionSlots, KvmSlots};
use crate::output::OutputWriter;

/// A device, in its place.
pub(super) struct Placed {
    pub id: String,
    pub kind: DeviceKind,
    /// Its name.
    pub requester: Requester,
    /// Its root port.
    pub port: Option<u8>,
    /// The bridge that it is behind.
    pub bridge: Option<Arc<PciePciBridge>>,
    /// Of the host's function: its address, and the kernel's number of its group.
    pub host: Option<(Bdf, GroupId)>,
    /// The function, if another process emulates it.
    pub process: Option<Arc<dyn Function>>,
    /// Of a device that pins.
    pub pins: Option<Arc<PinClient>>,
}

impl Placed {
    /// A device of which nothing more is known.
    fn new(option: &DeviceOption, id: &str, seat: Seat) -> Self {
        let Seat { requester, port, bridge, .. } = seat;
        let (host, process, pins) = (None, None, None);
        Self { id: id.to_owned(), kind: option.kind.clone(), requester, port, bridge, host, process, pins }
    }
}

/// Puts devices into a machine: all that they are connected to.
pub(super) struct Plug {
    pub segments: Arc<Segments>,
    pub ioapic: Arc<IoApic>,
    pub units: Option<Arc<Units>>,
    pub interrupts: Arc<KvmInterrupts>,
    pub slots: Arc<KvmSlots>,
    /// Eventfds in place of writes.
    pub doorbells: Arc<KvmDoorbells>,
    pub ram: Arc<Ram>,
    /// Where the guest's output goes.
    pub output: OutputWriter,
    /// Signalled when the guest took its input.
    pub taken: EventFd,
    /// What the unit tells.
    pub bridge: Arc<Bridge>,
    /// The host of devices of this process that pin.
    pub software: Arc<Software>,
    /// Stops functions.
    pub breaker: Arc<Breaker>,
    /// Opens functions.
    pub opener: Opener,
    /// Where the guest's input goes besides the serial port.
    pub input: Option<Arc<Input>>,
    /// Assigned functions, with their ids.
    pub assigned: Vec<(String, Arc<VfioPci>)>,
}

/// Where a device is, and what follows from it.
#[derive(Clone)]
pub(super) struct Seat {
    /// The device's name.
    pub requester: Requester,
    /// The device of bus 0 whose interrupt pins its own are, behind a port or a bridge.
    pub device: u8,
    /// Its root port.
    pub port: Option<u8>,
    /// The bridge that it is behind.
    pub bridge: Option<Arc<PciePciBridge>>,
}

impl Seat {
    /// On bus 0.
    pub fn on_root(requester: Requester) -> Self {
        Self { requester, device: requester.sid.device(), port: None, bridge: None }
    }

    /// Behind a root port.
    pub fn behind_port(requester: Requester, number: u8) -> Self {
        Self { requester, device: slot_of_port(number).device, port: Some(number), bridge: None }
    }

    /// What is above it.
    fn upstream(&self) -> Upstream {
        match (&self.bridge, self.port) {
            (Some(_), _) => Upstream::Bridge,
            (None, Some(_)) => Upstream::Port,
            (None, None) => Upstream::RootComplex,
        }
    }

    /// The pin of bus 0's device that pin `pin` (1 to 4) of the function is. A bridge turns them by the device below
    /// it, a root port by device 0 (PCI-to-PCI bridge architecture specification 1.2, section 9.1).
    fn pin(&self, pin: u8) -> u8 {
        let turned = self.bridge.as_ref().map_or(0, |_| self.requester.sid.device());
        (pin - 1 + turned) % 4 + 1
    }
}

impl Plug {
    /// Puts the devices of the command line in their places. `functions` are the open ones among them, in order.
    pub fn devices(
        &mut self,
        wanted: &[DeviceOption],
        names: &[String],
        places: &[Place],
        buses: &BusNumbers,
        functions: Vec<Arc<dyn Function>>,
    ) -> Result<Vec<Placed>, Error> {
        let mut functions = functions.into_iter();
        let mut placed = Vec::with_capacity(wanted.len());
        let bridges = self.bridges(names, places, buses)?;
        for ((option, id), place) in wanted.iter().zip(names).zip(places) {
            // One open function for each of these devices.
            let open = match option.kind {
                DeviceKind::Vfio { .. } | DeviceKind::VfioUser { .. } => functions.next(),
                _ => None,
            };
            let not_there = |source| Error::Slot { id: id.clone(), source };
            if let Some((_, seat)) = bridges.get(&placed.len()) {
                placed.push(Placed::new(option, id, seat.clone()));
                continue;
            }
            match *place {
                Place::Root(at) => {
                    let (root, requester) = (self.segments.of(at.segment)?.clone(), at.requester());
                    let (device, function) = self.device(option, id, Seat::on_root(requester), open)?;
                    root.insert(requester.sid, function).map_err(not_there)?;
                    placed.push(device);
                }
                Place::Port(number) => {
                    let port = self.port(number)?;
                    let requester = port.reserve()?;
                    let (device, function) = self.device(option, id, Seat::behind_port(requester, number), open)?;
                    port.fill(function);
                    placed.push(device);
                }
                Place::Bridge { bridge, slot } => {
                    let (bridge, above) = bridges.get(&bridge).ok_or_else(|| Error::NotOpen(id.clone()))?;
                    let requester = bridge.name_of(slot.device, slot.function);
                    if let Some(unit) = self.unit_of(requester)? {
                        unit.set_alias(requester, bridge.alias());
                    }
                    let seat = Seat { requester, device: above.device, port: None, bridge: Some(bridge.clone()) };
                    let (device, function) = self.device(option, id, seat, open)?;
                    let taken = |_| not_there(SlotError::Taken(requester.sid));
                    bridge.insert(slot.device, slot.function, function).map_err(taken)?;
                    placed.push(device);
                }
            }
        }
        Ok(placed)
    }

    /// Makes the bridges, each in its place, before what is behind them; by their places in the list of devices.
    fn bridges(
        &self,
        names: &[String],
        places: &[Place],
        buses: &BusNumbers,
    ) -> Result<BTreeMap<usize, (Arc<PciePciBridge>, Seat)>, Error> {
        let mut bridges = BTreeMap::new();
        // Bridges and ports are there.
        let root = self.segments.first();
        for (index, bus) in &buses.bridges {
            let bridge = PciePciBridge::new(PciePciBridgeWiring {
                bus: *bus,
                segment: root.segment(),
                decoder: root.decoder(),
                port_decoder: root.port_decoder(),
                ids: self.units.as_ref().map(|units| ids_of(units.of_bus(*bus))),
            });
            let seat = match places[*index] {
                Place::Port(number) => {
                    let port = self.port(number)?;
                    let requester = port.reserve()?;
                    port.fill(bridge.clone());
                    Seat::behind_port(requester, number)
                }
                Place::Root(RootSlot { slot, .. }) | Place::Bridge { slot, .. } => {
                    let sid = SourceId::new(0, slot.device, slot.function);
                    let taken = |source| Error::Slot { id: names[*index].clone(), source };
                    root.insert_bridge(sid, bridge.clone()).map_err(taken)?;
                    Seat::on_root(root.requester(sid))
                }
            };
            bridges.insert(*index, (bridge, seat));
        }
        Ok(bridges)
    }

    /// The unit that a function is behind; none in a machine without units.
    ///
    /// # Errors
    /// There are units, and none for it: it must not be made as if there were none.
    fn unit_of(&self, requester: Requester) -> Result<Option<&Arc<Unit<Ram>>>, Error> {
        let Some(units) = &self.units else { return Ok(None) };
        units.of(requester).map(Some).ok_or(Error::NoSegment(requester.segment))
    }

    /// The decoder of memory BARs, which all segments share.
    fn decoder(&self) -> Arc<Decoder> {
        self.segments.first().decoder()
    }

    /// The root port of this number.
    pub fn port(&self, number: u8) -> Result<Arc<RootPort>, Error> {
        let port = self.segments.first().ports().into_iter().find(|port| port.number() == number);
        port.ok_or(Error::NoPort(number))
    }

    /// Makes a device for its seat, where it is not yet. `open` is its function, if it is of the host or of another
    /// process.
    pub fn device(
        &mut self,
        option: &DeviceOption,
        id: &str,
        seat: Seat,
        open: Option<Arc<dyn Function>>,
    ) -> Result<(Placed, Arc<dyn PciFunction>), Error> {
        let requester = seat.requester;
        let mut placed = Placed::new(option, id, seat.clone());
        let function: Arc<dyn PciFunction> = match &option.kind {
            DeviceKind::Vfio { .. } | DeviceKind::VfioUser { .. } => {
                let function = open.ok_or_else(|| Error::NotOpen(id.to_owned()))?;
                placed.host = function.bdf().map(|bdf| (bdf, function.group()));
                placed.process = function.is_emulated().then(|| function.clone());
                let vfio = self.assign(seat, function)?;
                self.breaker.add(requester, &vfio);
                self.assigned.push((id.to_owned(), vfio.clone()));
                vfio
            }
            // They are made before the others.
            DeviceKind::PciBridge => return Err(Error::NotOpen(id.to_owned())),
            DeviceKind::Edu { pasid, ats, pri } => self.edu(seat, *pasid, *ats, *pri)?,
            DeviceKind::PinBlk { file, direct } => {
                let unit = self.unit_of(requester)?.ok_or(assign::Error::NoUnit { kind: option.kind.name() })?;
                let wiring = assign::PinBlkWiring {
                    requester,
                    unit,
                    bridge: &self.bridge,
                    software: &self.software,
                    breaker: self.breaker.clone(),
                    interrupts: self.interrupts.clone(),
                    decoder: self.decoder(),
                };
                let (device, reads) = assign::plug_pinblk(file.as_deref(), *direct, wiring)?;
                self.breaker.add(requester, &device);
                placed.pins = Some(reads.client().clone());
                device
            }
            DeviceKind::Virtio(kind) => {
                let wiring = assign::VirtioWiring {
                    id,
                    requester,
                    unit: self.unit_of(requester)?,
                    ram: &self.ram,
                    bridge: &self.bridge,
                    software: &self.software,
                    output: &self.output,
                    taken: &self.taken,
                    breaker: self.breaker.clone(),
                    interrupts: self.interrupts.clone(),
                    decoder: self.decoder(),
                    doorbells: self.doorbells.clone(),
                };
                let plugged = assign::plug_virtio(kind, wiring)?;
                placed.pins = plugged.pins;
                self.input = plugged.input.or(self.input.take());
                plugged.function
            }
        };
        Ok((placed, function))
    }

    /// The pin `pin` of the function at `seat`: its line, and the line's number.
    fn line(&self, seat: &Seat, pin: u8) -> (Arc<dyn IrqLine>, u8) {
        let gsi = gsi_of(seat.device, seat.pin(pin)) as u8;
        (self.ioapic.line(gsi), gsi)
    }

    /// An emulated device, whose DMA goes through its endpoint of the unit.
    fn edu(&self, seat: Seat, pasid: bool, ats: bool, page_requests: bool) -> Result<Arc<Edu>, Error> {
        let requester = seat.requester;
        let unit = self.unit_of(requester)?;
        let memory: Box<dyn DmaTarget> = match unit {
            Some(unit) => {
                let (endpoint, decoder) = (unit.endpoint(requester), self.decoder());
                Box::new(BehindUnit { endpoint, decoder })
            }
            None => Box::new(DirectMemory((*self.ram).clone())),
        };
        let line = self.line(&seat, 1);
        // That there is a unit with PASIDs, and one with device-TLBs, was checked.
        let ats = unit.filter(|_| ats).map(|unit| {
            let ats = Arc::<Ats>::default();
            let function: Weak<dyn AtsFunction> = Arc::<Ats>::downgrade(&ats);
            unit.set_ats_function(requester, function);
            ats
        });
        let pasids = unit.filter(|_| pasid).map(|unit| {
            let (unit, decoder) = (unit.clone(), self.decoder());
            let target = move |pasid: Pasid| -> Box<dyn DmaTarget> {
                let endpoint = unit.endpoint_of(Stream { requester, pasid: Some(pasid) });
                Box::new(BehindUnit { endpoint, decoder: decoder.clone() })
            };
            Box::new(target) as Pasids
        });
        let (decoder, interrupts) = (self.decoder(), self.interrupts.clone());
        let features = Features { pasids, ats, page_requests, upstream: seat.upstream() };
        Edu::with_features(requester, decoder, interrupts, Some(line), memory, features).map_err(Error::Thread)
    }

    /// Puts `function` behind the unit, which gives it what the guest's tables say before its first DMA, and makes it a
    /// function of the guest.
    fn assign(&self, seat: Seat, function: Arc<dyn Function>) -> Result<Arc<VfioPci>, Error> {
        let requester = seat.requester;
        let name = function.name();
        match function.device() {
            Some(device) => self.bridge.register_device(requester, function.group(), device),
            None => self.bridge.register(requester, function.group()),
        }
        .map_err(assign::Error::from)?;
        if let Some(unit) = self.unit_of(requester)? {
            if function.is_emulated() {
                let (endpoint, interrupts) = (unit.endpoint(requester), self.interrupts.clone());
                function.tell(Arc::new(UserRequests { endpoint, interrupts }));
            }
            let attach = |source| assign::Error::Attach { name: name.clone(), source };
            unit.add_requester(requester).map_err(attach)?;
        }
        let intx = VfioPci::pin_of(&*function).map(|pin| self.line(&seat, pin));
        let gsi = intx.as_ref().map(|(_, gsi)| *gsi);
        let vfio = VfioPci::new(VfioPciWiring {
            requester,
            upstream: seat.upstream(),
            host: function,
            decoder: self.decoder(),
            port_decoder: self.segments.of(requester.segment)?.port_decoder(),
            slots: Arc::new(FunctionSlots { slots: self.slots.clone(), of: requester }),
            interrupts: self.interrupts.clone(),
            intx,
        })
        .map_err(|source| assign::Error::Function { name: name.clone(), source })?;
        if let Some(gsi) = gsi {
            let listener: Weak<dyn EoiListener> = Arc::<VfioPci>::downgrade(&vfio);
            self.ioapic.add_eoi_listener(gsi, listener);
        }
        Ok(vfio)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::pci::PciRoot;

    #[test]
    fn f5_pins_behind_a_bridge_are_turned_by_the_device_and_behind_a_port_they_are_not() {
        let root = PciRoot::new(Arc::default());
        let bridge = PciePciBridge::new(PciePciBridgeWiring {
            bus: 2,
            segment: 0,
            decoder: root.decoder(),
            port_decoder: root.port_decoder(),
            ids: None,
        });
        let behind =
            |device| Seat { requester: bridge.name_of(device, 0), device: 8, port: None, bridge: Some(bridge.clone()) };
        let pins = |seat: &Seat| [1, 2, 3, 4].map(|pin| seat.pin(pin));
        assert_eq!([1, 3, 4].map(|device| pins(&behind(device))), [[2, 3, 4, 1], [4, 1, 2, 3], [1, 2, 3, 4]]);
        let name = root.requester(SourceId::new(1, 0, 0));
        assert_eq!(pins(&Seat::behind_port(name, 3)), [1, 2, 3, 4]);
        assert_eq!(pins(&Seat::on_root(root.requester(SourceId::new(0, 5, 0)))), [1, 2, 3, 4]);
    }
}
