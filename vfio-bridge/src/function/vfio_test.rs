use std::io::Write;

use vmm_sys_util::tempfile::TempFile;

use super::*;

#[test]
fn f1_only_whole_pages_inside_the_region_are_mappable() {
    let areas = [(0x3000, 0x1000), (0, 0x1000), (0x1000, 0x800), (0x1800, 0x800), (0x2800, 0x1000), (0x4000, 0)];
    assert_eq!(mappable_pages(0x4000, areas), [(0, 0x1000), (0x3000, 0x1000)]);
    // Up to the end of the region, not over it, not behind it, not around the end of 64 bits.
    assert_eq!(mappable_pages(0x4000, [(0, 0x4000)]), [(0, 0x4000)]);
    assert_eq!(mappable_pages(0x4000, [(0x3000, 0x2000), (0x4000, 0x1000), (0u64.wrapping_sub(0x1000), 0x1000)]), []);
    assert_eq!(mappable_pages(0x1800, [(0, 0x1800), (0, 0x2000), (0, 0x1000)]), [(0, 0x1000)]);
}

#[test]
fn f2_an_access_is_inside_its_region_or_nowhere() {
    assert_eq!(place(0x70_0000, 0x100, 0, 4), Some(0x70_0000));
    assert_eq!(place(0x70_0000, 0x100, 0xfc, 4), Some(0x70_00fc));
    for (size, offset, len) in
        [(0x100, 0xfd, 4), (0x100, 0x100, 1), (0, 0, 1), (0x100, u64::MAX, 2), (0x100, 1 << 40, 4)]
    {
        assert_eq!(place(0x70_0000, size, offset, len), None, "{len} bytes at {offset:#x} of {size:#x}");
    }
    assert_eq!(place(u64::MAX - 1, 0x100, 8, 4), None);
}

#[test]
fn f2_what_cannot_be_read_is_all_ones() {
    let mut file = TempFile::new().expect("a file").into_file();
    file.write_all(&[1, 2, 3, 4, 5]).expect("written");
    let mut data = [0; 4];
    read_or_ones(&file, Some(1), &mut data).expect("there");
    assert_eq!(data, [2, 3, 4, 5]);
    // Not even what was there of it: half a register is none.
    read_or_ones(&file, Some(3), &mut data).expect_err("two bytes");
    assert_eq!(data, [0xff; 4]);
    data = [0; 4];
    read_or_ones(&file, None, &mut data).expect_err("nowhere");
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn f5_interrupts_that_signal_no_eventfd_are_none() {
    assert_eq!((vectors(VFIO_IRQ_INFO_EVENTFD, 5), vectors(VFIO_IRQ_INFO_NORESIZE, 5)), (5, 0));
}

#[test]
fn regions_and_interrupts_have_the_indices_of_vfio() {
    let regions = (0..6).map(RegionKind::Bar).chain([RegionKind::Rom, RegionKind::Config]);
    for (index, region) in (0..8).zip(regions) {
        assert_eq!((region.index(), RegionKind::of_index(index)), (index, Some(region)));
    }
    assert_eq!(RegionKind::of_index(8), None, "VGA is not offered");
    let kinds = [IrqKind::Intx, IrqKind::Msi, IrqKind::Msix, IrqKind::Error, IrqKind::Request];
    for (index, kind) in (0..5).zip(kinds) {
        assert_eq!((kind.index(), IrqKind::of_index(index)), (index, Some(kind)));
    }
    assert_eq!(IrqKind::of_index(5), None);
}
