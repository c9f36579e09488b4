//! What a batch of map operations costs besides the host's own time: the host here keeps no book and answers at once.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vfio_bridge::{
    Bridge, GroupId, GuestMap, HostIommu, HostMem, HostSpaceId, Limits, MapRefused, Placement, Quarantine, Region,
    UnmapRange,
};
use vtd::{
    DomainId, Gpa, Iova, IovaRange, MapOp, Mapping, PagedSpace, Perm, Requester, SourceId, SpaceKey, SpaceListener,
    Tables, UnitId,
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

/// Every other page is mapped wherever something is unmapped here.
const STRIDE: u64 = 8192;

/// Takes everything, and knows without a look what an unmap of this benchmark takes away.
struct Null;

impl HostIommu for Null {
    fn name(&self) -> &'static str {
        "null"
    }
    fn placement(&self, _: GroupId) -> Option<Placement> {
        Some(Placement::PerGroup(HostSpaceId(1)))
    }
    fn limits(&self, _: HostSpaceId) -> Limits {
        let all = IovaRange { first: 0, last: (1 << 48) - 1 };
        Limits { iova_ranges: vec![all], page_sizes: 4096, entries: 1 << 20, memlock: None, unmap_all: false }
    }
    fn map(&self, _: HostSpaceId, _: u64, _: HostMem<'_>, _: Perm) -> Result<(), MapRefused> {
        Ok(())
    }
    fn unmap(&self, _: HostSpaceId, range: UnmapRange) -> std::io::Result<u64> {
        match range {
            UnmapRange::Span { first, last } => Ok(((last - first) / STRIDE + 1) * 4096),
            UnmapRange::All => unreachable!("it is not offered"),
        }
    }
}

const SPACE: SpaceKey = SpaceKey::Paged(PagedSpace {
    unit: UnitId(0),
    tables: Tables::Second { root: Gpa(0x1000), width: 48 },
    domain: DomainId(1),
});
const REQUESTER: Requester = Requester { segment: 0, sid: SourceId::new(0, 1, 0) };

/// A bridge whose only container holds `held` pages, every other one from 4 GiB up.
fn bridge(held: u64) -> Bridge {
    // SAFETY: nobody uses the address.
    let ram = unsafe { Region::ram(0, 1 << 32, 1 << 45, None) }.expect("whole pages");
    let guest = GuestMap::new(vec![ram]).expect("one region");
    let bridge = Bridge::new(vec![Arc::new(Null)], guest, Arc::new(Never));
    bridge.register(REQUESTER, GroupId(1)).expect("new");
    let live = |page: u64| Mapping {
        iova: Iova((1 << 32) + page * STRIDE),
        gpa: Gpa((page % 1024) * 4096),
        len: 4096,
        perm: Perm::ReadWrite,
    };
    bridge.attach(REQUESTER.into(), &SPACE, &mut (0..held).map(live)).expect("attached");
    bridge
}

/// `count` pages that do not touch, below 4 GiB.
fn maps(count: u64) -> Vec<MapOp> {
    let page = |n: u64| Mapping { iova: Iova(n * STRIDE), gpa: Gpa(n * 4096), len: 4096, perm: Perm::ReadWrite };
    (0..count).map(|n| MapOp::Map(page(n))).collect()
}

fn unmaps(count: u64) -> Vec<MapOp> {
    (0..count).map(|n| MapOp::Unmap(IovaRange::new(n * STRIDE, n * STRIDE + 4095))).collect()
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
