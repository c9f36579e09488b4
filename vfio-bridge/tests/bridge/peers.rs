//! BARs of assigned functions as targets of others' DMA (B-10, B-12), and the guest-physical map under them (B-15).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vfio_bridge::model::{Contents, HostOp, Kernel, Model};
use vfio_bridge::{GroupId, GuestMap, MemKind, Region};
use vtd::{Audit, MapOp, Mapping, Perm, RefusalCause, SpaceKey, SpaceListener};

use crate::world::*;

const RAM: Ram = Ram { low: 64 * KIB4, high: 16 * KIB4 };
const BAR: u64 = 0xc000_0000;
const BAR_HVA: u64 = 1 << 42;

/// `pages` of a BAR of device `of`.
fn bar(of: u8, gpa: u64, pages: u64, hva: u64) -> Region {
    // SAFETY: the model never uses the address.
    unsafe { Region::bar(gpa, pages * KIB4, hva, requester(of), Arc::new(())) }.expect("whole pages")
}

fn with_bar(of: u8) -> GuestMap {
    RAM.map().with(bar(of, BAR, 2, BAR_HVA)).expect("nothing is there")
}

fn both_hosts(functions: &[(u8, u32)]) -> [World; 2] {
    [World::new, World::per_space].map(|make| make(Kernel::new(48), RAM, functions))
}

/// Where the two pages of the BAR lead for a group in identity.
fn reaches(world: &World, group: u32) -> Option<u64> {
    world.model.translate(GroupId(group), BAR + KIB4).map(|(hva, _)| hva)
}

fn assert_audit_agrees(world: &World, device: u8, space: &SpaceKey, granted: &[Mapping], pending: u64) {
    let mut audit = Audit::default();
    world.bridge.audit(requester(device), space, &mut granted.iter().copied(), &mut audit);
    let said: Vec<String> = audit.differences.iter().map(ToString::to_string).collect();
    assert_eq!((said, audit.pending), (vec![], pending));
}

/// The host takes no BAR, and says so with `errno`.
fn refuse_bars(model: &Model, errno: i32) {
    model.inject(move |_, op| match op {
        HostOp::Map(held) if (BAR_HVA..LOW_HVA).contains(&held.hva) => Some(errno),
        _ => None,
    });
}

#[test]
fn b10_a_leaf_into_another_functions_bar_maps_with_its_permission() {
    for world in both_hosts(&[(1, 1), (2, 2)]) {
        let space = paged(1, 48);
        world.bridge.replace_guest_map(with_bar(2));
        world.attach(1, &space, &[]).expect("attached");
        // From RAM's end over nothing into the BAR's first page, and the second one for writing.
        let write_only = Mapping { perm: Perm::Write, ..mapping(0x4000, BAR + KIB4, KIB4) };
        let refused = world.apply(&space, &[map(0x1000, BAR - KIB4, 2 * KIB4), MapOp::Map(write_only)]).refused;
        assert_eq!(
            refused.iter().map(|r| (r.range.first, r.cause)).collect::<Vec<_>>(),
            [(0x1000, RefusalCause::Target)]
        );
        assert_eq!(world.model.translate(GroupId(1), 0x2abc), Some((BAR_HVA + 0xabc, Perm::ReadWrite)));
        assert_eq!(world.model.translate(GroupId(1), 0x4abc), Some((BAR_HVA + KIB4 + 0xabc, Perm::Write)));
        let granted = [mapping(0x2000, BAR, KIB4), write_only];
        assert_audit_agrees(&world, 1, &space, &granted, 0);
        // Its own BAR is a target as any.
        world.attach(2, &paged(2, 48), &[mapping(0, BAR, KIB4)]).expect("attached");
        assert_eq!(world.model.translate(GroupId(2), 0), Some((BAR_HVA, Perm::ReadWrite)));
    }
}

#[test]
fn b12_identity_has_the_bars_of_others_and_a_function_alone_not_its_own() {
    for world in both_hosts(&[(1, 1), (2, 2)]) {
        let ram = RAM.regions().len();
        world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
        // It comes: of the function itself, then of another one.
        world.bridge.replace_guest_map(with_bar(1));
        assert_eq!((reaches(&world, 1), world.contents().len()), (None, ram));
        world.bridge.replace_guest_map(with_bar(2));
        assert_eq!(reaches(&world, 1), Some(BAR_HVA + KIB4));
        assert_audit_agrees(&world, 1, &SpaceKey::Identity, &[], 0);
        // It is there when a function comes, of which it may be.
        world.attach(2, &SpaceKey::Identity, &[]).expect("attached");
        let shared = world.model.space_of(GroupId(1)) == world.model.space_of(GroupId(2));
        assert_eq!(reaches(&world, 2), shared.then_some(BAR_HVA + KIB4));
        for device in [1, 2] {
            assert_audit_agrees(&world, device, &SpaceKey::Identity, &[], 0);
        }
        // Who is left alone has it until the next change, and then not.
        world.bridge.detach(requester(1).into());
        assert_audit_agrees(&world, 2, &SpaceKey::Identity, &[], 0);
        world.bridge.replace_guest_map(with_bar(2));
        assert_eq!(reaches(&world, 2), None);
        assert_audit_agrees(&world, 2, &SpaceKey::Identity, &[], 0);
        world.bridge.replace_guest_map(RAM.map());
        assert_eq!(world.model.contents(GroupId(2)).len(), ram);
        assert_eq!(world.stats(2).refused_maps, vfio_bridge::RefusedMaps::default());
    }
}

#[test]
fn b12_functions_of_one_group_reach_each_others_bars() {
    let world = World::new(Kernel::new(48), RAM, &[(1, 1), (2, 1)]);
    world.bridge.replace_guest_map(with_bar(1));
    for device in [1, 2] {
        world.attach(device, &SpaceKey::Identity, &[]).expect("attached");
    }
    assert_eq!(reaches(&world, 1), Some(BAR_HVA + KIB4));
    assert_audit_agrees(&world, 1, &SpaceKey::Identity, &[], 0);
}

#[test]
fn b10_identity_without_a_bar_that_the_host_refuses_is_identity() {
    for errno in [libc::EFAULT, libc::EINVAL, libc::EOPNOTSUPP] {
        for world in both_hosts(&[(1, 1), (2, 2)]) {
            refuse_bars(&world.model, errno);
            world.bridge.replace_guest_map(with_bar(2));
            world.attach(1, &SpaceKey::Identity, &[]).expect("its RAM is there");
            assert_eq!((reaches(&world, 1), world.contents().len()), (None, RAM.regions().len()));
            assert_eq!(world.bridge.space_of(requester(1)), Some(SpaceKey::Identity));
            assert_audit_agrees(&world, 1, &SpaceKey::Identity, &[], 1);
            let refused = world.stats(1).refused_maps;
            assert_eq!((refused.target, refused.range, refused.other), (1, 0, 0), "errno {errno}");
            // In a paged space it is refused as any leaf that leads to nothing.
            let space = paged(1, 48);
            world.attach(2, &space, &[]).expect("attached");
            let refused = world.apply(&space, &[map(0, BAR, KIB4), map(0x1000, 0, KIB4)]).refused;
            assert_eq!(
                refused.iter().map(|r| (r.range.first, r.cause)).collect::<Vec<_>>(),
                [(0, RefusalCause::Target)]
            );
            // A host without room is a host without room.
            refuse_bars(&world.model, libc::ENOSPC);
            let refused = world.apply(&space, &[map(0, BAR, KIB4)]).refused;
            assert_eq!(refused.first().map(|r| r.cause), Some(RefusalCause::Limit));
        }
    }
}

#[test]
fn b11_ram_that_the_host_refuses_is_not_left_out_of_identity_without_a_word() {
    for world in both_hosts(&[(1, 1), (2, 2)]) {
        world.bridge.replace_guest_map(with_bar(2));
        world.model.inject(|_, op| matches!(op, HostOp::Map(held) if held.hva != HIGH_HVA).then_some(libc::EINVAL));
        match world.attach(1, &SpaceKey::Identity, &[]) {
            Err(vtd::AttachRefused::Partial(refused)) => {
                assert_eq!(refused.iter().map(|r| r.range.first).collect::<Vec<_>>(), [0], "the BAR is none of it");
            }
            other => panic!("{other:?}"),
        }
        assert_audit_agrees(&world, 1, &SpaceKey::Identity, &[], 2);
    }
}

#[test]
fn b10_a_bar_over_memory_or_another_bar_changes_nothing() {
    let map = with_bar(1);
    let [low, high] = [RAM.low - KIB4, HIGH_GPA];
    for (gpa, pages) in [(low, 1), (low, 2), (high, 1), (high - KIB4, 2), (BAR, 1), (BAR + KIB4, 8), (BAR - KIB4, 2)] {
        assert!(map.with(bar(2, gpa, pages, 0)).is_err(), "{pages} pages at {gpa:#x}");
    }
    let two = map.with(bar(2, BAR + 2 * KIB4, 1, 0)).and_then(|map| map.with(bar(2, BAR - KIB4, 1, 0)));
    let two = two.expect("they touch");
    assert_eq!(two.regions().len(), RAM.regions().len() + 3);
    assert_eq!(two.host_mem(BAR, KIB4).expect("the BAR").kind(), MemKind::Bar);
    assert_eq!(two.ram_bytes(), RAM.low + RAM.high);
    // RAM does not go, nor what does not begin there.
    for gpa in [0, HIGH_GPA, BAR + KIB4] {
        assert_eq!(two.without_bar(gpa).regions().len(), two.regions().len());
    }
    assert_eq!(two.without_bar(BAR).regions().len(), two.regions().len() - 1);
}

#[test]
fn b10_a_bar_is_kept_for_as_long_as_a_map_has_it() {
    let mapped = Arc::new(());
    // SAFETY: the model never uses the address.
    let region = unsafe { Region::bar(BAR, KIB4, BAR_HVA, requester(1), mapped.clone()) }.expect("a page");
    let map = RAM.map().with(region).expect("nothing is there");
    let other = map.clone();
    drop(map);
    assert_eq!(Arc::strong_count(&mapped), 2);
    drop(other);
    assert_eq!(Arc::strong_count(&mapped), 1);
}

#[derive(Clone, Debug)]
enum Step {
    /// A BAR appears, or moves, if nothing is in its way; it is other memory each time.
    On {
        which: usize,
        page: usize,
    },
    Off {
        which: usize,
    },
    /// Pages of a space lead to guest-physical pages of one of [`places`].
    Map {
        space: usize,
        page: u64,
        count: u64,
        target: usize,
    },
    Unmap {
        space: usize,
        page: u64,
        count: u64,
    },
    /// 0 and 1 are the paged spaces, 2 identity, 3 blocked.
    Attach {
        device: usize,
        space: usize,
    },
}

/// Three BARs: of which device, pages.
const BARS: [(u8, u64); 3] = [(1, 2), (2, 1), (3, 4)];
const DEVICES: [u8; 3] = [1, 2, 3];

/// Where BARs may be put, and leaves may lead: the end of RAM, the hole, below and in high RAM.
fn places() -> Vec<u64> {
    let around = |gpa: u64| (0..6).map(move |n| gpa - 3 * KIB4 + n * KIB4);
    around(RAM.low).chain(around(BAR)).chain(around(HIGH_GPA)).collect()
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..BARS.len(), 0..18usize).prop_map(|(which, page)| Step::On { which, page }),
        2 => (0..BARS.len()).prop_map(|which| Step::Off { which }),
        5 => (0..2usize, 0..12u64, 1..5u64, 0..18usize)
            .prop_map(|(space, page, count, target)| Step::Map { space, page, count, target }),
        2 => (0..2usize, 0..12u64, 1..5u64).prop_map(|(space, page, count)| Step::Unmap { space, page, count }),
        3 => (0..DEVICES.len(), 0..4usize).prop_map(|(device, space)| Step::Attach { device, space }),
    ]
}

/// What a unit and a machine know, kept as simply as possible.
struct Machine {
    world: World,
    /// Where each BAR is, and which memory it is.
    bars: [Option<(u64, u64)>; 3],
    guest: GuestMap,
    next_hva: u64,
    /// Of the two paged spaces: what the guest's tables say, by page, and what the listener has of it.
    tables: [BTreeMap<u64, u64>; 2],
    attached: [usize; 3],
    /// The host memory that anybody may reach until the step ends: page addresses.
    allowed: Arc<Mutex<std::collections::BTreeSet<u64>>>,
    wrong: Arc<Mutex<Option<String>>>,
}

impl Machine {
    fn new(per_space: bool) -> Self {
        let make = if per_space { World::per_space } else { World::new };
        let world = make(Kernel::new(48), RAM, &DEVICES.map(|device| (device, device.into())));
        let (allowed, wrong) = (Arc::<Mutex<std::collections::BTreeSet<u64>>>::default(), Arc::default());
        let machine = Self {
            world,
            bars: [None; 3],
            guest: RAM.map(),
            next_hva: BAR_HVA,
            tables: Default::default(),
            attached: [3; 3],
            allowed: allowed.clone(),
            wrong: Arc::clone(&wrong),
        };
        machine.world.model.set_hook(move |served, contents: &Contents| {
            let allowed = allowed.lock().expect("whole");
            let bars = pages_of(contents).into_iter().filter(|(_, (hva, _))| (BAR_HVA..LOW_HVA).contains(hva));
            let found = bars.into_iter().find(|(_, (hva, _))| !allowed.contains(hva));
            if let Some((page, (hva, _))) = found {
                *wrong.lock().expect("whole") = Some(format!("{page:#x} leads to {hva:#x} after {served:x?}"));
            }
        });
        machine
    }

    fn space(&self, number: usize) -> SpaceKey {
        [paged(1, 48), paged(2, 48), SpaceKey::Identity, SpaceKey::Blocked][number]
    }

    fn allow(&self, clear: bool) {
        let mut allowed = self.allowed.lock().expect("whole");
        if clear {
            allowed.clear();
        }
        let bars = self.bars.iter().zip(BARS).filter_map(|(at, (_, pages))| at.zip(Some(pages)));
        allowed.extend(bars.flat_map(|((_, hva), pages)| (0..pages).map(move |n| hva + n * KIB4)));
    }

    /// The host memory behind a guest-physical page, said without the code under test.
    fn behind(&self, gpa: u64) -> Option<u64> {
        let bar = self.bars.iter().zip(BARS).find_map(|(at, (_, pages))| {
            let (first, hva) = (*at)?;
            (first..first + pages * KIB4).contains(&gpa).then(|| hva + (gpa - first))
        });
        RAM.hva(gpa).or(bar)
    }

    /// As `vmm` does: the map, then the unit's look at leaves into it.
    fn change(&mut self, which: usize, to: Option<u64>) {
        let (of, pages) = BARS[which];
        if let Some((gpa, _)) = self.bars[which].take() {
            self.guest = self.guest.without_bar(gpa);
            self.changed(gpa, pages);
        }
        let Some(gpa) = to else { return };
        self.next_hva += MIB2;
        if let Ok(map) = self.guest.with(bar(of, gpa, pages, self.next_hva)) {
            (self.guest, self.bars[which]) = (map, Some((gpa, self.next_hva)));
            self.allow(false);
            self.changed(gpa, pages);
        }
    }

    fn changed(&mut self, gpa: u64, pages: u64) {
        self.world.bridge.replace_guest_map(self.guest.clone());
        for space in 0..2 {
            let inside = self.tables[space].iter().filter(|(_, to)| (gpa..gpa + pages * KIB4).contains(to));
            let leaves: Vec<(u64, u64)> = inside.map(|(page, to)| (*page, *to)).collect();
            let unmaps = leaves.iter().map(|(page, _)| unmap(page * KIB4, page * KIB4 + 0xfff));
            let maps = leaves.iter().map(|(page, to)| map(page * KIB4, *to, KIB4));
            self.world.apply(&self.space(space), &unmaps.chain(maps).collect::<Vec<_>>());
        }
        self.allow(true);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::On { which, page } => self.change(which, Some(places()[page])),
            Step::Off { which } => self.change(which, None),
            Step::Map { space, page, count, target } => {
                let first = places()[target];
                let pages: Vec<u64> = (page..page + count).filter(|at| !self.tables[space].contains_key(at)).collect();
                let to = |at: u64| first + (at - page) * KIB4;
                let maps: Vec<MapOp> = pages.iter().map(|at| map(at * KIB4, to(*at), KIB4)).collect();
                self.world.apply(&self.space(space), &maps);
                self.tables[space].extend(pages.iter().map(|at| (*at, to(*at))));
            }
            Step::Unmap { space, page, count } => {
                self.tables[space].retain(|at, _| !(page..page + count).contains(at));
                self.world.apply(&self.space(space), &[unmap(page * KIB4, (page + count) * KIB4 - 1)]);
            }
            Step::Attach { device, space } => {
                let live: Vec<Mapping> = match space {
                    0 | 1 => {
                        let there = self.tables[space].iter().filter(|(_, to)| self.behind(**to).is_some());
                        there.map(|(page, to)| mapping(page * KIB4, *to, KIB4)).collect()
                    }
                    _ => Vec::new(),
                };
                self.attached[device] = space;
                self.world.attach(DEVICES[device], &self.space(space), &live).expect("attached");
            }
        }
    }

    /// What a device reaches, by page; in identity with or without its own BAR.
    fn granted(&self, device: usize, own: bool) -> BTreeMap<u64, u64> {
        match self.attached[device] {
            3 => BTreeMap::new(),
            2 => {
                let ram = (0..RAM.low).step_by(4096).chain((HIGH_GPA..HIGH_GPA + RAM.high).step_by(4096));
                let others = (0..3).filter(|other| own || *other != device);
                let bars = others.filter_map(|other| Some((self.bars[other]?.0, BARS[other].1)));
                let bars = bars.flat_map(|(gpa, pages)| (0..pages).map(move |n| gpa + n * KIB4));
                ram.chain(bars).filter_map(|gpa| Some((gpa, self.behind(gpa)?))).collect()
            }
            space => {
                let tables = self.tables[space].iter();
                tables.filter_map(|(page, to)| Some((page * KIB4, self.behind(*to)?))).collect()
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// BARs come, go and move while the guest maps and unmaps. After each step a device reaches exactly what it is
    /// granted; after every host operation no BAR that is not there any more when its step ends.
    #[test]
    fn b15_nothing_reaches_a_bar_that_went(steps in prop::collection::vec(step(), 1..60), per_space: bool) {
        let mut machine = Machine::new(per_space);
        for step in &steps {
            machine.step(step);
            let wrong = machine.wrong.lock().expect("whole").take();
            prop_assert!(wrong.is_none(), "{wrong:?} in {step:?}");
            for (device, number) in DEVICES.iter().enumerate() {
                let contents = machine.world.model.contents(GroupId(u32::from(*number)));
                let held: BTreeMap<u64, u64> = pages_of(&contents).into_iter().map(|(page, (hva, _))| (page, hva)).collect();
                // Who shares the identity space may have its own.
                let (without, with) = (machine.granted(device, false), machine.granted(device, true));
                let shares = per_space && machine.attached[device] == 2;
                prop_assert!(held == without || shares && held == with, "device {number} holds {held:x?}, not {without:x?}, after {step:?}");
            }
        }
    }
}
