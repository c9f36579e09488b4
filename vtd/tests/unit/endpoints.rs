//! Emulated DMA: endpoints, sessions, and what an invalidation does to them (rule 6).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};
use vtd::{Access, DmaError, Gpa, Iova, Perm};

use crate::rig::{NIC, NVME, Rig, context_global, iotlb_domain, iotlb_global, iotlb_pages};

/// NVME in domain 1 with `pages` pages at 0x10_0000, which lead to 0x80_0000.
fn rig(pages: u64) -> (Rig, u64) {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x10_0000, 0x80_0000, pages);
    (rig, root)
}

#[test]
fn an_access_goes_over_pages_that_lead_to_different_places() {
    let (mut rig, root) = rig(1);
    rig.pages(root, 0x10_1000, 0x90_0000, 1);
    let endpoint = rig.unit.endpoint(NVME);
    endpoint.write(Iova(0x10_0ffe), &[1, 2, 3, 4]).unwrap();
    assert_eq!(rig.load(0x80_0ff8) >> 48, 0x0201);
    assert_eq!(rig.load(0x90_0000), 0x0403);
    let mut data = [0; 4];
    endpoint.read(Iova(0x10_0ffe), &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4]);
    // The second page is gone: the first is written, then a fault.
    rig.clear(root, 0x10_1000, 1);
    assert!(rig.submit(&[iotlb_pages(1, 0x10_1000, 0)]));
    let error = endpoint.write(Iova(0x10_0ffe), &[9; 4]).unwrap_err();
    assert!(matches!(error, DmaError::Fault(fault) if fault.iova == Iova(0x10_1000)));
    assert_eq!(rig.load(0x80_0ff8) >> 48, 0x0909);
    assert_eq!(rig.fault_records().len(), 1);
}

#[test]
fn a_large_leaf_is_no_table_whatever_its_memory_holds() {
    let (mut rig, root) = rig(0);
    rig.leaf(root, 48, 0x4000_0000, 0x100_0000, Some(Perm::ReadWrite), 2);
    // What would be entries of present pages.
    (0..4).for_each(|index| rig.store(0x100_0000 + index * 8, 0x90_0003));
    let endpoint = rig.unit.endpoint(NVME);
    let page = |number: u64| endpoint.enter().translate(Iova(0x4000_0000 + (number << 12)), Access::Write);
    for number in [0, 1, 3, 0x1ff] {
        assert_eq!(page(number), Ok(Gpa(0x100_0000 + (number << 12))), "with what was cached of the pages before");
    }
}

#[test]
fn a_translation_is_cached_until_its_invalidation() {
    let (mut rig, root) = rig(3);
    let endpoint = rig.unit.endpoint(NVME);
    let page = |number: u64| endpoint.enter().translate(Iova(0x10_0000 + (number << 12)), Access::Read);
    for number in 0..3 {
        assert!(page(number).is_ok());
    }
    rig.clear(root, 0x10_0000, 3);
    assert_eq!(page(0), Ok(Gpa(0x80_0000)), "cached");
    assert!(rig.submit(&[iotlb_pages(2, 0x10_0000, 0)]));
    assert_eq!(page(0), Ok(Gpa(0x80_0000)), "another domain");
    assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 0)]));
    assert!(page(0).is_err());
    assert_eq!(page(1), Ok(Gpa(0x80_1000)), "only that page");
    assert!(rig.submit(&[iotlb_domain(2)]));
    assert_eq!(page(1), Ok(Gpa(0x80_1000)));
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert!(page(1).is_err() && page(2).is_err());
}

#[test]
fn what_is_not_present_is_not_cached() {
    let (mut rig, root) = rig(0);
    let endpoint = rig.unit.endpoint(NVME);
    assert!(endpoint.read(Iova(0x10_0000), &mut [0]).is_err());
    rig.pages(root, 0x10_0000, 0x80_0000, 1);
    assert!(endpoint.read(Iova(0x10_0000), &mut [0]).is_ok());
}

#[test]
fn an_invalidation_of_a_part_of_a_large_leaf_reaches_all_of_it() {
    let (mut rig, root) = rig(0);
    rig.leaf(root, 48, 0x20_0000, 0x100_0000, Some(Perm::ReadWrite), 2);
    let endpoint = rig.unit.endpoint(NVME);
    assert!(endpoint.read(Iova(0x23_4000), &mut [0]).is_ok());
    rig.leaf(root, 48, 0x20_0000, 0, None, 2);
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 0)]));
    assert!(endpoint.read(Iova(0x23_4000), &mut [0]).is_err());
}

#[test]
fn rule6_a_table_that_the_guest_took_away_is_not_walked_after_the_invalidation() {
    // The table of level 1 is cached by the first access; its second page is not, whatever else is.
    for (scope, reached) in [
        (iotlb_pages(1, 0x10_0000, 0), true),
        (iotlb_pages(1, 0, 9), true),
        (iotlb_domain(1), true),
        (iotlb_global(), true),
        (context_global(), true),
        (iotlb_domain(2), false),
        (iotlb_pages(2, 0x10_0000, 0), false),
        (iotlb_pages(1, 0x20_0000, 0), false),
    ] {
        let (mut rig, root) = rig(2);
        let endpoint = rig.unit.endpoint(NVME);
        assert!(endpoint.enter().translate(Iova(0x10_0000), Access::Read).is_ok());
        let entry = rig.entry_address(root, 48, 0x10_0000, 2);
        rig.store(entry, 0);
        assert!(rig.submit(&[scope]));
        assert_eq!(endpoint.enter().translate(Iova(0x10_1000), Access::Read).is_err(), reached, "{scope:x?}");
    }
}

#[test]
fn rule6_what_upper_entries_do_not_permit_is_not_permitted_from_a_cached_table() {
    let (mut rig, root) = rig(2);
    for (level, perm) in [(4, Perm::Read), (3, Perm::Read), (2, Perm::Write)] {
        let entry = rig.entry_address(root, 48, 0x10_0000, level);
        let before = rig.load(entry);
        rig.store(entry, before & !3 | u64::from(perm.readable()) | u64::from(perm.writable()) << 1);
        assert!(rig.submit(&[iotlb_global()]));
        let endpoint = rig.unit.endpoint(NVME);
        let session = endpoint.enter();
        for page in [0x10_0000, 0x10_1000] {
            assert_eq!(session.translate(Iova(page), Access::Read).is_ok(), perm.readable());
            assert_eq!(session.translate(Iova(page), Access::Write).is_ok(), perm.writable());
        }
        drop(session);
        rig.store(entry, before);
    }
}

#[test]
fn rule6_pages_and_parts_of_large_leaves_lead_where_they_do_whichever_is_asked_first() {
    let (mut rig, root) = rig(0);
    rig.leaf(root, 48, 0x4000_0000, 0x8000_0000, Some(Perm::ReadWrite), 3);
    rig.leaf(root, 48, 0x20_0000, 0x100_0000, Some(Perm::ReadWrite), 2);
    // A region beside them with pages, and one that is wider than a word of the cache is likely to hold.
    rig.pages(root, 0x40_0000, 0xffff_f000_0000, 2);
    rig.leaf(root, 48, 0xffff_c000_0000, 0xffff_4000_0000, Some(Perm::ReadWrite), 3);
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    for (iova, gpa) in [
        (0x4000_0000, 0x8000_0000),
        (0x7fff_ffff, 0xbfff_ffff),
        (0x4020_5123, 0x8020_5123),
        (0x4020_6123, 0x8020_6123),
        (0x20_0000, 0x100_0000),
        (0x3f_ffff, 0x11f_ffff),
        (0x21_0001, 0x101_0001),
        (0x40_0008, 0xffff_f000_0008),
        (0x40_1008, 0xffff_f000_1008),
        (0xffff_ffff_f008, 0xffff_7fff_f008),
    ] {
        for _ in 0..2 {
            assert_eq!(session.translate(Iova(iova), Access::Write), Ok(Gpa(gpa)), "{iova:#x}");
        }
    }
}

#[test]
fn rule6_a_context_entry_is_cached_until_its_invalidation() {
    let (mut rig, root) = rig(1);
    rig.pages(root, 0x20_0000, 0x81_0000, 1);
    let other = rig.table();
    rig.pages(other, 0x10_0000, 0x90_0000, 1);
    rig.pages(other, 0x20_0000, 0x91_0000, 1);
    let endpoint = rig.unit.endpoint(NVME);
    let translate = |iova| endpoint.enter().translate(Iova(iova), Access::Read);
    assert_eq!(translate(0x10_0000), Ok(Gpa(0x80_0000)));
    rig.set_paged(NVME, other, 48, 2);
    assert_eq!(translate(0x20_0000), Ok(Gpa(0x81_0000)), "cached, for another table of level 1");
    // Not of the IOTLB.
    assert!(rig.submit(&[iotlb_pages(1, 0x20_0000, 0)]));
    assert_eq!(translate(0x20_0000), Ok(Gpa(0x81_0000)));
    assert!(rig.submit(&[context_global()]));
    assert_eq!((translate(0x10_0000), translate(0x20_0000)), (Ok(Gpa(0x90_0000)), Ok(Gpa(0x91_0000))));
    // Its domain is the new one.
    rig.clear(other, 0x10_0000, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    assert_eq!(translate(0x10_0000), Ok(Gpa(0x90_0000)));
    assert!(rig.submit(&[iotlb_domain(2)]));
    assert!(translate(0x10_0000).is_err());
}

#[test]
fn rule6_pass_through_and_no_translation_are_cached_until_their_invalidation() {
    let (mut rig, root) = rig(1);
    rig.set_pass_through(NVME, 3);
    assert!(rig.submit(&[context_global()]));
    let endpoint = rig.unit.endpoint(NVME);
    let translate = |iova| endpoint.enter().translate(Iova(iova), Access::Write);
    for iova in [0x10_0000, 0x20_0000, 0xffff_ffff_f000] {
        assert_eq!(translate(iova), Ok(Gpa(iova)));
    }
    // Up to the width of the host, whether the entry is cached or not.
    let beyond = 1 << 48;
    for _ in 0..2 {
        assert!(matches!(translate(beyond), Err(DmaError::Fault(fault)) if fault.reason.code() == 4));
        assert!(rig.submit(&[context_global()]));
    }
    assert_eq!(translate(0x10_0000), Ok(Gpa(0x10_0000)));
    rig.set_paged(NVME, root, 48, 1);
    assert_eq!(translate(0x30_0000), Ok(Gpa(0x30_0000)), "cached");
    assert!(rig.submit(&[context_global()]));
    assert!(translate(0x30_0000).is_err());
    rig.command(|on| on.with_translation(false));
    assert_eq!((translate(0x30_0000), translate(beyond)), (Ok(Gpa(0x30_0000)), Ok(Gpa(beyond))));
    assert!(matches!(translate(0xfee0_0000), Err(DmaError::InterruptRange(_))));
    rig.command(|on| on.with_translation(true));
    assert!(translate(0x30_0000).is_err());
    assert_eq!(translate(0x10_0000), Ok(Gpa(0x80_0000)));
}

#[test]
fn a_context_invalidation_and_translation_off_reach_what_is_cached() {
    let (mut rig, _) = rig(1);
    let endpoint = rig.unit.endpoint(NVME);
    let translate = || endpoint.enter().translate(Iova(0x10_0000), Access::Read);
    assert_eq!(translate(), Ok(Gpa(0x80_0000)));
    rig.command(|on| on.with_translation(false));
    assert_eq!(translate(), Ok(Gpa(0x10_0000)));
    rig.command(|on| on.with_translation(true));
    assert_eq!(translate(), Ok(Gpa(0x80_0000)));
    rig.clear_context(NVME);
    assert!(rig.submit(&[context_global()]));
    assert!(translate().is_err());
    rig.unit.reset();
    assert_eq!(translate(), Ok(Gpa(0x10_0000)));
}

#[test]
fn a_cached_page_that_denies_an_access_is_walked_again() {
    let (mut rig, root) = rig(0);
    rig.leaf(root, 48, 0x10_0000, 0x80_0000, Some(Perm::Read), 1);
    let endpoint = rig.unit.endpoint(NVME);
    assert!(endpoint.read(Iova(0x10_0000), &mut [0]).is_ok());
    assert!(endpoint.write(Iova(0x10_0000), &[0]).is_err());
    rig.leaf(root, 48, 0x10_0000, 0x80_0000, Some(Perm::ReadWrite), 1);
    assert!(endpoint.write(Iova(0x10_0000), &[0]).is_ok());
}

#[test]
fn a_translation_to_no_memory_is_no_fault() {
    let (mut rig, root) = rig(0);
    rig.pages(root, 0x10_0000, 0x7000_0000, 1);
    let endpoint = rig.unit.endpoint(NVME);
    let error = endpoint.read(Iova(0x10_0010), &mut [0]).unwrap_err();
    assert_eq!(error, DmaError::NoMemory { iova: Iova(0x10_0010), gpa: Gpa(0x7000_0010) });
    assert_eq!(rig.fault_records(), []);
}

#[test]
fn a_session_is_guest_memory_at_iovas() {
    let (mut rig, root) = rig(2);
    rig.pages(root, 0x10_2000, 0xa0_0000, 1);
    rig.leaf(root, 48, 0x10_3000, 0xb0_0000, Some(Perm::Read), 1);
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    // Two contiguous pages are one slice, and the third is another.
    let slices = session.get_slices(GuestAddress(0x10_0800), 0x2000, Permissions::ReadWrite).unwrap();
    let lengths: Vec<usize> = slices.map(|slice| slice.unwrap().len()).collect();
    assert_eq!(lengths, [0x1800, 0x800]);
    session.write_slice(&[7; 0x2000], GuestAddress(0x10_0800)).unwrap();
    assert_eq!((rig.load(0x80_0800), rig.load(0xa0_07f8)), (0x0707_0707_0707_0707, 0x0707_0707_0707_0707));
    assert!(session.check_range(GuestAddress(0x10_0000), 0x4000, Permissions::Read));
    assert!(!session.check_range(GuestAddress(0x10_0000), 0x4000, Permissions::Write));
    assert!(!session.check_range(GuestAddress(0x10_0000), 0x4001, Permissions::Read));
    assert_eq!(rig.fault_records(), [], "asking is no request");
    assert!(session.write_slice(&[1; 8], GuestAddress(0x10_3000)).is_err());
    assert_eq!(rig.fault_records(), [(0, NVME.sid, 5, 0x10_3000, false)]);
}

#[test]
fn rule6_a_slice_without_a_permission_leads_nowhere() {
    let (rig, _) = rig(1);
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    // Neither where the address leads somewhere, nor where it would be memory if it were not translated.
    for iova in [0x10_0000, 0x80_0000] {
        let mut slices = session.get_slices(GuestAddress(iova), 4096, Permissions::No).unwrap();
        assert!(slices.next().unwrap().is_err() && slices.next().is_none());
        assert!(!session.check_range(GuestAddress(iova), 4096, Permissions::No));
        assert!(!session.check_range(GuestAddress(iova), 0, Permissions::No));
    }
    drop(session);
    rig.command(|on| on.with_translation(false));
    assert!(!endpoint.enter().check_range(GuestAddress(0x10_0000), 4096, Permissions::No), "with translation off, too");
}

#[test]
fn rule6_a_slice_of_no_bytes_is_none_and_asks_nobody() {
    let (rig, _) = rig(0);
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    assert!(session.get_slices(GuestAddress(0x10_0000), 0, Permissions::Read).unwrap().next().is_none());
    assert!(session.check_range(GuestAddress(0x10_0000), 0, Permissions::Read));
    assert!(session.read(Iova(0x10_0000), &mut []).is_ok() && session.write(Iova(0x10_0000), &[]).is_ok());
    assert_eq!(rig.fault_records(), []);
}

#[test]
fn rule6_reading_and_writing_are_asked_of_one_translation() {
    // The page that is cached may be read, and the one that took its place (without an invalidation yet) be written:
    // neither may be both.
    let (mut rig, root) = rig(0);
    rig.leaf(root, 48, 0x10_0000, 0x80_0000, Some(Perm::Read), 1);
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    assert!(session.translate(Iova(0x10_0000), Access::Read).is_ok());
    rig.leaf(root, 48, 0x10_0000, 0x90_0000, Some(Perm::Write), 1);
    assert!(!session.check_range(GuestAddress(0x10_0000), 8, Permissions::ReadWrite));
    let mut slices = session.get_slices(GuestAddress(0x10_0000), 8, Permissions::ReadWrite).unwrap();
    assert!(slices.next().unwrap().is_err());
    assert_eq!(rig.fault_records(), [(0, NVME.sid, 6, 0x10_0000, true)]);
    // And of a page that may only be read, it is the write that is refused.
    rig.leaf(root, 48, 0x10_1000, 0x90_0000, Some(Perm::Read), 1);
    rig.write32(vtd::spec::registers::offset::FSTS, 1);
    let mut slices = session.get_slices(GuestAddress(0x10_1000), 8, Permissions::ReadWrite).unwrap();
    assert!(slices.next().unwrap().is_err());
}

#[test]
fn rule6_no_access_goes_on_beyond_the_last_address() {
    // With translation off, every address leads to itself.
    let rig = Rig::new();
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    let last_page = GuestAddress(!0xfff);
    for permissions in [Permissions::Read, Permissions::Write, Permissions::ReadWrite] {
        assert!(!session.check_range(last_page, 0x2000, permissions));
        let mut slices = session.get_slices(last_page, 0x2000, permissions).unwrap();
        assert!(slices.next().unwrap().is_err() && slices.next().is_none());
    }
    let error = session.read(Iova(!0xfff), &mut [0; 0x2000]).unwrap_err();
    assert_eq!(error, DmaError::NoMemory { iova: Iova(!0xfff), gpa: Gpa(!0xfff) });
    assert!(session.read_slice(&mut [0; 0x2000], last_page).is_err());
}

#[test]
fn an_invalidation_waits_for_the_sessions_that_are_open() {
    let (mut rig, root) = rig(1);
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    assert!(session.translate(Iova(0x10_0000), Access::Write).is_ok());
    rig.clear(root, 0x10_0000, 1);
    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        let invalidation = scope.spawn(move || {
            assert!(rig.submit(&[iotlb_pages(1, 0x10_0000, 0)]));
            done.send(()).unwrap();
            rig
        });
        // It cannot be done while the session is open, however long that takes.
        assert_eq!(is_done.recv_timeout(Duration::from_millis(200)), Err(mpsc::RecvTimeoutError::Timeout));
        // Register reads and a session that begins now do not wait.
        assert!(endpoint.enter().translate(Iova(0x10_0000), Access::Write).is_err());
        let mut status = [0; 4];
        endpoint_unit_read(&endpoint, &mut status);
        drop(session);
        is_done.recv().unwrap();
        drop(invalidation.join());
    });
}

fn endpoint_unit_read(endpoint: &vtd::Endpoint<crate::rig::Memory>, status: &mut [u8]) {
    endpoint.unit().read(vtd::spec::registers::offset::GSTS, status);
    assert_ne!(status, [0; 4]);
}

#[test]
fn no_access_comes_after_the_wait_status_of_its_unmap() {
    // The guest gives a page to a device, takes it back, and then uses it for something else: from then on it never
    // changes, whatever the device does meanwhile.
    let (mut rig, root) = rig(0);
    let endpoint = rig.unit.endpoint(NVME);
    let other = rig.unit.endpoint(NIC);
    // Its neighbour stays: the table that leads to both is cached again and again.
    rig.pages(root, 0x10_1000, 0x9f_0000, 1);
    let (stop, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    endpoint.write(Iova(0x10_1008), &[0xdd; 8]).unwrap();
                    if endpoint.write(Iova(0x10_0008), &[0xdd; 8]).is_ok() {
                        writes.fetch_add(1, Ordering::Relaxed);
                    }
                    let _ = other.write(Iova(0x10_0008), &[0xdd; 8]);
                }
            });
        }
        for round in 0..100u64 {
            let gpa = 0x80_0000 + (round % 16) * 4096;
            rig.pages(root, 0x10_0000, gpa, 1);
            // What was not there was not cached.
            assert!(round % 2 == 0 || rig.submit(&[iotlb_pages(1, 0x10_0000, 0)]));
            let before = writes.load(Ordering::Relaxed);
            while round % 16 == 0 && writes.load(Ordering::Relaxed) == before {
                std::thread::yield_now();
            }
            rig.clear(root, 0x10_0000, 1);
            let invalidation = if round % 3 == 0 { iotlb_domain(1) } else { iotlb_pages(1, 0x10_0000, 0) };
            assert!(rig.submit(&[invalidation]));
            rig.store(gpa + 8, round);
            for _ in 0..200 {
                assert_eq!(rig.load(gpa + 8), round);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(writes.load(Ordering::Relaxed) > 0);
}
