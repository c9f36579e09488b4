//! Guest-physical pages that were written.

use std::collections::BTreeMap;

use vtd::IovaRange;

use crate::bridge::guest_map::PAGE_SIZE;
use crate::host::dirty::{runs, set_bits};

/// 64-bit words of a chunk, one bit a page.
const WORDS: usize = 64;
/// Pages of a chunk.
const CHUNK: u64 = WORDS as u64 * 64;

/// Dirty pages of 4 KiB by their guest-physical addresses. It takes no more than 512 bytes and a little for each 16 MiB
/// of guest memory.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DirtyPages {
    /// By the number of the chunk.
    chunks: BTreeMap<u64, [u64; WORDS]>,
}

impl DirtyPages {
    /// Whether nothing is dirty.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// How many pages of 4 KiB are.
    pub fn count(&self) -> u64 {
        self.chunks.values().flatten().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the page of `gpa` is.
    pub fn contains(&self, gpa: u64) -> bool {
        let page = gpa / PAGE_SIZE;
        let word = self.chunks.get(&(page / CHUNK)).map(|words| words[(page % CHUNK / 64) as usize]);
        word.is_some_and(|word| word & (1 << (page % 64)) != 0)
    }

    /// Each page that has one of the `len` bytes at `gpa` is dirty.
    pub fn mark(&mut self, gpa: u64, len: u64) {
        let Some(more) = len.checked_sub(1) else { return };
        let (mut page, last) = (gpa / PAGE_SIZE, gpa.saturating_add(more) / PAGE_SIZE);
        while page <= last {
            let (chunk, end) = (page / CHUNK, last.min(page / CHUNK * CHUNK + (CHUNK - 1)));
            set_bits(self.chunks.entry(chunk).or_insert([0; WORDS]), page % CHUNK, end % CHUNK);
            page = end + 1;
        }
    }

    /// What is dirty in `other` is dirty here, too.
    pub fn merge(&mut self, other: &Self) {
        for (chunk, theirs) in &other.chunks {
            let ours = self.chunks.entry(*chunk).or_insert([0; WORDS]);
            ours.iter_mut().zip(theirs).for_each(|(ours, theirs)| *ours |= theirs);
        }
    }

    /// The part of it that lies in `ranges` (whole pages, ascending, disjoint).
    pub fn within(&self, ranges: impl Iterator<Item = IovaRange>) -> Self {
        let mut part = Self::default();
        for within in ranges {
            let first = self.chunks.range(within.first / PAGE_SIZE / CHUNK..=within.last / PAGE_SIZE / CHUNK);
            for (chunk, words) in first {
                let pages = runs(words).map(|(from, to)| bytes(chunk * CHUNK + from, chunk * CHUNK + to));
                for range in pages.filter_map(|range| range.intersection(within)) {
                    part.mark(range.first, range.last - range.first + 1);
                }
            }
        }
        part
    }

    /// The dirty ranges of guest-physical addresses in pages of `page_size` bytes (a power of two), ascending and as
    /// long as they can be: a larger page is dirty if a part of it is, and of a smaller one nothing better is known.
    pub fn ranges(&self, page_size: u64) -> Vec<IovaRange> {
        self.ranges_from(page_size, 0, usize::MAX)
    }

    /// The first `most` of [`DirtyPages::ranges`] from the address `from` on, which is that of a page.
    pub fn ranges_from(&self, page_size: u64, from: u64, most: usize) -> Vec<IovaRange> {
        let mask = page_size.max(PAGE_SIZE).next_power_of_two() - 1;
        let mut ranges: Vec<IovaRange> = Vec::new();
        for (chunk, words) in self.chunks.range(from / PAGE_SIZE / CHUNK..) {
            for (first, last) in runs(words) {
                let pages = bytes(chunk * CHUNK + first, chunk * CHUNK + last);
                if pages.last < from {
                    continue;
                }
                let range = IovaRange { first: pages.first.max(from) & !mask, last: pages.last | mask };
                match ranges.last_mut() {
                    Some(before) if range.first <= before.last.saturating_add(1) => before.last = range.last,
                    _ => {
                        if ranges.len() == most {
                            return ranges;
                        }
                        ranges.push(range);
                    }
                }
            }
        }
        ranges
    }
}

/// The bytes of the pages `from` to `to`.
fn bytes(from: u64, to: u64) -> IovaRange {
    IovaRange { first: from * PAGE_SIZE, last: to * PAGE_SIZE + (PAGE_SIZE - 1) }
}

#[cfg(test)]
#[path = "pages_test.rs"]
mod pages_test;
