//! Devices that come and go while the machine runs, behind root ports (F-6).
//!
//! A device that is to go is asked of the guest, by the attention button; it is taken away when the guest took its
//! power, at the next reset, or by surprise when the process that emulates it is gone. So does a function of the host
//! that the host wants back; by surprise, when it asks again. Whatever is refused changes nothing.

use std::sync::Arc;
use std::time::Duration;

use devices::pci::{PciFunction, RootPort};
use devices::vfio_pci::VfioPci;
use vfio_bridge::Function;
use vtd::Requester;

use super::Machine;
use super::plug::{Placed, Seat};
use crate::assign::{self, Checked};
use crate::config::{DeviceKind, DeviceOption, UserSocket, VirtioKind};

/// How long a guest has until it is asked again, or a device that it did not turn on is taken from it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether such a device can come and go.
fn can_move(kind: &DeviceKind) -> bool {
    match kind {
        DeviceKind::Edu { .. } | DeviceKind::Vfio { .. } | DeviceKind::VfioUser { .. } => true,
        // What is typed is led to the console that there was at the start.
        DeviceKind::Virtio(kind) => *kind != VirtioKind::Console,
        DeviceKind::PciBridge | DeviceKind::PinBlk { .. } => false,
    }
}

impl Machine {
    /// Puts a device behind a root port, and tells the guest. Its id, and the port's number.
    ///
    /// # Errors
    /// A sentence that says why nothing changed, and what helps.
    pub fn add(&mut self, option: &DeviceOption) -> Result<(String, u8), String> {
        let kind = option.kind.name();
        if !can_move(&option.kind) {
            return Err(format!("a {kind} cannot be added to a machine that runs; give it at the start"));
        }
        if let Some(bus) = &option.bus {
            return Err(format!("bus={bus}: a conventional bus has no hot-plug; use port=N, or neither"));
        }
        if let Some(addr) = option.addr {
            return Err(format!("addr={addr}: devices are added behind root ports only; use port=N, or neither"));
        }
        if let DeviceKind::VfioUser { socket: UserSocket::Fd(_), .. } = option.kind {
            return Err("fd=N is for the start; use socket=PATH".to_owned());
        }
        let id = self.new_id(option)?;
        if let Some(same) = option.kind.outside().filter(|outside| self.has(outside)) {
            return Err(format!("{same} is a device of this machine already"));
        }
        let port = self.ports.choose(option.port)?;
        let checked = self.check(option).map_err(|e| e.to_string())?;
        let requester = port.reserve().map_err(|e| e.to_string())?;
        let seat = Seat::behind_port(requester, port.number());
        if let Err(e) = self.insert(option, &id, seat, &port, checked.as_ref()) {
            port.release();
            return Err(e.to_string());
        }
        Ok((id, port.number()))
    }

    /// Makes the device and puts it into the slot that is reserved for it. On an error nothing of it is left.
    fn insert(
        &mut self,
        option: &DeviceOption,
        id: &str,
        seat: Seat,
        port: &Arc<RootPort>,
        checked: Option<&Checked>,
    ) -> Result<(), super::Error> {
        let open = checked.map(|checked| self.plug.opener.open(checked)).transpose()?;
        let made = self.fits(open.as_deref()).and_then(|()| self.plug.device(option, id, seat.clone(), open.clone()));
        let (placed, function) = match made {
            Ok(made) => made,
            Err(e) => {
                let bdf = open.as_ref().and_then(|open| open.bdf());
                self.forget_in_unit(id, seat.requester);
                drop(open);
                self.plug.opener.close(bdf);
                return Err(e);
            }
        };
        // What it was told before is not this guest's.
        function.quiesce();
        function.reset();
        if let Some(process) = &placed.process
            && let Ok(event) = self.ports.event().try_clone()
        {
            process.wake_when_gone(event);
        }
        if placed.host.is_some() || placed.process.is_some() {
            log::info!("{id}: until the guest puts it into a domain, it is where the guest's tables say by default");
            assign::report_functions(open.as_slice());
        }
        self.placed.push(placed);
        self.ports.came(port.number());
        port.insert(function);
        if let Err(e) = self.share_vectors_out() {
            log::warn!("{id}: the limit on open files is not known: {e}");
        }
        Ok(())
    }

    /// Whether the unit, which is as it is, offers nothing that the host of this function cannot follow.
    fn fits(&self, function: Option<&dyn Function>) -> Result<(), super::Error> {
        let (Some(function), Some(units)) = (function, &self.units) else { return Ok(()) };
        let Some(limits) = self.plug.opener.limits_of(function.group()) else { return Ok(()) };
        let limits = [(function.group(), limits)];
        assign::unit_width(Some(units.rest().config().aw_bits), &limits)?;
        assign::check_ram(&limits, self.ram_size)?;
        Ok(())
    }

    fn check(&self, option: &DeviceOption) -> Result<Option<Checked>, assign::Error> {
        let unit = self.plug.opener.unit_option();
        assign::check(std::slice::from_ref(option), unit, self.ram_size).map(|mut checked| checked.pop())
    }

    fn has(&self, outside: &str) -> bool {
        self.placed.iter().any(|placed| placed.kind.outside().as_deref() == Some(outside))
    }

    fn new_id(&self, option: &DeviceOption) -> Result<String, String> {
        let taken = |id: &str| self.placed.iter().any(|placed| placed.id == id);
        match &option.id {
            Some(id) if taken(id) => Err(format!("another device has id={id}")),
            Some(id) => Ok(id.clone()),
            None => {
                let mut free = (0..=self.placed.len()).map(|n| format!("{}{n}", option.kind.name()));
                free.find(|id| !taken(id)).ok_or_else(|| "the device has no free id".to_owned())
            }
        }
    }

    /// Asks the guest to let go of the device with this id. The number of its port.
    ///
    /// # Errors
    /// A sentence that says why nothing changed, and what helps.
    pub fn remove(&mut self, id: &str) -> Result<u8, String> {
        let placed = self.placed.iter().find(|placed| placed.id == id);
        let placed = placed.ok_or_else(|| format!("there is no device {id}"))?;
        let port = placed.port.and_then(|number| self.ports.get(number)).cloned();
        let bus = if placed.bridge.is_some() { "a conventional bus" } else { "bus 0" };
        let port = port.ok_or_else(|| format!("{id} is on {bus}, and stays; only what is behind a root port goes"))?;
        if !can_move(&placed.kind) {
            return Err(format!("{id} stays for the whole run: it is a device that cannot be removed"));
        }
        if self.bridge.sharing(placed.requester) > 1 {
            return Err(format!("{id} stays: another device of this machine is in its host group"));
        }
        let number = port.number();
        let powered = port.slot_state().powered;
        if let Some(since) = self.ports.asked(number).map(|asked| asked.elapsed()).filter(|since| *since < PATIENCE) {
            let (since, all) = (since.as_secs(), PATIENCE.as_secs());
            return Err(format!(
                "{id} is being removed: the guest was asked {since} s ago; it can be asked again after {all} s"
            ));
        }
        if !powered && self.ports.since_it_came(number).is_some_and(|since| since < PATIENCE) {
            return Err(format!("{id} is being added: the guest did not turn its power on yet; try again"));
        }
        self.ports.ask(number);
        if powered {
            port.press_button();
        }
        self.take_what_left();
        Ok(number)
    }

    /// Takes away what the guest let go of, and whose process is gone.
    pub fn take_what_left(&mut self) {
        // It only wakes.
        let _ = self.ports.event().read();
        self.take(|machine, placed, port| {
            let gone = placed.process.as_ref().is_some_and(|process| process.is_gone());
            if gone {
                log::warn!("{}: its process is gone, and with it the device", placed.id);
                return port.take_by_surprise();
            }
            machine.ports.asked(port.number()).and_then(|_| port.take_if_off())
        });
    }

    /// Lets go of the functions that the host wants back (VFIO's request interrupt, which it repeats every ten seconds
    /// until it has them). The guest is asked for what is behind a root port, and when the host asks again, that is
    /// taken from it.
    ///
    /// # Errors
    /// One of them stays as long as the machine does: a sentence that says so.
    pub fn give_back(&mut self) -> Result<(), String> {
        let is_wanted = |function: &VfioPci| function.request_event().is_some_and(|event| event.read().is_ok());
        let assigned = self.plug.assigned.iter();
        let wanted: Vec<_> = assigned.filter(|(_, function)| is_wanted(function)).map(|(id, _)| id.clone()).collect();
        wanted.iter().try_for_each(|id| self.give_one_back(id))
    }

    fn give_one_back(&mut self, id: &str) -> Result<(), String> {
        let placed = self.placed.iter().find(|placed| placed.id == id);
        let goes = placed.filter(|placed| self.bridge.sharing(placed.requester) <= 1).and_then(|placed| placed.port);
        let Some(number) = goes else {
            return Err(format!("{id}: the host wants the device back, so the guest ends"));
        };
        if self.ports.is_wanted_again(number) {
            log::warn!("{id}: the host wants the device back, and the guest did not let go of it: it is taken away");
            self.take(|_, placed, port| if placed.id == id { port.take_by_surprise() } else { None });
            return Ok(());
        }
        match self.remove(id) {
            Ok(_) => log::warn!("{id}: the host wants the device back: the guest is asked for it"),
            Err(why) => log::warn!("{id}: the host wants the device back: {why}"),
        }
        Ok(())
    }

    /// Takes away what the guest was asked for, while no vCPU runs: its guest will not answer any more.
    pub(super) fn take_what_was_asked_for(&mut self) {
        self.take(|machine, _, port| machine.ports.asked(port.number()).and_then(|_| port.take_by_surprise()));
    }

    fn take(&mut self, take: impl Fn(&Self, &Placed, &RootPort) -> Option<Arc<dyn PciFunction>>) {
        let mut index = 0;
        while index < self.placed.len() {
            let placed = &self.placed[index];
            let port = placed.port.and_then(|number| self.ports.get(number)).cloned();
            match port.as_ref().and_then(|port| take(self, placed, port)) {
                None => index += 1,
                Some(function) => {
                    let placed = self.placed.remove(index);
                    self.forget(placed, function);
                }
            }
        }
    }

    /// A device is gone from the guest: nothing that it could reach stays mapped, and the host has its own back.
    fn forget(&mut self, placed: Placed, function: Arc<dyn PciFunction>) {
        let Placed { id, requester, port, host, process, pins, .. } = placed;
        self.ports.went(port);
        self.forget_in_unit(&id, requester);
        drop((function, process, pins));
        self.plug.opener.close(host.map(|(bdf, _)| bdf));
        log::info!("{id}: it is gone");
    }

    /// Nothing here knows the device any more. It is quiet, or was never used.
    fn forget_in_unit(&mut self, id: &str, requester: Requester) {
        self.plug.breaker.remove(requester);
        self.plug.assigned.retain(|(other, _)| other != id);
        if let Some(units) = &self.units {
            units.of(requester).into_iter().for_each(|unit| unit.remove_requester(requester));
        }
        self.bridge.unregister(requester);
    }

    /// Readable when [`Machine::take_what_left`] has something to do.
    pub fn plug_event(&self) -> &vmm_sys_util::eventfd::EventFd {
        self.ports.event()
    }
}
