use crate::kvm::memory::Ram;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use vtd::Unit;

use devices::host::{HostWindow, MemorySlots};
use vfio_bridge::model::{HostOp, Kernel, Model};
use vfio_bridge::{GroupId, Quarantine};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::{Msi, MsiSink, Requester, SourceId, UnitConfig, UnitId};

use super::*;
use crate::config::BusNumbers;
use crate::kvm::slots::{FunctionSlots, KvmSlots};

const RAM: usize = 1 << 24;
const BAR: u64 = 0xc000_0000;
const LEN: u64 = 0x2000;
/// The IOVA that the guest's tables lead to the BAR's second page.
const IOVA: u64 = 0x5000;

struct Nobody;

impl Quarantine for Nobody {
    fn quarantine(&self, _: &[Requester], _: &str) -> Result<(), String> {
        Ok(())
    }
    fn stop_machine(&self, _: &[Requester], _: &str) {}
}

impl MsiSink for Nobody {
    fn signal(&self, _: Msi) {}
}

fn requester(device: u8) -> Requester {
    Requester { segment: 0, sid: SourceId::new(0, device, 0) }
}

/// Function 1 is in a domain whose table leads to a BAR, function 2 in identity, function 3 has the BAR.
struct World {
    model: Arc<Model>,
    peers: Arc<PeerMemory>,
    unit: Arc<Unit<Ram>>,
    slots: FunctionSlots,
    fd: Arc<OwnedFd>,
    log: Arc<Mutex<Vec<String>>>,
}

impl World {
    fn new() -> Self {
        let ram: Arc<Ram> = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
        let store = |at: u64, value: u64| ram.write_obj(value, GuestAddress(at)).unwrap();
        // Root table, context table, four levels; function 2 is passed through.
        store(0x1000, 0x2000 | 1);
        store(0x2000 + 16 * 8, 0x3000 | 1);
        store(0x2000 + 16 * 8 + 8, 2 | 7 << 8);
        store(0x2000 + 16 * 16, 1 | 2 << 2);
        store(0x2000 + 16 * 16 + 8, 2 | 8 << 8);
        for (table, next) in [(0x3000, 0x4000), (0x4000, 0x5000), (0x5000, 0x6000)] {
            store(table, next | 3);
        }
        store(0x6000 + 8 * (IOVA >> 12), (BAR + 0x1000) | 3);
        store(0x6000, 0x8000 | 3);

        let groups = [1, 2, 3].map(GroupId);
        let model = Model::new(Kernel::new(48), &groups);
        let guest = GuestMap::of_memory(ram.clone()).unwrap();
        let bridge = Arc::new(Bridge::new(vec![model.clone()], guest.clone(), Arc::new(Nobody)));
        let unit = Unit::new(UnitConfig::new(UnitId(0), 48), (*ram).clone(), bridge.clone(), Arc::new(Nobody)).unwrap();
        for device in [1, 2, 3] {
            bridge.register(requester(device), GroupId(device.into())).unwrap();
            unit.add_requester(requester(device)).unwrap();
        }
        unit.write(0x20, &0x1000u64.to_le_bytes());
        unit.write(0x18, &(1u32 << 30).to_le_bytes());
        unit.write(0x18, &(1u32 << 31).to_le_bytes());

        let log = Arc::<Mutex<Vec<String>>>::default();
        let peers = Arc::new(PeerMemory::new(
            guest,
            bridge,
            Some(Arc::new(Units::new(unit.clone(), vec![], &BusNumbers::default(), &[]))),
            None,
        ));
        let kvm = log.clone();
        let set = move |region: kvm_bindings::kvm_userspace_memory_region| {
            kvm.lock().unwrap().push(format!("slot {:#x}", region.memory_size));
            Ok(())
        };
        let slots = Arc::new(KvmSlots::with(Box::new(set), 1, peers.clone()));
        let slots = FunctionSlots { slots, of: requester(3) };
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(LEN).unwrap();
        Self { model, peers, unit, slots, fd: Arc::new(File::into(file)), log }
    }

    fn window(&self) -> HostWindow {
        let dma_buf = Some(Arc::new(File::from(self.fd.try_clone().unwrap())));
        HostWindow { fd: self.fd.clone(), offset: 0, len: LEN, writable: true, dma_buf }
    }

    /// Whether functions 1 (by its IOVA), 2 and 3 (by the address itself) reach the BAR's second page.
    fn reach(&self) -> [bool; 3] {
        let at = |group, iova| self.model.translate(GroupId(group), iova).is_some();
        [at(1, IOVA), at(2, BAR + 0x1000), at(3, BAR + 0x1000)]
    }
}

#[test]
fn f3_b15_a_bar_is_out_of_the_guest_then_of_all_dma_before_it_is_gone_and_comes_in_reverse() {
    let world = World::new();
    assert_eq!(world.reach(), [false; 3]);
    let log = world.log.clone();
    world.model.set_hook(move |served, _| {
        log.lock().unwrap().push(match served.op {
            HostOp::Map(held) => format!("map {:#x}", held.iova),
            HostOp::Unmap(range) => format!("{range:x?}"),
            other => format!("{other:?}"),
        });
    });
    let taken = || std::mem::take(&mut *world.log.lock().unwrap());
    for _ in 0..3 {
        let id = world.slots.map(BAR, &world.window()).unwrap();
        // Not its own: it reaches its BAR without the host's IOMMU.
        assert_eq!(world.reach(), [true, true, false]);
        let dma_buf = |map: &GuestMap| map.host_mem(BAR + 0x1000, 0x1000).and_then(|mem| Some(mem.dma_buf()?.1));
        assert_eq!(dma_buf(&world.peers.hold()), Some(0x1000), "its place in the file, for hosts that map by it");
        assert_eq!(taken(), ["map 0xc0000000", "map 0x5000", "slot 0x2000"]);
        world.slots.unmap(id);
        assert_eq!(world.reach(), [false; 3]);
        let gone = ["slot 0x0", "Span { first: c0000000, last: c0001fff }", "Span { first: 5000, last: 5fff }"];
        assert_eq!(taken(), gone);
        assert_eq!(world.model.translate(GroupId(1), 0).map(|(_, perm)| perm), Some(vtd::Perm::ReadWrite));
    }
}

#[test]
fn b10_a_bar_over_ram_stays_with_its_traps_and_ram_with_devices() {
    let world = World::new();
    let before = world.model.counts();
    for gpa in [0, RAM as u64 - 0x1000] {
        assert!(world.slots.map(gpa, &world.window()).is_err());
    }
    assert!(world.log.lock().unwrap().is_empty(), "the guest keeps its RAM");
    assert_eq!(world.model.counts(), before);
    // Where it ends there is room.
    assert!(world.slots.map(RAM as u64, &world.window()).is_ok());
    assert!(world.model.translate(GroupId(2), RAM as u64).is_some());
}

/// Functions change their BARs on two processors, others drain invalidations and turn translation off and on, and an
/// audit is made. All of it ends, and no audit sees a difference.
#[test]
fn f3_changes_drains_and_audits_at_once_end_and_agree() {
    let world = World::new();
    let other = &FunctionSlots { slots: world.slots.slots.clone(), of: requester(2) };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let world = &world;
        let toggle = move |slots: &FunctionSlots, gpa: u64| {
            for _ in 0..200 {
                let id = slots.map(gpa, &world.window()).unwrap();
                slots.unmap(id);
            }
        };
        let (unit, peers, done) = (&world.unit, &world.peers, &done);
        let drains = scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                // Everything of the IOTLB, by register; then translation off and on.
                unit.write(vtd::spec::registers::offset::IOTLB, &(1u64 << 63 | 1 << 60).to_le_bytes());
                unit.write(0x18, &0u32.to_le_bytes());
                unit.write(0x18, &(1u32 << 31).to_le_bytes());
            }
        });
        let audits = scope.spawn(move || {
            let mut audits = 0;
            while !done.load(Ordering::Relaxed) {
                let _unchanged = peers.hold();
                let audit = unit.audit(&mut |requester, space, granted, audit| {
                    peers.bridge.audit(requester, space, granted, audit);
                });
                assert_eq!(audit.differing(), 0, "{:?}", audit.differences);
                audits += 1;
            }
            audits
        });
        let second = scope.spawn(move || toggle(other, BAR + LEN));
        toggle(&world.slots, BAR);
        second.join().unwrap();
        done.store(true, Ordering::Relaxed);
        drains.join().unwrap();
        assert!(audits.join().unwrap() > 0);
    });
    assert_eq!(world.reach(), [false; 3]);
}
