//! What a function may reach, by file: the mappings that one side told the other of. Both sides keep this book: the
//! server to carry out DMA, the client to hold requests by message to it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vtd::Perm;

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
pub(super) struct Granted(RwLock<BTreeMap<u64, Grant>>);

impl Granted {
    fn shared(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Grant>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Grant>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
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

    /// Takes everything back.
    pub fn clear(&self) {
        self.exclusive().clear();
    }

    /// Reads all of `data` at `iova`.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Missing> {
        self.pieces(iova, data.len(), Perm::readable, |file, at, range| file.read_exact_at(&mut data[range], at))
    }

    /// Writes all of `data` at `iova`.
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Missing> {
        self.pieces(iova, data.len(), Perm::writable, |file, at, range| file.write_all_at(&data[range], at))
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
