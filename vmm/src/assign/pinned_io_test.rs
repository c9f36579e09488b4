use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;

use devices::virtio::blk::{Disk, IoFailed};
use vfio_bridge::{GuestMap, Quarantine, Software};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::{DomainId, Gpa, MapOp, Mapping, PagedSpace, SourceId, SpaceKey, SpaceListener, Tables, UnitId};

use super::*;
use crate::assign::disk::{DiskFile, FileDisk};

const DEVICE: Requester = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };
const RAM: u64 = 8 << 20;
/// Where RAM is for the device: 4 MiB that can be written, and as much that cannot.
const IOVA: u64 = 0x1_0000_0000;

struct NobodyStops;

impl Quarantine for NobodyStops {
    fn quarantine(&self, _: &[Requester], why: &str) -> Result<(), String> {
        panic!("a device is stopped: {why}")
    }
    fn stop_machine(&self, _: &[Requester], why: &str) {
        panic!("the machine is stopped: {why}")
    }
}

#[derive(Clone, Default)]
struct Blocked(Arc<Mutex<Vec<(u64, bool)>>>);

impl Requests for Blocked {
    fn blocked(&self, iova: Iova, write: bool) {
        self.0.lock().unwrap().push((iova.0, write));
    }
    fn message(&self, _: u64, _: u32) {}
}

struct Bench {
    memory: Arc<GuestMemoryMmap>,
    bridge: Arc<Bridge>,
    blocked: Blocked,
}

fn space() -> SpaceKey {
    let tables = Tables::Second { root: Gpa(0x1000), width: 48 };
    SpaceKey::Paged(PagedSpace { unit: UnitId(0), tables, domain: DomainId(1) })
}

fn bench() -> (Bench, PinnedIo) {
    bench_with(|_| None)
}

fn bench_with(look: impl FnOnce(&Arc<Bridge>) -> Option<Look>) -> (Bench, PinnedIo) {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap());
    let software = Arc::new(Software::default());
    let group = software.open();
    let guest = GuestMap::of_memory(memory.clone()).unwrap();
    let bridge = Arc::new(Bridge::new(vec![software], guest, Arc::new(NobodyStops)));
    bridge.register(DEVICE, group).unwrap();
    let blocked = Blocked::default();
    let io = PinnedIo::new(&bridge, DEVICE, 2, look(&bridge), Box::new(blocked.clone())).unwrap();
    let map = |half: u64, perm| Mapping { iova: Iova(IOVA + half), gpa: Gpa(half), len: RAM / 2, perm };
    let live = [map(0, Perm::ReadWrite), map(RAM / 2, Perm::Read)];
    bridge.attach(DEVICE.into(), &space(), &mut live.into_iter()).unwrap();
    (Bench { memory, bridge, blocked }, io)
}

impl Bench {
    fn put(&self, gpa: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(gpa)).unwrap();
    }
    fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }
}

fn part(iova: u64, len: u32) -> Part {
    Part { iova: IOVA + iova, len }
}

#[test]
fn d1_parts_are_pinned_while_the_call_lasts_and_joined_where_memory_is() {
    let (bench, io) = bench();
    let parts = [part(0xff0, 0x20), part(0x1010, 0x1000), part(0x2_0000, 0), part(0x2_0001, 2), part(0x2_0001, 2)];
    let lens = io.with(&parts, Perm::ReadWrite, |memory| {
        // Two pages, two pages, one page twice: four different ones.
        assert_eq!(io.client().stats().pinned_pages, 4);
        assert_eq!(
            bench.bridge.pinned(DEVICE),
            [(IOVA, 1), (IOVA + 0x1000, 2), (IOVA + 0x2000, 1), (IOVA + 0x2_0000, 2)]
        );
        memory.iter().map(|part| part.iov_len).collect::<Vec<_>>()
    });
    assert_eq!(lens, Ok(vec![0x1020, 2, 2]));
    assert_eq!((io.client().stats().pinned_pages, io.client().stats().pins), (0, 6));
}

#[test]
fn d1_what_the_guest_need_not_say_is_looked_at_before_it_is_pinned() {
    let looks = Arc::new(Mutex::new(Vec::new()));
    let (bench, io) = bench_with(|bridge| {
        let (bridge, looks) = (Arc::downgrade(bridge), looks.clone());
        Some(Box::new(move |ranges: &[IovaRange]| {
            looks.lock().unwrap().push(ranges.to_vec());
            // One page behind what is mapped, of those that are asked for.
            let page = Mapping { iova: Iova(IOVA + RAM), gpa: Gpa(0), len: PAGE_SIZE, perm: Perm::Read };
            assert!(bridge.upgrade().unwrap().apply(&space(), &[MapOp::Map(page)]).refused.is_empty());
        }))
    });
    let called = |parts: &[Part], access| io.with(parts, access, |_| ()).is_ok();
    let whole = |at: u64| IovaRange::new(IOVA + at, IOVA + at + 0xfff);
    assert!(called(&[part(8, 16), part(RAM + 8, 16)], Perm::Read));
    assert_eq!(*looks.lock().unwrap(), [[whole(0), whole(RAM)]]);
    // What is not found, or not for this access, is said, and nothing stays in flight.
    assert!(!called(&[part(RAM + 0x1000, 16)], Perm::Read));
    assert!(!called(&[part(RAM, 16)], Perm::Write));
    assert_eq!(*bench.blocked.0.lock().unwrap(), [(IOVA + RAM + 0x1000, false), (IOVA + RAM, true)]);
    assert_eq!(looks.lock().unwrap().len(), 3);
    let _ = bench.bridge.apply(&space(), &[MapOp::Unmap(IovaRange::ALL)]);
}

#[test]
fn d1_what_is_not_granted_is_not_pinned_and_said() {
    let (bench, io) = bench();
    let called = |parts: &[Part], access| io.with(parts, access, |_| ()).is_ok();
    assert!(called(&[part(RAM / 2, 16)], Perm::Read));
    assert!(!called(&[part(0, 16), part(RAM / 2, 16)], Perm::Write), "that half is read-only");
    assert!(!called(&[part(RAM - 1, 2)], Perm::Read), "it goes beyond the end");
    assert_eq!(*bench.blocked.0.lock().unwrap(), [(IOVA + RAM / 2, true), (IOVA + RAM, false)]);
    // More pages than a call may have, and what no address is for.
    assert!(called(&[part(0, 512 << 12)], Perm::Read));
    for parts in [&[part(1, 512 << 12)][..], &[part(0, 512 << 12), part(0, 1)], &[Part { iova: u64::MAX, len: 2 }]] {
        assert!(!called(parts, Perm::Read));
    }
    let stats = io.client().stats();
    assert_eq!((stats.pinned_pages, stats.refused, stats.left_pinned), (0, 2, 0));
}

#[test]
fn d3_an_unmap_waits_for_the_call_in_flight_and_none_begins() {
    let (bench, io) = bench();
    let ((begun, is_begun), (go, goes)) = (channel(), channel::<()>());
    thread::scope(|scope| {
        let io = &io;
        let call = scope.spawn(move || {
            io.with(&[part(0x3000, 8)], Perm::Write, |memory| {
                begun.send(()).unwrap();
                goes.recv().unwrap();
                // As the kernel does it, after the guest began to unmap.
                assert_eq!(memory.len(), 1);
                assert_eq!(io.client().stats().pinned_pages, 1);
            })
        });
        is_begun.recv().unwrap();
        let unmap = scope.spawn(|| bench.bridge.apply(&space(), &[MapOp::Unmap(IovaRange::ALL)]));
        while io.client().stats().notices == 0 {
            thread::yield_now();
        }
        assert!(!unmap.is_finished());
        go.send(()).unwrap();
        assert_eq!(call.join().unwrap(), Ok(()));
        assert_eq!(unmap.join().unwrap().refused, []);
    });
    let stats = io.client().stats();
    assert_eq!((stats.pinned_pages, stats.left_pinned, stats.late), (0, 0, 0));
    assert_eq!(io.with(&[part(0x3000, 8)], Perm::Write, |_| ()), Err(NotPinned));
}

#[test]
fn d3_an_unmap_waits_for_the_calls_there_alone() {
    let (bench, io) = bench();
    thread::scope(|scope| {
        let io = &io;
        let call = |at: u64| {
            let ((begun, is_begun), (go, goes)) = (channel(), channel::<()>());
            let call = scope.spawn(move || {
                io.with(&[part(at, 8)], Perm::Write, |_| {
                    begun.send(()).unwrap();
                    goes.recv().unwrap();
                })
            });
            is_begun.recv().unwrap();
            (go, call)
        };
        let ((here, here_ends), (there, there_ends)) = (call(0x3000), call(0x8000));
        assert_eq!(io.client().stats().pinned_pages, 2);
        let unmap = |at: u64| {
            let range = IovaRange::new(IOVA + at, IOVA + at + 0xfff);
            assert_eq!(bench.bridge.apply(&space(), &[MapOp::Unmap(range)]).refused, []);
        };
        // Where nobody is, and once one of two is over.
        unmap(0x5000);
        here.send(()).unwrap();
        here_ends.join().unwrap().unwrap();
        unmap(0x3000);
        let late = scope.spawn(move || unmap(0x8000));
        while io.client().stats().notices < 1 {
            thread::yield_now();
        }
        thread::sleep(std::time::Duration::from_millis(20));
        assert!(!late.is_finished(), "the other one is still under way");
        there.send(()).unwrap();
        there_ends.join().unwrap().unwrap();
        late.join().unwrap();
    });
    let stats = io.client().stats();
    assert_eq!((stats.pinned_pages, stats.left_pinned, stats.late), (0, 0, 0));
}

#[test]
fn what_is_behind_some_bytes_of_parts() {
    let mut memory = [1u8; 10];
    let at = memory.as_mut_ptr();
    let piece = |from: usize, len| libc::iovec { iov_base: at.wrapping_add(from).cast(), iov_len: len };
    for (bytes, wanted) in [
        (0, vec![(0, 3), (3, 1), (5, 4)]),
        (2, vec![(2, 1), (3, 1), (5, 4)]),
        (3, vec![(3, 1), (5, 4)]),
        (5, vec![(6, 3)]),
        (8, vec![]),
    ] {
        let mut parts = [piece(0, 3), piece(3, 1), piece(5, 4)];
        let left = advance(&mut parts, bytes);
        let left: Vec<_> = left.iter().map(|part| (part.iov_base as usize - at as usize, part.iov_len)).collect();
        assert_eq!(left, wanted, "{bytes}");
    }
}

/// A file with this content, that is removed.
struct Image(PathBuf);

impl Image {
    fn new(name: &str, content: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("causeway-disk-{name}-{}", std::process::id()));
        fs::write(&path, content).unwrap();
        Self(path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

#[test]
fn h4_a_file_is_read_written_and_cleared_where_it_is_asked_to_be() {
    let content: Vec<u8> = (0..4 << 20).map(|at: u32| (at / 512) as u8).collect();
    let image = Image::new("rw", &content);
    let (bench, io) = bench();
    let disk = FileDisk::new(DiskFile::open(&image.0, false).unwrap(), "a".into(), io);
    assert_eq!(disk.size(), 4 << 20);
    disk.read(512, &[part(0x100, 512), part(0x7f00, 1 << 20)]).unwrap();
    assert_eq!(
        (bench.get(0xff, 514), bench.get(0x7f00, 1 << 20)),
        ([&[0], &[1; 512][..], &[0]].concat(), content[1024..][..1 << 20].to_vec())
    );
    // What the host has in memory comes at once, where its file system can say so; else it is asked for again.
    if let Some(done) = disk.read_at_once(512, &[part(0x100, 512)]) {
        assert_eq!((done, bench.get(0x100, 512)), (Ok(()), vec![1; 512]));
    }
    bench.put(RAM / 2, &[0xab; 5000]);
    disk.write(1 << 20, &[part(RAM / 2, 4096), part(RAM / 2, 512)]).unwrap();
    disk.clear(2 << 20, 512, true).unwrap();
    disk.clear((2 << 20) + 1024, 4096, false).unwrap();
    disk.flush().unwrap();
    let mut wanted = content.clone();
    wanted[1 << 20..][..4608].fill(0xab);
    wanted[2 << 20..][..512].fill(0);
    wanted[(2 << 20) + 1024..][..4096].fill(0);
    assert!(fs::read(&image.0).unwrap() == wanted, "the file is another");
    // Not granted, and a file that became shorter.
    assert_eq!(disk.read(0, &[part(RAM / 2, 512)]), Err(IoFailed));
    fs::File::options().write(true).open(&image.0).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(disk.read((1 << 20) - 512, &[part(0, 1024)]), Err(IoFailed));
    assert_eq!(disk.read(0, &[part(0, 1024)]), Ok(()));
}

#[test]
fn h4_a_file_that_is_read_only_is_opened_so_and_what_is_none_is_refused() {
    let image = Image::new("ro", &[1; 1000]);
    let (_, io) = bench();
    let disk = FileDisk::new(DiskFile::open(&image.0, true).unwrap(), "a".into(), io);
    assert!(disk.is_read_only());
    assert_eq!(disk.write(0, &[part(0, 512)]), Err(IoFailed), "the descriptor does not let it");
    assert_eq!(fs::read(&image.0).unwrap(), [1; 1000]);
    fs::File::options().write(true).open(&image.0).unwrap().write_all_at(&[2], 999).unwrap();
    for path in ["/dev/null", "/nowhere", "/"] {
        assert!(DiskFile::open(path.as_ref(), true).is_err(), "{path}");
    }
    let short = Image::new("short", &[1; 511]);
    assert!(DiskFile::open(&short.0, false).is_err());
}
