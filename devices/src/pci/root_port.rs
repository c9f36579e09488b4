//! A PCI Express root port with one slot, in which a card of one function comes and goes while the machine runs (F-6).
//!
//! What is in the slot keeps one name, whatever bus number the guest gives the bus below: the port says which source id
//! its requests carry (A-16), and which addresses reach it ([`Decoder::forward`]). A card is reached while it has power
//! and the link is active, and neither while the bus below is held in reset nor while the port sleeps. The card may be
//! a bridge, with functions of its own below it.
//!
//! ```text
//!  comes   presence and button ► the guest turns the power on: link active, the card answers
//!  goes    button ► the guest turns the power off: BARs off the bus, the card is reset ► it is taken out, presence
//!  at once presence and link: the card is gone
//! ```
//!
//! # Locks
//! `state` is held while the card is reset, while BARs come and go, and while the unit is told of a new id, which wait
//! for the queue of the unit: nothing that a drain calls may take it. `card` comes after it; an access of the card's
//! configuration space holds it shared, so that who takes the card away waits for it.

// By their places: the models (`tests/models`) compile this file, too.
#[path = "root_port/saving.rs"]
mod saving;
#[path = "root_port/slot.rs"]
mod slot;

use std::sync::Arc;

use vtd::{Msi, Requester, SourceId};

use self::slot::{BUTTON, LINK_CHANGED, PRESENCE, SlotRegisters};
use crate::host::{Interrupts, SlotPower, SourceIds};
use crate::pci::bridge::power::Power;
use crate::pci::bridge::{Bridge, Path, header};
use crate::pci::config::{CAP_MSI, COMMAND_MASTER};
use crate::pci::{ConfigSpace, Decoder, Identity, PciFunction};
use crate::saved::Saves;
use crate::sync::{Mutex, MutexGuard, RwLock};

/// Where extended capabilities begin.
const EXTENDED: u16 = 0x100;
/// Access Control Services, version 1, the last one.
const ACS: u32 = 0x0d | 1 << 16;
/// Source validation, translation blocking, redirection of peer requests and completions, upstream forwarding: a card
/// has the one id that the port gives it, and all that it asks for goes by the remapping unit, whatever software
/// enables.
const ACS_CAPABILITIES: u16 = 0x1f;

/// The slot has a card, or is about to have one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("root port {0} has a device in it")]
pub struct Occupied(pub u8);

/// What a root port is wired to.
pub struct RootPortWiring {
    /// The function of the port itself, on bus 0.
    pub requester: Requester,
    /// The number of port and slot, 1 to 31.
    pub number: u8,
    /// The number of the bus below in the card's name.
    pub bus: u8,
    /// Knows where BARs are.
    pub decoder: Arc<Decoder>,
    /// Knows where I/O BARs are.
    pub port_decoder: Arc<Decoder>,
    /// Takes the port's message.
    pub interrupts: Arc<dyn Interrupts>,
    /// Hears which id the card has; none without a remapping unit.
    pub ids: Option<Arc<dyn SourceIds>>,
    /// Hears that the guest took a card's power.
    pub power: Option<Arc<dyn SlotPower>>,
}

/// The port.
pub struct RootPort {
    wiring: RootPortWiring,
    state: Mutex<State>,
    card: RwLock<Card>,
}

#[derive(Default)]
struct Card {
    function: Option<Arc<dyn PciFunction>>,
    /// Configuration requests reach it.
    answers: bool,
}

struct State {
    config: ConfigSpace,
    /// Offset of the MSI capability.
    msi: u16,
    slot: SlotRegisters,
    power: Power,
    /// A card is there, or is being made.
    reserved: bool,
    /// What the registers said when it was made true.
    linked: bool,
    /// The link is active and the bus below is not held in reset.
    is_up: bool,
    id: Option<SourceId>,
    /// What the card was told, once there is one.
    path: Option<Path>,
    interrupts: bool,
}

/// The state of a slot, for who looks after the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotState {
    /// There is a card.
    pub present: bool,
    /// The guest lets it have power.
    pub powered: bool,
    /// The card's address in the guest; `None` while no bus number leads to it.
    pub id: Option<SourceId>,
}

impl RootPort {
    /// A port with an empty slot.
    pub fn new(wiring: RootPortWiring) -> Arc<Self> {
        let id = Identity { vendor: 0x1b36, device: 0x000c, revision: 0, class: 0x06_04_00, subsystem: (0, 0) };
        let mut config = header::new(&id);
        // One vector, 64-bit addresses.
        let mut writable = [0xff; 12];
        writable[..3].copy_from_slice(&[0x01, 0x00, 0xfc]);
        let mut body = [0; 12];
        body[0] = 0x80;
        let msi = config.add_capability(CAP_MSI, &body, &writable);
        let slot = SlotRegisters::add(&mut config, wiring.number);
        let power = Power::add(&mut config);
        config.put(EXTENDED, &ACS.to_le_bytes());
        config.put(EXTENDED + 4, &ACS_CAPABILITIES.to_le_bytes());
        config.allow(EXTENDED + 6, &ACS_CAPABILITIES.to_le_bytes());
        let name = Requester { sid: SourceId::new(wiring.bus, 0, 0), ..wiring.requester };
        wiring.decoder.forward(name, &[]);
        wiring.port_decoder.forward(name, &[]);
        let state = State {
            config,
            msi,
            slot,
            power,
            reserved: false,
            linked: false,
            is_up: false,
            id: None,
            path: None,
            interrupts: false,
        };
        Arc::new(Self { wiring, state: Mutex::new(state), card: RwLock::default() })
    }

    /// The port's own function.
    pub fn requester(&self) -> Requester {
        self.wiring.requester
    }

    /// The number of port and slot.
    pub fn number(&self) -> u8 {
        self.wiring.number
    }

    /// The name of what is in the slot, which is also its id in a guest that numbers buses as names do.
    pub fn name_below(&self) -> Requester {
        Requester { sid: SourceId::new(self.wiring.bus, 0, 0), ..self.wiring.requester }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// What there is in the slot.
    pub fn slot_state(&self) -> SlotState {
        let State { config, slot, .. } = &*self.lock();
        SlotState { present: slot.is_present(config), powered: slot.has_power(config), id: header::id_below(config) }
    }

    /// Keeps the slot for a card that is about to be made. From now on the unit knows its id.
    pub fn reserve(&self) -> Result<Requester, Occupied> {
        let state = &mut *self.lock();
        if std::mem::replace(&mut state.reserved, true) {
            return Err(Occupied(self.wiring.number));
        }
        state.id = header::id_below(&state.config);
        self.tell_id(state.id);
        Ok(self.name_below())
    }

    /// The card that the slot was reserved for does not come.
    pub fn release(&self) {
        let state = &mut *self.lock();
        if !state.slot.is_present(&state.config) {
            self.vacate(state);
        }
    }

    fn vacate(&self, state: &mut State) {
        state.reserved = false;
        state.id = None;
        self.tell_id(None);
    }

    fn tell_id(&self, id: Option<SourceId>) {
        if let Some(ids) = &self.wiring.ids {
            ids.renumbered(self.name_below(), id);
        }
    }

    /// Puts a card into the slot that was reserved for it, before the guest runs: it has power.
    pub fn fill(&self, function: Arc<dyn PciFunction>) {
        self.card.write().unwrap().function = Some(function);
        let state = &mut *self.lock();
        state.path = None;
        state.slot.reset(&mut state.config, true);
        self.follow(state);
        state.slot.reset(&mut state.config, true);
    }

    /// Puts a card into the slot that was reserved for it, and tells the guest, which then gives it power.
    pub fn insert(&self, function: Arc<dyn PciFunction>) {
        self.card.write().unwrap().function = Some(function);
        self.change(|state| {
            state.path = None;
            state.slot.set_present(&mut state.config, true);
            // Who waits for the button does not look for cards (Linux), and the other way round.
            state.slot.happened(&mut state.config, PRESENCE | BUTTON);
        });
    }

    /// Presses the attention button: the guest is asked to let go of the card.
    pub fn press_button(&self) {
        self.change(|state| state.slot.happened(&mut state.config, BUTTON));
    }

    /// Takes the card out if the guest took its power. When this returns it reaches nothing and is reached by nobody.
    pub fn take_if_off(&self) -> Option<Arc<dyn PciFunction>> {
        self.take_if(|state| !state.slot.has_power(&state.config))
    }

    /// Takes the card out, whatever the guest does with it.
    pub fn take_by_surprise(&self) -> Option<Arc<dyn PciFunction>> {
        self.take_if(|_| true)
    }

    fn take_if(&self, may: impl FnOnce(&State) -> bool) -> Option<Arc<dyn PciFunction>> {
        let mut taken = None;
        self.change(|state| {
            if !state.slot.is_present(&state.config) || !may(state) {
                return;
            }
            state.slot.set_present(&mut state.config, false);
            state.slot.happened(&mut state.config, PRESENCE);
            self.follow(state);
            taken = self.card.write().unwrap().function.take();
            self.vacate(state);
        });
        taken
    }

    /// Changes the registers, makes true what they say then, and interrupts the guest if it is to hear of it.
    fn change(&self, change: impl FnOnce(&mut State)) {
        let message = {
            let state = &mut *self.lock();
            change(state);
            self.follow(state);
            state.message()
        };
        if let Some(message) = message {
            self.wiring.interrupts.signal(self.wiring.requester, message);
        }
    }

    /// Makes true what the registers say.
    fn follow(&self, state: &mut State) {
        let linked = state.slot.is_linked(&state.config);
        if linked != state.linked {
            state.linked = linked;
            state.slot.show_link(&mut state.config, linked);
            state.slot.happened(&mut state.config, LINK_CHANGED);
        }
        let is_up = linked && !header::holds_in_reset(&state.config);
        let is_on = state.power.is_on(&state.config);
        let goes = state.is_up && !is_up;
        state.is_up = is_up;
        if !is_up || !is_on {
            // From here on no configuration request is under way, and none gets through.
            let card = {
                let mut card = self.card.write().unwrap();
                card.answers = false;
                card.function.clone()
            };
            if let Some(function) = card.filter(|_| goes) {
                function.quiesce();
                function.reset();
            }
        }
        let id = header::id_below(&state.config).filter(|_| state.reserved);
        if id != state.id {
            state.id = id;
            self.tell_id(id);
        }
        self.follow_path(state, header::path(&state.config, is_on && is_up));
        if is_up && is_on {
            self.card.write().unwrap().answers = true;
        }
    }

    /// This gets through the port now.
    fn follow_path(&self, state: &mut State, path: Path) {
        if state.path.as_ref() == Some(&path) {
            return;
        }
        let name = self.name_below();
        self.wiring.decoder.forward(name, &path.memory);
        self.wiring.port_decoder.forward(name, &path.ports);
        if let Some(function) = self.function_below() {
            function.path_changed(&path);
        }
        state.path = Some(path);
    }

    /// The card's function, whatever state the slot is in.
    pub fn function_below(&self) -> Option<Arc<dyn PciFunction>> {
        self.card.read().unwrap().function.clone()
    }
}

impl State {
    /// The message to send, if the port has reason to interrupt that it did not have before. A message is a memory
    /// write, so it needs Bus Master.
    fn message(&mut self) -> Option<Msi> {
        let Self { config, slot, msi, power, interrupts, .. } = self;
        let may = config.command() & COMMAND_MASTER != 0 && power.is_on(config);
        let enabled = config.u16(*msi + 2) & 1 != 0 && may;
        let has_reason = enabled && slot.interrupts(config);
        let begins = has_reason && !*interrupts;
        *interrupts = has_reason;
        let address = u64::from(config.u32(*msi + 4)) | u64::from(config.u32(*msi + 8)) << 32;
        begins.then(|| Msi { address, data: config.u16(*msi + 12).into() })
    }
}

impl PciFunction for RootPort {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut had_power = false;
        let mut has_power = false;
        self.change(|state| {
            had_power = state.slot.has_power(&state.config);
            state.power.write(&mut state.config, offset, data);
            has_power = state.slot.has_power(&state.config);
        });
        if had_power
            && !has_power
            && let Some(power) = &self.wiring.power
        {
            power.powered_off();
        }
    }

    fn as_bridge(&self) -> Option<&dyn Bridge> {
        Some(self)
    }

    /// What is below is reset before.
    fn reset(&self) {
        let state = &mut *self.lock();
        let present = state.slot.is_present(&state.config);
        state.config.reset();
        state.slot.reset(&mut state.config, present);
        self.follow(state);
        // A link that went and came in it is no news afterwards.
        state.slot.reset(&mut state.config, present);
        state.interrupts = false;
    }

    fn saves(&self) -> Option<&dyn Saves> {
        Some(self)
    }
}

impl Bridge for RootPort {
    fn bus(&self) -> u8 {
        self.wiring.bus
    }

    fn buses(&self) -> (u8, u8) {
        header::buses(&self.lock().config)
    }

    fn with_below(&self, sid: SourceId, act: &mut dyn FnMut(&dyn PciFunction)) {
        let own = header::id_below(&self.lock().config);
        // Held meanwhile, so that who takes the card away waits.
        let card = self.card.read().unwrap();
        let Some(function) = card.function.as_deref().filter(|_| card.answers) else { return };
        if own == Some(sid) {
            act(function);
        } else if own.is_some_and(|own| own.bus() != sid.bus())
            && let Some(bridge) = function.as_bridge().filter(|bridge| bridge.leads_to(sid.bus()))
        {
            bridge.with_below(sid, act);
        }
    }

    fn below(&self) -> Vec<(SourceId, Arc<dyn PciFunction>)> {
        self.function_below().map(|function| (self.name_below().sid, function)).into_iter().collect()
    }
}
