//! What mocks write, against what the bridge reports (E-1 to E-4).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use guest_programs::memory::PAGE;
use guest_programs::random::Random;
use vfio_bridge::{Bdf, DirtyBitmap, DirtyKnowledge, DirtyPages, DirtyRace, HostIommu, HostPaths};
use vtd::{MapOp, Perm, SpaceKey};

use crate::mock::{FIRST_IOVA, Kind};
use crate::rig::{PAGES, Rig, mapping, range, requester, space};

/// Pages of a space in which mappings come and go.
const SLOTS: u64 = 600;
const PAGE_SIZE: u64 = PAGE as u64;

/// All runs. A kernel with `larger_pages` does not say whether what it marks is mapped, so that only some of them tell.
pub fn run(steps: u32, larger_pages: bool) -> Result<()> {
    for race in [DirtyRace::Open, DirtyRace::Closed] {
        random_steps(race, steps, larger_pages)?;
    }
    if !larger_pages {
        page_sizes()?;
        what_is_written_last()?;
        nothing_is_lost_while_it_writes(steps)?;
    }
    one_that_cannot_tell()
}

fn knowledge(rig: &Rig, race: DirtyRace) -> Result<DirtyKnowledge> {
    let known = rig.bridge.dirty_start(None, race)?;
    known.iter().map(|(_, known)| *known).max().context("a function")
}

/// Numbers of pages.
fn numbers(pages: &DirtyPages) -> BTreeSet<u64> {
    let ranges = pages.ranges(PAGE_SIZE);
    ranges.iter().flat_map(|range| range.first / PAGE_SIZE..=range.last / PAGE_SIZE).collect()
}

/// What the first mock wrote since the last read, and how that is known.
fn read(rig: &Rig) -> Result<(BTreeSet<u64>, DirtyKnowledge)> {
    let read = rig.bridge.dirty_read(Some(requester(0)))?;
    Ok((numbers(&read.pages), read.known.first().context("a function")?.1))
}

/// One space as the guest has it: pages by the number of their slot.
#[derive(Default)]
struct Space {
    pages: BTreeMap<u64, (u64, Perm)>,
}

impl Space {
    fn live(&self) -> Vec<vtd::Mapping> {
        let page = |(slot, (gpa, perm)): (&u64, &(u64, Perm))| mapping(iova(*slot), *gpa, 1, *perm);
        self.pages.iter().map(page).collect()
    }
}

fn iova(slot: u64) -> u64 {
    FIRST_IOVA + slot * PAGE_SIZE
}

/// What can be dirty when the page in `slot` is written: that page, or all that one page of the kernel's can have
/// with it.
fn around(pages: &BTreeMap<u64, (u64, Perm)>, slot: u64, larger_pages: bool) -> BTreeSet<u64> {
    let (gpa, perm) = pages[&slot];
    let goes_on = |n: &u64| pages.get(&(slot + n)) == Some(&(gpa + n, perm));
    let goes_back = |n: &u64| *n <= slot.min(gpa) && pages.get(&(slot - n)) == Some(&(gpa - n, perm));
    let reach = if larger_pages { SLOTS } else { 0 };
    let after = (0..=reach).take_while(goes_on).map(|n| gpa + n);
    (0..=reach).take_while(goes_back).map(|n| gpa - n).chain(after).collect()
}

/// Maps, unmaps (which cut mappings), writes, moves to another space and reads, at random. Each read has exactly what
/// was written since the one before: no page less, and none that is read-only or was not written.
fn random_steps(race: DirtyRace, steps: u32, larger_pages: bool) -> Result<()> {
    let rig = Rig::new(&[Kind::default()])?;
    let mut random = Random::new(race as u64 + 11);
    let mut spaces = [Space::default(), Space::default()];
    let mut at = 0;
    let key = |at: usize| space(at as u16 + 1);
    rig.attach(0, &key(at), &[])?;
    ensure!(knowledge(&rig, race)? == DirtyKnowledge::Exact, "it is not known page by page");
    // Pages that were written since the last read, and what can be known to be.
    let (mut written, mut most) = (BTreeSet::new(), BTreeSet::new());
    let (mut reads, mut found_in_all, mut read_only) = (0, 0, 0);
    for step in 0..=steps {
        let pages = &mut spaces[at].pages;
        match if step == steps { 19 } else { random.below(20) } {
            0..6 => {
                let (slot, gpa) = (random.below(SLOTS as usize) as u64, random.below(PAGES as usize - 16) as u64);
                let most = 1 + random.below(16) as u64;
                let count = (slot..SLOTS).take(most as usize).take_while(|slot| !pages.contains_key(slot)).count();
                let perm = [Perm::ReadWrite, Perm::Read, Perm::Write][random.below(3)];
                if count > 0 {
                    rig.apply(&key(at), &[MapOp::Map(mapping(iova(slot), gpa, count as u64, perm))])?;
                    pages.extend((0..count as u64).map(|n| (slot + n, (gpa + n, perm))));
                }
            }
            6..9 => {
                let (slot, count) = (random.below(SLOTS as usize) as u64, 1 + random.below(40) as u64);
                rig.apply(&key(at), &[MapOp::Unmap(range(iova(slot), count))])?;
                pages.retain(|page, _| !(slot..slot + count).contains(page));
            }
            9..18 => {
                let slots: Vec<u64> = pages.keys().copied().collect();
                for _ in 0..4 {
                    let Some(slot) = slots.get(random.below(slots.len().max(1))) else { break };
                    let (gpa, perm) = pages[slot];
                    let wrote = rig.mocks[0].write(None, iova(*slot) + random.below(PAGE) as u64)?;
                    ensure!(wrote, "the kernel has no mapping at {:#x}", iova(*slot));
                    ensure!(
                        rig.mocks[0].reaches(None, iova(*slot), PAGE_SIZE, rig.memory.address(gpa as usize * PAGE)),
                        "the kernel's mapping at {:#x} leads elsewhere",
                        iova(*slot)
                    );
                    if perm.writable() {
                        written.insert(gpa);
                        most.extend(around(pages, *slot, larger_pages));
                    } else {
                        read_only += 1;
                    }
                }
            }
            18 => {
                // Now and then to the other, as it was when it was left.
                at = 1 - at;
                rig.attach(0, &key(at), &spaces[at].live())?;
            }
            _ => {
                let (found, known) = read(&rig)?;
                ensure!(known == DirtyKnowledge::Exact, "it is known as {}", known.name());
                ensure!(found.is_superset(&written), "lost: {:?}", written.difference(&found));
                ensure!(found.is_subset(&most), "never written: {:?}", found.difference(&most));
                (reads, found_in_all) = (reads + 1, found_in_all + found.len());
                written.clear();
                most.clear();
            }
        }
    }
    ensure!(found_in_all > 0 && read_only > 0, "nothing was written");
    println!(
        "dirty, {race:?}: {reads} reads have {found_in_all} pages, {read_only} writes to read-only ones are in none"
    );
    Ok(())
}

/// The backend alone: bitmaps of several page sizes, of a read and of an unmap.
fn page_sizes() -> Result<()> {
    let rig = Rig::new(&[Kind::default()])?;
    let (host, group) = (&rig.host, vfio_bridge::GroupId(0));
    let whole = range(FIRST_IOVA, 512);
    for size in [1024, PAGE_SIZE, 16 * PAGE_SIZE, 2 << 20] {
        for unmapped in [false, true] {
            let created = host.create()?;
            let mem = rig.guest.host_mem(0, 512 * PAGE_SIZE).context("memory")?;
            host.map(created, FIRST_IOVA, mem, Perm::ReadWrite)?;
            host.attach(group, created)?;
            host.dirty_start(created)?;
            let written = [0, 1, 17, 300, 511];
            for page in written {
                ensure!(rig.mocks[0].write(None, FIRST_IOVA + page * PAGE_SIZE + 3000)?, "not mapped");
            }
            let mut bitmap = DirtyBitmap::new(whole, size).context("a bitmap")?;
            if unmapped {
                let bytes = host.unmap_dirty(created, &mut bitmap, false)?;
                ensure!(bytes == 512 * PAGE_SIZE, "{bytes:#x} bytes were unmapped");
                ensure!(!rig.mocks[0].write(None, FIRST_IOVA)?, "it is still mapped");
            } else {
                host.dirty_read(created, &mut bitmap)?;
                let mut again = DirtyBitmap::new(whole, size).context("a bitmap")?;
                host.dirty_read(created, &mut again)?;
                ensure!(again.pages() == 0, "what was read is not clean");
            }
            for unit in (0..512 * PAGE_SIZE).step_by(1024) {
                // What a host page has is dirty in all of ours that it reaches into.
                let host_page = |page: &u64| unit / size == page * PAGE_SIZE / size || unit / PAGE_SIZE == *page;
                let (dirty, wanted) = (bitmap.is_dirty(FIRST_IOVA + unit), written.iter().any(host_page));
                ensure!(dirty == wanted, "{unit:#x} in pages of {size:#x}: {dirty} instead of {wanted}");
            }
            host.detach(group)?;
            host.destroy(created);
        }
        println!("dirty: a read and an unmap in pages of {size} bytes");
    }
    Ok(())
}

/// A device that writes in the last moment, before it is switched to a page table without what is unmapped.
fn what_is_written_last() -> Result<()> {
    let rig = Rig::new(&[Kind::default()])?;
    let (key, page) = (space(1), |n: u64| iova(2 * n));
    let live: Vec<_> = (0..8).map(|n| mapping(page(n), 10 + n, 1, Perm::ReadWrite)).collect();
    rig.attach(0, &key, &live)?;
    knowledge(&rig, DirtyRace::Closed)?;
    for n in 0..4 {
        rig.mocks[0].write_last(page(n));
        rig.apply(&key, &[MapOp::Unmap(range(page(n), 1))])?;
        ensure!(!rig.mocks[0].write(None, page(n))?, "it is still mapped");
        // Meanwhile it wrote to another one, too, which stays.
        ensure!(rig.mocks[0].write(None, page(n + 1))?, "what stays is gone");
        ensure!(read(&rig)?.0 == BTreeSet::from([10 + n, 11 + n]), "the last write to {n} is lost");
    }
    // The race may be left open from now on.
    rig.bridge.dirty_start(None, DirtyRace::Open)?;
    rig.apply(&key, &[MapOp::Unmap(range(page(4), 1))])?;
    ensure!(rig.mocks[0].write(None, page(6))? && read(&rig)?.0 == BTreeSet::from([16]), "it goes on");
    println!("dirty: what was written in the last moment of four unmaps is found");
    Ok(())
}

/// A device that writes without pause while its mappings come and go: with the race closed nothing of it is lost. Each
/// mapping has an IOVA and a page of its own, so that a write that came too late for one is not taken for one of the
/// next.
fn nothing_is_lost_while_it_writes(steps: u32) -> Result<()> {
    let rig = Rig::new(&[Kind::default()])?;
    let key = space(1);
    rig.attach(0, &key, &[])?;
    knowledge(&rig, DirtyRace::Closed)?;
    let count = u64::from(steps).min(PAGES);
    let (newest, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let (written, found) = thread::scope(|scope| -> Result<_> {
        let writer = scope.spawn(|| -> std::io::Result<BTreeSet<u64>> {
            let mut written = BTreeSet::new();
            while !done.load(Ordering::Acquire) {
                let page = newest.load(Ordering::Acquire);
                if rig.mocks[0].write(None, iova(page))? {
                    written.insert(page);
                }
            }
            Ok(written)
        });
        let mut found = BTreeSet::new();
        let work = (0..count).try_for_each(|page| -> Result<()> {
            newest.store(page, Ordering::Release);
            rig.apply(&key, &[MapOp::Map(mapping(iova(page), page, 1, Perm::Write))])?;
            thread::yield_now();
            rig.apply(&key, &[MapOp::Unmap(range(iova(page), 1))])?;
            found.append(&mut read(&rig)?.0);
            Ok(())
        });
        done.store(true, Ordering::Release);
        let written = writer.join().expect("no panic")?;
        work?;
        Ok((written, found))
    })?;
    ensure!(!written.is_empty() && found == written, "{written:?} were written, and {found:?} found");
    println!("dirty: {} of {count} mappings were written while they went: none is lost", written.len());
    Ok(())
}

/// How it is known what `function` writes: it does nothing itself here.
pub fn of_function(function: Bdf) -> Result<()> {
    let rig = Rig::new(&[])?;
    let checked = HostPaths::default().check_for_iommufd(function)?;
    let _open = rig.host.open(&checked)?;
    rig.bridge.register(requester(0), checked.group())?;
    rig.attach(0, &space(1), &[mapping(FIRST_IOVA, 3, 2, Perm::ReadWrite)])?;
    let known = knowledge(&rig, DirtyRace::Open)?;
    let all = if known == DirtyKnowledge::Exact { BTreeSet::new() } else { BTreeSet::from([3, 4]) };
    ensure!(read(&rig)? == (all, known), "what it wrote is not what can be known");
    println!("function: {}", known.name());
    Ok(())
}

/// A mock without dirty bits: all that it can write is dirty, also of one that came to a space of another that has
/// them.
fn one_that_cannot_tell() -> Result<()> {
    let rig = Rig::new(&[Kind::default(), Kind { no_dirty_bits: true, ..Kind::default() }])?;
    let key = space(1);
    let live = [mapping(FIRST_IOVA, 3, 2, Perm::ReadWrite), mapping(FIRST_IOVA + (8 << 12), 9, 1, Perm::Read)];
    rig.attach(1, &key, &live)?;
    rig.bridge.dirty_start(Some(requester(1)), DirtyRace::Open)?;
    for _ in 0..2 {
        let read = rig.bridge.dirty_read(Some(requester(1)))?;
        ensure!(numbers(&read.pages) == BTreeSet::from([3, 4]), "{:?}", numbers(&read.pages));
        ensure!(read.known == [(requester(1), DirtyKnowledge::CannotTell)], "{:?}", read.known);
    }
    // The one that can comes to it: who wrote what cannot be told apart.
    rig.attach(0, &key, &live)?;
    rig.bridge.dirty_start(Some(requester(0)), DirtyRace::Open)?;
    ensure!(read(&rig)? == (BTreeSet::from([3, 4]), DirtyKnowledge::CannotTell), "one of the two cannot tell");
    rig.attach(0, &SpaceKey::Blocked, &[])?;
    println!("dirty: a device without dirty bits has all dirty that it can write");
    Ok(())
}
