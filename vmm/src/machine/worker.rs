//! A thread that serves a unit's queue, so that a guest's invalidation costs no exit (`worker=on`).
//!
//! The guest reads the registers from a page and writes the tail, which is all that it does there for an invalidation.
//! Where bells hang at the tail register ([`KvmTailBells`]), the vCPU goes on at once and waits in the guest for the
//! status of its wait descriptor, and this thread serves the queue meanwhile. Whoever else comes to the queue serves
//! what rang first ([`vtd::TailBells`]), so nothing is out of order.
//!
//! IQT in the page says what the guest wrote only once it is served. So a guest is watched first: for its first
//! [`WATCHED`] tails its reads of the registers are exits. One that reads IQT meanwhile, as Xen does before each
//! descriptor, gets no bells.
//!
//! A thread that spins beside the guest is faster than an exit while there is a processor for it, and slower when there
//! is none, or when it has to be woken. So `on` hangs bells while all of this holds, and looks at it:
//!
//! - tails follow each other within [`SPIN`]: the thread is still awake when the next comes;
//! - vCPUs and the thread run when they want to: what the kernel says they waited for a processor is below a tenth of
//!   the time (`/proc/thread-self/schedstat`). KVM hangs bells within a millisecond, and takes a second to take them
//!   down where processors are short. So before any hangs, another thread spins for a moment in place of the first one.
//!
//! When one does not hold, bells are not tried for a second, and for twice as long the next time.

mod policy;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::BusDevice;
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::spec::registers::offset::IQT;
use vtd::{QueueShape, TailBells, Unit};

use crate::config::WorkerOption;
use crate::kvm::memory::Ram;
use crate::kvm::register_page::ShownPage;
use crate::kvm::tail_bells::{Hanging, KvmTailBells, MOST};
use crate::open_files;
use policy::{Policy, Verdict, Waiting};

/// Tails of a guest that are exits, and its reads of registers as well, before bells hang.
const WATCHED: u32 = 64;
/// How long the thread looks for the next tail before it sleeps.
pub(super) const SPIN: Duration = Duration::from_micros(50);

/// What a guest showed since its queue is on.
#[derive(Default)]
struct Guest {
    queue: Option<QueueShape>,
    /// Tails that were exits.
    tails: u32,
    /// Bytes of its writes of the tail; 0: of different ones.
    width: Option<u8>,
    reads_tail: bool,
    /// KVM took no bells.
    refused: bool,
    hanging: Option<Hanging>,
}

impl Guest {
    /// The bells that may hang for it.
    fn fitting(&self) -> Option<Hanging> {
        let known = self.tails >= WATCHED && !self.reads_tail && !self.refused;
        let width = self.width.filter(|width| *width != 0);
        self.queue
            .filter(|queue| known && queue.descriptors <= MOST as u64)
            .zip(width)
            .map(|(queue, width)| Hanging { queue, width })
    }

    /// It wrote `len` bytes of the tail, 4 or 8.
    fn wrote_tail(&mut self, len: usize) {
        let width = self.width.get_or_insert(len as u8);
        if usize::from(*width) != len {
            *width = 0;
        }
        self.tails = self.tails.saturating_add(1);
    }

    fn is_watched(&self) -> bool {
        self.tails < WATCHED && self.queue.is_some_and(|queue| queue.descriptors <= MOST as u64)
    }
}

/// What the thread, the vCPUs and the unit share.
struct Shared {
    bells: KvmTailBells,
    /// Given back when the thread ends: it has the units, and they have this.
    page: Mutex<Option<ShownPage>>,
    option: WorkerOption,
    /// A bell may have rung that nobody has taken.
    hang: AtomicBool,
    /// Bytes of a descriptor, for who takes what rang: while bells are taken down, `guest` is not to be had.
    descriptor: AtomicU64,
    // Taken with the queue lock held, and never held while that is waited for.
    guest: Mutex<Guest>,
    policy: Mutex<Policy>,
    /// Of the thread that hangs bells and takes them down.
    errand: Mutex<Option<Errand>>,
    wanted: Condvar,
    /// Of the thread that serves the queue.
    wake: EventFd,
    stop: AtomicBool,
}

/// What is to be done with bells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Errand {
    /// They are to hang, if there is room for a thread that spins.
    Hang,
    /// They cost more than exits.
    TakeDown,
    /// The thread ends.
    End,
}

impl Shared {
    fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap()
    }

    fn show(&self) {
        if let Some(Err(e)) = self.page.lock().unwrap().as_ref().map(ShownPage::show) {
            log::warn!("the guest's reads of a remapping unit's registers are exits: {e}");
        }
    }

    /// Bells hang from now on, if they may for this guest. Whether they do.
    fn hang_bells(&self) -> bool {
        let mut guest = self.guest();
        let Some(hanging) = guest.fitting().filter(|_| guest.hanging.is_none()) else { return false };
        // Before the first can ring.
        self.hang.store(true, Ordering::SeqCst);
        match self.bells.hang(hanging) {
            Ok(()) => guest.hanging = Some(hanging),
            Err(e) => {
                log::warn!("the guest's invalidations stay exits: KVM takes no bells for them: {e}");
                // What rang meanwhile is taken by whoever is next, as always: `hang` stays.
                guest.refused = true;
            }
        }
        guest.hanging.is_some()
    }

    /// No bell hangs any more; what rang is served. Not with the queue lock held.
    fn take_down(&self, unit: &Unit<Ram>) {
        {
            let mut guest = self.guest();
            let Some(hanging) = guest.hanging.take() else { return };
            self.bells.take_down(hanging);
        }
        unit.serve_tails();
        let guest = self.guest();
        if guest.hanging.is_none() {
            self.hang.store(false, Ordering::SeqCst);
        }
    }

    fn want(&self, errand: Errand) {
        let mut last = self.errand.lock().unwrap();
        // Nothing comes behind the end.
        if *last != Some(Errand::End) {
            *last = Some(errand);
        }
        self.wanted.notify_one();
    }

    /// A vCPU wrote `len` bytes of the tail, which was an exit.
    fn tail_was_an_exit(&self, len: usize) {
        // Bells are just being hung or taken down.
        let Ok(mut guest) = self.guest.try_lock() else { return };
        if guest.hanging.is_some() {
            return;
        }
        let watched = guest.is_watched();
        guest.wrote_tail(len);
        let known = watched && !guest.is_watched();
        let fits = guest.fitting().is_some();
        drop(guest);
        if known {
            self.show();
        }
        match self.option {
            WorkerOption::Always if known => _ = self.hang_bells(),
            WorkerOption::On if fits && self.policy.lock().unwrap().tail_was_an_exit(Instant::now()) => {
                self.want(Errand::Hang);
            }
            _ => {}
        }
    }
}

impl TailBells for Shared {
    fn queue_changed(&self, queue: Option<QueueShape>) {
        let mut guest = self.guest();
        if let Some(hanging) = guest.hanging {
            self.bells.take_down(hanging);
        }
        // What rang belongs to a queue that is no more.
        self.bells.take(&mut |_| ());
        self.hang.store(false, Ordering::SeqCst);
        *guest = Guest { queue, ..Guest::default() };
        self.descriptor.store(queue.map_or(0, |queue| queue.descriptor), Ordering::SeqCst);
        let watched = guest.is_watched();
        drop(guest);
        if watched {
            self.page.lock().unwrap().iter().for_each(ShownPage::hide);
        } else {
            self.show();
        }
    }

    fn hang(&self) -> bool {
        self.hang.load(Ordering::SeqCst)
    }

    fn take(&self, tail: &mut dyn FnMut(u64)) {
        let descriptor = self.descriptor.load(Ordering::SeqCst);
        self.bells.take(&mut |place| tail(place * descriptor));
    }
}

/// The thread of the unit whose registers are at `base`, if it is to have one and can.
pub(super) fn of(vm: &Arc<VmFd>, unit: &Arc<Unit<Ram>>, base: u64, option: WorkerOption) -> Option<Worker> {
    if option == WorkerOption::Off {
        return None;
    }
    let worker = KvmTailBells::new(vm.clone(), base + IQT).and_then(|bells| Worker::start(bells, unit, option));
    worker.map_err(|e| log::warn!("a remapping unit has no worker: {}", open_files::remedy(e))).ok()
}

/// The thread of one unit, until this is dropped.
pub(super) struct Worker {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Worker {
    /// Begins.
    ///
    /// # Errors
    /// There is no room for its open files, or for a thread.
    fn start(bells: KvmTailBells, unit: &Arc<Unit<Ram>>, option: WorkerOption) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            bells,
            page: Mutex::default(),
            option,
            hang: AtomicBool::new(false),
            descriptor: AtomicU64::new(0),
            guest: Mutex::default(),
            policy: Mutex::new(Policy::new(Instant::now())),
            errand: Mutex::default(),
            wanted: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stop: AtomicBool::new(false),
        });
        unit.set_tail_bells(shared.clone());
        let mut worker = Self { shared, threads: Vec::new() };
        worker.spawn(unit, "", serve)?;
        if option == WorkerOption::On {
            worker.spawn(unit, "-bells", tend)?;
        }
        Ok(worker)
    }

    fn spawn(&mut self, unit: &Arc<Unit<Ram>>, of: &str, run: fn(&Shared, &Unit<Ram>)) -> io::Result<()> {
        let (shared, its, name) = (self.shared.clone(), unit.clone(), super::units::name(unit) + of);
        self.threads.push(thread::Builder::new().name(name).spawn(move || run(&shared, &its))?);
        Ok(())
    }

    /// The page of the unit: it is hidden while the guest is watched. Before the guest runs.
    pub fn watch(&self, page: ShownPage) {
        *self.shared.page.lock().unwrap() = Some(page);
    }

    /// What the guest reaches in place of the registers of `unit`.
    pub fn window(&self, unit: Arc<Unit<Ram>>) -> Arc<dyn BusDevice> {
        Arc::new(Window { unit, shared: self.shared.clone() })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // A counter that is full wakes as well.
        let _ = self.shared.wake.write(1);
        self.shared.want(Errand::End);
        if self.threads.drain(..).any(|thread| thread.join().is_err()) {
            log::error!("a thread of a remapping unit panicked");
        }
        *self.shared.page.lock().unwrap() = None;
    }
}

struct Window {
    unit: Arc<Unit<Ram>>,
    shared: Arc<Shared>,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < IQT + 8 && offset.saturating_add(data.len() as u64) > IQT {
            self.shared.guest().reads_tail = true;
        }
        self.unit.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.unit.write(offset, data);
        if offset == IQT && matches!(data.len(), 4 | 8) {
            self.shared.tail_was_an_exit(data.len());
        }
    }
}

/// Waits until one of them is readable; or looks, without `wait`.
fn poll(fds: &mut [libc::pollfd], wait: bool) {
    fds.iter_mut().for_each(|fd| fd.revents = 0);
    // SAFETY: the pointer and the length are those of a slice that this thread alone has.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, if wait { -1 } else { 0 }) };
    if result < 0 {
        // A signal: whoever calls looks again.
        fds.iter_mut().for_each(|fd| fd.revents = 0);
    }
}

/// The thread that serves the queue.
fn serve(shared: &Shared, unit: &Unit<Ram>) {
    let readable = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [readable(shared.bells.as_raw_fd()), readable(shared.wake.as_raw_fd())];
    let mut waiting = Waiting::default();
    // Until when the next tail is looked for without sleep.
    let mut awake: Option<Instant> = None;
    while !shared.stop.load(Ordering::SeqCst) {
        let asleep = awake.is_none_or(|until| Instant::now() >= until);
        poll(if asleep { &mut fds } else { &mut fds[..1] }, asleep);
        if fds[0].revents == 0 {
            continue;
        }
        unit.serve_tails();
        let now = Instant::now();
        awake = Some(now + SPIN);
        if shared.option == WorkerOption::On {
            let verdict = shared.policy.lock().unwrap().tail_was_taken(now, asleep, || waiting.now());
            if verdict == Verdict::TakeDown {
                shared.want(Errand::TakeDown);
            }
            // Who has no processor to spare does not spin.
            awake = awake.filter(|_| verdict == Verdict::Keep);
        }
    }
}

/// The thread that hangs bells and takes them down, while the other one serves the queue.
fn tend(shared: &Shared, unit: &Unit<Ram>) {
    let mut waiting = Waiting::default();
    loop {
        let mut errand = shared.wanted.wait_while(shared.errand.lock().unwrap(), |errand| errand.is_none()).unwrap();
        let wanted = errand.take();
        drop(errand);
        match wanted {
            None => {}
            Some(Errand::End) => return,
            Some(Errand::TakeDown) => shared.take_down(unit),
            Some(Errand::Hang) => {
                let hang = policy::has_room(&mut waiting) && shared.hang_bells();
                let mut policy = shared.policy.lock().unwrap();
                if hang { policy.begin(Instant::now()) } else { policy.rest_from(Instant::now()) }
            }
        }
    }
}

#[cfg(test)]
#[path = "worker/worker_test.rs"]
mod worker_test;
