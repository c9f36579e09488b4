//! How often a request of an emulated device looks into guest memory: the part of what it costs that is the same
//! whatever the machine and the compiler (rules 6 and 7). Instructions are counted by `cargo xtask bench`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend};
use vtd::spec::registers::{Global, offset};
use vtd::{Access, Iova, Perm, Unit};

use crate::nested::offered;
use crate::pasid_tables::{first_stage, nested};
use crate::rig::{Listener, Memory, Messages, NVME, Rig};

/// Guest memory that counts how often something is looked for in it.
#[derive(Clone)]
struct Counted {
    inner: Memory,
    times: Arc<AtomicU64>,
}

impl GuestMemoryBackend for Counted {
    type R = <Memory as GuestMemoryBackend>::R;

    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        self.times.fetch_add(1, Ordering::Relaxed);
        self.inner.find_region(addr)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.times.fetch_add(1, Ordering::Relaxed);
        self.inner.iter()
    }
}

const IOVA: u64 = 0x4000_0000;

/// How often NVME's requests look into memory: one to `IOVA`, one to the page behind it, and that one again.
fn times(rig: &Rig) -> [u64; 3] {
    let times = Arc::new(AtomicU64::new(0));
    let memory = Counted { inner: rig.memory.clone(), times: times.clone() };
    let unit = Unit::new(*rig.unit.config(), memory, Arc::new(Listener::default()), Arc::new(Messages::default()));
    let unit = unit.unwrap();
    unit.write(offset::RTADDR, &(rig.root_table | rig.table_mode << 10).to_le_bytes());
    let on = Global::new();
    for command in [on.with_root_table_pointer(true), on.with_translation(true)] {
        unit.write(offset::GCMD, &command.into_bits().to_le_bytes());
    }
    let endpoint = unit.endpoint(NVME);
    [IOVA, IOVA + 0x1000, IOVA + 0x1000].map(|iova| {
        times.store(0, Ordering::Relaxed);
        endpoint.enter().translate(Iova(iova), Access::Read).unwrap();
        times.load(Ordering::Relaxed)
    })
}

/// A first stage of four levels, whose addresses are `up` of those of memory, with two pages at `IOVA`; its root.
fn first_stage_of(rig: &mut Rig, up: u64) -> u64 {
    let tables = [0; 4].map(|_| rig.table());
    for (level, pair) in (2..=4u32).rev().zip(tables.windows(2)) {
        rig.store(pair[0] + (IOVA >> (12 + 9 * (level - 1)) & 511) * 8, (pair[1] + up) | 0x27);
    }
    for page in 0..2 {
        rig.store(tables[3] + ((IOVA >> 12 & 511) + page) * 8, (0x80_0000 + (page << 12) + up) | 0x67);
    }
    tables[0]
}

#[test]
fn rule7_a_miss_of_a_second_stage_reads_one_entry_and_a_hit_none() {
    let (mut rig, root) = Rig::with_nvme();
    (0..2).for_each(|page| {
        rig.leaf(root, 48, IOVA + (page << 12), 0x80_0000 + (page << 12), Some(Perm::ReadWrite), 1);
    });
    // The root entry, the context entry, and four levels.
    assert_eq!(times(&rig), [6, 1, 0]);
}

#[test]
fn rule7_a_miss_of_a_first_stage_reads_one_entry_and_a_hit_none() {
    let mut rig = Rig::scalable(offered());
    let root = first_stage_of(&mut rig, 0);
    rig.set_entry(NVME, 0, first_stage(root, 4, 1));
    // The root entry, the context entry, those of the PASID, and four levels.
    assert_eq!(times(&rig), [8, 1, 0]);
}

#[test]
fn rule7_a_miss_of_two_stages_reads_one_entry_of_each_and_a_hit_none() {
    const UP: u64 = 1 << 32;
    let mut rig = Rig::scalable(offered());
    let root = first_stage_of(&mut rig, UP);
    let second = rig.table();
    rig.pages(second, UP, 0, 0x100_0000 >> 12);
    rig.set_entry(NVME, 0, nested(root + UP, second, 48, 1));
    // The same four of the requester, and four levels. Four of the other stage lead to the first of these and to the
    // page; the upper ones are cached then, so one leads to each of the others.
    assert_eq!(times(&rig), [4 + 4 + 4 + 3 + 4, 2, 0]);
}
