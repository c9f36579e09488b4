use super::*;

fn ram(gpa: u64, len: u64, hva: u64) -> Result<Region, GuestMapError> {
    // SAFETY: nobody uses the address.
    unsafe { Region::ram(gpa, len, hva, None) }
}

fn region(gpa: u64, len: u64, hva: u64) -> Region {
    ram(gpa, len, hva).expect("whole pages")
}

#[test]
fn a_region_is_made_of_whole_pages_and_does_not_wrap() {
    let top = u64::MAX - 0xfff;
    for (gpa, len, hva) in
        [(0x800, 0x1000, 0), (0, 0x1800, 0), (0, 0x1000, 0x10), (0, 0, 0), (top, 0x1000, 0), (0, 0x2000, top)]
    {
        assert_eq!(ram(gpa, len, hva).err(), Some(GuestMapError::Unaligned { gpa, len }));
    }
    let region = region(0x3000, 0x2000, 0x7000);
    assert_eq!((region.gpa(), region.size(), region.last()), (0x3000, 0x2000, 0x4fff));
}

#[test]
fn regions_may_touch_and_not_overlap() {
    let touching = GuestMap::new(vec![region(0x3000, 0x1000, 0), region(0, 0x3000, 0x10_0000)]).expect("disjoint");
    assert_eq!(touching.regions().iter().map(Region::gpa).collect::<Vec<_>>(), [0, 0x3000]);
    assert_eq!(touching.ram_bytes(), 0x4000);
    let over = GuestMap::new(vec![region(0x2000, 0x1000, 0), region(0, 0x3000, 0x10_0000)]);
    assert_eq!(over.err(), Some(GuestMapError::Overlap(0, 0x2000)));
}

#[test]
fn host_memory_is_of_one_region_and_keeps_its_place() {
    let map = GuestMap::new(vec![region(0, 0x3000, 0x10_0000), region(0x3000, 0x1000, 0x50_0000)]).expect("disjoint");
    let mem = map.host_mem(0x1000, 0x2000).expect("RAM");
    assert_eq!((mem.hva(), mem.gpa(), mem.size(), mem.kind()), (0x10_1000, 0x1000, 0x2000, MemKind::Ram));
    assert!(mem.backing().is_none());
    assert_eq!(map.host_mem(0x3000, 0x1000).expect("RAM").hva(), 0x50_0000);
    for (gpa, len) in [(0x2000, 0x2000), (0x3000, 0x1001), (0x4000, 1), (0, 0), (u64::MAX, 2)] {
        assert!(map.host_mem(gpa, len).is_none(), "{len:#x} bytes at {gpa:#x}");
    }
}

#[test]
fn a_run_is_cut_where_regions_begin_and_end() {
    let map = GuestMap::new(vec![region(0x1000, 0x2000, 0), region(0x3000, 0x1000, 0), region(0x8000, 0x1000, 0)]);
    let map = map.expect("disjoint");
    let pieces = |gpa, len| -> Vec<(u64, u64, bool)> {
        map.pieces(gpa, len).iter().map(|piece| (piece.gpa, piece.len, piece.present)).collect()
    };
    let expected = [
        (0, 0x1000, false),
        (0x1000, 0x2000, true),
        (0x3000, 0x1000, true),
        (0x4000, 0x4000, false),
        (0x8000, 0x1000, true),
        (0x9000, 0x1000, false),
    ];
    assert_eq!(pieces(0, 0xa000), expected);
    assert_eq!(pieces(0x2000, 0x1000), [(0x2000, 0x1000, true)]);
    assert_eq!(pieces(0x8800, 0x400), [(0x8800, 0x400, true)]);
    assert_eq!(pieces(0x1_0000, 0x1000), [(0x1_0000, 0x1000, false)]);
    assert_eq!((pieces(0x1000, 0), pieces(u64::MAX, 2)), (vec![], vec![]));
}

#[test]
fn memory_is_kept_for_as_long_as_its_map_is() {
    let memory =
        Arc::new(vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(vm_memory::GuestAddress(0), 0x4000)]).expect("RAM"));
    let map = GuestMap::of_memory(memory.clone()).expect("whole pages");
    assert_eq!((Arc::strong_count(&memory), map.ram_bytes()), (2, 0x4000));
    drop(map);
    assert_eq!(Arc::strong_count(&memory), 1);
}
