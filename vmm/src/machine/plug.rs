//! Devices of the command line come into the machine: functions of the host, of other processes, and emulated ones.

use std::sync::{Arc, Weak};

use devices::dma::{BehindUnit, DirectMemory, DmaTarget};
use devices::edu::{Edu, Pasids};
use devices::host::IrqLine;
use devices::ioapic::EoiListener;
use devices::pci::{PciFunction, gsi_of};
use devices::vfio_pci::{VfioPci, VfioPciWiring};
use devices::virtio::console::Input;
use vfio_bridge::{Bdf, Bridge, Function, GroupId, PinClient};
use vmm_sys_util::eventfd::EventFd;
use vtd::{Pasid, Requester, SourceId, Stream, Unit};

use super::{Error, Platform};
use crate::assign::{self, Assigned, UserRequests};
use crate::config::{DeviceKind, DeviceOption, Slot};
use crate::kvm::irq::KvmInterrupts;
use crate::kvm::memory::Ram;
use crate::kvm::slots::{FunctionSlots, KvmSlots};
use crate::output::OutputWriter;

/// A device of the command line, in its place.
pub(super) struct Placed {
    pub id: String,
    pub kind: &'static str,
    pub requester: Requester,
    /// Of the host's function: its address, and the kernel's number of its group.
    pub host: Option<(Bdf, GroupId)>,
    /// The function, if another process emulates it.
    pub process: Option<Arc<dyn Function>>,
    /// Of a device that pins.
    pub pins: Option<Arc<PinClient>>,
}

/// Puts the devices of the command line into a machine.
pub(super) struct Plug<'a> {
    pub platform: &'a Platform,
    pub unit: Option<&'a Arc<Unit<Ram>>>,
    pub interrupts: Arc<KvmInterrupts>,
    pub slots: Arc<KvmSlots>,
    pub ram: &'a Arc<Ram>,
    /// Where the guest's output goes.
    pub output: &'a OutputWriter,
    /// Signalled when the guest took its input.
    pub taken: &'a EventFd,
    /// Where its input goes besides the serial port.
    pub input: Option<Arc<Input>>,
    /// Assigned functions, with their ids.
    pub assigned: Vec<(String, Arc<VfioPci>)>,
}

impl Plug<'_> {
    pub fn devices(
        &mut self,
        wanted: &[DeviceOption],
        names: &[String],
        slots: &[Slot],
        assigned: Assigned,
    ) -> Result<Vec<Placed>, Error> {
        let mut functions = assigned.functions.into_iter();
        let mut placed = Vec::with_capacity(wanted.len());
        for ((option, id), slot) in wanted.iter().zip(names).zip(slots) {
            let place = |source| Error::Slot { id: id.clone(), source };
            let sid = SourceId::new(0, slot.device, slot.function);
            let requester = self.platform.root.requester(sid);
            let (mut host, mut process, mut pins) = (None, None, None);
            let function: Arc<dyn PciFunction> = match &option.kind {
                DeviceKind::Vfio { .. } | DeviceKind::VfioUser { .. } => {
                    // One open function for each of these devices, in the same order.
                    let Some(function) = functions.next() else { continue };
                    host = function.bdf().map(|bdf| (bdf, function.group()));
                    process = function.is_emulated().then(|| function.clone());
                    let vfio = self.assign(requester, function, &assigned.bridge)?;
                    assigned.breaker.add(requester, &vfio);
                    self.assigned.push((id.clone(), vfio.clone()));
                    vfio
                }
                DeviceKind::Edu { pasid } => self.edu(requester, *pasid)?,
                DeviceKind::PinBlk { file, direct } => {
                    // It was checked that there is a unit.
                    let Some(unit) = self.unit else { continue };
                    let wiring = assign::PinBlkWiring {
                        requester,
                        unit,
                        bridge: &assigned.bridge,
                        software: &assigned.software,
                        breaker: assigned.breaker.clone(),
                        interrupts: self.interrupts.clone(),
                        decoder: self.platform.root.decoder(),
                    };
                    let (device, reads) = assign::plug_pinblk(file.as_deref(), *direct, wiring)?;
                    assigned.breaker.add(requester, &device);
                    pins = Some(reads.client().clone());
                    device
                }
                DeviceKind::Virtio(kind) => {
                    let wiring = assign::VirtioWiring {
                        id,
                        requester,
                        unit: self.unit,
                        ram: self.ram,
                        bridge: &assigned.bridge,
                        software: &assigned.software,
                        output: self.output,
                        taken: self.taken,
                        breaker: assigned.breaker.clone(),
                        interrupts: self.interrupts.clone(),
                        decoder: self.platform.root.decoder(),
                    };
                    let plugged = assign::plug_virtio(kind, wiring)?;
                    pins = plugged.pins;
                    self.input = plugged.input.or(self.input.take());
                    plugged.function
                }
            };
            self.platform.root.insert(sid, function).map_err(place)?;
            placed.push(Placed { id: id.clone(), kind: option.kind.name(), requester, host, process, pins });
        }
        Ok(placed)
    }

    /// The pin `pin` of the function at `requester`: its line, and the line's number.
    fn line(&self, requester: Requester, pin: u8) -> (Arc<dyn IrqLine>, u8) {
        let gsi = gsi_of(requester.sid.device(), pin) as u8;
        (self.platform.ioapic.line(gsi), gsi)
    }

    /// An emulated device, whose DMA goes through its endpoint of the unit, one for each PASID in use.
    fn edu(&self, requester: Requester, pasid: bool) -> Result<Arc<Edu>, Error> {
        let memory: Box<dyn DmaTarget> = match self.unit {
            Some(unit) => {
                let (endpoint, decoder) = (unit.endpoint(requester), self.platform.root.decoder());
                Box::new(BehindUnit { endpoint, decoder })
            }
            None => Box::new(DirectMemory((**self.ram).clone())),
        };
        let line = self.line(requester, 1);
        // That there is a unit with PASIDs was checked.
        let pasids = self.unit.filter(|_| pasid).map(|unit| {
            let (unit, decoder) = (unit.clone(), self.platform.root.decoder());
            let target = move |pasid: Pasid| -> Box<dyn DmaTarget> {
                let endpoint = unit.endpoint_of(Stream { requester, pasid: Some(pasid) });
                Box::new(BehindUnit { endpoint, decoder: decoder.clone() })
            };
            Box::new(target) as Pasids
        });
        let (decoder, interrupts) = (self.platform.root.decoder(), self.interrupts.clone());
        Edu::with_pasids(requester, decoder, interrupts, Some(line), memory, pasids).map_err(Error::Thread)
    }

    /// Puts `function` behind the unit, which gives it what the guest's tables say before its first DMA, and makes it a
    /// function of the guest.
    fn assign(
        &self,
        requester: Requester,
        function: Arc<dyn Function>,
        bridge: &Bridge,
    ) -> Result<Arc<VfioPci>, Error> {
        let name = function.name();
        match function.device() {
            Some(device) => bridge.register_device(requester, function.group(), device),
            None => bridge.register(requester, function.group()),
        }
        .map_err(assign::Error::from)?;
        if let Some(unit) = self.unit {
            if function.is_emulated() {
                let (endpoint, interrupts) = (unit.endpoint(requester), self.interrupts.clone());
                function.tell(Arc::new(UserRequests { endpoint, interrupts }));
            }
            let attach = |source| assign::Error::Attach { name: name.clone(), source };
            unit.add_requester(requester).map_err(attach)?;
        }
        let intx = VfioPci::pin_of(&*function).map(|pin| self.line(requester, pin));
        let gsi = intx.as_ref().map(|(_, gsi)| *gsi);
        let vfio = VfioPci::new(VfioPciWiring {
            requester,
            host: function,
            decoder: self.platform.root.decoder(),
            port_decoder: self.platform.root.port_decoder(),
            slots: Arc::new(FunctionSlots { slots: self.slots.clone(), of: requester }),
            interrupts: self.interrupts.clone(),
            intx,
        })
        .map_err(|source| assign::Error::Function { name: name.clone(), source })?;
        if let Some(gsi) = gsi {
            let listener: Weak<dyn EoiListener> = Arc::<VfioPci>::downgrade(&vfio);
            self.platform.ioapic.add_eoi_listener(gsi, listener);
        }
        Ok(vfio)
    }
}
