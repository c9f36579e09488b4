//! Message-signalled vectors of the assigned function: an eventfd each, which VFIO signals and which becomes an MSI in the
//! guest, or stays counted while the vector is masked.

use std::io;
use std::mem;
use std::sync::Arc;

use vtd::{Msi, Requester};

use super::host::{AssignedHost, IrqKind};
use crate::host::{Interrupts, IrqRoute};
use crate::told::Told;

/// The vectors of one kind (MSI or MSI-X).
pub struct Vectors {
    kind: IrqKind,
    requester: Requester,
    host: Arc<dyn AssignedHost>,
    interrupts: Arc<dyn Interrupts>,
    vectors: Vec<Vector>,
    enabled: bool,
    told: Told,
}

struct Vector {
    route: Arc<dyn IrqRoute>,
    /// What the route delivers now; `None`: masked.
    now: Option<Msi>,
    /// A signal came while it was masked.
    pending: bool,
}

impl Vectors {
    /// No vector yet.
    pub fn new(
        kind: IrqKind,
        requester: Requester,
        host: Arc<dyn AssignedHost>,
        interrupts: Arc<dyn Interrupts>,
    ) -> Self {
        Self { kind, requester, host, interrupts, vectors: Vec::new(), enabled: false, told: Told::default() }
    }

    /// Whether the host's side is enabled.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Enables `count` vectors on the host at once, so that none is ever added while others are live (F-5), each with
    /// what `message` says. The routes are in place before the first signal can come.
    pub fn enable(&mut self, count: usize, message: impl Fn(usize) -> Option<Msi>) {
        if let Err(e) = self.try_enable(count, message) {
            let (requester, kind) = (self.requester, self.kind);
            self.told.once(|| log::error!("{requester}: the host refused {kind:?}: {e}; interrupts are lost"));
        }
    }

    fn try_enable(&mut self, count: usize, message: impl Fn(usize) -> Option<Msi>) -> io::Result<()> {
        while self.vectors.len() < count {
            let route = self.interrupts.route(self.requester)?;
            self.vectors.push(Vector { route, now: None, pending: false });
        }
        for index in 0..count {
            self.program(index, message(index));
        }
        let triggers: Vec<_> = self.vectors[..count].iter().map(|v| Some(v.route.trigger())).collect();
        // A host that is short of vectors may still have some: fewer is better than none.
        let mut offered = triggers.len();
        loop {
            match self.host.set_irqs(self.kind, &triggers[..offered]) {
                Ok(()) => break,
                Err(_) if offered > 1 => offered /= 2,
                Err(e) => return Err(e),
            }
        }
        if offered < triggers.len() {
            let (requester, kind, wanted) = (self.requester, self.kind, triggers.len());
            self.told.once(|| log::warn!("{requester}: the host has {offered} of {wanted} {kind:?} vectors"));
        }
        self.enabled = true;
        Ok(())
    }

    /// Disables all; what was pending is forgotten.
    pub fn disable(&mut self) {
        if mem::take(&mut self.enabled)
            && let Err(e) = self.host.disable_irqs(self.kind)
        {
            log::debug!("{}: {:?} could not be disabled: {e}", self.requester, self.kind);
        }
        for index in 0..self.vectors.len() {
            self.program(index, None);
            let vector = &mut self.vectors[index];
            vector.route.take_pending();
            vector.pending = false;
        }
    }

    /// Vector `index` delivers `message` from now on, `None`: nothing. What came while it was masked is delivered.
    pub fn program(&mut self, index: usize, message: Option<Msi>) {
        let Some(vector) = self.vectors.get_mut(index) else { return };
        if vector.now == message {
            return;
        }
        // Before the route is set: what comes later is the route's to deliver, so nothing is delivered twice.
        let pending = message.is_some() && vector.now.is_none() && {
            vector.pending |= vector.route.take_pending();
            mem::take(&mut vector.pending)
        };
        if let Err(e) = vector.route.set(message) {
            log::debug!("{}: vector {index} could not be routed: {e}", self.requester);
        }
        vector.now = message;
        if let Some(message) = message.filter(|_| pending) {
            self.interrupts.signal(self.requester, message);
        }
    }

    /// Whether vector `index` is masked and has something to deliver.
    pub fn is_pending(&mut self, index: usize) -> bool {
        let Some(vector) = self.vectors.get_mut(index) else { return false };
        if vector.now.is_none() {
            vector.pending |= vector.route.take_pending();
        }
        vector.pending
    }
}
