use std::sync::mpsc::{Receiver, Sender, channel};

use vtd::SourceId;

use super::*;
use crate::Bus;
use crate::dma::{DirectMemory, DmaFailed};
use crate::pci::PciRoot;
use crate::pci::config::{COMMAND_MASTER, COMMAND_MEMORY};
use crate::testing::{FakeInterrupts, FakeLine};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(super) const SID: SourceId = SourceId::new(0, 3, 0);
const BAR_GPA: u64 = 0xe000_0000;

pub(super) struct Bench {
    bus: Arc<Bus>,
    pub(super) root: Arc<PciRoot>,
    interrupts: Arc<FakeInterrupts>,
    line: Arc<FakeLine>,
}

impl Bench {
    fn with(dma: Box<dyn DmaTarget>) -> Self {
        Self::with_features(dma, Features::default())
    }
    pub(super) fn with_features(dma: Box<dyn DmaTarget>, features: Features) -> Self {
        let bus = Arc::new(Bus::default());
        let root = PciRoot::new(bus.clone());
        let (interrupts, line) = (Arc::new(FakeInterrupts::default()), Arc::new(FakeLine::default()));
        let intx: Option<(Arc<dyn IrqLine>, u8)> = Some((line.clone(), 19));
        let (requester, decoder) = (root.requester(SID), root.decoder());
        let edu = Edu::with_features(requester, decoder, interrupts.clone(), intx, dma, features).unwrap();
        root.insert(SID, edu).unwrap();
        let bench = Self { bus, root, interrupts, line };
        bench.root.config_write(SID, 0x10, &(BAR_GPA as u32).to_le_bytes());
        bench.command(COMMAND_MEMORY | COMMAND_MASTER);
        bench
    }
    fn command(&self, value: u16) {
        self.root.config_write(SID, 4, &value.to_le_bytes());
    }
    pub(super) fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(BAR_GPA + offset, &mut data);
        u32::from_le_bytes(data)
    }
    pub(super) fn write(&self, offset: u64, value: u32) {
        self.bus.write(BAR_GPA + offset, &value.to_le_bytes());
    }
    pub(super) fn write64(&self, offset: u64, value: u64) {
        self.bus.write(BAR_GPA + offset, &value.to_le_bytes());
    }
    fn enable_msi(&self) {
        self.root.config_write(SID, 0x44, &0xfee0_0000u32.to_le_bytes());
        self.root.config_write(SID, 0x4c, &[0x31, 0]);
        self.root.config_write(SID, 0x42, &[1, 0]);
    }
    fn transfer(&self, source: u64, destination: u64, count: u64, command: u64) {
        self.write64(0x80, source);
        self.write64(0x88, destination);
        self.write64(0x90, count);
        self.write64(0x98, command);
        while self.read(0x98) & 1 != 0 {
            std::thread::yield_now();
        }
    }
    pub(super) fn failed(&self) -> bool {
        self.read(0x20) & STATUS_DMA_FAILED != 0
    }
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
}

fn with_memory() -> (Bench, GuestMemoryMmap) {
    let memory = memory();
    (Bench::with(Box::new(DirectMemory(memory.clone()))), memory)
}

#[test]
fn edu_says_who_it_is_and_lives() {
    let (bench, _) = with_memory();
    assert_eq!(bench.read(0x00), 0x0100_00ed);
    bench.write(0x04, 0x1234_5678);
    assert_eq!(bench.read(0x04), 0xedcb_a987);
    let mut byte = [0];
    bench.bus.read(BAR_GPA, &mut byte);
    assert_eq!(byte, [0xff], "bytes are not served");
}

#[test]
fn edu_factorials_interrupt_when_asked_to() {
    let (bench, _) = with_memory();
    bench.enable_msi();
    for (n, result) in [(5, 120), (12, 479_001_600), (u32::MAX, 0), (0, 1)] {
        bench.write(0x08, n);
        while bench.read(0x20) & STATUS_COMPUTING != 0 {
            std::thread::yield_now();
        }
        assert_eq!(bench.read(0x08), result);
    }
    assert_eq!(bench.read(0x24), 0);
    bench.write(0x20, STATUS_IRQ_FACTORIAL);
    bench.write(0x08, 3);
    while bench.read(0x24) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(bench.read(0x24), IRQ_FACTORIAL);
}

#[test]
fn edu_moves_memory_through_its_buffer() {
    let (bench, memory) = with_memory();
    let pattern: Vec<u8> = (0..BUFFER_SIZE).map(|i| (i * 7) as u8).collect();
    memory.write_slice(&pattern, GuestAddress(0x1000)).unwrap();
    bench.transfer(0x1000, BUFFER, BUFFER_SIZE as u64, DMA_START);
    bench.transfer(BUFFER + 0x10, 0x5010, 0x100, DMA_START | DMA_TO_MEMORY);
    let mut back = [0; 0x100];
    memory.read_slice(&mut back, GuestAddress(0x5010)).unwrap();
    assert_eq!(back, pattern[0x10..0x110]);
    assert!(!bench.failed());
}

#[test]
fn edu_refuses_what_leaves_its_buffer() {
    let (bench, memory) = with_memory();
    let refused = [
        (0, 1),
        (BUFFER - 1, 1),
        (BUFFER, BUFFER_SIZE as u64 + 1),
        (BUFFER + 0xfff, 2),
        (BUFFER, u64::MAX),
        (u64::MAX, 1),
    ];
    for (inner, count) in refused {
        bench.transfer(inner, 0, count, DMA_START | DMA_TO_MEMORY);
        assert!(bench.failed(), "{inner:#x} {count:#x}");
        bench.transfer(0, inner, count, DMA_START);
        assert!(bench.failed(), "{inner:#x} {count:#x}");
    }
    bench.transfer(BUFFER, 0, 4, DMA_START | DMA_TO_MEMORY);
    assert!(!bench.failed(), "the next one is clean");
    drop(memory);
}

#[test]
fn edu_does_nothing_on_the_bus_without_bus_master() {
    let (bench, memory) = with_memory();
    memory.write_slice(&[0x55; 16], GuestAddress(0x2000)).unwrap();
    bench.enable_msi();
    bench.command(COMMAND_MEMORY);
    bench.transfer(BUFFER, 0x2000, 16, DMA_START | DMA_TO_MEMORY | DMA_IRQ);
    assert!(bench.failed());
    let mut there = [0; 16];
    memory.read_slice(&mut there, GuestAddress(0x2000)).unwrap();
    assert_eq!(there, [0x55; 16]);
    assert!(bench.interrupts.take().is_empty(), "a message is a write too");
    // Nor behind a bridge that lets no requests through, whatever its own bit says.
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    let functions = bench.root.functions();
    let (_, edu) = functions.iter().find(|(sid, _)| *sid == SID).unwrap();
    for (masters, written) in [(false, [0x55; 16]), (true, [0; 16])] {
        edu.path_changed(&Path { masters, ..Path::of_root() });
        bench.transfer(BUFFER, 0x2000, 16, DMA_START | DMA_TO_MEMORY | DMA_IRQ);
        memory.read_slice(&mut there, GuestAddress(0x2000)).unwrap();
        assert_eq!((bench.failed(), there, bench.interrupts.take().len()), (!masters, written, masters.into()));
    }
}

#[test]
fn edu_interrupts_by_message_or_by_line_until_acknowledged() {
    let (bench, _) = with_memory();
    bench.write(0x60, 0x11);
    assert!(bench.line.is_high());
    assert_eq!(bench.read(0x24), 0x11);
    bench.write(0x64, 0x01);
    assert!(bench.line.is_high());
    bench.write(0x64, 0x10);
    assert!(!bench.line.is_high());
    bench.enable_msi();
    bench.write(0x60, 2);
    assert!(!bench.line.is_high());
    assert_eq!(bench.interrupts.take(), [Msi { address: 0xfee0_0000, data: 0x31 }]);
}

#[test]
fn edu_interrupt_disable_lowers_the_line_and_clearing_it_raises_it_again() {
    let (bench, _) = with_memory();
    bench.write(0x60, 1);
    bench.command(COMMAND_MEMORY | COMMAND_INTX_OFF);
    assert!(!bench.line.is_high());
    bench.command(COMMAND_MEMORY);
    assert!(bench.line.is_high());
}

/// A target that waits for the test: it says what is asked, and answers what it is told.
struct Slow {
    asked: Sender<(Iova, usize)>,
    answer: Mutex<Receiver<Result<(), DmaFailed>>>,
}

impl DmaTarget for Slow {
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), DmaFailed> {
        self.asked.send((iova, data.len())).unwrap();
        self.answer.lock().unwrap().recv().unwrap()
    }
    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), DmaFailed> {
        self.asked.send((iova, data.len())).unwrap();
        self.answer.lock().unwrap().recv().unwrap()
    }
}

type Asks = Receiver<(Iova, usize)>;
type Answers = Sender<Result<(), DmaFailed>>;

fn slow() -> (Bench, Asks, Answers) {
    let ((asked, asks), (answers, answer)) = (channel(), channel());
    (Bench::with(Box::new(Slow { asked, answer: Mutex::new(answer) })), asks, answers)
}

#[test]
fn edu_transfers_off_the_vcpu_and_registers_hold_still_meanwhile() {
    let (bench, asks, answers) = slow();
    bench.write64(0x80, BUFFER);
    bench.write64(0x88, 0x1_0000_0000);
    bench.write64(0x90, 8);
    bench.write64(0x98, DMA_START | DMA_TO_MEMORY);
    assert_eq!(asks.recv().unwrap(), (Iova(0x1_0000_0000), 8));
    assert_eq!(bench.read(0x98) & 1, 1);
    bench.write64(0x88, 0);
    answers.send(Err(DmaFailed)).unwrap();
    while bench.read(0x98) & 1 != 0 {
        std::thread::yield_now();
    }
    assert!(bench.failed());
    assert_eq!((bench.read(0x88), bench.read(0x8c)), (0, 1));
}

#[test]
fn edu_reset_waits_for_the_transfer_in_flight_and_drops_its_result() {
    let (bench, asks, answers) = slow();
    bench.write64(0x80, BUFFER);
    bench.write64(0x90, 8);
    bench.write64(0x98, DMA_START | DMA_TO_MEMORY | DMA_IRQ);
    asks.recv().unwrap();
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| bench.root.reset());
        while bench.read_config_command() != 0 {
            std::thread::yield_now();
        }
        assert!(!reset.is_finished());
        answers.send(Ok(())).unwrap();
        reset.join().unwrap();
    });
    bench.root.config_write(SID, 0x10, &(BAR_GPA as u32).to_le_bytes());
    bench.command(COMMAND_MEMORY);
    assert_eq!((bench.read(0x24), bench.read(0x98), bench.read(0x90)), (0, 0, 0));
}

#[test]
fn edu_has_no_transfer_under_way_when_a_bridge_above_has_closed() {
    let (bench, asks, answers) = slow();
    bench.write64(0x80, BUFFER);
    bench.write64(0x90, 8);
    bench.write64(0x98, DMA_START | DMA_TO_MEMORY);
    asks.recv().unwrap();
    let functions = bench.root.functions();
    let (_, edu) = functions.iter().find(|(sid, _)| *sid == SID).unwrap();
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| edu.path_changed(&Path { masters: false, ..Path::of_root() }));
        std::thread::sleep(std::time::Duration::from_millis(20));
        let early = closing.is_finished();
        answers.send(Ok(())).unwrap();
        closing.join().unwrap();
        assert!(!early, "a transfer is under way");
    });
    assert!(!bench.failed());
}

impl Bench {
    fn read_config_command(&self) -> u16 {
        let mut data = [0; 2];
        self.root.config_read(SID, 4, &mut data);
        u16::from_le_bytes(data)
    }
}

/// An edu with PASIDs: memory without one, and memory for each, in the order in which they were asked for.
type OfPasids = Arc<Mutex<Vec<(Pasid, GuestMemoryMmap)>>>;

fn with_pasids() -> (Bench, GuestMemoryMmap, OfPasids) {
    let (plain, made) = (memory(), OfPasids::default());
    let asked = made.clone();
    let pasids: Pasids = Box::new(move |pasid| {
        let memory = memory();
        asked.lock().unwrap().push((pasid, memory.clone()));
        Box::new(DirectMemory(memory))
    });
    (
        Bench::with_features(
            Box::new(DirectMemory(plain.clone())),
            Features { pasids: Some(pasids), ..Default::default() },
        ),
        plain,
        made,
    )
}

#[test]
fn a2_edu_transfers_go_by_the_pasid_that_its_register_says() {
    let (bench, plain, made) = with_pasids();
    let enable = |on: u16| bench.root.config_write(SID, 0x106, &on.to_le_bytes());
    enable(1);
    plain.write_slice(&[7; 8], GuestAddress(0x1000)).unwrap();
    bench.transfer(0x1000, BUFFER, 8, DMA_START);
    let byte = |memory: &GuestMemoryMmap| memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap();
    for (register, pasid) in [(PASID_VALID | 5, Pasid(5)), (PASID_VALID | 0xf_ffff, Pasid::MAX), (u32::MAX, Pasid::MAX)]
    {
        bench.write(PASID_REGISTER, register);
        assert_eq!(bench.read(PASID_REGISTER), register & 0x800f_ffff);
        bench.transfer(BUFFER, 0x2000, 8, DMA_START | DMA_TO_MEMORY);
        assert!(!bench.failed());
        let (asked, memory) = made.lock().unwrap().last().unwrap().clone();
        assert_eq!((asked, byte(&memory), byte(&plain)), (pasid, 7, 0));
    }
    assert_eq!(made.lock().unwrap().len(), 2, "the last one is kept");
    // With a PASID the interrupt address range is no message.
    bench.transfer(BUFFER, 0xfee0_0000, 4, DMA_START | DMA_TO_MEMORY);
    assert!(bench.failed() && bench.interrupts.take().is_empty());
    // Without the valid bit, and never without the enable.
    bench.write(PASID_REGISTER, 5);
    bench.transfer(BUFFER, 0x2000, 8, DMA_START | DMA_TO_MEMORY);
    assert!(!bench.failed() && byte(&plain) == 7);
    bench.write(PASID_REGISTER, PASID_VALID | 5);
    enable(0);
    bench.transfer(BUFFER, 0x3000, 8, DMA_START | DMA_TO_MEMORY);
    assert!(bench.failed());
    assert_eq!(made.lock().unwrap().len(), 2);
    enable(1);
    bench.root.reset();
    assert_eq!(bench.read(PASID_REGISTER), u32::MAX, "memory is off");
}

#[test]
fn f6_edu_has_a_pasid_capability_where_it_has_pasids() {
    let config = |bench: &Bench, offset: u16| {
        let mut data = [0; 4];
        bench.root.config_read(SID, offset, &mut data);
        u32::from_le_bytes(data)
    };
    let (bench, ..) = with_pasids();
    // Express, version 2, an integrated endpoint; end-to-end prefixes.
    let express = (config(&bench, 0x40) >> 8 & 0xff) as u16;
    assert_eq!(config(&bench, express), 0x0092_0010);
    assert_eq!(config(&bench, express + 0x24), 0x60_0000);
    assert_eq!(config(&bench, 0x100), 0x0001_001b);
    bench.root.config_write(SID, 0x104, &[0xff; 4]);
    assert_eq!(config(&bench, 0x104), 0x0001_1400, "20 bits, and only the enable can be written");
    let (plain, _) = with_memory();
    assert_eq!((config(&plain, 0x40) >> 8 & 0xff, config(&plain, 0x100)), (0, 0));
    assert_eq!(plain.read(PASID_REGISTER), u32::MAX);
    plain.write(PASID_REGISTER, PASID_VALID);
    assert_eq!(plain.read(PASID_REGISTER), u32::MAX);
}

#[test]
fn f6_edu_of_pci_express_is_an_endpoint_of_its_place() {
    for (upstream, flags, link) in [(Upstream::RootComplex, 0x92, 0), (Upstream::Port, 0x02, 0x11)] {
        let pasids: Pasids = Box::new(|_| Box::new(DirectMemory(memory())));
        let features = Features { pasids: Some(pasids), upstream, ..Features::default() };
        let bench = Bench::with_features(Box::new(DirectMemory(memory())), features);
        let config = |offset: u16| {
            let mut data = [0; 4];
            bench.root.config_read(SID, offset, &mut data);
            u32::from_le_bytes(data)
        };
        let express = (config(0x40) >> 8 & 0xff) as u16;
        let seen = (config(express) >> 16, config(express + 0x0c), config(express + 0x10));
        assert_eq!(seen, (flags, link, link << 16), "{upstream:?}");
    }
}

#[test]
fn edu_shutdown_joins_its_worker() {
    let root = PciRoot::new(Arc::default());
    let interrupts = Arc::new(FakeInterrupts::default());
    let dma = Box::new(DirectMemory(memory()));
    let edu = Edu::new(root.requester(SID), root.decoder(), interrupts.clone(), None, dma).unwrap();
    drop(edu);
    assert_eq!(Arc::strong_count(&interrupts), 1, "the worker's share is gone");
}

#[test]
fn a9_a_write_of_a_dword_into_the_interrupt_range_is_a_message_and_no_write() {
    let (bench, memory) = with_memory();
    memory.write_slice(&0x4051u32.to_le_bytes(), GuestAddress(0x1000)).unwrap();
    bench.transfer(0x1000, BUFFER, 4, DMA_START);
    bench.transfer(BUFFER, 0xfee0_1004, 4, DMA_START | DMA_TO_MEMORY);
    assert!(!bench.failed());
    assert_eq!(bench.interrupts.take(), [Msi { address: 0xfee0_1004, data: 0x4051 }]);
    for (to, count) in [(0xfee0_1004, 8), (0xfee0_1004, 2), (0xfee0_1002, 4), (0xfedf_fffc, 4), (0xfef0_0000, 4)] {
        bench.transfer(BUFFER, to, count, DMA_START | DMA_TO_MEMORY);
        assert!(bench.failed() && bench.interrupts.take().is_empty(), "{count} bytes to {to:#x}");
    }
    bench.transfer(0xfee0_1004, BUFFER, 4, DMA_START);
    assert!(bench.failed());
    bench.command(COMMAND_MEMORY);
    bench.transfer(BUFFER, 0xfee0_1004, 4, DMA_START | DMA_TO_MEMORY);
    assert!(bench.failed() && bench.interrupts.take().is_empty(), "a message needs Bus Master");
}

#[test]
fn edu_identity_and_its_message_capability_are_as_qemu_has_them() {
    let (bench, _) = with_memory();
    let config = |offset| {
        let mut data = [0; 4];
        bench.root.config_read(SID, offset, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!([0x00, 0x08, 0x2c, 0x34, 0x3c].map(config), [0x11e8_1234, 0x00ff_0010, 0x1100_1af4, 0x40, 0x0113]);
    bench.root.config_write(SID, 0x40, &[0xff; 4]);
    bench.root.config_write(SID, 0x44, &[0xff; 4]);
    bench.root.config_write(SID, 0x48, &[0xff; 4]);
    bench.root.config_write(SID, 0x4c, &[0xff; 4]);
    let capability = [0x40, 0x44, 0x48, 0x4c].map(config);
    assert_eq!(capability, [0x0081_0005, 0xffff_fffc, u32::MAX, 0xffff]);
}

#[test]
fn edu_registers_have_halves_and_the_rest_reads_as_ones() {
    let (bench, _) = with_memory();
    bench.enable_msi();
    for (low, high) in [(0x80, 0x84), (0x88, 0x8c), (0x90, 0x94)] {
        bench.write(low, 0x1111_1111);
        bench.write(high, 0x2222_2222);
        assert_eq!((bench.read(low), bench.read(high)), (0x1111_1111, 0x2222_2222));
        let mut wide = [0; 8];
        bench.bus.read(BAR_GPA + low, &mut wide);
        assert_eq!(u64::from_le_bytes(wide), 0x2222_2222_1111_1111);
    }
    bench.bus.write(BAR_GPA, &[0; 8]);
    let mut wide = [0; 8];
    bench.bus.read(BAR_GPA, &mut wide);
    assert_eq!((wide, bench.read(0x0c), bench.read(0x9c)), ([0xff; 8], u32::MAX, u32::MAX));
    // A command without its start bit is none.
    bench.write64(0x98, DMA_TO_MEMORY);
    assert_eq!((bench.read(0x98), bench.failed()), (0, false));
}

#[test]
fn edu_status_keeps_its_own_bits_and_shows_the_interrupt() {
    let (bench, _) = with_memory();
    bench.write(0x20, u32::MAX);
    assert_eq!(bench.read(0x20), STATUS_IRQ_FACTORIAL);
    let status = || {
        let mut data = [0; 2];
        bench.root.config_read(SID, STATUS, &mut data);
        u16::from_le_bytes(data) & STATUS_INTX
    };
    assert_eq!(status(), 0);
    bench.write(0x60, 1);
    assert_eq!(status(), STATUS_INTX);
    bench.write(0x64, 1);
    assert_eq!(status(), 0);
}

#[test]
fn edu_messages_have_addresses_of_64_bits_and_are_none_for_no_interrupt() {
    let (bench, _) = with_memory();
    bench.enable_msi();
    bench.root.config_write(SID, 0x48, &[1, 0, 0, 0]);
    bench.write(0x60, 0);
    assert!(bench.interrupts.take().is_empty());
    bench.transfer(0, BUFFER, 4, DMA_START | DMA_IRQ);
    while bench.read(0x24) == 0 {
        std::thread::yield_now();
    }
    bench.root.reset();
    assert_eq!(bench.interrupts.take(), [Msi { address: 0x1_fee0_0000, data: 0x31 }], "one, for the transfer");
}

#[test]
fn edu_a_reset_clears_registers_and_the_buffer() {
    let (bench, memory) = with_memory();
    memory.write_slice(&[0x77; 8], GuestAddress(0x1000)).unwrap();
    bench.transfer(0x1000, BUFFER, 8, DMA_START);
    bench.write(0x04, 5);
    bench.write(0x60, 1);
    assert!(bench.line.is_high());
    bench.root.reset();
    assert!(!bench.line.is_high());
    bench.root.config_write(SID, 0x10, &(BAR_GPA as u32).to_le_bytes());
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    assert_eq!([0x04, 0x08, 0x20, 0x24, 0x80, 0x88, 0x90, 0x98].map(|offset| bench.read(offset)), [0; 8]);
    bench.transfer(BUFFER, 0x1000, 8, DMA_START | DMA_TO_MEMORY);
    let mut there = [0xaa; 8];
    memory.read_slice(&mut there, GuestAddress(0x1000)).unwrap();
    assert_eq!(there, [0; 8]);
}

#[test]
fn edu_bar_moves_with_its_register() {
    let (bench, _) = with_memory();
    bench.root.config_write(SID, 0x10, &0xe010_0000u32.to_le_bytes());
    let mut data = [0; 4];
    assert!(!bench.bus.read(BAR_GPA, &mut data));
    assert!(bench.bus.read(0xe010_0000, &mut data));
    bench.command(0);
    assert!(!bench.bus.read(0xe010_0000, &mut data));
}

#[test]
fn edu_interrupts_for_no_transfer_that_does_not_ask_for_it() {
    let (bench, _) = with_memory();
    bench.transfer(0x1000, BUFFER, 8, DMA_START);
    assert_eq!((bench.read(0x24), bench.line.is_high()), (0, false));
    bench.transfer(0x1000, BUFFER, 8, DMA_START | DMA_IRQ);
    while bench.read(0x24) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(bench.read(0x24), IRQ_DMA);
}

#[test]
fn edu_computes_one_factorial_at_a_time() {
    let (bench, asks, answers) = slow();
    // The worker is busy with something else, so what is asked for waits.
    bench.write64(0x80, BUFFER);
    bench.write64(0x90, 8);
    bench.write64(0x98, DMA_START | DMA_TO_MEMORY);
    asks.recv().unwrap();
    bench.write(0x08, 5);
    bench.write(0x08, 6);
    assert_ne!(bench.read(0x20) & STATUS_COMPUTING, 0);
    answers.send(Err(DmaFailed)).unwrap();
    while bench.read(0x20) & STATUS_COMPUTING != 0 {
        std::thread::yield_now();
    }
    assert_eq!(bench.read(0x08), 120);
    // The interrupt bit is written, and no other.
    assert!(bench.failed());
    bench.write(0x20, STATUS_IRQ_FACTORIAL);
    assert_eq!(bench.read(0x20) & (STATUS_IRQ_FACTORIAL | STATUS_DMA_FAILED), STATUS_IRQ_FACTORIAL | STATUS_DMA_FAILED);
    bench.write(0x20, 0);
    assert_eq!(bench.read(0x20) & (STATUS_IRQ_FACTORIAL | STATUS_DMA_FAILED), STATUS_DMA_FAILED);
}

#[test]
fn edu_takes_words_and_from_0x80_on_pairs_of_them() {
    let (bench, _) = with_memory();
    bench.write(0x04, 0);
    bench.write64(0x80, 0x1_0000_0002);
    for (offset, len) in [(0x04, 1), (0x04, 2), (0x00, 8), (0x80, 1), (0x80, 2), (0x78, 8), (0x80, 3)] {
        bench.bus.write(BAR_GPA + offset, &vec![0x5a; len]);
        let mut data = vec![0; len];
        bench.bus.read(BAR_GPA + offset, &mut data);
        assert_eq!(data, vec![0xff; len], "{len} bytes at {offset:#x}");
    }
    assert_eq!((bench.read(0x04), bench.read(0x80), bench.read(0x84)), (u32::MAX, 2, 1));
}

#[test]
fn edu_leaves_the_bus_at_a_reset_and_what_was_in_flight_raises_nothing() {
    let (bench, asks, answers) = slow();
    bench.write64(0x80, BUFFER);
    bench.write64(0x90, 8);
    bench.write64(0x98, DMA_START | DMA_TO_MEMORY | DMA_IRQ);
    asks.recv().unwrap();
    // A factorial that nobody began with is overtaken as well.
    bench.write(0x20, STATUS_IRQ_FACTORIAL);
    bench.write(0x08, 5);
    std::thread::scope(|scope| {
        let reset = scope.spawn(|| bench.root.reset());
        while bench.read_config_command() != 0 {
            std::thread::yield_now();
        }
        answers.send(Ok(())).unwrap();
        reset.join().unwrap();
    });
    assert_eq!((*bench.line.rises.lock().unwrap(), bench.interrupts.take()), (0, vec![]));
    assert_eq!(bench.read(0), u32::MAX, "nothing answers at its old place");
}
