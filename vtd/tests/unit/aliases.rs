//! Functions behind a bridge that makes their requests in its own name (C-5).

use vm_memory::GuestMemoryBackend;
use vtd::spec::irte::{IrteHigh, IrteLow, RemappableAddress};
use vtd::spec::registers::{InterruptTableAddress, offset};
use vtd::{Access, DmaError, Endpoint, Iova, Msi, Requester, SourceId, SpaceKey, UnitConfig, UnitId};

use crate::rig::{Rig, context_device, iotlb_global, requester};

/// The bridge, the bus behind it, and three functions there: two are assigned, one is emulated.
const BRIDGE: Requester = requester(4, 0, 0);
const FIRST: Requester = requester(4, 1, 0);
const SECOND: Requester = requester(4, 2, 0);
const EDU: Requester = requester(4, 3, 0);
/// A function elsewhere.
const OTHER: Requester = requester(9, 0, 0);
/// Another number of the bridge's bus.
const MOVED: SourceId = SourceId::new(7, 0, 0);
const IOVA: u64 = 0x10_0000;
const BEHIND: u64 = 0x80_0000;
const BEHIND_MOVED: u64 = 0x81_0000;
const ELSEWHERE: u64 = 0x82_0000;

/// Translation is on; the bridge's two ids and the other function have tables, and no function behind the bridge has.
fn world(config: UnitConfig) -> Rig {
    let mut rig = Rig::with(config);
    rig.enable_queue();
    rig.enable_translation();
    let ids = [(BRIDGE.sid, BEHIND), (MOVED, BEHIND_MOVED), (OTHER.sid, ELSEWHERE)];
    for (n, (sid, target)) in ids.into_iter().enumerate() {
        let root = rig.table();
        rig.pages(root, IOVA, target, 1);
        rig.set_paged(Requester { segment: 0, sid }, root, 48, n as u16 + 1);
    }
    for name in [FIRST, SECOND, EDU] {
        rig.unit.set_alias(name, BRIDGE);
    }
    for name in [FIRST, SECOND, OTHER] {
        rig.unit.add_requester(name).unwrap();
    }
    rig
}

fn reach(rig: &Rig, function: Requester) -> Option<u64> {
    rig.listener.reach(function).first().map(|mapping| mapping.gpa.0)
}

fn translate<M: GuestMemoryBackend + Clone + Send + Sync>(endpoint: &Endpoint<M>) -> Result<u64, DmaError> {
    endpoint.enter().translate(Iova(IOVA), Access::Read).map(|gpa| gpa.0)
}

#[test]
fn c5_functions_behind_one_bridge_have_its_id_and_its_context_entry() {
    let mut rig = world(UnitConfig::new(UnitId(0), 48));
    let edu = rig.unit.endpoint(EDU);
    assert_eq!([FIRST, SECOND, OTHER].map(|name| reach(&rig, name)), [Some(BEHIND), Some(BEHIND), Some(ELSEWHERE)]);
    assert_eq!(translate(&edu).ok(), Some(BEHIND));
    assert_eq!([FIRST, SECOND, EDU].map(|name| rig.unit.source_id(name)), [Some(BRIDGE.sid); 3]);
    // An invalidation names all of them by the bridge's id, and none of them by the id that a function would have.
    let (old, new) = (rig.listener.attached(FIRST), rig.table());
    rig.pages(new, IOVA, 0x90_0000, 1);
    rig.set_paged(BRIDGE, new, 48, 8);
    assert!(rig.submit(&[context_device(0, FIRST.sid, 0), context_device(0, SECOND.sid, 0)]));
    assert_eq!((rig.listener.attached(FIRST), reach(&rig, SECOND)), (old, Some(BEHIND)));
    assert!(rig.submit(&[context_device(0, BRIDGE.sid, 0), iotlb_global()]));
    assert_eq!((reach(&rig, FIRST), reach(&rig, SECOND)), (Some(0x90_0000), Some(0x90_0000)));
    assert_eq!(translate(&edu).ok(), Some(0x90_0000));
    // A blocked access is recorded by that id.
    assert!(edu.enter().translate(Iova(0x50_0000), Access::Read).is_err());
    assert!(rig.fault_records().iter().all(|record| record.1 == BRIDGE.sid) && !rig.fault_records().is_empty());
}

#[test]
fn a16_the_functions_behind_a_bridge_follow_its_id_together() {
    let rig = world(UnitConfig::new(UnitId(0), 48));
    let edu = rig.unit.endpoint(EDU);
    assert!(translate(&edu).is_ok());
    rig.unit.renumber(&[(BRIDGE, Some(MOVED))]);
    assert_eq!((reach(&rig, FIRST), reach(&rig, SECOND)), (Some(BEHIND_MOVED), Some(BEHIND_MOVED)));
    assert_eq!(translate(&edu).ok(), Some(BEHIND_MOVED), "what was cached for the old id is not used");
    // A stranger with the same id: nobody is told apart any more.
    rig.unit.renumber(&[(BRIDGE, Some(OTHER.sid))]);
    assert_eq!([FIRST, SECOND, OTHER].map(|name| reach(&rig, name)), [None; 3]);
    assert!(translate(&edu).is_err());
    rig.unit.renumber(&[(BRIDGE, None)]);
    assert_eq!((reach(&rig, FIRST), reach(&rig, OTHER)), (None, Some(ELSEWHERE)));
    assert_eq!(translate(&edu), Err(DmaError::NoSourceId(Iova(IOVA))));
    assert_eq!(rig.unit.source_id(FIRST), None);
}

#[test]
fn c5_the_id_of_a_bridge_stays_when_functions_behind_it_go() {
    let rig = world(UnitConfig::new(UnitId(0), 48));
    rig.unit.renumber(&[(BRIDGE, Some(MOVED))]);
    rig.unit.remove_requester(FIRST);
    let edu = rig.unit.endpoint(EDU);
    // A function of the bridge's own name is behind it, too.
    rig.unit.add_requester(BRIDGE).unwrap();
    assert_eq!((reach(&rig, BRIDGE), translate(&edu).ok()), (Some(BEHIND_MOVED), Some(BEHIND_MOVED)));
    rig.unit.remove_requester(BRIDGE);
    assert_eq!((reach(&rig, SECOND), translate(&edu).ok()), (Some(BEHIND_MOVED), Some(BEHIND_MOVED)));
    // Who was behind it and went is what its name says when it comes again: there is no table for that.
    rig.unit.add_requester(FIRST).unwrap();
    assert_eq!(rig.listener.attached(FIRST), Some(SpaceKey::Blocked));
}

#[test]
fn c5_messages_of_functions_behind_a_bridge_pass_by_bus_and_by_its_id() {
    let mut rig = world(UnitConfig {
        interrupt_remapping: true,
        extended_interrupt_mode: true,
        ..UnitConfig::new(UnitId(0), 48)
    });
    let table = rig.table();
    // From the bridge's bus, as Linux asks for it behind a bridge; from its id; from the function's; from other buses.
    for (index, high) in [
        (0, IrteHigh::new().with_validation(2).with_source(0x0404)),
        (1, IrteHigh::new().with_validation(1).with_source(BRIDGE.sid.0)),
        (2, IrteHigh::new().with_validation(1).with_source(FIRST.sid.0)),
        (3, IrteHigh::new().with_validation(2).with_source(0x0506)),
    ] {
        let low = IrteLow::new().with_present(true).with_vector(0x41).with_destination(2);
        rig.store(table + index * 16 + 8, high.into_bits());
        rig.store(table + index * 16, low.into_bits());
    }
    let address = InterruptTableAddress::new().with_page(table >> 12).with_size(7).with_extended_mode(true);
    rig.write64(offset::IRTA, address.into_bits());
    rig.command(|on| on.with_interrupt_table_pointer(true));
    rig.command(|on| on.with_interrupt_remapping(true));
    let message = |handle| Msi { address: RemappableAddress::new().with_handle(handle).into_bits().into(), data: 0 };
    let pass = |name| [0, 1, 2, 3].map(|handle| rig.unit.remap(name, message(handle)).is_ok());
    assert_eq!([FIRST, EDU].map(pass), [[true, true, false, false]; 2]);
    rig.unit.renumber(&[(BRIDGE, Some(SourceId::new(6, 0, 0)))]);
    assert_eq!(pass(FIRST), [false, false, false, true]);
}
