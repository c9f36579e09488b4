//! Parts of functions (C-4), and groups whose devices the host attaches one by one (C-1, C-2).

use std::collections::BTreeMap;
use std::sync::Arc;

use vfio_bridge::faulty::{Failure, Faulty};
use vfio_bridge::model::{HostOp, Kernel, Model};
use vfio_bridge::{Bridge, DirtyRace, GroupId, HostDevice, HostIommu, HostStream};
use vtd::{AttachRefused, Audit, Pasid, SpaceKey, SpaceListener, Stream};

use crate::world::*;

const RAM: Ram = Ram { low: 64 * KIB4, high: 16 * KIB4 };

/// The requests of a function with a PASID.
fn part(device: u8, pasid: u32) -> Stream {
    Stream { requester: requester(device), pasid: Some(Pasid(pasid)) }
}

/// What the host has for it: a function's device has the number of the function.
fn on_host(device: u32, pasid: impl Into<Option<u32>>) -> HostStream {
    HostStream { device: HostDevice(device), pasid: pasid.into().map(Pasid) }
}

/// Group 1 is devices 1 and 2, which are what they seem; group 2 is device 3, and one that is a part of device 9.
fn groups() -> BTreeMap<GroupId, Vec<(HostDevice, HostStream)>> {
    let itself = |device| (HostDevice(device), on_host(device, None));
    let mediated = (HostDevice(4), on_host(9, 7));
    [(GroupId(1), vec![itself(1), itself(2)]), (GroupId(2), vec![itself(3), mediated])].into()
}

struct Parts {
    model: Arc<Model>,
    bridge: Bridge,
    stopped: Arc<Stopped>,
}

impl Parts {
    fn over(host: Arc<dyn HostIommu>, model: Arc<Model>) -> Self {
        let stopped = Arc::new(Stopped::default());
        let bridge = Bridge::new(vec![host], RAM.map(), stopped.clone());
        for (device, group) in [(1, 1), (2, 1), (3, 2), (4, 2)] {
            let registered = bridge.register_device(requester(device), GroupId(group), HostDevice(device.into()));
            registered.expect("new");
        }
        Self { model, bridge, stopped }
    }

    fn new() -> Self {
        let model = Model::with_devices(Kernel::new(48), groups());
        Self::over(model.clone(), model)
    }

    fn attach(&self, stream: impl Into<Stream>, space: &SpaceKey, pages: &[(u64, u64)]) -> Result<(), AttachRefused> {
        let mut live = pages.iter().map(|(iova, gpa)| mapping(*iova, *gpa, KIB4));
        self.bridge.attach(stream.into(), space, &mut live)
    }

    fn reaches(&self, stream: HostStream, iova: u64) -> Option<u64> {
        self.model.translate_stream(stream, iova).map(|(hva, _)| hva - LOW_HVA)
    }
}

#[test]
fn c1_c2_a_group_is_attached_as_the_set_that_it_is() {
    let parts = Parts::new();
    let space = paged(1, 48);
    for device in [1, 2] {
        parts.attach(requester(device), &space, &[(0, KIB4)]).expect("attached");
    }
    for device in [3, 4] {
        parts.attach(requester(device), &SpaceKey::Identity, &[]).expect("attached");
    }
    assert_eq!([1, 2].map(|device| parts.reaches(on_host(device, None), 0)), [Some(KIB4); 2]);
    assert_eq!(parts.reaches(on_host(3, None), KIB4), Some(KIB4));
    assert_eq!(parts.reaches(on_host(9, 7), KIB4), Some(KIB4), "a part of its parent");
    assert_eq!(parts.model.space_of_stream(on_host(9, None)), None, "and nothing else of that");
    // The second of a group cannot be attached: the group reaches nothing, and so does not go half.
    let other = paged(2, 48);
    parts.attach(requester(3), &other, &[(0, 0)]).expect("its group disagrees");
    let last = on_host(9, 7);
    parts.model.inject(move |_, op| (*op == HostOp::AttachStream(last)).then_some(libc::ENOSPC));
    assert!(matches!(parts.attach(requester(4), &other, &[(0, 0)]), Err(AttachRefused::Host { .. })));
    assert_eq!([on_host(3, None), last].map(|stream| parts.model.space_of_stream(stream)), [None; 2]);
    assert_eq!(parts.bridge.space_of(requester(3)), Some(SpaceKey::Blocked));
    parts.model.stop_injecting();
    parts.attach(requester(4), &other, &[(0, 0)]).expect("attached");
    assert_eq!(parts.bridge.space_of(requester(3)), Some(other));
    assert!(parts.stopped.functions.lock().expect("whole").is_empty());
}

#[test]
fn c2_a_group_that_came_half_way_and_cannot_be_taken_back_is_stopped() {
    let parts = Parts::new();
    parts.attach(requester(1), &SpaceKey::Identity, &[]).expect("its group disagrees");
    let (first, second) = (on_host(1, None), on_host(2, None));
    parts.model.inject(move |_, op| {
        [HostOp::AttachStream(second), HostOp::DetachStream(first)].contains(op).then_some(libc::EIO)
    });
    assert!(matches!(parts.attach(requester(2), &SpaceKey::Identity, &[]), Err(AttachRefused::Host { .. })));
    assert_eq!(*parts.stopped.functions.lock().expect("whole"), [requester(1), requester(2)]);
    parts.model.stop_injecting();
    let again = parts.attach(requester(2), &SpaceKey::Identity, &[]);
    assert!(matches!(again, Err(AttachRefused::Host { .. })), "it stays stopped: {again:?}");
}

#[test]
fn c4_a_part_of_a_function_is_in_a_space_of_its_own() {
    let parts = Parts::new();
    let (one, two, three) = (paged(1, 48), paged(2, 48), paged(3, 48));
    for device in [1, 2] {
        parts.attach(requester(device), &one, &[(0, KIB4)]).expect("attached");
    }
    parts.attach(part(1, 5), &two, &[(0, 2 * KIB4)]).expect("attached");
    parts.attach(part(1, 6), &three, &[(0, 3 * KIB4)]).expect("attached");
    // The same space by another part, and by another function's.
    parts.attach(part(2, 5), &two, &[(0, 2 * KIB4)]).expect("attached");
    let seen = || {
        [on_host(1, None), on_host(1, 5), on_host(1, 6), on_host(2, None), on_host(2, 5)]
            .map(|stream| parts.reaches(stream, 0).map(|gpa| gpa / KIB4))
    };
    assert_eq!(seen(), [Some(1), Some(2), Some(3), Some(1), Some(2)]);
    assert_eq!(parts.model.spaces(), 3, "two parts in one space share its host space");
    assert_eq!(parts.bridge.space_of(part(1, 5)), Some(two));
    assert_eq!(parts.bridge.holds(part(1, 6)).len(), 1);
    // What changes in a space changes for who is in it.
    assert!(parts.bridge.apply(&two, &[unmap(0, 0xfff), map(0, 4 * KIB4, KIB4)]).refused.is_empty());
    assert_eq!(seen(), [Some(1), Some(4), Some(3), Some(1), Some(4)]);
    let mut audit = Audit::default();
    parts.bridge.audit(part(1, 5), &two, &mut [mapping(0, 4 * KIB4, KIB4)].into_iter(), &mut audit);
    assert_eq!((audit.differences, audit.checked), (vec![], 1));
    // The function goes to another space: its parts stay.
    for device in [1, 2] {
        parts.attach(requester(device), &SpaceKey::Identity, &[]).expect("attached");
    }
    assert_eq!(seen(), [Some(0), Some(4), Some(3), Some(0), Some(4)]);
    parts.bridge.detach(part(1, 5));
    parts.attach(part(1, 6), &SpaceKey::Blocked, &[]).expect("blocked");
    assert_eq!(seen(), [Some(0), None, None, Some(0), Some(4)]);
    assert_eq!([5, 6].map(|pasid| parts.bridge.space_of(part(1, pasid))), [None; 2], "they are forgotten");
    // What the host refuses of a part is said of the part.
    let refused = parts.attach(part(1, 9), &paged(4, 48), &[(0, RAM.low)]);
    let Err(AttachRefused::Partial(refused)) = refused else { panic!("{refused:?}") };
    assert_eq!(refused[0].stream, part(1, 9));
}

#[test]
fn e1_what_a_part_of_a_function_writes_is_what_the_function_wrote() {
    let parts = Parts::new();
    for device in [1, 2] {
        parts.attach(requester(device), &paged(1, 48), &[(0, KIB4)]).expect("attached");
    }
    parts.attach(part(1, 5), &paged(2, 48), &[(0, 2 * KIB4)]).expect("attached");
    let write = |stream| parts.model.write_stream(stream, 0).expect("mapped");
    write(on_host(1, 5));
    parts.bridge.dirty_start(None, DirtyRace::Open).expect("all");
    let read = |device| {
        let pages = parts.bridge.dirty_read(device).expect("tracked").pages;
        (0..8).filter(|page| pages.contains(page * KIB4)).collect::<Vec<_>>()
    };
    assert_eq!(read(None), Vec::<u64>::new(), "it was written before");
    write(on_host(2, None));
    write(on_host(1, 5));
    assert_eq!(read(Some(requester(1))), [1, 2]);
    // One that comes while they are tracked, and goes before anybody asks.
    parts.attach(part(2, 6), &paged(3, 48), &[(0, 3 * KIB4)]).expect("attached");
    write(on_host(2, 6));
    parts.bridge.detach(part(2, 6));
    assert_eq!(read(None), [3]);
    parts.bridge.dirty_stop(None).expect("all");
    let tracked = [on_host(1, None), on_host(1, 5)].map(|stream| parts.model.space_of_stream(stream));
    assert!(tracked.into_iter().flatten().all(|space| !parts.model.tracks(space)));
}

#[test]
fn c4_a_part_that_cannot_be_attached_reaches_nothing_and_its_function_goes_on() {
    let parts = Parts::new();
    let space = paged(1, 48);
    for device in [1, 2] {
        parts.attach(requester(device), &SpaceKey::Identity, &[]).expect("attached");
    }
    parts.model.inject(|_, op| matches!(op, HostOp::AttachStream(_)).then_some(libc::EOPNOTSUPP));
    assert!(matches!(parts.attach(part(1, 5), &space, &[(0, 0)]), Err(AttachRefused::Host { .. })));
    assert_eq!((parts.bridge.space_of(part(1, 5)), parts.model.spaces()), (None, 1));
    assert_eq!(parts.reaches(on_host(1, None), KIB4), Some(KIB4));
    assert!(parts.stopped.functions.lock().expect("whole").is_empty());
    // One that cannot be detached, or whose space does not let go, stops the function, which is what makes its requests.
    parts.model.stop_injecting();
    parts.attach(part(1, 5), &space, &[(0, 0)]).expect("attached");
    parts.model.inject(|_, op| matches!(op, HostOp::DetachStream(_)).then_some(libc::EIO));
    parts.bridge.detach(part(1, 5));
    assert_eq!(*parts.stopped.functions.lock().expect("whole"), [requester(1)]);
    parts.model.stop_injecting();
    let again = [parts.attach(part(1, 5), &space, &[]), parts.attach(requester(1), &space, &[])];
    assert!(again.iter().all(|result| matches!(result, Err(AttachRefused::Host { .. }))), "{again:?}");
}

#[test]
fn c4_a_host_that_cannot_attach_parts_says_so() {
    let life = World::new(Kernel::new(48), RAM, &[(1, 1)]);
    let mut nothing = std::iter::empty();
    let refused = life.bridge.attach(part(1, 5), &paged(1, 48), &mut nothing);
    assert!(matches!(&refused, Err(AttachRefused::Host { reason, .. }) if reason.contains("PASID")), "{refused:?}");
    // That such requests reach nothing is what is so anyway.
    life.bridge.attach(part(1, 5), &SpaceKey::Blocked, &mut nothing).expect("blocked");
    assert_eq!(life.bridge.space_of(part(1, 5)), None);
    let model = Model::new(Kernel::new(48), &[GroupId(1)]);
    let bridge = Bridge::new(vec![model], RAM.map(), Arc::new(Stopped::default()));
    bridge.register_device(requester(1), GroupId(1), HostDevice(1)).expect("new");
    let refused = bridge.attach(part(1, 5), &paged(1, 48), &mut nothing);
    assert!(matches!(&refused, Err(AttachRefused::Host { reason, .. }) if reason.contains("whole")), "{refused:?}");
    let unknown = bridge.attach(part(2, 5), &paged(1, 48), &mut nothing);
    assert_eq!(unknown, Err(AttachRefused::UnknownRequester(requester(2))));
}

#[test]
fn c4_b11_whichever_call_for_a_part_fails_nothing_is_reached_that_is_not_granted() {
    let (one, two) = (paged(1, 48), paged(2, 48));
    let granted = |space: Option<SpaceKey>, iova: u64| match space {
        Some(SpaceKey::Identity) => Some(iova),
        Some(space) if space == one => (iova == 0).then_some(KIB4),
        Some(space) if space == two => (iova == 0).then_some(2 * KIB4),
        _ => None,
    };
    let live = |plan: Option<(u64, Failure)>| {
        let model = Model::with_devices(Kernel::new(48), groups());
        let host = Faulty::new(model.clone());
        if let Some((nth, failure)) = plan {
            host.fail(nth, failure);
        }
        let parts = Parts::over(host.clone(), model);
        let mut wants: BTreeMap<Stream, SpaceKey> = BTreeMap::new();
        let steps = [
            (requester(1).into(), Some(SpaceKey::Identity)),
            (requester(2).into(), Some(SpaceKey::Identity)),
            (part(1, 5), Some(one)),
            (part(2, 5), Some(one)),
            (part(1, 5), Some(two)),
            (requester(1).into(), Some(two)),
            (requester(2).into(), Some(two)),
            (part(2, 5), None),
            (part(1, 5), None),
        ];
        for (number, (stream, space)) in steps.into_iter().enumerate() {
            let page = |space| granted(Some(space), 0).filter(|_| matches!(space, SpaceKey::Paged(_)));
            let there = match space {
                Some(space) => {
                    let pages: Vec<_> = page(space).map(|gpa| (0, gpa)).into_iter().collect();
                    matches!(parts.attach(stream, &space, &pages), Ok(()) | Err(AttachRefused::Partial(_)))
                }
                None => {
                    parts.bridge.detach(stream);
                    false
                }
            };
            wants.remove(&stream);
            wants.extend(space.filter(|_| there).map(|space| (stream, space)));
            let stopped = parts.stopped.functions.lock().expect("whole").clone();
            for device in [1, 2] {
                if stopped.contains(&requester(device)) {
                    continue;
                }
                for pasid in [None, Some(5)] {
                    let stream = Stream { requester: requester(device), pasid: pasid.map(Pasid) };
                    let may = wants.get(&stream).copied();
                    for iova in [0, 5 * KIB4] {
                        let got = parts.reaches(on_host(device.into(), pasid), iova);
                        let fine = got.is_none() || got == granted(may, iova);
                        assert!(fine, "{plan:x?} ({:?}), step {number}: {stream} gets to {got:x?}", host.failed());
                    }
                }
            }
        }
        host.calls()
    };
    let calls = live(None);
    assert!(calls >= 15, "{calls}");
    for nth in 1..=calls {
        for failure in [
            Failure::Refused(libc::ENOSPC),
            Failure::Refused(libc::EIO),
            Failure::DoneAndRefused(libc::EIO),
            Failure::Miscounted(4096),
        ] {
            live(Some((nth, failure)));
        }
    }
}
