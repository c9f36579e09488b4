//! Source ids that change while the machine runs.

use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vtd::spec::irte::{IrteHigh, IrteLow, RemappableAddress};
use vtd::spec::registers::{InterruptTableAddress, offset};
use vtd::{
    Access, DmaError, Endpoint, EntriesChanged, Gpa, Iova, Msi, Perm, RemapError, RemapListener, Requester, SourceId,
    SpaceKey, Unit, UnitConfig, UnitId,
};

use crate::rig::{
    Event, Memory, NIC, NVME, Rig, context_device, context_global, iotlb_global, iotlb_pages, map, mapping, requester,
};

/// An emulated device.
const EDU: Requester = requester(2, 0, 0);
/// Ids that nobody has at first.
const FREE: SourceId = SourceId::new(9, 0, 0);
const ABSENT: SourceId = SourceId::new(9, 1, 0);
const IOVA: u64 = 0x10_0000;

/// Translation is on, and each of these ids has a page table of its own with one page: the Nth leads to 0x80_0000 + N
/// pages.
const IDS: [SourceId; 4] = [NVME.sid, NIC.sid, EDU.sid, FREE];

fn target(id: SourceId) -> Option<u64> {
    IDS.iter().position(|each| *each == id).map(|n| 0x80_0000 + 0x1000 * n as u64)
}

struct World {
    rig: Rig,
    spaces: Vec<SpaceKey>,
    roots: Vec<u64>,
}

impl World {
    fn new() -> Self {
        Self::with(UnitConfig::new(UnitId(0), 48))
    }

    fn with(config: UnitConfig) -> Self {
        let mut rig = Rig::with(config);
        rig.enable_queue();
        rig.enable_translation();
        let (mut spaces, mut roots) = (Vec::new(), Vec::new());
        for (n, id) in IDS.into_iter().enumerate() {
            let root = rig.table();
            rig.pages(root, IOVA, target(id).unwrap(), 1);
            spaces.push(rig.set_paged(Requester { segment: 0, sid: id }, root, 48, n as u16 + 1));
            roots.push(root);
        }
        for function in [NVME, NIC] {
            rig.unit.add_requester(function).unwrap();
        }
        rig.listener.take_events();
        Self { rig, spaces, roots }
    }

    /// Where an assigned function's page leads, `None` if to nothing.
    fn reach(&self, function: Requester) -> Option<u64> {
        let reach = self.rig.listener.reach(function);
        assert!(reach.iter().all(|m| m.iova.0 == IOVA && m.len == 0x1000), "{reach:?}");
        reach.first().map(|m| m.gpa.0)
    }

    fn renumber(&self, changes: &[(Requester, Option<SourceId>)]) {
        self.rig.unit.renumber(changes);
    }
}

fn translate(endpoint: &Endpoint<Memory>) -> Result<u64, DmaError> {
    endpoint.enter().translate(Iova(IOVA), Access::Read).map(|gpa| gpa.0)
}

#[test]
fn a16_a_function_is_where_the_tables_of_its_new_id_say_and_nowhere_else() {
    let mut world = World::new();
    world.renumber(&[(NVME, Some(FREE))]);
    let live = vec![mapping(IOVA, target(FREE).unwrap(), 0x1000, Perm::ReadWrite)];
    assert_eq!(world.rig.listener.take_events(), [Event::Attach(NVME, world.spaces[3], live)]);
    assert_eq!(world.rig.unit.spaces_snapshot().len(), 2, "the space of the old id is gone");
    // It follows the new space, and what the old id's tables say does not reach it.
    let (old, new) = (world.roots[0], world.roots[3]);
    world.rig.pages(old, 0x20_0000, 0x90_0000, 1);
    world.rig.pages(new, 0x30_0000, 0x90_0000, 1);
    assert!(world.rig.submit(&[iotlb_pages(1, 0x20_0000, 0), iotlb_pages(4, 0x30_0000, 0)]));
    assert_eq!(world.rig.listener.take_ops(), [map(0x30_0000, 0x90_0000, 0x1000)]);
    // A context-cache invalidation names it by the new id.
    let table = world.roots[1];
    world.rig.set_paged(Requester { segment: 0, sid: FREE }, table, 48, 2);
    assert!(world.rig.submit(&[context_device(0, NVME.sid, 0)]));
    assert_eq!(world.rig.listener.take_events(), []);
    assert!(world.rig.submit(&[context_device(0, FREE, 0)]));
    assert_eq!(world.reach(NVME), target(NIC.sid));
    // An id without an entry.
    world.renumber(&[(NVME, Some(ABSENT))]);
    assert_eq!(world.rig.unit.attachments(), [(NVME, SpaceKey::Blocked), (NIC, world.spaces[1])]);
    // Back to its own.
    world.renumber(&[(NVME, Some(NVME.sid))]);
    assert_eq!(world.rig.unit.attachments()[0], (NVME, world.spaces[0]));
}

#[test]
fn a16_two_ids_whose_entries_say_the_same_change_nothing_at_the_host() {
    let mut world = World::new();
    let space = world.rig.set_paged(Requester { segment: 0, sid: FREE }, world.roots[0], 48, 1);
    assert_eq!(space, world.spaces[0]);
    world.renumber(&[(NVME, Some(FREE))]);
    world.renumber(&[(NVME, Some(FREE)), (NIC, Some(NIC.sid))]);
    assert_eq!(world.rig.listener.take_events(), []);
}

#[test]
fn a16_functions_swap_their_ids_in_one_step() {
    let world = World::new();
    let edu = world.rig.unit.endpoint(EDU);
    assert_eq!(translate(&edu).ok(), target(EDU.sid));
    world.renumber(&[(NVME, Some(NIC.sid)), (NIC, Some(EDU.sid)), (EDU, Some(NVME.sid))]);
    assert_eq!((world.reach(NVME), world.reach(NIC)), (target(NIC.sid), target(EDU.sid)));
    assert_eq!(translate(&edu).ok(), target(NVME.sid), "what was cached for the old id is not used");
    // Nobody was blocked on the way.
    let events = world.rig.listener.take_events();
    assert!(!events.iter().any(|event| matches!(event, Event::Attach(_, SpaceKey::Blocked, _))), "{events:?}");
    assert_eq!(world.rig.fault_records(), []);
}

#[test]
fn a16_functions_that_share_an_id_reach_nothing_until_they_do_not() {
    let world = World::new();
    let edu = world.rig.unit.endpoint(EDU);
    assert!(translate(&edu).is_ok());
    // All three, one after the other, as a guest that writes one bridge after the other.
    world.renumber(&[(NVME, Some(NIC.sid))]);
    assert_eq!(world.rig.unit.attachments(), [(NVME, SpaceKey::Blocked), (NIC, SpaceKey::Blocked)]);
    assert_eq!(translate(&edu).ok(), target(EDU.sid), "the third has its own");
    world.renumber(&[(NVME, Some(EDU.sid))]);
    assert_eq!((world.reach(NVME), world.reach(NIC)), (None, target(NIC.sid)));
    let error = translate(&edu).unwrap_err();
    assert!(matches!(error, DmaError::Fault(fault) if fault.requester == EDU), "{error:?}");
    assert_eq!(world.rig.fault_records(), [(0, EDU.sid, 3, IOVA, true)]);
    // No invalidation opens it, and neither does turning translation off and on.
    let mut world = world;
    assert!(world.rig.submit(&[context_global(), iotlb_global()]));
    assert_eq!(world.reach(NVME), None);
    world.rig.command(|on| on.with_translation(false));
    assert_eq!(world.rig.listener.attached(NVME), Some(SpaceKey::Identity), "nobody looks at ids");
    assert_eq!(translate(&edu).ok(), Some(IOVA));
    world.rig.command(|on| on.with_translation(true));
    assert_eq!((world.reach(NVME), translate(&edu).is_err()), (None, true));

    world.renumber(&[(EDU, Some(NVME.sid))]);
    assert_eq!(world.reach(NVME), target(EDU.sid));
    assert_eq!(translate(&edu).ok(), target(NVME.sid));
}

#[test]
fn a16_an_id_that_an_emulated_function_gave_up_is_the_others_own_at_once() {
    let world = World::new();
    let (edu, other) = (world.rig.unit.endpoint(EDU), world.rig.unit.endpoint(requester(2, 1, 0)));
    let again = world.rig.unit.endpoint(requester(2, 1, 0));
    world.renumber(&[(other.requester(), Some(EDU.sid))]);
    assert!(translate(&edu).is_err() && translate(&other).is_err() && translate(&again).is_err());
    drop(other);
    assert!(translate(&edu).is_err() && translate(&again).is_err(), "it has another endpoint");
    drop(again);
    assert_eq!(translate(&edu).ok(), target(EDU.sid));
    // Its id went with it.
    let other = world.rig.unit.endpoint(requester(2, 1, 0));
    assert_eq!(translate(&edu).ok(), target(EDU.sid));
    assert_eq!(other.requester(), requester(2, 1, 0));
    // An assigned function hears of it, too; and what an assigned function has stays when an endpoint of its name goes.
    let nvme = world.rig.unit.endpoint(NVME);
    world.renumber(&[(NVME, Some(EDU.sid))]);
    assert_eq!(world.reach(NVME), None);
    drop(edu);
    assert_eq!(world.reach(NVME), target(EDU.sid));
    drop(nvme);
    assert_eq!(world.reach(NVME), target(EDU.sid));
}

#[test]
fn a16_a_function_that_comes_to_an_id_that_is_taken_opens_nothing() {
    let world = World::new();
    world.renumber(&[(NVME, Some(EDU.sid))]);
    assert_eq!(world.reach(NVME), target(EDU.sid));
    let edu = world.rig.unit.endpoint(EDU);
    assert_eq!((world.reach(NVME), translate(&edu).is_err()), (None, true));
    drop(edu);
    assert_eq!(world.reach(NVME), target(EDU.sid), "it is alone again");
    world.rig.unit.add_requester(EDU).unwrap();
    assert_eq!((world.reach(NVME), world.reach(EDU)), (None, None));
    world.rig.unit.remove_requester(NVME);
    assert_eq!(world.reach(EDU), target(EDU.sid));
    // Its id went with it.
    world.rig.unit.add_requester(NVME).unwrap();
    assert_eq!((world.reach(NVME), world.reach(EDU)), (target(NVME.sid), target(EDU.sid)));
}

#[test]
fn a16_a_function_without_an_id_reaches_nothing_and_leaves_no_record() {
    let world = World::new();
    let edu = world.rig.unit.endpoint(EDU);
    assert!(translate(&edu).is_ok());
    world.renumber(&[(NVME, None), (EDU, None)]);
    assert_eq!(world.rig.unit.attachments()[0], (NVME, SpaceKey::Blocked));
    assert_eq!(translate(&edu), Err(DmaError::NoSourceId(Iova(IOVA))));
    assert_eq!(world.rig.fault_records(), []);
    // Ids are the bridges', so they outlive the unit's reset; with translation off nobody looks at them.
    world.rig.unit.reset();
    assert_eq!((world.rig.listener.attached(NVME), translate(&edu)), (Some(SpaceKey::Identity), Ok(IOVA)));
    world.rig.enable_translation();
    assert_eq!((world.reach(NVME), translate(&edu).is_err()), (None, true));
}

#[test]
fn a16_fault_records_show_the_id_that_the_request_carried() {
    let mut world = World::new();
    let edu = world.rig.unit.endpoint(EDU);
    world.renumber(&[(EDU, Some(ABSENT)), (NVME, Some(FREE))]);
    assert!(translate(&edu).is_err());
    assert_eq!(world.rig.fault_records(), [(0, ABSENT, 2, IOVA, true)]);
    // What the host refuses, too (B-11).
    world.rig.listener.0.lock().unwrap().refuse.insert(0x40_0000);
    world.rig.pages(world.roots[3], 0x40_0000, 0x90_0000, 1);
    assert!(world.rig.submit(&[iotlb_pages(4, 0x40_0000, 0)]));
    assert_eq!(world.rig.fault_records()[1], (1, FREE, 7, 0x40_0000, true));
}

#[test]
fn a16_the_change_waits_for_the_sessions_that_are_open() {
    let world = World::new();
    let edu = world.rig.unit.endpoint(EDU);
    let session = edu.enter();
    assert_eq!(session.translate(Iova(IOVA), Access::Write).ok(), target(EDU.sid).map(Gpa));
    std::thread::scope(|scope| {
        let (done, is_done) = mpsc::channel();
        let unit = world.rig.unit.clone();
        scope.spawn(move || {
            unit.renumber(&[(EDU, Some(FREE))]);
            done.send(()).unwrap();
        });
        let early = is_done.recv_timeout(Duration::from_millis(200));
        // A session that begins now has the new id already, and does not wait.
        let now = translate(&edu);
        // Before anything is asserted: what fails must not leave the other thread waiting.
        drop(session);
        is_done.recv().unwrap();
        assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
        assert_eq!(now.ok(), target(FREE));
    });
    assert_eq!(translate(&edu).ok(), target(FREE));
}

#[test]
fn a16_no_access_with_the_old_id_comes_after_the_change() {
    // A device writes to its page all the time; after the change the old id's page stays as it is.
    let world = World::new();
    let edu = world.rig.unit.endpoint(EDU);
    let (stop, mut late) = (std::sync::atomic::AtomicBool::new(false), None);
    std::thread::scope(|scope| {
        let (stop, edu) = (&stop, &edu);
        scope.spawn(move || {
            let mut value = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                value += 1;
                edu.write(Iova(IOVA), &value.to_le_bytes()).unwrap();
            }
        });
        for round in 0..300u32 {
            let (old, new) = if round % 2 == 0 { (EDU.sid, FREE) } else { (FREE, EDU.sid) };
            world.renumber(&[(EDU, Some(new))]);
            let page = GuestAddress(target(old).unwrap());
            let before: u64 = world.rig.memory.read_obj(page).unwrap();
            (0..20).for_each(|_| std::thread::yield_now());
            if world.rig.memory.read_obj::<u64>(page).unwrap() != before {
                late = Some(round);
                break;
            }
        }
        // Before anything is asserted, as above.
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(late, None, "an access after the change, in that round");
}

/// Makes the route of one message, as whoever makes routes does.
struct Route {
    unit: std::sync::Weak<Unit<Memory>>,
    made: Mutex<Vec<(EntriesChanged, bool)>>,
}

const MESSAGE: u64 = 5;

fn message(handle: u64) -> Msi {
    Msi { address: RemappableAddress::new().with_handle(handle as u16).into_bits().into(), data: 0 }
}

impl RemapListener for Route {
    fn entries_changed(&self, changed: EntriesChanged) {
        let route = self.unit.upgrade().unwrap().remap(NVME, message(MESSAGE));
        self.made.lock().unwrap().push((changed, route.is_ok()));
    }
}

#[test]
fn a16_the_source_check_of_interrupts_follows_and_routes_are_made_again() {
    let mut world = World::with(UnitConfig {
        interrupt_remapping: true,
        extended_interrupt_mode: true,
        ..UnitConfig::new(UnitId(0), 48)
    });
    let table = world.rig.table();
    // 5: from NVME's id. 6: from anybody. 7: from the buses 9 to 9.
    for (index, high) in [
        (5, IrteHigh::new().with_validation(1).with_source(NVME.sid.0)),
        (6, IrteHigh::new()),
        (7, IrteHigh::new().with_validation(2).with_source(0x0909)),
    ] {
        world.rig.store(table + index * 16 + 8, high.into_bits());
        let low = IrteLow::new().with_present(true).with_vector(0x41).with_destination(2);
        world.rig.store(table + index * 16, low.into_bits());
    }
    let address = InterruptTableAddress::new().with_page(table >> 12).with_size(7).with_extended_mode(true);
    world.rig.write64(offset::IRTA, address.into_bits());
    world.rig.command(|on| on.with_interrupt_table_pointer(true));
    world.rig.command(|on| on.with_interrupt_remapping(true));
    let route = Arc::new(Route { unit: Arc::downgrade(&world.rig.unit), made: Mutex::default() });
    world.rig.unit.set_remap_listener(route.clone());
    let made = || std::mem::take(&mut *route.made.lock().unwrap());
    let pass = |function| [5, 6, 7].map(|handle| world.rig.unit.remap(function, message(handle)).is_ok());

    assert_eq!((pass(NVME), pass(NIC)), ([true, true, false], [false, true, false]));
    world.renumber(&[(NVME, Some(FREE))]);
    assert_eq!(made(), [(EntriesChanged::All, false)], "with the new id, before the call returns");
    assert_eq!((pass(NVME), pass(NIC)), ([false, true, true], [false, true, false]));
    let refused = world.rig.unit.deliver(NVME, message(5)).unwrap_err();
    assert!(matches!(refused, RemapError::Fault(fault) if fault.requester.sid == FREE && fault.reason.code() == 0x26));
    assert_eq!(world.rig.fault_records(), [(0, FREE, 0x26, 5 << 48, false)]);

    // Somebody takes the id that entry 5 asks for; then a second one has it, too: neither passes for the other.
    world.renumber(&[(NIC, Some(NVME.sid))]);
    assert_eq!(pass(NIC), [true, true, false]);
    world.renumber(&[(NVME, Some(NVME.sid))]);
    assert_eq!((pass(NVME), pass(NIC)), ([false, true, false], [false, true, false]));
    world.renumber(&[(NIC, Some(FREE)), (NVME, Some(FREE))]);
    assert_eq!((pass(NVME), pass(NIC)), ([false, true, false], [false, true, false]), "by bus neither");
    world.renumber(&[(NIC, Some(NIC.sid)), (NVME, None)]);
    assert_eq!((pass(NVME), pass(NIC)), ([false, true, false], [false, true, false]));
    let silent = world.rig.unit.deliver(NVME, message(5)).unwrap_err();
    assert!(matches!(silent, RemapError::Fault(fault) if fault.silenced));
    assert_eq!(world.rig.fault_records().len(), 1);
    world.renumber(&[(NVME, Some(NVME.sid))]);
    assert_eq!((pass(NVME), pass(NIC)), ([true, true, false], [false, true, false]));
    made();
    world.renumber(&[(NVME, Some(NVME.sid))]);
    assert_eq!(made(), [], "nothing changed");
}

#[derive(Clone, Debug)]
enum Step {
    /// The Nth function gets the Nth id of `IDS`, one without tables, or none.
    Renumber(Vec<(usize, usize)>),
    /// The third function comes or goes.
    Third(bool),
    /// The emulated one comes or goes.
    Emulated(bool),
    Translation(bool),
    /// The entries of two ids change places.
    Tables(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec((0..4usize, 0..6usize), 1..5).prop_map(Step::Renumber),
        1 => any::<bool>().prop_map(Step::Third),
        1 => any::<bool>().prop_map(Step::Emulated),
        1 => any::<bool>().prop_map(Step::Translation),
        1 => (0..4usize, 0..4usize).prop_map(|(a, b)| Step::Tables(a, b)),
    ]
}

const THIRD: Requester = Requester { segment: 0, sid: FREE };
const FUNCTIONS: [Requester; 4] = [NVME, NIC, THIRD, EDU];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a16_each_function_reaches_what_the_tables_say_about_its_id_if_it_is_its_own(
        steps in prop::collection::vec(step(), 1..30),
    ) {
        let mut world = World::new();
        let mut ids = FUNCTIONS.map(|function| Some(function.sid));
        // What stands in the entry of the Nth id.
        let mut tables = [0, 1, 2, 3];
        let (mut third, mut edu, mut translating) = (false, None, true);
        for step in steps {
            match step {
                Step::Renumber(changes) => {
                    let id = |n: usize| match n { 0..=3 => Some(IDS[n]), 4 => Some(ABSENT), _ => None };
                    // A function that is not there is not renumbered; of several changes of one, the last counts.
                    let there = |n: usize| n < 2 || n == 2 && third || n == 3 && edu.is_some();
                    let changes: Vec<_> = changes.into_iter().filter(|(f, _)| there(*f)).collect();
                    changes.iter().for_each(|(function, n)| ids[*function] = id(*n));
                    let changes: Vec<_> = changes.iter().map(|(f, n)| (FUNCTIONS[*f], id(*n))).collect();
                    world.renumber(&changes);
                }
                Step::Third(true) => {
                    world.rig.unit.add_requester(THIRD).unwrap();
                    third = true;
                }
                Step::Third(false) => {
                    world.rig.unit.remove_requester(THIRD);
                    (third, ids[2]) = (false, Some(FREE));
                }
                Step::Emulated(true) => edu = edu.or_else(|| Some(world.rig.unit.endpoint(EDU))),
                Step::Emulated(false) => {
                    edu = None;
                    ids[3] = Some(EDU.sid);
                    world.renumber(&[(EDU, Some(EDU.sid))]);
                }
                Step::Translation(on) => {
                    world.rig.command(|before| before.with_translation(on));
                    translating = on;
                }
                Step::Tables(a, b) => {
                    tables.swap(a, b);
                    for n in [a, b] {
                        let at = Requester { segment: 0, sid: IDS[n] };
                        world.rig.set_paged(at, world.roots[tables[n]], 48, tables[n] as u16 + 1);
                    }
                    prop_assert!(world.rig.submit(&[context_global(), iotlb_global()]));
                }
            }
            let there = [true, true, third, edu.is_some()];
            let sharing = |id| (0..4).filter(|n| there[*n] && ids[*n] == id).count() > 1;
            let expected = |n: usize| {
                let own = ids[n].filter(|id| !sharing(Some(*id)));
                own.and_then(|id| IDS.iter().position(|each| *each == id)).map(|id| 0x80_0000 + 0x1000 * tables[id] as u64)
            };
            for n in (0..3).filter(|n| there[*n]) {
                if translating {
                    prop_assert_eq!(world.reach(FUNCTIONS[n]), expected(n), "function {}, ids {:?}", n, ids);
                } else {
                    prop_assert_eq!(world.rig.listener.attached(FUNCTIONS[n]), Some(SpaceKey::Identity));
                }
            }
            if let Some(edu) = &edu {
                let expected = if translating { expected(3) } else { Some(IOVA) };
                prop_assert_eq!(translate(edu).ok(), expected, "ids {:?}", ids);
            }
        }
    }
}
