//! What a guest does to its tables and to the unit, at random: the steps of `with_unit`, and the tables that they edit.

use proptest::prelude::*;

use crate::world::{GIB, KIB4};

/// Each page table has 8 pages from here: the root first.
pub const TABLES: u64 = 0x1_0000;

pub const READ: u64 = 1;
pub const WRITE: u64 = 2;
pub const LARGE: u64 = 1 << 7;

/// Widths of the page tables. One domain id may get several of them, and one of them several domain ids.
pub const WIDTHS: [u8; 3] = [39, 39, 48];

/// The tables of one page table.
#[derive(Clone, Copy)]
pub struct Tables {
    pub width: u8,
    pub base: u64,
}

impl Tables {
    pub fn of(root: usize) -> Self {
        Self { width: WIDTHS[root], base: TABLES + root as u64 * 8 * KIB4 }
    }
    pub fn level4(self) -> u64 {
        self.base
    }
    pub fn level3(self) -> u64 {
        self.base + KIB4
    }
    /// First GiB.
    pub fn level2(self) -> u64 {
        self.base + 2 * KIB4
    }
    /// The GiB with the interrupt window.
    pub fn level2_window(self) -> u64 {
        self.base + 3 * KIB4
    }
    /// First and second 2 MiB.
    pub fn level1(self, n: u64) -> u64 {
        self.base + (4 + n) * KIB4
    }
    pub fn root(self) -> u64 {
        if self.width == 48 { self.level4() } else { self.level3() }
    }
    pub fn levels(self) -> u32 {
        if self.width == 48 { 4 } else { 3 }
    }
}

/// A table entry that an edit can touch: (table, index, level).
#[derive(Clone, Copy, Debug)]
pub enum Place {
    Level1(u64, u64),
    Level2(u64),
    Level2Window(u64),
    Level3(u64),
}

impl Place {
    pub fn entry(self, tables: Tables) -> (u64, u32) {
        match self {
            Self::Level1(n, index) => (tables.level1(n) + index * 8, 1),
            Self::Level2(index) => (tables.level2() + index * 8, 2),
            Self::Level2Window(index) => (tables.level2_window() + index * 8, 2),
            Self::Level3(index) => (tables.level3() + index * 8, 3),
        }
    }

    /// The table that stands there in an untouched page table.
    pub fn table(self, tables: Tables) -> Option<u64> {
        match self {
            Self::Level2(n @ 0..2) => Some(tables.level1(n)),
            Self::Level3(0) => Some(tables.level2()),
            Self::Level3(3) => Some(tables.level2_window()),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub enum Value {
    Empty,
    /// A leaf of the entry's level: the target in units of it, and its permission bits.
    Leaf {
        target: u64,
        perm: u64,
    },
    /// The table that belongs there, with these permission bits.
    Table(u64),
    /// The page table's own level 3.
    Loop,
    /// A reserved address bit.
    Reserved,
    /// A table outside memory.
    Nowhere,
}

#[derive(Clone, Copy, Debug)]
pub enum Context {
    Paged {
        root: usize,
        domain: u16,
    },
    PassThrough,
    Absent,
    /// A reserved translation type.
    Bad,
}

#[derive(Clone, Copy, Debug)]
pub enum Invalidate {
    Pages { domain: u16, iova: u64, mask: u32 },
    Domain(u16),
    Everything,
    Contexts,
    ContextsOf(u16),
    ContextOf(usize),
}

#[derive(Clone, Debug)]
pub enum Step {
    Set {
        root: usize,
        place: Place,
        value: Value,
    },
    /// A run of 4 KiB leaves in a level 1 table.
    Fill {
        root: usize,
        table: u64,
        from: u64,
        count: u64,
        target: u64,
        perm: u64,
    },
    Context {
        device: usize,
        context: Context,
    },
    Invalidate(Vec<Invalidate>),
    Resync,
    Translation(bool),
    SetRoot,
    /// Until the next re-sync the host refuses one map in this many.
    Refuse(u64),
    /// A directory entry changes, and one page that it covers is invalidated (B-1).
    Directory {
        root: usize,
        index: u64,
        value: Value,
        page: u64,
    },
}

pub fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        4 => (0u64..2, prop_oneof![0u64..12, 506u64..512]).prop_map(|(n, index)| Place::Level1(n, index)),
        3 => (0u64..3).prop_map(Place::Level2),
        2 => (502u64..505).prop_map(Place::Level2Window),
        2 => (0u64..4).prop_map(Place::Level3),
    ]
}

pub fn perm() -> impl Strategy<Value = u64> {
    prop_oneof![5 => Just(READ | WRITE), 1 => Just(READ), 1 => Just(WRITE)]
}

pub fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        3 => Just(Value::Empty),
        6 => (0u64..4, perm()).prop_map(|(target, perm)| Value::Leaf { target, perm }),
        5 => perm().prop_map(Value::Table),
        1 => Just(Value::Loop),
        1 => Just(Value::Reserved),
        1 => Just(Value::Nowhere),
    ]
}

pub fn invalidate() -> impl Strategy<Value = Invalidate> {
    let domain = 1u16..3;
    let iova = prop_oneof![
        8 => (0u64..1024).prop_map(|page| page * KIB4),
        2 => (0u64..1024).prop_map(|page| 0xfed0_0000 + page * KIB4),
        1 => Just(GIB),
    ];
    let mask = prop_oneof![3 => 0u32..4, 2 => 9u32..12, 1 => Just(18u32)];
    prop_oneof![
        8 => (domain.clone(), iova, mask).prop_map(|(domain, iova, mask)| Invalidate::Pages {
            domain,
            iova: iova & !((KIB4 << mask) - 1),
            mask,
        }),
        2 => domain.clone().prop_map(Invalidate::Domain),
        1 => Just(Invalidate::Everything),
        1 => Just(Invalidate::Contexts),
        1 => domain.prop_map(Invalidate::ContextsOf),
        2 => (0usize..3).prop_map(Invalidate::ContextOf),
    ]
}

pub fn context() -> impl Strategy<Value = Context> {
    prop_oneof![
        12 => (prop_oneof![6 => Just(0usize), 1 => Just(1), 1 => Just(2)], prop_oneof![3 => Just(1u16), 1 => Just(2)])
            .prop_map(|(root, domain)| Context::Paged { root, domain }),
        1 => Just(Context::PassThrough),
        1 => Just(Context::Absent),
        1 => Just(Context::Bad),
    ]
}

pub fn step() -> impl Strategy<Value = Step> {
    let root = prop_oneof![4 => Just(0usize), 1 => Just(1), 1 => Just(2)];
    let directory = (root.clone(), 0u64..2, value(), 0u64..512);
    prop_oneof![
        3 => directory.prop_map(|(root, index, value, page)| Step::Directory { root, index, value, page }),
        6 => (root.clone(), place(), value()).prop_map(|(root, place, value)| Step::Set { root, place, value }),
        6 => (root, 0u64..2, prop_oneof![0u64..16, Just(504u64)], 1u64..9, 0u64..1000, perm()).prop_map(
            |(root, table, from, count, target, perm)| Step::Fill { root, table, from, count, target, perm }
        ),
        3 => (0usize..3, context()).prop_map(|(device, context)| Step::Context { device, context }),
        10 => prop::collection::vec(invalidate(), 1..5).prop_map(Step::Invalidate),
        3 => Just(Step::Resync),
        1 => prop::bool::weighted(0.8).prop_map(Step::Translation),
        1 => Just(Step::SetRoot),
        1 => (1u64..4).prop_map(Step::Refuse),
    ]
}
