//! What a function may reach, by file: the mappings that one side told the other of. Both sides keep this book: the
//! server to carry out DMA, the client to hold requests by message to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vtd::{IovaRange, Perm};

use crate::bridge::guest_map::PAGE_SIZE;

/// Nothing that is granted answers; so many bytes before it were transferred.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Missing(pub usize);

/// One mapping.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    pub last: u64,
    pub perm: Perm,
    /// The file of the memory; without one it is reached by message only.
    pub file: Option<Arc<File>>,
    /// Where its first byte is in the file.
    pub offset: u64,
}

/// All mappings of a function, by their first IOVA.
#[derive(Default)]
pub(super) struct Granted {
    grants: RwLock<BTreeMap<u64, Grant>>,
    logs: AtomicBool,
    /// While it logs: pages that were written, by IOVA, also where nothing is granted any more. It has no more than the
    /// pages that were granted since it was read.
    log: Mutex<BTreeSet<u64>>,
}

impl Granted {
    fn shared(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Grant>> {
        self.grants.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Grant>> {
        self.grants.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn len(&self) -> u64 {
        self.shared().len() as u64
    }

    /// Grants `grant` from `first` on. `false`, and nothing is granted, when something is there already.
    pub fn insert(&self, first: u64, grant: Grant) -> bool {
        let mut grants = self.exclusive();
        let before = grants.range(..=grant.last).next_back();
        if before.is_some_and(|(_, other)| other.last >= first) {
            return false;
        }
        grants.insert(first, grant);
        true
    }

    /// Takes back everything in `first..=last`; waits for accesses that are under way. `None`, and nothing is taken
    /// back, when a mapping lies only partly inside.
    pub fn remove(&self, first: u64, last: u64) -> Option<Vec<Range<u64>>> {
        let mut grants = self.exclusive();
        let reaches_in = grants.range(..first).next_back().is_some_and(|(_, grant)| grant.last >= first);
        let inside: Vec<(u64, u64)> = grants.range(first..=last).map(|(first, grant)| (*first, grant.last)).collect();
        if reaches_in || inside.last().is_some_and(|(_, end)| *end > last) {
            return None;
        }
        // No mapping ends at 2^64 (`Limits`), so each end has a successor.
        inside.iter().for_each(|(first, _)| drop(grants.remove(first)));
        Some(inside.into_iter().map(|(first, last)| first..last + 1).collect())
    }

    /// What is granted in `first..=last`, whole mappings.
    pub fn within(&self, first: u64, last: u64) -> Vec<IovaRange> {
        let grants = self.shared();
        grants.range(first..=last).map(|(first, grant)| IovaRange { first: *first, last: grant.last }).collect()
    }

    /// Takes everything back.
    pub fn clear(&self) {
        self.exclusive().clear();
        self.stop_log();
    }

    /// Reads all of `data` at `iova`.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Missing> {
        self.pieces(iova, data.len(), Perm::readable, |file, at, range| file.read_exact_at(&mut data[range], at))
    }

    /// Writes all of `data` at `iova`.
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Missing> {
        self.pieces(iova, data.len(), Perm::writable, |file, at, range| {
            let (first, len) = (iova + range.start as u64, range.len() as u64);
            let written = file.write_all_at(&data[range], at);
            // Whoever takes the mapping back waits for this, too, and finds it in the log. A part may be written.
            self.note(first, len);
            written
        })
    }

    /// What is written is logged from now on; nothing is in the log yet.
    pub fn start_log(&self) {
        self.log().clear();
        self.logs.store(true, Ordering::SeqCst);
    }

    /// Nothing is logged any more.
    pub fn stop_log(&self) {
        self.logs.store(false, Ordering::SeqCst);
        self.log().clear();
    }

    /// Whether it logs.
    pub fn logs(&self) -> bool {
        self.logs.load(Ordering::SeqCst)
    }

    /// The pages of `range` that were written since the last time.
    pub fn take_log(&self, range: IovaRange) -> impl Iterator<Item = IovaRange> {
        let mut log = self.log();
        let first = range.first - range.first % PAGE_SIZE;
        let found: Vec<u64> = log.range(first..=range.last).copied().collect();
        for page in &found {
            log.remove(page);
        }
        found.into_iter().map(|page| IovaRange { first: page, last: page + (PAGE_SIZE - 1) })
    }

    fn log(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, iova: u64, len: u64) {
        if self.logs.load(Ordering::Relaxed) && len > 0 {
            let pages = iova / PAGE_SIZE..=(iova + (len - 1)) / PAGE_SIZE;
            self.log().extend(pages.map(|page| page * PAGE_SIZE));
        }
    }

    fn pieces(
        &self,
        iova: u64,
        len: usize,
        allowed: impl Fn(Perm) -> bool,
        mut access: impl FnMut(&File, u64, Range<usize>) -> io::Result<()>,
    ) -> Result<(), Missing> {
        let mut done = 0;
        while done < len {
            let missing = Missing(done);
            let at = iova.checked_add(done as u64).ok_or(missing)?;
            // Held during the access: whoever takes the mapping back waits for it.
            let grants = self.shared();
            let grant = grants.range(..=at).next_back().filter(|(_, grant)| grant.last >= at && allowed(grant.perm));
            let (first, grant) = grant.ok_or(missing)?;
            let file = grant.file.as_ref().ok_or(missing)?;
            let rest = usize::try_from(grant.last - at).unwrap_or(usize::MAX).saturating_add(1);
            let end = len.min(done.saturating_add(rest));
            access(file, grant.offset + (at - first), done..end).map_err(|_| missing)?;
            done = end;
        }
        Ok(())
    }
}
