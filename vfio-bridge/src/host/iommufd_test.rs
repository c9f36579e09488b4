use vtd::IovaRange;

use super::*;

fn limits(ranges: &[(u64, u64)], page_sizes: u64, memlock: Option<u64>) -> Limits {
    let iova_ranges = ranges.iter().map(|&(first, last)| IovaRange { first, last }).collect();
    Limits { iova_ranges, page_sizes, entries: u64::MAX, memlock, unmap_all: true }
}

#[test]
fn b13_a_space_has_what_all_functions_allow_that_may_come_into_it() {
    let one = limits(&[(0, 0xfedf_ffff), (0xfef0_0000, (1 << 48) - 1)], 0x4020_1000, None);
    let other = limits(&[(0, 0x9_ffff), (0xc_0000, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)], 0x20_1000, None);
    let of_both = both(one.clone(), other.clone());
    assert_eq!(of_both, other, "it is all in the one");
    assert_eq!(both(other, one), of_both);
    assert_eq!(of_both.address_width(), 39);
    let apart = both(limits(&[(0, 0xfff)], 0x1000, None), limits(&[(0x1000, 0x1fff)], 0x1000, None));
    assert_eq!(apart.iova_ranges, []);
}

#[test]
fn b12_memory_is_found_in_the_ioas_of_ram_only_where_all_of_it_is_there() {
    let regions = [
        RamRegion { gpa: 0, len: 0x10_0000, hva: 0x7000_0000 },
        RamRegion { gpa: 1 << 32, len: 0x10_0000, hva: 0x7010_0000 },
    ];
    let place = |gpa, hva, len| place_in(&regions, gpa, hva, len);
    assert_eq!(place(0x3000, 0x7000_3000, 0x1000), Some(0x3000));
    assert_eq!(place(0, 0x7000_0000, 0x10_0000), Some(0));
    assert_eq!(place((1 << 32) + 0xf_f000, 0x701f_f000, 0x1000), Some((1 << 32) + 0xf_f000));
    // Over the end, beside it, and memory that came in the place of what was there when the machine was made.
    assert_eq!(place(0xf_f000, 0x700f_f000, 0x2000), None);
    assert_eq!(place(0x10_0000, 0x7010_0000, 0x1000), None);
    assert_eq!(place(0x3000, 0x7000_4000, 0x1000), None);
}

#[test]
fn b11_there_is_help_for_what_can_be_helped() {
    assert!(remedy(RefusalCause::Memlock).contains("ulimit -l"));
    assert!(remedy(RefusalCause::Range).contains("reserved_regions"));
    assert!(!remedy(RefusalCause::Other).contains("dma_entry_limit"));
}
