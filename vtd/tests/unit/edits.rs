//! A guest whose other processor edits the tables at any moment of a drain: what a walk found a moment ago is not what
//! the next one finds (rule 5).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vtd::spec::registers::{Global, offset};
use vtd::spec::root_context::{ContextEntryHigh, ContextEntryLow, RootEntryLow};
use vtd::{Bounds, SpaceView, Unit, UnitConfig, UnitId};

use crate::rig::{
    Listener, MEMORY, Memory, Messages, NVME, QUEUE, STATUS, iotlb_domain, iotlb_pages, joined, wait_status,
};

type Edit = Box<dyn FnMut(&Memory) + Send>;

/// Guest memory that is edited when a certain address is looked up, or at the nth look-up.
#[derive(Clone)]
struct Edited {
    inner: Memory,
    at: Arc<AtomicU64>,
    countdown: Arc<AtomicU64>,
    edit: Arc<Mutex<Option<Edit>>>,
}

impl GuestMemoryBackend for Edited {
    type R = <Memory as GuestMemoryBackend>::R;

    fn find_region(&self, addr: GuestAddress) -> Option<&Self::R> {
        let left = self.countdown.load(Ordering::Relaxed);
        self.countdown.store(left.saturating_sub(1), Ordering::Relaxed);
        if (addr.0 == self.at.load(Ordering::Relaxed) || left == 1)
            && let Some(mut edit) = self.edit.lock().unwrap().take()
        {
            edit(&self.inner);
        }
        self.inner.find_region(addr)
    }

    fn iter(&self) -> impl Iterator<Item = &Self::R> {
        self.inner.iter()
    }
}

const ROOT: u64 = 0x20_0000;
const CONTEXT: u64 = 0x20_1000;
/// A table of each level, 4 to 1: they cover the first 2 MiB.
const TABLES: [u64; 4] = [0x20_2000, 0x20_3000, 0x20_4000, 0x20_5000];

/// Where the leaf of a page is.
const fn entry(iova: u64) -> u64 {
    TABLES[3] + (iova >> 12) * 8
}

struct World {
    unit: Arc<Unit<Edited>>,
    memory: Edited,
    listener: Arc<Listener>,
    tail: u64,
    status: u32,
}

impl World {
    fn new(bounds: Bounds) -> Self {
        let inner = Memory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let memory = Edited { inner, at: Arc::new(AtomicU64::new(1)), countdown: Arc::default(), edit: Arc::default() };
        let listener = Arc::new(Listener::default());
        let config = UnitConfig { bounds, ..UnitConfig::new(UnitId(0), 48) };
        let unit = Unit::new(config, memory.clone(), listener.clone(), Arc::new(Messages::default())).unwrap();
        let world = Self { unit, memory, listener, tail: 0, status: 0 };
        let root = RootEntryLow::new().with_present(true).with_context_table(CONTEXT >> 12);
        world.store(ROOT + u64::from(NVME.sid.bus()) * 16, root.into_bits());
        let context = CONTEXT + u64::from(NVME.sid.devfn()) * 16;
        world.store(context + 8, ContextEntryHigh::new().with_address_width(2).with_domain(1).into_bits());
        let low = ContextEntryLow::new().with_present(true).with_second_stage(TABLES[0] >> 12);
        world.store(context, low.into_bits());
        TABLES.windows(2).for_each(|pair| world.store(pair[0], pair[1] | 3));
        world.unit.write(offset::RTADDR, &ROOT.to_le_bytes());
        world.unit.write(offset::IQA, &QUEUE.to_le_bytes());
        let on = Global::new().with_queued_invalidation(true);
        for command in [on, on.with_root_table_pointer(true), on.with_translation(true)] {
            world.unit.write(offset::GCMD, &command.into_bits().to_le_bytes());
        }
        world.unit.add_requester(NVME).unwrap();
        world.listener.take_events();
        world
    }

    fn store(&self, at: u64, value: u64) {
        self.memory.inner.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Makes `edit` happen when `at` is looked up.
    fn edit_at(&self, at: u64, edit: impl FnMut(&Memory) + Send + 'static) {
        self.memory.at.store(at, Ordering::Relaxed);
        *self.memory.edit.lock().unwrap() = Some(Box::new(edit));
    }

    /// Whether the edit has happened; if not, it will not.
    fn edited(&self) -> bool {
        self.memory.edit.lock().unwrap().take().is_none()
    }

    fn submit(&mut self, descriptors: &[(u64, u64)]) {
        self.status += 1;
        for (low, high) in descriptors.iter().copied().chain([wait_status(self.status)]) {
            self.store(QUEUE + self.tail * 16, low);
            self.store(QUEUE + self.tail * 16 + 8, high);
            self.tail = (self.tail + 1) % 256;
        }
        self.unit.write(offset::IQT, &(self.tail * 16).to_le_bytes());
        let status: u32 = self.memory.inner.read_obj(GuestAddress(STATUS)).unwrap();
        assert_eq!(status, self.status, "the wait is complete");
    }

    fn view(&self) -> SpaceView {
        self.unit.spaces_snapshot().remove(0)
    }

    fn reaches(&self, iova: u64) -> bool {
        self.listener.reach(NVME).iter().any(|m| m.iova.0 <= iova && m.last().0 >= iova)
    }
}

#[test]
fn rule5_a_space_that_is_blocked_between_two_ranges_of_a_batch_stays_empty() {
    let mut world = World::new(Bounds { shadow_entries: 4, ..Bounds::default() });
    for iova in [0, 0x2000, 0x4000, 0x6000, 0x1_0000, 0x1_2000, 0x1_4000, 0x1_6000] {
        world.store(entry(iova), 0x80_0003);
    }
    // Page 0x14000 goes after the second range was walked, and before the third one, which has it, too, is.
    world.edit_at(entry(0x1_4000), |memory| memory.write_obj(0u64, GuestAddress(entry(0x1_4000))).unwrap());
    world.submit(&[iotlb_pages(1, 0, 3), iotlb_pages(1, 0x1_0000, 4), iotlb_pages(1, 0x1_4000, 2)]);
    assert!(world.edited());
    let view = world.view();
    assert!(view.blocked && view.extents.is_empty() && world.listener.reach(NVME).is_empty(), "{view:x?}");
    // A page that goes is not reached, whatever became of the space.
    world.store(entry(0x1_6000), 0);
    world.submit(&[iotlb_pages(1, 0x1_6000, 0)]);
    assert!(!world.reaches(0x1_6000), "{:x?}", world.listener.reach(NVME));
    // One look at everything that fits opens it again.
    [0x1_0000, 0x1_2000].iter().for_each(|iova| world.store(entry(*iova), 0));
    world.submit(&[iotlb_domain(1)]);
    let view = world.view();
    assert!(!view.blocked && view.extents.len() == 4, "{view:x?}");
}

#[test]
fn rule5_a_guest_that_changes_its_mind_in_the_middle_of_a_batch_has_what_it_said_last() {
    let mut world = World::new(Bounds::default());
    [0x1_0000, 0x1_4000].iter().for_each(|iova| world.store(entry(*iova), 0x80_0003));
    // The first range maps both pages; the second one finds one of them changed.
    world.edit_at(entry(0x1_4000), |memory| memory.write_obj(0x90_0003u64, GuestAddress(entry(0x1_4000))).unwrap());
    world.submit(&[iotlb_pages(1, 0x1_0000, 4), iotlb_pages(1, 0x1_4000, 2)]);
    assert!(world.edited());
    let reach: Vec<_> = world.listener.reach(NVME).iter().map(|m| (m.iova.0, m.gpa.0)).collect();
    assert_eq!(reach, [(0x1_0000, 0x80_0000), (0x1_4000, 0x90_0000)]);
    assert_eq!(world.view().extents, world.listener.reach(NVME), "the shadow is what was told");
}

/// The listener checks the order of what it is told; afterwards a page that is taken away with its own invalidation is
/// gone, and a blocked space is empty.
#[test]
fn rule5_edits_in_the_middle_of_drains_leave_no_stale_page() {
    const PAGES: u64 = 48;
    let long = std::env::var_os("CAUSEWAY_LONG").is_some();
    let end = Instant::now() + Duration::from_secs(if long { 60 } else { 2 });
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut next = move |n: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) % n
    };
    let (mut rounds, mut edits, mut blocked) = (0u64, 0u64, 0u64);
    // So that both outcomes are there, however slow the machine is.
    while Instant::now() < end || blocked < 5 || edits < 20 {
        let narrow = Bounds { shadow_entries: 12, ..Bounds::default() };
        let mut world = World::new(if next(4) != 0 { narrow } else { Bounds::default() });
        for _ in 0..60 {
            for _ in 0..next(12) {
                let value = if next(3) == 0 { 0 } else { (0x80_0000 + (next(4) << 12)) | (1 + next(3)) };
                world.store(entry(next(PAGES) << 12), value);
            }
            let stores: Vec<(u64, u64)> = (0..1 + next(8))
                .map(|_| (entry(next(PAGES) << 12), if next(2) == 0 { 0 } else { (0x80_0000 + (next(4) << 12)) | 3 }))
                .collect();
            // At no address, but at one of the first look-ups: a descriptor is one, a walk four.
            world.edit_at(1, move |memory| {
                stores.iter().for_each(|(at, value)| memory.write_obj(*value, GuestAddress(*at)).unwrap());
            });
            let descriptors: Vec<_> =
                (0..1 + next(6)).map(|_| iotlb_pages(1, next(PAGES) << 12, next(6) as u8)).collect();
            world.memory.countdown.store(1 + next(30), Ordering::Relaxed);
            world.submit(&descriptors);
            world.memory.countdown.store(0, Ordering::Relaxed);
            edits += u64::from(world.edited());
            let view = world.view();
            blocked += u64::from(view.blocked);
            assert!(!view.blocked || view.extents.is_empty(), "{view:x?}");
            assert_eq!(joined(view.extents.iter().copied()), world.listener.reach(NVME), "the shadow is what was told");
            let page = next(PAGES) << 12;
            world.store(entry(page), 0);
            world.submit(&[iotlb_pages(1, page, 0)]);
            assert!(!world.reaches(page), "{page:#x} is stale: {:x?}", world.listener.reach(NVME));
            if next(4) == 0 || view.blocked {
                // With room again for what is left.
                (0..PAGES).filter(|_| view.blocked && next(2) == 0).for_each(|page| world.store(entry(page << 12), 0));
                world.submit(&[iotlb_domain(1)]);
                let view = world.view();
                if !view.blocked {
                    assert_eq!(world.unit.walk(&view.key).map(joined), Some(world.listener.reach(NVME)));
                }
            }
            rounds += 1;
        }
    }
    println!("{rounds} rounds, {edits} edits in a drain, {blocked} times blocked");
}
