//! vectors, pins and single messages whose entries are posted.

use vtd::Gpa;

use super::*;

/// What the processor of a descriptor is notified with.
pub(super) const NOTICE: Msi = Msi { address: 0xfee0_9000, data: 0xf2 };

/// An entry that posts `vector`. [`FakeUnit`] sends a notification for what is urgent.
fn posting(vector: u8, urgent: bool) -> Posting {
    Posting {
        requester: requester(),
        index: 3,
        silenced: false,
        descriptor: Gpa(0x1000),
        vector,
        urgent,
        extended_mode: true,
    }
}

impl FakeUnit {
    fn set_posted(&self, posting: Posting) {
        self.set_entry(SENT, Some(Remapped::Posted(posting)));
    }
    /// The vectors that were posted since the last time.
    fn posted(&self) -> Vec<u8> {
        let posts = std::mem::take(&mut *self.posts.lock().unwrap());
        posts.into_iter().map(|(of, posting)| (of == requester()).then_some(posting.vector).unwrap()).collect()
    }
}

#[test]
fn a17_a_posted_vector_is_posted_when_it_fires_and_has_no_route() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    unit.set_posted(posting(0x45, true));
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    interrupts.serve_blocked();
    assert_eq!((kvm.take(), unit.posted()), (vec![], vec![]));
    for _ in 0..2 {
        // What is signalled twice before it is served is one interrupt, as that of a route is.
        route.trigger().write(1).unwrap();
        route.trigger().write(1).unwrap();
        interrupts.serve_blocked();
        interrupts.serve_blocked();
        assert_eq!((kvm.take(), unit.posted()), (vec![Call::Send(NOTICE)], vec![0x45]));
    }
    // Where no notification is owed nothing is sent.
    unit.set_posted(posting(0x45, false));
    bench.invalidate(3, 1);
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!((kvm.take(), unit.posted(), unit.faults()), (vec![], vec![0x45], vec![]));
}

#[test]
fn a17_a_change_of_the_entry_counts_from_the_invalidation_on() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    unit.set_posted(posting(0x45, false));
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    unit.set_posted(posting(0x46, false));
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!(unit.posted(), [0x45], "the guest has not said so");
    bench.invalidate(4, 1);
    route.trigger().write(1).unwrap();
    // Signalled before the invalidation, and posted before it is done, as before.
    bench.invalidate(3, 1);
    assert_eq!(unit.posted(), [0x45]);
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!((kvm.take(), unit.posted()), (vec![], vec![0x46]));
}

#[test]
fn a17_what_was_signalled_before_the_entry_goes_is_posted_and_no_fault() {
    for next in [None, Some(REMAPPED)] {
        let bench = bench();
        let Bench { kvm, unit, interrupts } = &bench;
        unit.set_posted(posting(0x45, true));
        let route = interrupts.route(requester()).unwrap();
        interrupts.set_routes(&[(route.clone(), Some(SENT))]);
        route.trigger().write(1).unwrap();
        unit.set(SENT, next);
        bench.invalidate(3, 1);
        assert_eq!(unit.posted(), [0x45]);
        assert!(kvm.take().contains(&Call::Send(NOTICE)));
        interrupts.serve_blocked();
        assert_eq!((unit.posted(), unit.faults()), (vec![], vec![]));
        // From then on it is blocked, or KVM's.
        route.trigger().write(1).unwrap();
        interrupts.serve_blocked();
        let faults = if next.is_none() { vec![(requester(), SENT)] } else { vec![] };
        assert_eq!((unit.posted(), unit.faults()), (vec![], faults));
    }
}

#[test]
fn a17_a_vector_goes_from_a_route_to_a_descriptor_and_back() {
    let bench = bench();
    let Bench { kvm, unit, interrupts } = &bench;
    unit.set(SENT, Some(REMAPPED));
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    assert_eq!(kvm.take(), [routes([(24, REMAPPED)]), Call::Connect(24)]);
    unit.set_posted(posting(0x45, false));
    bench.invalidate(3, 1);
    assert_eq!(kvm.take(), [Call::Disconnect(24)]);
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!(unit.posted(), [0x45]);
    unit.set(SENT, Some(MOVED));
    bench.invalidate(3, 1);
    assert_eq!(kvm.take(), [routes([(24, MOVED)]), Call::Connect(24)]);
    interrupts.serve_blocked();
    // A blocked entry that becomes a posted one, and a mask.
    unit.set(SENT, None);
    bench.invalidate(3, 1);
    unit.set_posted(posting(0x47, false));
    bench.invalidate(3, 1);
    route.trigger().write(1).unwrap();
    interrupts.set_routes(&[(route.clone(), None)]);
    assert_eq!((unit.posted(), unit.faults()), (vec![0x47], vec![]));
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert!(route.take_pending() && unit.posted().is_empty(), "it is masked");
}

#[test]
fn a17_single_messages_are_posted_and_pins_have_no_route() {
    let Bench { kvm, unit, interrupts } = &bench();
    unit.set_posted(posting(0x45, true));
    Interrupts::signal(&**interrupts, requester(), SENT);
    assert_eq!((kvm.take(), unit.posted()), (vec![Call::Send(NOTICE)], vec![0x45]));
    unit.set_posted(posting(0x46, false));
    Interrupts::signal(&**interrupts, requester(), SENT);
    assert_eq!((kvm.take(), unit.posted()), (vec![], vec![0x46]));
    unit.set(SENT, Some(REMAPPED));
    interrupts.set_pin(9, Some((SENT, true)));
    assert_eq!(kvm.take(), [routes([(9, REMAPPED)])]);
    unit.set_posted(posting(0x45, false));
    interrupts.entries_changed(EntriesChanged::All);
    assert_eq!(kvm.take(), [routes([])]);
}

#[test]
fn a17_nothing_is_posted_once_the_unit_is_gone() {
    let Bench { kvm, unit, interrupts } = bench();
    unit.set_posted(posting(0x45, true));
    let route = interrupts.route(requester()).unwrap();
    interrupts.set_routes(&[(route.clone(), Some(SENT))]);
    drop(unit);
    route.trigger().write(1).unwrap();
    interrupts.serve_blocked();
    assert_eq!(kvm.take(), []);
}
