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
    assert_eq!(
        parse_info(&info(0, 0, &[])),
        Some(Info { page_sizes: 4096, ranges: None, available: None, migration: None })
    );
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
    // Over both of them.
    looping = whole.clone();
    let second = whole.len() - 16;
    looping[second + 4..second + 8].copy_from_slice(&24u32.to_ne_bytes());
    let (told, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || told.send(parse_info(&looping).and_then(|info| info.available)));
    assert_eq!(ended.recv_timeout(std::time::Duration::from_secs(60)), Ok(Some(7)));
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

#[test]
fn ioctl_numbers_of_questions_are_the_kernels() {
    assert_eq!(CHECK_EXTENSION(), 0x3b65);
}

#[test]
fn b13_a_container_is_asked_again_with_room_for_all_that_it_says() {
    let whole = info(3, 4096, &[(1, ranges(&[(0, 0xfedf_ffff)])), (3, Vec::from(7u32.to_ne_bytes()))]);
    let mut rooms = Vec::new();
    let answer = |words: &mut [u64]| {
        let room = words.len() * 8;
        assert_eq!(words[0], room as u64, "argsz, and no flags");
        rooms.push(room);
        // The kernel writes capabilities only if there is room for all.
        let given = if room < whole.len() { &whole[..24] } else { &whole[..] };
        for (word, bytes) in words.iter_mut().zip(given.chunks(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("whole words"));
        }
        words[0] = words[0] >> 32 << 32 | whole.len() as u64;
        Ok(())
    };
    let info = read_info(answer).expect("well formed");
    assert_eq!((rooms.len(), rooms[1]), (2, whole.len()));
    assert_eq!((info.available, info.ranges.map(|ranges| ranges.len())), (Some(7), Some(1)));
    assert!(read_info(|_| Err(io::ErrorKind::PermissionDenied.into())).is_err());
}

#[test]
fn b13_what_a_kernel_does_not_say_is_what_old_ones_allow() {
    let info = Info { page_sizes: 4096, ranges: None, available: None, migration: None };
    let old = limits(info, Some(8 << 20), false);
    assert_eq!((old.entries, old.memlock, old.unmap_all, old.page_sizes), (65_535, Some(8 << 20), false, 4096));
    assert_eq!((old.address_width(), old.reserved_in(0, (1 << 39) - 1)), (39, vec![]));
    let range = IovaRange { first: 0, last: 0xffff };
    let info = Info { page_sizes: 0x20_1000, ranges: Some(vec![range]), available: Some(12), migration: None };
    let new = limits(info, None, true);
    assert_eq!((new.entries, new.memlock, new.unmap_all, new.page_sizes), (12, None, true, 0x20_1000));
    assert_eq!(new.iova_ranges, [range]);
}

#[test]
fn b13_each_refusal_of_vfio_says_what_cures_it() {
    let errno = io::Error::from_raw_os_error;
    let group = |number| VfioError::OpenGroup(errno(number), "7".to_owned());
    let set_iommu = |number| VfioError::ContainerSetIOMMU(vmm_sys_util::errno::Error::new(number));
    for (error, words) in [
        (VfioError::OpenContainer(errno(libc::ENOENT)), "/dev/vfio/vfio does not exist"),
        (VfioError::OpenContainer(errno(libc::ENODEV)), "/dev/vfio/vfio does not exist"),
        (VfioError::OpenContainer(errno(libc::EACCES)), "no permission to open /dev/vfio/vfio"),
        (VfioError::OpenContainer(errno(libc::EMFILE)), "/dev/vfio/vfio cannot be used"),
        (group(libc::EBUSY), "group 7 is in use by another process"),
        (group(libc::EPERM), "no permission to open /dev/vfio/7"),
        (VfioError::GroupViable, "group 7 is not viable"),
        (VfioError::VfioExtension, "no type1 IOMMU driver"),
        (set_iommu(libc::EPERM), "allow_unsafe_interrupts"),
        (set_iommu(libc::ENODEV), "no type1 IOMMU driver"),
        (set_iommu(libc::EBUSY), "VFIO refused 0000:3b:00.0"),
        (VfioError::InvalidPath, "VFIO refused 0000:3b:00.0: invalid file path"),
    ] {
        let said = explain("3b:00.0".parse().expect("an address"), GroupId(7), error).to_string();
        assert!(said.contains(words), "`{words}` is not in: {said}");
    }
}
