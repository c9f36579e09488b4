//! Assigned functions: from the store to the tail register until it returns. The listener does nothing, so all of it is
//! the unit's, but for the guest's stores to its tables and its queue: `psi/guest-alone-..` is what these take.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use vtd::spec::registers::offset;
use vtd::{Applied, AttachRefused, MapOp, Mapping, Perm, SpaceKey, SpaceListener, Stream, Unit, UnitConfig, UnitId};

#[path = "../tests/unit/rig.rs"]
mod rig;
mod runner;
use rig::{Messages, NVME, QUEUE, Rig, STATUS, iotlb_domain, iotlb_pages, wait_status};
use runner::Runner;

struct Deaf;

impl SpaceListener for Deaf {
    fn attach(&self, _: Stream, _: &SpaceKey, _: &mut dyn Iterator<Item = Mapping>) -> Result<(), AttachRefused> {
        Ok(())
    }
    fn detach(&self, _: Stream) {}
    fn apply(&self, _: &SpaceKey, _: &[MapOp]) -> Applied {
        Applied::default()
    }
}

fn rig() -> (Rig, u64) {
    let (mut rig, root) = Rig::with_nvme();
    let config = UnitConfig::new(UnitId(0), 48);
    rig.unit = Unit::new(config, rig.memory.clone(), Arc::new(Deaf), Arc::new(Messages::default())).unwrap();
    rig.unit.add_requester(NVME).unwrap();
    rig.enable_queue();
    rig.enable_translation();
    (rig, root)
}

/// Writes the leaf entries of `pages` pages at once, as a guest's map and unmap do.
fn set(rig: &Rig, entries: u64, pages: u64, value: u64) {
    for page in 0..pages {
        let entry = if value == 0 { 0 } else { value + (page << 12) };
        rig.memory.store(entry, GuestAddress(entries + page * 8), Ordering::Relaxed).unwrap();
    }
}

/// `pages` pages at 1 GiB come and go, beside `neighbours` mappings that stay.
fn map_and_unmap(pages: u64, mask: u8, neighbours: u64) -> impl FnMut() {
    let (mut rig, root) = rig();
    (0..neighbours).for_each(|page| rig.pages(root, 0x1000_0000 + page * 0x2000, 0x80_0000, 1));
    let iova = 0x4000_0000;
    let entries = rig.entry_address(root, 48, iova, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    let mut round = move || {
        set(&rig, entries, pages, 0x200_0003);
        assert!(rig.submit(&[iotlb_pages(1, iova, mask)]));
        set(&rig, entries, pages, 0);
        assert!(rig.submit(&[iotlb_pages(1, iova, mask)]));
        (rig.unit.stats().map_ops, rig.unit.stats().unmap_ops)
    };
    assert_eq!(round(), (neighbours + 1, 1));
    move || {
        round();
    }
}

fn selective(runner: &mut Runner) {
    for (pages, mask, neighbours) in [(1, 0, 0), (32, 5, 0), (32, 5, 4096), (256, 8, 4096)] {
        let name = format!("psi/{pages}-pages-map-unmap/beside-{neighbours}");
        runner.operation(&name, || map_and_unmap(pages, mask, neighbours));
    }
}

fn domain(runner: &mut Runner) {
    for (kind, stride) in [("contiguous", 4096), ("scattered", 8192)] {
        runner.operation(&format!("domain-flush/8192-{kind}-pages-unchanged"), || {
            let (mut rig, root) = rig();
            (0..8192).for_each(|page| {
                rig.leaf(root, 48, 0x1000_0000 + page * 4096, 0x100_0000 + page * stride, Some(Perm::ReadWrite), 1);
            });
            assert!(rig.submit(&[iotlb_domain(1)]));
            move || assert!(rig.submit(&[iotlb_domain(1)]))
        });
    }
}

/// 1 GiB of 4 KiB leaves that stay as they are: neighbours that lead to neighbours, and each to a place of its own.
fn re_sync(runner: &mut Runner) {
    for (kind, stride) in [("contiguous", 4096), ("scattered", 8192)] {
        runner.operation(&format!("domain-flush/1-gib-{kind}-unchanged"), || {
            let (mut rig, root) = rig();
            for table in 0..512u64 {
                let entries = rig.entry_address(root, 48, 0x4000_0000 + (table << 21), 1);
                (0..512u64).for_each(|page| {
                    rig.store(entries + page * 8, (0x1_0000_0000 + (table * 512 + page) * stride) | 3);
                });
            }
            assert!(rig.submit(&[iotlb_domain(1)]));
            move || assert!(rig.submit(&[iotlb_domain(1)]))
        });
    }
}

/// One page of 65,536 scattered ones, another each time.
fn one_page(invalidate: impl Fn(&mut Rig, u64), flipped: u64) -> impl FnMut() {
    const PAGES: u64 = 65_536;
    let (mut rig, root) = rig();
    (0..PAGES).for_each(|page| {
        rig.leaf(root, 48, 0x4000_0000 + page * 4096, 0x1_0000_0000 + page * 8192, Some(Perm::ReadWrite), 1);
    });
    assert!(rig.submit(&[iotlb_domain(1)]));
    let entries: Vec<u64> =
        (0..PAGES / 512).map(|table| rig.entry_address(root, 48, 0x4000_0000 + (table << 21), 1)).collect();
    let mut page = 0;
    move || {
        page = (page + 40_503) % PAGES;
        let entry = entries[(page / 512) as usize] + page % 512 * 8;
        rig.store(entry, rig.load(entry) ^ flipped);
        invalidate(&mut rig, 0x4000_0000 + page * 4096);
    }
}

fn of_65536(runner: &mut Runner) {
    let submit = |rig: &mut Rig, iova: u64| assert!(rig.submit(&[iotlb_pages(1, iova, 0)]));
    // As it was, or leading elsewhere.
    runner.operation("psi/one-page-of-65536-unchanged", || one_page(submit, 0));
    runner.operation("psi/one-page-of-65536-changed", || one_page(submit, 1 << 40));
    // What `submit` does but for the tail register.
    let guest_alone = |rig: &mut Rig, iova: u64| {
        rig.store(STATUS, 0);
        rig.push(&[iotlb_pages(1, iova, 0), wait_status(1)]);
        assert_eq!(rig.load(STATUS), 0);
    };
    runner.operation("psi/guest-alone-one-page-of-65536", || one_page(guest_alone, 1 << 40));
}

/// What an invalidation costs for emulated devices that have nothing of its domain.
fn endpoints(runner: &mut Runner) {
    for count in [0, 1, 8, 32] {
        runner.operation(&format!("psi/no-space-{count}-endpoints"), || {
            let (mut rig, _) = rig();
            rig.unit.remove_requester(NVME);
            let endpoints: Vec<_> = (0..count).map(|device| rig.unit.endpoint(rig::requester(2, device, 0))).collect();
            move || {
                let _present = &endpoints;
                assert!(rig.submit(&[iotlb_pages(1, 0x4000_0000, 0)]));
            }
        });
    }
}

fn drain(runner: &mut Runner) {
    // A full queue of waits: what a descriptor itself costs.
    runner.operation("drain/255-waits", || {
        let (rig, _) = rig();
        for index in 0..256 {
            let (low, high) = wait_status(1);
            rig.store(QUEUE + index * 16, low);
            rig.store(QUEUE + index * 16 + 8, high);
        }
        let mut tail = 0;
        move || {
            tail = (tail + 255) % 256;
            rig.write64(offset::IQT, tail * 16);
        }
    });
    runner.operation("register/read-gsts", || {
        let (rig, _) = rig();
        move || {
            std::hint::black_box(rig.read32(offset::GSTS));
        }
    });
}

fn main() {
    let mut runner = Runner::new();
    for bench in [selective, domain, re_sync, of_65536, endpoints, drain] {
        bench(&mut runner);
    }
    runner.finish();
}
