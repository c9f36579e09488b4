//! Models: whether the BARs of an assigned function are reached, the code itself (gates, decoder, bus, and the root
//! port in whose slot it loses its power and is taken out), under loom, which tries every order of the threads with a
//! bound on how often one is interrupted. Around it stand a host's function, which is touched by nobody while its
//! memory is off, the slots of the guest's memory, and what another function's DMA is led to, which changes under the
//! lock of a drain (B-10), as does the id that the port gives the function.
// The code of the crate is compiled once more, and not all of it is used here.
#![allow(dead_code)]

#[path = "../../src/bus.rs"]
mod bus;
mod host {
    pub(crate) use devices::host::{
        Doorbells, HostWindow, Interrupts, IrqRoute, MemorySlots, SlotId, SlotPower, SourceIds,
    };
}
#[path = "../../src/pci/decode.rs"]
mod decode;
mod pci {
    pub(crate) use crate::decode::{BarTarget, Decoder};
    pub(crate) use devices::pci::{ConfigSpace, Identity, PciFunction, bridge, config};
}
#[path = "../../src/vfio_pci/reach.rs"]
mod reach;
#[path = "../../src/pci/root_port.rs"]
mod root_port;
mod saved {
    pub(crate) use devices::saved::{Saves, Unfit, decode, encode, fits, hex};
}
mod sync;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bus::{Bus, BusDevice};
use devices::pci::Bridge;
use host::{HostWindow, Interrupts, IrqRoute, MemorySlots, SlotId, SourceIds};
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::thread;
use pci::config::{COMMAND, COMMAND_MASTER, COMMAND_MEMORY};
use pci::{BarTarget, Decoder, PciFunction};
use reach::{BARS, Decoded, Enables, Gates, Places, Reach, Space};
use root_port::{RootPort, RootPortWiring};
use sync::Mutex;
use vfio_bridge::{Function, GroupId, IrqKind, RegionInfo, RegionKind, ResetScope, ResetWay};
use vmm_sys_util::eventfd::EventFd;
use vtd::{Msi, Requester, SourceId};

/// Tries every order with at most `preemptions` of them, which is what finds faults soonest.
fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 50_000;
    builder.check(move || {
        sync::begin();
        run();
    });
}

/// The host's function: its memory is on or off, or it is in a reset.
struct Host {
    on: AtomicBool,
    /// Accesses under way.
    inside: AtomicU32,
}

impl Host {
    /// An access of the device, from wherever it comes.
    fn touch(&self) {
        assert!(self.on.load(Ordering::SeqCst), "reached while its memory is off");
        self.inside.fetch_add(1, Ordering::SeqCst);
        assert!(self.on.load(Ordering::SeqCst), "its memory went off under an access");
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    /// A write of its configuration.
    fn set(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
        assert!(on || self.inside.load(Ordering::SeqCst) == 0, "its memory went off under an access");
    }
}

impl Function for Host {
    fn name(&self) -> String {
        "model".to_owned()
    }
    fn group(&self) -> GroupId {
        GroupId(0)
    }
    fn region(&self, _: RegionKind) -> RegionInfo {
        RegionInfo::default()
    }
    fn read(&self, _: RegionKind, _: u64, data: &mut [u8]) {
        self.touch();
        data.fill(0x11);
    }
    fn write(&self, _: RegionKind, _: u64, _: &[u8]) -> io::Result<()> {
        self.touch();
        Ok(())
    }
    fn file(&self, _: RegionKind) -> Option<Arc<OwnedFd>> {
        None
    }
    fn irq_count(&self, _: IrqKind) -> u32 {
        0
    }
    fn irq_noresize(&self, _: IrqKind) -> bool {
        false
    }
    fn set_irqs(&self, _: IrqKind, _: u32, _: &[Option<&EventFd>]) -> io::Result<()> {
        Ok(())
    }
    fn disable_irqs(&self, _: IrqKind) -> io::Result<()> {
        Ok(())
    }
    fn mask_intx(&self) -> io::Result<()> {
        Ok(())
    }
    fn unmask_intx(&self) -> io::Result<()> {
        Ok(())
    }
    fn reset_way(&self) -> ResetWay {
        ResetWay::None(None)
    }
    fn reset(&self, _: ResetScope) -> io::Result<()> {
        Ok(())
    }
}

/// What of the BAR is in the guest's memory.
#[derive(Default)]
struct InGuest(bool);

/// What of it another function's DMA is led to.
#[derive(Default)]
struct ForPeers {
    /// It is in the guest-physical map.
    in_map: bool,
    /// A leaf of the guest's tables that leads there is mapped.
    leaf: bool,
}

/// As `vmm::kvm::slots` does it: for devices first, then for the guest; and the other way round.
#[derive(Default)]
struct Slots {
    guest: Mutex<InGuest>,
    /// Held by a drain, too.
    queue: Mutex<ForPeers>,
}

impl MemorySlots for Slots {
    fn map(&self, _: u64, _: &HostWindow) -> io::Result<SlotId> {
        self.queue.lock().unwrap().in_map = true;
        self.guest.lock().unwrap().0 = true;
        Ok(SlotId(0))
    }
    fn unmap(&self, _: SlotId) {
        self.guest.lock().unwrap().0 = false;
        *self.queue.lock().unwrap() = ForPeers::default();
    }
}

/// A BAR with a window, on a bus.
struct World {
    bus: Arc<Bus>,
    decoder: Arc<Decoder>,
    host: Arc<Host>,
    slots: Arc<Slots>,
    /// What answers, for a vCPU that found it on the bus already.
    trapped: Arc<Trapped>,
    config: Mutex<Reach>,
}

struct Trapped(Arc<Gates>);

impl BusDevice for Trapped {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(access) = self.0.enter(Space::Memory) {
            access.read(RegionKind::Bar(0), offset, data);
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(access) = self.0.enter(Space::Memory) {
            access.write(RegionKind::Bar(0), offset, data).expect("it takes all");
        }
    }
}

/// Behind a root port, where there is one.
const FUNCTION: Requester = Requester { segment: 0, sid: SourceId::new(1, 0, 0) };
const ON: Enables = Enables { memory: true, io: false };
const OFF: Enables = Enables { memory: false, io: false };
const AT: u64 = 0x10_0000;
const ELSEWHERE: u64 = 0x20_0000;

fn places(first: u64) -> Places {
    std::array::from_fn(|index| (index == 0).then_some((first, first + 0xfff)))
}

impl World {
    /// With memory off.
    fn new(file: &Arc<OwnedFd>) -> Arc<Self> {
        let host = Arc::new(Host { on: AtomicBool::new(false), inside: AtomicU32::new(0) });
        let (bus, slots) = (Arc::new(Bus::default()), Arc::new(Slots::default()));
        let decoder = Arc::new(Decoder::new(bus.clone()));
        let gates = Gates::new(host.clone());
        let trapped = Arc::new(Trapped(gates.clone()));
        let window = HostWindow { fd: file.clone(), offset: 0, len: 0x1000, writable: true, dma_buf: None };
        let target = BarTarget {
            device: trapped.clone(),
            windows: Arc::new([(0, window)]),
            slots: Some(slots.clone()),
            bells: None,
        };
        let mut bars = [const { None }; BARS];
        bars[0] = Some(Decoded::new(Space::Memory, decoder.clone(), target));
        let config = Mutex::new(Reach::new(FUNCTION, gates, bars));
        Arc::new(Self { bus, decoder, host, slots, trapped, config })
    }

    /// Memory on.
    fn running(file: &Arc<OwnedFd>) -> Arc<Self> {
        let world = Self::new(file);
        world.write_command(ON, AT);
        world
    }

    /// A write of the command register or a BAR.
    fn write_command(&self, enables: Enables, at: u64) {
        let mut reach = self.config.lock().unwrap();
        reach.change(enables, &places(at), |change| self.host.set(change.keeps().memory));
    }

    /// A reset.
    fn reset(&self) {
        let mut reach = self.config.lock().unwrap();
        let closed = reach.close();
        self.host.set(closed.change().keeps().memory);
        assert!(!self.slots.guest.lock().unwrap().0 && !self.slots.queue.lock().unwrap().in_map);
        assert_eq!(closed.change().keeps(), OFF);
    }

    /// A vCPU's access: what is mapped is reached without an exit, all else by way of the bus.
    fn access(&self) {
        let guest = self.slots.guest.lock().unwrap();
        if guest.0 {
            // KVM takes a page from a guest when no vCPU is in it any more.
            self.host.touch();
            return;
        }
        drop(guest);
        let mut data = [0];
        self.bus.read(AT, &mut data);
        assert!(matches!(data, [0x11] | [0xff]));
    }

    /// One that was on its way already when whatever happens began.
    fn late_access(&self) {
        let mut data = [0];
        self.trapped.read(0, &mut data);
        assert!(matches!(data, [0x11] | [0xff]));
        self.trapped.write(0, &[1]);
    }

    /// A drain of the unit's queue for another function, and its DMA.
    fn peer(&self) {
        let mut queue = self.slots.queue.lock().unwrap();
        queue.leaf = queue.in_map;
        drop(queue);
        let queue = self.slots.queue.lock().unwrap();
        if queue.leaf {
            // The host takes a page from a device when no request to it is under way any more.
            self.host.touch();
        }
        // One that is emulated looks for the BAR inside what a drain waits for, and reaches it afterwards.
        let found = self.decoder.find(AT, 1);
        drop(queue);
        if let Some((_, offset, device)) = found {
            device.write(offset, &[1]);
        }
    }

    fn spawn(self: &Arc<Self>, run: impl FnOnce(&Self) + 'static) -> thread::JoinHandle<()> {
        let world = self.clone();
        thread::spawn(move || run(&world))
    }
}

/// The function, as the root port has it: a write of its command register also places its BAR, which a reset forgot.
struct InSlot(Arc<World>);

impl PciFunction for InSlot {
    fn config_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn config_write(&self, _: u16, data: &[u8]) {
        self.0.write_command(if data[0] & COMMAND_MEMORY as u8 != 0 { ON } else { OFF }, AT);
    }
    fn reset(&self) {
        self.0.reset();
    }
}

/// The unit hears of ids in its queue.
struct Ids(Arc<World>);

impl SourceIds for Ids {
    fn renumbered(&self, _: Requester, _: Option<SourceId>) {
        drop(self.0.slots.queue.lock().unwrap());
    }
}

struct NoInterrupts;

impl Interrupts for NoInterrupts {
    fn signal(&self, _: Requester, _: Msi) {}
    fn route(&self, _: Requester) -> io::Result<Arc<dyn IrqRoute>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn set_routes(&self, _: &[(Arc<dyn IrqRoute>, Option<Msi>)]) {}
}

/// A root port, with the function in its slot.
struct Slot(Arc<RootPort>);

const SLOT_CONTROL: u16 = 0x50 + 0x18;
const POWER_OFF: u16 = 1 << 10;

impl Slot {
    fn new(world: &Arc<World>) -> Arc<Self> {
        let port = RootPort::new(RootPortWiring {
            requester: Requester { sid: SourceId::new(0, 0x10, 0), ..FUNCTION },
            number: 1,
            bus: FUNCTION.sid.bus(),
            decoder: world.decoder.clone(),
            port_decoder: Arc::new(Decoder::new(Arc::default())),
            interrupts: Arc::new(NoInterrupts),
            ids: Some(Arc::new(Ids(world.clone()))),
            power: None,
        });
        port.reserve().expect("an empty slot");
        port.fill(Arc::new(InSlot(world.clone())));
        // Bus numbers, all memory from AT on, and Memory Enable.
        port.config_write(0x18, &[0, FUNCTION.sid.bus(), FUNCTION.sid.bus()]);
        port.config_write(0x20, &[0x10, 0, 0x10, 0]);
        port.config_write(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER).to_le_bytes());
        world.write_command(ON, AT);
        Arc::new(Self(port))
    }

    /// A write of the slot's power.
    fn power(&self, on: bool) {
        self.0.config_write(SLOT_CONTROL, &if on { 0 } else { POWER_OFF }.to_le_bytes());
    }

    /// The end of the function's process.
    fn surprise(&self) {
        self.0.take_by_surprise();
    }

    /// A vCPU's write of the command register.
    fn write_command(&self, enables: Enables) {
        let command = if enables.memory { COMMAND_MEMORY } else { 0 };
        self.0.with_below(FUNCTION.sid, &mut |function| function.config_write(COMMAND, &command.to_le_bytes()));
    }
}

fn file() -> Arc<OwnedFd> {
    Arc::new(File::open("/dev/null").expect("a file").into())
}

#[test]
fn f3_no_access_of_a_vcpu_comes_while_memory_is_off() {
    let file = file();
    model(3, move || {
        let world = World::running(&file);
        let vcpu = world.spawn(|world| world.access());
        world.write_command(OFF, AT);
        vcpu.join().unwrap();
        let mut data = [0];
        world.trapped.read(0, &mut data);
        assert_eq!(data, [0xff]);
    });
}

#[test]
fn f3_an_access_that_was_on_its_way_is_waited_for_or_gets_ones() {
    let file = file();
    model(3, move || {
        let world = World::running(&file);
        let vcpus = [(); 2].map(|()| world.spawn(|world| world.late_access()));
        world.write_command(OFF, AT);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
    });
}

#[test]
fn f3_no_dma_of_another_function_comes_while_memory_is_off() {
    let file = file();
    model(3, move || {
        let world = World::running(&file);
        let peer = world.spawn(|world| world.peer());
        world.write_command(OFF, AT);
        peer.join().unwrap();
        assert!(!world.slots.queue.lock().unwrap().leaf);
    });
}

#[test]
fn f3_memory_goes_off_and_on_and_a_reset_comes_under_accesses() {
    let file = file();
    model(2, move || {
        let world = World::running(&file);
        let vcpu = world.spawn(|world| {
            world.access();
            world.late_access();
        });
        let toggles = world.spawn(|world| {
            world.write_command(OFF, AT);
            world.write_command(ON, AT);
        });
        world.reset();
        toggles.join().unwrap();
        vcpu.join().unwrap();
    });
}

#[test]
fn f3_a_bar_moves_under_accesses_and_dma() {
    let file = file();
    model(2, move || {
        let world = World::running(&file);
        let vcpu = world.spawn(|world| {
            world.access();
            world.late_access();
        });
        let peer = world.spawn(|world| world.peer());
        world.write_command(ON, ELSEWHERE);
        vcpu.join().unwrap();
        peer.join().unwrap();
        // Memory stayed on.
        let (mut here, mut there) = ([0], [0]);
        world.bus.read(AT, &mut here);
        world.bus.read(ELSEWHERE, &mut there);
        assert_eq!((here, there), ([0xff], [0x11]));
    });
}

#[test]
fn f3_two_functions_with_one_address_and_their_memory() {
    let file = file();
    model(2, move || {
        let world = World::running(&file);
        // The other one waits for the address, and is put there by the write that takes the first away.
        let device = Arc::new(Trapped(Gates::new(world.host.clone())));
        let target = BarTarget::of_device(device);
        let other = Requester { sid: SourceId::new(0, 6, 0), ..FUNCTION };
        let vcpu = world.spawn(|world| world.access());
        let moves = world.spawn(move |world| {
            world.decoder.set(other, 0, Some((AT, AT + 0xfff)), &target);
            world.decoder.set(other, 0, None, &target);
        });
        world.write_command(OFF, AT);
        moves.join().unwrap();
        vcpu.join().unwrap();
    });
}

/// Nothing of the function is reached, and no write of a vCPU changed that.
fn is_gone(world: &World) {
    assert!(!world.host.on.load(Ordering::SeqCst), "memory is on in a slot without power");
    assert!(!world.slots.guest.lock().unwrap().0 && !world.slots.queue.lock().unwrap().in_map);
    let mut data = [0];
    world.bus.read(AT, &mut data);
    assert_eq!(data, [0xff]);
}

#[test]
fn f3_a_function_is_unplugged_while_memory_goes_off_and_on_under_accesses() {
    let file = file();
    model(2, move || {
        let world = World::running(&file);
        let slot = Slot::new(&world);
        let vcpu = world.spawn(|world| {
            world.access();
            world.late_access();
        });
        let toggles = world.spawn({
            let slot = slot.clone();
            move |_| {
                slot.write_command(OFF);
                slot.write_command(ON);
            }
        });
        slot.power(false);
        is_gone(&world);
        toggles.join().unwrap();
        vcpu.join().unwrap();
        is_gone(&world);
    });
}

#[test]
fn f3_a_function_is_unplugged_and_comes_again_under_accesses_and_dma() {
    let file = file();
    model(2, move || {
        let world = World::running(&file);
        let slot = Slot::new(&world);
        let vcpu = world.spawn(|world| world.access());
        let peer = world.spawn(|world| world.peer());
        slot.power(false);
        slot.power(true);
        slot.write_command(ON);
        vcpu.join().unwrap();
        peer.join().unwrap();
        let mut data = [0];
        world.bus.read(AT, &mut data);
        assert_eq!(data, [0x11]);
    });
}

#[test]
fn f3_the_process_of_a_function_ends_as_its_slot_loses_power() {
    let file = file();
    model(3, move || {
        let world = World::running(&file);
        let slot = Slot::new(&world);
        let other = world.spawn({
            let slot = slot.clone();
            move |_| slot.surprise()
        });
        let vcpu = world.spawn(|world| world.late_access());
        slot.power(false);
        is_gone(&world);
        other.join().unwrap();
        vcpu.join().unwrap();
    });
}
