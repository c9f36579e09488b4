//! Message-signalled vectors of the assigned function: an eventfd each, which VFIO signals and which becomes an MSI in
//! the guest, or stays counted while the vector is masked.
//!
//! ```text
//!  not taken  the guest never unmasked it since it enabled the kind: no eventfd, no route, no interrupt of the host.
//!             The host has it masked, so what the device wants to send is in its own pending bits, and comes when it
//!             is taken
//!  taken      from the first unmasking until the kind is disabled; masked, its signals are counted
//! ```
//!
//! Drivers use a few of the vectors that a function has, so one that cannot be taken costs that vector and no other
//! (F-5). What a host allocates once for all (`VFIO_IRQ_INFO_NORESIZE`) is allocated when the kind is enabled, without
//! an eventfd: nothing is ever added by disabling what works.

use std::io;
use std::mem;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vfio_bridge::{Function, IrqKind, RegionKind};
use vmm_sys_util::eventfd::EventFd;
use vtd::{Msi, Requester};

use crate::host::{Interrupts, IrqRoute};
use crate::told::Told;

/// The vectors of one kind (MSI or MSI-X).
pub struct Vectors {
    kind: IrqKind,
    requester: Requester,
    host: Arc<dyn Function>,
    interrupts: Arc<dyn Interrupts>,
    vectors: Vec<Vector>,
    enabled: bool,
    /// While the function is held: what its vectors deliver when it goes on.
    held: Option<Vec<Option<Msi>>>,
    told: Told,
}

/// What is saved of a vector besides the message, which its function has in registers.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(deny_unknown_fields)]
pub struct SavedVector {
    taken: bool,
    pending: bool,
}

#[derive(Default)]
struct Vector {
    /// What the guest wants it to deliver; `None`: masked.
    now: Option<Msi>,
    taken: Option<Arc<dyn IrqRoute>>,
    /// A signal came while it was taken and masked.
    pending: bool,
}

impl Vector {
    /// Whether a signal was counted since it was masked.
    fn look_for_signal(&mut self) -> bool {
        self.pending |= self.taken.as_ref().is_some_and(|route| route.take_pending());
        self.pending
    }
}

impl Vectors {
    /// No vector yet.
    pub fn new(kind: IrqKind, requester: Requester, host: Arc<dyn Function>, interrupts: Arc<dyn Interrupts>) -> Self {
        Self {
            kind,
            requester,
            host,
            interrupts,
            vectors: Vec::new(),
            enabled: false,
            held: None,
            told: Told::default(),
        }
    }

    /// Nothing is delivered until [`Vectors::go_on`]; what was signalled before is delivered when this returns. What
    /// could not be, because the unit blocks it, is pending.
    pub fn hold(&mut self) {
        if self.held.is_none() {
            self.held = Some(self.vectors.iter().map(|vector| vector.now).collect());
            self.program_all(vec![None; self.vectors.len()]);
            for vector in &mut self.vectors {
                vector.look_for_signal();
            }
        }
    }

    /// The vectors deliver again, what is pending first.
    pub fn go_on(&mut self) {
        if let Some(messages) = self.held.take() {
            self.program_all(messages);
        }
    }

    /// What is saved of them, while they are held.
    pub fn saved(&self) -> Vec<SavedVector> {
        let saved = |vector: &Vector| SavedVector { taken: vector.taken.is_some(), pending: vector.pending };
        self.vectors.iter().map(saved).collect()
    }

    /// As they were: enabled with a vector for each of `messages`, and held.
    pub fn restore(&mut self, messages: Vec<Option<Msi>>, saved: &[SavedVector]) {
        self.disable();
        self.enable(messages);
        // Those that were taken and are masked are so again: what the function signals is counted here, not there.
        for (index, saved) in saved.iter().enumerate().take(self.vectors.len()) {
            if saved.taken && self.vectors[index].taken.is_none() {
                let lost = match self.interrupts.route(self.requester) {
                    Ok(route) => {
                        self.vectors[index].taken = Some(route);
                        self.connect(&[index])
                    }
                    Err(e) => Some((index, e)),
                };
                if let Some(lost) = lost {
                    self.complain(lost);
                }
            }
        }
        self.hold();
        for (vector, saved) in self.vectors.iter_mut().zip(saved) {
            vector.pending = saved.pending;
        }
    }

    /// Whether the guest has the kind enabled.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// How many there are since the kind was enabled.
    pub fn count(&self) -> usize {
        self.vectors.len()
    }

    /// Enables the kind with a vector for each of `messages`, and takes those that are not masked.
    pub fn enable(&mut self, messages: Vec<Option<Msi>>) {
        self.vectors.resize_with(messages.len(), Vector::default);
        self.enabled = true;
        self.allocate();
        self.program_all(messages);
    }

    /// Tells the host that the kind is enabled: functions and their firmware act on it, whatever is masked.
    fn allocate(&self) {
        let nobody = |count: usize| self.host.set_irqs(self.kind, 0, &vec![None; count]);
        if !self.host.irq_noresize(self.kind) {
            // What is refused now is refused, and said, when a vector is taken.
            if let Err(e) = nobody(1) {
                log::debug!("{}: {:?} was not enabled yet: {e}", self.requester, self.kind);
            }
            return;
        }
        let all = self.vectors.len();
        if nobody(all).is_ok() {
            return;
        }
        // The most that the host has: it says no and leaves nothing enabled, or takes them, and then has to let go
        // first.
        let (mut most, mut refused) = (0, all);
        while refused - most > 1 {
            let asked = most.midpoint(refused);
            if nobody(asked).is_ok() {
                self.release_host();
                most = asked;
            } else {
                refused = asked;
            }
        }
        if most > 0
            && let Err(e) = nobody(most)
        {
            log::debug!("{}: {:?} was not enabled: {e}", self.requester, self.kind);
        }
    }

    fn release_host(&self) {
        if let Err(e) = self.host.disable_irqs(self.kind) {
            log::debug!("{}: {:?} could not be disabled: {e}", self.requester, self.kind);
        }
    }

    /// Disables all, and gives back what they took; what was pending is forgotten.
    pub fn disable(&mut self) {
        if mem::take(&mut self.enabled) {
            self.release_host();
        }
        self.vectors.clear();
        self.held = None;
    }

    /// Vector `index` delivers `message` from now on, `None`: nothing. What came while it was masked is delivered.
    pub fn program(&mut self, index: usize, message: Option<Msi>) {
        self.apply(&[(index, message)]);
    }

    /// As [`Vectors::program`], of the vectors from 0 on: together they are one change of the machine's routes.
    pub fn program_all(&mut self, messages: Vec<Option<Msi>>) {
        let changes: Vec<_> = messages.into_iter().enumerate().collect();
        self.apply(&changes);
    }

    /// In ascending order of the vectors.
    fn apply(&mut self, changes: &[(usize, Option<Msi>)]) {
        let mut lost = None;
        let (mut changed, mut fresh, mut due) = (Vec::new(), Vec::new(), Vec::new());
        for &(index, message) in changes {
            let Some(vector) = self.vectors.get_mut(index).filter(|vector| vector.now != message) else { continue };
            if vector.taken.is_none() && message.is_some() {
                match self.interrupts.route(self.requester) {
                    Ok(route) => {
                        vector.taken = Some(route);
                        fresh.push(index);
                    }
                    Err(e) => lost = lost.or(Some((index, e))),
                }
            } else if let (None, Some(message)) = (vector.now, message) {
                // Before the route is set: what comes later is the route's to deliver, so nothing is delivered twice.
                if vector.look_for_signal() {
                    vector.pending = false;
                    due.push(message);
                }
            }
            vector.now = message;
            changed.push(index);
        }
        // What is signalled before the routes are set is counted, and delivered then; what the host refuses needs no
        // route.
        for run in fresh.chunk_by(|a, b| a + 1 == *b) {
            lost = self.connect(run).or(lost);
        }
        let route = |index: &usize| Some((self.vectors[*index].taken.clone()?, self.vectors[*index].now));
        let routes: Vec<_> = changed.iter().filter_map(route).collect();
        self.interrupts.set_routes(&routes);
        for message in due {
            self.interrupts.signal(self.requester, message);
        }
        if let Some(lost) = lost {
            self.complain(lost);
        }
    }

    fn complain(&self, (index, e): (usize, io::Error)) {
        let (requester, count) = (self.requester, self.vectors.len());
        let kind = if self.kind == IrqKind::Msi { "MSI" } else { "MSI-X" };
        self.told.once(|| {
            log::error!(
                "{requester}: interrupts are lost: of the {count} {kind} vectors, number {index} could not be had: {e}; \
                 what works goes on, and others that cannot be had are not named"
            );
        });
    }

    /// Lets the host signal the vectors `run`, which follow each other and were just taken. The first that it refuses
    /// is given back, and so are the ones that it refuses after that.
    fn connect(&mut self, run: &[usize]) -> Option<(usize, io::Error)> {
        match self.signal_by(run) {
            Ok(()) => return None,
            Err(e) if run.len() == 1 => return self.give_back(run[0], e),
            // It took none of them.
            Err(_) => {}
        }
        let mut lost = None;
        for index in run {
            if let Err(e) = self.signal_by(&[*index]) {
                lost = lost.or(self.give_back(*index, e));
            }
        }
        lost
    }

    fn signal_by(&self, run: &[usize]) -> io::Result<()> {
        let triggers: Vec<Option<&EventFd>> =
            run.iter().map(|index| self.vectors[*index].taken.as_ref().map(|route| route.trigger())).collect();
        let start = u32::try_from(run[0]).map_err(io::Error::other)?;
        self.host.set_irqs(self.kind, start, &triggers)
    }

    fn give_back(&mut self, index: usize, e: io::Error) -> Option<(usize, io::Error)> {
        self.vectors[index].taken = None;
        let e = io::Error::new(
            e.kind(),
            format!("the host refused it ({e}); let the guest's driver use fewer queues, or the host's own drivers"),
        );
        Some((index, e))
    }

    /// Whether vector `index` has something to deliver that its mask holds back. `in_device`: its own pending bit,
    /// which tells for one that is not taken.
    pub fn is_pending(&mut self, index: usize, in_device: bool) -> bool {
        let Some(vector) = self.vectors.get_mut(index) else { return false };
        match (&vector.taken, vector.now) {
            (None, _) => in_device,
            (Some(_), None) => vector.look_for_signal(),
            (Some(_), Some(_)) => false,
        }
    }

    /// Reads the device's own pending bits, if they are in its configuration space.
    pub fn read_device(&self, offset: u16, data: &mut [u8]) {
        self.host.read(RegionKind::Config, offset.into(), data);
    }
}
