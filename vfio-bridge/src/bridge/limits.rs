//! What the host allows, and what of the guest's wishes therefore cannot work (B-13).

use std::fs;

use vtd::IovaRange;
use vtd::spec::INTERRUPT_WINDOW;

/// What the host allows in one of its spaces. The default is nothing.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limits {
    /// Where mappings may be, in ascending order, disjoint.
    pub iova_ranges: Vec<IovaRange>,
    /// Page sizes of the host's tables, one bit a size.
    pub page_sizes: u64,
    /// Mappings that it can hold.
    pub entries: u64,
    /// Bytes that this process may lock, `None` when nothing limits it.
    pub memlock: Option<u64>,
    /// Whether everything can be unmapped in one call (`VFIO_UNMAP_ALL`).
    pub unmap_all: bool,
}

impl Limits {
    /// Width in bits of the highest IOVA that the host can map; 0 when it can map none.
    pub fn address_width(&self) -> u8 {
        let last = self.iova_ranges.last().map_or(0, |r| r.last);
        // 0 to 64, so it fits.
        (u64::BITS - last.leading_zeros()) as u8
    }

    /// Cuts `first..=last` at the borders of what the host can map: `(range, mappable)`, in ascending order.
    pub fn cut(&self, first: u64, last: u64) -> Vec<(IovaRange, bool)> {
        let mut parts = Vec::with_capacity(1);
        let mut at = first;
        for range in self.iova_ranges.iter().skip_while(|r| r.last < first).take_while(|r| r.first <= last) {
            if range.first > at {
                parts.push((IovaRange { first: at, last: range.first - 1 }, false));
                at = range.first;
            }
            let end = range.last.min(last);
            parts.push((IovaRange { first: at, last: end }, true));
            if end == last {
                return parts;
            }
            at = end + 1;
        }
        parts.push((IovaRange { first: at, last }, false));
        parts
    }

    /// The parts of `first..=last` that the host cannot map and that are not the interrupt window. Not empty for RAM
    /// means that the guest's layout must leave these out.
    pub fn reserved_in(&self, first: u64, last: u64) -> Vec<IovaRange> {
        let parts = self.cut(first, last);
        parts.into_iter().filter(|(_, ok)| !ok).flat_map(|(r, _)| without_interrupt_window(r)).collect()
    }
}

/// What remains of `range` outside the interrupt window, which no host maps: none, one or two ranges.
pub(crate) fn without_interrupt_window(range: IovaRange) -> Vec<IovaRange> {
    range.without([INTERRUPT_WINDOW])
}

/// What this process may lock in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memlock {
    /// RLIMIT_MEMLOCK in bytes, `None` when unlimited or when CAP_IPC_LOCK lifts it.
    pub limit: Option<u64>,
    /// Bytes locked already.
    pub locked: u64,
}

/// CAP_IPC_LOCK in the effective set lifts the limit (capabilities(7)).
const CAP_IPC_LOCK: u32 = 14;

impl Memlock {
    /// What holds for this process now.
    pub fn of_this_process() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mut rlimit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: `rlimit` is a valid place for the answer, which is read only on success.
        let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut rlimit) } == 0;
        // A limit that cannot be read is taken as none to spend: the start is refused rather than fails half-way.
        let limit = if known { rlimit.rlim_cur } else { 0 };
        Self::from_status(&status, (limit != libc::RLIM_INFINITY).then_some(limit))
    }

    /// The same from the text of `/proc/self/status` and the soft limit.
    fn from_status(status: &str, limit: Option<u64>) -> Self {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let capable = field("CapEff:")
            .and_then(|caps| u64::from_str_radix(caps, 16).ok())
            .is_some_and(|caps| caps & (1 << CAP_IPC_LOCK) != 0);
        let locked_kib = field("VmLck:").and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0);
        Self { limit: if capable { None } else { limit }, locked: locked_kib.saturating_mul(1024) }
    }

    /// How many bytes are missing to pin `ram` bytes in each of `groups` spaces (B-12: on type1 each group pins all
    /// RAM).
    pub fn missing(&self, ram: u64, groups: u64) -> Option<u64> {
        let needed = self.locked.saturating_add(ram.saturating_mul(groups));
        self.limit.and_then(|limit| needed.checked_sub(limit)).filter(|n| *n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(ranges: &[(u64, u64)]) -> Limits {
        Limits {
            iova_ranges: ranges.iter().map(|&(first, last)| IovaRange { first, last }).collect(),
            page_sizes: 0x4020_1000,
            entries: 65_535,
            memlock: None,
            unmap_all: true,
        }
    }

    #[test]
    fn b13_address_width_is_that_of_the_highest_range() {
        for (last, width) in [(0x7f_ffff_ffff, 39), (0xffff_ffff_ffff, 48), ((1 << 57) - 1, 57), (u64::MAX, 64)] {
            assert_eq!(limits(&[(0, 0xfedf_ffff), (0xfef0_0000, last)]).address_width(), width);
        }
        assert_eq!(limits(&[]).address_width(), 0);
    }

    #[test]
    fn b13_reserved_ranges_leave_out_the_interrupt_window() {
        let host = limits(&[(0, 0x9_ffff), (0xc_0000, 0xfedf_ffff), (0xfef0_0000, 0x7f_ffff_ffff)]);
        let range = |first, last| IovaRange { first, last };
        assert_eq!(host.reserved_in(0, 0xffff_ffff), [range(0xa_0000, 0xb_ffff)]);
        assert_eq!(host.reserved_in(0x10_0000, 0xfeef_ffff), []);
        assert_eq!(host.reserved_in(0x7f_ffff_f000, 0x80_0000_0fff), [range(0x80_0000_0000, 0x80_0000_0fff)]);
        assert_eq!(host.reserved_in(u64::MAX - 4095, u64::MAX), [range(u64::MAX - 4095, u64::MAX)]);
    }

    #[test]
    fn b13_memlock_honours_the_capability_and_counts_each_group() {
        let plain = "VmLck:\t       8 kB\nCapEff:\t0000000000000000\n";
        let root = "VmLck:\t       0 kB\nCapEff:\t000001ffffffffff\n";
        let small = Memlock::from_status(plain, Some(8 << 20));
        assert_eq!(small.missing(512 << 20, 2), Some((1 << 30) + 8192 - (8 << 20)));
        assert_eq!(small.missing(1 << 20, 2), None);
        assert_eq!(Memlock::from_status(root, Some(8 << 20)).missing(1 << 40, 9), None);
        assert_eq!(Memlock::from_status(plain, None).missing(1 << 40, 9), None);
        assert_eq!(Memlock::from_status("", Some(0)).missing(4096, 1), Some(4096));
        // As much as there is, and a byte less.
        let exact = Memlock { limit: Some(12_288), locked: 4096 };
        assert_eq!((exact.missing(4096, 2), exact.missing(4097, 2)), (None, Some(2)));
        // This capability and no other.
        for (bit, lifted) in [(13, false), (14, true), (15, false)] {
            let status = format!("CapEff:\t{:016x}\n", 1u64 << bit);
            assert_eq!(Memlock::from_status(&status, Some(1)).limit.is_none(), lifted, "bit {bit}");
        }
    }
}
