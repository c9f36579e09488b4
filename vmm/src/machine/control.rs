//! How the virtual CPUs are stopped, reset and started again, and why the machine stops.
//!
//! A vCPU thread asks [`Control::next_step`] before each entry into the guest. The main thread changes what is wanted,
//! kicks the threads out of KVM_RUN, and waits until every one of them is parked. Whoever wants the machine to stop
//! says so with [`Control::request`]; the first reason counts, and no vCPU enters the guest again until the main thread
//! has dealt with it.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::SIGRTMIN;

/// Why the guest does not run on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest cannot go on.
    Crash(String),
    /// The host, or we, cannot go on.
    Error(String),
    /// The image ended itself with this value.
    DebugExit(u32),
    /// The user asked for it at the terminal.
    Quit,
    /// The guest runs in another process.
    Migrated,
    /// The time limit is over.
    TimeLimit,
    /// A signal from outside.
    Signal(i32),
}

/// What every vCPU thread is asked for while no vCPU runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Errand {
    /// Take the state after a reset.
    Reset,
    /// Complete the access that the last exit was for, with all that follows from it.
    Settle,
    /// Say what state it is in.
    Save,
    /// Take the state that was saved.
    Restore,
}

/// What a vCPU thread does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NextStep {
    /// Enter the guest.
    Run,
    /// Do this, then ask again.
    Do(Errand),
    /// End the thread.
    Quit,
}

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const QUIT: u8 = 2;

struct State {
    parked: usize,
    /// Counts errands; a vCPU that has seen fewer has one to do.
    errands: u64,
    errand: Errand,
    errands_done: usize,
    stop: Option<Stop>,
}

/// See the module.
pub struct Control {
    // Written under the lock, read without it before each entry into the guest.
    wanted: AtomicU8,
    // vCPUs that were told to enter the guest and have not said that they left it.
    inside: AtomicUsize,
    state: Mutex<State>,
    changed: Condvar,
    event: EventFd,
    vcpus: usize,
    // The vCPU threads that are alive. Each leaves before it ends.
    threads: Mutex<Vec<libc::pthread_t>>,
}

/// The signal that gets a vCPU thread out of the guest.
pub fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Membership of a vCPU thread, until it is dropped.
pub struct Enrolled<'a>(&'a Control);

impl Drop for Enrolled<'_> {
    fn drop(&mut self) {
        // SAFETY: this only asks.
        let this = unsafe { libc::pthread_self() };
        self.0.threads.lock().unwrap().retain(|thread| *thread != this);
    }
}

impl Control {
    /// For `vcpus` threads, which are held until [`Control::resume`].
    pub fn new(vcpus: usize) -> io::Result<Self> {
        Ok(Self {
            wanted: AtomicU8::new(PAUSE),
            inside: AtomicUsize::new(0),
            state: Mutex::new(State { parked: 0, errands: 0, errand: Errand::Reset, errands_done: 0, stop: None }),
            changed: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            vcpus,
            threads: Mutex::default(),
        })
    }

    /// For vCPU threads: from now on a stop kicks this thread.
    pub fn enroll(&self) -> Enrolled<'_> {
        // SAFETY: this only asks.
        self.threads.lock().unwrap().push(unsafe { libc::pthread_self() });
        Enrolled(self)
    }

    fn kick(&self) {
        for thread in self.threads.lock().unwrap().iter() {
            // SAFETY: the thread is alive, because it needs the lock that we hold to leave the list.
            if unsafe { libc::pthread_kill(*thread, kick_signal()) } != 0 {
                log::error!("a vCPU thread could not be kicked");
            }
        }
    }

    /// Becomes readable when somebody requests a stop.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Asks for a stop, from any thread. A reason given earlier stays, but for a reset: what ends the run outdoes it.
    pub fn request(&self, stop: Stop) {
        let mut state = self.state.lock().unwrap();
        if matches!(state.stop, None | Some(Stop::Reset)) {
            state.stop = Some(stop);
            if self.wanted.load(Ordering::Relaxed) == RUN {
                self.wanted.store(PAUSE, Ordering::SeqCst);
            }
        }
        drop(state);
        // The counter can only be full if nobody reads it, and then it is readable already.
        let _ = self.event.write(1);
    }

    /// The reason that was requested, which is then forgotten.
    pub fn take_stop(&self) -> Option<Stop> {
        let _ = self.event.read();
        self.state.lock().unwrap().stop.take()
    }

    /// Whether a stop was requested that nobody has taken.
    pub fn is_stopping(&self) -> bool {
        self.state.lock().unwrap().stop.is_some()
    }

    /// For vCPU threads: waits until there is something to do. `seen` counts the errands that this vCPU has done. After
    /// [`NextStep::Run`], [`Control::left`] is called before anything else is done with the exit.
    pub fn next_step(&self, seen: &mut u64) -> NextStep {
        // Either this sees that a stop is wanted, or whoever wants it sees this vCPU inside.
        self.inside.fetch_add(1, Ordering::SeqCst);
        if self.wanted.load(Ordering::SeqCst) == RUN {
            return NextStep::Run;
        }
        self.left();
        let mut state = self.state.lock().unwrap();
        state.parked += 1;
        self.changed.notify_all();
        let step = loop {
            match self.wanted.load(Ordering::Relaxed) {
                QUIT => break NextStep::Quit,
                _ if *seen < state.errands => {
                    *seen = state.errands;
                    break NextStep::Do(state.errand);
                }
                RUN => {
                    // What is wanted changes under the lock only.
                    self.inside.fetch_add(1, Ordering::SeqCst);
                    break NextStep::Run;
                }
                _ => state = self.changed.wait(state).unwrap(),
            }
        };
        state.parked -= 1;
        step
    }

    /// For vCPU threads: this one is out of the guest.
    pub fn left(&self) {
        self.inside.fetch_sub(1, Ordering::SeqCst);
        if self.wanted.load(Ordering::SeqCst) != RUN {
            drop(self.state.lock().unwrap());
            self.changed.notify_all();
        }
    }

    /// For vCPU threads: what [`NextStep::Do`] asked for is done.
    pub fn errand_done(&self) {
        self.state.lock().unwrap().errands_done += 1;
        self.changed.notify_all();
    }

    fn want(&self, wanted: u8) {
        let _state = self.state.lock().unwrap();
        self.wanted.store(wanted, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// No vCPU enters the guest any more, and those that are inside come out. Returns when all are parked.
    pub fn pause(&self) {
        self.want(PAUSE);
        self.kick();
        self.all_parked(self.state.lock().unwrap());
    }

    fn all_parked(&self, state: MutexGuard<'_, State>) {
        drop(self.changed.wait_while(state, |state| state.parked < self.vcpus).unwrap());
    }

    /// Stops for good, from any thread, also a vCPU's own: when it returns, no vCPU runs guest code again.
    ///
    /// It waits until every vCPU has left the guest, and not until all are parked: the caller may hold what another
    /// vCPU needs to finish its access, such as the queue of a unit.
    pub fn halt(&self, stop: Stop) {
        self.request(stop);
        self.kick();
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |_| self.inside.load(Ordering::SeqCst) > 0).unwrap());
    }

    /// While paused: every vCPU does this. Returns when all have.
    pub fn send(&self, errand: Errand) {
        let mut state = self.state.lock().unwrap();
        state.errands += 1;
        (state.errand, state.errands_done) = (errand, 0);
        self.changed.notify_all();
        let under_way = |state: &mut State| state.errands_done < self.vcpus || state.parked < self.vcpus;
        drop(self.changed.wait_while(state, under_way).unwrap());
    }

    /// The vCPUs run, unless a stop was requested meanwhile.
    pub fn resume(&self) {
        let state = self.state.lock().unwrap();
        if state.stop.is_none() {
            self.wanted.store(RUN, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// The vCPU threads end.
    pub fn quit(&self) {
        self.want(QUIT);
        self.kick();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    fn spawn(control: &Arc<Control>, resets: &Arc<AtomicU64>, entries: &Arc<AtomicU64>) -> thread::JoinHandle<()> {
        let (control, resets, entries) = (control.clone(), resets.clone(), entries.clone());
        thread::spawn(move || {
            let mut seen = 0;
            loop {
                match control.next_step(&mut seen) {
                    NextStep::Run => {
                        entries.fetch_add(1, Ordering::Relaxed);
                        thread::yield_now();
                        control.left();
                    }
                    NextStep::Do(errand) => {
                        assert_eq!(errand, Errand::Reset);
                        resets.fetch_add(1, Ordering::Relaxed);
                        control.errand_done();
                    }
                    NextStep::Quit => break,
                }
            }
        })
    }

    #[test]
    fn paused_vcpus_stay_out_and_each_reset_is_done_once_by_each() {
        let control = Arc::new(Control::new(3).unwrap());
        let (resets, entries) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let threads: Vec<_> = (0..3).map(|_| spawn(&control, &resets, &entries)).collect();
        for round in 1..=20 {
            control.resume();
            while entries.load(Ordering::Relaxed) < round {
                thread::yield_now();
            }
            control.pause();
            let inside = entries.load(Ordering::Relaxed);
            control.send(Errand::Reset);
            assert_eq!(resets.load(Ordering::Relaxed), 3 * round);
            assert_eq!(entries.load(Ordering::Relaxed), inside);
        }
        control.quit();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn b11_a_halt_does_not_wait_for_a_vcpu_that_waits_for_the_caller() {
        let control = Arc::new(Control::new(2).unwrap());
        let queue = Arc::new(Mutex::new(()));
        let (halting, halted) = std::sync::mpsc::channel();
        let (begins, began) = std::sync::mpsc::channel();
        let vcpu = |other: bool| {
            let (control, queue, halting, begins) = (control.clone(), queue.clone(), halting.clone(), begins.clone());
            thread::spawn(move || {
                let mut seen = 0;
                assert_eq!(control.next_step(&mut seen), NextStep::Run);
                if other {
                    // In the guest until the halt wants it out.
                    begins.send(()).unwrap();
                    while control.wanted.load(Ordering::SeqCst) == RUN {
                        thread::yield_now();
                    }
                    control.left();
                    drop(queue.lock().unwrap());
                } else {
                    control.left();
                    let _queue = queue.lock().unwrap();
                    control.halt(Stop::Error("it cannot be stopped".into()));
                    assert_eq!(control.inside.load(Ordering::SeqCst), 0);
                    halting.send(()).unwrap();
                }
                assert_eq!(control.next_step(&mut seen), NextStep::Quit);
            })
        };
        let other = vcpu(true);
        control.resume();
        began.recv().unwrap();
        let caller = vcpu(false);
        halted.recv_timeout(std::time::Duration::from_secs(60)).expect("it waits for ever");
        control.pause();
        assert_eq!(control.take_stop(), Some(Stop::Error("it cannot be stopped".into())));
        control.quit();
        other.join().unwrap();
        caller.join().unwrap();
    }

    #[test]
    fn the_first_stop_counts_and_holds_the_vcpus() {
        let control = Arc::new(Control::new(1).unwrap());
        let (resets, entries) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        control.request(Stop::PowerOff);
        control.request(Stop::TimeLimit);
        control.resume();
        let thread = spawn(&control, &resets, &entries);
        control.pause();
        assert_eq!(entries.load(Ordering::Relaxed), 0);
        assert_eq!(control.take_stop(), Some(Stop::PowerOff));
        assert_eq!(control.take_stop(), None);
        // A guest that resets itself all the time does not outlive its time limit.
        control.request(Stop::Reset);
        control.request(Stop::TimeLimit);
        control.request(Stop::Reset);
        assert_eq!(control.take_stop(), Some(Stop::TimeLimit));
        control.quit();
        thread.join().unwrap();
    }
}
