//! What a batch of map operations costs besides the host's own time: the model answers at once.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vfio_bridge::model::{Kernel, Model};
use vfio_bridge::{Bridge, GroupId, GuestMap, Quarantine, Region};
use vtd::{
    DomainId, Gpa, Iova, MapOp, Mapping, PagedSpace, Perm, Requester, SourceId, SpaceKey, SpaceListener, Stage, UnitId,
};

struct Never;

impl Quarantine for Never {
    fn quarantine(&self, _: &[Requester], why: &str) -> Result<(), String> {
        unreachable!("{why}")
    }
    fn stop_machine(&self, _: &[Requester], why: &str) {
        unreachable!("{why}")
    }
}

const SPACE: SpaceKey = SpaceKey::Paged(PagedSpace {
    unit: UnitId(0),
    root: Gpa(0x1000),
    width: 48,
    stage: Stage::Second,
    domain: DomainId(1),
});
const REQUESTER: Requester = Requester { segment: 0, sid: SourceId::new(0, 1, 0) };

/// A bridge whose only container holds `held` pages, every other one from 4 GiB up.
fn bridge(held: u64) -> Bridge {
    // SAFETY: the model never uses the address.
    let ram = unsafe { Region::ram(0, 1 << 32, 1 << 45, None) }.expect("whole pages");
    let guest = GuestMap::new(vec![ram]).expect("one region");
    let bridge = Bridge::new(Model::new(Kernel::new(48), &[GroupId(1)]), guest, Arc::new(Never));
    bridge.register(REQUESTER, GroupId(1)).expect("new");
    let live = |page: u64| Mapping {
        iova: Iova((1 << 32) + page * 8192),
        gpa: Gpa((page % 1024) * 4096),
        len: 4096,
        perm: Perm::ReadWrite,
    };
    bridge.attach(REQUESTER, None, &SPACE, &mut (0..held).map(live)).expect("attached");
    bridge
}

/// `count` pages that do not touch, below 4 GiB.
fn maps(count: u64) -> Vec<MapOp> {
    let page = |n: u64| Mapping { iova: Iova(n * 8192), gpa: Gpa(n * 4096), len: 4096, perm: Perm::ReadWrite };
    (0..count).map(|n| MapOp::Map(page(n))).collect()
}

fn unmaps(count: u64) -> Vec<MapOp> {
    (0..count).map(|n| MapOp::Unmap { first: Iova(n * 8192), last: Iova(n * 8192 + 4095) }).collect()
}

fn apply(c: &mut Criterion) {
    for held in [0, 16_384] {
        let bridge = bridge(held);
        let mut group = c.benchmark_group(format!("apply/{held}-held"));
        for count in [1, 32, 512] {
            group.throughput(Throughput::Elements(count));
            let (maps, unmaps) = (maps(count), unmaps(count));
            group.bench_function(BenchmarkId::new("map", count), |b| {
                b.iter_batched(
                    || drop(bridge.apply(&SPACE, &unmaps)),
                    |()| black_box(bridge.apply(&SPACE, &maps)),
                    BatchSize::PerIteration,
                );
            });
            group.bench_function(BenchmarkId::new("unmap", count), |b| {
                b.iter_batched(
                    || drop(bridge.apply(&SPACE, &maps)),
                    |()| black_box(bridge.apply(&SPACE, &unmaps)),
                    BatchSize::PerIteration,
                );
            });
            bridge.apply(&SPACE, &unmaps);
        }
        group.finish();
    }
}

criterion_group!(benches, apply);
criterion_main!(benches);
