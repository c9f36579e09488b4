//! DMA of a function that another process emulates: 4 KiB by the memory's file, and by message of a confined one. Both
//! ends are here, in threads of their own, with the sockets between them that processes have.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vfio_bridge::vfio_user::{ClientMemory, Served, UserEndpoint, UserOptions, VfioUser, serve};
use vfio_bridge::{Function, GuestMap, HostIommu, IrqKind, Placement, RegionKind};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::tempfile::TempFile;
use vtd::{Iova, Perm};

/// A function with nothing but DMA.
struct Nothing;

impl Served for Nothing {
    fn region_size(&self, _: RegionKind) -> u64 {
        0
    }
    fn irq_count(&self, _: IrqKind) -> u32 {
        0
    }
    fn read(&self, _: RegionKind, _: u64, _: &mut [u8]) {}
    fn write(&self, _: RegionKind, _: u64, _: &[u8]) {}
    fn set_irqs(&self, _: IrqKind, _: u32, _: Vec<Option<File>>) {}
    fn disable_irqs(&self, _: IrqKind) {}
    fn mask_intx(&self) {}
    fn unmask_intx(&self) {}
    fn reset(&self) {}
}

const PAGE: u64 = 4096;
const PAGES: u64 = 256;

fn dma(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dma_4k");
    group.throughput(Throughput::Bytes(PAGE));
    for (name, confined) in [("by_file", false), ("by_message", true)] {
        let file = TempFile::new().expect("a file").into_file();
        file.set_len(PAGES * PAGE).expect("room");
        let range = (GuestAddress(0), (PAGES * PAGE) as usize, Some(FileOffset::new(file, 0)));
        let ram = Arc::new(GuestMemoryMmap::<()>::from_ranges_with_files([range]).expect("memory"));
        let map = GuestMap::of_memory(ram).expect("a map");
        let (client, server) = UnixStream::pair().expect("sockets");
        let memory = Arc::new(ClientMemory::default());
        let thread = {
            let memory = memory.clone();
            std::thread::spawn(move || serve(&server, &Nothing, &memory))
        };
        let host = VfioUser::default();
        let options = UserOptions { confined, ..UserOptions::default() };
        let function = host.open_with(UserEndpoint::Connected(client.into()), name, options).expect("a server");
        let Some(Placement::PerGroup(space)) = host.placement(function.group()) else { unreachable!("it is open") };
        for page in 0..PAGES {
            let mem = map.host_mem(page * PAGE, PAGE).expect("RAM");
            host.map(space, (1 << 30) + 2 * page * PAGE, mem, Perm::ReadWrite).expect("mapped");
        }
        let (mut data, mut page) = (vec![0x5a; PAGE as usize], 0);
        let mut next = || {
            page = (page + 1) % PAGES;
            Iova((1 << 30) + 2 * page * PAGE)
        };
        group.bench_function(format!("write_{name}"), |bench| {
            bench.iter(|| memory.write(next(), &data).expect("mapped"));
        });
        group.bench_function(format!("read_{name}"), |bench| {
            bench.iter(|| memory.read(next(), &mut data).expect("mapped"));
        });
        drop(function);
        thread.join().expect("it does not panic").expect("an orderly end");
    }
    group.finish();
}

criterion_group!(benches, dma);
criterion_main!(benches);
