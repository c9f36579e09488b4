use vtd::RefusalCause;

use super::*;
use crate::bridge::guest_map::{GuestMap, Region};

const G: GroupId = GroupId(1);
const C: HostSpaceId = HostSpaceId(1);

fn guest() -> GuestMap {
    // SAFETY: the model never uses the address.
    GuestMap::new(vec![unsafe { Region::ram(0, 1 << 40, 1 << 45, None) }.expect("whole pages")]).expect("one region")
}

fn map(model: &Model, guest: &GuestMap, iova: u64, len: u64) -> Result<(), RefusalCause> {
    let mem = guest.host_mem(0, len).expect("RAM");
    model.map(C, iova, mem, Perm::ReadWrite).map_err(|e| e.cause)
}

fn unmap(model: &Model, first: u64, last: u64) -> Result<u64, i32> {
    model.unmap(C, UnmapRange::Span { first, last }).map_err(|e| e.raw_os_error().expect("an errno"))
}

#[test]
fn errors_are_type1s() {
    let (model, guest) = (Model::new(Kernel { entries: 2, memlock: Some(3 << 21), ..Kernel::new(48) }, &[G]), guest());
    assert_eq!(map(&model, &guest, 0, 2 << 21), Ok(()));
    assert_eq!(map(&model, &guest, 1 << 21, 4096), Err(RefusalCause::Other), "overlap: EEXIST");
    assert_eq!(map(&model, &guest, 0xfee0_0000, 4096), Err(RefusalCause::Range));
    assert_eq!(map(&model, &guest, 1 << 48, 4096), Err(RefusalCause::Range));
    assert_eq!(map(&model, &guest, 1 << 30, 2 << 21), Err(RefusalCause::Memlock));
    assert_eq!(unmap(&model, 4096, 8191), Err(libc::EINVAL), "bisects");
    assert_eq!(unmap(&model, 0, 4095), Err(libc::EINVAL), "bisects");
    assert_eq!(map(&model, &guest, 1 << 30, 4096), Ok(()));
    assert_eq!(map(&model, &guest, 1 << 31, 4096), Err(RefusalCause::Limit));
    assert_eq!(unmap(&model, 0, (1 << 47) - 1), Ok((2 << 21) + 4096), "holes are no error");
    assert_eq!(unmap(&model, 0, (1 << 47) - 1), Ok(0));
    assert_eq!(map(&model, &guest, 0, 3 << 21), Ok(()), "what was unmapped is no longer charged");
}

#[test]
fn old_kernels_wrap_and_have_no_unmap_all() {
    let (old, new, guest) = (Model::new(Kernel::old(48), &[G]), Model::new(Kernel::new(48), &[G]), guest());
    for model in [&old, &new] {
        map(model, &guest, 1 << 20, 4096).expect("mapped");
        assert_eq!(unmap(model, 0, u64::MAX), Err(libc::EINVAL), "2^64 has no size");
    }
    assert_eq!(unmap(&old, 4096, u64::MAX), Ok(0), "success, and nothing is unmapped");
    assert!(old.translate(G, 1 << 20).is_some());
    assert_eq!(old.unmap(C, UnmapRange::All).map_err(|e| e.raw_os_error()), Err(Some(libc::EINVAL)));
    assert_eq!(new.unmap(C, UnmapRange::All).expect("unmapped"), 4096);
    assert!(new.contents(G).is_empty());
}

#[test]
fn old_kernels_widen_write_only() {
    let guest = guest();
    for (kernel, expected) in [(Kernel::old(39), Perm::ReadWrite), (Kernel::new(39), Perm::Write)] {
        let model = Model::new(kernel, &[G]);
        model.map(C, 0, guest.host_mem(0, 4096).expect("RAM"), Perm::Write).expect("mapped");
        assert_eq!(model.translate(G, 8), Some(((1 << 45) + 8, expected)));
    }
}

#[test]
fn injected_failures_change_nothing() {
    let (model, guest) = (Model::new(Kernel::new(48), &[G]), guest());
    map(&model, &guest, 0, 4096).expect("mapped");
    model.inject(|_, op| matches!(op, HostOp::Unmap(_)).then_some(libc::EIO));
    assert_eq!(unmap(&model, 0, 4095), Err(libc::EIO));
    assert_eq!(map(&model, &guest, 4096, 4096), Ok(()));
    model.stop_injecting();
    assert_eq!(unmap(&model, 0, 8191), Ok(8192));
    assert_eq!(model.counts(), (2, 2));
}

#[test]
fn a_host_that_attaches_groups_answers_as_iommufd_does() {
    let (model, guest) = (Model::per_space(Kernel::new(48), &[G]), guest());
    let space = model.create().expect("a space");
    assert_eq!(space, C);
    for page in [0, 1, 4] {
        assert_eq!(map(&model, &guest, page << 21, 2 << 12), Ok(()));
    }
    assert_eq!(map(&model, &guest, 4096, 4096), Err(RefusalCause::Other), "overlap: EEXIST");
    assert_eq!(unmap(&model, 4096, 8191), Err(libc::ENOENT), "cuts");
    assert_eq!(unmap(&model, 2 << 21, 3 << 21), Err(libc::ENOENT), "nothing is there");
    assert_eq!(unmap(&model, 0, u64::MAX), Err(libc::EOVERFLOW), "2^64 has no length");
    // It cuts the last of three: the others are gone all the same.
    assert_eq!(unmap(&model, 0, (4 << 21) + 4095), Err(libc::ENOENT));
    assert_eq!(model.totals(), (1, 2 << 12));
    let all = || model.unmap(C, UnmapRange::All).map_err(|e| e.raw_os_error());
    assert_eq!((all(), all()), (Ok(2 << 12), Ok(0)));
    // It learns the ranges of a group when that is attached.
    assert_eq!(map(&model, &guest, 0xfee0_0000, 4096), Ok(()));
    assert_eq!(model.attach(G, C).map_err(|e| e.raw_os_error()), Err(Some(libc::EADDRINUSE)));
    assert_eq!(all(), Ok(4096));
    model.attach(G, C).expect("attached");
    assert_eq!(map(&model, &guest, 0xfee0_0000, 4096), Err(RefusalCause::Range));
}
