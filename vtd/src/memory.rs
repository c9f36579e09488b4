//! Reads of structures in guest memory: each word once, atomically (rule 7).

use std::sync::atomic::Ordering;

use vm_memory::bitmap::BS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

use crate::ids::Gpa;

/// A run of 64-bit words of guest memory, within one region.
pub(crate) struct Words<'a, M: GuestMemoryBackend>(VolatileSlice<'a, BS<'a, <M::R as GuestMemoryRegion>::B>>);

impl<'a, M: GuestMemoryBackend> Words<'a, M> {
    /// `count` words at `gpa`, or `None` where there is no memory.
    pub(crate) fn at(memory: &'a M, gpa: Gpa, count: usize) -> Option<Self> {
        memory.get_slice(GuestAddress(gpa.0), count.checked_mul(8)?).ok().map(Self)
    }

    /// The word at `index`, read once.
    pub(crate) fn get(&self, index: usize) -> Option<u64> {
        self.0.load::<u64>(index * 8, Ordering::Relaxed).ok().map(u64::from_le)
    }
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
