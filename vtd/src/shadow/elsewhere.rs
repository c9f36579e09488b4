//! Where leaves of a space lead that its listener does not have: to guest-physical addresses without memory, for the
//! most part. So that a change of the guest-physical map where no leaf leads costs no walk (B-15): guests turn the
//! memory of a device off and on while they look at its BARs, and most of them never map one for another device.

use crate::range::GpaRange;

/// Ranges that are kept apart. Beyond, all of guest-physical space counts until everything is compared.
const RANGES: usize = 32;

/// At least the guest-physical addresses that leads were refused to since the last comparison of everything.
#[derive(Default, Debug)]
pub(crate) struct Elsewhere {
    ranges: Vec<GpaRange>,
    anywhere: bool,
}

impl Elsewhere {
    /// A leaf to `range` was refused.
    pub(crate) fn add(&mut self, range: GpaRange) {
        let joins = |other: &GpaRange| {
            other.first <= range.last.saturating_add(1) && range.first <= other.last.saturating_add(1)
        };
        let room = self.ranges.len() < RANGES;
        match self.ranges.iter_mut().find(|other| joins(other)) {
            Some(other) => *other = GpaRange::new(other.first.min(range.first), other.last.max(range.last)),
            None if room => self.ranges.push(range),
            None => self.anywhere = true,
        }
    }

    /// Whether a leaf to somewhere in `range` may have been refused.
    pub(crate) fn meets(&self, range: GpaRange) -> bool {
        self.anywhere || self.ranges.iter().any(|other| other.first <= range.last && range.first <= other.last)
    }

    /// All leaves to `range` are told anew.
    pub(crate) fn forget(&mut self, range: GpaRange) {
        self.ranges.retain(|other| other.first < range.first || range.last < other.last);
    }

    /// All leaves are.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b15_what_was_refused_is_remembered_or_more() {
        let mut elsewhere = Elsewhere::default();
        let page = |n: u64| GpaRange::new(n << 12, (n << 12) + 0xfff);
        assert!(!elsewhere.meets(GpaRange::new(0, u64::MAX)));
        // Neighbours are one range.
        (0..1000).for_each(|n| elsewhere.add(page(n)));
        assert!(elsewhere.meets(page(999)) && !elsewhere.meets(page(1000)));
        elsewhere.forget(page(5));
        assert!(elsewhere.meets(page(5)), "more than that is remembered");
        elsewhere.forget(GpaRange::new(0, page(999).last));
        assert!(!elsewhere.meets(page(5)));
        for n in 0..RANGES as u64 {
            elsewhere.add(page(2 * n));
        }
        assert!(!elsewhere.meets(page(1)) && elsewhere.meets(page(2)));
        elsewhere.add(page(2000));
        assert!(elsewhere.meets(page(1)) && elsewhere.meets(page(2000)));
        elsewhere.forget(GpaRange::new(0, u64::MAX));
        assert!(elsewhere.meets(page(1)), "only a comparison of everything says where there is none");
        elsewhere.clear();
        elsewhere.add(GpaRange::new(u64::MAX - 0xfff, u64::MAX));
        assert!(elsewhere.meets(GpaRange::new(u64::MAX, u64::MAX)) && !elsewhere.meets(page(1)));
    }
}
