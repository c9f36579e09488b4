//! Random hosts, and random sequences of what a unit may say.

use proptest::prelude::*;
use vtd::Perm;

use crate::world::*;

/// Numbers of spaces: 0 and 1 are paged.
pub const IDENTITY: usize = 2;
pub const BLOCKED: usize = 3;

#[derive(Clone, Debug)]
pub enum Step {
    /// Unmaps and maps of one space in one batch: (place, pages), (place, pages, target, permission).
    Apply {
        space: usize,
        unmaps: Vec<(u64, u64)>,
        maps: Vec<(u64, u64, u64, Perm)>,
    },
    /// Everything in one space goes, said as the whole of 2^64.
    Clear {
        space: usize,
    },
    /// The permission or the target of something live changes: unmap and map of it in one batch.
    Replace {
        space: usize,
        nth: usize,
        target: u64,
        perm: Perm,
    },
    /// A device moves: 0 and 1 are the paged spaces, 2 identity, 3 blocked.
    Attach {
        device: usize,
        space: usize,
    },
    Detach {
        device: usize,
    },
    /// One space takes on what the other has, with other boundaries, but for some pages.
    Resemble {
        space: usize,
        pages_a_leaf: u64,
        but: (u64, u64),
    },
}

/// Pages near 0, around the interrupt window, and at the end of the width.
fn place(width: u8) -> impl Strategy<Value = u64> {
    let top = (1u64 << width) - 40 * KIB4;
    prop_oneof![
        6 => (0u64..64).prop_map(|n| n * KIB4),
        2 => (0u64..24).prop_map(|n| 0xfee0_0000 - 16 * KIB4 + n * KIB4),
        1 => (0u64..8).prop_map(|n| 0xfeef_e000 + n * KIB4),
        1 => (0u64..40).prop_map(move |n| top + n * KIB4),
    ]
}

/// Mostly few pages, now and then across the whole window.
fn count() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 1u64..6, 3 => 1u64..40, 1 => Just(300u64)]
}

/// Guest-physical addresses: in low RAM, across its end, at the hole, and in high RAM across its start.
fn target() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0u64..90).prop_map(|n| n * KIB4),
        1 => (88u64..100).prop_map(|n| n * KIB4),
        3 => (0u64..26).prop_map(|n| HIGH_GPA + n * KIB4),
        1 => (1u64..4).prop_map(|n| HIGH_GPA - n * KIB4),
    ]
}

fn perm() -> impl Strategy<Value = Perm> {
    prop_oneof![4 => Just(Perm::ReadWrite), 1 => Just(Perm::Read)]
}

pub fn step(width: u8) -> impl Strategy<Value = Step> {
    let space = 0usize..2;
    let unmaps = prop::collection::vec((place(width), count()), 0..4);
    let maps = prop::collection::vec((place(width), count(), target(), perm()), 0..5);
    // Mostly to the same space, so that groups share one and members agree.
    let moves_to = prop_oneof![4 => Just(0usize), 2 => Just(1), 1 => Just(IDENTITY), 1 => Just(BLOCKED)];
    prop_oneof![
        8 => (space.clone(), unmaps, maps).prop_map(|(space, unmaps, maps)| Step::Apply { space, unmaps, maps }),
        1 => space.clone().prop_map(|space| Step::Clear { space }),
        3 => (space.clone(), any::<usize>(), target(), perm())
            .prop_map(|(space, nth, target, perm)| Step::Replace { space, nth, target, perm }),
        5 => (0usize..3, moves_to).prop_map(|(device, space)| Step::Attach { device, space }),
        1 => (0usize..3).prop_map(|device| Step::Detach { device }),
        2 => (space, 1u64..9, (place(width), 0u64..8))
            .prop_map(|(space, pages_a_leaf, but)| Step::Resemble { space, pages_a_leaf, but }),
    ]
}

#[derive(Clone, Debug)]
pub struct Host {
    pub width: u8,
    pub old: bool,
    pub entries: usize,
    pub memlock: Option<u64>,
    /// It attaches groups to spaces, as iommufd does.
    pub per_space: bool,
}

fn host() -> impl Strategy<Value = Host> {
    let width = prop_oneof![Just(39u8), Just(48), Just(57)];
    let entries = prop_oneof![3 => Just(65_535usize), 1 => 1usize..12];
    let memlock = prop_oneof![2 => Just(None), 1 => (60u64..300).prop_map(|n| Some(n * KIB4))];
    (width, any::<bool>(), entries, memlock).prop_map(|(width, old, entries, memlock)| Host {
        width,
        old,
        entries,
        memlock,
        per_space: false,
    })
}

pub fn scenario() -> impl Strategy<Value = (Host, Vec<Step>)> {
    host().prop_flat_map(|host| {
        let steps = prop::collection::vec(step(host.width), 1..40);
        (Just(host), steps)
    })
}
