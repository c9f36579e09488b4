//! Pins against a model of pages: after every change no pin is left in what went, none beside it is touched, and the
//! clients that were told are those that had pins there (D-1 to D-5).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use vfio_bridge::{PinError, PinLimits};
use vtd::{IovaRange, MapOp, Mapping, Perm, SpaceKey, SpaceListener};

use crate::pins::{Device, Rig, let_go};
use crate::world::*;

const LIMITS: PinLimits = PinLimits { pages: 6, deadline: Duration::from_secs(30) };
/// The device of each client.
const CLIENTS: [u8; 3] = [1, 1, 2];
/// Spaces 0 and 1 are paged.
const IDENTITY: usize = 2;
const BLOCKED: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    Map {
        space: usize,
        at: u64,
        pages: u64,
        gpa: u64,
        perm: Perm,
    },
    /// Several ranges in one batch.
    Unmap {
        space: usize,
        ranges: Vec<(u64, u64)>,
    },
    Clear {
        space: usize,
    },
    Attach {
        device: u8,
        space: usize,
    },
    Detach {
        device: u8,
    },
    Pin {
        client: usize,
        pages: Vec<u64>,
        access: Perm,
    },
    Unpin {
        client: usize,
        pages: Vec<u64>,
    },
    Leave {
        client: usize,
    },
}

fn perm() -> impl Strategy<Value = Perm> {
    prop_oneof![4 => Just(Perm::ReadWrite), 1 => Just(Perm::Read), 1 => Just(Perm::Write)]
}

fn step() -> impl Strategy<Value = Step> {
    let space = || prop_oneof![3 => Just(0usize), 1 => Just(1)];
    let client = 0usize..CLIENTS.len();
    let pages = || prop::collection::vec(0u64..16, 1..5);
    let moves_to = prop_oneof![4 => Just(0usize), 3 => Just(1), 1 => Just(IDENTITY), 1 => Just(BLOCKED)];
    prop_oneof![
        5 => (space(), 0u64..16, 1u64..8, 0u64..16, perm())
            .prop_map(|(space, at, pages, gpa, perm)| Step::Map { space, at, pages, gpa, perm }),
        4 => (space(), prop::collection::vec((0u64..16, 1u64..5), 1..3))
            .prop_map(|(space, ranges)| Step::Unmap { space, ranges }),
        1 => space().prop_map(|space| Step::Clear { space }),
        3 => (1u8..3, moves_to).prop_map(|(device, space)| Step::Attach { device, space }),
        1 => (1u8..3).prop_map(|device| Step::Detach { device }),
        8 => (client.clone(), pages(), perm()).prop_map(|(client, pages, access)| Step::Pin { client, pages, access }),
        4 => (client.clone(), pages()).prop_map(|(client, pages)| Step::Unpin { client, pages }),
        1 => client.prop_map(|client| Step::Leave { client }),
    ]
}

/// Page by page: where it leads, by numbers of pages, and what is allowed there.
type Leaves = BTreeMap<u64, (u64, Perm)>;

struct Expected {
    paged: [Leaves; 2],
    /// Of each device.
    space: [usize; 2],
    /// How often each client has pinned each page.
    pins: [BTreeMap<u64, u32>; 3],
}

const RAM_PAGES: u64 = 4096;

impl Expected {
    fn leaves(&self, device: u8) -> Leaves {
        match self.space[usize::from(device) - 1] {
            IDENTITY => (0..RAM_PAGES).map(|page| (page, (page, Perm::ReadWrite))).collect(),
            space => self.paged.get(space).cloned().unwrap_or_default(),
        }
    }

    /// What a client may expect of a pin.
    fn pin(&mut self, client: usize, pages: &[u64], access: Perm) -> Result<(), ()> {
        let leaves = self.leaves(CLIENTS[client]);
        let allows = |page: &u64| {
            leaves.get(page).is_some_and(|(_, perm)| {
                (perm.readable() || !access.readable()) && (perm.writable() || !access.writable())
            })
        };
        let mut pins = self.pins[client].clone();
        pages.iter().for_each(|page| *pins.entry(*page).or_default() += 1);
        if !pages.iter().all(allows) || pins.len() as u64 > LIMITS.pages {
            return Err(());
        }
        self.pins[client] = pins;
        Ok(())
    }

    fn unpin(&mut self, client: usize, pages: &[u64]) -> Result<(), ()> {
        let mut pins = self.pins[client].clone();
        for page in pages {
            match pins.get_mut(page) {
                Some(1) => drop(pins.remove(page)),
                Some(count) => *count -= 1,
                None => return Err(()),
            }
        }
        self.pins[client] = pins;
        Ok(())
    }

    /// Releases the pins of pages that are not as they were in `before`; which, by client.
    fn revoke(&mut self, before: &[Leaves; 2]) -> [Vec<u64>; 3] {
        let now = [self.leaves(1), self.leaves(2)];
        [0, 1, 2].map(|client| {
            let device = usize::from(CLIENTS[client]) - 1;
            let goes = |page: &u64| now[device].get(page) != before[device].get(page);
            let gone: Vec<u64> = self.pins[client].keys().copied().filter(goes).collect();
            self.pins[client].retain(|page, _| !gone.contains(page));
            gone
        })
    }
}

/// As few mappings as possible.
fn live(leaves: &Leaves) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for (page, (gpa, perm)) in leaves {
        match found.last_mut() {
            Some(last)
                if last.perm == *perm
                    && last.iova.0 + last.len == page * KIB4
                    && last.gpa.0 + last.len == gpa * KIB4 =>
            {
                last.len += KIB4;
            }
            _ => found.push(Mapping { perm: *perm, ..mapping(page * KIB4, gpa * KIB4, KIB4) }),
        }
    }
    found
}

fn key(space: usize) -> SpaceKey {
    match space {
        IDENTITY => SpaceKey::Identity,
        BLOCKED => SpaceKey::Blocked,
        paged => crate::world::paged(paged as u16 + 1, 48),
    }
}

struct Run {
    rig: Rig,
    clients: Vec<Arc<Device>>,
    expected: Expected,
}

fn iovas(pages: &[u64]) -> Vec<u64> {
    pages.iter().map(|page| page * KIB4).collect()
}

impl Run {
    fn new() -> Self {
        let (rig, _) = Rig::new(2);
        let clients = CLIENTS.iter().map(|device| rig.device_with(*device, LIMITS, Box::new(let_go))).collect();
        let expected = Expected { paged: Default::default(), space: [BLOCKED; 2], pins: Default::default() };
        let run = Self { rig, clients, expected };
        [1, 2].iter().for_each(|device| run.rig.attach(*device, &SpaceKey::Blocked, &[]));
        run
    }

    fn take(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let before = [self.expected.leaves(1), self.expected.leaves(2)];
        match step {
            Step::Map { space, at, pages, gpa, perm } => {
                let leaves = &mut self.expected.paged[*space];
                if (*at..at + pages).any(|page| leaves.contains_key(&page)) {
                    return Ok(());
                }
                leaves.extend((0..*pages).map(|n| (at + n, (gpa + n, *perm))));
                let mapping = Mapping { perm: *perm, ..mapping(at * KIB4, gpa * KIB4, pages * KIB4) };
                self.rig.done(&key(*space), &[MapOp::Map(mapping)]);
            }
            Step::Unmap { space, ranges } => {
                let leaves = &mut self.expected.paged[*space];
                leaves.retain(|page, _| !ranges.iter().any(|(at, count)| (*at..at + count).contains(page)));
                let ops: Vec<MapOp> =
                    ranges.iter().map(|(at, count)| unmap(at * KIB4, (at + count) * KIB4 - 1)).collect();
                self.rig.done(&key(*space), &ops);
            }
            Step::Clear { space } => {
                self.expected.paged[*space].clear();
                self.rig.done(&key(*space), &[unmap(0, u64::MAX)]);
            }
            Step::Attach { device, space } => {
                self.expected.space[usize::from(*device) - 1] = *space;
                let live = self.expected.paged.get(*space).map(live).unwrap_or_default();
                self.rig.attach(*device, &key(*space), &live);
            }
            Step::Detach { device } => {
                self.expected.space[usize::from(*device) - 1] = BLOCKED;
                self.rig.bridge.detach(requester(*device).into());
            }
            Step::Pin { client, pages, access } => {
                let leaves = self.expected.leaves(CLIENTS[*client]);
                let pinned = self.clients[*client].client().pin(&iovas(pages), *access);
                prop_assert_eq!(pinned.is_ok(), self.expected.pin(*client, pages, *access).is_ok());
                if let Ok(pinned) = pinned {
                    let hvas: Vec<u64> = pinned.pages.iter().map(|page| page.hva).collect();
                    let right: Vec<u64> = pages.iter().map(|page| LOW_HVA + leaves[page].0 * KIB4).collect();
                    prop_assert_eq!(hvas, right);
                }
            }
            Step::Unpin { client, pages } => {
                let unpinned: Result<(), PinError> = self.clients[*client].client().unpin(&iovas(pages));
                prop_assert_eq!(unpinned.is_ok(), self.expected.unpin(*client, pages).is_ok());
            }
            Step::Leave { client } => {
                self.clients[*client].leave();
                self.clients[*client] = self.rig.device_with(CLIENTS[*client], LIMITS, Box::new(let_go));
                self.expected.pins[*client].clear();
            }
        }
        let gone = self.expected.revoke(&before);
        for (client, gone) in self.clients.iter().zip(gone) {
            let range = |page: u64| IovaRange::new(page * KIB4, page * KIB4 + KIB4 - 1);
            let ranges = IovaRange::union_of(gone.iter().map(|page| range(*page)).collect());
            let told = if ranges.is_empty() { vec![] } else { vec![ranges] };
            prop_assert_eq!(client.told(), told);
        }
        self.check()
    }

    fn check(&self) -> Result<(), TestCaseError> {
        for device in [1, 2] {
            let mut sum: BTreeMap<u64, u32> = BTreeMap::new();
            for (pins, _) in self.expected.pins.iter().zip(CLIENTS).filter(|(_, of)| *of == device) {
                pins.iter().for_each(|(page, count)| *sum.entry(page * KIB4).or_default() += count);
            }
            let pinned = self.rig.bridge.pinned(requester(device));
            prop_assert_eq!(pinned, sum.into_iter().collect::<Vec<_>>());
        }
        for (client, pins) in self.clients.iter().zip(&self.expected.pins) {
            let stats = client.client().stats();
            prop_assert_eq!((stats.pinned_pages, stats.left_pinned, stats.late), (pins.len() as u64, 0, 0));
        }
        prop_assert!(self.rig.stopped.functions.lock().expect("whole").is_empty());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn d1_d2_d3_d4_d5_pins_are_those_of_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let mut run = Run::new();
        for step in &steps {
            run.take(step)?;
        }
    }
}
