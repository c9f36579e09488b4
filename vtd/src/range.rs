//! Ranges of addresses, both ends inclusive: the whole of 2^64 is one, and has no size (B-3). Those of IOVAs and those
//! of guest-physical addresses are two types, so that they are never confused.

use std::fmt;

/// A range of IOVAs, both ends inclusive; `first <= last`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct IovaRange {
    /// First IOVA.
    pub first: u64,
    /// Last IOVA.
    pub last: u64,
}

impl IovaRange {
    /// Every IOVA.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// From `first` to `last`.
    pub const fn new(first: u64, last: u64) -> Self {
        Self { first, last }
    }

    /// Whether `address` is in it.
    pub const fn contains(self, address: u64) -> bool {
        self.first <= address && address <= self.last
    }

    /// Whether all of `other` is in it.
    pub const fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// What both have, if there is something.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last })
    }

    /// The parts of it that are in none of `holes` (ascending, disjoint), in ascending order.
    pub fn without(self, holes: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let Self { first, last } = self;
        let mut parts = Vec::with_capacity(1);
        let mut at = first;
        for hole in holes {
            if hole.last < at {
                continue;
            }
            if hole.first > last {
                break;
            }
            if hole.first > at {
                parts.push(Self { first: at, last: hole.first - 1 });
            }
            if hole.last >= last {
                return parts;
            }
            at = hole.last + 1;
        }
        parts.push(Self { first: at, last });
        parts
    }

    /// Sorts `ranges` and joins those that overlap or touch.
    pub fn union_of(mut ranges: Vec<Self>) -> Vec<Self> {
        ranges.sort_unstable();
        let mut union: Vec<Self> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match union.last_mut() {
                Some(open) if range.first <= open.last.saturating_add(1) => open.last = open.last.max(range.last),
                _ => union.push(range),
            }
        }
        union
    }
}

/// `0x1000-0x1fff`.
impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, self.last)
    }
}

/// A range of guest-physical addresses, both ends inclusive; `first <= last`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GpaRange {
    /// First guest-physical address.
    pub first: u64,
    /// Last guest-physical address.
    pub last: u64,
}

impl GpaRange {
    /// From `first` to `last`.
    pub const fn new(first: u64, last: u64) -> Self {
        Self { first, last }
    }

    /// With all of the pages that it has a part of: no translation leads to less than a page.
    pub(crate) const fn of_whole_pages(self) -> Self {
        Self { first: self.first & !0xfff, last: self.last | 0xfff }
    }
}

/// `0x1000-0x1fff`.
impl fmt::Display for GpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(first, last)
    }

    #[test]
    fn b3_a_range_reaches_the_last_address() {
        assert!(IovaRange::ALL.contains(u64::MAX) && IovaRange::ALL.covers(range(u64::MAX, u64::MAX)));
        assert!(!range(1, u64::MAX).covers(IovaRange::ALL));
        assert_eq!(IovaRange::ALL.without([range(1, u64::MAX)]), [range(0, 0)]);
        assert_eq!(IovaRange::ALL.without([IovaRange::ALL]), []);
        assert_eq!(IovaRange::union_of(vec![range(5, u64::MAX), range(0, 4)]), [IovaRange::ALL]);
        assert_eq!(IovaRange::union_of(vec![range(u64::MAX, u64::MAX), range(1, 1)]).len(), 2);
    }

    #[test]
    fn holes_beside_a_range_take_nothing_of_it() {
        let holes = [range(0, 3), range(6, 6), range(9, 20)];
        assert_eq!(range(4, 8).without(holes), [range(4, 5), range(7, 8)]);
        assert_eq!(range(2, 30).without(holes), [range(4, 5), range(7, 8), range(21, 30)]);
        assert_eq!(range(4, 5).without([range(6, 6)]), [range(4, 5)]);
    }

    #[test]
    fn an_intersection_is_what_both_have() {
        assert_eq!(range(2, 5).intersection(range(5, 9)), Some(range(5, 5)));
        assert_eq!(range(2, 5).intersection(range(6, 9)), None);
        assert_eq!(range(0, 9).intersection(range(3, 4)), Some(range(3, 4)));
    }
}
