//! A software device that pins: how it is told that translations go away, and how its answer is waited for.
//!
//! Each has a thread on which it is called, so that one that never returns costs the others no more than its deadline.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use vtd::{IovaRange, Requester};

use super::sync::{Condvar, Deadline, Mutex, inside, lock, start, wait, wait_until};

/// What a client is told.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// The translations of these pages go away, all of which the client has pinned: ascending, disjoint. It is to have
    /// no I/O to them any more and to have unpinned them when it returns.
    Unmap {
        /// The pages, as ranges of IOVAs.
        ranges: Arc<[IovaRange]>,
    },
}

/// How a client hears that what it has pinned goes away (D-3). The client's thread holds it until the handle is
/// dropped: one that needs its [`PinClient`](crate::PinClient) has it by `Weak`, or neither ever goes.
pub trait UnmapNotifier: Send + Sync {
    /// Something is about to happen, and waits until this returns. A kind of notice that the client does not know it
    /// ignores.
    ///
    /// It is called on a thread of the client's own, one notice at a time, while the thread that unmaps has the queue
    /// lock of its unit and waits. So from inside the client may pin, unpin and drop its handle, and call nothing else
    /// of the bridge; nor anything that waits for the queue lock ([`vtd::SpaceListener`] says what does; debug builds
    /// panic, which counts as no answer); nor wait for a vCPU. Pins in what goes away are refused meanwhile.
    fn notify(&self, notice: &Notice);
}

/// What a client may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PinLimits {
    /// Pages that it may have pinned at a time, counted for each IOVA (D-5).
    pub pages: u64,
    /// How long it may take to answer a notice, before it is cut off: more than 0, at most [`PinLimits::MAX_DEADLINE`].
    pub deadline: Duration,
}

impl PinLimits {
    /// The longest deadline.
    pub const MAX_DEADLINE: Duration = Duration::from_secs(60);
}

/// Half of the memory of a small guest, and the deadline of a vfio-user process.
impl Default for PinLimits {
    fn default() -> Self {
        Self { pages: 65_536, deadline: crate::vfio_user::CALL_DEADLINE }
    }
}

/// Whole-run counts of one client, but for the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct PinStats {
    /// Pages that it has pinned now, counted for each IOVA.
    pub pinned_pages: u64,
    /// Pages that it pinned, as often as it did.
    pub pins: u64,
    /// Pins that were refused, by call.
    pub refused: u64,
    /// Notices that it was given.
    pub notices: u64,
    /// Pages that it still had pinned when it had answered, or when its time was over: a bug of the client.
    pub left_pinned: u64,
    /// 1 when it did not answer in time.
    pub late: u64,
}

/// The counters behind [`PinStats`].
#[derive(Default)]
pub(crate) struct PinCounters {
    pub pinned_pages: AtomicU64,
    pub pins: AtomicU64,
    pub refused: AtomicU64,
    pub notices: AtomicU64,
    pub left_pinned: AtomicU64,
    pub late: AtomicU64,
}

impl PinCounters {
    pub fn snapshot(&self) -> PinStats {
        let get = |n: &AtomicU64| n.load(Relaxed);
        PinStats {
            pinned_pages: get(&self.pinned_pages),
            pins: get(&self.pins),
            refused: get(&self.refused),
            notices: get(&self.notices),
            left_pinned: get(&self.left_pinned),
            late: get(&self.late),
        }
    }
}

/// Notices on their way to the client, and its answers.
#[derive(Default)]
struct Post {
    waiting: VecDeque<Notice>,
    posted: u64,
    answered: u64,
    /// The client has left: nobody is told anything any more.
    closed: bool,
    /// Its thread has ended: because it left, or in a panic.
    ended: bool,
}

/// A client.
pub(crate) struct Client {
    pub requester: Requester,
    pub limits: PinLimits,
    pub counters: PinCounters,
    post: Mutex<Post>,
    changed: Condvar,
}

/// Which notice an answer is waited for.
pub(crate) struct Ticket(u64);

/// The thread of a client ends, however it does.
struct Ended(Arc<Client>);

impl Drop for Ended {
    fn drop(&mut self) {
        lock(&self.0.post).ended = true;
        self.0.changed.notify_all();
    }
}

impl Client {
    /// A client with its thread.
    pub fn start(requester: Requester, notifier: Arc<dyn UnmapNotifier>, limits: PinLimits) -> io::Result<Arc<Self>> {
        let client = Arc::new(Self {
            requester,
            limits,
            counters: PinCounters::default(),
            post: Mutex::new(Post::default()),
            changed: Condvar::new(),
        });
        let ended = Ended(Arc::clone(&client));
        start(format!("pin {}", requester.sid), move || ended.0.serve(&*notifier))?;
        Ok(client)
    }

    fn serve(&self, notifier: &dyn UnmapNotifier) {
        let _inside = inside();
        let mut post = lock(&self.post);
        while !post.closed {
            let Some(notice) = post.waiting.pop_front() else {
                post = wait(&self.changed, post);
                continue;
            };
            drop(post);
            notifier.notify(&notice);
            post = lock(&self.post);
            post.answered += 1;
            self.changed.notify_all();
        }
    }

    /// Its thread ends, after the notice that it may be at.
    pub fn close(&self) {
        lock(&self.post).closed = true;
        self.changed.notify_all();
    }

    /// Gives it a notice. Does not wait.
    pub fn post(&self, notice: Notice) -> Ticket {
        let mut post = lock(&self.post);
        post.waiting.push_back(notice);
        post.posted += 1;
        self.counters.notices.fetch_add(1, Relaxed);
        self.changed.notify_all();
        Ticket(post.posted)
    }

    /// Waits for the answer: whether it came in time. Who has left answers with that.
    pub fn wait(&self, ticket: &Ticket, deadline: Deadline) -> bool {
        let mut post = lock(&self.post);
        while post.answered < ticket.0 && !post.ended {
            match wait_until(&self.changed, post, deadline) {
                Some(again) => post = again,
                None => {
                    self.counters.late.store(1, Relaxed);
                    return false;
                }
            }
        }
        true
    }
}
