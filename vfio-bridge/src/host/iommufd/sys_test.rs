use super::*;

#[test]
fn b9_what_a_device_may_do_is_asked_for_exactly() {
    let flags = [Perm::Read, Perm::Write, Perm::ReadWrite].map(map_flags);
    // FIXED_IOVA is 1, WRITEABLE 2, READABLE 4.
    assert_eq!(flags, [5, 3, 7]);
}

#[test]
fn b3_an_unmap_of_everything_has_the_length_that_means_it_and_no_other_has() {
    assert_eq!(span(UnmapRange::All).expect("all"), (0, u64::MAX));
    let of = |first, last| span(UnmapRange::Span { first, last });
    assert_eq!(of(0x1000, 0x2fff).expect("a span"), (0x1000, 0x2000));
    assert_eq!(of(0, u64::MAX - 1).ok(), Some((0, u64::MAX)), "it is all that can be mapped");
    for (first, last) in [(0, u64::MAX), (0x1000, 0xfff), (0x1000, u64::MAX)] {
        assert_eq!(of(first, last).expect_err("no length").kind(), io::ErrorKind::InvalidInput, "{first:#x}-{last:#x}");
    }
}

#[test]
fn b13_a_host_with_many_ranges_is_asked_with_more_room() {
    let mut rooms = Vec::new();
    let (ranges, alignment) = ranges_by(|room, asked| {
        rooms.push(room.len());
        asked.num_iovas = 40;
        asked.out_iova_alignment = 4096;
        if room.len() < 40 {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        for (i, range) in room.iter_mut().take(40).enumerate() {
            *range = iommu_iova_range { start: (39 - i as u64) << 20, last: ((39 - i as u64) << 20) + 0xfff };
        }
        Ok(())
    })
    .expect("all");
    assert_eq!((rooms, ranges.len(), alignment), (vec![16, 40], 40, 4096));
    assert!(ranges.is_sorted() && ranges[1] == IovaRange { first: 1 << 20, last: (1 << 20) + 0xfff });
    // A host that never has enough is not asked for ever, and another error ends it at once.
    let mut asked_for = 0;
    let never = ranges_by(|_, asked| {
        asked_for += 1;
        asked.num_iovas = 1;
        Err(io::Error::from_raw_os_error(libc::EMSGSIZE))
    });
    assert!(never.is_err() && asked_for < 20, "{asked_for} times");
    let refused = ranges_by(|_, _| Err(io::Error::from_raw_os_error(libc::ENOENT)));
    assert_eq!(refused.expect_err("none").raw_os_error(), Some(libc::ENOENT));
}

#[test]
fn the_calls_made_here_have_the_kernels_numbers() {
    // _IO(';', 0x83) and _IO(';', 0x84).
    assert_eq!((IOMMU_IOAS_COPY(), IOMMU_IOAS_IOVA_RANGES()), (0x3b83, 0x3b84));
    assert_eq!((IOMMU_HWPT_SET_DIRTY_TRACKING(), IOMMU_HWPT_GET_DIRTY_BITMAP()), (0x3b8b, 0x3b8c));
}

#[test]
fn b13_page_sizes_are_those_of_the_units_capability_register() {
    assert_eq!(vtd_page_sizes(0), 0x1000);
    assert_eq!(vtd_page_sizes(1 << 34), 0x20_1000);
    assert_eq!(vtd_page_sizes(3 << 34), 0x4020_1000);
}
