//! Assigned functions: from the store to the tail register until it returns, with a listener that does nothing.
//!
//! Each measured round maps and unmaps: the guest's page-table stores are part of it (some nanoseconds a page).

use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use vm_memory::{Bytes, GuestAddress};
use vtd::spec::registers::offset;
use vtd::{
    Applied, AttachRefused, MapOp, Mapping, Pasid, Perm, Requester, SpaceKey, SpaceListener, Unit, UnitConfig, UnitId,
};

#[path = "../tests/unit/rig.rs"]
mod rig;
use rig::{Messages, NVME, QUEUE, Rig, iotlb_domain, iotlb_pages, wait_status};

struct Deaf;

impl SpaceListener for Deaf {
    fn attach(
        &self,
        _: Requester,
        _: Option<Pasid>,
        _: &SpaceKey,
        _: &mut dyn Iterator<Item = Mapping>,
    ) -> Result<(), AttachRefused> {
        Ok(())
    }
    fn detach(&self, _: Requester, _: Option<Pasid>) {}
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
        rig.memory.store(entry, GuestAddress(entries + page * 8), std::sync::atomic::Ordering::Relaxed).unwrap();
    }
}

fn map_and_unmap(c: &mut Criterion, pages: u64, mask: u8, neighbours: u64) {
    let (mut rig, root) = rig();
    // Mappings that stay, so that the shadow is not empty.
    (0..neighbours).for_each(|page| rig.pages(root, 0x1000_0000 + page * 0x2000, 0x80_0000, 1));
    let iova = 0x4000_0000;
    let entries = rig.entry_address(root, 48, iova, 1);
    assert!(rig.submit(&[iotlb_domain(1)]));
    c.bench_function(&format!("psi/{pages}-pages-map-unmap/beside-{neighbours}"), |b| {
        b.iter(|| {
            set(&rig, entries, pages, 0x200_0003);
            assert!(rig.submit(&[iotlb_pages(1, iova, mask)]));
            set(&rig, entries, pages, 0);
            assert!(rig.submit(&[iotlb_pages(1, iova, mask)]));
        })
    });
    assert_eq!(rig.unit.stats().map_ops, rig.unit.stats().unmap_ops + neighbours);
}

fn selective(c: &mut Criterion) {
    map_and_unmap(c, 1, 0, 0);
    map_and_unmap(c, 32, 5, 0);
    map_and_unmap(c, 32, 5, 4096);
    map_and_unmap(c, 256, 8, 4096);
}

fn domain(c: &mut Criterion) {
    let (mut rig, root) = rig();
    rig.pages(root, 0x1000_0000, 0x100_0000, 8192);
    assert!(rig.submit(&[iotlb_domain(1)]));
    c.bench_function("domain-flush/8192-contiguous-pages-unchanged", |b| {
        b.iter(|| assert!(rig.submit(&[iotlb_domain(1)])))
    });
    (0..8192).for_each(|page| {
        rig.leaf(root, 48, 0x1000_0000 + page * 4096, 0x100_0000 + page * 8192, Some(Perm::ReadWrite), 1);
    });
    assert!(rig.submit(&[iotlb_domain(1)]));
    c.bench_function("domain-flush/8192-scattered-pages-unchanged", |b| {
        b.iter(|| assert!(rig.submit(&[iotlb_domain(1)])))
    });
}

/// 1 GiB of 4 KiB leaves that stay as they are: neighbours that lead to neighbours, and each to a place of its own.
fn re_sync(c: &mut Criterion) {
    for (name, stride) in [("contiguous", 4096), ("scattered", 8192)] {
        let (mut rig, root) = rig();
        for table in 0..512u64 {
            let iova = 0x4000_0000 + (table << 21);
            let entries = rig.entry_address(root, 48, iova, 1);
            (0..512u64)
                .for_each(|page| rig.store(entries + page * 8, (0x1_0000_0000 + (table * 512 + page) * stride) | 3));
        }
        assert!(rig.submit(&[iotlb_domain(1)]));
        c.bench_function(&format!("domain-flush/1-gib-{name}-unchanged"), |b| {
            b.iter(|| assert!(rig.submit(&[iotlb_domain(1)])))
        });
    }
}

/// One page of 65,536 scattered ones, another each time: as it was, or leading elsewhere.
fn one_page(c: &mut Criterion) {
    const PAGES: u64 = 65_536;
    let (mut rig, root) = rig();
    (0..PAGES).for_each(|page| {
        rig.leaf(root, 48, 0x4000_0000 + page * 4096, 0x1_0000_0000 + page * 8192, Some(Perm::ReadWrite), 1);
    });
    assert!(rig.submit(&[iotlb_domain(1)]));
    let entries: Vec<u64> =
        (0..PAGES / 512).map(|table| rig.entry_address(root, 48, 0x4000_0000 + (table << 21), 1)).collect();
    let mut page = 0;
    for (name, flipped) in [("unchanged", 0), ("changed", 1 << 40)] {
        c.bench_function(&format!("psi/one-page-of-65536-{name}"), |b| {
            b.iter(|| {
                page = (page + 40_503) % PAGES;
                let entry = entries[(page / 512) as usize] + page % 512 * 8;
                rig.store(entry, rig.load(entry) ^ flipped);
                assert!(rig.submit(&[iotlb_pages(1, 0x4000_0000 + page * 4096, 0)]));
            })
        });
    }
}

/// What an invalidation costs for emulated devices that have nothing of its domain.
fn endpoints(c: &mut Criterion) {
    for count in [1, 8, 32] {
        let (mut rig, _) = rig();
        rig.unit.remove_requester(NVME);
        let endpoints: Vec<_> = (0..count).map(|device| rig.unit.endpoint(rig::requester(2, device, 0))).collect();
        c.bench_function(&format!("psi/no-space-{count}-endpoints"), |b| {
            b.iter(|| assert!(rig.submit(&[iotlb_pages(1, 0x4000_0000, 0)])))
        });
        drop(endpoints);
    }
}

fn drain(c: &mut Criterion) {
    let (rig, _) = rig();
    // A full queue of waits: what a descriptor itself costs.
    for index in 0..256 {
        let (low, high) = wait_status(1);
        rig.store(QUEUE + index * 16, low);
        rig.store(QUEUE + index * 16 + 8, high);
    }
    let mut tail = 0;
    c.bench_function("drain/255-waits", |b| {
        b.iter(|| {
            tail = (tail + 255) % 256;
            rig.write64(offset::IQT, tail * 16);
        })
    });
    c.bench_function("register/read-gsts", |b| b.iter(|| rig.read32(offset::GSTS)));
}

criterion_group!(benches, selective, domain, re_sync, one_page, endpoints, drain);
criterion_main!(benches);
