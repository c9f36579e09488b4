//! What a function that another process emulates wrote, as that process and its client know it: E-1, E-2, E-4.

use std::collections::BTreeSet;

use vfio_bridge::{DirtyBitmap, DirtyKnowledge, HostIommu, UnmapWindow};
use vtd::{Iova, IovaRange, Perm};

use super::rig::{PATIENT, Rig, serving};

const PAGE: u64 = 4096;

fn range(first: u64, pages: u64) -> IovaRange {
    IovaRange { first, last: first + pages * PAGE - 1 }
}

fn pages(bitmap: &DirtyBitmap) -> Vec<u64> {
    bitmap.ranges(bitmap.range()).flat_map(|r| (r.first..=r.last).step_by(PAGE as usize)).collect()
}

fn read(rig: &Rig, of: IovaRange) -> Vec<u64> {
    let mut bitmap = DirtyBitmap::new(of, PAGE).unwrap();
    rig.host.dirty_read(rig.space(), &mut bitmap).unwrap();
    pages(&bitmap)
}

fn unmap(rig: &Rig, of: IovaRange) -> Vec<u64> {
    let mut bitmap = DirtyBitmap::new(of, PAGE).unwrap();
    assert_eq!(rig.host.unmap_dirty(rig.space(), &mut bitmap, false).unwrap(), of.last - of.first + 1);
    pages(&bitmap)
}

#[test]
fn e1_what_a_process_writes_is_known_page_by_page() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    rig.map(0x10_0000, 0, 8 * PAGE, Perm::ReadWrite).unwrap();
    rig.map(0x20_0000, 8 * PAGE, 8 * PAGE, Perm::Read).unwrap();
    let mut bitmap = DirtyBitmap::new(range(0x10_0000, 8), PAGE).unwrap();
    assert!(rig.host.dirty_read(rig.space(), &mut bitmap).is_err(), "nobody asked for it");
    serving.memory.write(Iova(0x10_0000), &[1]).unwrap();
    let support = rig.host.dirty_start(rig.space()).unwrap();
    assert_eq!((support.knowledge, support.window), (DirtyKnowledge::Exact, UnmapWindow::Lost));
    assert_eq!(read(&rig, range(0x10_0000, 8)), [0u64; 0], "it was before");
    serving.memory.write(Iova(0x10_1ffe), &[1; 4]).unwrap();
    serving.memory.read(Iova(0x20_0000), &mut [0; 4]).unwrap();
    assert!(serving.memory.write(Iova(0x20_0000), &[1; 4]).is_err());
    assert_eq!(read(&rig, IovaRange { first: 0x10_0000, last: 0x20_7fff }), [0x10_1000, 0x10_2000]);
    assert_eq!(read(&rig, range(0x10_0000, 8)), [0u64; 0]);
    serving.memory.write(Iova(0x10_7fff), &[1]).unwrap();
    assert_eq!(unmap(&rig, range(0x10_0000, 8)), [0x10_7000]);
    // What comes at the same IOVA is clean.
    rig.map(0x10_0000, 16 * PAGE, 8 * PAGE, Perm::ReadWrite).unwrap();
    assert_eq!(read(&rig, range(0x10_0000, 8)), [0u64; 0]);
    rig.host.dirty_stop(rig.space());
    serving.memory.write(Iova(0x10_0000), &[1]).unwrap();
    assert!(rig.host.dirty_read(rig.space(), &mut bitmap).is_err());
    drop(rig);
    serving.thread.join().unwrap().unwrap();
}

/// A process writes without pause while its mappings come and go: each write that was carried out is in a read or in
/// an unmap, and nothing else is.
#[test]
fn e4_no_write_of_a_process_is_lost_while_mappings_come_and_go() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    rig.host.dirty_start(rig.space()).unwrap();
    let memory = serving.memory.clone();
    let done = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let over = done.clone();
    // A window of pages that are mapped once each, so that a write at one of them is reported once at least.
    let writer = std::thread::spawn(move || {
        let mut written = BTreeSet::new();
        let mut at = 0u64;
        while !over.load(std::sync::atomic::Ordering::Acquire) {
            at = (at + 37) % 200;
            let iova = 0x100_0000 + at * PAGE;
            if memory.write(Iova(iova), &[1]).is_ok() {
                written.insert(iova);
            }
        }
        written
    });
    let mut found = BTreeSet::new();
    for round in 0..200u64 {
        let of = range(0x100_0000 + round * PAGE, 1);
        rig.map(of.first, round % 64 * PAGE, PAGE, Perm::ReadWrite).unwrap();
        found.extend(read(&rig, of));
        std::thread::yield_now();
        found.extend(unmap(&rig, of));
    }
    done.store(true, std::sync::atomic::Ordering::Release);
    assert_eq!(writer.join().unwrap(), found);
    drop(rig);
    serving.thread.join().unwrap().unwrap();
}
