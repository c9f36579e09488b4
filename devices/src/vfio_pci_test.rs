use std::collections::BTreeMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vtd::SourceId;

use super::host::RegionInfo;
use super::*;
use crate::Bus;
use crate::pci::PciRoot;
use crate::pci::config::COMMAND_MASTER;
use crate::testing::{FakeInterrupts, FakeLine, FakeSlots};

const SID: SourceId = SourceId::new(0, 5, 0);
const BAR_GPA: u64 = 0x80_0000_0000;
const POWER: u16 = 0x40;
const MSIX: u16 = 0x50;
const EXPRESS: u16 = 0x60;
const MSI: u16 = 0xa0;
const TABLE: u64 = BAR_GPA + 0x2000;
const PBA: u64 = BAR_GPA + 0x3000;

/// A function with a 64-bit BAR 0 of 16 KiB (MSI-X table at 0x2000, pending bits at 0x3000), power management, MSI-X (4),
/// MSI (2, with masks), FLR, and an ATS capability. It checks what F-1 to F-3 promise at each access.
struct FakeHost {
    config: Mutex<[u8; CONFIG_SIZE]>,
    bar: Mutex<Vec<u8>>,
    slots: Arc<FakeSlots>,
    /// What is enabled: of each vector that is allocated, what it signals.
    irqs: Mutex<Vec<(IrqKind, Vec<Option<EventFd>>)>>,
    enables: AtomicU32,
    /// Calls of `set_irqs`.
    sets: AtomicU32,
    /// Vectors that the host can still give; each that signals somebody is one, or, where all are allocated at once, each.
    host_vectors: AtomicU32,
    noresize: AtomicBool,
    accesses: AtomicU32,
    violations: AtomicU32,
    resets: Mutex<Vec<ResetScope>>,
    /// Functions of the same bus, which a reset of the machine resets along.
    bus: Mutex<Vec<Arc<FakeHost>>>,
    unmasks: AtomicU32,
    /// Bus Master does not go off.
    stuck: AtomicBool,
    /// The sizes of BARs besides the first.
    other_bars: Mutex<BTreeMap<u8, u64>>,
}

impl FakeHost {
    fn new(slots: Arc<FakeSlots>) -> Self {
        let mut config = [0; CONFIG_SIZE];
        let mut put = |at: u16, bytes: &[u8]| config[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
        put(0x00, &[0x36, 0x1b, 0x10, 0x00, 0, 0, 0x10, 0]);
        put(0x0e, &[0x80]);
        put(0x10, &[0x04]);
        put(0x30, &[0x01, 0, 0xc0, 0xfe]);
        put(0x34, &[POWER as u8]);
        put(0x3d, &[1]);
        put(POWER, &[CAP_POWER, MSIX as u8, 3, 0]);
        put(MSIX, &[CAP_MSIX, EXPRESS as u8, 3, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        put(EXPRESS, &[CAP_EXPRESS, MSI as u8, 2, 0, 0, 0, 0, 0x10]);
        put(MSI, &[CAP_MSI, 0, 0x82, 0x01]);
        put(0x100, &[0x01, 0, 0x01, 0x14]);
        put(0x140, &[0x0f, 0, 0x01, 0, 0x55, 0x55, 0x55, 0x55]);
        Self {
            config: Mutex::new(config),
            bar: Mutex::new(vec![0; 0x4000]),
            slots,
            irqs: Mutex::default(),
            enables: AtomicU32::new(0),
            sets: AtomicU32::new(0),
            host_vectors: AtomicU32::new(1000),
            noresize: AtomicBool::new(false),
            accesses: AtomicU32::new(0),
            violations: AtomicU32::new(0),
            resets: Mutex::default(),
            bus: Mutex::default(),
            unmasks: AtomicU32::new(0),
            stuck: AtomicBool::new(false),
            other_bars: Mutex::default(),
        }
    }

    fn command(&self) -> u16 {
        let config = self.config.lock().unwrap();
        u16::from_le_bytes([config[4], config[5]])
    }
    fn is_enabled(&self) -> bool {
        self.command() & COMMAND_MEMORY != 0 && self.config.lock().unwrap()[usize::from(POWER) + 4] & 3 == 0
    }
    fn check(&self, holds: bool) {
        self.violations.fetch_add(u32::from(!holds), Ordering::SeqCst);
    }
    /// The device raises vector `index` of `kind`. One that signals nobody is masked by the host, and so pending in the device.
    fn raise(&self, kind: IrqKind, index: usize) {
        let irqs = self.irqs.lock().unwrap();
        let (_, events) = irqs.iter().find(|(k, _)| *k == kind).expect("enabled on the host");
        match events.get(index) {
            Some(Some(event)) => event.write(1).unwrap(),
            _ => drop(self.set_pending(kind, index, true)),
        }
    }
    /// Sets the device's own pending bit, and says what it was.
    fn set_pending(&self, kind: IrqKind, index: usize, pending: bool) -> bool {
        let (mut config, mut bar) = (self.config.lock().unwrap(), self.bar.lock().unwrap());
        let byte = match kind {
            IrqKind::Msix => &mut bar[0x3000 + index / 8],
            _ => &mut config[usize::from(MSI) + 20 + index / 8],
        };
        let was = *byte >> (index % 8) & 1 != 0;
        *byte = *byte & !(1 << (index % 8)) | u8::from(pending) << (index % 8);
        was
    }
    fn live(&self, kind: IrqKind) -> bool {
        self.irqs.lock().unwrap().iter().any(|(k, _)| *k == kind)
    }
    /// The vectors of `kind` that signal somebody.
    fn taken(&self, kind: IrqKind) -> Vec<usize> {
        let irqs = self.irqs.lock().unwrap();
        let events = irqs.iter().filter(|(k, _)| *k == kind).flat_map(|(_, events)| events.iter().enumerate());
        events.filter_map(|(index, event)| event.is_some().then_some(index)).collect()
    }
}

impl AssignedHost for FakeHost {
    fn region(&self, region: RegionKind) -> RegionInfo {
        let info = |size, mappable| RegionInfo { size, file_offset: 0, readable: true, writable: true, mappable };
        match region {
            RegionKind::Bar(0) => info(0x4000, vec![(0, 0x4000)]),
            RegionKind::Rom => info(0x1000, vec![]),
            RegionKind::Config => info(0x1000, vec![]),
            RegionKind::Bar(bar) => info(self.other_bars.lock().unwrap().get(&bar).copied().unwrap_or(0), vec![]),
        }
    }
    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        let at = offset as usize;
        if region == RegionKind::Config {
            data.copy_from_slice(&self.config.lock().unwrap()[at..at + data.len()]);
            return;
        }
        self.accesses.fetch_add(1, Ordering::SeqCst);
        self.check(self.is_enabled());
        data.copy_from_slice(&self.bar.lock().unwrap()[at..at + data.len()]);
        self.check(self.is_enabled());
    }
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        if region == RegionKind::Config {
            let was_enabled = self.is_enabled();
            let mut data = data.to_vec();
            // Servers on libvfio-user take the power-management register whole, or not at all; a 1 clears PME Status.
            if at == usize::from(POWER) + 4 {
                if data.len() < 2 {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                data[1] = data[1] & 0x7f | self.config.lock().unwrap()[at + 1] & !data[1] & 0x80;
            }
            if at == 4 && self.stuck.load(Ordering::SeqCst) {
                data[0] |= COMMAND_MASTER as u8;
            }
            self.config.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
            if at == usize::from(MSI) {
                // Linux's vfio then writes the control register as well, with what it has there itself: disabled.
                self.irqs.lock().unwrap().retain(|(kind, _)| *kind != IrqKind::Msi);
            }
            // F-1, F-3: nothing is mapped when memory goes off, nor before it comes on.
            if !was_enabled || !self.is_enabled() {
                self.check(self.slots.mapped().is_empty());
            }
            return Ok(());
        }
        self.accesses.fetch_add(1, Ordering::SeqCst);
        self.check(self.is_enabled());
        self.bar.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn file(&self, _: RegionKind) -> Option<Arc<std::os::fd::OwnedFd>> {
        Some(Arc::new(std::fs::File::open("/dev/null").unwrap().into()))
    }
    fn irq_count(&self, kind: IrqKind) -> u32 {
        match kind {
            IrqKind::Intx => 1,
            IrqKind::Msi => 2,
            IrqKind::Msix => 4,
            IrqKind::Error | IrqKind::Request => 0,
        }
    }
    fn irq_noresize(&self, kind: IrqKind) -> bool {
        kind != IrqKind::Intx && self.noresize.load(Ordering::SeqCst)
    }
    fn set_irqs(&self, kind: IrqKind, start: u32, triggers: &[Option<&EventFd>]) -> io::Result<()> {
        let (start, end) = (start as usize, start as usize + triggers.len());
        self.check(end <= self.irq_count(kind) as usize);
        self.sets.fetch_add(1, Ordering::SeqCst);
        let most = self.host_vectors.load(Ordering::SeqCst) as usize;
        let noresize = self.noresize.load(Ordering::SeqCst);
        let mut irqs = self.irqs.lock().unwrap();
        // VFIO has one kind at a time.
        self.check(irqs.iter().all(|(live, _)| *live == kind));
        if irqs.is_empty() {
            if noresize && end > most {
                return Err(io::Error::from_raw_os_error(28));
            }
            self.enables.fetch_add(1, Ordering::SeqCst);
            irqs.push((kind, Vec::new()));
            irqs[0].1.resize_with(end, || None);
        }
        let (_, events) = &mut irqs[0];
        if noresize && end > events.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        events.resize_with(events.len().max(end), || None);
        for (index, trigger) in (start..).zip(triggers) {
            events[index] = None;
            if trigger.is_some() && !noresize && events.iter().flatten().count() >= most {
                // As VFIO does: none of the vectors of this call is left.
                events[start..end].fill_with(|| None);
                return Err(io::Error::from_raw_os_error(28));
            }
            events[index] = trigger.map(|event| event.try_clone().unwrap());
            // The host unmasks it, and the device sends what it had to.
            if let Some(event) = trigger
                && kind != IrqKind::Intx
                && self.set_pending(kind, index, false)
            {
                event.write(1).unwrap();
            }
        }
        Ok(())
    }
    fn disable_irqs(&self, kind: IrqKind) -> io::Result<()> {
        self.irqs.lock().unwrap().retain(|(k, _)| *k != kind);
        Ok(())
    }
    fn unmask_intx(&self) -> io::Result<()> {
        self.unmasks.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn reset(&self, scope: ResetScope) -> io::Result<()> {
        self.check(self.command() & COMMAND_MASTER == 0);
        for other in self.bus.lock().unwrap().iter().filter(|_| scope == ResetScope::Machine) {
            self.check(other.command() & (COMMAND_MASTER | COMMAND_MEMORY) == 0);
            self.check(other.slots.mapped().is_empty() && !other.live(IrqKind::Msix));
        }
        self.resets.lock().unwrap().push(scope);
        Ok(())
    }
}

struct Bench {
    bus: Arc<Bus>,
    root: Arc<PciRoot>,
    host: Arc<FakeHost>,
    slots: Arc<FakeSlots>,
    interrupts: Arc<FakeInterrupts>,
    line: Arc<FakeLine>,
    function: Arc<VfioPci>,
}

impl Bench {
    fn new() -> Self {
        Self::with(|_| {})
    }
    /// With a function of the host that `prepare` changed.
    fn with(prepare: impl FnOnce(&FakeHost)) -> Self {
        let bus = Arc::new(Bus::default());
        let root = PciRoot::new(bus.clone());
        let (slots, interrupts, line) =
            (Arc::new(FakeSlots::default()), Arc::new(FakeInterrupts::default()), Arc::new(FakeLine::default()));
        let host = Arc::new(FakeHost::new(slots.clone()));
        prepare(&host);
        let function = VfioPci::new(VfioPciWiring {
            requester: root.requester(SID),
            host: host.clone(),
            decoder: root.decoder(),
            slots: slots.clone(),
            interrupts: interrupts.clone(),
            intx: Some((line.clone(), 21)),
        })
        .unwrap();
        root.insert(SID, function.clone()).unwrap();
        Self { bus, root, host, slots, interrupts, line, function }
    }
    /// With BAR 0 placed and memory on.
    fn running() -> Self {
        let bench = Self::new();
        bench.config32(0x10, BAR_GPA as u32);
        bench.config32(0x14, (BAR_GPA >> 32) as u32);
        bench.command(COMMAND_MEMORY | COMMAND_MASTER);
        bench
    }
    fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.root.config_read(SID, offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn config32(&self, offset: u16, value: u32) {
        self.root.config_write(SID, offset, &value.to_le_bytes());
    }
    fn config16(&self, offset: u16, value: u16) {
        self.root.config_write(SID, offset, &value.to_le_bytes());
    }
    fn command(&self, value: u16) {
        self.config16(COMMAND, value);
    }
    fn read(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(address, &mut data);
        u32::from_le_bytes(data)
    }
    fn write(&self, address: u64, value: u32) {
        self.bus.write(address, &value.to_le_bytes());
    }
    fn vector(&self, index: u64, data: u32, masked: bool) {
        self.write(TABLE + 16 * index, 0xfee0_0000);
        self.write(TABLE + 16 * index + 4, 0);
        self.write(TABLE + 16 * index + 8, data);
        self.write(TABLE + 16 * index + 12, u32::from(masked));
    }
    fn delivered(&self) -> Vec<u32> {
        self.interrupts.take().iter().map(|msi| msi.data).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        assert_eq!(self.host.violations.load(Ordering::SeqCst), 0, "the host saw what it must never see");
    }
}

/// A second function beside that of `bench`, at 06.0, without a legacy interrupt.
fn second(bench: &Bench) -> (Arc<FakeSlots>, Arc<FakeHost>, SourceId) {
    let sid = SourceId::new(0, 6, 0);
    let slots = Arc::new(FakeSlots::default());
    let host = Arc::new(FakeHost::new(slots.clone()));
    let function = VfioPci::new(VfioPciWiring {
        requester: bench.root.requester(sid),
        host: host.clone(),
        decoder: bench.root.decoder(),
        slots: slots.clone(),
        interrupts: bench.interrupts.clone(),
        intx: None,
    })
    .unwrap();
    bench.root.insert(sid, function).unwrap();
    (slots, host, sid)
}

/// Everything but the pages of the MSI-X table and the pending bits.
const WINDOWS: [(u64, u64, u64); 1] = [(BAR_GPA, 0, 0x2000)];

#[test]
fn f1_bars_are_mapped_only_while_memory_is_enabled() {
    let bench = Bench::running();
    assert_eq!(bench.slots.mapped(), WINDOWS);
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.slots.mapped(), []);
    bench.command(COMMAND_MEMORY);
    assert_eq!(bench.slots.mapped(), WINDOWS);
}

#[test]
fn f1_bars_are_not_mapped_outside_d0() {
    let bench = Bench::running();
    bench.config16(POWER + 4, 3);
    assert_eq!(bench.slots.mapped(), []);
    assert_eq!(bench.read(BAR_GPA), u32::MAX);
    bench.config16(POWER + 4, 0);
    assert_eq!(bench.slots.mapped(), WINDOWS);
    assert_eq!(bench.read(BAR_GPA), 0);
}

#[test]
fn f1_a_moved_bar_moves_its_windows() {
    let bench = Bench::running();
    bench.config32(0x14, 0x81);
    assert_eq!(bench.slots.mapped(), [(0x81_0000_0000, 0, 0x2000)]);
    assert_eq!((bench.read(BAR_GPA), bench.read(0x81_0000_0000)), (u32::MAX, 0));
}

#[test]
fn f1_a_bar_that_waited_for_its_address_is_mapped_when_it_gets_it() {
    let bench = Bench::running();
    let (slots, host, sid) = second(&bench);
    bench.root.config_write(sid, 0x14, &0x80u32.to_le_bytes());
    bench.root.config_write(sid, COMMAND, &COMMAND_MEMORY.to_le_bytes());
    host.bar.lock().unwrap()[0x100] = 0x77;
    assert_eq!((slots.mapped(), bench.read(BAR_GPA + 0x100)), (vec![], 0), "the first has the address");
    bench.config32(0x14, 0x81);
    assert_eq!((slots.mapped(), bench.read(BAR_GPA + 0x100)), (WINDOWS.to_vec(), 0x77));
    // Back over the other one: now this one waits, and gets nothing when it goes away itself.
    bench.config32(0x14, 0x80);
    assert_eq!((bench.slots.mapped(), slots.mapped()), (vec![], WINDOWS.to_vec()));
    bench.command(0);
    bench.root.config_write(sid, COMMAND, &[0; 2]);
    assert_eq!((bench.slots.mapped(), slots.mapped(), bench.read(BAR_GPA)), (vec![], vec![], u32::MAX));
}

#[test]
fn f6_io_bars_are_not_offered_and_named() {
    let bench = Bench::with(|host| {
        let mut config = host.config.lock().unwrap();
        // An I/O BAR, and a type that is reserved; BAR 4 says I/O and has nothing behind it.
        config[0x18] = 0x01;
        config[0x1c] = 0x02;
        config[0x20] = 0x01;
        drop(config);
        *host.other_bars.lock().unwrap() = [(2, 0x20), (3, 0x1000)].into();
    });
    assert_eq!(bench.function.io_bars(), [2]);
    assert_eq!(bench.function.bar_sizes(), [(0, BarKind::Memory64, 0x4000)]);
    bench.config32(0x18, u32::MAX);
    assert_eq!(bench.config(0x18), 0);
}

#[test]
fn f2_while_memory_is_disabled_reads_are_ones_and_writes_are_dropped() {
    let bench = Bench::running();
    bench.write(BAR_GPA + 0x100, 0x1234_5678);
    assert_eq!(bench.read(BAR_GPA + 0x100), 0x1234_5678);
    // What a vCPU that was already on its way to the BAR reaches.
    let bar = bench.function.bars.memory[0].as_ref().unwrap().target.device.clone();
    bench.command(0);
    let before = bench.host.accesses.load(Ordering::SeqCst);
    let mut data = [0; 4];
    bar.read(0x100, &mut data);
    bar.write(0x100, &[0; 4]);
    bar.write(0x2000, &[0; 4]);
    assert_eq!(data, [0xff; 4]);
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before);
    bench.command(COMMAND_MEMORY);
    assert_eq!(bench.read(BAR_GPA + 0x100), 0x1234_5678);
}

#[test]
fn f3_toggling_from_several_threads_lets_no_access_through() {
    const ACCESSORS: usize = 2;
    const TOGGLERS: u16 = 2;
    let bench = Bench::running();
    let bar = bench.function.bars.memory[0].as_ref().unwrap().target.device.clone();
    let done = AtomicBool::new(false);
    // Reads of each accessor that reached the device.
    let reached: [AtomicU32; ACCESSORS] = Default::default();
    // Nobody toggles before everybody accesses: under load a thread can come to run when the others are done.
    let all_run = Barrier::new(ACCESSORS + usize::from(TOGGLERS));
    std::thread::scope(|scope| {
        for reached in &reached {
            scope.spawn(|| {
                let access = || {
                    let mut data = [0; 4];
                    bar.read(0x10, &mut data);
                    bar.write(0x2000, &[0; 4]);
                    bar.write(0x20, &[1; 4]);
                    reached.fetch_add(u32::from(data != [0xff; 4]), Ordering::SeqCst);
                };
                access();
                all_run.wait();
                while !done.load(Ordering::SeqCst) {
                    access();
                }
            });
        }
        let togglers: Vec<_> = (0..TOGGLERS)
            .map(|n| {
                let (bench, all_run) = (&bench, &all_run);
                scope.spawn(move || {
                    all_run.wait();
                    for round in 0..300 {
                        bench.command(COMMAND_MEMORY * ((round + n) & 1));
                        match round % 50 {
                            7 => bench.config16(POWER + 4, 3),
                            8 => bench.config16(POWER + 4, 0),
                            30 if n == 0 => bench.root.reset(),
                            31 => bench.config32(0x14, 0x80),
                            _ => {}
                        }
                    }
                })
            })
            .collect();
        togglers.into_iter().for_each(|t| t.join().unwrap());
        bench.config16(POWER + 4, 0);
        bench.config32(0x14, 0x80);
        bench.command(COMMAND_MEMORY);
        // With memory on, every accessor still gets to the device.
        let before = reached.each_ref().map(|reached| reached.load(Ordering::SeqCst));
        while reached.iter().zip(before).any(|(now, before)| now.load(Ordering::SeqCst) == before) {
            std::thread::yield_now();
        }
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(bench.slots.mapped(), WINDOWS);
}

#[test]
fn f4_a_guest_reset_takes_the_mappings_and_quiesces_before_it_resets() {
    let bench = Bench::running();
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.root.reset();
    assert_eq!(bench.slots.mapped(), []);
    assert_eq!(*bench.host.resets.lock().unwrap(), [ResetScope::Machine]);
    assert_eq!((bench.host.command(), bench.config(4) & 0xffff, bench.config(0x14)), (0, 0, 0));
    assert_eq!(bench.config(MSIX) >> 16, 3, "MSI-X is disabled");
    assert!(bench.host.live(IrqKind::Intx) && !bench.host.live(IrqKind::Msix));
}

#[test]
fn f4_a_function_level_reset_goes_the_same_way() {
    let bench = Bench::running();
    bench.config16(EXPRESS + 8, 0x8010);
    assert_eq!(*bench.host.resets.lock().unwrap(), [ResetScope::Function], "no other function is reset along");
    assert_eq!(bench.slots.mapped(), []);
    assert_eq!(bench.config(EXPRESS + 8) & 0xffff, 0x0010, "the host never sees the reset bit");
}

#[test]
fn f4_all_functions_are_quiet_before_the_first_is_reset() {
    let bench = Bench::running();
    let (slots, host, sid) = second(&bench);
    bench.root.config_write(sid, 0x14, &0x90u32.to_le_bytes());
    bench.root.config_write(sid, COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER).to_le_bytes());
    bench.root.config_write(sid, MSIX + 2, &msix::CONTROL_ENABLE.to_le_bytes());
    assert!(!slots.mapped().is_empty() && host.live(IrqKind::Msix));
    // The reset of each is one of their bus.
    bench.host.bus.lock().unwrap().push(host.clone());
    bench.root.reset();
    assert_eq!(*host.resets.lock().unwrap(), [ResetScope::Machine]);
}

#[test]
fn f4_a_sleeping_function_is_awake_after_a_reset() {
    let bench = Bench::running();
    bench.config16(POWER + 4, 0x8003);
    let power = || bench.host.config.lock().unwrap()[usize::from(POWER) + 4..][..2].to_vec();
    bench.host.config.lock().unwrap()[usize::from(POWER) + 5] = 0x81;
    assert_eq!(power(), [3, 0x81]);
    bench.root.reset();
    // The fake's reset changes nothing, as one that the device ignores. PME Status is not cleared by waking it.
    assert_eq!(power(), [0, 0x81]);
    bench.config32(0x14, 0x80);
    bench.command(COMMAND_MEMORY);
    assert_eq!(bench.read(BAR_GPA), 0);
}

#[test]
fn f5_one_more_vector_loses_no_interrupt_of_the_others() {
    for noresize in [false, true] {
        let bench = Bench::running();
        bench.host.noresize.store(noresize, Ordering::SeqCst);
        bench.vector(0, 0x40, false);
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        let enables = bench.host.enables.load(Ordering::SeqCst);
        bench.host.raise(IrqKind::Msix, 0);
        // What comes for the new one before it is taken is the device's to send.
        bench.host.raise(IrqKind::Msix, 3);
        bench.vector(3, 0x43, false);
        assert_eq!(bench.delivered(), [0x40, 0x43]);
        bench.host.raise(IrqKind::Msix, 3);
        assert_eq!(bench.delivered(), [0x43]);
        assert_eq!(bench.host.enables.load(Ordering::SeqCst), enables, "nothing is disabled to add one");
    }
}

#[test]
fn f5_a_vector_costs_nothing_until_the_guest_unmasks_it() {
    for noresize in [false, true] {
        let bench = Bench::running();
        bench.host.noresize.store(noresize, Ordering::SeqCst);
        let took = |vectors: &[usize]| {
            assert_eq!((bench.host.taken(IrqKind::Msix), bench.interrupts.count()), (vectors.to_vec(), vectors.len()));
        };
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);
        bench.vector(2, 0x42, false);
        took(&[]);
        assert!(bench.host.live(IrqKind::Msix), "the function sees that MSI-X is enabled all the same");
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        took(&[2]);
        bench.vector(2, 0x42, true);
        let (sets, enables) = (&bench.host.sets, &bench.host.enables);
        let before = (sets.load(Ordering::SeqCst), enables.load(Ordering::SeqCst));
        bench.vector(2, 0x42, false);
        took(&[2]);
        let after = (sets.load(Ordering::SeqCst), enables.load(Ordering::SeqCst));
        assert_eq!(before, after, "masking and unmasking is no business of the host's");
        bench.vector(0, 0x40, false);
        took(&[0, 2]);
        bench.config16(MSIX + 2, 0);
        took(&[]);
    }
}

#[test]
fn f5_all_that_is_unmasked_at_once_is_one_change() {
    let bench = Bench::running();
    (0..4).for_each(|index| bench.vector(index, 0x40, index == 1));
    let before = (bench.interrupts.changes.load(Ordering::SeqCst), bench.host.sets.load(Ordering::SeqCst));
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    let after = (bench.interrupts.changes.load(Ordering::SeqCst), bench.host.sets.load(Ordering::SeqCst));
    // Of the host: the enabling, and one for each run of neighbours.
    assert_eq!((after.0 - before.0, after.1 - before.1), (1, 3));
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert_eq!(bench.interrupts.changes.load(Ordering::SeqCst), after.0 + 2);
}

/// What a bench delivers when each of its four vectors fires.
fn all_fire(bench: &Bench) -> Vec<u32> {
    (0..4).for_each(|index| bench.host.raise(IrqKind::Msix, index));
    bench.delivered()
}

#[test]
fn f5_a_host_that_is_short_of_vectors_costs_only_those_beyond() {
    for noresize in [false, true] {
        for at_once in [false, true] {
            for (has, works) in [(0, &[][..]), (1, &[0x40]), (3, &[0x40, 0x41, 0x42])] {
                let bench = Bench::running();
                bench.host.noresize.store(noresize, Ordering::SeqCst);
                bench.host.host_vectors.store(has, Ordering::SeqCst);
                if !at_once {
                    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
                }
                (0..4).for_each(|index| bench.vector(index, 0x40 + index as u32, false));
                bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
                if has > 0 {
                    assert_eq!(all_fire(&bench), works, "{noresize} {at_once} {has}");
                }
                assert_eq!(bench.interrupts.count(), works.len(), "what cannot be used is given back");
            }
        }
    }
}

#[test]
fn f5_a_shortage_of_routes_costs_only_the_vectors_beyond_and_is_over_when_there_are_some() {
    let bench = Bench::running();
    *bench.interrupts.left.lock().unwrap() = Some(2);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    (0..4).for_each(|index| bench.vector(index, 0x40 + index as u32, false));
    assert_eq!(all_fire(&bench), [0x40, 0x41]);
    assert_eq!(bench.read(PBA), 0b1100, "the device has the others pending");
    *bench.interrupts.left.lock().unwrap() = None;
    bench.vector(3, 0x43, true);
    bench.vector(3, 0x43, false);
    assert_eq!(bench.delivered(), [0x43], "that came meanwhile");
    assert_eq!(bench.read(PBA), 0b100);
}

#[test]
fn f5_a_masked_vector_is_pending_and_delivered_once_at_unmask() {
    // Never unmasked before: the device keeps it. Masked again: we do.
    for taken in [false, true] {
        let bench = Bench::running();
        bench.vector(1, 0x41, !taken);
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        bench.vector(1, 0x41, true);
        assert_eq!(bench.read(PBA), 0);
        bench.host.raise(IrqKind::Msix, 1);
        assert_eq!(bench.read(PBA), 2);
        assert_eq!(bench.read(PBA), 2, "reading does not clear it");
        assert!(bench.delivered().is_empty());
        bench.write(TABLE + 16 + 12, 0);
        assert_eq!(bench.delivered(), [0x41]);
        assert_eq!(bench.read(PBA), 0);
        bench.write(TABLE + 16 + 12, 1);
        bench.write(TABLE + 16 + 12, 0);
        assert!(bench.delivered().is_empty());
    }
}

#[test]
fn f5_signals_before_and_after_a_look_at_the_pending_bits_are_one_message() {
    let bench = Bench::running();
    bench.vector(1, 0x41, false);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.vector(1, 0x41, true);
    bench.host.raise(IrqKind::Msix, 1);
    assert_eq!(bench.read(PBA), 2);
    bench.host.raise(IrqKind::Msix, 1);
    bench.write(TABLE + 16 + 12, 0);
    assert_eq!(bench.delivered(), [0x41]);
}

#[test]
fn f5_the_function_mask_masks_all_and_keeps_what_came() {
    let bench = Bench::running();
    bench.vector(0, 0x40, false);
    bench.vector(1, 0x41, true);
    for taken in [false, true] {
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE | msix::CONTROL_MASK);
        assert_eq!(bench.host.taken(IrqKind::Msix).contains(&0), taken);
        assert_eq!(bench.read(PBA), 2 * u32::from(taken));
        bench.host.raise(IrqKind::Msix, 0);
        bench.host.raise(IrqKind::Msix, 1);
        assert_eq!(bench.read(PBA), 3);
        assert!(bench.delivered().is_empty());
        bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
        assert_eq!(bench.delivered(), [0x40]);
        assert_eq!(bench.read(PBA), 2);
    }
}

#[test]
fn f5_the_table_is_ours_and_pieces_of_wide_accesses_find_their_owner() {
    let bench = Bench::running();
    let before = bench.host.accesses.load(Ordering::SeqCst);
    bench.bus.write(TABLE, &[0x00, 0x10, 0xe0, 0xfe, 0, 0, 0, 0]);
    let mut wide = [0; 8];
    bench.bus.read(TABLE, &mut wide);
    assert_eq!(wide, [0x00, 0x10, 0xe0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(bench.read(TABLE + 12), 1, "comes up masked");
    bench.write(PBA, u32::MAX);
    assert_eq!(bench.read(PBA), 0);
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before);
    bench.write(TABLE + 0x40, 7);
    assert_eq!(bench.read(TABLE + 0x40), 7, "past the table the device answers");
    assert_eq!(bench.host.accesses.load(Ordering::SeqCst), before + 2);
}

#[test]
fn f5_msi_vectors_are_in_the_low_bits_of_the_data_and_masks_hold() {
    let bench = Bench::running();
    bench.config32(MSI + 4, 0xfee0_1000);
    bench.config32(MSI + 12, 0x4050);
    bench.config32(MSI + 16, 0x2);
    bench.config16(MSI + 2, 0x0011);
    assert!(!bench.host.live(IrqKind::Intx));
    bench.host.raise(IrqKind::Msi, 0);
    bench.host.raise(IrqKind::Msi, 1);
    assert_eq!(bench.delivered(), [0x4050]);
    assert_eq!(bench.config(MSI + 20), 2);
    bench.config32(MSI + 16, 0);
    assert_eq!(bench.delivered(), [0x4051]);
    bench.config16(MSI + 2, 0);
    assert!(bench.host.live(IrqKind::Intx), "the legacy interrupt is back");
}

#[test]
fn f5_the_head_of_the_msi_capability_is_never_written_on_the_host() {
    let bench = Bench::running();
    let head = bench.config(MSI) & 0xffff;
    bench.config32(MSI + 4, 0xfee0_1000);
    for vector in [0x50, 0x60] {
        bench.config32(MSI + 12, vector);
        // Enable, in one access with the id and the link, which are read-only.
        bench.config32(MSI, 0x0001_0000 | !head & 0xffff);
        assert_eq!(bench.config(MSI) & 0x0001_ffff, 0x0001_0000 | head);
        assert!(bench.host.live(IrqKind::Msi));
        bench.host.raise(IrqKind::Msi, 0);
        assert_eq!(bench.delivered(), [vector]);
    }
}

#[test]
fn f5_disabling_forgets_what_was_pending() {
    let bench = Bench::running();
    bench.vector(0, 0x40, false);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    bench.vector(0, 0x40, true);
    bench.host.raise(IrqKind::Msix, 0);
    bench.config16(MSIX + 2, 0);
    bench.vector(0, 0x40, false);
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert!(bench.delivered().is_empty());
}

#[test]
fn f5_intx_raises_the_line_until_the_end_of_interrupt_unmasks_it() {
    let bench = Bench::running();
    bench.host.raise(IrqKind::Intx, 0);
    bench.function.intx_fired();
    assert!(bench.line.is_high());
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 0);
    bench.function.end_of_interrupt();
    assert!(!bench.line.is_high());
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 1);
    bench.function.end_of_interrupt();
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 1, "an end that is another function's");
}

#[test]
fn f5_intx_that_fires_before_the_end_of_interrupt_is_not_lost() {
    // A server of vfio-user does not mask it, as VFIO does.
    let bench = Bench::running();
    for _ in 0..3 {
        bench.host.raise(IrqKind::Intx, 0);
        bench.function.intx_fired();
    }
    for high in [true, false] {
        bench.function.end_of_interrupt();
        assert_eq!(bench.line.is_high(), high, "once more, for all that came meanwhile");
    }
    assert_eq!(bench.host.unmasks.load(Ordering::SeqCst), 2);
}

#[test]
fn f5_enabling_messages_lowers_the_line() {
    let bench = Bench::running();
    bench.host.raise(IrqKind::Intx, 0);
    bench.function.intx_fired();
    bench.config16(MSIX + 2, msix::CONTROL_ENABLE);
    assert!(!bench.line.is_high() && !bench.host.live(IrqKind::Intx));
    bench.config16(MSIX + 2, 0);
    assert!(bench.host.live(IrqKind::Intx));
}

#[test]
fn f6_identity_is_the_hosts_and_bars_rom_line_and_topology_are_ours() {
    let bench = Bench::new();
    assert_eq!(bench.config(0), 0x0010_1b36);
    assert_eq!(bench.config(0x0c) >> 16 & 0x80, 0, "not multi-function here");
    for offset in [0x10, 0x14, 0x18, 0x30] {
        bench.config32(offset, u32::MAX);
    }
    let bars = [0x10, 0x14, 0x18, 0x30].map(|offset| bench.config(offset));
    assert_eq!(bars, [0xffff_c004, u32::MAX, 0, 0]);
    assert_eq!(bench.config(0x3c) & 0xffff, 0x0115);
}

#[test]
fn f6_ats_is_hidden() {
    let bench = Bench::new();
    assert_eq!((bench.config(0x100), bench.config(0x140), bench.config(0x144)), (0x0001_0001, 0, 0));
}

#[test]
fn f6_bus_master_is_forwarded_and_an_unaligned_write_reaches_every_field() {
    let bench = Bench::new();
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.host.command() & COMMAND_MASTER, COMMAND_MASTER);
    bench.root.config_write(SID, 0x03, &[0xaa, 0x00, 0x04, 0x00]);
    assert_eq!((bench.host.command(), bench.config(4) & 0xffff), (0x0400, 0x0400));
}

#[test]
fn b11_a_quarantined_function_never_masters_the_bus_again() {
    let bench = Bench::running();
    assert_eq!(bench.function.quarantine(), Ok(()));
    assert_eq!(bench.host.command() & COMMAND_MASTER, 0);
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    assert_eq!(bench.host.command() & COMMAND_MASTER, 0);
    bench.root.reset();
    bench.command(COMMAND_MEMORY | COMMAND_MASTER);
    assert_eq!(bench.host.command() & COMMAND_MASTER, 0);
}

#[test]
fn b11_quarantine_from_inside_an_unmap_does_not_deadlock() {
    let bench = Bench::running();
    let function = Arc::downgrade(&bench.function);
    let hook = move || assert_eq!(function.upgrade().unwrap().quarantine(), Ok(()));
    *bench.slots.on_unmap.lock().unwrap() = Some(Box::new(hook));
    bench.command(COMMAND_MASTER);
    assert_eq!(bench.host.command(), 0);
    *bench.slots.on_unmap.lock().unwrap() = None;
}

#[test]
fn b11_a_bus_master_bit_that_stays_set_is_an_error() {
    let bench = Bench::running();
    bench.host.stuck.store(true, Ordering::SeqCst);
    assert!(bench.function.quarantine().is_err());
}
