//! The state of a unit as a file has it: its form, and what of a file is believed.

use std::sync::Arc;

use proptest::prelude::*;
use vtd::spec::registers::offset;
use vtd::{
    DomainId, ExtentState, Perm, RestoreError, SpaceKey, SpaceState, State, StateVersion, Unit, UnitConfig, UnitId,
};

use crate::rig::{Event, Listener, NIC, NVME, Rig, iotlb_pages, mapping, unmap};

/// What a unit at power-on is saved as. Another form is another version: `StateVersion::CURRENT`.
const AT_POWER_ON: &str = "{\"version\":2,\"global_status\":0,\"root_table_address\":0,\"root_table_in_use\":0,\
\"interrupt_table_address\":0,\"interrupt_table_in_use\":0,\"context_command\":0,\"fault_status\":0,\
\"fault_event\":{\"control\":2147483648,\"data\":0,\"address\":0,\"upper_address\":0},\
\"fault_records\":[{\"low\":0,\"high\":0},{\"low\":0,\"high\":0},{\"low\":0,\"high\":0},{\"low\":0,\"high\":0},\
{\"low\":0,\"high\":0},{\"low\":0,\"high\":0},{\"low\":0,\"high\":0},{\"low\":0,\"high\":0}],\
\"next_fault_record\":0,\"queue_head\":0,\"queue_tail\":0,\"queue_address\":0,\"queue_in_use\":0,\
\"completion_status\":0,\"completion_event\":{\"control\":2147483648,\"data\":0,\"address\":0,\"upper_address\":0},\
\"queue_error_record\":0,\"invalidate_address\":0,\"iotlb_invalidate\":0,\"page_requests\":{\"head\":0,\"tail\":0,\"address\":0,\"status\":0,\
\"event\":{\"control\":2147483648,\"data\":0,\"address\":0,\"upper_address\":0}}}";

/// The state at power-on with the value at `path` in place of what is there.
fn with(path: &str, value: u64) -> State {
    let mut json: serde_json::Value = serde_json::from_str(AT_POWER_ON).unwrap();
    *json.pointer_mut(path).unwrap() = value.into();
    serde_json::from_value(json).unwrap()
}

#[test]
fn a14_the_form_of_a_state_is_that_of_its_version() {
    assert_eq!(serde_json::to_string(&Rig::new().unit.save()).unwrap(), AT_POWER_ON);
    assert_eq!(serde_json::from_str::<State>(AT_POWER_ON).unwrap(), State::default());
    // No field may be missing, and none is passed over.
    let json: serde_json::Value = serde_json::from_str(AT_POWER_ON).unwrap();
    for name in json.as_object().unwrap().keys() {
        let mut json = json.clone();
        json.as_object_mut().unwrap().remove(name);
        assert!(serde_json::from_value::<State>(json).is_err(), "without {name}");
    }
    let mut more = json;
    more["another"] = 0.into();
    assert!(serde_json::from_value::<State>(more).is_err());
}

#[test]
fn a14_a_state_that_no_unit_of_the_configuration_can_have_changes_nothing() {
    let plain = UnitConfig { host_address_width: 46, ..UnitConfig::new(UnitId(0), 48) };
    let remapping = UnitConfig { interrupt_remapping: true, ..plain };
    let register = |register, value| RestoreError::Register { register, value };
    // Queued invalidation on, with the smallest queue.
    let head = |head| State { queue_head: head, ..with("/global_status", 1 << 26) };
    let cases = [
        (plain, with("/version", 1), RestoreError::Version(StateVersion(1))),
        (plain, with("/version", 3), RestoreError::Version(StateVersion(3))),
        (plain, with("/version", 0), RestoreError::Version(StateVersion(0))),
        // Write buffers, fault logs, and interrupt remapping are not offered.
        (plain, with("/global_status", 1 << 27), register("GSTS", 1 << 27)),
        (plain, with("/global_status", 1 << 29), register("GSTS", 1 << 29)),
        (plain, with("/global_status", 1 << 25), register("GSTS", 1 << 25)),
        (plain, with("/global_status", 1 << 24), register("GSTS", 1 << 24)),
        (plain, with("/global_status", 1 << 23), register("GSTS", 1 << 23)),
        (plain, with("/interrupt_table_address", 0x1000), register("IRTA", 0x1000)),
        (plain, with("/interrupt_table_in_use", 0x1000), register("IRTA in use", 0x1000)),
        (remapping, with("/interrupt_table_in_use", 0x1800), register("IRTA in use", 0x1800)),
        (plain, with("/root_table_address", 0x1200), register("RTADDR", 0x1200)),
        (plain, with("/root_table_in_use", 0x1001), register("RTADDR in use", 0x1001)),
        (plain, with("/context_command", 1 << 34), register("CCMD", 1 << 34)),
        // PPF follows from the records.
        (plain, with("/fault_status", 2), register("FSTS", 2)),
        (plain, with("/fault_status", 8 << 8), register("FSTS", 8 << 8)),
        (plain, with("/fault_event/control", 1), register("FECTL", 1)),
        (plain, with("/fault_event/data", 1 << 16), register("FEDATA", 1 << 16)),
        (plain, with("/fault_event/address", 0xfee0_0002), register("FEADDR", 0xfee0_0002)),
        (plain, with("/completion_event/control", 1 << 29), register("IECTL", 1 << 29)),
        (plain, with("/completion_event/data", 1 << 31), register("IEDATA", 1 << 31)),
        (plain, with("/completion_event/address", 1), register("IEADDR", 1)),
        (plain, with("/fault_records/7/low", 0x1800), register("FRCD", 0x1800)),
        (plain, with("/fault_records/0/high", 1 << 20), register("FRCD", 1 << 20)),
        (plain, with("/fault_records/0/high", 1 << 60), register("FRCD", 1 << 60)),
        (plain, with("/next_fault_record", 8), register("the next fault record", 8)),
        (plain, with("/queue_tail", 8), register("IQT", 8)),
        (plain, with("/queue_tail", 0x8_0000), register("IQT", 0x8_0000)),
        // DW without scalable mode, and an address beyond the width of the unit.
        (plain, with("/queue_address", 1 << 11), register("IQA", 1 << 11)),
        (plain, with("/queue_address", 1 << 46), register("IQA", 1 << 46)),
        (plain, with("/queue_in_use", 1 << 11), register("IQA in use", 1 << 11)),
        (plain, with("/queue_in_use", 1 << 63), register("IQA in use", 1 << 63)),
        (plain, with("/completion_status", 2), register("ICS", 2)),
        (plain, with("/queue_error_record", 0x10), register("IQERCD", 0x10)),
        (plain, with("/invalidate_address", 0x80), register("IVA", 0x80)),
        (plain, with("/iotlb_invalidate", 1), register("IOTLB", 1)),
        (plain, with("/queue_head", 0x10), RestoreError::QueueHead { head: 0x10, len: 0 }),
        (plain, head(0x1000), RestoreError::QueueHead { head: 0x1000, len: 0x1000 }),
        (plain, head(0x18), RestoreError::QueueHead { head: 0x18, len: 0x1000 }),
    ];
    for (config, state, error) in cases {
        let rig = Rig::with(config);
        rig.unit.add_requester(NVME).unwrap();
        rig.write64(offset::RTADDR, 0x5000);
        let before = rig.unit.save();
        assert_eq!(rig.listener.take_events(), [Event::Attach(NVME, SpaceKey::Identity, vec![])]);
        assert_eq!(rig.unit.restore(state), Err(error));
        assert_eq!((rig.unit.save(), rig.listener.take_events()), (before, vec![]), "{error}");
    }
    // The same values where they can be.
    let rig = Rig::with(UnitConfig { extended_interrupt_mode: true, ..remapping });
    for state in [
        with("/global_status", 1 << 25),
        with("/interrupt_table_in_use", 0x1800),
        with("/queue_in_use", 1 << 45),
        with("/next_fault_record", 7),
        State { queue_tail: 0xff0, ..head(0xff0) },
    ] {
        rig.unit.restore(state.clone()).unwrap();
        assert_eq!(rig.unit.save(), state);
    }
    assert_eq!(
        RestoreError::Version(StateVersion(1)).to_string(),
        "the state has version 1, and this unit reads version 2"
    );
    assert_eq!(
        RestoreError::Register { register: "IQA", value: 0x800 }.to_string(),
        "IQA of this unit cannot be 0x800"
    );
}

/// What a fresh unit over the memory of `rig` tells its listener of `NVME` when `state` is restored; and of `NIC`, when
/// that comes later.
fn told_after(rig: &Rig, state: State) -> Vec<Event> {
    let listener = Arc::new(Listener::default());
    let unit = Unit::new(*rig.unit.config(), rig.memory.clone(), listener.clone(), rig.messages.clone()).unwrap();
    unit.add_requester(NVME).unwrap();
    unit.restore(state).unwrap();
    unit.add_requester(NIC).unwrap();
    listener
        .take_events()
        .into_iter()
        .filter(|event| !matches!(event, Event::Attach(_, SpaceKey::Identity, _)))
        .collect()
}

#[test]
fn a14_a_restored_unit_tells_what_was_told_in_the_same_pieces() {
    let (mut rig, root) = Rig::with_nvme();
    let key = rig.set_paged(NIC, root, 48, 1);
    // Contiguous, and mapped one by one: three mappings. Then one of the tables' that no invalidation has reached.
    for page in 0..3 {
        rig.pages(root, 0x4000 + page * 4096, 0x8000 + page * 4096, 1);
        assert!(rig.submit(&[iotlb_pages(1, 0x4000 + page * 4096, 0)]));
    }
    rig.pages(root, 0x7000, 0xb000, 1);
    let saved = rig.unit.save();
    let extents =
        [0, 1, 2].map(|page| ExtentState(0x4000 + page * 4096, 0x4fff + page * 4096, 0x8000 + page * 4096, 3));
    assert_eq!(saved.spaces, [SpaceState { domain: DomainId(1), root, width: 48, extents: extents.to_vec() }]);
    let saved: State = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
    let page = |number: u64| mapping(0x4000 + number * 4096, 0x8000 + number * 4096, 4096, Perm::ReadWrite);
    let pages = [0, 1, 2, 3].map(page).to_vec();
    // Both functions have it so, the one that comes after the restore, too.
    let attached = |pages: &[_]| [NVME, NIC].map(|function| Event::Attach(function, key, pages.to_vec())).to_vec();
    assert_eq!(told_after(&rig, saved.clone()), attached(&pages));

    // Where the tables say something else, that is what is told: a page that leads elsewhere, one that may be written
    // no more, one that is gone, one that never was.
    rig.leaf(root, 48, 0x4000, 0x20_0000, Some(Perm::ReadWrite), 1);
    rig.leaf(root, 48, 0x5000, 0x9000, Some(Perm::Read), 1);
    rig.leaf(root, 48, 0x6000, 0, None, 1);
    let mut other = saved.clone();
    other.spaces[0].extents.push(ExtentState(0x10_0000, 0x1f_ffff, 0x30_0000, 3));
    let (moved, read_only) =
        (mapping(0x4000, 0x20_0000, 4096, Perm::ReadWrite), mapping(0x5000, 0x9000, 4096, Perm::Read));
    assert_eq!(told_after(&rig, other.clone()), attached(&[moved, read_only, page(3)]));

    // What is said of a space that no function is in is forgotten: one that joins it later finds what is in the tables.
    let later = rig.set_paged(NIC, root, 48, 7);
    rig.pages(root, 0x5000, 0x21_0000, 1);
    rig.leaf(root, 48, 0x4000, 0x20_f000, Some(Perm::ReadWrite), 1);
    other.spaces[0].domain = DomainId(7);
    other.spaces[0].extents = vec![ExtentState(0x4000, 0x4fff, 0x20_f000, 3)];
    let found = vec![mapping(0x4000, 0x20_f000, 2 * 4096, Perm::ReadWrite), page(3)];
    assert_eq!(told_after(&rig, other), [Event::Attach(NVME, key, found.clone()), Event::Attach(NIC, later, found)]);
}

#[test]
fn a14_mappings_that_nobody_can_have_been_told_of_are_refused() {
    let (rig, root) = Rig::with_nvme();
    let before = rig.unit.save();
    let told = |extents: &[ExtentState]| State {
        spaces: vec![SpaceState { domain: DomainId(1), root, width: 48, extents: extents.to_vec() }],
        ..before.clone()
    };
    let good = ExtentState(0x4000, 0x5fff, 0x8000, 1);
    let cases = [
        ExtentState(0x6800, 0x6fff, 0x8000, 3),
        ExtentState(0x6000, 0x67ff, 0x8000, 3),
        ExtentState(0x6000, 0x6fff, 0x8800, 3),
        ExtentState(0x6000, 0x5fff, 0x8000, 3),
        ExtentState(0x6000, 0x6fff, 0x8000, 0),
        ExtentState(0x6000, 0x6fff, 0x8000, 4),
        ExtentState(0x6000, 0x7fff, u64::MAX - 0xfff, 3),
        ExtentState(0, u64::MAX, 0, 3),
        // In the middle of the one before, and before it.
        ExtentState(0x5000, 0x6fff, 0x8000, 3),
        ExtentState(0x3000, 0x3fff, 0x8000, 3),
    ];
    for bad in cases {
        let error = RestoreError::Extent { domain: DomainId(1), first: bad.0, last: bad.1 };
        assert_eq!(rig.unit.restore(told(&[good, bad])), Err(error), "{bad:x?}");
        assert_eq!((rig.unit.save(), rig.listener.take_events()), (before.clone(), vec![]));
    }
    let error = RestoreError::Extents { extents: (1 << 18) + 1 };
    let many = (0..(1 << 18) + 1).map(|page| ExtentState(page << 12, page << 12 | 0xfff, 0, 3));
    assert_eq!(rig.unit.restore(told(&many.collect::<Vec<_>>())), Err(error));
    // What can be and is not in the tables is no error, and nothing of it is told.
    rig.unit.restore(told(&[good, ExtentState(0x6000, 0x6fff, 0xa000, 2)])).unwrap();
    let ops = rig.listener.take_ops();
    assert!(ops.is_empty() || ops == [unmap(0, u64::MAX)], "{ops:?}");
}

#[test]
fn a14_the_fault_of_a_pasid_that_a_unit_takes_none_of_is_restored() {
    let (rig, _) = Rig::with_nvme();
    let pasid = Some(vtd::Pasid(0xf_ffff));
    let endpoint = rig.unit.endpoint_of(vtd::Stream { requester: NIC, pasid });
    endpoint.write(vtd::Iova(0x1000), &[0]).unwrap_err();
    let saved = rig.unit.save();
    assert!(saved.fault_records[0].high.pasid_present());
    assert_eq!(rig.unit.restore(saved), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a guest writes, its unit can be saved and restored.
    #[test]
    fn a14_every_state_that_a_guest_brings_about_can_be_restored(
        remapping in any::<bool>(),
        writes in proptest::collection::vec((0..0x100u64, any::<u64>(), any::<bool>()), 0..40),
        faults in 0..12u8,
    ) {
        let config = UnitConfig {
            interrupt_remapping: remapping,
            extended_interrupt_mode: remapping,
            ..UnitConfig::new(UnitId(0), 48)
        };
        let rig = Rig::with(config);
        for (index, (at, value, wide)) in writes.into_iter().enumerate() {
            if wide { rig.write64(at & !7, value) } else { rig.write32(at & !3, value as u32) }
            if index < usize::from(faults) {
                let requester = crate::rig::requester(0, index as u8 % 32, 0);
                let _ = rig.unit.endpoint(requester).read(vtd::Iova(value), &mut [0]);
            }
        }
        let saved = rig.unit.save();
        let text = serde_json::to_string(&saved).unwrap();
        let other = Rig::with(config);
        prop_assert_eq!(other.unit.restore(serde_json::from_str(&text).unwrap()), Ok(()));
        prop_assert_eq!(other.unit.save(), saved);
    }
}
