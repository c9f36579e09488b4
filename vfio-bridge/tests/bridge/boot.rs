//! A real boot, replayed: what a unit told its bridge while a Linux guest booted, read its assigned NVMe and powered
//! off (`nvme_boot`, the `notify` lines of `causeway run --trace`, without times). Each host call of it fails
//! once, in each way in which Linux's type1 and iommufd can fail it, where groups are in a space for life and where
//! they are attached to spaces.
//!
//! After each operation of the host a function reaches nothing but what its old or its new space grants; after each
//! notification exactly what is granted and was not refused, and the books say the same. An unmap that failed has had
//! its functions stopped by then, before the unit would tell the guest that it is done.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use vfio_bridge::GroupId;
use vfio_bridge::faulty::{Call, Failure, Faulty};
use vfio_bridge::model::{Held, HostOp, Kernel, Model};
use vtd::{
    AttachRefused, DomainId, Gpa, Iova, IovaRange, MapOp, Mapping, PagedSpace, Perm, SpaceKey, SpaceListener, Tables,
    UnitId,
};

use crate::nvme_boot::TRACE;
use crate::world::*;

/// What the kernel's uAPI and code allow for a call.
fn ways(call: Call) -> &'static [Failure] {
    use Failure::{DoneAndRefused, InPart, Miscounted, Refused};
    match call {
        // type1: no entry left, nothing to be locked, out of range, no memory behind it, something there, a signal, no
        // right. iommufd: the range is taken, it overflows, the object is not there, it is in use.
        Call::Map => &[
            Refused(libc::ENOSPC),
            Refused(libc::ENOMEM),
            Refused(libc::EINVAL),
            Refused(libc::EFAULT),
            Refused(libc::EEXIST),
            Refused(libc::EINTR),
            Refused(libc::EPERM),
            Refused(libc::EADDRINUSE),
            Refused(libc::EOVERFLOW),
            Refused(libc::ENOENT),
            Refused(libc::EBUSY),
        ],
        // type1: it would cut, it overflows, no memory for a batch. iommufd: nothing there, an access holds it, and
        // that in the middle of a range. Then a kernel that is wrong about what it did.
        Call::Unmap => &[
            Refused(libc::EINVAL),
            Refused(libc::EOVERFLOW),
            Refused(libc::ENOMEM),
            Refused(libc::ENOENT),
            Refused(libc::EBUSY),
            DoneAndRefused(libc::EINTR),
            DoneAndRefused(libc::EIO),
            Miscounted(4096),
            Miscounted(-4096),
            InPart(Some(libc::EBUSY)),
            InPart(Some(libc::EDEADLK)),
            InPart(None),
        ],
        Call::Create => &[Refused(libc::ENOMEM), Refused(libc::ENOSPC), Refused(libc::EOPNOTSUPP)],
        Call::Attach => &[
            Refused(libc::EINVAL),
            Refused(libc::EBUSY),
            Refused(libc::ENOMEM),
            Refused(libc::ENODEV),
            Refused(libc::EADDRINUSE),
        ],
        Call::Detach => &[Refused(libc::ENODEV), DoneAndRefused(libc::EIO)],
        // A boot has none.
        Call::AttachPart | Call::DetachPart | Call::Dirty => &[],
    }
}

/// What a unit says.
pub enum Step {
    Attach(u8, SpaceKey),
    Apply(SpaceKey, Vec<MapOp>),
    Detach(u8),
}

pub struct Boot {
    pub ram: Ram,
    /// By device number.
    pub functions: Vec<u8>,
    pub steps: Vec<Step>,
}

impl Boot {
    pub fn parse(text: &str) -> Self {
        let mut boot = Self { ram: Ram { low: 0, high: KIB4 }, functions: Vec::new(), steps: Vec::new() };
        let mut ops = Vec::new();
        for line in text.lines() {
            let mut words = line.split(' ');
            let what = (words.next().expect("a kind"), words.next().expect("an operation"));
            let values: BTreeMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
            let device = || {
                let bdf = values["device"].strip_prefix("0000:00:").and_then(|bdf| bdf.strip_suffix(".0"));
                u8::from_str_radix(bdf.expect("on bus 0"), 16).expect("a slot")
            };
            match what {
                ("host", "memory") => boot.ram.low = range(values["gpa"]).last + 1,
                ("notify", "attach") => {
                    if !boot.functions.contains(&device()) {
                        boot.functions.push(device());
                    }
                    boot.steps.push(Step::Attach(device(), space(values["space"])));
                }
                ("notify", "unmap") => ops.push(MapOp::Unmap(range(values["iova"]))),
                ("notify", "map") => {
                    let IovaRange { first, last } = range(values["iova"]);
                    let perm = match values["perm"] {
                        "r" => Perm::Read,
                        "w" => Perm::Write,
                        _ => Perm::ReadWrite,
                    };
                    let (iova, gpa) = (Iova(first), Gpa(number(values["gpa"])));
                    ops.push(MapOp::Map(Mapping { iova, gpa, len: last - first + 1, perm }));
                }
                ("notify", "applied") => {
                    boot.steps.push(Step::Apply(space(values["space"]), std::mem::take(&mut ops)));
                }
                // The end of an attach, and what the test takes from its own book.
                ("notify", "attached" | "replay") => {}
                ("notify", "detach") => boot.steps.push(Step::Detach(device())),
                other => panic!("{other:?}"),
            }
        }
        assert!(ops.is_empty(), "the trace ends within a batch");
        boot
    }
}

fn number(text: &str) -> u64 {
    u64::from_str_radix(text.strip_prefix("0x").expect("hex"), 16).expect("hex")
}

fn range(text: &str) -> IovaRange {
    let (first, last) = text.split_once('-').expect("a range");
    IovaRange::new(number(first), number(last))
}

fn space(text: &str) -> SpaceKey {
    let paged = |text: &str| {
        let mut parts = text.split('/');
        let mut part = |name: &str| parts.next().and_then(|part| part.strip_prefix(name).map(str::to_owned));
        let unit = part("unit")?.parse().ok()?;
        let domain = part("domain")?.parse().ok()?;
        let root = Gpa(number(&part("root")?));
        let width = part("")?.strip_suffix("bit")?.parse().ok()?;
        let tables = Tables::Second { root, width };
        Some(SpaceKey::Paged(PagedSpace { unit: UnitId(unit), tables, domain: DomainId(domain) }))
    };
    match text {
        "identity" => SpaceKey::Identity,
        "blocked" => SpaceKey::Blocked,
        _ => paged(text).expect("a space"),
    }
}

/// Where a range leads.
pub type Reach = Vec<(u64, u64, u64, Perm)>;

/// First, last, host address and permission; what joins is one.
pub fn joined(pieces: impl Iterator<Item = (u64, u64, u64, Perm)>) -> Reach {
    let mut all = Reach::new();
    for (first, last, hva, perm) in pieces {
        match all.last_mut() {
            Some(before) if before.1 + 1 == first && before.2 + (first - before.0) == hva && before.3 == perm => {
                before.1 = last;
            }
            _ => all.push((first, last, hva, perm)),
        }
    }
    all
}

fn leads(reach: &Reach, held: &Held) -> bool {
    let at = reach.partition_point(|(first, ..)| *first <= held.iova);
    at.checked_sub(1).map(|at| reach[at]).is_some_and(|(first, last, hva, perm)| {
        held.last() <= last && hva + (held.iova - first) == held.hva && perm == held.perm
    })
}

/// What the guest granted, by space.
#[derive(Default)]
struct Grants(BTreeMap<SpaceKey, BTreeMap<u64, Mapping>>);

impl Grants {
    fn remove(&mut self, space: &SpaceKey, range: IovaRange) {
        let grants = self.0.entry(*space).or_default();
        let hit = |(_, m): &(&u64, &Mapping)| m.range().last >= range.first;
        let cut: Vec<Mapping> = grants.range(..=range.last).rev().take_while(hit).map(|(_, m)| *m).collect();
        for m in cut {
            grants.remove(&m.iova.0);
            for rest in m.range().without([range]) {
                let gpa = Gpa(m.gpa.0 + (rest.first - m.iova.0));
                grants
                    .insert(rest.first, Mapping { iova: Iova(rest.first), gpa, len: rest.last - rest.first + 1, ..m });
            }
        }
    }

    fn live(&self, space: &SpaceKey) -> Vec<Mapping> {
        self.0.get(space).into_iter().flat_map(BTreeMap::values).copied().collect()
    }

    fn reach(&self, space: &SpaceKey, ram: Ram) -> Reach {
        match space {
            SpaceKey::Identity => vec![
                (0, ram.low - 1, LOW_HVA, Perm::ReadWrite),
                (HIGH_GPA, HIGH_GPA + (ram.high - 1), HIGH_HVA, Perm::ReadWrite),
            ],
            SpaceKey::Blocked => Reach::new(),
            SpaceKey::Paged(_) => joined(
                self.live(space)
                    .into_iter()
                    .map(|m| (m.iova.0, m.range().last, ram.hva(m.gpa.0).expect("a guest maps its RAM"), m.perm)),
            ),
        }
    }
}

/// What came of a life.
struct Life {
    made: Vec<Call>,
    failed: Option<Call>,
    /// The guest was told of something refused.
    told: bool,
}

fn live(boot: &Boot, per_space: bool, plan: Option<(u64, Failure)>) -> Life {
    // Each function is alone in its group, whose number is the function's.
    let groups: Vec<GroupId> = boot.functions.iter().map(|device| GroupId((*device).into())).collect();
    let model =
        if per_space { Model::per_space(Kernel::new(48), &groups) } else { Model::new(Kernel::new(48), &groups) };
    let host = Faulty::new(model.clone());
    if let Some((nth, failure)) = plan {
        host.fail(nth, failure);
    }
    let functions: Vec<_> = boot.functions.iter().map(|device| (*device, u32::from(*device))).collect();
    let world = World::through(host.clone(), model, boot.ram, &functions);
    let may = watch(&world, &groups, plan);
    let mut grants = Grants::default();
    let mut at: BTreeMap<u8, SpaceKey> = BTreeMap::new();
    let (mut told, mut identity_refused) = (false, false);
    for (number, step) in boot.steps.iter().enumerate() {
        let here = || format!("per space: {per_space}, {plan:?} ({:?}), step {number}", host.failed());
        // Until the step is over a group may have what it had, or what it will have.
        let allow = |grants: &Grants, device: u8, space: &SpaceKey| {
            let reach = grants.reach(space, boot.ram);
            may.lock().expect("whole").entry(GroupId(device.into())).or_default().push(reach);
        };
        match step {
            Step::Attach(device, to) => {
                allow(&grants, *device, to);
                let result = world.attach(*device, to, &grants.live(to));
                let there = match &result {
                    Ok(()) => true,
                    Err(AttachRefused::Partial(refused)) => {
                        for refusal in refused {
                            match to {
                                // Tried again when there may be room; the function may have it all the while.
                                SpaceKey::Identity => identity_refused = true,
                                _ => grants.remove(to, refusal.range),
                            }
                        }
                        true
                    }
                    Err(_) => false,
                };
                told |= result.is_err();
                at.insert(*device, if there { *to } else { SpaceKey::Blocked });
            }
            Step::Apply(to, ops) => {
                for op in ops {
                    match op {
                        MapOp::Unmap(range) => grants.remove(to, *range),
                        MapOp::Map(m) => drop(grants.0.entry(*to).or_default().insert(m.iova.0, *m)),
                    }
                }
                let members: Vec<u8> = at.iter().filter(|(_, of)| *of == to).map(|(device, _)| *device).collect();
                members.iter().for_each(|device| allow(&grants, *device, to));
                if !members.is_empty() {
                    let refused = world.apply(to, ops).refused;
                    told |= !refused.is_empty();
                    refused.iter().for_each(|refusal| grants.remove(to, refusal.range));
                }
            }
            Step::Detach(device) => {
                world.bridge.detach(requester(*device).into());
                at.remove(device);
            }
        }
        let must_stop = matches!(host.failed(), Some(Call::Unmap | Call::Detach));
        let stopped = world.stopped.functions.lock().expect("whole").clone();
        assert_eq!(!stopped.is_empty(), must_stop, "{}", here());
        may.lock().expect("whole").clear();
        for device in &boot.functions {
            if stopped.contains(&requester(*device)) {
                continue;
            }
            let space = at.get(device).copied().unwrap_or(SpaceKey::Blocked);
            let reach = grants.reach(&space, boot.ram);
            let held = world.model.contents(GroupId((*device).into()));
            let held = joined(held.values().map(|held| (held.iova, held.last(), held.hva, held.perm)));
            if space == SpaceKey::Identity && identity_refused {
                let part = held.iter().all(|piece| reach.contains(piece));
                assert!(part, "{}: function {device:#x} reaches {held:x?}", here());
            } else {
                assert_eq!(held, reach, "{}: function {device:#x}", here());
            }
            let ledger = world.bridge.holds(requester(*device)).into_iter().map(|e| (e.first, e.last, e.hva, e.perm));
            assert_eq!(joined(ledger), held, "{}: the ledger of {device:#x}", here());
            // What it has is what it may have, until a step says something else.
            may.lock().expect("whole").insert(GroupId((*device).into()), vec![reach]);
        }
    }
    Life { made: host.made(), failed: host.failed(), told }
}

/// By group: the reaches that it may have at the moment.
type May = Arc<Mutex<BTreeMap<GroupId, Vec<Reach>>>>;

/// Looks at each operation of the host. A group that is not in the book was stopped.
fn watch(world: &World, groups: &[GroupId], plan: Option<(u64, Failure)>) -> May {
    let may: May = Arc::new(Mutex::new(groups.iter().map(|group| (*group, Vec::new())).collect()));
    let (model, book) = (Arc::downgrade(&world.model), may.clone());
    world.model.set_hook(move |served, contents| {
        let Some(model) = model.upgrade() else { return };
        let book = book.lock().expect("whole");
        for group in model.groups_in(served.space) {
            let Some(reaches) = book.get(&group) else { continue };
            let allowed = |held: &Held| reaches.iter().any(|reach| leads(reach, held));
            let beyond = match served.op {
                _ if served.result.is_err() => None,
                HostOp::Map(held) => Some(held).filter(|held| !allowed(held)),
                HostOp::Attach(_) => contents.values().find(|held| !allowed(held)).copied(),
                _ => None,
            };
            assert!(beyond.is_none(), "{plan:?}: {group} reaches {beyond:x?} after {:x?}", served.op);
        }
    });
    may
}

#[test]
fn b11_whichever_host_call_of_a_boot_fails_the_guest_goes_on_or_is_told() {
    let boot = Boot::parse(TRACE);
    for per_space in [false, true] {
        let sound = live(&boot, per_space, None);
        assert!(!sound.told, "nothing is refused where nothing fails");
        assert!(sound.made.len() > 90, "{} calls", sound.made.len());
        // By kind of call: how many fail, and of how many of them the guest was told.
        let mut failures: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (nth, kind) in (1..).zip(&sound.made) {
            for way in ways(*kind) {
                let life = live(&boot, per_space, Some((nth, *way)));
                assert_eq!(life.failed, Some(*kind), "call {nth}");
                let count = failures.entry(format!("{kind:?}")).or_default();
                *count = (count.0 + 1, count.1 + usize::from(life.told));
            }
        }
        let all: usize = failures.values().map(|(count, _)| count).sum();
        println!("per space: {per_space}; {} calls, {all} failures, of them told: {failures:?}", sound.made.len());
    }
}
