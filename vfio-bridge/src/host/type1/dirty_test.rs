use super::*;

#[test]
fn e1_arguments_have_the_kernels_layout() {
    let mut words = [0u64; 3];
    let range = IovaRange { first: 0x10_0000, last: 0x17_ffff };
    let argument = WithBitmap::new(1, range, 4096, &mut words).expect("it ends before 2^64");
    // `vfio_iommu_type1_dma_unmap` and `vfio_iommu_type1_dirty_bitmap` without their data: 24 and 8 bytes.
    assert_eq!((argument.argsz, std::mem::offset_of!(WithBitmap, iova)), (48, 8));
    assert_eq!(std::mem::offset_of!(WithBitmap, bitmap), 24);
    assert_eq!((argument.iova, argument.size, argument.flags), (0x10_0000, 0x8_0000, 1));
    assert_eq!((argument.bitmap.pgsize, argument.bitmap.size), (4096, 24));
    let whole = IovaRange { first: 0, last: u64::MAX };
    assert!(WithBitmap::new(1, whole, 4096, &mut words).is_err());
    let end = IovaRange { first: 4096, last: u64::MAX };
    assert!(WithBitmap::new(1, end, 4096, &mut words).is_err());
}

#[test]
fn e2_no_bitmap_is_longer_than_the_kernel_takes() {
    let migration = Migration { page_size: 4096, most_bytes: 16 };
    let range = |pages: u64| IovaRange { first: 0x1000, last: pages * 4096 + 0xfff };
    assert_eq!(migration.words(range(64)).map(|words| words.len()), Some(1));
    assert_eq!(migration.words(range(65)).map(|words| words.len()), Some(2));
    assert_eq!(migration.words(range(128)).map(|words| words.len()), Some(2));
    assert_eq!(migration.words(range(129)), None);
}

#[test]
fn e1_what_a_container_can_track_is_in_its_capability() {
    let mut bytes = vec![0u8; 8];
    bytes.extend(0u64.to_ne_bytes());
    bytes.extend(0x20_1000u64.to_ne_bytes());
    bytes.extend((256u64 << 20).to_ne_bytes());
    let expected = Migration { page_size: 4096, most_bytes: 256 << 20 };
    assert_eq!(Migration::parse(&bytes, 0), Some(expected));
    bytes[16..24].fill(0);
    assert_eq!(Migration::parse(&bytes, 0), None, "no page size");
    assert_eq!(Migration::parse(&bytes, 1), None, "cut off");
}
