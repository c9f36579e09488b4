//! The backend over a kernel in memory.

use std::fs::File;

use vtd::IovaRange;

use super::fake::{Call, Device, Fake};
use super::sys::DeviceInfo;
use super::*;
use crate::bridge::guest_map::{Backing, Region};

const PAGE: u64 = PAGE_SIZE;
const HVA: u64 = 0x7000_0000;
const RAM_PAGES: u64 = 64;
/// Two groups: devices 1 and 2, and device 3. Device 4 is alone in its, behind another unit; 5 has PASIDs.
const A: GroupId = GroupId(1);
const B: GroupId = GroupId(2);
const FAR: GroupId = GroupId(3);
const WITH_PASIDS: GroupId = GroupId(4);

fn itself(device: u32) -> HostStream {
    HostStream { device: HostDevice(device), pasid: None }
}

fn part(device: u32, pasid: u32) -> HostStream {
    HostStream { device: HostDevice(device), pasid: Some(Pasid(pasid)) }
}

fn kernel() -> Fake {
    let ranges = |last| vec![IovaRange { first: 0, last: 0xfedf_ffff }, IovaRange { first: 0xfef0_0000, last }];
    let device = |number, group, unit, last, pasid_bits| {
        let info = DeviceInfo { page_sizes: Some(0x20_1000), pasid_bits, dirty_bits: false };
        (HostDevice(number), Device { group, unit, ranges: ranges(last), info })
    };
    Fake::new([
        device(1, 1, 1, (1 << 48) - 1, 0),
        device(2, 1, 1, (1 << 46) - 1, 0),
        device(3, 2, 1, (1 << 39) - 1, 0),
        device(4, 3, 2, (1 << 48) - 1, 0),
        device(5, 4, 1, (1 << 48) - 1, 20),
    ])
}

fn guest(backing: Option<Backing>) -> GuestMap {
    // SAFETY: nobody uses the address.
    let ram = unsafe { Region::ram(0, RAM_PAGES * PAGE, HVA, backing) };
    GuestMap::new(vec![ram.expect("whole pages")]).expect("one region")
}

fn bdf(device: u32) -> Bdf {
    format!("00:{device:02x}.0").parse().expect("an address")
}

/// The backend with all devices in their groups, over `kernel`.
fn host_over(kernel: Fake, guest: &GuestMap) -> Iommufd<Fake> {
    let ioas = kernel.alloc_ioas().expect("an IOAS");
    let host = Iommufd::over(kernel, ioas, guest).expect("a backend");
    for (group, device) in [(A, 1), (A, 2), (B, 3), (FAR, 4), (WITH_PASIDS, 5)] {
        host.add(group, bdf(device), HostDevice(device)).expect("added");
    }
    host.kernel.calls();
    host
}

fn host() -> (Iommufd<Fake>, GuestMap) {
    let guest = guest(None);
    (host_over(kernel(), &guest), guest)
}

/// A space in which `iova` leads to page `page` of RAM.
fn space_with(host: &Iommufd<Fake>, guest: &GuestMap, iova: u64, page: u64) -> HostSpaceId {
    let space = host.create().expect("a space");
    map(host, guest, space, iova, page, Perm::ReadWrite).expect("mapped");
    space
}

fn map(
    host: &Iommufd<Fake>,
    guest: &GuestMap,
    space: HostSpaceId,
    iova: u64,
    page: u64,
    perm: Perm,
) -> Result<(), RefusalCause> {
    let mem = guest.host_mem(page * PAGE, PAGE).expect("RAM");
    host.map(space, iova, mem, perm).map_err(|refused| refused.cause)
}

/// The page of RAM that the requests of `stream` reach with `iova`.
fn page_at(host: &Iommufd<Fake>, stream: HostStream, iova: u64) -> Option<u64> {
    host.kernel.translate(stream, iova).map(|(hva, _)| (hva - HVA) / PAGE)
}

#[test]
fn c1_a_group_goes_to_a_space_with_each_of_its_functions() {
    let (host, guest) = host();
    let (one, other) = (space_with(&host, &guest, 0x5000, 1), space_with(&host, &guest, 0x5000, 2));
    for (space, page) in [(one, 1), (other, 2), (one, 1)] {
        host.attach(A, space).expect("attached");
        assert_eq!([1, 2, 3].map(|device| page_at(&host, itself(device), 0x5000)), [Some(page), Some(page), None]);
    }
    host.kernel.calls();
    host.detach(A).expect("detached");
    assert_eq!(host.kernel.calls(), [Call::Detach(itself(1)), Call::Detach(itself(2))]);
    assert_eq!(page_at(&host, itself(1), 0x5000), None);
    // Also when it is nowhere.
    host.detach(A).expect("no error");
    assert!(host.attach(GroupId(9), one).is_err() && host.detach(GroupId(9)).is_err());
}

#[test]
fn c2_a_group_of_which_one_function_cannot_follow_is_where_it_was() {
    for from_nowhere in [true, false] {
        for refused in [1, 2] {
            let (host, guest) = host();
            let (old, new) = (space_with(&host, &guest, 0x5000, 1), space_with(&host, &guest, 0x5000, 2));
            if !from_nowhere {
                host.attach(A, old).expect("attached");
            }
            let (_, tables, _) = host.kernel.objects();
            let before = host.kernel.table_of(itself(2));
            host.kernel.refuse(move |call| match call {
                Call::Attach(stream, to) if *stream == itself(refused) && Some(*to) != before => Some(libc::EINVAL),
                _ => None,
            });
            let e = host.attach(A, new).expect_err("device {refused} cannot follow");
            assert_eq!(e.raw_os_error(), Some(libc::EINVAL));
            let page = (!from_nowhere).then_some(1);
            assert_eq!([1, 2].map(|device| page_at(&host, itself(device), 0x5000)), [page; 2], "{refused}");
            // The first made a page table for the space; one that nobody could be attached to is given back.
            assert_eq!(host.kernel.objects().1, tables + usize::from(refused == 2));
            host.kernel.refuse_nothing();
            host.attach(A, new).expect("attached");
            assert_eq!([1, 2].map(|device| page_at(&host, itself(device), 0x5000)), [Some(2); 2]);
        }
    }
}

#[test]
fn c2_a_group_that_cannot_go_back_can_be_detached() {
    let (host, guest) = host();
    let (old, new) = (space_with(&host, &guest, 0x5000, 1), space_with(&host, &guest, 0x5000, 2));
    host.attach(A, old).expect("attached");
    let mut calls = 0;
    // The first goes, the second does not, and the first does not come back.
    host.kernel.refuse(move |call| {
        calls += u32::from(matches!(call, Call::Attach(..)));
        (calls > 1 && matches!(call, Call::Attach(..))).then_some(libc::EIO)
    });
    assert!(host.attach(A, new).is_err());
    host.kernel.refuse(|call| (*call == Call::Detach(itself(1))).then_some(libc::EIO));
    assert!(host.detach(A).is_err(), "nothing is known of where it is");
    host.kernel.refuse_nothing();
    host.detach(A).expect("detached");
    assert_eq!([1, 2].map(|device| page_at(&host, itself(device), 0x5000)), [None; 2]);
    // From nowhere, what fails is undone by a detach.
    host.kernel.refuse(|call| matches!(call, Call::Attach(stream, _) if *stream == itself(2)).then_some(libc::EIO));
    assert!(host.attach(A, new).is_err());
    assert_eq!([1, 2].map(|device| page_at(&host, itself(device), 0x5000)), [None; 2]);
}

#[test]
fn c1_a_function_that_is_opened_later_goes_where_its_group_is_or_is_no_member() {
    let guest = guest(None);
    let kernel = kernel();
    let ioas = kernel.alloc_ioas().expect("an IOAS");
    let host = Iommufd::over(kernel, ioas, &guest).expect("a backend");
    host.add(A, bdf(1), HostDevice(1)).expect("added");
    assert!(matches!(host.add(A, bdf(1), HostDevice(1)), Err(Refused::Twice)));
    let space = space_with(&host, &guest, 0x5000, 1);
    host.attach(A, space).expect("attached");
    host.kernel.refuse(|call| matches!(call, Call::Attach(stream, _) if *stream == itself(2)).then_some(libc::ENOMEM));
    assert!(matches!(host.add(A, bdf(2), HostDevice(2)), Err(Refused::Group(_))));
    assert!(!host.has(bdf(2)));
    assert_eq!(host.kernel.table_of(itself(2)), None);
    host.kernel.refuse_nothing();
    host.add(A, bdf(2), HostDevice(2)).expect("added");
    assert_eq!(host.limits_of(A).expect("open").address_width(), 46);
    assert_eq!([1, 2].map(|device| page_at(&host, itself(device), 0x5000)), [Some(1); 2]);
}

#[test]
fn c4_a_part_is_attached_by_its_pasid_and_nothing_else_moves() {
    let (host, guest) = host();
    let (whole, own) = (space_with(&host, &guest, 0x5000, 1), space_with(&host, &guest, 0x5000, 2));
    host.attach(WITH_PASIDS, whole).expect("attached");
    host.attach_part(part(5, 7), own).expect("attached");
    host.attach_part(part(5, 8), whole).expect("attached");
    let pages = |host: &Iommufd<Fake>| [itself(5), part(5, 7), part(5, 8)].map(|of| page_at(host, of, 0x5000));
    assert_eq!(pages(&host), [Some(1), Some(2), Some(1)]);
    // The function moves, and its parts stay; a part moves; one goes.
    host.attach(WITH_PASIDS, own).expect("attached");
    assert_eq!(pages(&host), [Some(2), Some(2), Some(1)]);
    host.attach_part(part(5, 7), whole).expect("attached");
    host.detach_part(part(5, 8)).expect("detached");
    assert_eq!(pages(&host), [Some(2), Some(1), None]);
    host.detach_part(part(5, 8)).expect("no error");
    // Who has no PASIDs shares the page table.
    host.attach(A, whole).expect("attached");
    assert_eq!(host.kernel.table_of(itself(1)), host.kernel.table_of(part(5, 7)));
}

#[test]
fn c4_a_function_with_pasids_does_not_go_by_a_page_table_that_takes_none() {
    let (host, guest) = host();
    let space = space_with(&host, &guest, 0x5000, 1);
    host.attach(A, space).expect("attached");
    host.attach(WITH_PASIDS, space).expect("attached");
    host.attach_part(part(5, 7), space).expect("a page table of its own was made for it");
    assert_eq!([itself(1), itself(5), part(5, 7)].map(|of| page_at(&host, of, 0x5000)), [Some(1); 3]);
}

#[test]
fn c4_what_cannot_be_attached_is_refused_by_name_and_is_no_error_to_detach() {
    let (host, guest) = host();
    let space = space_with(&host, &guest, 0x5000, 1);
    host.attach(WITH_PASIDS, space).expect("attached");
    host.kernel.calls();
    let refused = |of: HostStream| host.attach_part(of, space).expect_err("refused").to_string();
    // To the kernel that would be the function itself.
    for whole in [itself(5), part(5, 0)] {
        assert!(refused(whole).contains("PASID 0"));
        host.detach_part(whole).expect("nothing was attached");
    }
    assert!(refused(part(5, 1 << 20)).contains("20 bits"));
    assert!(host.attach_part(part(5, (1 << 20) - 1), space).is_ok());
    let message = refused(part(1, 7));
    assert!(message.contains("6.15") && message.contains("sm_on"), "{message}");
    host.detach_part(part(1, 7)).expect("nothing was attached");
    assert!(host.attach_part(part(9, 7), space).is_err() && host.detach_part(part(9, 7)).is_err());
    let its = host.kernel.table_of(itself(5)).expect("attached");
    assert_eq!(host.kernel.calls(), [Call::Attach(part(5, (1 << 20) - 1), its)], "nobody else was asked for");
    // A kernel that knows PASIDs, and a unit that makes no page tables for them.
    let mut kernel = kernel();
    kernel.makes_pasid_tables = false;
    let host = host_over(kernel, &guest);
    let space = host.create().expect("a space");
    host.attach(WITH_PASIDS, space).expect("attached");
    assert!(host.attach_part(part(5, 7), space).expect_err("refused").to_string().contains("scalable mode"));
}

#[test]
fn b12_memory_is_pinned_once_in_whatever_number_of_spaces() {
    let (host, guest) = host();
    assert!(host.pins_once());
    let spaces = [0, 1].map(|_| {
        let space = host.create().expect("a space");
        host.map(space, 0, guest.host_mem(0, RAM_PAGES * PAGE).expect("RAM"), Perm::ReadWrite).expect("identity");
        space
    });
    host.attach(A, spaces[0]).expect("attached");
    host.attach(B, spaces[1]).expect("attached");
    map(&host, &guest, spaces[1], 1 << 30, 3, Perm::Read).expect("once more");
    assert_eq!(host.kernel.pinned(), RAM_PAGES as usize);
    assert!(!host.kernel.calls().iter().any(|call| matches!(call, Call::Map(_) | Call::MapFile(_))));
}

#[test]
fn b12_where_parts_are_not_copied_each_space_maps_for_itself() {
    let file = || Some(Backing { file: Arc::new(File::open("/dev/null").expect("a file")), offset: 0 });
    for (backing, maps_files) in [(None, true), (file(), true), (file(), false)] {
        let by_file = backing.is_some() && maps_files;
        let guest = guest(backing);
        let mut kernel = kernel();
        (kernel.copies_parts, kernel.maps_files) = (false, maps_files);
        let host = host_over(kernel, &guest);
        assert!(!host.pins_once());
        assert_eq!(host.kernel.objects(), (1, 0, 0), "nothing stays in the IOAS of RAM");
        let spaces = [space_with(&host, &guest, 0x5000, 1), space_with(&host, &guest, 0x5000, 1)];
        host.attach(A, spaces[0]).expect("attached");
        host.attach(B, spaces[1]).expect("attached");
        assert_eq!([1, 3].map(|device| page_at(&host, itself(device), 0x5000)), [Some(1); 2]);
        assert_eq!(host.kernel.pinned(), 2);
        let by_address = host.kernel.calls().iter().filter(|call| matches!(call, Call::Map(_))).count();
        assert_eq!(by_address, if by_file { 0 } else { 2 });
    }
}

#[test]
fn b9_a_device_may_do_exactly_what_was_granted() {
    for copies_parts in [true, false] {
        let guest = guest(None);
        let mut kernel = kernel();
        kernel.copies_parts = copies_parts;
        let host = host_over(kernel, &guest);
        let space = host.create().expect("a space");
        host.attach(A, space).expect("attached");
        for (iova, perm) in [(0x1000, Perm::Read), (0x2000, Perm::Write), (0x3000, Perm::ReadWrite)] {
            map(&host, &guest, space, iova, 7, perm).expect("mapped");
            assert_eq!(host.kernel.translate(itself(1), iova), Some((HVA + 7 * PAGE, perm)));
        }
        let span = |first| UnmapRange::Span { first, last: first + PAGE - 1 };
        assert_eq!(host.unmap(space, span(0x2000)).expect("unmapped"), PAGE);
        assert_eq!([0x1000, 0x2000, 0x3000].map(|iova| page_at(&host, itself(2), iova)), [Some(7), None, Some(7)]);
        assert!(host.unmap(space, span(0x2000)).is_err(), "nothing is there");
        assert_eq!(host.unmap(space, UnmapRange::All).expect("unmapped"), 2 * PAGE);
    }
}

#[test]
fn b13_limits_are_read_and_nothing_stays_of_that() {
    let (host, guest) = host();
    assert_eq!(host.kernel.objects(), (1, 0, 1), "the IOAS of RAM");
    assert!((1..=5).all(|device| host.kernel.table_of(itself(device)).is_none()));
    let width = |group| host.limits_of(group).expect("open").address_width();
    assert_eq!((width(A), width(B), width(FAR)), (46, 39, 48));
    assert_eq!(host.limits_of(A).expect("open").page_sizes, 0x20_1000);
    assert_eq!(host.limits_of(A).expect("open").iova_ranges.len(), 2);
    assert!(host.limits_of(GroupId(9)).is_none() && host.placement(GroupId(9)).is_none());
    let space = host.create().expect("a space");
    assert_eq!(host.limits(space).address_width(), 39, "any group may come into it");
    assert_eq!(host.placement(A), Some(Placement::PerSpace));
    // What the kernel does not map, it says so.
    host.attach(A, space).expect("attached");
    assert_eq!(map(&host, &guest, space, 0xfee0_0000, 1, Perm::Read), Err(RefusalCause::Range));
}

#[test]
fn b13_a_function_whose_limits_cannot_be_read_is_not_opened() {
    let guest = guest(None);
    for refuse in [|call: &Call| matches!(call, Call::AllocHwpt(..)), |call: &Call| matches!(call, Call::Attach(..))] {
        let kernel = kernel();
        let ioas = kernel.alloc_ioas().expect("an IOAS");
        let host = Iommufd::over(kernel, ioas, &guest).expect("a backend");
        host.kernel.refuse(move |call| refuse(call).then_some(libc::EIO));
        assert!(matches!(host.add(A, bdf(1), HostDevice(1)), Err(Refused::Limits(_))));
        assert_eq!((host.kernel.objects(), host.placement(A)), ((1, 0, 1), None));
    }
    // One whose pages are larger than the guest's.
    let mut kernel = kernel();
    kernel.alignment = 4 * PAGE;
    let ioas = kernel.alloc_ioas().expect("an IOAS");
    let host = Iommufd::over(kernel, ioas, &guest).expect("a backend");
    assert!(matches!(host.add(A, bdf(1), HostDevice(1)), Err(Refused::Limits(e)) if e.to_string().contains("0x4000")));
}

#[test]
fn b12_a_space_has_one_page_table_for_each_kind_of_unit_and_is_given_back_whole() {
    let (host, guest) = host();
    let before = host.kernel.objects();
    let (one, other) = (space_with(&host, &guest, 0x5000, 1), space_with(&host, &guest, 0x5000, 2));
    for _ in 0..3 {
        for group in [A, B, FAR] {
            host.attach(group, one).expect("attached");
            host.attach(group, other).expect("attached");
        }
        assert_eq!(host.kernel.objects().1, 4, "they stay");
    }
    assert_ne!(host.kernel.table_of(itself(1)), host.kernel.table_of(itself(4)), "behind another unit");
    assert_eq!(host.kernel.table_of(itself(1)), host.kernel.table_of(itself(3)));
    assert_eq!([1, 2, 3, 4].map(|device| page_at(&host, itself(device), 0x5000)), [Some(2); 4]);
    [A, B, FAR].into_iter().for_each(|group| host.detach(group).expect("detached"));
    host.destroy(one);
    host.destroy(other);
    assert_eq!(host.kernel.objects(), before);
    assert!(host.attach(A, one).is_err());
}

#[test]
fn b12_a_space_is_whole_before_a_group_is_switched_to_it() {
    let (host, guest) = host();
    let space = space_with(&host, &guest, 0x5000, 1);
    let attached = |host: &Iommufd<Fake>| page_at(host, itself(4), 0x5000);
    host.attach(A, space).expect("attached");
    map(&host, &guest, space, 0x6000, 2, Perm::Read).expect("mapped");
    // Behind another unit: its page table comes later, and has all there is.
    host.attach(FAR, space).expect("attached");
    assert_eq!((attached(&host), page_at(&host, itself(4), 0x6000)), (Some(1), Some(2)));
    let outside = space_with(&host, &guest, 0xfee0_0000, 1);
    assert_eq!(host.attach(FAR, outside).expect_err("reserved").raw_os_error(), Some(libc::EADDRINUSE));
    assert_eq!(attached(&host), Some(1));
}

#[test]
fn b11_an_attach_without_memory_says_what_helps() {
    let (host, guest) = host();
    let space = space_with(&host, &guest, 0x5000, 1);
    host.kernel.refuse(|call| matches!(call, Call::AllocHwpt(..)).then_some(libc::ENOMEM));
    assert!(host.attach(A, space).expect_err("refused").to_string().contains("ulimit -l"));
    assert!(host.attach_part(part(5, 7), space).expect_err("refused").to_string().contains("ulimit -l"));
}

const BAR: u64 = 0xc000_0000;
const BAR_HVA: u64 = 0x6000_0000;

/// RAM, and two pages of a BAR of function 00:08.0.
fn guest_with_bar(with_dma_buf: bool) -> GuestMap {
    let of = vtd::Requester { segment: 0, sid: vtd::SourceId::new(0, 8, 0) };
    // SAFETY: nobody uses the address.
    let bar = unsafe { Region::bar(BAR, 2 * PAGE, BAR_HVA, of, Arc::new(())) }.expect("whole pages");
    let file = with_dma_buf.then(|| Arc::new(File::open("/dev/null").expect("a file")));
    guest(None).with(bar.with_dma_buf(file)).expect("there is room")
}

fn map_bar(host: &Iommufd<Fake>, guest: &GuestMap, space: HostSpaceId, iova: u64) -> Result<(), RefusalCause> {
    let mem = guest.host_mem(BAR + PAGE, PAGE).expect("in the BAR");
    host.map(space, iova, mem, Perm::Write).map_err(|refused| refused.cause)
}

#[test]
fn b10_a_bar_is_mapped_by_its_dma_buf_and_pins_nothing() {
    let guest = guest_with_bar(true);
    assert_eq!(guest.host_mem(BAR + PAGE, PAGE).and_then(|mem| Some(mem.dma_buf()?.1)), Some(PAGE), "its offset");
    assert!(guest.host_mem(BAR, PAGE).is_some_and(|mem| mem.backing().is_none()), "no file for other processes");
    let host = host_over(kernel(), &guest);
    let (before, pinned) = (host.kernel.objects(), host.kernel.pinned());
    let space = host.create().expect("a space");
    host.attach(A, space).expect("attached");
    host.kernel.calls();
    for iova in [0x5000, 0x9000] {
        map_bar(&host, &guest, space, iova).expect("mapped");
        assert_eq!(host.kernel.translate(itself(2), iova + 8), Some((BAR_HVA + PAGE + 8, Perm::Write)));
    }
    let maps = host.kernel.calls().into_iter().filter(|call| matches!(call, Call::MapDmaBuf(_))).count();
    assert_eq!(maps, 3, "whether the kernel can is tried once");
    assert_eq!(host.kernel.pinned(), pinned);
    // Without a page table, too.
    let detached = host.create().expect("a space");
    map_bar(&host, &guest, detached, 0x5000).expect("mapped");
    host.attach(FAR, detached).expect("attached");
    assert_eq!(host.kernel.translate(itself(4), 0x5000), Some((BAR_HVA + PAGE, Perm::Write)));
    assert_eq!(host.unmap(space, UnmapRange::All).expect("unmapped"), 2 * PAGE);
    [A, FAR].into_iter().for_each(|group| host.detach(group).expect("detached"));
    [space, detached].into_iter().for_each(|space| host.destroy(space));
    assert_eq!(host.kernel.objects(), before, "nothing stays of the trial");
}

#[test]
fn b15_a_bar_whose_memory_is_disabled_is_reached_again_when_it_is_mapped_again() {
    let guest = guest_with_bar(true);
    let host = host_over(kernel(), &guest);
    let space = host.create().expect("a space");
    host.attach(A, space).expect("attached");
    let reached = || host.kernel.translate(itself(1), 0x5000).is_some();
    // Before anything was tried.
    host.kernel.disable_bars();
    assert_eq!(map_bar(&host, &guest, space, 0x5000), Err(RefusalCause::Other));
    for _ in 0..2 {
        host.kernel.enable_bars();
        map_bar(&host, &guest, space, 0x5000).expect("mapped");
        assert!(reached());
        host.kernel.disable_bars();
        assert!(!reached());
        assert_eq!(host.unmap(space, UnmapRange::All).expect("it is there to be unmapped"), PAGE);
        assert_eq!(map_bar(&host, &guest, space, 0x5000), Err(RefusalCause::Other));
    }
}

/// Linux takes both for memory with pages as long as no page table is there, and then refuses to fill one.
#[test]
fn b10_a_bar_that_the_kernel_cannot_map_is_refused_at_once_and_keeps_nobody_out() {
    for (has_dma_buf, knows_dma_bufs) in [(true, false), (false, true), (false, false)] {
        let guest = guest_with_bar(has_dma_buf);
        let mut kernel = kernel();
        kernel.knows_dma_bufs = knows_dma_bufs;
        let host = host_over(kernel, &guest);
        let before = host.kernel.objects();
        let space = host.create().expect("a space");
        for _ in 0..2 {
            assert_eq!(map_bar(&host, &guest, space, 0x5000), Err(RefusalCause::Target));
        }
        host.attach(A, space).expect("the space has nothing that cannot be mapped");
        host.detach(A).expect("detached");
        host.destroy(space);
        assert_eq!(host.kernel.objects(), before);
    }
}

#[test]
fn f6_a_function_that_is_closed_is_attached_to_nothing_and_can_come_again() {
    let (host, guest) = host();
    let space = space_with(&host, &guest, 0, 1);
    host.attach(A, space).expect("attached");
    host.attach(WITH_PASIDS, space).expect("attached");
    host.attach_part(part(5, 7), space).expect("attached");
    // The other one of its group stays where it is, and the group there.
    assert_eq!(host.take(bdf(1)), Some(HostDevice(1)));
    assert_eq!((host.kernel.table_of(itself(1)), host.kernel.table_of(itself(2)).is_some()), (None, true));
    assert_eq!(host.placement(A), Some(Placement::PerSpace));
    assert!(!host.has(bdf(1)) && host.has(bdf(2)));
    // With the last one its group goes, and with a function its PASIDs.
    assert_eq!((host.take(bdf(2)), host.take(bdf(5))), (Some(HostDevice(2)), Some(HostDevice(5))));
    assert_eq!((host.placement(A), host.limits_of(A), host.placement(WITH_PASIDS)), (None, None, None));
    assert!([itself(2), itself(5), part(5, 7)].iter().all(|stream| host.kernel.table_of(*stream).is_none()));
    assert_eq!((host.take(bdf(2)), host.take(bdf(9))), (None, None));
    assert!(host.attach(A, space).is_err());
    // It comes again, attached to nothing, and reaches what it is attached to.
    host.add(A, bdf(1), HostDevice(1)).expect("added");
    assert_eq!(host.kernel.table_of(itself(1)), None);
    host.attach(A, space).expect("attached");
    assert!(host.kernel.table_of(itself(1)).is_some());
    host.destroy(space);
}
