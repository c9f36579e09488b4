//! Reads of structures in guest memory: each word once, atomically (rule 7).

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

use crate::ids::Gpa;

/// A run of 64-bit words of guest memory, within one region.
pub(crate) struct Words<'a, M: GuestMemoryBackend>(VolatileSlice<'a, BS<'a, <M::R as GuestMemoryRegion>::B>>);

impl<'a, M: GuestMemoryBackend> Words<'a, M> {
    /// `count` words at `gpa`, or `None` where there is no memory.
    pub(crate) fn at(memory: &'a M, gpa: Gpa, count: usize) -> Option<Self> {
        memory.get_slice(GuestAddress(gpa.0), count.checked_mul(8)?).ok().map(Self)
    }

    /// The same in one of the first two regions of memory, which takes less than a search: few guests have more.
    /// `None` elsewhere, too.
    #[inline(always)]
    pub(crate) fn near(memory: &'a M, gpa: Gpa, count: usize) -> Option<Self> {
        let mut regions = memory.iter();
        let (region, offset) = within(regions.next()?, gpa).or_else(|| within(regions.next()?, gpa))?;
        region.get_slice(offset, count.checked_mul(8)?).ok().map(Self)
    }

    /// Writes `new` at `index` if `old` is there, and says whether it was; `None` where that cannot be done.
    pub(crate) fn exchange(&self, index: usize, old: u64, new: u64) -> Option<bool> {
        let word = self.0.get_atomic_ref::<AtomicU64>(index * 8).ok()?;
        let (old, new) = (old.to_le(), new.to_le());
        let exchanged = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if exchanged {
            self.0.bitmap().mark_dirty(index * 8, 8);
        }
        Some(exchanged)
    }

    /// Sets `bits` at `index`, and leaves the others as they are at that moment; `None` where that cannot be done.
    pub(crate) fn set_bits(&self, index: usize, bits: u64) -> Option<()> {
        let word = self.0.get_atomic_ref::<AtomicU64>(index * 8).ok()?;
        word.fetch_or(bits.to_le(), Ordering::AcqRel);
        self.0.bitmap().mark_dirty(index * 8, 8);
        Some(())
    }

    /// The word at `index`, read once.
    #[inline(always)]
    pub(crate) fn get(&self, index: usize) -> Option<u64> {
        self.0.load::<u64>(index * 8, Ordering::Relaxed).ok().map(u64::from_le)
    }

    /// The words from `index` on, as many as fit into `into`, each read once; `false` where they are not all there.
    pub(crate) fn copy(&self, index: usize, into: &mut [u64]) -> bool {
        let Ok(slice) = self.0.subslice(index * 8, into.len() * 8) else { return false };
        // Word by word: no word is read in parts on a processor of 64 bits.
        let copied = slice.copy_to(into);
        into.iter_mut().for_each(|word| *word = u64::from_le(*word));
        copied == into.len()
    }
}

/// Where in `region` `gpa` is, if it is.
#[inline(always)]
fn within<R: GuestMemoryRegion>(region: &R, gpa: Gpa) -> Option<(&R, MemoryRegionAddress)> {
    let offset = gpa.0.wrapping_sub(region.start_addr().0);
    (offset < region.len()).then_some((region, MemoryRegionAddress(offset)))
}

/// A structure of two words: the lower first, as its present bit is there and the guest sets it last.
pub(crate) fn read_pair<M: GuestMemoryBackend>(memory: &M, gpa: Gpa) -> Option<(u64, u64)> {
    let words = Words::at(memory, gpa, 2)?;
    let low = words.get(0)?;
    // The guest publishes the lower word after the upper one; read them in that order, too.
    std::sync::atomic::fence(Ordering::Acquire);
    Some((low, words.get(1)?))
}

/// A structure of `N` words: the lowest first, as its present bit is there and the guest sets it last.
pub(crate) fn read_words<M: GuestMemoryBackend, const N: usize>(memory: &M, gpa: Gpa) -> Option<[u64; N]> {
    let words = Words::at(memory, gpa, N)?;
    let mut read = [0; N];
    read[0] = words.get(0)?;
    std::sync::atomic::fence(Ordering::Acquire);
    for (index, word) in read.iter_mut().enumerate().skip(1) {
        *word = words.get(index)?;
    }
    Some(read)
}

/// Writes 32 bits that the guest polls; everything before them is visible first. `false` where there is no memory.
pub(crate) fn write_word<M: GuestMemoryBackend>(memory: &M, gpa: Gpa, word: u32) -> bool {
    memory.store(word.to_le(), GuestAddress(gpa.0), Ordering::SeqCst).is_ok()
}
