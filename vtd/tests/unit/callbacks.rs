//! What a listener may call from inside, and what it may not (design rule 11): the table of docs/embedding.md.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, Weak};

use vtd::spec::registers::offset;
use vtd::{
    Applied, AttachRefused, EntriesChanged, Gpa, GpaRange, Mapping, Msi, MsiSink, Posting, RemapListener, SpaceKey,
    SpaceListener, Stream, Unit, UnitConfig, UnitId,
};

use crate::rig::{Listener, Memory, NIC, NVME, Rig, iotlb_domain, wait_interrupt};

/// What fails: a fault is recorded, and its message sent.
const POSTING: Posting = Posting {
    requester: NVME,
    index: 5,
    silenced: false,
    descriptor: Gpa(u64::MAX << 6),
    vector: 0x45,
    urgent: false,
    extended_mode: false,
};

type Call = Box<dyn Fn(&Arc<Unit<Memory>>) + Send>;

/// Calls back whenever it is called, and notes what came of it.
#[derive(Default)]
struct Caller {
    inner: Arc<Listener>,
    unit: Mutex<Weak<Unit<Memory>>>,
    call: Mutex<Option<Call>>,
    /// From where it was called, and the panic, if it was one.
    outcomes: Mutex<Vec<(&'static str, Option<String>)>>,
}

impl Caller {
    fn call_back(&self, from: &'static str) {
        let call = self.call.lock().unwrap();
        let (Some(call), Some(unit)) = (&*call, self.unit.lock().unwrap().upgrade()) else { return };
        let outcome = catch_unwind(AssertUnwindSafe(|| call(&unit)));
        let message = outcome.err().map(|panic| match panic.downcast::<String>() {
            Ok(message) => *message,
            Err(other) => other.downcast::<&str>().map_or(String::new(), |message| (*message).to_owned()),
        });
        self.outcomes.lock().unwrap().push((from, message));
    }

    /// What came of `call` in all that `guest` made the unit call.
    fn outcomes(&self, call: Call, guest: impl FnOnce()) -> Vec<(&'static str, Option<String>)> {
        *self.call.lock().unwrap() = Some(call);
        guest();
        *self.call.lock().unwrap() = None;
        std::mem::take(&mut *self.outcomes.lock().unwrap())
    }
}

impl SpaceListener for Caller {
    fn attach(
        &self,
        stream: Stream,
        space: &SpaceKey,
        live: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        self.call_back("attach");
        self.inner.attach(stream, space, live)
    }
    fn detach(&self, stream: Stream) {
        self.call_back("detach");
        self.inner.detach(stream);
    }
    fn apply(&self, space: &SpaceKey, ops: &[vtd::MapOp]) -> Applied {
        self.call_back("apply");
        self.inner.apply(space, ops)
    }
}

impl RemapListener for Caller {
    fn entries_changed(&self, _: EntriesChanged) {
        self.call_back("entries_changed");
    }
}

impl MsiSink for Caller {
    fn signal(&self, _: Msi) {
        self.call_back("signal");
    }
}

/// A unit whose listeners and sink are `Caller`; `NVME` is in domain 1.
fn calling() -> (Rig, u64, Arc<Caller>) {
    let mut rig = Rig::new();
    let caller = Arc::new(Caller { inner: rig.listener.clone(), ..Caller::default() });
    let config = UnitConfig { interrupt_remapping: true, ..UnitConfig::new(UnitId(0), 48) };
    rig.unit = Unit::new(config, rig.memory.clone(), caller.clone(), caller.clone()).unwrap();
    rig.unit.set_remap_listener(caller.clone());
    *caller.unit.lock().unwrap() = Arc::downgrade(&rig.unit);
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.set_paged(NIC, root, 48, 1);
    rig.unit.add_requester(NVME).unwrap();
    (rig, root, caller)
}

/// Everything that calls: a function joins and leaves, pages come and go, an interrupt of the unit, a route.
fn everything(rig: &mut Rig, root: u64) {
    rig.write32(offset::IEADDR, 0xfee0_0000);
    rig.write32(offset::IECTL, 0);
    rig.pages(root, 0x4000, 0x8000, 1);
    assert!(rig.submit(&[iotlb_domain(1), wait_interrupt(), (4, 0)]));
    rig.clear(root, 0x4000, 1);
    rig.write32(offset::ICS, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    rig.unit.add_requester(NIC).unwrap();
    rig.unit.remove_requester(NIC);
}

#[test]
fn rule11_what_takes_no_queue_lock_may_be_called_from_inside() {
    let (mut rig, root, caller) = calling();
    let allowed: Vec<(&str, Call)> = vec![
        ("config", Box::new(|unit| assert_eq!(unit.config().aw_bits, 48))),
        ("stats", Box::new(|unit| assert_eq!(unit.stats().queue_errors, 0))),
        ("read", Box::new(|unit| unit.read(offset::IQH, &mut [0; 8]))),
        ("remap", Box::new(|unit| _ = unit.remap(NVME, Msi { address: 0xfee0_0000, data: 0x41 }))),
        ("deliver", Box::new(|unit| _ = unit.deliver(NVME, Msi { address: 0xfee0_0000, data: 0x41 }))),
        ("post", Box::new(|unit| _ = unit.post(&POSTING))),
        ("walk", {
            let space = rig.set_paged(NVME, root, 48, 1);
            let SpaceKey::Paged(space) = space else { unreachable!() };
            Box::new(move |unit| assert!(unit.walk(&space).is_some()))
        }),
        ("set_remap_listener", {
            let caller = Arc::downgrade(&caller);
            Box::new(move |unit| unit.set_remap_listener(caller.upgrade().unwrap()))
        }),
    ];
    for (name, call) in allowed {
        let outcomes = caller.outcomes(call, || everything(&mut rig, root));
        for from in ["attach", "detach", "apply", "entries_changed", "signal"] {
            assert!(outcomes.contains(&(from, None)), "{name} from {from}: {outcomes:?}");
        }
        assert!(outcomes.iter().all(|(_, panic)| panic.is_none()), "{name}: {outcomes:?}");
    }
}

#[cfg(debug_assertions)]
#[test]
fn rule11_what_takes_the_queue_lock_panics_from_inside() {
    let (mut rig, root, caller) = calling();
    let endpoints: Mutex<Vec<_>> = Mutex::new((0..16).map(|_| rig.unit.endpoint(NIC)).collect());
    let state = rig.unit.save();
    let forbidden: Vec<(&str, Call)> = vec![
        ("write", Box::new(|unit| unit.write(offset::IQT, &[0; 8]))),
        ("write that is no command", Box::new(|unit| unit.write(offset::FEDATA, &[0; 4]))),
        ("add_requester", Box::new(|unit| drop(unit.add_requester(NIC)))),
        ("remove_requester", Box::new(|unit| unit.remove_requester(NVME))),
        ("renumber", Box::new(|unit| unit.renumber(&[]))),
        ("memory_changed", Box::new(|unit| unit.memory_changed(GpaRange::new(0, 0xfff)))),
        ("reset", Box::new(|unit| unit.reset())),
        ("save", Box::new(|unit| _ = unit.save())),
        ("restore", Box::new(move |unit| _ = unit.restore(state.clone()))),
        ("audit", Box::new(|unit| drop(unit.audit(&mut |_, _, _, _| {})))),
        ("attachments", Box::new(|unit| drop(unit.attachments()))),
        ("spaces_snapshot", Box::new(|unit| drop(unit.spaces_snapshot()))),
        ("endpoint", Box::new(|unit| _ = unit.endpoint(NIC))),
        ("dropping an endpoint", {
            Box::new(move |_| {
                let endpoint = endpoints.lock().unwrap().pop();
                drop(endpoint.expect("one for each call"));
            })
        }),
    ];
    for (name, call) in forbidden {
        let outcomes = caller.outcomes(call, || everything(&mut rig, root));
        for from in ["attach", "detach", "apply", "entries_changed", "signal"] {
            assert!(outcomes.iter().any(|outcome| outcome.0 == from), "{name} from {from}");
        }
        for (from, panic) in outcomes {
            let panic = panic.unwrap_or_else(|| panic!("{name} from {from} did not panic"));
            assert!(panic.contains("the queue lock"), "{name} from {from}: {panic}");
        }
    }
    // From inside an audit, too.
    let panic = catch_unwind(AssertUnwindSafe(|| {
        rig.unit.audit(&mut |_, _, _, _| drop(rig.unit.attachments()));
    }));
    assert!(panic.is_err());
    // Nothing is left of it: another thread has the lock, and this one waits.
    assert_eq!(rig.unit.attachments().len(), 1);
}

#[cfg(debug_assertions)]
#[test]
fn rule11_what_takes_the_queue_lock_panics_on_a_thread_that_a_listener_waits_for() {
    let (_rig, _, caller) = calling();
    let unit = caller.unit.lock().unwrap().upgrade().unwrap();
    let panics = |unit: &Unit<Memory>| catch_unwind(AssertUnwindSafe(|| unit.attachments().len())).is_err();
    let thread = std::thread::spawn(move || {
        let outer = vtd::InsideNotification::enter();
        drop(vtd::InsideNotification::enter());
        let inside = panics(&unit);
        drop(outer);
        (inside, panics(&unit))
    });
    assert_eq!(thread.join().unwrap(), (true, false));
}

#[test]
fn rule11_another_thread_waits_for_the_drain() {
    let (mut rig, root, caller) = calling();
    let waiting = Arc::new(Mutex::new(Vec::new()));
    let threads = waiting.clone();
    let call: Call = Box::new(move |unit| {
        let unit = unit.clone();
        threads.lock().unwrap().push(std::thread::spawn(move || unit.attachments().len()));
        std::thread::sleep(std::time::Duration::from_millis(5));
    });
    let outcomes = caller.outcomes(call, || everything(&mut rig, root));
    assert!(outcomes.iter().all(|(_, panic)| panic.is_none()));
    for thread in waiting.lock().unwrap().drain(..) {
        assert!((1..=2).contains(&thread.join().unwrap()));
    }
}
