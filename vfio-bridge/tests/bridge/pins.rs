//! Software devices that pin pages, and how they hear of unmaps: behaviours D-1 to D-5.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use vfio_bridge::model::{Kernel, Model};
use vfio_bridge::{
    Bridge, GroupId, GuestMap, HostIommu, Notice, PinClient, PinError, PinLimits, Placement, RegisterClientError,
    Software, UnmapNotifier, UnmapRange,
};
use vtd::{IovaRange, MapOp, Mapping, Perm, SpaceKey, SpaceListener};

use crate::world::*;

const RAM: Ram = Ram { low: 16 << 20, high: 16 << 20 };
const LIMITS: PinLimits = PinLimits { pages: 1000, deadline: Duration::from_secs(30) };

/// What a client does with a notice.
type Answer = Box<dyn Fn(&Device, &[IovaRange]) + Send + Sync>;

/// A software device.
pub struct Device {
    client: Mutex<Option<Arc<PinClient>>>,
    pub told: Mutex<Vec<Vec<IovaRange>>>,
    answer: Answer,
}

impl UnmapNotifier for Device {
    fn notify(&self, notice: &Notice) {
        if let Notice::Unmap { ranges } = notice {
            self.told.lock().expect("whole").push(ranges.to_vec());
            (self.answer)(self, ranges);
        }
    }
}

impl Device {
    pub fn client(&self) -> Arc<PinClient> {
        self.client.lock().expect("whole").clone().expect("there")
    }

    pub fn pin(&self, pages: &[u64]) -> Result<Vec<u64>, PinError> {
        let pinned = self.client().pin(pages, Perm::ReadWrite)?;
        assert!(pinned.pages.iter().map(|page| page.iova).eq(pages.iter().copied()));
        Ok(pinned.pages.iter().map(|page| page.hva).collect())
    }

    pub fn told(&self) -> Vec<Vec<IovaRange>> {
        std::mem::take(&mut self.told.lock().expect("whole"))
    }

    pub fn leave(&self) {
        self.client.lock().expect("whole").take();
    }
}

/// A bridge before software devices.
pub struct Rig {
    pub bridge: Arc<Bridge>,
    pub stopped: Arc<Stopped>,
    pub groups: Vec<GroupId>,
    /// All that were made: each is in the hands of its own thread, which ends when it leaves.
    devices: Mutex<Vec<Arc<Device>>>,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.devices.lock().expect("whole").iter().for_each(|device| device.leave());
    }
}

impl Rig {
    /// Devices 1 to `devices`, each in a group of its own and attached to its own paged space.
    pub fn new(devices: u8) -> (Self, Vec<SpaceKey>) {
        let software = Arc::new(Software::default());
        let groups: Vec<GroupId> = (0..devices).map(|_| software.open()).collect();
        let stopped = Arc::new(Stopped::default());
        let bridge = Arc::new(Bridge::new(vec![software], RAM.map(), stopped.clone()));
        let rig = Self { bridge, stopped, groups, devices: Mutex::default() };
        let spaces: Vec<SpaceKey> = (1..=devices).map(|device| paged(device.into(), 48)).collect();
        for (device, space) in (1..).zip(&spaces) {
            rig.bridge.register(requester(device), rig.groups[usize::from(device) - 1]).expect("new");
            rig.attach(device, space, &[]);
        }
        (rig, spaces)
    }

    pub fn one() -> (Self, SpaceKey) {
        let (rig, spaces) = Self::new(1);
        (rig, spaces[0])
    }

    pub fn attach(&self, device: u8, space: &SpaceKey, live: &[Mapping]) {
        self.bridge.attach(requester(device).into(), space, &mut live.iter().copied()).expect("attached");
    }

    pub fn done(&self, space: &SpaceKey, ops: &[MapOp]) {
        assert_eq!(self.bridge.apply(space, ops).refused, []);
    }

    pub fn device_with(&self, device: u8, limits: PinLimits, answer: Answer) -> Arc<Device> {
        let client = Arc::new(Device { client: Mutex::default(), told: Mutex::default(), answer });
        let handle = self.bridge.register_client(requester(device), client.clone(), limits).expect("software");
        *client.client.lock().expect("whole") = Some(Arc::new(handle));
        self.devices.lock().expect("whole").push(client.clone());
        client
    }

    /// One that lets go of what it is told.
    pub fn device(&self, device: u8) -> Arc<Device> {
        self.device_with(device, LIMITS, Box::new(let_go))
    }

    fn pinned(&self, device: u8) -> Vec<(u64, u32)> {
        self.bridge.pinned(requester(device))
    }

    fn stopped(&self) -> Vec<vtd::Requester> {
        self.stopped.functions.lock().expect("whole").clone()
    }
}

/// Unpins whatever it has there, however often.
pub fn let_go(device: &Device, ranges: &[IovaRange]) {
    let client = device.client();
    for iova in ranges.iter().flat_map(|range| (range.first..=range.last).step_by(4096)) {
        while client.unpin(&[iova]).is_ok() {}
    }
}

fn pages(first: u64, count: u64) -> IovaRange {
    IovaRange::new(first, first + count * KIB4 - 1)
}

#[test]
fn d1_pinned_pages_have_addresses_and_a_second_pin_only_counts() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0x5000, 2 * KIB4), map(0x12000, HIGH_GPA, KIB4)]);
    let device = rig.device(1);
    assert_eq!(device.pin(&[0x11000, 0x12000]), Ok(vec![LOW_HVA + 0x6000, HIGH_HVA]));
    assert_eq!(device.pin(&[0x11000]), Ok(vec![LOW_HVA + 0x6000]));
    assert_eq!(rig.pinned(1), [(0x11000, 2), (0x12000, 1)]);
    assert_eq!((device.client().stats().pinned_pages, device.client().stats().pins), (2, 3));
    // A page may be named twice, and is counted twice.
    device.pin(&[0x10000, 0x10000]).expect("mapped");
    assert_eq!(rig.pinned(1)[0], (0x10000, 2));
}

#[test]
fn d1_a_pin_is_of_all_its_pages_or_of_none() {
    let (rig, space) = Rig::one();
    let read_only = Mapping { perm: Perm::Read, ..mapping(0x20000, 0, KIB4) };
    rig.done(&space, &[map(0x10000, 0x5000, 2 * KIB4), MapOp::Map(read_only)]);
    let device = rig.device(1);
    for (last, error) in [
        (0x12000, PinError::NotMapped(0x12000)),
        (0x11008, PinError::Unaligned(0x11008)),
        (0x20000, PinError::Denied(0x20000)),
        (u64::MAX, PinError::Unaligned(u64::MAX)),
    ] {
        assert_eq!(device.pin(&[0x10000, last]), Err(error));
    }
    assert_eq!(device.pin(&vec![0x10000; 513]), Err(PinError::TooMany(513)));
    assert_eq!((rig.pinned(1), device.client().stats().refused), (vec![], 5));
    device.client().pin(&[0x20000], Perm::Read).expect("readable");
    assert!(device.client().pin(&[0x20000], Perm::Write).is_err());
    device.pin(&vec![0x10000; 512]).expect("mapped");
}

#[test]
fn d1_the_count_of_a_page_has_an_end() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, 2 * KIB4)]);
    let (device, other) = (rig.device(1), rig.device(1));
    for _ in 0..4095 / 45 {
        device.pin(&[0x10000; 45]).expect("mapped");
    }
    assert_eq!(device.pin(&[0x11000, 0x10000]), Err(PinError::TooOften(0x10000)));
    assert_eq!(rig.pinned(1), [(0x10000, 4095)]);
    other.pin(&[0x10000]).expect("another client counts for itself");
    device.client().unpin(&[0x10000]).expect("pinned");
    device.pin(&[0x10000]).expect("there is room again");
}

#[test]
fn d2_a_page_is_free_when_it_was_unpinned_as_often_as_it_was_pinned() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, 4 * KIB4)]);
    let (device, other) = (rig.device(1), rig.device(1));
    device.pin(&[0x10000, 0x10000, 0x11000]).expect("mapped");
    other.pin(&[0x10000, 0x12000]).expect("mapped");
    // What is unknown, or another's, is an error that touches nothing: not even what stands before it.
    for unknown in [0x12000, 0x13000, 0x10001, 0x9000_0000] {
        assert_eq!(device.client().unpin(&[0x11000, unknown]), Err(PinError::NotPinned(unknown)));
    }
    assert_eq!(device.client().unpin(&[0x11000, 0x11000]), Err(PinError::NotPinned(0x11000)));
    assert_eq!(rig.pinned(1), [(0x10000, 3), (0x11000, 1), (0x12000, 1)]);
    device.client().unpin(&[0x10000]).expect("pinned");
    assert_eq!(rig.pinned(1)[0], (0x10000, 2));
    device.client().unpin(&[0x10000, 0x11000]).expect("pinned");
    assert_eq!(rig.pinned(1), [(0x10000, 1), (0x12000, 1)]);
    assert_eq!(device.client().stats().pinned_pages, 0);
    assert_eq!(device.client().unpin(&[0x10000]), Err(PinError::NotPinned(0x10000)));
}

#[test]
fn d3_an_unmap_tells_those_who_have_pins_there_and_waits_for_them() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, 8 * KIB4), map(0x20000, 0, KIB4)]);
    let (there, beside) = (rig.device(1), rig.device(1));
    there.pin(&[0x10000, 0x12000, 0x13000, 0x17000, 0x20000]).expect("mapped");
    beside.pin(&[0x10000, 0x20000]).expect("mapped");
    rig.done(&space, &[unmap(0x11000, 0x13fff), unmap(0x15000, 0x16fff)]);
    assert_eq!(there.told(), [[pages(0x12000, 2)]]);
    assert_eq!(beside.told(), [[IovaRange::ALL; 0]; 0]);
    assert_eq!(rig.pinned(1), [(0x10000, 2), (0x17000, 1), (0x20000, 2)]);
    rig.done(&space, &[unmap(0, u64::MAX)]);
    assert_eq!(there.told(), [[pages(0x10000, 1), pages(0x17000, 1), pages(0x20000, 1)]]);
    assert_eq!(beside.told().len(), 1);
    assert_eq!((rig.pinned(1), rig.stopped()), (vec![], vec![]));
    let stats = there.client().stats();
    assert_eq!((stats.notices, stats.left_pinned, stats.late), (2, 0, 0));
}

#[test]
fn d3_pins_in_what_goes_away_are_refused_and_others_are_not() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, 4 * KIB4), map(0x20000, 0, KIB4)]);
    let other = rig.device(1);
    let beside = other.clone();
    let found: Arc<OnceLock<_>> = Arc::default();
    let seen = found.clone();
    let answer = move |device: &Device, ranges: &[IovaRange]| {
        // It is still mapped, and cannot be pinned any more, by nobody.
        let inside = [device.pin(&[0x11000]), device.pin(&[0x12000]), beside.pin(&[0x10000])];
        let outside = [device.pin(&[0x20000]), beside.pin(&[0x13000])];
        seen.set((inside, outside)).expect("told once");
        beside.client().unpin(&[0x20000]).expect("pinned");
        let_go(device, ranges);
    };
    let device = rig.device_with(1, LIMITS, Box::new(answer));
    device.pin(&[0x11000]).expect("mapped");
    other.pin(&[0x20000]).expect("mapped");
    rig.done(&space, &[unmap(0x10000, 0x12fff)]);
    let (inside, outside) = found.get().expect("told");
    assert_eq!(inside, &[0x11000, 0x12000, 0x10000].map(|iova| Err(PinError::GoingAway(iova))));
    assert_eq!(outside, &[Ok(vec![LOW_HVA]), Ok(vec![LOW_HVA + 0x3000])]);
    assert_eq!(rig.pinned(1), [(0x13000, 1), (0x20000, 1)]);
    // It is over: what is mapped there anew can be pinned.
    rig.done(&space, &[map(0x11000, 0x9000, KIB4)]);
    assert_eq!(device.pin(&[0x11000]), Ok(vec![LOW_HVA + 0x9000]));
    assert_eq!(device.pin(&[0x12000]), Err(PinError::NotMapped(0x12000)));
}

#[test]
fn d3_whatever_takes_a_translation_away_tells_of_it() {
    let (rig, space) = Rig::one();
    let device = rig.device(1);
    let live = [mapping(0x10000, 0, KIB4), mapping(0x20000, 0x8000, KIB4)];
    let both = [MapOp::Map(live[0]), MapOp::Map(live[1])];
    let pin = || device.pin(&[0x10000, 0x20000]).expect("mapped");
    rig.done(&space, &both);
    pin();
    // Another permission: an unmap and a map of one batch.
    let less = Mapping { perm: Perm::Read, ..live[0] };
    rig.done(&space, &[unmap(0x10000, 0x10fff), MapOp::Map(less)]);
    assert_eq!(device.told(), [[pages(0x10000, 1)]]);
    // Another space, which has one of them at the same place and the other elsewhere.
    let (other, moved) = (paged(9, 48), mapping(0x20000, 0xa000, KIB4));
    device.client().pin(&[0x10000], Perm::Read).expect("readable");
    rig.attach(1, &other, &[less, moved]);
    assert_eq!(device.told(), [[pages(0x20000, 1)]]);
    assert_eq!(rig.pinned(1), [(0x10000, 1)]);
    // Blocked.
    rig.attach(1, &SpaceKey::Blocked, &[]);
    assert_eq!((device.told(), rig.pinned(1)), (vec![vec![pages(0x10000, 1)]], vec![]));
    // The guest-physical map: high memory goes, low memory stays.
    rig.attach(1, &SpaceKey::Identity, &[]);
    assert_eq!(device.pin(&[0x3000, HIGH_GPA]), Ok(vec![LOW_HVA + 0x3000, HIGH_HVA]));
    rig.bridge.replace_guest_map(GuestMap::new(RAM.regions()[..1].to_vec()).expect("a map"));
    assert_eq!(device.told(), [[pages(HIGH_GPA, 1)]]);
    assert_eq!(device.pin(&[HIGH_GPA]), Err(PinError::NotMapped(HIGH_GPA)));
    // Detached.
    rig.bridge.detach(requester(1).into());
    assert_eq!((device.told(), rig.pinned(1)), (vec![vec![pages(0x3000, 1)]], vec![]));
    assert_eq!(rig.stopped(), []);
}

#[test]
fn d3_what_is_still_pinned_after_the_answer_is_revoked_and_its_device_is_stopped() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, 4 * KIB4)]);
    let device = rig.device_with(1, LIMITS, Box::new(|device, _| device.client().unpin(&[0x10000]).expect("pinned")));
    device.pin(&[0x10000, 0x11000, 0x11000, 0x12000]).expect("mapped");
    rig.done(&space, &[unmap(0x10000, 0x11fff)]);
    // Nobody can know whether I/O is in flight there, so this is before the guest is told that its unmap is done.
    assert_eq!(rig.stopped(), [requester(1)]);
    let stats = device.client().stats();
    assert_eq!((stats.left_pinned, stats.late, stats.pinned_pages), (1, 0, 0));
    assert_eq!((rig.pinned(1), rig.bridge.holds(requester(1)).len()), (vec![], 1));
    assert_eq!(device.pin(&[0x12000]), Err(PinError::CutOff));
    assert_eq!(device.client().unpin(&[0x11000]), Err(PinError::NotPinned(0x11000)));
    // It stays so: nothing is mapped for it again.
    let again = rig.bridge.attach(requester(1).into(), &SpaceKey::Identity, &mut std::iter::empty());
    assert!(again.is_err() && rig.bridge.holds(requester(1)).is_empty());
}

#[test]
fn d3_a_client_that_never_answers_is_cut_off_and_if_it_cannot_be_stopped_the_machine_is() {
    let (rig, spaces) = Rig::new(2);
    let (end, until) = channel::<()>();
    let until = Mutex::new(until);
    let limits = PinLimits { deadline: Duration::from_millis(50), ..LIMITS };
    // Until the test is over.
    let silent = rig.device_with(
        1,
        limits,
        Box::new(move |_, _| {
            let _ = until.lock().expect("whole").recv();
        }),
    );
    let other = rig.device(2);
    spaces.iter().for_each(|space| rig.done(space, &[map(0x10000, 0, KIB4)]));
    silent.pin(&[0x10000]).expect("mapped");
    other.pin(&[0x10000]).expect("mapped");
    *rig.stopped.stubborn.lock().expect("whole") = true;
    rig.done(&spaces[0], &[unmap(0x10000, 0x10fff)]);
    assert_eq!(rig.stopped(), [requester(1)]);
    assert!(*rig.stopped.machine.lock().expect("whole"));
    let stats = silent.client().stats();
    assert_eq!((stats.late, stats.left_pinned), (1, 1));
    assert_eq!(silent.pin(&[0x10000]), Err(PinError::CutOff));
    // Nobody waits for it a second time, and nobody else for it at all.
    rig.bridge.detach(requester(1).into());
    rig.done(&spaces[1], &[unmap(0x10000, 0x10fff)]);
    assert_eq!((silent.client().stats().notices, other.told().len()), (1, 1));
    drop(end);
}

#[test]
fn d3_a_client_that_lets_go_and_does_not_return_is_cut_off_too() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, 2 * KIB4)]);
    let (end, until) = channel::<()>();
    let until = Mutex::new(until);
    let limits = PinLimits { deadline: Duration::from_millis(50), ..LIMITS };
    let answer = move |device: &Device, ranges: &[IovaRange]| {
        let_go(device, ranges);
        let _ = until.lock().expect("whole").recv();
    };
    let device = rig.device_with(1, limits, Box::new(answer));
    device.pin(&[0x10000]).expect("mapped");
    rig.done(&space, &[unmap(0x10000, 0x10fff)]);
    let stats = device.client().stats();
    assert_eq!((stats.late, stats.left_pinned, rig.stopped()), (1, 0, vec![requester(1)]));
    assert_eq!(device.pin(&[0x11000]), Err(PinError::CutOff));
    drop(end);
}

#[test]
fn d3_a_client_that_panics_has_not_answered() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, KIB4)]);
    let device = rig.device_with(1, LIMITS, Box::new(|_, _| panic!("on purpose")));
    device.pin(&[0x10000]).expect("mapped");
    rig.done(&space, &[unmap(0x10000, 0x10fff)]);
    assert_eq!((rig.stopped(), device.client().stats().left_pinned), (vec![requester(1)], 1));
}

#[test]
fn d3_while_a_client_is_asked_others_pin_and_other_spaces_change() {
    let (rig, spaces) = Rig::new(2);
    spaces.iter().for_each(|space| rig.done(space, &[map(0x10000, 0, 2 * KIB4)]));
    let beside = rig.device(1);
    let (bridge, space) = (Arc::downgrade(&rig.bridge), spaces[1]);
    let peer = beside.clone();
    let (told, tell): (Sender<()>, _) = channel();
    let told = Mutex::new(told);
    let answer = move |device: &Device, ranges: &[IovaRange]| {
        let bridge = Weak::upgrade(&bridge).expect("there");
        // From another thread, as a unit of its own would.
        let others = std::thread::spawn(move || {
            assert_eq!(bridge.apply(&space, &[unmap(0x10000, 0x10fff), map(0x30000, 0, KIB4)]).refused, []);
            bridge.stats(requester(1)).expect("there")
        });
        others.join().expect("it did not wait for this client");
        peer.pin(&[0x11000]).expect("mapped");
        peer.client().unpin(&[0x11000]).expect("pinned");
        let_go(device, ranges);
        told.lock().expect("whole").send(()).expect("heard");
    };
    let device = rig.device_with(1, LIMITS, Box::new(answer));
    device.pin(&[0x10000]).expect("mapped");
    rig.done(&spaces[0], &[unmap(0x10000, 0x10fff)]);
    // It had answered when the unmap was over.
    tell.try_recv().expect("told");
    assert_eq!(rig.bridge.holds(requester(2)).len(), 2);
}

#[test]
fn d3_clients_are_asked_at_once_and_each_has_its_own_deadline() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, KIB4)]);
    let both = Arc::new(std::sync::Barrier::new(2));
    let devices = [0, 1].map(|_| {
        let both = both.clone();
        // Neither would ever answer if one were asked after the other.
        rig.device_with(
            1,
            LIMITS,
            Box::new(move |device, ranges| {
                both.wait();
                let_go(device, ranges);
            }),
        )
    });
    devices.iter().for_each(|device| drop(device.pin(&[0x10000]).expect("mapped")));
    rig.done(&space, &[unmap(0, u64::MAX)]);
    assert_eq!((rig.stopped(), rig.pinned(1)), (vec![], vec![]));
}

#[test]
fn d4_only_software_with_a_notifier_pins() {
    let (rig, _) = Rig::one();
    let world = World::new(Kernel::new(48), RAM, &[(1, 1)]);
    let notifier = || Arc::new(Device { client: Mutex::default(), told: Mutex::default(), answer: Box::new(let_go) });
    let of_a_host = world.bridge.register_client(requester(1), notifier(), LIMITS).err();
    assert!(matches!(of_a_host, Some(RegisterClientError::NotSoftware(_))), "{of_a_host:?}");
    let unknown = rig.bridge.register_client(requester(7), notifier(), LIMITS).err();
    assert!(matches!(unknown, Some(RegisterClientError::Unknown(_))), "{unknown:?}");
    for deadline in [Duration::ZERO, Duration::from_secs(61)] {
        let limits = PinLimits { deadline, ..LIMITS };
        let refused = rig.bridge.register_client(requester(1), notifier(), limits).err();
        assert!(matches!(refused, Some(RegisterClientError::Deadline(_))), "{refused:?}");
    }
}

#[test]
fn d4_who_leaves_releases_its_own_pins() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, 4 * KIB4)]);
    let (first, last) = (rig.device(1), rig.device(1));
    first.pin(&[0x10000, 0x10000, 0x11000]).expect("mapped");
    last.pin(&[0x10000, 0x12000]).expect("mapped");
    first.leave();
    assert_eq!(rig.pinned(1), [(0x10000, 1), (0x12000, 1)]);
    last.leave();
    assert_eq!(rig.pinned(1), []);
    // Nobody is told, and nobody is waited for.
    rig.done(&space, &[unmap(0, u64::MAX)]);
    assert_eq!((first.told().len(), last.told().len()), (0, 0));
}

#[test]
fn d4_who_leaves_while_it_is_asked_has_answered() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0x10000, 0, KIB4)]);
    let device = rig.device_with(1, LIMITS, Box::new(|device, _| device.leave()));
    device.pin(&[0x10000]).expect("mapped");
    rig.done(&space, &[unmap(0, u64::MAX)]);
    assert_eq!((rig.stopped(), rig.pinned(1)), (vec![], vec![]));
}

#[test]
fn d4_one_of_several_devices_that_is_detached_loses_its_own_pins() {
    let software = Arc::new(Software::default());
    let group = software.open();
    let model = Model::new(Kernel::new(48), &[]);
    let world = World::through(software, model, RAM, &[(1, group.0), (2, group.0)]);
    let stopped = world.stopped.clone();
    let rig = Rig { bridge: Arc::new(world.bridge), stopped, groups: vec![group], devices: Mutex::default() };
    let space = paged(1, 48);
    let live = [mapping(0x10000, 0, 4 * KIB4)];
    [1, 2].iter().for_each(|device| rig.attach(*device, &space, &live));
    let (one, two) = (rig.device(1), rig.device(2));
    one.pin(&[0x10000, 0x11000]).expect("mapped");
    two.pin(&[0x11000, 0x12000]).expect("mapped");
    rig.bridge.detach(requester(1).into());
    assert_eq!((one.told(), two.told().len()), (vec![vec![pages(0x10000, 2)]], 0));
    assert_eq!(rig.pinned(1), [(0x11000, 1), (0x12000, 1)]);
    // The space is still there, and not for the one that left it.
    assert_eq!(one.pin(&[0x13000]), Err(PinError::CutOff));
    two.pin(&[0x13000]).expect("mapped");
    rig.attach(1, &space, &live);
    one.pin(&[0x13000]).expect("mapped");
    // Disagreement blocks both, and takes all.
    rig.attach(1, &SpaceKey::Identity, &[]);
    assert_eq!((one.told().len(), two.told().len(), rig.pinned(2)), (1, 1, vec![]));
    assert_eq!(rig.stopped(), []);
}

#[test]
fn rule4_the_software_host_holds_what_it_was_handed() {
    let (software, guest) = (Software::default(), RAM.map());
    let group = software.open();
    let Some(Placement::PerGroup(space)) = software.placement(group) else { panic!("{group} has no space for life") };
    assert_eq!(software.placement(GroupId::of_software(1)), None);
    let map = |iova, len| software.map(space, iova, guest.host_mem(0, len).expect("RAM"), Perm::Read);
    map(0x2000, 0x3000).expect("empty");
    for (iova, len) in [(0x1000, 0x2000), (0x4000, 0x1000), (0x4000, 0x4000), (0, MIB2)] {
        assert!(map(iova, len).is_err(), "{iova:#x} is taken");
    }
    map(0x5000, 0x1000).expect("beside it");
    map(0x1000, 0x1000).expect("beside it");
    for (first, last) in [(0x3000, 0x5fff), (0x1000, 0x2fff), (0x3000, 0x3fff)] {
        assert!(software.unmap(space, UnmapRange::Span { first, last }).is_err(), "{first:#x} to {last:#x} cuts");
    }
    assert_eq!(software.unmap(space, UnmapRange::Span { first: 0x2000, last: 0x5fff }).expect("whole"), 0x4000);
    assert_eq!(software.unmap(space, UnmapRange::All).expect("whole"), 0x1000);
    assert_eq!(software.unmap(space, UnmapRange::All).expect("whole"), 0);
}

#[test]
fn d5_pages_are_counted_by_iova_and_held_to_the_limit() {
    let (rig, space) = Rig::one();
    // Two IOVAs of one page.
    rig.done(&space, &[map(0x10000, 0, KIB4), map(0x20000, 0, KIB4), map(0x30000, 0x4000, KIB4)]);
    let limits = PinLimits { pages: 2, ..LIMITS };
    let (device, other) = (rig.device_with(1, limits, Box::new(let_go)), rig.device_with(1, limits, Box::new(let_go)));
    device.pin(&[0x10000, 0x20000]).expect("two");
    assert_eq!(device.pin(&[0x30000]), Err(PinError::Limit(2)));
    device.pin(&[0x10000]).expect("a second pin is no second page");
    other.pin(&[0x30000]).expect("another client has its own");
    device.client().unpin(&[0x10000]).expect("pinned");
    assert_eq!(device.pin(&[0x30000]), Err(PinError::Limit(2)));
    device.client().unpin(&[0x10000]).expect("pinned");
    device.pin(&[0x30000]).expect("there is room again");
    rig.done(&space, &[unmap(0, u64::MAX), map(0x10000, 0, 4 * KIB4)]);
    device.pin(&[0x10000, 0x11000]).expect("what was revoked does not count");
}

#[test]
fn d5_a_split_revokes_nothing_in_what_stays() {
    let (rig, space) = Rig::one();
    rig.done(&space, &[map(0, 0, MIB2)]);
    let device = rig.device(1);
    device.pin(&[0, 0x1000, 0x3000, 0x1f_f000]).expect("mapped");
    rig.done(&space, &[unmap(0x2000, 0x2fff)]);
    assert_eq!((device.told().len(), rig.bridge.stats(requester(1)).expect("there").splits), (0, 1));
    assert_eq!(rig.pinned(1).len(), 4);
    assert_eq!(device.pin(&[0x2000]), Err(PinError::NotMapped(0x2000)));
    // A switch that cuts does not either.
    rig.attach(1, &paged(2, 48), &[mapping(0, 0, 0x2000), mapping(0x3000, 0x3000, KIB4)]);
    assert_eq!(device.told(), [[pages(0x1f_f000, 1)]]);
    assert_eq!(rig.pinned(1), [(0, 1), (0x1000, 1), (0x3000, 1)]);
}
