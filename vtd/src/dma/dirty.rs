//! Which guest memory this process wrote: emulated DMA, and what the unit itself writes, such as the status of a wait
//! descriptor (E-1). It is the bitmap of a region of guest memory ([`vm_memory::bitmap`]), so every access by way of
//! that memory is in it, whoever makes it; a session's, too, page by page.
//!
//! There is no window as a host's IOMMU has it (E-3): a write marks its pages while its session is open, and an
//! invalidation waits for sessions. What vCPUs write is not in it: that is KVM's log.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use super::endpoint::PAGE;

/// The dirty pages of a region of guest memory. While it is off, a write costs one load more. Clones are the same log.
#[derive(Clone, Debug, Default)]
pub struct DirtyLog(Arc<Pages>);

#[derive(Debug, Default)]
struct Pages {
    on: AtomicBool,
    /// One bit a page of 4 KiB.
    words: Box<[AtomicU64]>,
}

impl DirtyLog {
    /// Writes are noted from now on; nothing is dirty yet, if it was off.
    pub fn start(&self) {
        if !self.0.on.load(Ordering::SeqCst) {
            self.take().for_each(drop);
            self.0.on.store(true, Ordering::SeqCst);
        }
    }

    /// No more writes are noted.
    pub fn stop(&self) {
        self.0.on.store(false, Ordering::SeqCst);
    }

    /// What is dirty, 64 pages of 4 KiB a word, the first in the lowest bit; what the iterator has passed is clean. A
    /// write that is not in it yet is in the next one.
    pub fn take(&self) -> impl Iterator<Item = u64> + '_ {
        // Who sees a bit sees what was written before it was set.
        self.0.words.iter().map(|word| word.swap(0, Ordering::AcqRel))
    }

    fn mark(&self, offset: usize, len: usize) {
        if !self.0.on.load(Ordering::Relaxed) || len == 0 {
            return;
        }
        let page = |byte: usize| byte as u64 / PAGE;
        let (mut at, last) = (page(offset), page(offset.saturating_add(len - 1)));
        while at <= last {
            let end = last.min(at | 63);
            let bits = (u64::MAX >> (63 - (end - at))) << (at % 64);
            let Some(word) = self.0.words.get((at / 64) as usize) else { return };
            // Also where the bits are set: a reader that takes them in between must see what was written before.
            word.fetch_or(bits, Ordering::AcqRel);
            at = end + 1;
        }
    }

    fn is_dirty(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE;
        let word = self.0.words.get((page / 64) as usize).map_or(0, |word| word.load(Ordering::Acquire));
        word & (1 << (page % 64)) != 0
    }
}

impl NewBitmap for DirtyLog {
    fn with_len(len: usize) -> Self {
        let words = (len as u64).div_ceil(64 * PAGE);
        Self(Arc::new(Pages { on: AtomicBool::new(false), words: (0..words).map(|_| AtomicU64::new(0)).collect() }))
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyLog {
    type S = DirtySlice<'a>;
}

impl Bitmap for DirtyLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.mark(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset)
    }

    fn slice_at(&self, offset: usize) -> DirtySlice<'_> {
        DirtySlice { log: self, base: offset }
    }
}

/// A part of a region's log.
#[derive(Clone, Copy, Debug)]
pub struct DirtySlice<'a> {
    log: &'a DirtyLog,
    base: usize,
}

impl<'a> DirtySlice<'a> {
    /// The log of the whole region.
    pub fn log(self) -> &'a DirtyLog {
        self.log
    }
}

impl WithBitmapSlice<'_> for DirtySlice<'_> {
    type S = Self;
}

impl BitmapSlice for DirtySlice<'_> {}

impl Bitmap for DirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.base.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_dirty(self.base.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { log: self.log, base: self.base.saturating_add(offset) }
    }
}

#[cfg(test)]
#[path = "dirty_test.rs"]
mod dirty_test;
