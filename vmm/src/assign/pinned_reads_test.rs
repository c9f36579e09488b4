use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use super::*;
use vfio_bridge::{Bridge, GuestMap, PinLimits, Quarantine, Software};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::{Gpa, MapOp, Mapping, Requester, SourceId, SpaceKey, SpaceListener};

const DEVICE: Requester = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };
const RAM: u64 = 8 << 20;

/// Reads from memory, each part when it is let.
struct Gate {
    file: FileSource,
    asked: Mutex<Sender<u64>>,
    go: Mutex<Receiver<()>>,
}

impl Source for Gate {
    fn size(&self) -> u64 {
        self.file.size()
    }
    fn read(&self, pinned: &Pinned, skip: u64, offset: u64) -> io::Result<u64> {
        self.asked.lock().unwrap().send(offset).unwrap();
        self.go.lock().unwrap().recv().map_err(|_| io::ErrorKind::Other)?;
        self.file.read(pinned, skip, offset)
    }
}

/// Stops the device as [`crate::assign::quarantine`] does.
#[derive(Default)]
struct Stops {
    reads: Mutex<Weak<PinnedReads>>,
    machine: Mutex<Vec<String>>,
}

impl Quarantine for Stops {
    fn quarantine(&self, functions: &[Requester], _: &str) -> Result<(), String> {
        assert_eq!(functions, [DEVICE]);
        self.reads.lock().unwrap().upgrade().unwrap().end_for_good()
    }
    fn stop_machine(&self, _: &[Requester], why: &str) {
        self.machine.lock().unwrap().push(why.to_owned());
    }
}

#[derive(Default)]
struct Blocked(Arc<Mutex<Vec<u64>>>);

impl Requests for Blocked {
    fn blocked(&self, iova: Iova, write: bool) {
        assert!(write);
        self.0.lock().unwrap().push(iova.0);
    }
    fn message(&self, _: u64, _: u32) {}
}

struct Bench {
    memory: Arc<GuestMemoryMmap>,
    bridge: Arc<Bridge>,
    reads: Arc<PinnedReads>,
    stops: Arc<Stops>,
    blocked: Arc<Mutex<Vec<u64>>>,
}

/// A device in a space with its RAM at the address 0, too.
fn bench(source: Box<dyn Source>, deadline: Duration) -> Bench {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap());
    let (software, stops, blocked) = (Arc::new(Software::default()), Arc::new(Stops::default()), Blocked::default());
    let group = software.open();
    let guest = GuestMap::of_memory(memory.clone()).unwrap();
    let bridge = Arc::new(Bridge::new(vec![software], guest, stops.clone()));
    bridge.register(DEVICE, group).unwrap();
    let heard = blocked.0.clone();
    let limits = PinLimits { pages: PAGES, deadline };
    let register = |notifier| bridge.register_client(DEVICE, notifier, limits);
    let machine = stops.clone();
    let stop_machine = Box::new(move |why: &str| machine.stop_machine(&[DEVICE], why));
    let outside = Outside { requests: Box::new(blocked), deadline, stop_machine };
    let reads = PinnedReads::new(source, outside, register).unwrap();
    *stops.reads.lock().unwrap() = Arc::downgrade(&reads);
    let bench = Bench { memory, bridge, reads, stops, blocked: heard };
    let whole = Mapping { iova: Iova(0), gpa: Gpa(0), len: RAM, perm: Perm::ReadWrite };
    bench.bridge.attach(DEVICE.into(), &space(), &mut [whole].into_iter()).unwrap();
    bench
}

fn space() -> SpaceKey {
    let tables = vtd::Tables::Second { root: Gpa(0x1000), width: 48 };
    SpaceKey::Paged(vtd::PagedSpace { unit: vtd::UnitId(0), tables, domain: vtd::DomainId(1) })
}

impl Bench {
    fn begin(&self, iova: u64, offset: u64, len: u64) -> Receiver<bool> {
        let (tell, told) = channel();
        self.reads.begin(Read { iova: Iova(iova), offset, len }, Box::new(move |arrived| tell.send(arrived).unwrap()));
        told
    }
    fn unmap(&self) {
        let unmap = MapOp::Unmap(IovaRange::ALL);
        assert_eq!(self.bridge.apply(&space(), &[unmap]).refused, []);
    }
    fn word(&self, gpa: u64) -> u64 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }
}

const PATIENCE: Duration = Duration::from_secs(30);

fn gate() -> (Box<Gate>, Receiver<u64>, Sender<()>) {
    let ((asked, is_asked), (go, goes)) = (channel(), channel());
    let file = FileSource::in_memory().unwrap();
    (Box::new(Gate { file, asked: Mutex::new(asked), go: Mutex::new(goes) }), is_asked, go)
}

#[test]
fn d1_a_read_arrives_and_leaves_nothing_pinned() {
    let bench = bench(Box::new(FileSource::in_memory().unwrap()), PATIENCE);
    // Longer than the file, from its last page on.
    let told = bench.begin(0x1000, MEMORY_SIZE - PAGE_SIZE, 5 << 20);
    assert!(told.recv().unwrap());
    for at in (0..5 << 20).step_by(8) {
        let offset = (at + MEMORY_SIZE - PAGE_SIZE) % MEMORY_SIZE;
        assert_eq!(bench.word(0x1000 + at), offset + PATTERN);
    }
    assert_eq!((bench.word(0xff8), bench.word(0x50_1000)), (0, 0));
    let stats = bench.reads.client().stats();
    assert_eq!((stats.pinned_pages, stats.pins, bench.reads.arrived()), (0, 5 << 8, 5 << 20));
}

/// The target folder has a file system on a disk, which the folder for temporary files may not have.
#[test]
fn d1_a_direct_read_arrives_where_the_cached_one_does() {
    let exe = std::env::current_exe().unwrap();
    let file = vmm_sys_util::tempfile::TempFile::new_in(exe.parent().unwrap()).unwrap();
    let content: Vec<u8> = (0..1u64 << 18).flat_map(|word| word.to_le_bytes()).collect();
    // The last page is not whole: it is not read.
    file.as_file().write_all_at(&content, 0).unwrap();
    file.as_file().write_all_at(&[0xff; 100], content.len() as u64).unwrap();
    for direct in [false, true] {
        let bench = bench(Box::new(FileSource::open(file.as_path(), direct).unwrap()), PATIENCE);
        assert!(bench.begin(0x3000, 5 << 12, 3 << 20).recv().unwrap(), "direct: {direct}");
        for at in (0..3 << 20).step_by(8) {
            assert_eq!(bench.word(0x3000 + at), (at + (5 << 12)) % (1 << 21) / 8, "direct: {direct}");
        }
        assert_eq!((bench.word(0x2ff8), bench.word(0x3000 + (3 << 20))), (0, 0));
        assert_eq!((bench.reads.client().stats().pinned_pages, bench.reads.arrived()), (0, 3 << 20));
    }
}

#[test]
fn d1_what_cannot_be_pinned_is_told_and_ends_the_transfer() {
    let bench = bench(Box::new(FileSource::in_memory().unwrap()), PATIENCE);
    assert!(!bench.begin(RAM - 0x2000, 0, 0x4000).recv().unwrap());
    assert_eq!(*bench.blocked.lock().unwrap(), [RAM]);
    assert_eq!((bench.word(RAM - 0x2000), bench.reads.client().stats().pinned_pages), (0, 0));
    assert!(bench.begin(RAM - 0x2000, 0, 0x2000).recv().unwrap());
}

#[test]
fn d3_an_unmap_waits_for_the_reads_that_are_in_flight_and_none_begins() {
    let (source, asked, go) = gate();
    let bench = Arc::new(bench(source, PATIENCE));
    let told = bench.begin(0, 0, RAM);
    // All threads are in a read.
    let mut offsets: Vec<u64> = (0..WORKERS).map(|_| asked.recv().unwrap()).collect();
    offsets.sort_unstable();
    assert_eq!(offsets, [0, CHUNK, 2 * CHUNK, 3 * CHUNK]);
    assert_eq!(bench.reads.pinned_pages(), PAGES);
    let (unmapped, is_unmapped) = channel();
    let unmaps = thread::spawn({
        let bench = bench.clone();
        move || {
            bench.unmap();
            unmapped.send(bench.reads.pinned_pages()).unwrap();
        }
    });
    while bench.reads.client().stats().notices == 0 {
        thread::yield_now();
    }
    // All but one: it still waits.
    (1..WORKERS).for_each(|_| go.send(()).unwrap());
    while bench.reads.arrived() < 3 * CHUNK {
        thread::yield_now();
    }
    assert!(is_unmapped.try_recv().is_err() && bench.reads.pinned_pages() == CHUNK / PAGE_SIZE);
    go.send(()).unwrap();
    assert_eq!(is_unmapped.recv().unwrap(), 0);
    unmaps.join().unwrap();
    assert!(!told.recv().unwrap());
    assert_eq!(bench.reads.arrived(), 4 * CHUNK);
    assert!(bench.blocked.lock().unwrap().iter().all(|page| *page >= 4 * CHUNK));
    assert!(asked.try_recv().is_err() && bench.stops.machine.lock().unwrap().is_empty());
}

#[test]
fn d3_a_read_that_does_not_end_stops_the_machine() {
    let (source, asked, go) = gate();
    let bench = bench(source, Duration::from_millis(50));
    let told = bench.begin(0, 0, CHUNK);
    asked.recv().unwrap();
    bench.unmap();
    // The guest would be told only now, and does not run any more.
    assert_eq!(bench.stops.machine.lock().unwrap().len(), 1);
    assert_eq!((bench.reads.client().stats().late, bench.reads.client().stats().left_pinned), (1, CHUNK / PAGE_SIZE));
    // Nor does the end of the machine wait for it.
    bench.reads.stop();
    assert!(told.recv().is_err());
    drop(go);
}

#[test]
fn rule12_a_stop_that_a_read_outlives_stops_the_machine() {
    let (source, asked, go) = gate();
    let bench = bench(source, Duration::from_millis(50));
    let told = bench.begin(0, 0, CHUNK);
    asked.recv().unwrap();
    bench.reads.stop();
    assert_eq!(bench.stops.machine.lock().unwrap().len(), 1);
    // It is waited for once.
    bench.reads.stop();
    assert_eq!(bench.stops.machine.lock().unwrap().len(), 1);
    assert!(told.recv().is_err());
    drop(go);
}

#[test]
fn d3_a_stop_waits_for_what_is_in_flight() {
    let (source, asked, go) = gate();
    let bench = Arc::new(bench(source, PATIENCE));
    let told = bench.begin(0, 0, 2 * CHUNK);
    assert_eq!(asked.iter().take(2).count(), 2);
    let stops = thread::spawn({
        let bench = bench.clone();
        move || {
            bench.reads.stop();
            bench.reads.pinned_pages()
        }
    });
    assert!(told.recv().is_err(), "its end is told to nobody");
    assert!(!stops.is_finished());
    (0..2).for_each(|_| go.send(()).unwrap());
    assert_eq!(stops.join().unwrap(), 0);
    // It is used again.
    let told = bench.begin(0, 0, PAGE_SIZE);
    go.send(()).unwrap();
    assert!(told.recv().unwrap());
}
