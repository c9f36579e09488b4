//! The transfers of a `pinblk` (D): threads that read a file into pinned pages of the guest, in flight in the host's
//! kernel while the guest unmaps.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use devices::pinblk::{AsyncReads, Done, Read};
use vfio_bridge::{Notice, PinClient, PinError, Pinned, PinnedPage, RegisterClientError, Requests, UnmapNotifier};
use vtd::{Iova, IovaRange, Perm};

use super::Error;

/// Bytes that are pinned and read at a time.
const CHUNK: u64 = 1 << 20;
/// Threads, and so chunks in flight.
const WORKERS: usize = 4;
/// Pages that all of them can have pinned.
pub const PAGES: u64 = WORKERS as u64 * CHUNK / PAGE_SIZE;
const PAGE_SIZE: u64 = 4096;
/// Bytes of the file that a device has which is given none.
const MEMORY_SIZE: u64 = 4 << 20;
/// What is added to each offset there.
const PATTERN: u64 = 0x5049_4e00 << 32;
/// How long a device that is stopped for good is waited for.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// Where the bytes come from. `size` is a multiple of 4096, not 0.
pub trait Source: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;
    /// Reads what is at `offset` into the pages, from byte `skip` on, no further than their end. How many bytes; at
    /// least one.
    fn read(&self, pinned: &Pinned, skip: u64, offset: u64) -> io::Result<u64>;
}

/// A file.
pub struct FileSource {
    file: File,
    size: u64,
}

impl FileSource {
    /// The file at `path`: a regular one, or a block device. What is behind its last whole page is not read. `direct`:
    /// past the page cache (`O_DIRECT`), so that the kernel pins the guest's pages, too, until the disk wrote them.
    pub fn open(path: &Path, direct: bool) -> io::Result<Self> {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a file nor a block device"));
        }
        let end = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        Self::of(file, end / PAGE_SIZE * PAGE_SIZE)
    }

    /// A file in memory, each eight bytes of which have their offset and a pattern that is never 0.
    pub fn in_memory() -> io::Result<Self> {
        // SAFETY: the name is a C string literal.
        let fd = unsafe { libc::memfd_create(c"causeway-pinblk".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: memfd_create returned this descriptor just now, nobody else has it.
        let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        let content: Vec<u8> = (0..MEMORY_SIZE).step_by(8).flat_map(|at| (at + PATTERN).to_le_bytes()).collect();
        file.write_all_at(&content, 0)?;
        Self::of(file, MEMORY_SIZE)
    }

    fn of(file: File, size: u64) -> io::Result<Self> {
        match size {
            0 => Err(io::Error::new(io::ErrorKind::InvalidInput, "it has less than 4096 bytes")),
            size => Ok(Self { file, size }),
        }
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, pinned: &Pinned, skip: u64, offset: u64) -> io::Result<u64> {
        let most = self.size.saturating_sub(offset);
        let mut left = most;
        let mut parts: Vec<libc::iovec> = Vec::with_capacity(pinned.pages.len());
        for (index, PinnedPage { hva, .. }) in pinned.pages.iter().enumerate().skip((skip / PAGE_SIZE) as usize) {
            let from = if index as u64 == skip / PAGE_SIZE { skip % PAGE_SIZE } else { 0 };
            let len = left.min(PAGE_SIZE - from);
            if len == 0 {
                break;
            }
            parts.push(libc::iovec { iov_base: (hva + from) as *mut libc::c_void, iov_len: len as usize });
            left -= len;
        }
        // SAFETY: each part lies in a page that is pinned for writing and stays so until the caller, which has `pinned`
        // and with it the memory, unpins it after this returned; it is the guest's, so nobody here has a reference.
        let read = unsafe { libc::preadv(self.file.as_raw_fd(), parts.as_ptr(), parts.len() as i32, offset as i64) };
        match read {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            1.. => Ok(read as u64),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A transfer that goes on.
struct Job {
    read: Read,
    /// Bytes that chunks were made of.
    given: u64,
    failed: bool,
    done: Option<Done>,
}

#[derive(Default)]
struct State {
    job: Option<Job>,
    /// Chunks that are, or are about to be, pinned.
    in_flight: Vec<IovaRange>,
    arrived: u64,
    /// Nothing is begun any more.
    ended: bool,
    /// The threads end.
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    source: Box<dyn Source>,
    client: OnceLock<Weak<PinClient>>,
    outside: Outside,
}

/// What the transfers of a device need from outside.
pub struct Outside {
    /// Who is told what could not be pinned.
    pub requests: Box<dyn Requests>,
    /// How long a transfer may take to end when the device is stopped.
    pub deadline: Duration,
    /// Stops the machine, because a transfer does not end.
    pub stop_machine: Box<dyn Fn(&str) + Send + Sync>,
}

/// The transfers of one device.
pub struct PinnedReads {
    shared: Arc<Shared>,
    client: Arc<PinClient>,
}

/// The guest unmaps: waits until the chunks in flight there have arrived and are unpinned. None of them can be pinned
/// again, so this ends.
impl UnmapNotifier for Shared {
    fn notify(&self, notice: &Notice) {
        // There is nothing to do for a notice that is not known.
        if let Notice::Unmap { ranges } = notice {
            let touched = |state: &mut State| {
                let hit = |chunk: &IovaRange| ranges.iter().any(|range| range.intersection(*chunk).is_some());
                state.in_flight.iter().any(hit)
            };
            drop(self.changed.wait_while(self.lock(), touched).unwrap());
        }
    }
}

impl PinnedReads {
    /// Reads from `source`. `register` makes a client with this notifier.
    pub fn new(
        source: Box<dyn Source>,
        outside: Outside,
        register: impl FnOnce(Arc<dyn UnmapNotifier>) -> Result<PinClient, RegisterClientError>,
    ) -> Result<Arc<Self>, Error> {
        let (state, changed, client) = (Mutex::default(), Condvar::new(), OnceLock::new());
        let shared = Arc::new(Shared { state, changed, source, client, outside });
        let client = Arc::new(register(shared.clone())?);
        let _ = shared.client.set(Arc::downgrade(&client));
        let reads = Self { shared, client };
        for _ in 0..WORKERS {
            let shared = reads.shared.clone();
            // Nobody waits for it: a read that never ends must not keep the process.
            let thread = std::thread::Builder::new().name("pinblk".to_owned()).spawn(move || shared.work());
            thread.map_err(Error::PinBlkThread)?;
        }
        Ok(Arc::new(reads))
    }

    /// Who pins, for statistics.
    pub fn client(&self) -> &Arc<PinClient> {
        &self.client
    }
}

impl Drop for PinnedReads {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            if let Some((done, arrived)) = state.take_ended() {
                drop(state);
                done(arrived);
                state = self.lock();
            }
            let Some((range, offset)) = state.next_chunk() else {
                if state.closed {
                    return;
                }
                state = self.changed.wait(state).unwrap();
                continue;
            };
            // Before it is pinned: a notice that comes in between waits for it.
            state.in_flight.push(range);
            drop(state);
            let arrived = self.transfer(range, offset);
            state = self.lock();
            state.in_flight.retain(|other| *other != range);
            state.arrived += arrived;
            let whole = arrived == range.last - range.first + 1;
            if let Some(job) = &mut state.job {
                job.failed |= !whole;
            }
            self.changed.notify_all();
        }
    }

    /// Reads a chunk into its pages, which are pinned meanwhile. How many of its bytes arrived.
    fn transfer(&self, range: IovaRange, offset: u64) -> u64 {
        let Some(client) = self.client.get().and_then(Weak::upgrade) else { return 0 };
        let pages: Vec<u64> = (range.first..=range.last).step_by(PAGE_SIZE as usize).collect();
        let pinned = match client.pin(&pages, Perm::Write) {
            Ok(pinned) => pinned,
            Err(e) => {
                log::debug!("pinblk: {range}: {e}");
                if let PinError::NotMapped(page) | PinError::Denied(page) | PinError::GoingAway(page) = e {
                    self.outside.requests.blocked(Iova(page), true);
                }
                return 0;
            }
        };
        let len = range.last - range.first + 1;
        let mut arrived = 0;
        while arrived < len {
            match self.source.read(&pinned, arrived, (offset + arrived) % self.source.size()) {
                Ok(bytes) => arrived += bytes,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    log::warn!("pinblk: the file could not be read: {e}");
                    break;
                }
            }
        }
        if let Err(e) = client.unpin(&pages) {
            // The bridge revoked them because this took too long.
            log::error!("pinblk: {range} was not pinned any more when its transfer ended: {e}");
        }
        arrived
    }
}

impl State {
    fn next_chunk(&mut self) -> Option<(IovaRange, u64)> {
        let job = self.job.as_mut().filter(|job| !job.failed && job.given < job.read.len)?;
        let (first, offset) = (job.read.iova.0 + job.given, job.read.offset % (1 << 62) + job.given);
        let len = CHUNK.min(job.read.len - job.given);
        job.given += len;
        Some((IovaRange::new(first, first + (len - 1)), offset))
    }

    /// The transfer, if nothing of it is left.
    fn take_ended(&mut self) -> Option<(Done, bool)> {
        let over = |job: &mut Job| self.in_flight.is_empty() && (job.failed || job.given == job.read.len);
        let job = self.job.take_if(over)?;
        job.done.map(|done| (done, !job.failed))
    }
}

impl AsyncReads for PinnedReads {
    fn begin(&self, read: Read, done: Done) {
        let mut state = self.shared.lock();
        let failed = state.ended;
        state.job = Some(Job { read, given: 0, failed, done: Some(done) });
        state.arrived = 0;
        self.shared.changed.notify_all();
    }

    fn stop(&self) {
        let mut state = self.shared.lock();
        if let Some(job) = &mut state.job {
            (job.failed, job.done) = (true, None);
        }
        // What did not end when it was ended for good has stopped the machine.
        let goes_on = |state: &mut State| !state.in_flight.is_empty() && !state.ended;
        let Outside { deadline, stop_machine, .. } = &self.shared.outside;
        let mut over = self.shared.changed.wait_timeout_while(state, *deadline, goes_on).unwrap().0;
        over.job = None;
        if goes_on(&mut over) {
            over.ended = true;
            drop(over);
            stop_machine("a read of its file does not end");
        }
    }

    fn end_for_good(&self) -> Result<(), String> {
        let mut state = self.shared.lock();
        state.ended = true;
        if let Some(job) = &mut state.job {
            job.failed = true;
        }
        self.shared.changed.notify_all();
        let waited = self.shared.changed.wait_timeout_while(state, LAST_WAIT, |state| !state.in_flight.is_empty());
        match waited.unwrap().0.in_flight.first() {
            None => Ok(()),
            Some(range) => Err(format!("a read of its file into {range} does not end")),
        }
    }

    fn arrived(&self) -> u64 {
        self.shared.lock().arrived
    }

    fn pinned_pages(&self) -> u64 {
        self.client.stats().pinned_pages
    }
}

#[cfg(test)]
#[path = "pinned_reads_test.rs"]
mod pinned_reads_test;
