//! Translation completions, as PCI Express has them (10.2.3, table of the fields of a translation completion), and the
//! size that is said by the low bits of an address.

use bitfield_struct::bitfield;

use crate::range::IovaRange;

/// What a translation request is answered with: one translation. Section 4.2.3.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct TranslationData {
    /// R: reads are permitted.
    pub read: bool,
    /// W: writes are permitted.
    pub write: bool,
    /// U: only untranslated requests may go there.
    pub untranslated_only: bool,
    /// Exe: never set.
    pub execute: bool,
    /// Priv: of a privileged request, of which there are none.
    pub privileged: bool,
    /// Global: never set.
    pub global: bool,
    #[bits(4)]
    __: u8,
    /// N: accesses must snoop; never set, since all of ours do.
    pub non_snooped: bool,
    /// S: more than 4 KiB, as the lowest clear bit of `page` says.
    pub large: bool,
    /// Bits 63:12 of the translated address, and the size.
    #[bits(52)]
    pub page: u64,
}

impl TranslationData {
    /// The addresses that it leads to.
    pub const fn target(self) -> IovaRange {
        sized_range(self.page(), self.large())
    }
}

/// The naturally aligned range that bits 63:12 of an address name: 4 KiB, or if `large` twice as much for each set bit
/// from the lowest on, and twice more. All of them but the highest are everything; so are all. PCI Express, 10.2.3.2
/// and 10.3.1.
pub const fn sized_range(page: u64, large: bool) -> IovaRange {
    let page = page & (u64::MAX >> 12);
    if !large {
        return IovaRange::new(page << 12, page << 12 | 0xfff);
    }
    let ones = page.trailing_ones();
    if ones >= 51 {
        return IovaRange::ALL;
    }
    let size = 0x2000 << ones;
    let first = page << 12 & !(size - 1);
    IovaRange::new(first, first + (size - 1))
}

/// Bits 63:12 of `address`, with the size `0x1000 << order` said by its low bits; `order` is 1 to 51.
pub const fn sized_page(address: u64, order: u32) -> u64 {
    let mask = (1 << order) - 1;
    address >> 12 & !mask | mask >> 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a12_a_size_is_said_by_the_low_bits_of_an_address() {
        assert_eq!(sized_range(0x12345, false), IovaRange::new(0x1234_5000, 0x1234_5fff));
        assert_eq!(sized_range(0x12344, true), IovaRange::new(0x1234_4000, 0x1234_5fff));
        assert_eq!(sized_range(0x12345, true), IovaRange::new(0x1234_4000, 0x1234_7fff));
        assert_eq!(sized_range(0x122ff, true), IovaRange::new(0x1220_0000, 0x123f_ffff));
        // Linux invalidates everything with the highest bit clear.
        for everything in [u64::MAX >> 13, u64::MAX >> 12, u64::MAX] {
            assert_eq!(sized_range(everything, true), IovaRange::ALL);
        }
        assert_eq!(sized_range(u64::MAX >> 14, true), IovaRange::new(0, u64::MAX >> 1));
        for order in 1..=50 {
            let size = 0x1000u64 << order;
            let first = 0xa5a5_5a5a_a5a5_5000 & !(size - 1);
            assert_eq!(sized_range(sized_page(first | 0x1000, order), true), IovaRange::new(first, first + (size - 1)));
        }
    }
}
