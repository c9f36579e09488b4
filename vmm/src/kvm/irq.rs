//! Messages into the guest: the GSI routing table, irqfds, and single messages, each remapped by the unit of its
//! requester.
//!
//! GSIs 0 to 23 are the IOAPIC's pins. KVM delivers nothing by them (our IOAPIC sends messages itself), but it looks at
//! their routes to know which vectors are level-triggered and have to exit at their end of interrupt. GSIs from 24 on
//! are vectors of functions: an eventfd that KVM turns into the remapped message by itself.
//!
//! ```text
//!  masked  nobody has the eventfd; signals stay counted
//!  Kvm     the unit remapped the message: KVM has the eventfd and the route
//!  Served  the unit blocks the message: we have the eventfd, and ask the unit when it fires, so that the fault is
//!          recorded then and not before (A-9)
//!  Posted  the entry is posted: we have the eventfd, and post by the entry as it was looked up, as KVM delivers by a
//!          route (A-17)
//! ```
//!
//! One lock is held from the look-up in the guest's table until the route or the message is KVM's, and by the unit's
//! invalidation of entries, which therefore ends after everything that was looked up before it. The lock comes after
//! the queue of the unit and before its registers.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use devices::Told;
use devices::host::{Interrupts, IoapicRoutes, IrqRoute};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};
use kvm_ioctls::VmFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::spec::INTERRUPT_WINDOW;
use vtd::{
    EntriesChanged, Msi, MsiSink, Posting, RemapError, RemapFault, RemapListener, Remapped, Requester, SourceId, Unit,
};

use crate::boot::layout::{IOAPIC_PINS, IOAPIC_SOURCE};
use crate::kvm::memory::Ram;
use crate::open_files;

/// Trigger mode of the data of a message: level.
const DATA_LEVEL: u32 = 1 << 15;
/// KVM takes this many routes (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: usize = 4096;
/// Vectors that functions can have between them.
pub const MAX_VECTORS: usize = MAX_ROUTES - IOAPIC_PINS as usize;
const FEWER_VECTORS: &str = "let the guest's driver use fewer queues, or assign fewer functions";
/// Blocked vectors that are served in one round of the event loop.
const SERVED_AT_ONCE: usize = 32;

/// The IOAPIC, as the unit knows it.
pub fn ioapic_requester() -> Requester {
    let (bus, device, function) = IOAPIC_SOURCE;
    Requester { segment: 0, sid: SourceId::new(bus, device, function) }
}

/// What remaps messages: the unit.
pub trait Remapper: Send + Sync {
    /// What becomes of this message if it fires; a fault is not recorded.
    fn remap(&self, requester: Requester, msi: Msi) -> Result<Remapped, RemapError>;
    /// It fires now: what the processors get, if anything. A fault is recorded.
    fn deliver(&self, requester: Requester, msi: Msi) -> Result<Option<Msi>, RemapError>;
    /// A message of `requester` that was said to be posted fires now: the notification that is owed, if any. A fault is
    /// recorded.
    fn post(&self, requester: Requester, posting: &Posting) -> Result<Option<Msi>, RemapFault>;
}

impl Remapper for Unit<Ram> {
    fn remap(&self, requester: Requester, msi: Msi) -> Result<Remapped, RemapError> {
        self.remap(requester, msi)
    }
    fn deliver(&self, requester: Requester, msi: Msi) -> Result<Option<Msi>, RemapError> {
        self.deliver(requester, msi)
    }
    fn post(&self, _: Requester, posting: &Posting) -> Result<Option<Msi>, RemapFault> {
        self.post(posting)
    }
}

/// KVM's part of it.
trait Kvm: Send + Sync {
    /// These are all the routes from now on. When it returns, nothing is delivered by the ones before.
    fn set_routes(&self, entries: &[kvm_irq_routing_entry]) -> io::Result<()>;
    /// Signals of `trigger` are delivered by the route of `gsi`, a signal that it has counted already, too.
    fn connect(&self, trigger: &EventFd, gsi: u32) -> io::Result<()>;
    /// Takes that back. When it returns, everything that was signalled before is delivered.
    fn disconnect(&self, trigger: &EventFd, gsi: u32) -> io::Result<()>;
    /// Delivers a message now.
    fn send(&self, msi: Msi) -> io::Result<()>;
}

fn os_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

impl Kvm for VmFd {
    fn set_routes(&self, entries: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let routing = KvmIrqRouting::from_entries(entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.set_gsi_routing(&routing).map_err(os_error)
    }
    fn connect(&self, trigger: &EventFd, gsi: u32) -> io::Result<()> {
        self.register_irqfd(trigger, gsi).map_err(os_error)
    }
    fn disconnect(&self, trigger: &EventFd, gsi: u32) -> io::Result<()> {
        self.unregister_irqfd(trigger, gsi).map_err(os_error)
    }
    fn send(&self, msi: Msi) -> io::Result<()> {
        let (address_lo, address_hi) = halves(msi.address);
        // 0 means that the guest blocks the interrupt, which is its right.
        self.signal_msi(kvm_msi { address_lo, address_hi, data: msi.data, ..Default::default() })
            .map(drop)
            .map_err(os_error)
    }
}

fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

/// Who has the eventfd of a vector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Path {
    /// Nobody.
    Masked,
    /// KVM.
    Kvm,
    /// The event loop, which asks the unit what becomes of a signal.
    Served,
    /// The event loop, which posts a signal.
    Posted(Posting),
}

impl Path {
    /// The event loop watches the eventfd.
    fn is_watched(self) -> bool {
        matches!(self, Self::Served | Self::Posted(_))
    }
}

/// One vector of a function.
struct Vector {
    requester: Requester,
    trigger: Arc<EventFd>,
    /// What the function sends; `None`: masked.
    sends: Option<Msi>,
    path: Path,
}

/// What the functions and the pins send, and what KVM is told of it.
#[derive(Default)]
struct Table {
    vectors: BTreeMap<u32, Vector>,
    /// GSIs that were given back.
    free: BTreeSet<u32>,
    /// How many vectors each function has taken.
    taken: BTreeMap<Requester, usize>,
    /// How many it may take; as many as there are, where nothing is said.
    shares: BTreeMap<Requester, usize>,
    /// What each pin sends, the last that it sent if it is masked.
    pins: [Option<Msi>; IOAPIC_PINS as usize],
    /// The routes as they should be in KVM: remapped.
    routes: BTreeMap<u32, Msi>,
    /// KVM does not have them yet.
    stale: bool,
}

impl Table {
    /// A GSI for one more vector of `requester`.
    fn take_gsi(&mut self, requester: Requester) -> io::Result<u32> {
        let taken = self.taken.get(&requester).copied().unwrap_or_default();
        if let Some(share) = self.shares.get(&requester).filter(|share| taken >= **share) {
            return Err(io::Error::other(format!("its share of {share} is used up; {FEWER_VECTORS}")));
        }
        // All that is not free is in use: the next one follows them.
        let next = IOAPIC_PINS + (self.vectors.len() + self.free.len()) as u32;
        let gsi = self.free.pop_first().or_else(|| Some(next).filter(|gsi| *gsi < MAX_ROUTES as u32));
        let gsi = gsi.ok_or_else(|| io::Error::other(format!("KVM has no interrupt route left; {FEWER_VECTORS}")))?;
        *self.taken.entry(requester).or_default() += 1;
        Ok(gsi)
    }

    fn give_gsi_back(&mut self, gsi: u32) {
        let Some(vector) = self.vectors.remove(&gsi) else { return };
        self.free.insert(gsi);
        if let Some(taken) = self.taken.get_mut(&vector.requester) {
            *taken -= 1;
        }
        // KVM hears of it with the next change: nobody signals by that route meanwhile.
        self.set_route(gsi, None);
    }

    fn set_route(&mut self, gsi: u32, msi: Option<Msi>) {
        let before = match msi {
            Some(msi) => self.routes.insert(gsi, msi),
            None => self.routes.remove(&gsi),
        };
        self.stale |= before != msi;
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        self.routes
            .iter()
            .map(|(gsi, msi)| {
                let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
                (entry.u.msi.address_lo, entry.u.msi.address_hi) = halves(msi.address);
                entry.u.msi.data = msi.data;
                entry
            })
            .collect()
    }
}

/// What was complained of: a guest that makes KVM refuse the same again and again fills no log.
#[derive(Default)]
struct Complaints {
    blocked: Told,
    message: Told,
    routes: Told,
    eventfd: Told,
    handover: Told,
}

/// [`Interrupts`], [`IoapicRoutes`] and [`MsiSink`] over KVM, and the unit's [`RemapListener`].
pub struct KvmInterrupts {
    kvm: Arc<dyn Kvm>,
    remapper: OnceLock<Weak<dyn Remapper>>,
    table: Mutex<Table>,
    /// Watches the eventfds of blocked vectors and of posted ones, by their GSI.
    blocked: Epoll,
    complaints: Complaints,
    this: Weak<Self>,
}

impl KvmInterrupts {
    /// For a virtual machine with a split interrupt chip. Nothing is remapped.
    ///
    /// # Errors
    /// The host has no file descriptors left.
    pub fn new(vm: Arc<VmFd>) -> io::Result<Arc<Self>> {
        Self::over(vm)
    }

    fn over(kvm: Arc<dyn Kvm>) -> io::Result<Arc<Self>> {
        let blocked = Epoll::new()?;
        Ok(Arc::new_cyclic(|this| Self {
            kvm,
            remapper: OnceLock::new(),
            table: Mutex::default(),
            blocked,
            complaints: Complaints::default(),
            this: this.clone(),
        }))
    }

    /// From now on every message goes through `remapper`; nothing is delivered once that is gone. To be called once,
    /// before there is any vector.
    pub fn remap_by(&self, remapper: Weak<dyn Remapper>) {
        if self.remapper.set(remapper).is_err() {
            log::error!("a second unit was to remap the same interrupts");
        }
    }

    /// Each of these functions takes no more vectors than its share.
    pub fn share_out(&self, shares: impl IntoIterator<Item = (Requester, usize)>) {
        self.table().shares.extend(shares);
    }

    /// Readable while a vector that KVM does not have has fired: the event loop then calls [`Self::serve_blocked`].
    pub fn blocked_event(&self) -> RawFd {
        self.blocked.as_raw_fd()
    }

    /// Gives what blocked vectors sent to the unit, which records their faults, and what posted ones sent, which it
    /// posts.
    pub fn serve_blocked(&self) {
        let mut events = [EpollEvent::default(); SERVED_AT_ONCE];
        let ready = match self.blocked.wait(0, &mut events) {
            Ok(ready) => ready,
            Err(e) => {
                if e.kind() != io::ErrorKind::Interrupted {
                    self.complaints.blocked.once(|| log::error!("blocked interrupts could not be served: {e}"));
                }
                return;
            }
        };
        for event in &events[..ready] {
            let table = self.table();
            // Where KVM got the eventfd meanwhile, it has delivered what was counted.
            let Some(vector) = table.vectors.get(&(event.data() as u32)) else { continue };
            match (vector.path, vector.sends) {
                (Path::Served, Some(msi)) if vector.trigger.read().is_ok() => {
                    self.fire(&table, vector.requester, msi);
                }
                (Path::Posted(posting), _) => self.post_signalled(vector, &posting),
                _ => {}
            }
        }
    }

    /// Posts what `vector` was signalled, however often, and sends the notification that is owed. The table is held.
    fn post_signalled(&self, vector: &Vector, posting: &Posting) {
        if vector.trigger.read().is_err() {
            return;
        }
        let remapper = self.remapper.get().and_then(Weak::upgrade);
        match remapper.map(|remapper| remapper.post(vector.requester, posting)) {
            Some(Ok(Some(notification))) => self.send(notification),
            Some(Ok(None)) | None => {}
            Some(Err(e)) => log::debug!("a message of {} was dropped: {e}", vector.requester),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap()
    }

    fn ask<T: From<Msi>>(
        &self,
        msi: Msi,
        ask: impl FnOnce(&dyn Remapper) -> Result<T, RemapError>,
    ) -> Result<Option<T>, RemapError> {
        match self.remapper.get() {
            None if INTERRUPT_WINDOW.contains(msi.address) => Ok(Some(msi.into())),
            None => Err(RemapError::NotAnInterrupt(msi.address)),
            Some(remapper) => remapper.upgrade().map(|remapper| ask(&*remapper)).transpose(),
        }
    }

    /// What becomes of it if `requester` sends `msi`; `None`: nothing.
    fn look_up(&self, requester: Requester, msi: Msi) -> Option<Remapped> {
        self.ask(msi, |remapper| remapper.remap(requester, msi)).ok().flatten()
    }

    /// `requester` sends `msi`. The table is held until it is KVM's, so that an invalidation waits for it.
    fn fire(&self, _table: &Table, requester: Requester, msi: Msi) {
        match self.ask(msi, |remapper| remapper.deliver(requester, msi)) {
            Ok(Some(Some(remapped))) => self.send(remapped),
            // Posted, and nobody is to be notified; or the unit is gone.
            Ok(Some(None) | None) => {}
            Err(e) => log::debug!("a message of {requester} was dropped: {e}"),
        }
    }

    fn send(&self, msi: Msi) {
        if let Err(e) = self.kvm.send(msi) {
            let Msi { address, data } = msi;
            self.complaints.message.once(|| {
                log::warn!(
                    "a message {data:#x} to {address:#x} reached no processor ({e}); further ones are not logged"
                );
            });
        }
    }

    /// Looks up what these vectors and pins send, and makes it so: all of it in one change of KVM's routes.
    fn resolve(&self, table: &mut Table, gsis: &BTreeSet<u32>) {
        let mut routed = Vec::new();
        for gsi in gsis {
            if let Some(Some(sends)) = table.pins.get(*gsi as usize).copied() {
                let route = match self.look_up(ioapic_requester(), sends) {
                    Some(Remapped::Message(remapped)) => Some(remapped),
                    // No vector of a processor has an end that is to come back to the pin.
                    Some(Remapped::Posted(_)) | None => None,
                };
                table.set_route(*gsi, route);
            } else if let Some(Vector { requester, sends: Some(sends), .. }) = table.vectors.get(gsi) {
                match self.look_up(*requester, *sends) {
                    Some(Remapped::Message(remapped)) => {
                        routed.push(*gsi);
                        table.set_route(*gsi, Some(remapped));
                    }
                    Some(Remapped::Posted(posting)) => self.take_path(table, *gsi, Path::Posted(posting)),
                    None => self.take_path(table, *gsi, Path::Served),
                }
            }
        }
        let path = match self.commit(table) {
            Ok(()) => Path::Kvm,
            Err(e) => {
                // Nothing may be delivered by the routes of before.
                self.complain_of_routes(&e);
                Path::Served
            }
        };
        for gsi in routed {
            self.take_path(table, gsi, path);
        }
    }

    fn commit(&self, table: &mut Table) -> io::Result<()> {
        if table.stale {
            self.kvm.set_routes(&table.entries())?;
            table.stale = false;
        }
        Ok(())
    }

    fn complain_of_routes(&self, e: &io::Error) {
        self.complaints
            .routes
            .once(|| log::error!("the interrupt routes could not be set, and interrupts become slow: {e}"));
    }

    /// Hands the eventfd of `gsi` over. Where KVM does not take it, it is served.
    fn take_path(&self, table: &mut Table, gsi: u32, path: Path) {
        let Some(vector) = table.vectors.get_mut(&gsi) else { return };
        if vector.path == path {
            return;
        }
        let watch = |operation| {
            self.blocked.ctl(operation, vector.trigger.as_raw_fd(), EpollEvent::new(EventSet::IN, gsi.into()))
        };
        if let Path::Posted(posting) = vector.path {
            // What was signalled before the change was sent before it, as what KVM delivers when it lets go. So the
            // entry of before still counts for it, also if there is none any more.
            self.post_signalled(vector, &posting);
        }
        let stays = vector.path.is_watched() && path.is_watched();
        let left = match vector.path {
            Path::Kvm => self.kvm.disconnect(&vector.trigger, gsi),
            Path::Served | Path::Posted(_) if !stays => watch(ControlOperation::Delete),
            _ => Ok(()),
        };
        let mut taken = path;
        let entered = match path {
            Path::Masked => Ok(()),
            Path::Served | Path::Posted(_) if stays => Ok(()),
            Path::Kvm => self.kvm.connect(&vector.trigger, gsi).or_else(|e| {
                self.complaints.eventfd.once(|| {
                    log::warn!("{}: KVM refused an eventfd, and the interrupt becomes slow: {e}", vector.requester);
                });
                taken = Path::Served;
                watch(ControlOperation::Add)
            }),
            Path::Served | Path::Posted(_) => watch(ControlOperation::Add),
        };
        if taken == Path::Kvm {
            // What was counted before KVM has delivered just now, but it leaves the count. It would fire again, as a
            // fault perhaps, when the eventfd is handed over next. What comes from now on KVM takes away itself.
            let _ = vector.trigger.read();
        }
        if let Err(e) = left.and(entered) {
            self.complaints
                .handover
                .once(|| log::error!("{}: an interrupt could not be handed over: {e}", vector.requester));
        }
        vector.path = taken;
    }
}

impl Interrupts for KvmInterrupts {
    fn route(&self, requester: Requester) -> io::Result<Arc<dyn IrqRoute>> {
        let trigger = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(open_files::remedy)?);
        let owner = self.this.upgrade().ok_or_else(|| io::Error::other("the machine is going away"))?;
        let mut table = self.table();
        let gsi = table.take_gsi(requester)?;
        let vector = Vector { requester, trigger: trigger.clone(), sends: None, path: Path::Masked };
        table.vectors.insert(gsi, vector);
        drop(table);
        Ok(Arc::new(Route { owner, gsi, trigger }))
    }

    fn set_routes(&self, changes: &[(Arc<dyn IrqRoute>, Option<Msi>)]) {
        let mut table = self.table();
        let mut unmasked = BTreeSet::new();
        for (route, msi) in changes {
            let gsi = route.number();
            if let Some(vector) = table.vectors.get_mut(&gsi) {
                vector.sends = *msi;
            }
            match msi {
                // The route stays in the table: a vector that is masked and unmasked costs no new table.
                None => self.take_path(&mut table, gsi, Path::Masked),
                Some(_) => drop(unmasked.insert(gsi)),
            }
        }
        if !unmasked.is_empty() {
            self.resolve(&mut table, &unmasked);
        }
    }

    fn signal(&self, requester: Requester, msi: Msi) {
        self.fire(&self.table(), requester, msi);
    }
}

/// The unit's own messages are not remapped (section 5.1.6).
impl MsiSink for KvmInterrupts {
    fn signal(&self, msi: Msi) {
        self.send(msi);
    }
}

impl IoapicRoutes for KvmInterrupts {
    fn set_pin(&self, pin: u8, route: Option<(Msi, bool)>) {
        // A masked pin keeps its route: a guest masks a pin while its interrupt is in service, and the end of that
        // interrupt must still come out.
        let Some((msi, level)) = route else { return };
        if u32::from(pin) >= IOAPIC_PINS {
            return;
        }
        // Without remapping the processors learn the trigger mode from here, with it from the entry.
        let data = if level { msi.data | DATA_LEVEL } else { msi.data & !DATA_LEVEL };
        let mut table = self.table();
        table.pins[usize::from(pin)] = Some(Msi { data, ..msi });
        self.resolve(&mut table, &BTreeSet::from([pin.into()]));
    }
}

impl RemapListener for KvmInterrupts {
    fn entries_changed(&self, changed: EntriesChanged) {
        let mut table = self.table();
        let concerned = |sends: &Option<Msi>| sends.is_some_and(|msi| changed.concerns(msi));
        let pins = (0..IOAPIC_PINS).zip(&table.pins).filter(|(_, sends)| concerned(sends)).map(|(gsi, _)| gsi);
        let vectors = table.vectors.iter().filter(|(_, vector)| concerned(&vector.sends)).map(|(gsi, _)| *gsi);
        let gsis = pins.chain(vectors).collect();
        self.resolve(&mut table, &gsis);
    }
}

/// One vector of a function.
struct Route {
    owner: Arc<KvmInterrupts>,
    gsi: u32,
    trigger: Arc<EventFd>,
}

impl IrqRoute for Route {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn number(&self) -> u32 {
        self.gsi
    }

    fn take_pending(&self) -> bool {
        let table = self.owner.table();
        let masked = table.vectors.get(&self.gsi).is_some_and(|vector| vector.path == Path::Masked);
        masked && self.trigger.read().is_ok_and(|count| count > 0)
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let mut table = self.owner.table();
        self.owner.take_path(&mut table, self.gsi, Path::Masked);
        table.give_gsi_back(self.gsi);
    }
}

#[cfg(test)]
#[path = "irq_test.rs"]
mod irq_test;
