//! Time for devices that do something by themselves: a clock, and one thread that calls them when something is due.
//!
//! A device says when it wants to be called next, and wakes the thread when its registers make that sooner. Whatever a
//! guest programs, the thread runs at most once every [`SHORTEST`]: what was due several times in between is done once.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The least time between two rounds of the thread.
pub const SHORTEST: Duration = Duration::from_micros(100);

/// What devices know of the time.
pub trait Clock: Send + Sync {
    /// Time since some moment in the past; it never goes back.
    fn now(&self) -> Duration;
    /// Time since 1970-01-01 UTC, as the host has it; it can be set.
    fn wall(&self) -> Duration;
}

/// The host's clocks.
pub struct HostClock(Instant);

impl HostClock {
    /// A clock that starts now.
    pub fn new() -> Self {
        Self(Instant::now())
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
    fn wall(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// A device that does something at certain moments.
pub trait Timed: Send + Sync {
    /// Does what is due. Gives back when, by [`Clock::now`], something is due next; `None`: nothing until
    /// [`Alarm::ring`]. Called from the thread of [`Timers`], without a lock.
    fn run(&self) -> Option<Duration>;
}

/// Wakes the thread.
#[derive(Default)]
pub struct Alarm {
    state: Mutex<Rung>,
    changed: Condvar,
}

#[derive(Default)]
struct Rung {
    rung: bool,
    ended: bool,
    /// No device is called.
    held: bool,
    /// The devices are being called.
    busy: bool,
}

impl Alarm {
    /// When something is due has changed.
    pub fn ring(&self) {
        self.state.lock().unwrap().rung = true;
        self.changed.notify_all();
    }

    /// Whether it rang since it was asked last.
    #[cfg(test)]
    pub(crate) fn take_rung(&self) -> bool {
        std::mem::take(&mut self.state.lock().unwrap().rung)
    }

    fn end(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_all();
    }

    /// Waits until devices may be called. `false` when the thread is to end.
    fn enter(&self) -> bool {
        let state = self.state.lock().unwrap();
        let mut state = self.changed.wait_while(state, |state| state.held && !state.ended).unwrap();
        state.busy = !state.ended;
        state.busy
    }

    /// They were.
    fn leave(&self) {
        self.state.lock().unwrap().busy = false;
        self.changed.notify_all();
    }

    /// Waits until the alarm rings, or for as long as said. `false` when the thread is to end.
    fn wait(&self, limit: Option<Duration>) -> bool {
        let quiet = |state: &mut Rung| !state.rung && !state.ended;
        let state = self.state.lock().unwrap();
        let mut state = match limit {
            None => self.changed.wait_while(state, quiet).unwrap(),
            Some(limit) => self.changed.wait_timeout_while(state, limit, quiet).unwrap().0,
        };
        state.rung = false;
        !state.ended
    }

    /// Waits for `time`, whatever rings meanwhile. `false` when the thread is to end.
    fn pause(&self, time: Duration) -> bool {
        let state = self.state.lock().unwrap();
        !self.changed.wait_timeout_while(state, time, |state| !state.ended).unwrap().0.ended
    }
}

/// The thread, which ends when this is dropped.
pub struct Timers {
    alarm: Arc<Alarm>,
    thread: Option<JoinHandle<()>>,
}

impl Timers {
    /// Starts the thread for `devices`, which ring `alarm`.
    ///
    /// # Errors
    /// The host has no thread left.
    pub fn start(clock: Arc<dyn Clock>, alarm: Arc<Alarm>, devices: Vec<Arc<dyn Timed>>) -> std::io::Result<Self> {
        let rings = alarm.clone();
        let thread = thread::Builder::new().name("timers".to_owned()).spawn(move || {
            while rings.enter() {
                let next = devices.iter().filter_map(|device| device.run()).min();
                rings.leave();
                let limit = next.map(|at| at.saturating_sub(clock.now()));
                if !rings.pause(SHORTEST) || !rings.wait(limit.map(|limit| limit.saturating_sub(SHORTEST))) {
                    return;
                }
            }
        })?;
        Ok(Self { alarm, thread: Some(thread) })
    }

    /// When this returns no device is called, and none will be, until [`Timers::go_on`].
    pub fn hold(&self) {
        let mut state = self.alarm.state.lock().unwrap();
        state.held = true;
        drop(self.alarm.changed.wait_while(state, |state| state.busy).unwrap());
    }

    /// Devices are called again.
    pub fn go_on(&self) {
        let mut state = self.alarm.state.lock().unwrap();
        (state.held, state.rung) = (false, true);
        drop(state);
        self.alarm.changed.notify_all();
    }
}

impl Drop for Timers {
    fn drop(&mut self) {
        self.alarm.end();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of the timers panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::{self, Sender};

    use super::*;

    /// Always due; tells of each round.
    struct Eager(Mutex<Sender<()>>, AtomicU64);

    impl Timed for Eager {
        fn run(&self) -> Option<Duration> {
            self.1.fetch_add(1, Ordering::Relaxed);
            // Nobody listens any more when the test is over.
            let _ = self.0.lock().unwrap().send(());
            Some(Duration::ZERO)
        }
    }

    /// Due when it is rung.
    struct Quiet(Mutex<Sender<()>>);

    impl Timed for Quiet {
        fn run(&self) -> Option<Duration> {
            let _ = self.0.lock().unwrap().send(());
            None
        }
    }

    #[test]
    fn timers_call_again_and_again_but_not_more_often_than_the_bound() {
        let (sender, rounds) = mpsc::channel();
        let device = Arc::new(Eager(Mutex::new(sender), AtomicU64::new(0)));
        let (clock, start) = (Arc::new(HostClock::new()), Instant::now());
        let timers = Timers::start(clock, Arc::default(), vec![device.clone()]).unwrap();
        for _ in 0..50 {
            rounds.recv().unwrap();
        }
        drop(timers);
        let (rounds, most) = (device.1.load(Ordering::Relaxed), start.elapsed().as_micros() / SHORTEST.as_micros());
        assert!(u128::from(rounds) <= most + 1, "{rounds} of at most {most}");
    }

    #[test]
    fn timers_call_what_rang_and_end_with_their_owner() {
        let (sender, rounds) = mpsc::channel();
        let alarm = Arc::new(Alarm::default());
        let devices: Vec<Arc<dyn Timed>> = vec![Arc::new(Quiet(Mutex::new(sender)))];
        let timers = Timers::start(Arc::new(HostClock::new()), alarm.clone(), devices).unwrap();
        for _ in 0..3 {
            rounds.recv().unwrap();
            alarm.ring();
        }
        rounds.recv().unwrap();
        drop(timers);
        assert!(rounds.recv().is_err(), "the device is gone with its thread");
    }
    #[test]
    fn timers_that_wait_are_woken_once_for_a_ring_and_to_end() {
        // Time for the thread to be waiting; a right one is woken whether or not it is.
        let settle = || thread::sleep(Duration::from_millis(20).max(5 * SHORTEST));
        let (sender, rounds) = mpsc::channel();
        let alarm = Arc::new(Alarm::default());
        let devices: Vec<Arc<dyn Timed>> = vec![Arc::new(Quiet(Mutex::new(sender)))];
        let timers = Timers::start(Arc::new(HostClock::new()), alarm.clone(), devices).unwrap();
        let patient = Duration::from_secs(60);
        rounds.recv_timeout(patient).unwrap();
        settle();
        alarm.ring();
        rounds.recv_timeout(patient).unwrap();
        settle();
        assert!(rounds.try_recv().is_err(), "once");
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            drop(timers);
            ended.send(()).unwrap();
        });
        end.recv_timeout(patient).unwrap();
    }
}
