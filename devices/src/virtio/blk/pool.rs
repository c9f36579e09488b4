//! Threads that carry out jobs at the same time, for a device whose worker gives them and takes what came of them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Jobs that can be under way at a time: one a thread, so that none waits for a thread.
pub const MOST: usize = 8;

type CarryOut<J, R> = dyn Fn(J) -> R + Send + Sync;

/// The threads. They begin as they are needed, and end with this.
pub struct Pool<J, R> {
    shared: Arc<Shared<J, R>>,
    threads: Vec<JoinHandle<()>>,
    /// Jobs that were begun, and whose results nobody took.
    under_way: usize,
}

struct Shared<J, R> {
    state: Mutex<State<J, R>>,
    changed: Condvar,
    /// Signalled for each result.
    ended: EventFd,
    carry_out: Box<CarryOut<J, R>>,
}

struct State<J, R> {
    jobs: VecDeque<J>,
    results: Vec<R>,
    /// Threads that wait for a job.
    idle: usize,
    closed: bool,
}

impl<J, R> Shared<J, R> {
    fn lock(&self) -> MutexGuard<'_, State<J, R>> {
        self.state.lock().unwrap()
    }

    fn end(&self, result: R) {
        self.lock().results.push(result);
        self.changed.notify_all();
        // A counter that is full wakes as well.
        let _ = self.ended.write(1);
    }

    /// What a thread does.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                self.end((self.carry_out)(job));
                state = self.lock();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                state = self.changed.wait(state).unwrap();
                state.idle -= 1;
            }
        }
    }
}

impl<J: Send + 'static, R: Send + 'static> Pool<J, R> {
    /// Of threads that do `carry_out` with each job.
    ///
    /// # Errors
    /// There is no file to signal results with.
    pub fn new(carry_out: impl Fn(J) -> R + Send + Sync + 'static) -> io::Result<Self> {
        let state = State { jobs: VecDeque::new(), results: Vec::new(), idle: 0, closed: false };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            ended: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            carry_out: Box::new(carry_out),
        };
        Ok(Self { shared: Arc::new(shared), threads: Vec::new(), under_way: 0 })
    }

    /// Signalled when a job has ended.
    pub fn ended(&self) -> RawFd {
        self.shared.ended.as_raw_fd()
    }

    /// Whether a job is under way, or its result was not taken.
    pub fn is_busy(&self) -> bool {
        self.under_way > 0
    }

    /// Whether another job can begin.
    pub fn has_room(&self) -> bool {
        self.under_way < MOST
    }

    /// Begins `job`. Where the host gives no thread at all, this carries it out.
    pub fn begin(&mut self, job: J) {
        debug_assert!(self.has_room());
        self.under_way += 1;
        let mut state = self.shared.lock();
        if state.idle <= state.jobs.len() && self.threads.len() < MOST {
            let shared = self.shared.clone();
            match std::thread::Builder::new().name("virtio-blk-io".into()).spawn(move || shared.run()) {
                Ok(thread) => self.threads.push(thread),
                Err(e) if self.threads.is_empty() => {
                    log::warn!("no thread for the I/O of a disk: {e}");
                    drop(state);
                    return self.shared.end((self.shared.carry_out)(job));
                }
                Err(_) => {}
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// What came of the jobs that have ended since the last time.
    pub fn take(&mut self) -> Vec<R> {
        let _ = self.shared.ended.read();
        let results = std::mem::take(&mut self.shared.lock().results);
        self.under_way -= results.len();
        results
    }

    /// Waits until no job is under way; what came of them.
    pub fn finish(&mut self) -> Vec<R> {
        let under_way = self.under_way;
        drop(self.shared.changed.wait_while(self.shared.lock(), |state| state.results.len() < under_way).unwrap());
        self.take()
    }
}

impl<J, R> Drop for Pool<J, R> {
    fn drop(&mut self) {
        // A lock that a panic of a thread has poisoned says nothing new.
        if let Ok(mut state) = self.shared.state.lock() {
            state.closed = true;
        }
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    #[test]
    fn h4_as_many_jobs_as_there_are_threads_go_at_the_same_time_and_end_with_the_pool() {
        let (together, ended) = (Arc::new(Barrier::new(MOST)), Arc::new(AtomicUsize::new(0)));
        let mut pool = Pool::new({
            let (together, ended) = (together.clone(), ended.clone());
            move |job: usize| {
                // Ends only if all of them are here.
                together.wait();
                ended.fetch_add(1, Ordering::SeqCst);
                job * 10
            }
        })
        .unwrap();
        for round in 1..=3 {
            for job in 0..MOST {
                assert!(pool.has_room());
                pool.begin(job);
            }
            assert!(!pool.has_room() && pool.is_busy());
            let mut results = pool.finish();
            results.sort_unstable();
            assert_eq!(results, (0..MOST).map(|job| job * 10).collect::<Vec<_>>());
            assert!(pool.has_room() && !pool.is_busy());
            assert_eq!(pool.threads.len(), MOST);
            assert_eq!(ended.load(Ordering::SeqCst), round * MOST);
        }
        assert!(pool.finish().is_empty());
        for job in 0..MOST {
            pool.begin(job);
        }
        drop(pool);
        assert_eq!((ended.load(Ordering::SeqCst), Arc::strong_count(&ended)), (4 * MOST, 1));
    }
    #[test]
    fn h4_a_result_that_was_taken_wakes_nobody_again() {
        let mut pool = Pool::new(|job: u32| job).unwrap();
        let signalled = Epoll::new().unwrap();
        signalled.ctl(ControlOperation::Add, pool.ended(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        let events = |timeout| signalled.wait(timeout, &mut [EpollEvent::default()]).unwrap();
        for job in 0..3 {
            pool.begin(job);
            assert_eq!(events(-1), 1);
            assert_eq!(pool.take(), [job]);
            assert_eq!(events(0), 0);
        }
    }

    #[test]
    fn h4_a_job_gets_a_thread_where_those_that_wait_have_jobs_already() {
        for _ in 0..50 {
            let gate = Arc::new(Mutex::new(()));
            let mut pool = Pool::new({
                let gate = gate.clone();
                move |()| drop(gate.lock().unwrap())
            })
            .unwrap();
            pool.begin(());
            pool.finish();
            while pool.shared.lock().idle == 0 {
                std::thread::yield_now();
            }
            // The one thread that waits may not have taken the first when the second comes.
            let _shut = gate.lock().unwrap();
            pool.begin(());
            pool.begin(());
            assert_eq!(pool.threads.len(), 2);
        }
    }
}
