//! Random sequences of what a unit may say, against the model. After each call the host holds exactly what the spaces
//! grant; after **every** host operation in between it holds no more than was granted before or is granted after, and
//! everything that is granted both before and after is there, but for extents that had to be cut (design rules 3 and
//! 4). When a group moves from one space to another, what both have is there all the time, but for the operations that
//! replace it (`check_switch`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vfio_bridge::GroupId;
use vfio_bridge::model::{Contents, HostOp, Kernel, Served};
use vtd::{AttachRefused, MapOp, Mapping, Perm, Refusal, SpaceKey, SpaceListener};

use crate::scenario::{BLOCKED, Host, IDENTITY, Step, scenario, step};
use crate::world::*;

/// Small enough to be looked at page by page.
const RAM: Ram = Ram { low: 96 * KIB4, high: 24 * KIB4 };

/// Devices 1 and 2 share host group 1, device 3 is alone.
const FUNCTIONS: [(u8, u32); 3] = [(1, 1), (2, 1), (3, 2)];
const GROUPS: [GroupId; 2] = [GroupId(1), GroupId(2)];

/// Both are the same; if not, says where first.
fn same(held: &Pages, granted: &Pages, group: usize, step: &Step) -> Result<(), TestCaseError> {
    let differs = |page: &&u64| held.get(page) != granted.get(page);
    let first = held.keys().chain(granted.keys()).filter(differs).min();
    let Some(page) = first else {
        return Ok(());
    };
    let (held, granted) = (held.get(page), granted.get(page));
    Err(TestCaseError::fail(format!(
        "group {} holds {held:x?} at {page:#x}, granted is {granted:x?}, after {step:x?}",
        group + 1
    )))
}

/// What a unit knows of its spaces, kept as simply as possible.
struct Unit {
    spaces: [SpaceKey; 4],
    /// Of the two paged spaces: disjoint mappings by first IOVA.
    shadows: [BTreeMap<u64, Mapping>; 2],
    attached: [Option<usize>; 3],
    /// The space that each group is really in: a detach cannot bring the mappings of a paged space.
    effective: [usize; 2],
    /// Pages of RAM that a group could not get when it went to identity.
    lacks: [BTreeSet<u64>; 2],
}

impl Unit {
    fn new(width: u8) -> Self {
        Self {
            spaces: [paged(1, width), paged(2, width), SpaceKey::Identity, SpaceKey::Blocked],
            shadows: Default::default(),
            attached: [Some(BLOCKED); 3],
            effective: [BLOCKED; 2],
            lacks: Default::default(),
        }
    }

    fn group_of(device: usize) -> usize {
        if device == 2 { 1 } else { 0 }
    }

    fn agreed(&self, group: usize) -> usize {
        let members: Vec<usize> = if group == 0 { vec![0, 1] } else { vec![2] };
        let wants: BTreeSet<usize> = members.into_iter().filter_map(|d| self.attached[d]).collect();
        if wants.len() == 1 { *wants.first().expect("one") } else { BLOCKED }
    }

    /// Removes a range from a shadow, keeping what is left of mappings that reach over its ends.
    fn forget(&mut self, space: usize, first: u64, last: u64) {
        let shadow = &mut self.shadows[space];
        let hit: Vec<Mapping> = shadow.values().filter(|m| m.iova.0 <= last && m.last().0 >= first).copied().collect();
        for old in hit {
            shadow.remove(&old.iova.0);
            if old.iova.0 < first {
                shadow.insert(old.iova.0, Mapping { len: first - old.iova.0, ..old });
            }
            if old.last().0 > last {
                let skip = last + 1 - old.iova.0;
                let iova = old.iova.0 + skip;
                let rest = Mapping { perm: old.perm, ..mapping(iova, old.gpa.0 + skip, old.len - skip) };
                shadow.insert(iova, rest);
            }
        }
    }

    fn free(&self, space: usize, first: u64, last: u64) -> bool {
        !self.shadows[space].values().any(|m| m.iova.0 <= last && m.last().0 >= first)
    }

    fn forget_refused(&mut self, space: usize, refused: &[Refusal]) {
        for refusal in refused {
            self.forget(space, refusal.range.first, refusal.range.last);
        }
    }

    /// What a device of `group` may reach, page by page.
    fn granted(&self, group: usize) -> Pages {
        let mut pages = Pages::new();
        match self.effective[group] {
            IDENTITY => {
                let ram = (0..RAM.low).step_by(4096).chain((HIGH_GPA..HIGH_GPA + RAM.high).step_by(4096));
                for gpa in ram.filter(|gpa| !self.lacks[group].contains(gpa)) {
                    pages.insert(gpa, (RAM.hva(gpa).expect("RAM"), Perm::ReadWrite));
                }
            }
            BLOCKED => {}
            space => {
                for mapping in self.shadows[space].values() {
                    for offset in (0..mapping.len).step_by(4096) {
                        let iova = mapping.iova.0 + offset;
                        let hva = RAM.hva(mapping.gpa.0 + offset);
                        if let Some(hva) = hva.filter(|_| !(0xfee0_0000..0xfef0_0000).contains(&iova)) {
                            pages.insert(iova, (hva, mapping.perm));
                        }
                    }
                }
            }
        }
        pages
    }
}

/// What the hook saw: the group and what it held, after each operation.
type Seen = Arc<Mutex<Vec<(usize, Served, Contents)>>>;

pub struct Run {
    host: Host,
    pub world: World,
    unit: Unit,
    seen: Seen,
    unlimited: bool,
    host_failed: bool,
    /// Unmaps of the running call: space, first, last.
    told: Vec<(usize, u64, u64)>,
    /// The running call was one switch of a group.
    switched: bool,
    /// A group was in the identity space, which stays from then on.
    identity_is_there: bool,
    /// The running call was a group's way into a space of others, which was refused: it took the first steps, and went
    /// all the way back.
    turned_back: bool,
}

impl Run {
    pub fn new(host: &Host) -> Self {
        let base = if host.old { Kernel::old(host.width) } else { Kernel::new(host.width) };
        let kernel = Kernel { entries: host.entries, memlock: host.memlock, ..base };
        let make = if host.per_space { World::per_space } else { World::new };
        let world = make(kernel, RAM, &FUNCTIONS);
        let seen = Seen::default();
        let (log, per_space, model) = (Arc::clone(&seen), host.per_space, Arc::downgrade(&world.model));
        world.model.set_hook(move |served, contents| {
            let mut log = log.lock().expect("whole");
            if per_space {
                let model = model.upgrade().expect("it calls");
                log.extend((0..GROUPS.len()).map(|group| (group, *served, model.contents(GROUPS[group]))));
            } else {
                log.push((served.space.0 as usize - 1, *served, contents.clone()));
            }
        });
        let unlimited = host.entries > 1000 && host.memlock.is_none();
        Self {
            host: host.clone(),
            world,
            unit: Unit::new(host.width),
            seen,
            unlimited,
            host_failed: false,
            told: Vec::new(),
            switched: false,
            identity_is_there: false,
            turned_back: false,
        }
    }

    pub fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let before = [0, 1].map(|g| self.unit.granted(g));
        let held_before = GROUPS.map(|g| self.world.model.contents(g));
        let splits_before = [1, 3].map(|device| self.world.stats(device).splits);
        (self.switched, self.turned_back) = (false, false);
        // What may be reached at most in the end: what is asked for, whether or not the host refuses some of it.
        let (wish, refused) = self.call(step);
        let after = [0, 1].map(|g| self.unit.granted(g));
        // What the unit said must go is not expected to stay, even where the same batch maps it again.
        let told = std::mem::take(&mut self.told);
        let stays = |group: usize, page: u64| {
            let told = told
                .iter()
                .any(|(space, first, last)| *space == self.unit.effective[group] && (*first..=*last).contains(&page));
            !told && after[group].get(&page) == before[group].get(&page)
        };
        prop_assert!(!self.host_failed);

        let seen = std::mem::take(&mut *self.seen.lock().expect("whole"));
        if self.switched && self.unlimited && !self.host.per_space {
            for group in [0, 1] {
                let ops =
                    seen.iter().filter(|(of, ..)| *of == group).map(|(_, served, held)| (served.op, held.clone()));
                let checked = check_switch(&held_before[group], &ops.collect::<Vec<_>>());
                prop_assert!(checked.is_ok(), "group {}: {}, in {step:x?}", group + 1, checked.unwrap_err());
            }
        }
        for (group, served, held) in seen {
            let held = pages_of(&held);
            prop_assert!(
                !matches!((served.op, served.result), (_, Err(libc::EEXIST)) | (HostOp::Unmap(_), Err(_))),
                "the ledger is not the truth: {served:x?}"
            );
            for (iova, target) in &held {
                let granted = before[group].get(iova) == Some(target) || wish[group].get(iova) == Some(target);
                prop_assert!(granted, "{iova:#x} was never granted, after {served:x?} of {step:x?}");
            }
            for (iova, target) in &before[group] {
                if stays(group, *iova) && held.get(iova) != Some(target) {
                    let cut = held_before[group].values().any(|extent| {
                        let inside = extent.iova <= *iova && *iova <= extent.last();
                        inside && (extent.iova..=extent.last()).step_by(4096).any(|page| !stays(group, page))
                    });
                    prop_assert!(cut, "{iova:#x} was away for an instant, after {served:x?} of {step:x?}");
                }
            }
        }
        for group in [0, 1] {
            let held = self.world.model.contents(GROUPS[group]);
            same(&pages_of(&held), &after[group], group, step)?;
            let device = FUNCTIONS[group * 2].0;
            prop_assert_eq!(
                self.world.bridge.space_of(requester(device)),
                Some(self.unit.spaces[self.unit.effective[group]])
            );
            self.check_books(group, &held)?;
            if refused.is_empty() && !self.host.per_space {
                let partly = |stays: &dyn Fn(u64) -> bool| {
                    let extents = held_before[group].values();
                    let mixed = extents.filter(|extent| {
                        let mut pages = (extent.iova..=extent.last()).step_by(4096).map(stays);
                        let first = pages.next();
                        pages.any(|page| Some(page) != first)
                    });
                    mixed.count() as u64
                };
                let splits = self.world.stats(device).splits - splits_before[group];
                if self.turned_back {
                    // On the way there an extent may have been cut of which a part was to stay, and was away for a
                    // moment: that the other end was not reached, and all of it went, does not make it undone.
                    let cuts = partly(&|page| before[group].get(&page) == wish[group].get(&page));
                    prop_assert!(splits <= cuts, "{splits} splits of group {} in {step:x?}, at most {cuts}", group + 1);
                } else {
                    let cuts = partly(&|page| stays(group, page));
                    prop_assert_eq!(splits, cuts, "splits of group {} in {:x?}", group + 1, step);
                }
            }
        }
        if self.host.per_space {
            // A space that nobody is in is given back; but not identity.
            let used: BTreeSet<usize> = self.unit.effective.into_iter().filter(|space| *space != BLOCKED).collect();
            self.identity_is_there |= used.contains(&IDENTITY);
            let kept = usize::from(self.identity_is_there && !used.contains(&IDENTITY));
            prop_assert_eq!(self.world.model.spaces(), used.len() + kept);
        } else if self.switched {
            self.check_room(&refused)?;
        }
        if self.unlimited {
            for refusal in &refused {
                let target = refusal.cause == vtd::RefusalCause::Target;
                prop_assert!(target || refusal.cause == vtd::RefusalCause::Range, "{refusal:x?}");
            }
        }
        Ok(())
    }

    /// What a switch lost for want of room finds none when it is over: nothing is lost to what made room later.
    fn check_room(&self, refused: &[Refusal]) -> Result<(), TestCaseError> {
        let group =
            |refusal: &Refusal| FUNCTIONS.iter().find(|(device, _)| requester(*device) == refusal.stream.requester);
        let pinned: u64 =
            GROUPS.iter().flat_map(|g| self.world.model.contents(*g).into_values()).map(|held| held.len).sum();
        for refusal in refused {
            let (_, group) = group(refusal).expect("one of ours");
            let held = self.world.model.contents(GroupId(*group)).len();
            let len = refusal.range.last - refusal.range.first + 1;
            match refusal.cause {
                vtd::RefusalCause::Limit => prop_assert!(held >= self.host.entries, "{refusal:x?} with {held} held"),
                vtd::RefusalCause::Memlock => {
                    prop_assert!(self.host.memlock.is_some_and(|limit| pinned + len > limit), "{refusal:x?}");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The ledger and the counters say what the model holds.
    fn check_books(&self, group: usize, held: &Contents) -> Result<(), TestCaseError> {
        let device = FUNCTIONS[group * 2].0;
        let ledger: Vec<(u64, u64, u64)> =
            self.world.bridge.holds(requester(device)).iter().map(|e| (e.first, e.size(), e.hva)).collect();
        let model: Vec<(u64, u64, u64)> = held.values().map(|h| (h.iova, h.len, h.hva)).collect();
        prop_assert_eq!(ledger, model);
        let stats = self.world.stats(device);
        if self.host.per_space {
            // All spaces are counted together.
            let all = self.world.model.totals();
            prop_assert_eq!((stats.live_extents, stats.live_bytes), all);
            prop_assert_eq!((stats.host_maps, stats.host_unmaps), self.world.model.counts());
            return Ok(());
        }
        prop_assert_eq!(stats.live_extents, held.len() as u64);
        prop_assert_eq!(stats.live_bytes, held.values().map(|h| h.len).sum::<u64>());
        prop_assert_eq!(stats.live_bytes, stats.mapped_bytes_total - stats.unmapped_bytes_total);
        let [one, two] = [1, 3].map(|device| self.world.stats(device));
        let counts = (one.host_maps + two.host_maps, one.host_unmaps + two.host_unmaps);
        prop_assert_eq!(counts, self.world.model.counts());
        Ok(())
    }

    /// Tells the bridge, and keeps the unit's books. What is granted if nothing is refused, and the refusals.
    fn call(&mut self, step: &Step) -> ([Pages; 2], Vec<Refusal>) {
        match step {
            Step::Apply { space, unmaps, maps } => {
                let mut ops = Vec::new();
                for (first, count) in unmaps {
                    let last = first + count * KIB4 - 1;
                    self.unit.forget(*space, *first, last);
                    ops.push(unmap(*first, last));
                }
                for (iova, count, gpa, perm) in maps {
                    let new = Mapping { perm: *perm, ..mapping(*iova, *gpa, count * KIB4) };
                    if self.unit.free(*space, *iova, new.last().0) {
                        self.unit.shadows[*space].insert(*iova, new);
                        ops.push(MapOp::Map(new));
                    }
                }
                self.apply(*space, &ops)
            }
            Step::Clear { space } => {
                self.unit.shadows[*space].clear();
                self.apply(*space, &[unmap(0, u64::MAX)])
            }
            Step::Replace { space, nth, target, perm } => {
                let live: Vec<Mapping> = self.unit.shadows[*space].values().copied().collect();
                let Some(old) = live.get(nth % live.len().max(1)) else {
                    return self.apply(*space, &[]);
                };
                let new = Mapping { gpa: vtd::Gpa(*target), perm: *perm, ..*old };
                self.unit.shadows[*space].insert(old.iova.0, new);
                self.apply(*space, &[unmap(old.iova.0, old.last().0), MapOp::Map(new)])
            }
            Step::Resemble { space, pages_a_leaf, but } => {
                let (other, leaf) = (1 - space, pages_a_leaf * KIB4);
                let mut ops = vec![unmap(0, u64::MAX)];
                self.unit.shadows[*space].clear();
                for from in self.unit.shadows[other].clone().values() {
                    for offset in (0..from.len).step_by(leaf as usize) {
                        let (iova, gpa) = (from.iova.0 + offset, from.gpa.0 + offset);
                        let new = Mapping { perm: from.perm, ..mapping(iova, gpa, leaf.min(from.len - offset)) };
                        if new.last().0 < but.0 || iova >= but.0 + but.1 * KIB4 {
                            self.unit.shadows[*space].insert(iova, new);
                            ops.push(MapOp::Map(new));
                        }
                    }
                }
                self.apply(*space, &ops)
            }
            Step::Attach { device, space } => self.attach(*device, *space),
            Step::Detach { device } => {
                self.unit.attached[*device] = None;
                let group = Unit::group_of(*device);
                let agreed = self.unit.agreed(group);
                if agreed != self.unit.effective[group] {
                    self.unit.lacks[group].clear();
                    self.unit.effective[group] = if agreed == IDENTITY { IDENTITY } else { BLOCKED };
                }
                self.switched = true;
                if self.host.per_space && self.unit.effective[group] == IDENTITY {
                    // As at an attach: who comes to it has it tried again for all that are in it.
                    self.unit.lacks = Default::default();
                }
                let wish = self.wish();
                self.world.bridge.detach(requester(FUNCTIONS[*device].0).into());
                self.note_identity(group);
                if self.host.per_space {
                    self.note_identity(1 - group);
                }
                (wish, Vec::new())
            }
        }
    }

    fn wish(&self) -> [Pages; 2] {
        [0, 1].map(|g| self.unit.granted(g))
    }

    fn apply(&mut self, space: usize, ops: &[MapOp]) -> ([Pages; 2], Vec<Refusal>) {
        let wish = self.wish();
        self.told.extend(ops.iter().filter_map(|op| match op {
            MapOp::Unmap(range) => Some((space, range.first, range.last)),
            MapOp::Map(_) => None,
        }));
        let refused = self.world.bridge.apply(&self.unit.spaces[space], ops).refused;
        self.unit.forget_refused(space, &refused);
        (wish, refused)
    }

    fn attach(&mut self, device: usize, space: usize) -> ([Pages; 2], Vec<Refusal>) {
        let group = Unit::group_of(device);
        self.unit.attached[device] = Some(space);
        self.unit.effective[group] = self.unit.agreed(group);
        self.unit.lacks[group].clear();
        if self.host.per_space && space == IDENTITY {
            // What was refused there is tried again for all that are in it.
            self.unit.lacks = Default::default();
        }
        let wish = self.wish();
        let live: Vec<Mapping> =
            if space < IDENTITY { self.unit.shadows[space].values().copied().collect() } else { Vec::new() };
        let attached = self.world.attach(FUNCTIONS[device].0, &self.unit.spaces[space], &live);
        // One that could not join others was blocked after it tried.
        self.switched = !matches!(attached, Err(AttachRefused::Shared(_)));
        let refused = match attached {
            Ok(()) => Vec::new(),
            Err(AttachRefused::Partial(refused)) => refused,
            // A group joins a space of others whole or not at all.
            Err(AttachRefused::Shared(_)) if !self.unlimited && self.unit.effective == [space; 2] => {
                self.unit.attached[device] = Some(BLOCKED);
                self.unit.effective[group] = BLOCKED;
                self.turned_back = true;
                return (wish, Vec::new());
            }
            Err(AttachRefused::Host { .. }) => {
                self.host_failed = true;
                Vec::new()
            }
            Err(refused) => unreachable!("{refused}"),
        };
        if space < IDENTITY {
            self.unit.forget_refused(space, &refused);
        }
        self.note_identity(group);
        if self.host.per_space {
            self.note_identity(1 - group);
        }
        (wish, refused)
    }

    /// Identity has no shadow to forget in: what the host refused there is simply not there, and only without room.
    fn note_identity(&mut self, group: usize) {
        if self.unit.effective[group] == IDENTITY && !self.unlimited {
            let held = pages_of(&self.world.model.contents(GROUPS[group]));
            self.unit.lacks[group].clear();
            let all = self.unit.granted(group);
            self.unit.lacks[group] = all.into_keys().filter(|gpa| !held.contains_key(gpa)).collect();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3 * ProptestConfig::default().cases, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rule3_the_host_holds_what_the_spaces_grant_after_every_operation((host, steps) in scenario()) {
        let mut run = Run::new(&host);
        for step in &steps {
            run.step(step)?;
        }
    }

    #[test]
    fn rule3_the_same_of_a_host_that_attaches_groups_to_spaces((host, steps) in scenario()) {
        let mut run = Run::new(&Host { per_space: true, ..host });
        for step in &steps {
            run.step(step)?;
        }
    }

    #[test]
    fn b11_an_unmap_that_fails_stops_its_functions_and_nothing_else(
        steps in prop::collection::vec(step(48), 1..20),
        fails in 1u64..12,
    ) {
        let mut run = Run::new(&Host { width: 48, old: false, entries: 65_535, memlock: None, per_space: false });
        let mut count = 0;
        run.world.model.inject(move |space, op| {
            count += u64::from(space.0 == 1 && matches!(op, HostOp::Unmap(_)));
            (count >= fails && space.0 == 1 && matches!(op, HostOp::Unmap(_))).then_some(libc::EINVAL)
        });
        for step in &steps {
            // Once its functions are stopped, attaching one of them is an error; the other group is not asked.
            let stopped = run.world.stats(1).quarantined == 1;
            if stopped && matches!(step, Step::Attach { device: 0 | 1, .. }) {
                continue;
            }
            let maps = run.world.stats(1).host_maps;
            run.call(step);
            if stopped {
                prop_assert_eq!(run.world.stats(1).host_maps, maps, "mapped for a stopped group");
            }
            let functions = run.world.stopped.functions.lock().expect("whole").clone();
            let quarantined = run.world.stats(1).quarantined == 1;
            let expected = if quarantined { vec![requester(1), requester(2)] } else { vec![] };
            prop_assert_eq!(functions, expected, "both functions of the group, once, before the call returns");
            prop_assert_eq!(run.world.stats(3).quarantined, 0);
            // The attach that met the refusal says so, and no other.
            let on_group = matches!(step, Step::Attach { device: 0 | 1, .. });
            prop_assert!(!run.host_failed || (quarantined && on_group));
            run.host_failed = false;
            if !quarantined {
                same(&pages_of(&run.world.model.contents(GROUPS[0])), &run.unit.granted(0), 0, step)?;
            }
            let held = pages_of(&run.world.model.contents(GROUPS[1]));
            same(&held, &run.unit.granted(1), 1, step)?;
        }
    }
}
