//! When bells hang: what is looked at, and for how long they do not when it says that they cost more than exits.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::SPIN;

/// How long bells stay down, the first time.
pub(super) const REST: Duration = Duration::from_secs(1);
/// The longest time.
const LONGEST_REST: Duration = Duration::from_secs(64);
/// Bells that hung for so long were worth it: the next rest is the first again.
const WORTH_IT: Duration = Duration::from_secs(10);
/// What is counted is looked at after so many tails.
const LOOK: u32 = 256;
/// How long waiting for processors is measured.
const WINDOW: Duration = Duration::from_millis(10);

/// What is to be done with the bells that hang.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// Nothing.
    Keep,
    /// They cost more than exits.
    TakeDown,
}

/// What was seen.
pub(super) struct Policy {
    /// Bells hang.
    hanging: bool,
    /// They may hang again then.
    rest_until: Instant,
    rest: Duration,
    hung_at: Instant,
    /// The last tail that was an exit.
    last: Option<Instant>,
    /// Tails since the last look; and those that came soon behind another, or, where bells hang, found the thread
    /// asleep.
    tails: u32,
    counted: u32,
    /// Since when waiting is measured, and how much there had been.
    window: Option<(Instant, Duration)>,
}

impl Policy {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            hanging: false,
            rest_until: now,
            rest: REST,
            hung_at: now,
            last: None,
            tails: 0,
            counted: 0,
            window: None,
        }
    }

    /// A tail was an exit. Whether bells are wanted.
    pub(super) fn tail_was_an_exit(&mut self, now: Instant) -> bool {
        if self.hanging {
            // The queue was turned off meanwhile.
            self.hanging = false;
            (self.tails, self.counted) = (0, 0);
        }
        let soon = self.last.replace(now).is_some_and(|last| now.saturating_duration_since(last) < SPIN);
        self.tails += 1;
        self.counted += u32::from(soon);
        if self.tails < LOOK {
            return false;
        }
        let dense = self.counted >= self.tails / 4 * 3;
        (self.tails, self.counted) = (0, 0);
        dense && now >= self.rest_until
    }

    /// A bell was answered at `now`, by a thread that had been `asleep`. `waited` says for how long vCPUs and this
    /// thread waited for a processor so far.
    pub(super) fn tail_was_taken(
        &mut self,
        now: Instant,
        asleep: bool,
        waited: impl FnOnce() -> Option<Duration>,
    ) -> Verdict {
        if !self.hanging {
            return Verdict::Keep;
        }
        self.tails += 1;
        self.counted += u32::from(asleep);
        let sparse = self.counted > LOOK / 4;
        if self.tails >= LOOK {
            (self.tails, self.counted) = (0, 0);
        }
        let mut crowded = false;
        match self.window {
            Some((since, before)) if now.saturating_duration_since(since) >= WINDOW => {
                let waited = waited();
                crowded = waited.is_none_or(|waited| is_much(waited.saturating_sub(before), now - since));
                self.window = waited.map(|waited| (now, waited));
            }
            Some(_) => {}
            None => self.window = waited().map(|waited| (now, waited)),
        }
        if !(sparse || crowded) {
            return Verdict::Keep;
        }
        self.rest_from(now);
        Verdict::TakeDown
    }

    /// Bells hang from now on.
    pub(super) fn begin(&mut self, now: Instant) {
        self.hanging = true;
        self.hung_at = now;
        (self.tails, self.counted, self.window) = (0, 0, None);
    }

    /// They do not, for a while: it was no time for them, or it is none any more.
    pub(super) fn rest_from(&mut self, now: Instant) {
        if self.hanging && now.saturating_duration_since(self.hung_at) >= WORTH_IT {
            self.rest = REST;
        }
        self.hanging = false;
        self.rest_until = now + self.rest;
        self.rest = (self.rest * 2).min(LONGEST_REST);
        (self.tails, self.counted, self.window, self.last) = (0, 0, None, None);
    }
}

/// A tenth of the time.
fn is_much(waited: Duration, of: Duration) -> bool {
    waited * 10 > of
}

/// Spins for a moment, as the thread that serves the queue would: whether this thread and the vCPUs had the processors
/// that they wanted meanwhile.
pub(super) fn has_room(waiting: &mut Waiting) -> bool {
    if thread::available_parallelism().map_or(1, usize::from) == 1 {
        return false;
    }
    let (since, before) = (Instant::now(), waiting.now());
    while since.elapsed() < WINDOW {
        std::hint::spin_loop();
    }
    let waited = before.zip(waiting.now()).map(|(before, after)| after.saturating_sub(before));
    waited.is_some_and(|waited| !is_much(waited, since.elapsed()))
}

/// What vCPUs and this thread waited for processors.
#[derive(Default)]
pub(super) struct Waiting(Vec<PathBuf>);

impl Waiting {
    /// So far, together; `None` where the kernel does not say.
    pub(super) fn now(&mut self) -> Option<Duration> {
        if self.0.is_empty() {
            self.0.push("/proc/thread-self/schedstat".into());
            let tasks = fs::read_dir("/proc/self/task").ok()?.flatten().map(|task| task.path());
            let is_vcpu = |task: &PathBuf| fs::read_to_string(task.join("comm")).is_ok_and(|c| c.starts_with("vcpu"));
            self.0.extend(tasks.filter(is_vcpu).map(|task| task.join("schedstat")));
        }
        self.0.iter().map(|file| of_schedstat(&fs::read_to_string(file).ok()?)).sum()
    }
}

/// The time on a run queue: the second number, in nanoseconds. A kernel that does not count has zeros.
fn of_schedstat(text: &str) -> Option<Duration> {
    let mut numbers = text.split_ascii_whitespace().map(|number| number.parse::<u64>().ok());
    let (ran, waited) = (numbers.next()??, numbers.next()??);
    (ran > 0).then(|| Duration::from_nanos(waited))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAIL: Duration = Duration::from_micros(10);

    fn dense(policy: &mut Policy, now: &mut Instant) -> bool {
        (0..LOOK + 8).any(|_| {
            *now += TAIL;
            policy.tail_was_an_exit(*now)
        })
    }

    #[test]
    fn a6_bells_are_wanted_where_tails_follow_each_other_and_not_during_a_rest() {
        let mut now = Instant::now();
        let mut policy = Policy::new(now);
        assert!(!(0..4 * LOOK).any(|_| {
            now += 2 * SPIN;
            policy.tail_was_an_exit(now)
        }));
        assert!(dense(&mut policy, &mut now));
        policy.rest_from(now);
        assert!(!dense(&mut policy, &mut now));
        now += REST;
        assert!(dense(&mut policy, &mut now));
    }

    #[test]
    fn a6_bells_come_down_when_the_thread_sleeps_between_tails() {
        let mut now = Instant::now();
        let mut policy = Policy::new(now);
        policy.begin(now);
        let mut taken = |asleep| {
            now += TAIL;
            policy.tail_was_taken(now, asleep, || Some(Duration::ZERO))
        };
        // One of five is no reason.
        assert!((0..8 * LOOK).all(|n| taken(n % 5 == 0) == Verdict::Keep));
        assert!((0..LOOK).any(|_| taken(true) == Verdict::TakeDown));
    }

    #[test]
    fn a6_bells_come_down_when_processors_are_waited_for_and_rests_double() {
        let mut now = Instant::now();
        let mut policy = Policy::new(now);
        let mut rests = Vec::new();
        for _ in 0..9 {
            policy.begin(now);
            let mut waited = Duration::ZERO;
            // A little is no reason.
            for _ in 0..4 * LOOK {
                now += TAIL;
                waited += TAIL / 20;
                assert_eq!(policy.tail_was_taken(now, false, || Some(waited)), Verdict::Keep);
            }
            assert!((0..16 * LOOK).any(|_| {
                now += TAIL;
                waited += TAIL / 5;
                policy.tail_was_taken(now, false, || Some(waited)) == Verdict::TakeDown
            }));
            rests.push((policy.rest_until - now).as_secs());
        }
        assert_eq!(rests, [1, 2, 4, 8, 16, 32, 64, 64, 64]);
        // What was worth it begins anew.
        policy.begin(now);
        now += WORTH_IT;
        policy.rest_from(now);
        assert_eq!(policy.rest_until - now, REST);
    }

    #[test]
    fn a6_a_kernel_that_does_not_say_what_waits_gets_no_bells() {
        assert_eq!(of_schedstat("0 0 0\n"), None);
        assert_eq!(of_schedstat("12 3000 4\n"), Some(Duration::from_nanos(3000)));
        assert_eq!(of_schedstat(""), None);
        let now = Instant::now();
        let mut policy = Policy::new(now);
        policy.begin(now);
        policy.window = Some((now, Duration::ZERO));
        assert_eq!(policy.tail_was_taken(now + WINDOW, false, || None), Verdict::TakeDown);
    }
}
