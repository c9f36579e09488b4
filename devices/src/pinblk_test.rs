use vtd::SourceId;

use super::*;
use crate::Bus;
use crate::pci::PciRoot;
use crate::pci::config::{COMMAND_MASTER, COMMAND_MEMORY};
use crate::testing::FakeInterrupts;

const SID: SourceId = SourceId::new(0, 3, 0);
const BAR_GPA: u64 = 0xe000_0000;

type Done = Box<dyn FnOnce(bool) + Send>;

/// Remembers what it is asked for, and ends it when it is told.
#[derive(Default)]
struct FakeReads {
    begun: Mutex<Vec<Read>>,
    done: Mutex<Option<Done>>,
    stops: Mutex<u32>,
}

impl AsyncReads for FakeReads {
    fn begin(&self, read: Read, done: Done) {
        self.begun.lock().unwrap().push(read);
        assert!(self.done.lock().unwrap().replace(done).is_none());
    }
    fn stop(&self) {
        *self.stops.lock().unwrap() += 1;
    }
    fn end_for_good(&self) -> Result<(), String> {
        Err("it goes on".into())
    }
    fn arrived(&self) -> u64 {
        0x7000
    }
    fn pinned_pages(&self) -> u64 {
        5
    }
}

struct Bench {
    bus: Arc<Bus>,
    root: Arc<PciRoot>,
    interrupts: Arc<FakeInterrupts>,
    reads: Arc<FakeReads>,
    device: Arc<PinBlk>,
}

impl Bench {
    fn new() -> Self {
        let bus = Arc::new(Bus::default());
        let root = PciRoot::new(bus.clone());
        let (interrupts, reads) = (Arc::new(FakeInterrupts::default()), Arc::new(FakeReads::default()));
        let device = PinBlk::new(root.requester(SID), root.decoder(), interrupts.clone(), reads.clone());
        root.insert(SID, device.clone()).unwrap();
        let bench = Self { bus, root, interrupts, reads, device };
        bench.root.config_write(SID, 0x10, &(BAR_GPA as u32).to_le_bytes());
        bench.command(COMMAND_MEMORY | COMMAND_MASTER);
        bench.root.config_write(SID, 0x44, &0xfee0_0000u32.to_le_bytes());
        bench.root.config_write(SID, 0x4c, &[0x31, 0]);
        bench.root.config_write(SID, 0x42, &[1, 0]);
        bench
    }
    fn command(&self, value: u16) {
        self.root.config_write(SID, 4, &value.to_le_bytes());
    }
    fn read(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        let len = if matches!(offset, 0 | 0x20 | 0x24) { 4 } else { 8 };
        self.bus.read(BAR_GPA + offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }
    fn start(&self, iova: u64, offset: u64, len: u64) {
        for (register, value) in [(0x08, iova), (0x10, offset), (0x18, len)] {
            self.bus.write(BAR_GPA + register, &value.to_le_bytes());
        }
        self.bus.write(BAR_GPA + 0x20, &(COMMAND_START | COMMAND_IRQ).to_le_bytes());
    }
    fn status(&self) -> u32 {
        self.read(0x24) as u32
    }
    fn ends(&self, arrived: bool) {
        let done = self.reads.done.lock().unwrap().take();
        done.expect("one goes on")(arrived);
    }
    fn stops(&self) -> u32 {
        std::mem::take(&mut *self.reads.stops.lock().unwrap())
    }
}

#[test]
fn a_transfer_goes_on_until_its_end_is_told() {
    let bench = Bench::new();
    assert_eq!((bench.read(0), bench.read(0x28), bench.read(0x30)), (IDENTIFICATION.into(), 0x7000, 5));
    bench.start(0x10000, 0x3000, 0x2000);
    assert_eq!(*bench.reads.begun.lock().unwrap(), [Read { iova: Iova(0x10000), offset: 0x3000, len: 0x2000 }]);
    // Meanwhile nothing else begins, and no register changes.
    bench.start(0x20000, 0, 0x1000);
    assert_eq!((bench.status(), bench.read(0x08)), (STATUS_BUSY, 0x10000));
    assert_eq!(bench.interrupts.take(), []);
    bench.ends(true);
    assert_eq!((bench.status(), bench.interrupts.take().len()), (0, 1));
    bench.start(0x20000, 0, 0x1000);
    bench.ends(false);
    assert_eq!((bench.status(), bench.interrupts.take().len()), (STATUS_FAILED, 1));
}

#[test]
fn what_is_no_transfer_fails_at_once() {
    let bench = Bench::new();
    let wrong = [(1, 0, 0x1000), (0, 8, 0x1000), (0, 0, 0x1001), (0, 0, 0), (0, 0, MAX_LENGTH + 0x1000)];
    for (iova, offset, len) in wrong.into_iter().chain([(u64::MAX - 0xfff, 0, 0x1000), (u64::MAX - 0xfff, 0, 0x2000)]) {
        bench.start(iova, offset, len);
        assert_eq!(
            (bench.status(), bench.interrupts.take().len()),
            (STATUS_FAILED, 1),
            "{iova:#x} {offset:#x} {len:#x}"
        );
    }
    bench.command(COMMAND_MEMORY);
    bench.start(0, 0, 0x1000);
    assert_eq!((bench.status(), bench.interrupts.take().len()), (STATUS_FAILED, 0));
    assert!(bench.reads.begun.lock().unwrap().is_empty());
}

#[test]
fn rule12_bus_master_off_and_a_reset_end_what_is_in_flight() {
    let bench = Bench::new();
    bench.start(0, 0, 0x1000);
    bench.command(COMMAND_MEMORY);
    assert_eq!((bench.stops(), bench.status()), (1, STATUS_FAILED));
    bench.ends(true);
    assert_eq!((bench.status(), bench.interrupts.take()), (STATUS_FAILED, vec![]), "its end comes too late");
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    bench.start(0, 0, 0x1000);
    let above = |masters| bench.device.path_changed(&Path { masters, ..Path::of_root() });
    above(false);
    assert_eq!((bench.stops(), bench.status()), (1, STATUS_FAILED), "by a bridge above it");
    bench.start(0, 0, 0x1000);
    assert_eq!((bench.stops(), bench.status(), bench.interrupts.take()), (0, STATUS_FAILED, vec![]));
    bench.ends(true);
    assert_eq!(bench.interrupts.take(), []);
    above(true);
    bench.start(0, 0, 0x1000);
    bench.root.reset();
    assert_eq!(bench.stops(), 1);
    bench.ends(true);
    bench.root.config_write(SID, 0x10, &(BAR_GPA as u32).to_le_bytes());
    bench.command(COMMAND_MEMORY);
    assert_eq!((bench.status(), bench.read(0x18), bench.interrupts.take()), (0, 0, vec![]));
    assert!(bench.device.quarantine().is_err());
}
