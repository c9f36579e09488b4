//! A function of the host that is not one, and a machine around it.

use std::collections::BTreeMap;
pub use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

pub use vfio_bridge::{GroupId, Migrates, RegionInfo, ResetWay};
pub use vtd::SourceId;

use super::*;
use crate::Bus;
use crate::pci::PciRoot;
pub use crate::pci::config::{COMMAND_INTX_OFF, COMMAND_MASTER};
use crate::pci::express::Upstream;
use crate::testing::{FakeInterrupts, FakeLine, FakeSlots, Mapped};

pub const SID: SourceId = SourceId::new(0, 5, 0);
pub const BAR_GPA: u64 = 0x80_0000_0000;
pub const POWER: u16 = 0x40;
pub const MSIX: u16 = 0x50;
pub const EXPRESS: u16 = 0x60;
pub const MSI: u16 = 0xa0;
pub const TABLE: u64 = BAR_GPA + 0x2000;
pub const PBA: u64 = BAR_GPA + 0x3000;

/// A function with a 64-bit BAR 0 of 16 KiB (MSI-X table at 0x2000, pending bits at 0x3000), power management, MSI-X
/// (4), MSI (2, with masks), FLR, and an ATS capability. It checks what F-1 to F-3 promise at each access.
pub struct FakeHost {
    pub config: Mutex<[u8; CONFIG_SIZE]>,
    pub bar: Mutex<Vec<u8>>,
    pub rom: Mutex<Vec<u8>>,
    pub slots: Arc<FakeSlots>,
    /// What is enabled: of each vector that is allocated, what it signals.
    pub irqs: Mutex<Vec<(IrqKind, Vec<Option<EventFd>>)>>,
    pub enables: AtomicU32,
    /// Calls of `set_irqs`.
    pub sets: AtomicU32,
    /// Vectors that the host can still give; each that signals somebody is one, or, where all are allocated at once,
    /// each.
    pub host_vectors: AtomicU32,
    pub noresize: AtomicBool,
    pub accesses: AtomicU32,
    pub violations: AtomicU32,
    pub resets: Mutex<Vec<ResetScope>>,
    /// Functions of the same bus, which a reset of the machine resets along.
    pub bus: Mutex<Vec<Arc<FakeHost>>>,
    pub unmasks: AtomicU32,
    /// The legacy line is masked: 1 by a call, 2 as it fired.
    pub masked: AtomicU32,
    /// Bus Master does not go off.
    pub stuck: AtomicBool,
    /// Its configuration space cannot be read any more: ones.
    pub gone: AtomicBool,
    /// It cannot be written.
    pub read_only: AtomicBool,
    /// A reset fails.
    pub no_reset: AtomicBool,
    /// Called while an access to a BAR is under way.
    pub on_access: Mutex<Option<Box<dyn Fn() + Send>>>,
    /// How many vectors it has of these kinds, where it is not as said above.
    pub counts: Mutex<Vec<(IrqKind, u32)>>,
    /// Whether BARs have a file.
    pub no_file: AtomicBool,
    /// Bytes of configuration space.
    pub config_size: AtomicU32,
    /// The sizes of BARs besides the first.
    pub other_bars: Mutex<BTreeMap<u8, u64>>,
    /// Its own state; `None`: it has none that can be had. What begins with 0xbad it does not take.
    pub state: Mutex<Option<Vec<u8>>>,
    /// What was asked of its state.
    pub moves: Mutex<Vec<&'static str>>,
}

impl FakeHost {
    pub fn new(slots: Arc<FakeSlots>) -> Self {
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
            rom: Mutex::new((0..0x2000u32).map(|at| [0x55, 0xaa].get(at as usize).map_or(at as u8, |b| *b)).collect()),
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
            masked: AtomicU32::new(0),
            stuck: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            read_only: AtomicBool::new(false),
            no_reset: AtomicBool::new(false),
            on_access: Mutex::default(),
            counts: Mutex::default(),
            no_file: AtomicBool::new(false),
            config_size: AtomicU32::new(0x1000),
            other_bars: Mutex::default(),
            state: Mutex::default(),
            moves: Mutex::default(),
        }
    }

    pub fn command(&self) -> u16 {
        let config = self.config.lock().unwrap();
        u16::from_le_bytes([config[4], config[5]])
    }
    /// It cannot raise its line.
    pub fn holds_line(&self) -> bool {
        self.command() & COMMAND_INTX_OFF != 0
    }
    pub fn is_enabled(&self) -> bool {
        self.command() & COMMAND_MEMORY != 0 && self.config.lock().unwrap()[usize::from(POWER) + 4] & 3 == 0
    }
    /// Whether accesses of `region` may come: those of ports are enabled by a bit of their own.
    pub fn answers(&self, region: RegionKind) -> bool {
        let RegionKind::Bar(bar) = region else { return self.is_enabled() };
        let is_io = self.config.lock().unwrap()[0x10 + 4 * usize::from(bar)] & 3 == 1;
        let awake = self.config.lock().unwrap()[usize::from(POWER) + 4] & 3 == 0;
        if is_io { self.command() & COMMAND_IO != 0 && awake } else { self.is_enabled() }
    }
    /// Changes its configuration space, as before it is assigned.
    pub fn put(&self, at: u16, bytes: &[u8]) {
        self.config.lock().unwrap()[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    }
    /// What is there.
    pub fn get(&self, at: u16, len: usize) -> Vec<u8> {
        self.config.lock().unwrap()[usize::from(at)..][..len].to_vec()
    }
    pub fn check(&self, holds: bool) {
        self.violations.fetch_add(u32::from(!holds), Ordering::SeqCst);
    }
    /// The device raises vector `index` of `kind`. One that signals nobody is masked by the host, and so pending in the
    /// device.
    pub fn raise(&self, kind: IrqKind, index: usize) {
        let irqs = self.irqs.lock().unwrap();
        let (_, events) = irqs.iter().find(|(k, _)| *k == kind).expect("enabled on the host");
        if kind == IrqKind::Intx {
            self.masked.store(2, Ordering::SeqCst);
        }
        match events.get(index) {
            Some(Some(event)) => event.write(1).unwrap(),
            _ => drop(self.set_pending(kind, index, true)),
        }
    }
    /// Sets the device's own pending bit, and says what it was.
    pub fn set_pending(&self, kind: IrqKind, index: usize, pending: bool) -> bool {
        let (mut config, mut bar) = (self.config.lock().unwrap(), self.bar.lock().unwrap());
        let byte = match kind {
            IrqKind::Msix => &mut bar[0x3000 + index / 8],
            _ => &mut config[usize::from(MSI) + 20 + index / 8],
        };
        let was = *byte >> (index % 8) & 1 != 0;
        *byte = *byte & !(1 << (index % 8)) | u8::from(pending) << (index % 8);
        was
    }
    pub fn live(&self, kind: IrqKind) -> bool {
        self.irqs.lock().unwrap().iter().any(|(k, _)| *k == kind)
    }
    /// The vectors of `kind` that signal somebody.
    pub fn taken(&self, kind: IrqKind) -> Vec<usize> {
        let irqs = self.irqs.lock().unwrap();
        let events = irqs.iter().filter(|(k, _)| *k == kind).flat_map(|(_, events)| events.iter().enumerate());
        events.filter_map(|(index, event)| event.is_some().then_some(index)).collect()
    }
}

impl Function for FakeHost {
    fn name(&self) -> String {
        "fake".to_owned()
    }
    fn group(&self) -> GroupId {
        GroupId(0)
    }
    fn region(&self, region: RegionKind) -> RegionInfo {
        let info =
            |size, mappable| RegionInfo { size, file_offset: FILE_OFFSET, readable: true, writable: true, mappable };
        match region {
            RegionKind::Bar(0) => info(0x4000, vec![(0, 0x4000)]),
            RegionKind::Rom => info(self.rom.lock().unwrap().len() as u64, vec![]),
            RegionKind::Config => info(self.config_size.load(Ordering::SeqCst).into(), vec![]),
            RegionKind::Bar(bar) => info(self.other_bars.lock().unwrap().get(&bar).copied().unwrap_or(0), vec![]),
        }
    }
    fn read(&self, region: RegionKind, offset: u64, data: &mut [u8]) {
        let at = offset as usize;
        if region == RegionKind::Config {
            data.copy_from_slice(&self.config.lock().unwrap()[at..at + data.len()]);
            if self.gone.load(Ordering::SeqCst) {
                data.fill(0xff);
            }
            return;
        }
        self.accesses.fetch_add(1, Ordering::SeqCst);
        self.check(self.answers(region));
        if let Some(hook) = &*self.on_access.lock().unwrap() {
            hook();
        }
        let memory = if region == RegionKind::Rom { &self.rom } else { &self.bar };
        data.copy_from_slice(&memory.lock().unwrap()[at..at + data.len()]);
        self.check(self.answers(region));
    }
    fn write(&self, region: RegionKind, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        if region == RegionKind::Config {
            let (was_enabled, held) = (self.is_enabled(), self.holds_line());
            self.check(at.is_multiple_of(data.len()));
            if self.read_only.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
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
            if at == usize::from(COMMAND) {
                // Linux's vfio reads, changes and writes it, and so undoes what its handler of the line did in between.
                self.check(!self.live(IrqKind::Intx) || self.masked.load(Ordering::SeqCst) != 0);
                if held && !self.holds_line() {
                    self.masked.store(0, Ordering::SeqCst);
                }
                self.check(self.holds_line() || self.live(IrqKind::Intx));
            }
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
        self.check(self.answers(region));
        self.bar.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn file(&self, _: RegionKind) -> Option<Arc<std::os::fd::OwnedFd>> {
        let file = || Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        (!self.no_file.load(Ordering::SeqCst)).then(file)
    }
    /// A file that is as long as the part begins and is, in pages of 16 bits each.
    fn dma_buf(&self, region: RegionKind, offset: u64, len: u64) -> Option<Arc<std::fs::File>> {
        assert!(matches!(region, RegionKind::Bar(_)));
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len((offset >> 12) << 16 | len >> 12).unwrap();
        Some(Arc::new(file))
    }
    fn irq_count(&self, kind: IrqKind) -> u32 {
        if let Some((_, count)) = self.counts.lock().unwrap().iter().find(|(counted, _)| *counted == kind) {
            return *count;
        }
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
        // VFIO clears INTx Disable before its handler is there.
        if kind == IrqKind::Intx {
            self.check(self.holds_line());
            self.masked.store(1, Ordering::SeqCst);
        }
        self.sets.fetch_add(1, Ordering::SeqCst);
        let most = self.host_vectors.load(Ordering::SeqCst) as usize;
        let noresize = self.noresize.load(Ordering::SeqCst);
        let mut irqs = self.irqs.lock().unwrap();
        if matches!(kind, IrqKind::Error | IrqKind::Request) {
            irqs.push((kind, triggers.iter().map(|event| event.map(|event| event.try_clone().unwrap())).collect()));
            return Ok(());
        }
        // VFIO has one of the other kinds at a time.
        let others = irqs.iter().take_while(|(live, _)| matches!(live, IrqKind::Error | IrqKind::Request)).count();
        self.check(irqs[others..].iter().all(|(live, _)| *live == kind));
        if irqs.len() == others {
            if noresize && end > most {
                return Err(io::Error::from_raw_os_error(28));
            }
            self.enables.fetch_add(1, Ordering::SeqCst);
            irqs.push((kind, Vec::new()));
            irqs[others].1.resize_with(end, || None);
        }
        let (_, events) = &mut irqs[others];
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
        self.check(kind != IrqKind::Intx || self.holds_line());
        self.irqs.lock().unwrap().retain(|(k, _)| *k != kind);
        Ok(())
    }
    fn mask_intx(&self) -> io::Result<()> {
        if !self.live(IrqKind::Intx) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let _ = self.masked.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst);
        Ok(())
    }
    fn unmask_intx(&self) -> io::Result<()> {
        // Those are of interest that an end of interrupt makes.
        let was = self.masked.swap(0, Ordering::SeqCst);
        self.unmasks.fetch_add(u32::from(was != 1), Ordering::SeqCst);
        Ok(())
    }
    fn reset_way(&self) -> ResetWay {
        ResetWay::Function("flr".to_owned())
    }
    fn reset(&self, scope: ResetScope) -> io::Result<()> {
        self.check(self.command() & COMMAND_MASTER == 0);
        for other in self.bus.lock().unwrap().iter().filter(|_| scope == ResetScope::Machine) {
            self.check(other.command() & (COMMAND_MASTER | COMMAND_MEMORY) == 0);
            self.check(other.slots.mapped().is_empty() && !other.live(IrqKind::Msix));
        }
        self.resets.lock().unwrap().push(scope);
        if self.no_reset.load(Ordering::SeqCst) { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
    fn migration(&self) -> Option<&dyn Migrates> {
        self.state.lock().unwrap().is_some().then_some(self)
    }
}

impl FakeHost {
    fn moved(&self, what: &'static str) -> io::Result<()> {
        self.moves.lock().unwrap().push(what);
        if self.gone.load(Ordering::SeqCst) { Err(io::ErrorKind::NotConnected.into()) } else { Ok(()) }
    }
}

impl Migrates for FakeHost {
    fn stop(&self) -> io::Result<()> {
        self.moved("stop")?;
        let state = self.state.lock().unwrap();
        if state.as_ref().unwrap().starts_with(&[0xba, 0xd0]) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(())
    }
    fn go_on(&self) -> io::Result<()> {
        self.moved("go on")
    }
    fn state(&self) -> io::Result<Vec<u8>> {
        self.moved("state")?;
        Ok(self.state.lock().unwrap().clone().unwrap())
    }
    fn load(&self, state: &[u8]) -> io::Result<()> {
        self.moved("load")?;
        *self.state.lock().unwrap() = Some(state.to_vec());
        Ok(())
    }
}

pub struct Bench {
    pub bus: Arc<Bus>,
    pub ports: Arc<Bus>,
    pub root: Arc<PciRoot>,
    pub host: Arc<FakeHost>,
    pub slots: Arc<FakeSlots>,
    pub interrupts: Arc<FakeInterrupts>,
    pub line: Arc<FakeLine>,
    pub function: Arc<VfioPci>,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(|_| {})
    }
    /// With a function of the host that `prepare` changed.
    pub fn with(prepare: impl FnOnce(&FakeHost)) -> Self {
        Self::made(Upstream::default(), prepare)
    }
    /// With something above the function.
    pub fn below(upstream: Upstream) -> Self {
        Self::made(upstream, |_| {})
    }
    fn made(upstream: Upstream, prepare: impl FnOnce(&FakeHost)) -> Self {
        let (bus, ports) = (Arc::new(Bus::default()), Arc::new(Bus::default()));
        let root = PciRoot::with_ports(bus.clone(), ports.clone());
        let (slots, interrupts, line) =
            (Arc::new(FakeSlots::default()), Arc::new(FakeInterrupts::default()), Arc::new(FakeLine::default()));
        let host = Arc::new(FakeHost::new(slots.clone()));
        prepare(&host);
        let function = VfioPci::new(VfioPciWiring {
            requester: root.requester(SID),
            upstream,
            host: host.clone(),
            decoder: root.decoder(),
            port_decoder: root.port_decoder(),
            slots: slots.clone(),
            interrupts: interrupts.clone(),
            intx: Some((line.clone(), 21)),
        })
        .unwrap();
        root.insert(SID, function.clone()).unwrap();
        Self { bus, ports, root, host, slots, interrupts, line, function }
    }
    /// With BAR 0 placed and memory on.
    pub fn running() -> Self {
        Self::running_with(|_| {})
    }
    /// The same, of a function that `prepare` changed.
    pub fn running_with(prepare: impl FnOnce(&FakeHost)) -> Self {
        let bench = Self::with(prepare);
        bench.config32(0x10, BAR_GPA as u32);
        bench.config32(0x14, (BAR_GPA >> 32) as u32);
        bench.command(COMMAND_MEMORY | COMMAND_MASTER);
        bench
    }
    pub fn config(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.root.config_read(SID, offset, &mut data);
        u32::from_le_bytes(data)
    }
    pub fn config32(&self, offset: u16, value: u32) {
        self.root.config_write(SID, offset, &value.to_le_bytes());
    }
    pub fn config16(&self, offset: u16, value: u16) {
        self.root.config_write(SID, offset, &value.to_le_bytes());
    }
    pub fn command(&self, value: u16) {
        self.config16(COMMAND, value);
    }
    pub fn read(&self, address: u64) -> u32 {
        let mut data = [0; 4];
        self.bus.read(address, &mut data);
        u32::from_le_bytes(data)
    }
    pub fn write(&self, address: u64, value: u32) {
        self.bus.write(address, &value.to_le_bytes());
    }
    pub fn vector(&self, index: u64, data: u32, masked: bool) {
        self.write(TABLE + 16 * index, 0xfee0_0000);
        self.write(TABLE + 16 * index + 4, 0);
        self.write(TABLE + 16 * index + 8, data);
        self.write(TABLE + 16 * index + 12, u32::from(masked));
    }
    /// What answers for BAR `index`, wherever it is.
    pub fn bar(&self, index: usize) -> Arc<dyn crate::BusDevice> {
        self.function.config.lock().unwrap().reach.target(index).expect("a BAR").device.clone()
    }
    pub fn delivered(&self) -> Vec<u32> {
        self.interrupts.take().iter().map(|msi| msi.data).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        assert_eq!(self.host.violations.load(Ordering::SeqCst), 0, "the host saw what it must never see");
    }
}

/// What becomes of `host` alone, at 05.0.
pub fn function_of(host: FakeHost) -> Result<Arc<VfioPci>, VfioPciError> {
    let root = PciRoot::new(Arc::default());
    VfioPci::new(VfioPciWiring {
        requester: root.requester(SID),
        upstream: Upstream::default(),
        slots: host.slots.clone(),
        host: Arc::new(host),
        decoder: root.decoder(),
        port_decoder: root.port_decoder(),
        interrupts: Arc::new(FakeInterrupts::default()),
        intx: None,
    })
}

/// A second function beside that of `bench`, at 06.0, without a legacy interrupt.
pub fn second(bench: &Bench) -> (Arc<FakeSlots>, Arc<FakeHost>, SourceId) {
    let sid = SourceId::new(0, 6, 0);
    let slots = Arc::new(FakeSlots::default());
    let host = Arc::new(FakeHost::new(slots.clone()));
    let function = VfioPci::new(VfioPciWiring {
        requester: bench.root.requester(sid),
        upstream: Upstream::default(),
        host: host.clone(),
        decoder: bench.root.decoder(),
        port_decoder: bench.root.port_decoder(),
        slots: slots.clone(),
        interrupts: bench.interrupts.clone(),
        intx: None,
    })
    .unwrap();
    bench.root.insert(sid, function).unwrap();
    (slots, host, sid)
}

/// Everything but the pages of the MSI-X table and the pending bits.
pub const WINDOWS: [Mapped; 1] = [(BAR_GPA, FILE_OFFSET, 0x2000)];
/// Where regions begin in the host's file.
const FILE_OFFSET: u64 = 0x10_0000;
