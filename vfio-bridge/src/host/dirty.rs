//! What a host knows of the memory that devices wrote (E-1), as a bitmap of IOVAs, in pages of the caller's size (E-2).

use vtd::IovaRange;

/// How far what is said to be dirty can be believed. What is written is in it in any case; the order is from the best
/// to the worst.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum DirtyKnowledge {
    /// Page by page: what is in it was written.
    #[default]
    Exact,
    /// The host says of everything that is mapped that it is dirty (type1 before devices without dirty bits): what is
    /// in it could be written.
    WholeMappings,
    /// The host says nothing. Everything that can be written is in it, at each read.
    CannotTell,
}

impl DirtyKnowledge {
    /// As `causeway ctl` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::WholeMappings => "whole-mappings",
            Self::CannotTell => "cannot-tell",
        }
    }
}

/// What becomes of a write in the moment between the clearing of a translation and the flush of the IOTLB (E-3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnmapWindow {
    /// It is reported: there is no such moment, or everything that was mapped is reported anyway.
    Reported,
    /// It is lost, unless the unmap is asked to close the window: then write permission goes first, the IOTLB is
    /// flushed, and what is dirty is read when nothing can be written any more.
    Closable,
    /// It is lost, and the host has no way to prevent that.
    Lost,
}

/// What a host can say about a space in which it tracks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtySupport {
    /// How far it can be believed: never [`DirtyKnowledge::CannotTell`], which is an error of
    /// [`HostIommu::dirty_start`](super::HostIommu::dirty_start).
    pub knowledge: DirtyKnowledge,
    /// What an unmap loses.
    pub window: UnmapWindow,
    /// Whether a bitmap may have holes between its mappings. A host that ends at the first hole, perhaps without a word
    /// (Linux's iommufd up to 6.12 at least), is asked for each range without one.
    pub holes: bool,
}

/// Which pages of a range are dirty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirtyBitmap {
    first: u64,
    last: u64,
    page_size: u64,
    words: Vec<u64>,
}

impl DirtyBitmap {
    /// The smallest pages: bytes.
    pub const SMALLEST_PAGE: u64 = 512;
    /// As many pages can a bitmap have: 64 TiB in pages of 4 KiB.
    pub const MOST_PAGES: u64 = 1 << 34;

    /// A clean one of `range`, in pages of `page_size` bytes, which is a power of two. Its first and its last page may
    /// reach out of the range. `None` where there can be none: the size of a page, or the number of them.
    pub fn new(range: IovaRange, page_size: u64) -> Option<Self> {
        if !page_size.is_power_of_two() || page_size < Self::SMALLEST_PAGE || range.first > range.last {
            return None;
        }
        let pages = range.last / page_size - range.first / page_size + 1;
        let words = (pages <= Self::MOST_PAGES).then(|| vec![0; pages.div_ceil(64) as usize])?;
        Some(Self { first: range.first, last: range.last, page_size, words })
    }

    /// The range.
    pub fn range(&self) -> IovaRange {
        IovaRange { first: self.first, last: self.last }
    }

    /// Bytes of a page.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// How many pages are dirty.
    pub fn pages(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether the page of `iova` is; `false` outside of the range.
    pub fn is_dirty(&self, iova: u64) -> bool {
        let inside = self.range().contains(iova);
        inside && bit(&self.words, iova / self.page_size - self.first / self.page_size)
    }

    /// Each page that has a byte of `range` is dirty. What is outside is left out.
    pub fn mark(&mut self, range: IovaRange) {
        let Some(range) = range.intersection(self.range()) else { return };
        let page = |iova: u64| iova / self.page_size - self.first / self.page_size;
        set_bits(&mut self.words, page(range.first), page(range.last));
    }

    /// Takes over what a host says in pages of its own size, a power of two: bit `n` of `words` is the page `n` of
    /// those from `first` on, which is the beginning of one. A page here is dirty if one of the host's in it is; where
    /// the host's are larger, all in one of them are.
    pub fn mark_words(&mut self, first: u64, page_size: u64, words: &[u64]) {
        for (from, to) in runs(words) {
            let range = |n: u64| n.checked_mul(page_size).and_then(|n| first.checked_add(n));
            let Some(start) = range(from) else { return };
            let end = range(to).and_then(|page| page.checked_add(page_size - 1)).unwrap_or(u64::MAX);
            self.mark(IovaRange { first: start, last: end });
        }
    }

    /// The dirty ranges in `within`, ascending, as long as they can be: pages, cut at the ends of both ranges.
    pub fn ranges(&self, within: IovaRange) -> impl Iterator<Item = IovaRange> + '_ {
        let base = self.first - self.first % self.page_size;
        let within = within.intersection(self.range());
        let skip = within.map_or(0, |within| (within.first / self.page_size - self.first / self.page_size) / 64);
        let words = if within.is_some() { &self.words[skip as usize..] } else { &[] };
        let found = runs(words).map(move |(from, to)| {
            let (from, to) = (from + skip * 64, to + skip * 64);
            // The last page may be the last that there is.
            let last = base + to * self.page_size + (self.page_size - 1);
            IovaRange { first: base + from * self.page_size, last }
        });
        let ends = within.map_or(0, |within| within.last);
        found.take_while(move |range| range.first <= ends).filter_map(move |range| range.intersection(within?))
    }
}

fn bit(words: &[u64], n: u64) -> bool {
    words.get((n / 64) as usize).is_some_and(|word| word >> (n % 64) & 1 == 1)
}

/// Sets the bits `from..=to`.
pub(crate) fn set_bits(words: &mut [u64], from: u64, to: u64) {
    for at in from / 64..=to / 64 {
        let low = if at == from / 64 { from % 64 } else { 0 };
        let high = if at == to / 64 { to % 64 } else { 63 };
        words[at as usize] |= (u64::MAX >> (63 - (high - low))) << low;
    }
}

/// The runs of bits that are set, ascending: the first and the last of each.
pub(crate) fn runs(words: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let end = words.len() as u64 * 64;
    // The next bit from `at` on that is `set`, or the end.
    let next = move |at: u64, set: bool| {
        let mut at = at;
        while at < end {
            let word = words[(at / 64) as usize];
            let left = if set { word } else { !word } >> (at % 64);
            if left != 0 {
                return at + u64::from(left.trailing_zeros());
            }
            at = (at / 64 + 1) * 64;
        }
        end
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let from = next(at, true);
        if from >= end {
            return None;
        }
        at = next(from, false);
        Some((from, at - 1))
    })
}

#[cfg(test)]
#[path = "dirty_test.rs"]
mod dirty_test;
