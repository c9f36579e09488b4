//! Emulated DMA: a translation from the cache, one from the tables, and an access of a page.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use vtd::{Access, Iova};

#[path = "../tests/unit/rig.rs"]
mod rig;
use rig::{NVME, Rig};

fn translate(c: &mut Criterion) {
    let (mut rig, root) = Rig::with_nvme();
    rig.pages(root, 0x100_0000, 0x80_0000, 8192);
    let endpoint = rig.unit.endpoint(NVME);
    let session = endpoint.enter();
    c.bench_function("translate/hit", |b| b.iter(|| session.translate(black_box(Iova(0x100_0000)), Access::Read)));
    // Every access in another page, more of them than the cache has slots.
    let mut page = 0u64;
    c.bench_function("translate/walk", |b| {
        b.iter(|| {
            page = (page + 1) % 8192;
            session.translate(black_box(Iova(0x100_0000 + (page << 12))), Access::Read)
        })
    });
    drop(session);
    c.bench_function("session/enter", |b| b.iter(|| black_box(endpoint.enter())));
    let mut data = vec![0; 4096];
    c.bench_function("read/4k", |b| b.iter(|| endpoint.read(black_box(Iova(0x100_0000)), &mut data)));
}

criterion_group!(benches, translate);
criterion_main!(benches);
