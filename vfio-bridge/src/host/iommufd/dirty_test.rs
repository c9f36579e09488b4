//! What was written by the page tables of a space, over a kernel in memory.

use vtd::IovaRange;

use super::fake::{Call, Device, Fake};
use super::sys::DeviceInfo;
use super::*;
use crate::bridge::guest_map::Region;
use crate::host::dirty::{DirtyKnowledge, UnmapWindow};

const PAGE: u64 = PAGE_SIZE;
const FIRST: u64 = 1 << 30;
/// Two devices with dirty bits, behind two units; and one behind the first that has none.
const NEAR: (GroupId, HostDevice) = (GroupId(1), HostDevice(1));
const FAR: (GroupId, HostDevice) = (GroupId(2), HostDevice(2));
const WITHOUT: (GroupId, HostDevice) = (GroupId(3), HostDevice(3));

fn itself((_, device): (GroupId, HostDevice)) -> HostStream {
    HostStream { device, pasid: None }
}

/// A backend over a kernel that has all, with these, and a space in which each even page of 8 from `FIRST` on is
/// mapped, and pages 4 and 5.
fn host(devices: &[(GroupId, HostDevice)]) -> (Iommufd<Fake>, HostSpaceId) {
    let device = |of: &(GroupId, HostDevice)| {
        let info = DeviceInfo { page_sizes: None, pasid_bits: 0, dirty_bits: *of != WITHOUT };
        let ranges = vec![IovaRange { first: 0, last: (1 << 40) - 1 }];
        (of.1, Device { group: of.0.0, unit: u32::from(*of == FAR), ranges, info })
    };
    let kernel = Fake::new([NEAR, FAR, WITHOUT].iter().map(device));
    let ioas = kernel.alloc_ioas().expect("an IOAS");
    let host = Iommufd::over(kernel, ioas, &ram()).expect("a backend");
    for (group, device) in devices {
        host.add(*group, None::<Bdf>, *device).expect("added");
    }
    let space = host.create().expect("a space");
    [0, 2, 4, 5, 6].into_iter().for_each(|page| map_page(&host, space, page));
    host.kernel.calls();
    (host, space)
}

fn ram() -> GuestMap {
    // SAFETY: nobody uses the address.
    let ram = unsafe { Region::ram(0, 64 * PAGE, 0x7000_0000, None) };
    GuestMap::new(vec![ram.expect("whole pages")]).expect("one region")
}

fn map_page(host: &Iommufd<Fake>, space: HostSpaceId, page: u64) {
    let guest = ram();
    let mem = guest.host_mem(page * PAGE, PAGE).expect("memory");
    host.map(space, FIRST + page * PAGE, mem, Perm::ReadWrite).expect("mapped");
}

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange { first: FIRST + first * PAGE, last: FIRST + last * PAGE + (PAGE - 1) }
}

/// The dirty pages among those from `first` to `last`.
fn read(host: &Iommufd<Fake>, space: HostSpaceId, first: u64, last: u64) -> io::Result<Vec<u64>> {
    let mut bitmap = DirtyBitmap::new(range(first, last), PAGE).expect("a bitmap");
    host.dirty_read(space, &mut bitmap)?;
    Ok(pages(&bitmap, first, last))
}

fn unmap(host: &Iommufd<Fake>, space: HostSpaceId, first: u64, last: u64) -> Vec<u64> {
    let mut bitmap = DirtyBitmap::new(range(first, last), PAGE).expect("a bitmap");
    let bytes = host.unmap_dirty(space, &mut bitmap, false).expect("unmapped");
    assert_eq!(bytes, (last - first + 1) * PAGE);
    pages(&bitmap, first, last)
}

fn pages(bitmap: &DirtyBitmap, first: u64, last: u64) -> Vec<u64> {
    (first..=last).filter(|page| bitmap.is_dirty(FIRST + page * PAGE)).collect()
}

#[test]
fn e1_what_was_written_is_read_once_and_page_by_page() {
    let (host, space) = host(&[NEAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.kernel.write(itself(NEAR), FIRST + 4 * PAGE);
    let support = host.dirty_start(space).expect("it has dirty bits");
    assert_eq!(
        (support.knowledge, support.window, support.holes),
        (DirtyKnowledge::Exact, UnmapWindow::Closable, false)
    );
    assert_eq!(read(&host, space, 4, 6).expect("tracked"), [0; 0], "it was written before");
    host.kernel.write(itself(NEAR), FIRST + 5 * PAGE + 7);
    host.kernel.write(itself(NEAR), FIRST + 6 * PAGE);
    assert_eq!(read(&host, space, 4, 5).expect("tracked"), [5], "no more than was asked for");
    assert_eq!(read(&host, space, 4, 6).expect("tracked"), [6], "and the rest when it is");
    host.dirty_stop(space);
    assert_eq!(host.kernel.tracked(), [false]);
    assert!(read(&host, space, 4, 6).is_err(), "the kernel would say that nothing is dirty");
}

#[test]
fn e2_an_unmap_has_what_was_written_before_it() {
    let (host, space) = host(&[NEAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.dirty_start(space).expect("it has dirty bits");
    host.kernel.write(itself(NEAR), FIRST + 5 * PAGE);
    host.kernel.write(itself(NEAR), FIRST);
    host.kernel.calls();
    assert_eq!(unmap(&host, space, 4, 5), [5]);
    let calls = host.kernel.calls();
    assert!(matches!(calls[..], [Call::Read(..), Call::Unmap(_)]), "{calls:?}");
    assert_eq!(read(&host, space, 0, 0).expect("tracked"), [0], "what stays is not touched");
}

#[test]
fn e1_what_is_written_by_any_page_table_of_a_space_is_read() {
    let (host, space) = host(&[NEAR, FAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.dirty_start(space).expect("both have dirty bits");
    // Its page table is made now, and tracked before anything is attached to it.
    host.kernel.calls();
    host.attach(FAR.0, space).expect("attached");
    let calls = host.kernel.calls();
    let tracked = calls.iter().position(|call| matches!(call, Call::Track(_, true))).expect("tracked");
    let to = |call: &Call| matches!((call, &calls[tracked]), (Call::Attach(_, to), Call::Track(hwpt, _)) if to == hwpt);
    assert!(calls[..tracked].iter().all(|call| !to(call)) && calls[tracked..].iter().any(to), "{calls:?}");
    host.kernel.write(itself(NEAR), FIRST + 4 * PAGE);
    host.kernel.write(itself(FAR), FIRST + 5 * PAGE);
    assert_eq!(read(&host, space, 4, 6).expect("tracked"), [4, 5]);
    // Who is gone has left what it wrote.
    host.kernel.write(itself(FAR), FIRST + 6 * PAGE);
    host.detach(FAR.0).expect("detached");
    assert_eq!(unmap(&host, space, 4, 6), [6]);
}

#[test]
fn e1_a_page_table_without_dirty_bits_is_never_one_of_nothing() {
    // Nobody is attached yet, and one of those that may come has none.
    let (with_one, space) = host(&[NEAR, WITHOUT]);
    assert_eq!(with_one.dirty_start(space).expect_err("one cannot tell").raw_os_error(), Some(libc::EOPNOTSUPP));
    // One that has none is attached.
    with_one.attach(WITHOUT.0, space).expect("attached");
    assert!(with_one.dirty_start(space).is_err());
    assert_eq!(with_one.kernel.tracked(), [false]);

    // One comes, or tracking is refused, while the space is tracked.
    for refused in [false, true] {
        let (tracked, space) = host(if refused { &[NEAR, FAR] } else { &[NEAR] });
        tracked.attach(NEAR.0, space).expect("attached");
        tracked.dirty_start(space).expect("it has dirty bits");
        let late = if refused { FAR } else { WITHOUT };
        if refused {
            tracked.kernel.refuse(|call| matches!(call, Call::Track(_, true)).then_some(libc::ENOMEM));
        } else {
            tracked.add(late.0, None::<Bdf>, late.1).expect("added");
        }
        tracked.attach(late.0, space).expect("tracking is no reason not to work");
        assert!(read(&tracked, space, 4, 6).is_err(), "one of two page tables cannot tell");
        tracked.kernel.write(itself(NEAR), FIRST + 4 * PAGE);
        assert_eq!(unmap(&tracked, space, 4, 5), [4, 5], "nothing is known, so all are");
    }
}

#[test]
fn e1_tracking_that_cannot_be_started_for_all_is_started_for_none() {
    let (host, space) = host(&[NEAR, FAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.attach(FAR.0, space).expect("attached");
    let mut asked = 0;
    host.kernel.refuse(move |call| {
        asked += u32::from(matches!(call, Call::Track(_, true)));
        (asked == 2 && matches!(call, Call::Track(_, true))).then_some(libc::ENOMEM)
    });
    assert!(host.dirty_start(space).is_err());
    assert_eq!(host.kernel.tracked(), [false, false]);
    host.kernel.refuse_nothing();
    host.dirty_start(space).expect("both");
    assert_eq!(host.kernel.tracked(), [true, true]);
}

#[test]
fn e1_a_bitmap_that_the_kernel_does_not_give_is_one_of_everything() {
    let (host, space) = host(&[NEAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.dirty_start(space).expect("it has dirty bits");
    host.kernel.refuse(|call| matches!(call, Call::Read(..)).then_some(libc::ENOMEM));
    assert!(read(&host, space, 4, 6).is_err());
    assert_eq!(unmap(&host, space, 4, 6), [4, 5, 6], "it is unmapped all the same");
}

#[test]
fn e2_a_bitmap_has_whole_pages_of_the_host() {
    let (host, space) = host(&[NEAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.dirty_start(space).expect("it has dirty bits");
    let mut bitmap =
        DirtyBitmap::new(IovaRange { first: FIRST + 512, last: FIRST + PAGE - 1 }, PAGE).expect("a bitmap");
    assert_eq!(host.dirty_read(space, &mut bitmap).map_err(|e| e.kind()), Err(io::ErrorKind::InvalidInput));
}

/// All that is mapped.
fn mapped() -> impl Iterator<Item = (IovaRange, Perm)> {
    [0, 2, 4, 5, 6].map(|page| (range(page, page), Perm::ReadWrite)).into_iter()
}

/// The same unmap with the window closed, and whether it says that it could not tell.
fn closed(host: &Iommufd<Fake>, space: HostSpaceId, first: u64, last: u64) -> (Vec<u64>, bool) {
    let mut bitmap = DirtyBitmap::new(range(first, last), PAGE).expect("a bitmap");
    let bytes = host.unmap_dirty(space, &mut bitmap, true).expect("unmapped");
    assert_eq!(bytes, (last - first + 1) * PAGE);
    (pages(&bitmap, first, last), bitmap.is_unknown())
}

#[test]
fn e3_what_is_written_in_the_last_moment_is_lost_unless_the_window_is_closed() {
    let (host, space) = host(&[NEAR, FAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.attach(FAR.0, space).expect("attached");
    let support = host.dirty_start(space).expect("both have dirty bits");
    assert_eq!(support.window, UnmapWindow::Closable);
    host.kernel.write_late(itself(NEAR), FIRST);
    assert_eq!(unmap(&host, space, 0, 0), [0; 0]);
    host.dirty_close(space, &mut mapped().skip(1)).expect("copied");
    // Early, in the last moment, and by the other page table.
    host.kernel.write(itself(NEAR), FIRST + 4 * PAGE);
    host.kernel.write(itself(FAR), FIRST + 6 * PAGE);
    host.kernel.write_late(itself(FAR), FIRST + 5 * PAGE);
    assert_eq!(closed(&host, space, 4, 5), (vec![4, 5], false));
    for device in [NEAR, FAR] {
        let reaches = |page| host.kernel.translate(itself(device), FIRST + page * PAGE).is_some();
        assert_eq!([2, 4, 5, 6].map(reaches), [true, false, false, true]);
    }
    // What was written before the turn is in the page table that nobody uses now; it is found all the same, once.
    assert_eq!(read(&host, space, 6, 6).expect("tracked"), [6]);
    assert_eq!(read(&host, space, 6, 6).expect("tracked"), [0; 0]);
}

#[test]
fn e3_bits_are_kept_through_turns_whichever_side_has_them() {
    let (host, space) = host(&[NEAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.dirty_start(space).expect("it has dirty bits");
    host.dirty_close(space, &mut mapped()).expect("copied");
    host.kernel.write(itself(NEAR), FIRST + 2 * PAGE);
    assert_eq!(closed(&host, space, 0, 0), (vec![], false));
    // 2 was written by what is the back now, 6 by the front.
    host.kernel.write(itself(NEAR), FIRST + 6 * PAGE);
    assert_eq!(closed(&host, space, 2, 2), (vec![2], false));
    assert_eq!(closed(&host, space, 6, 6), (vec![6], false));
    // What comes meanwhile is on both sides.
    map_page(&host, space, 9);
    host.kernel.write_late(itself(NEAR), FIRST + 9 * PAGE);
    assert_eq!(closed(&host, space, 9, 9), (vec![9], false));
    host.dirty_stop(space);
    let (ioases, _, areas) = host.kernel.objects();
    assert_eq!((ioases, areas), (2, 3), "RAM, and the two that are still mapped: there is no second side any more");
}

#[test]
fn e3_a_window_that_cannot_be_closed_has_all_dirty() {
    // It was not made ready; a map that goes to one side only; a device that does not go along.
    for case in 0..3 {
        let (host, space) = host(&[NEAR, FAR]);
        host.attach(NEAR.0, space).expect("attached");
        host.attach(FAR.0, space).expect("attached");
        host.dirty_start(space).expect("both have dirty bits");
        if case > 0 {
            host.dirty_close(space, &mut mapped()).expect("copied");
        }
        let before = [NEAR, FAR].map(|device| host.kernel.table_of(itself(device)));
        if case == 1 {
            let mut copies = 0;
            host.kernel.refuse(move |call| {
                copies += u32::from(matches!(call, Call::Copy(..)));
                (copies == 2 && matches!(call, Call::Copy(..))).then_some(libc::ENOMEM)
            });
            map_page(&host, space, 9);
        }
        if case == 2 {
            host.kernel.refuse(move |call| {
                let far = matches!(call, Call::Attach(stream, to) if *stream == itself(FAR) && Some(*to) != before[1]);
                far.then_some(libc::EINVAL)
            });
        }
        assert_eq!(closed(&host, space, 4, 5), (vec![4, 5], true), "case {case}");
        let after = [NEAR, FAR].map(|device| host.kernel.table_of(itself(device)));
        assert_eq!(after, before, "they are where they were");
        assert!(host.kernel.translate(itself(NEAR), FIRST + 4 * PAGE).is_none());
        assert_eq!(host.kernel.objects().0, 2, "RAM, and one side");
    }
}

#[test]
fn e3_a_device_that_does_not_come_back_is_one_of_which_nothing_is_known() {
    let (host, space) = host(&[NEAR, FAR]);
    host.attach(NEAR.0, space).expect("attached");
    host.attach(FAR.0, space).expect("attached");
    host.dirty_start(space).expect("both have dirty bits");
    host.dirty_close(space, &mut mapped()).expect("copied");
    let before = [NEAR, FAR].map(|device| host.kernel.table_of(itself(device)));
    // The one goes along, the other does not, and the one does not come back.
    let mut moved = false;
    host.kernel.refuse(move |call| match call {
        Call::Attach(stream, to) if *stream == itself(FAR) && Some(*to) != before[1] => Some(libc::EINVAL),
        Call::Attach(stream, _) if *stream == itself(NEAR) => {
            std::mem::replace(&mut moved, true).then_some(libc::ENOMEM)
        }
        _ => None,
    });
    let mut bitmap = DirtyBitmap::new(range(4, 5), PAGE).expect("a bitmap");
    host.unmap_dirty(space, &mut bitmap, true).expect_err("its functions are to be stopped");
}
