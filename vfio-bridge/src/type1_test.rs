use super::*;

/// `struct vfio_iommu_type1_info` with these capabilities (id, body) behind it.
fn info(flags: u32, page_sizes: u64, caps: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(0u32.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(page_sizes.to_ne_bytes());
    bytes.extend(if caps.is_empty() { 0u32 } else { 24 }.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    for (i, (id, body)) in caps.iter().enumerate() {
        let end = bytes.len() + 8 + body.len().next_multiple_of(8);
        let next = if i + 1 == caps.len() { 0 } else { u32::try_from(end).expect("small") };
        bytes.extend(id.to_ne_bytes());
        bytes.extend(1u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes.extend(body);
        bytes.resize(end, 0);
    }
    bytes
}

fn ranges(pairs: &[(u64, u64)]) -> Vec<u8> {
    let mut body = Vec::from(u32::try_from(pairs.len()).expect("small").to_ne_bytes());
    body.extend(0u32.to_ne_bytes());
    body.extend(pairs.iter().flat_map(|(a, b)| [a.to_ne_bytes(), b.to_ne_bytes()]).flatten());
    body
}

#[test]
fn b13_limits_are_read_from_the_capability_chain() {
    let pairs = [(0, 0xfedf_ffff), (0xfef0_0000, 0xffff_ffff_ffff)];
    // Capability 2 (migration) is between those that matter.
    let bytes = info(3, 0x4020_1000, &[(1, ranges(&pairs)), (2, vec![0; 24]), (3, Vec::from(65_535u32.to_ne_bytes()))]);
    let parsed = parse_info(&bytes).expect("well formed");
    assert_eq!(parsed.page_sizes, 0x4020_1000);
    assert_eq!(parsed.available, Some(65_535));
    assert_eq!(parsed.ranges, Some(pairs.iter().map(|&(first, last)| IovaRange { first, last }).collect()));
}

#[test]
fn b13_a_kernel_that_says_nothing_is_read_as_such() {
    assert_eq!(parse_info(&info(0, 0, &[])), Some(Info { page_sizes: 4096, ranges: None, available: None }));
}

#[test]
fn b13_a_chain_that_is_cut_or_loops_ends() {
    let whole = info(3, 4096, &[(1, ranges(&[(0, 4095)])), (3, Vec::from(7u32.to_ne_bytes()))]);
    for len in 0..whole.len() {
        let cut = parse_info(&whole[..len]);
        assert!(cut.is_none_or(|i| i.available.is_none() || i.available == Some(7)));
    }
    let mut looping = whole.clone();
    looping[28..32].copy_from_slice(&24u32.to_ne_bytes());
    assert_eq!(parse_info(&looping).expect("ends").available, None);
}

#[test]
fn ioctl_numbers_are_the_kernels() {
    assert_eq!(VFIO_IOMMU_GET_INFO(), 0x3b70);
    assert_eq!(VFIO_IOMMU_MAP_DMA(), 0x3b71);
    assert_eq!(VFIO_IOMMU_UNMAP_DMA(), 0x3b72);
}

#[test]
fn b9_a_map_asks_for_its_permission_and_no_other() {
    for (perm, flags) in [(Perm::Read, 1), (Perm::Write, 2), (Perm::ReadWrite, 3)] {
        let map = map_argument(0x1000, 0x7000, 0x2000, perm);
        assert_eq!((map.argsz, map.flags, map.iova, map.vaddr, map.size), (32, flags, 0x1000, 0x7000, 0x2000));
    }
}

#[test]
fn b3_an_unmap_is_inclusive_and_all_is_a_flag() {
    let argument = |range| unmap_argument(range).map(|unmap| (unmap.argsz, unmap.flags, unmap.iova, unmap.size)).ok();
    assert_eq!(argument(UnmapRange::Span { first: 0x1000, last: 0x2fff }), Some((24, 0, 0x1000, 0x2000)));
    assert_eq!(argument(UnmapRange::All), Some((24, 2, 0, 0)));
    assert_eq!(argument(UnmapRange::Span { first: 0x1000, last: u64::MAX }), None);
    assert_eq!(argument(UnmapRange::Span { first: 0x2000, last: 0x1fff }), None);
}
