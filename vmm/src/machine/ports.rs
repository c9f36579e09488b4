//! The root ports of a machine, and what is known of their slots.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::host::SlotPower;
use devices::pci::{PciRoot, RootPort, RootPortWiring};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::SourceId;

use super::plug::Placed;
use super::source_ids::ids_of;
use super::units::Units;
use super::{Error, stats};
use crate::config::{shown, slot_of_port};
use crate::kvm::irq::KvmInterrupts;

/// Wakes the main thread.
struct Wake(EventFd);

impl SlotPower for Wake {
    fn powered_off(&self) {
        // It can only fail where it is readable already.
        let _ = self.0.write(1);
    }
}

/// The ports, by number from 1 on.
pub(super) struct Ports {
    ports: Vec<Arc<RootPort>>,
    /// Signalled when a slot lost its power, or a process is gone.
    event: EventFd,
    /// When the guest was asked for what is in a slot.
    asked: BTreeMap<u8, Instant>,
    /// When what is in a slot came, if it was not there from the start.
    came: BTreeMap<u8, Instant>,
    /// The slots with a function that the host wants back.
    wanted: BTreeSet<u8>,
}

impl Ports {
    /// Makes a port for each of `buses`, the numbers in the names of what is behind them.
    pub fn new(
        root: &PciRoot,
        buses: &[u8],
        interrupts: &Arc<KvmInterrupts>,
        units: Option<&Units>,
    ) -> Result<Self, Error> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::PortEvent)?;
        let power = Arc::new(Wake(event.try_clone().map_err(Error::PortEvent)?));
        let port = |(number, bus): (u8, &u8)| {
            let port = RootPort::new(RootPortWiring {
                requester: root.requester(SourceId::new(0, slot_of_port(number).device, 0)),
                number,
                bus: *bus,
                decoder: root.decoder(),
                port_decoder: root.port_decoder(),
                interrupts: interrupts.clone(),
                ids: units.map(|units| ids_of(units.of_bus(*bus))),
                power: Some(power.clone()),
            });
            let taken = |source| Error::Slot { id: format!("root port {number}"), source };
            root.insert_port(&port).map_err(taken)?;
            Ok(port)
        };
        let ports = (1..).zip(buses).map(port).collect::<Result<_, Error>>()?;
        Ok(Self { ports, event, asked: BTreeMap::new(), came: BTreeMap::new(), wanted: BTreeSet::new() })
    }

    /// The port of this number.
    pub fn get(&self, number: u8) -> Option<&Arc<RootPort>> {
        self.ports.get(usize::from(number).checked_sub(1)?)
    }

    /// The port of this number, or the first that is empty. A sentence says what helps where there is none.
    pub fn choose(&self, wanted: Option<u8>) -> Result<Arc<RootPort>, String> {
        let count = self.ports.len();
        match wanted {
            _ if count == 0 => Err("this machine has no root ports; start it with --root-ports N".to_owned()),
            Some(number) => {
                let port = self.get(number).cloned();
                port.ok_or_else(|| format!("port={number}: this machine has root ports 1 to {count}"))
            }
            None => {
                let empty = self.ports.iter().find(|port| !port.slot_state().present).cloned();
                empty.ok_or_else(|| format!("all {count} root ports have a device in them; remove one first"))
            }
        }
    }

    /// Signalled when a slot lost its power, or a process is gone.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// When the guest was asked for what is in the slot.
    pub fn asked(&self, number: u8) -> Option<Instant> {
        self.asked.get(&number).copied()
    }

    /// The guest is asked for what is in the slot.
    pub fn ask(&mut self, number: u8) {
        self.asked.insert(number, Instant::now());
    }

    /// The host wants what is in the slot back. Whether it did so before.
    pub fn is_wanted_again(&mut self, number: u8) -> bool {
        !self.wanted.insert(number)
    }

    /// A device comes into the slot.
    pub fn came(&mut self, number: u8) {
        self.came.insert(number, Instant::now());
    }

    /// How long ago that was.
    pub fn since_it_came(&self, number: u8) -> Option<Duration> {
        self.came.get(&number).map(Instant::elapsed)
    }

    /// The slot is empty.
    pub fn went(&mut self, number: Option<u8>) {
        if let Some(number) = number {
            self.asked.remove(&number);
            self.came.remove(&number);
            self.wanted.remove(&number);
        }
    }

    /// The address of a device in the guest.
    pub fn address(&self, placed: &Placed) -> String {
        if let Some(bridge) = &placed.bridge {
            let devfn = u16::from(placed.requester.sid.devfn());
            return bridge.id().map_or_else(|| "none".to_owned(), |id| SourceId(id.0 | devfn).to_string());
        }
        let Some(port) = placed.port.and_then(|number| self.get(number)) else {
            return shown(placed.requester);
        };
        port.slot_state().id.map_or_else(|| "none".to_owned(), |id| id.to_string())
    }

    /// What is in them.
    pub fn stats(&self, placed: &[Placed]) -> Vec<stats::Port> {
        let of = |port: &Arc<RootPort>| {
            let number = port.number();
            let device = placed.iter().find(|placed| placed.port == Some(number));
            stats::Port {
                port: number,
                addr: port.requester().sid.to_string(),
                device: device.map(|device| device.id.clone()),
                powered: port.slot_state().powered,
                removing: self.asked(number).is_some(),
            }
        };
        self.ports.iter().map(of).collect()
    }
}
