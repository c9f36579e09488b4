//! Each host call of a life fails once, in each way in which a kernel can fail it. After each call of the bridge a
//! function that goes on reaches nothing that is not granted, and the books say what the host holds; a host that did
//! not let go has had its functions stopped.

use std::collections::BTreeSet;

use vfio_bridge::GroupId;
use vfio_bridge::faulty::{Call, Failure, Faulty};
use vfio_bridge::model::{Kernel, Model};
use vtd::{AttachRefused, IovaRange, MapOp, Mapping, Perm, SpaceKey, SpaceListener};

use crate::world::*;

const RAM: Ram = Ram { low: 64 * KIB4, high: 16 * KIB4 };
/// Functions 1 and 2 share a group.
const FUNCTIONS: [(u8, u32); 3] = [(1, 1), (2, 1), (3, 2)];
const GROUPS: [(u32, &[u8]); 2] = [(1, &[1, 2]), (2, &[3])];

const FAILURES: [Failure; 11] = [
    Failure::Refused(libc::ENOSPC),
    Failure::Refused(libc::ENOMEM),
    Failure::Refused(libc::EINVAL),
    Failure::Refused(libc::EFAULT),
    Failure::Refused(libc::EIO),
    Failure::DoneAndRefused(libc::EIO),
    Failure::DoneAndRefused(libc::EINTR),
    Failure::Miscounted(4096),
    Failure::Miscounted(-4096),
    Failure::InPart(Some(libc::EBUSY)),
    Failure::InPart(None),
];

/// A step of a life: what a unit says.
enum Step {
    Attach(u8, SpaceKey),
    Apply(SpaceKey, Vec<MapOp>),
    Detach(u8),
}

/// What a guest does from power-on to power-off: identity, domains, mappings that come, are cut and change, functions
/// that share a space, and back.
fn life() -> Vec<Step> {
    let (one, two) = (paged(1, 48), paged(2, 48));
    let mut steps: Vec<Step> = [1, 2, 3].map(|device| Step::Attach(device, SpaceKey::Identity)).into();
    steps.extend([1, 2, 3].map(|device| Step::Attach(device, one)));
    let pages = |from: u64, count: u64| (from..from + count).map(|n| map(GIB + 2 * n * KIB4, n * KIB4, KIB4));
    steps.push(Step::Apply(one, pages(0, 6).chain([map(2 * GIB, 0, 8 * KIB4)]).collect()));
    // Several at once, one inside of a large one, and one that changes.
    steps.push(Step::Apply(one, vec![unmap(GIB, GIB + 3 * KIB4 - 1), unmap(2 * GIB + KIB4, 2 * GIB + 2 * KIB4 - 1)]));
    let changed = Mapping { perm: Perm::Read, ..mapping(GIB + 4 * KIB4, 9 * KIB4, KIB4) };
    steps.push(Step::Apply(one, vec![unmap(GIB + 4 * KIB4, GIB + 5 * KIB4 - 1), MapOp::Map(changed)]));
    // One function after the other to a domain of its own, and the first ones to identity.
    steps.push(Step::Attach(3, two));
    steps.push(Step::Apply(two, pages(0, 3).collect()));
    steps.push(Step::Apply(one, vec![unmap(0, u64::MAX)]));
    steps.push(Step::Attach(3, one));
    steps.push(Step::Apply(one, pages(2, 2).collect()));
    steps.extend([1, 2, 3].map(|device| Step::Attach(device, SpaceKey::Identity)));
    steps.extend([1, 2, 3].map(Step::Detach));
    steps
}

/// What the guest granted.
#[derive(Default)]
struct Granted {
    /// By space: what the unit has of it.
    shadows: std::collections::BTreeMap<SpaceKey, Vec<Mapping>>,
}

impl Granted {
    fn remove(&mut self, space: &SpaceKey, range: IovaRange) {
        let shadow = self.shadows.entry(*space).or_default();
        let parts = |m: &Mapping| {
            let m = *m;
            let rest = m.range().without([range]).into_iter();
            rest.map(move |r| Mapping {
                perm: m.perm,
                ..mapping(r.first, m.gpa.0 + (r.first - m.iova.0), r.last - r.first + 1)
            })
        };
        *shadow = shadow.iter().flat_map(parts).collect();
        shadow.sort();
    }

    /// What a function in `space` may reach, page by page.
    fn pages(&self, space: &SpaceKey) -> Pages {
        let mut pages = Pages::new();
        let ram = [mapping(0, 0, RAM.low), mapping(HIGH_GPA, HIGH_GPA, RAM.high)];
        let mappings = match space {
            SpaceKey::Identity => ram.to_vec(),
            _ => self.shadows.get(space).cloned().unwrap_or_default(),
        };
        for m in mappings {
            for offset in (0..m.len).step_by(4096) {
                let hva = RAM.hva(m.gpa.0 + offset).expect("only RAM is mapped here");
                pages.insert(m.iova.0 + offset, (hva, m.perm));
            }
        }
        pages
    }
}

/// Lives once; gives back how many calls there were, and which one failed.
fn live(per_space: bool, plan: Option<(u64, Failure)>) -> (u64, Option<Call>) {
    let groups = GROUPS.map(|(group, _)| GroupId(group));
    let model =
        if per_space { Model::per_space(Kernel::new(48), &groups) } else { Model::new(Kernel::new(48), &groups) };
    let host = Faulty::new(model.clone());
    if let Some((nth, failure)) = plan {
        host.fail(nth, failure);
    }
    let world = World::through(host.clone(), model, RAM, &FUNCTIONS);
    let mut granted = Granted::default();
    let mut attached = FUNCTIONS.map(|_| Some(SpaceKey::Blocked));
    for (number, step) in life().into_iter().enumerate() {
        let at = format!("{plan:?} ({:?}), step {number}", host.failed());
        match step {
            Step::Attach(device, space) => {
                let live = granted.shadows.get(&space).cloned().unwrap_or_default();
                let result = world.attach(device, &space, &live);
                let refused = match &result {
                    Ok(()) => &[][..],
                    Err(AttachRefused::Partial(refused)) => refused,
                    Err(_) => &[][..],
                };
                refused.iter().for_each(|refusal| granted.remove(&space, refusal.range));
                let is_there = matches!(result, Ok(()) | Err(AttachRefused::Partial(_)));
                attached[usize::from(device) - 1] = Some(if is_there { space } else { SpaceKey::Blocked });
            }
            Step::Apply(space, ops) => {
                for op in &ops {
                    match op {
                        MapOp::Unmap(range) => granted.remove(&space, *range),
                        MapOp::Map(m) => granted.shadows.entry(space).or_default().push(*m),
                    }
                }
                granted.shadows.entry(space).or_default().sort();
                let members = attached.contains(&Some(space));
                let refused = if members { world.apply(&space, &ops).refused } else { Vec::new() };
                refused.iter().for_each(|refusal| granted.remove(&space, refusal.range));
            }
            Step::Detach(device) => {
                world.bridge.detach(requester(device).into());
                attached[usize::from(device) - 1] = None;
            }
        }
        check(&world, &granted, &attached, &at);
    }
    let stopped = !world.stopped.functions.lock().expect("whole").is_empty();
    let must_stop = matches!(host.failed(), Some(Call::Unmap | Call::Detach));
    assert_eq!(stopped, must_stop, "{plan:?}: {:?}", host.failed());
    (host.calls(), host.failed())
}

fn check(world: &World, granted: &Granted, attached: &[Option<SpaceKey>; 3], at: &str) {
    let stopped: BTreeSet<_> = world.stopped.functions.lock().expect("whole").iter().copied().collect();
    for (group, members) in GROUPS {
        if members.iter().any(|device| stopped.contains(&requester(*device))) {
            assert!(
                members.iter().all(|device| stopped.contains(&requester(*device))),
                "{at}: a part of group {group}"
            );
            continue;
        }
        let wants: BTreeSet<_> = members.iter().filter_map(|device| attached[usize::from(*device) - 1]).collect();
        let may = match Vec::from_iter(wants)[..] {
            [space] => granted.pages(&space),
            _ => Pages::new(),
        };
        let held = pages_of(&world.model.contents(GroupId(group)));
        let beyond = held.iter().find(|(page, to)| may.get(page) != Some(to));
        assert!(beyond.is_none(), "{at}: group {group} reaches {beyond:x?}");
        let ledger: Vec<_> =
            world.bridge.holds(requester(members[0])).iter().map(|e| (e.first, e.size(), e.hva)).collect();
        let model: Vec<_> = world.model.contents(GroupId(group)).values().map(|h| (h.iova, h.len, h.hva)).collect();
        assert_eq!(ledger, model, "{at}: group {group}");
    }
}

#[test]
fn b11_whichever_host_call_fails_nothing_is_reached_that_is_not_granted() {
    let mut seen = BTreeSet::new();
    for per_space in [false, true] {
        let (calls, _) = live(per_space, None);
        for nth in 1..=calls {
            for failure in FAILURES {
                let (_, failed) = live(per_space, Some((nth, failure)));
                seen.extend(failed.map(|call| format!("{call:?}")));
            }
        }
        assert!(calls > 30, "{calls}");
    }
    assert_eq!(Vec::from_iter(seen), ["Attach", "Create", "Detach", "Map", "Unmap"]);
}
