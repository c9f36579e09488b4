//! The I/O interrupt controller (82093AA with the EOI register of version 0x20) for KVM's split irqchip: local APICs
//! are in the kernel, this is not. A pin that fires becomes a message; the end of a level-triggered interrupt comes
//! back as a vector, from KVM or through the EOI register.
//!
//! Messages are sent, routes said and listeners called without the pins' lock.

use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vtd::{Msi, Requester};

use crate::BusDevice;
use crate::host::{Interrupts, IoapicRoutes, IrqLine};
use crate::saved::{Saves, Unfit, decode, encode, fits};

/// Pins of the IOAPIC.
pub const PINS: u8 = 24;

const REGISTER_SELECT: u64 = 0x00;
const REGISTER_WINDOW: u64 = 0x10;
const REGISTER_EOI: u64 = 0x40;
const VERSION: u32 = 0x20;
/// What of the id register can be written.
const ID: u32 = 0x0f00_0000;

const ENTRY_MASKED: u64 = 1 << 16;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
/// Delivery status (bit 12) and remote IRR are the IOAPIC's own; bits 47:17 are reserved (bits 54:48 carry the extended
/// destination or, in the remappable format, the index).
const ENTRY_WRITABLE: u64 = 0xffff_0000_0001_afff;

/// Hears that the guest is done with a level-triggered interrupt of a pin.
pub trait EoiListener: Send + Sync {
    /// The interrupt ended. If the source still wants service it keeps, or raises, its line, and the pin fires again.
    fn end_of_interrupt(&self);
}

/// The IOAPIC.
pub struct IoApic {
    requester: Requester,
    interrupts: Arc<dyn Interrupts>,
    routes: Option<Arc<dyn IoapicRoutes>>,
    state: Mutex<State>,
    listeners: Mutex<Vec<(u8, Weak<dyn EoiListener>)>>,
    // Routes are said outside `state`, but in the order of the changes.
    said: Mutex<[Option<(Msi, bool)>; PINS as usize]>,
}

#[derive(Default)]
struct State {
    id: u32,
    select: u8,
    pins: [Pin; PINS as usize],
}

#[derive(Clone, Copy)]
struct Pin {
    entry: u64,
    /// How many users hold the line high.
    high: u32,
}

impl Default for Pin {
    fn default() -> Self {
        Self { entry: ENTRY_MASKED, high: 0 }
    }
}

impl Pin {
    fn is_level(&self) -> bool {
        self.entry & ENTRY_LEVEL != 0
    }
    fn is_masked(&self) -> bool {
        self.entry & ENTRY_MASKED != 0
    }
    fn vector(&self) -> u8 {
        self.entry as u8
    }

    /// The message of the entry. One expression serves both formats (VT-d specification, section 5.1.5.1): bits 63:48
    /// go to address bits 19:4, bit 11 (destination mode, or bit 15 of the index) to address bit 2.
    fn message(&self) -> Msi {
        let address = 0xfee0_0000 | (self.entry >> 48) << 4 | (self.entry >> 11 & 1) << 2;
        // Level messages carry level and assert, which KVM reads from the data.
        let level = if self.is_level() { 0xc000 } else { 0 };
        Msi { address, data: (self.entry & 0x7ff) as u32 | level }
    }

    /// What this pin sends now, if its line is high, level-triggered, unmasked and not in service.
    fn level_message(&mut self) -> Option<Msi> {
        let fires = self.high > 0 && self.is_level() && self.entry & (ENTRY_MASKED | ENTRY_REMOTE_IRR) == 0;
        fires.then(|| {
            self.entry |= ENTRY_REMOTE_IRR;
            self.message()
        })
    }
}

impl IoApic {
    /// An IOAPIC with all pins masked, whose messages come from `requester` (what the DMAR table's IOAPIC scope names).
    pub fn new(
        requester: Requester,
        interrupts: Arc<dyn Interrupts>,
        routes: Option<Arc<dyn IoapicRoutes>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            requester,
            interrupts,
            routes,
            state: Mutex::default(),
            listeners: Mutex::default(),
            said: Mutex::default(),
        })
    }

    /// A line into pin `pin` for one user; levels of several lines of one pin are OR-ed.
    ///
    /// # Panics
    /// When there is no such pin: a mistake of the machine's wiring.
    pub fn line(self: &Arc<Self>, pin: u8) -> Arc<dyn IrqLine> {
        assert!(pin < PINS);
        Arc::new(Line { ioapic: self.clone(), pin, high: Mutex::new(false) })
    }

    /// `listener` is called whenever a level-triggered interrupt of `pin` ends.
    pub fn add_eoi_listener(&self, pin: u8, listener: Weak<dyn EoiListener>) {
        let mut listeners = self.listeners.lock().unwrap();
        // Of functions that were unplugged.
        listeners.retain(|(_, listener)| listener.strong_count() > 0);
        listeners.push((pin, listener));
    }

    /// The guest ended an interrupt with `vector` (KVM_EXIT_IOAPIC_EOI, or the EOI register).
    pub fn eoi(&self, vector: u8) {
        let mut ended = [false; PINS as usize];
        for (pin, ended) in self.state.lock().unwrap().pins.iter_mut().zip(&mut ended) {
            *ended = pin.is_level() && pin.vector() == vector && pin.entry & ENTRY_REMOTE_IRR != 0;
            if *ended {
                pin.entry &= !ENTRY_REMOTE_IRR;
            }
        }
        // Sources lower their lines first, else each interrupt would be delivered twice.
        let listeners: Vec<_> = {
            let mut listeners = self.listeners.lock().unwrap();
            listeners.retain(|(_, listener)| listener.strong_count() > 0);
            listeners.iter().filter(|(pin, _)| ended[usize::from(*pin)]).map(|(_, l)| l.clone()).collect()
        };
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            listener.end_of_interrupt();
        }
        for pin in (0..PINS).filter(|pin| ended[usize::from(*pin)]) {
            self.service(pin);
        }
    }

    /// Back to power-on: all masked. Lines keep their level.
    pub fn reset(&self) {
        {
            let State { id, select, pins } = &mut *self.state.lock().unwrap();
            *id = 0;
            *select = 0;
            for pin in pins {
                pin.entry = ENTRY_MASKED;
            }
        }
        self.say_routes();
    }

    /// A pin that is masked has a route, too, if it ever had one: an interrupt may be in service, whose end must come
    /// out.
    fn say_masked_routes(&self) {
        let Some(routes) = &self.routes else { return };
        let pins = self.state.lock().unwrap().pins;
        for (index, pin) in (0..).zip(pins).filter(|(_, pin)| pin.is_masked() && pin.entry != ENTRY_MASKED) {
            routes.set_pin(index, Some((pin.message(), pin.is_level())));
            routes.set_pin(index, None);
        }
    }

    /// Sends what pin `pin` has to send while its line is high.
    fn service(&self, pin: u8) {
        let message = self.state.lock().unwrap().pins[usize::from(pin)].level_message();
        self.send(message);
    }

    fn send(&self, message: Option<Msi>) {
        if let Some(message) = message {
            self.interrupts.signal(self.requester, message);
        }
    }

    fn set_line(&self, pin: u8, line: &Mutex<bool>, high: bool) {
        let message = {
            let mut line = line.lock().unwrap();
            if *line == high {
                return;
            }
            *line = high;
            let pin = &mut self.state.lock().unwrap().pins[usize::from(pin)];
            if high {
                pin.high += 1;
            } else {
                pin.high -= 1;
            }
            // An edge on a masked pin is lost, as on hardware.
            let edge = high && pin.high == 1 && !pin.is_level() && !pin.is_masked();
            if edge { Some(pin.message()) } else { pin.level_message() }
        };
        self.send(message);
    }

    /// Tells how the pins are routed, where that changed. Reads the pins under the lock that orders what is said, so
    /// that the last thing said is always the newest.
    fn say_routes(&self) {
        let Some(routes) = &self.routes else { return };
        let mut said = self.said.lock().unwrap();
        let pins = self.state.lock().unwrap().pins;
        for (index, (pin, said)) in pins.iter().zip(said.iter_mut()).enumerate() {
            let now = (!pin.is_masked()).then(|| (pin.message(), pin.is_level()));
            if now != *said {
                *said = now;
                routes.set_pin(index as u8, now);
            }
        }
    }

    fn read_window(&self) -> u32 {
        let state = self.state.lock().unwrap();
        match state.select {
            0x00 | 0x02 => state.id,
            0x01 => VERSION | u32::from(PINS - 1) << 16,
            select => match Self::entry_of(select) {
                Some((pin, upper)) => (state.pins[pin].entry >> if upper { 32 } else { 0 }) as u32,
                None => 0,
            },
        }
    }

    fn write_window(&self, value: u32) {
        let pin = {
            let mut state = self.state.lock().unwrap();
            if state.select == 0x00 {
                state.id = value & ID;
                return;
            }
            let Some((index, upper)) = Self::entry_of(state.select) else { return };
            let pin = &mut state.pins[index];
            let writable = if upper { ENTRY_WRITABLE & !0xffff_ffff } else { ENTRY_WRITABLE & 0xffff_ffff };
            let value = if upper { u64::from(value) << 32 } else { u64::from(value) };
            pin.entry = pin.entry & !writable | value & writable;
            // An edge-triggered entry has no remote IRR: guests clear a stuck one by switching to edge and back.
            if !pin.is_level() {
                pin.entry &= !ENTRY_REMOTE_IRR;
            }
            index as u8
        };
        // The route first: KVM must know that this interrupt's end leaves the guest before it can be delivered.
        self.say_routes();
        self.service(pin);
    }

    /// Which pin and half register `select` is.
    fn entry_of(select: u8) -> Option<(usize, bool)> {
        let index = select.checked_sub(0x10)?;
        (index < 2 * PINS).then(|| (usize::from(index / 2), index % 2 == 1))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    id: u32,
    select: u8,
    entries: [u64; PINS as usize],
}

/// Lines have their levels from the devices, which are put back before: nothing of it is an edge here.
impl Saves for IoApic {
    fn save(&self) -> Value {
        let State { id, select, pins } = &*self.state.lock().unwrap();
        encode(1, &Saved { id: *id, select: *select, entries: pins.map(|pin| pin.entry) })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { id, select, entries } = decode(1, state)?;
        fits("id", id & !ID == 0)?;
        // Remote IRR is of level-triggered entries only.
        let possible = |entry: &u64| {
            let level = if entry & ENTRY_LEVEL != 0 { ENTRY_REMOTE_IRR } else { 0 };
            entry & !(ENTRY_WRITABLE | level) == 0
        };
        fits("redirection table", entries.iter().all(possible))?;
        {
            let state = &mut *self.state.lock().unwrap();
            (state.id, state.select) = (id, select);
            state.pins.iter_mut().zip(entries).for_each(|(pin, entry)| pin.entry = entry);
        }
        self.say_masked_routes();
        self.say_routes();
        Ok(())
    }

    /// Sends what a level-triggered line asks for and was not sent.
    fn go_on(&self) {
        (0..PINS).for_each(|pin| self.service(pin));
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            REGISTER_SELECT => u32::from(self.state.lock().unwrap().select),
            REGISTER_WINDOW => self.read_window(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (REGISTER_SELECT, [select, ..]) => self.state.lock().unwrap().select = *select,
            (REGISTER_WINDOW, &[a, b, c, d, ..]) => self.write_window(u32::from_le_bytes([a, b, c, d])),
            (REGISTER_EOI, [vector, ..]) => self.eoi(*vector),
            _ => {}
        }
    }
}

struct Line {
    ioapic: Arc<IoApic>,
    pin: u8,
    high: Mutex<bool>,
}

impl IrqLine for Line {
    fn set_level(&self, high: bool) {
        self.ioapic.set_line(self.pin, &self.high, high);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.set_level(false);
    }
}

#[cfg(test)]
#[path = "ioapic_test.rs"]
mod ioapic_test;
