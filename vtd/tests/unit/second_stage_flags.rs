//! Accessed and dirty flags of the second stage (A-2, A-3, E-1).

use vtd::{Access, ConfigError, DmaError, Endpoint, Iova, Perm, SpaceKey, Stages, UnitConfig};

use crate::pasid_tables::{config, pasid_cache_of, second_stage, with_flags};
use crate::rig::{Memory, NVME, Rig, iotlb_domain, iotlb_pages};

const A: u64 = 1 << 8;
const D: u64 = 1 << 9;

fn offered() -> UnitConfig {
    UnitConfig { second_stage_dirty: true, ..config(48) }
}

/// NVME is emulated and in domain 1, with flags.
fn world() -> (Rig, u64, Endpoint<Memory>) {
    let mut rig = Rig::scalable(offered());
    let root = rig.table();
    rig.set_entry(NVME, 0, with_flags(second_stage(root, 48, 1)));
    let endpoint = rig.unit.endpoint(NVME);
    (rig, root, endpoint)
}

fn translate(endpoint: &Endpoint<Memory>, iova: u64, access: Access) -> Result<u64, u8> {
    endpoint.enter().translate(Iova(iova), access).map(|gpa| gpa.0).map_err(|error| match error {
        DmaError::Fault(fault) => fault.reason.code(),
        other => panic!("{other}"),
    })
}

#[test]
fn a4_flags_of_the_second_stage_are_offered_when_asked_for() {
    let ssads = |config: UnitConfig| config.extended_capability().into_bits() >> 45 & 1;
    assert_eq!((ssads(offered()), ssads(config(48))), (1, 0));
    for scalable in [None, Some(Stages::First)] {
        assert_eq!(UnitConfig { scalable, ..offered() }.validate(), Err(ConfigError::FlagsAlone));
    }
}

#[test]
fn a2_flags_of_the_second_stage_say_what_was_used_and_what_was_written() {
    for level in 1..=3u8 {
        let (mut rig, root, endpoint) = world();
        let iova = 3 << 30;
        rig.leaf(root, 48, iova, 8 << 30, Some(Perm::ReadWrite), level);
        let at: Vec<u64> = (level..=4).map(|at| rig.entry_address(root, 48, iova, at)).collect();
        let flags = |rig: &Rig| at.iter().map(|at| rig.load(*at) & (A | D)).collect::<Vec<_>>();
        let above = at.len() - 1;
        assert_eq!(translate(&endpoint, iova + 8, Access::Read), Ok((8 << 30) + 8));
        assert_eq!(flags(&rig), vec![A; above + 1], "read, level {level}");
        assert_eq!(translate(&endpoint, iova + 16, Access::Write), Ok((8 << 30) + 16));
        let written: Vec<u64> = std::iter::once(A | D).chain(vec![A; above]).collect();
        assert_eq!(flags(&rig), written, "the dirty flag is of leaves");
        // What is cleared is set again behind an invalidation, by a write and not by a read.
        for descriptor in [iotlb_domain(1), iotlb_pages(1, iova, 0)] {
            rig.store(at[0], rig.load(at[0]) & !D);
            assert!(rig.submit(&[descriptor]));
            assert_eq!(translate(&endpoint, iova, Access::Read), Ok(8 << 30));
            assert_eq!(flags(&rig), vec![A; above + 1]);
            assert_eq!(translate(&endpoint, iova, Access::Write), Ok(8 << 30));
            assert_eq!(flags(&rig), written);
        }
    }
}

#[test]
fn a2_what_may_not_be_written_does_not_get_dirty() {
    let (mut rig, root, endpoint) = world();
    rig.leaf(root, 48, 0x5000, 0x90_0000, Some(Perm::Read), 1);
    rig.leaf(root, 48, 0x6000, 0x91_0000, Some(Perm::Write), 1);
    let [read_only, write_only] = [0x5000, 0x6000].map(|iova| rig.entry_address(root, 48, iova, 1));
    assert_eq!(translate(&endpoint, 0x5000, Access::Write), Err(0x85));
    assert_eq!(translate(&endpoint, 0x6000, Access::Read), Err(0x86));
    assert_eq!((rig.load(read_only) & D, rig.load(write_only) & D), (0, 0));
    assert_eq!(translate(&endpoint, 0x5000, Access::Read), Ok(0x90_0000));
    assert_eq!(translate(&endpoint, 0x6000, Access::ZeroLengthRead), Ok(0x91_0000));
    assert_eq!(translate(&endpoint, 0x6000, Access::Write), Ok(0x91_0000));
    assert_eq!((rig.load(read_only) & D, rig.load(write_only) & D), (0, D));
}

#[test]
fn a2_without_ssade_these_bits_are_left_alone() {
    let (mut rig, root, endpoint) = world();
    rig.pages(root, 0x5000, 0x90_0000, 1);
    rig.set_entry(NVME, 0, second_stage(root, 48, 1));
    let at = rig.entry_address(root, 48, 0x5000, 1);
    assert_eq!(translate(&endpoint, 0x5000, Access::Write), Ok(0x90_0000));
    assert_eq!(rig.load(at) & (A | D), 0);
    // Dirty tracking is turned on as Linux does it.
    rig.set_entry(NVME, 0, with_flags(second_stage(root, 48, 1)));
    assert!(rig.submit(&[pasid_cache_of(1, 0), iotlb_domain(1)]));
    assert_eq!(translate(&endpoint, 0x5000, Access::Write), Ok(0x90_0000));
    assert_eq!(rig.load(at) & (A | D), A | D);
}

#[test]
fn a3_sss5_a_flag_that_a_walk_without_snoop_would_have_to_set() {
    let (mut rig, root, endpoint) = world();
    rig.pages(root, 0x5000, 0x90_0000, 1);
    let entry = rig.entry_of_pasid(NVME, 0);
    rig.store(entry + 8, rig.load(entry + 8) & !(1 << 23));
    assert_eq!(translate(&endpoint, 0x5000, Access::Read), Err(0x7c));
    for level in 1..=4 {
        let at = rig.entry_address(root, 48, 0x5000, level);
        rig.store(at, rig.load(at) | A);
    }
    assert_eq!(translate(&endpoint, 0x5000, Access::Read), Ok(0x90_0000));
    assert_eq!(translate(&endpoint, 0x5000, Access::Write), Err(0x7c));
}

#[test]
fn a2_an_assigned_function_whose_flags_nobody_would_set_is_blocked() {
    let (mut rig, root, _) = world();
    rig.pages(root, 0x5000, 0x90_0000, 1);
    rig.unit.add_requester(NVME).unwrap();
    assert_eq!(rig.listener.attached(NVME), Some(SpaceKey::Blocked));
    rig.set_entry(NVME, 0, second_stage(root, 48, 1));
    assert!(rig.submit(&[pasid_cache_of(1, 0), iotlb_domain(1)]));
    assert_eq!(rig.listener.reach(NVME).len(), 1);
}

#[test]
fn a2_a_processor_that_changes_the_entry_meanwhile_loses_nothing() {
    let (mut rig, root, endpoint) = world();
    rig.pages(root, 0x5000, 0x90_0000, 1);
    let at = rig.entry_address(root, 48, 0x5000, 1);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let other = rig.unit.endpoint(NVME);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let session = other.enter();
                assert!(session.translate(Iova(0x5000), Access::Write).is_ok());
            }
        });
        for round in 0..200 {
            // An ignored bit, which the unit must not take away; and the dirty flag, which it must set.
            let software = (1 << 52) << (round % 8);
            rig.store(at, 0x90_0003 | software);
            assert!(rig.submit(&[iotlb_pages(1, 0x5000, 0)]));
            assert_eq!(translate(&endpoint, 0x5000, Access::Write), Ok(0x90_0000));
            assert_eq!(rig.load(at), 0x90_0003 | software | A | D);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
