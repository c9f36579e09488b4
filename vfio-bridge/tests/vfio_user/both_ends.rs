//! Our client and our server.

use std::sync::Arc;

use vfio_bridge::{
    Bridge, Function, HostIommu, IrqKind, Quarantine, RegionKind, ResetScope, UnmapRange,
    vfio_user::{DmaRefused, UserEndpoint, VfioUser},
};
use vtd::{
    DomainId, Gpa, Iova, IovaRange, MapOp, Mapping, PagedSpace, Perm, RefusalCause, Requester, SourceId, SpaceKey,
    SpaceListener, Tables, UnitId,
};

use super::rig::{Asked, HIGH, Memory, PATIENT, RAM, Rig, event, serving, was_signalled};

#[test]
fn regions_interrupts_and_reset_reach_the_device() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    let function = &rig.function;
    assert_eq!(function.region(RegionKind::Bar(2)).size, 4 << 20);
    assert_eq!(function.region(RegionKind::Bar(0)).size, 0);
    assert_eq!((function.irq_count(IrqKind::Msix), function.irq_count(IrqKind::Msi)), (40, 0));

    // More than one message takes.
    let mut data = vec![0; (1 << 20) + 5];
    function.read(RegionKind::Bar(2), 3, &mut data);
    assert!(data.iter().zip(3u64..).all(|(byte, at)| *byte == at as u8));
    // Outside there is nothing: ones, as on a bus, and no write.
    function.read(RegionKind::Config, 254, &mut data[..4]);
    assert_eq!(data[..4], [0xff; 4]);
    assert!(function.write(RegionKind::Config, 254, &[0; 4]).is_err());
    function.write(RegionKind::Config, 4, &[6, 0]).unwrap();
    assert_eq!(serving.device.take(), [Asked::Write(RegionKind::Config, 4, vec![6, 0])]);

    // Sixteen eventfds a message, and none with those that take one away.
    let events: Vec<_> = (0..18).map(|_| event()).collect();
    let mut triggers: Vec<_> = events.iter().map(Some).collect();
    triggers.push(None);
    function.set_irqs(IrqKind::Msix, 0, &triggers).unwrap();
    let asked = |start, some: usize, none: usize| {
        Asked::Irqs(IrqKind::Msix, start, [vec![true; some], vec![false; none]].concat())
    };
    assert_eq!(serving.device.take(), [asked(0, 16, 0), asked(16, 2, 0), asked(18, 0, 1)]);
    use std::io::Write;
    serving.device.triggers.lock().unwrap()[17].as_mut().unwrap().write_all(&1u64.to_ne_bytes()).unwrap();
    assert!(was_signalled(&events[17]) && !was_signalled(&events[16]));
    // More than there are.
    assert!(function.set_irqs(IrqKind::Intx, 0, &[None, None]).is_err());

    function.disable_irqs(IrqKind::Msix).unwrap();
    function.unmask_intx().unwrap();
    function.reset(ResetScope::Function).unwrap();
    assert_eq!(serving.device.take(), [Asked::Disable(IrqKind::Msix), Asked::Unmask, Asked::Reset]);

    drop(rig);
    serving.thread.join().unwrap().unwrap();
    assert_eq!(serving.device.take().len(), 5, "every kind of interrupt is disabled when the client is gone");
}

#[test]
fn the_device_reaches_what_is_mapped_and_nothing_else() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    let (device, memory) = (&serving.memory, &rig.memory);
    rig.map(0x10_0000, HIGH + 0x3000, 0x2000, Perm::ReadWrite).unwrap();
    rig.map(0x10_2000, 0x1000, 0x1000, Perm::Read).unwrap();
    rig.map(0x10_4000, 0x5000, 0x1000, Perm::Write).unwrap();
    memory.put(HIGH + 0x3008, 7);
    let mut data = [0; 8];
    device.read(Iova(0x10_0008), &mut data).unwrap();
    assert_eq!(u64::from_ne_bytes(data), 7);
    // Over the edge of two mappings, which are far apart in memory.
    memory.put(HIGH + 0x4ff8, 1);
    memory.put(0x1000, 2);
    let mut both = [0; 16];
    device.read(Iova(0x10_1ff8), &mut both).unwrap();
    assert_eq!(both, [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    device.write(Iova(0x10_4000), &9u64.to_ne_bytes()).unwrap();
    assert_eq!(memory.get(0x5000), 9);
    assert!(rig.heard.blocked.lock().unwrap().is_empty());

    // Permissions, and what is between the mappings. What came before the edge was written.
    assert_eq!(device.write(Iova(0x10_2000), &[1; 8]), Err(DmaRefused(Iova(0x10_2000))));
    assert_eq!(memory.get(0x1000), 2);
    assert_eq!(device.read(Iova(0x10_4000), &mut data), Err(DmaRefused(Iova(0x10_4000))));
    assert_eq!(device.write(Iova(0x10_4ffc), &[3; 8]), Err(DmaRefused(Iova(0x10_5000))));
    assert_eq!(memory.get(0x5ff8), 0x0303_0303_0000_0000);
    assert_eq!(device.read(Iova(u64::MAX - 3), &mut data), Err(DmaRefused(Iova(u64::MAX - 3))));
    let blocked = std::mem::take(&mut *rig.heard.blocked.lock().unwrap());
    let expected = [(0x10_2000, true), (0x10_4000, false), (0x10_5000, true), (u64::MAX - 3, false)];
    assert_eq!(blocked, expected);

    // A message is one in the interrupt window only, and of four aligned bytes only.
    device.write(Iova(0xfee0_0004), &0x4041u32.to_le_bytes()).unwrap();
    assert_eq!(*rig.heard.messages.lock().unwrap(), [(0xfee0_0004, 0x4041)]);
    assert!(device.write(Iova(0xfee0_0004), &[1; 8]).is_err());
    assert!(device.write(Iova(0xfee0_0002), &[1; 4]).is_err());
    assert!(device.write(Iova(0xfef0_0000), &[1; 4]).is_err());
    assert_eq!(rig.heard.messages.lock().unwrap().len(), 1);
}

#[test]
fn what_was_unmapped_is_not_reached_any_more() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    for page in 0..200 {
        rig.map(0x1_0000 + page * 0x2000, page % 100 * 0x1000, 0x1000, Perm::ReadWrite).unwrap();
    }
    // Holes count for nothing; a part of a mapping is not taken.
    assert!(rig.unmap(0x1_0000, 0x1_07ff).is_err());
    assert!(rig.unmap(0x1_0800, 0x1_ffff).is_err());
    assert_eq!(rig.unmap(0, 0x1_0000 + 99 * 0x2000 + 0x1fff).unwrap(), 100 * 0x1000);
    let mut data = [0; 4];
    assert!(serving.memory.read(Iova(0x1_0000), &mut data).is_err());
    assert!(serving.memory.read(Iova(0x1_0000 + 99 * 0x2000), &mut data).is_err());
    assert!(serving.memory.read(Iova(0x1_0000 + 100 * 0x2000), &mut data).is_ok());
    assert_eq!(rig.host.unmap(rig.space(), UnmapRange::All).unwrap(), 100 * 0x1000);
    assert!(serving.memory.read(Iova(0x1_0000 + 100 * 0x2000), &mut data).is_err());
    // Twice at one place, only after it is gone.
    rig.map(0x1000, 0, 0x1000, Perm::Read).unwrap();
    assert!(rig.map(0x1000, 0, 0x1000, Perm::Read).is_err());
    assert_eq!(rig.unmap(0x1000, 0x1fff).unwrap(), 0x1000);
    rig.map(0x1000, 0, 0x1000, Perm::ReadWrite).unwrap();
}

#[test]
fn an_unmap_waits_for_dma_and_nothing_is_written_after_it() {
    let (stream, serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = {
        let (memory, stop) = (serving.memory.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut written = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                written += u64::from(memory.write(Iova(0x8000), &[0xaa; 64]).is_ok());
            }
            written
        })
    };
    for round in 0..200 {
        rig.map(0x8000, 0x2000, 0x1000, Perm::ReadWrite).unwrap();
        rig.unmap(0x8000, 0x8fff).unwrap();
        rig.memory.put(0x2000, round);
        std::thread::yield_now();
        assert_eq!(rig.memory.get(0x2000), round, "written after the unmap");
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
}

struct Nobody;

impl Quarantine for Nobody {
    fn quarantine(&self, _: &[Requester], _: &str) -> Result<(), String> {
        panic!("nothing is refused here")
    }
    fn stop_machine(&self, _: &[Requester], _: &str) {
        panic!("nothing is refused here")
    }
}

#[test]
fn the_bridge_keeps_the_process_exactly_where_the_guest_has_it() {
    let (stream, serving) = serving();
    let memory = Memory::new();
    let host = Arc::new(VfioUser::default());
    let function = host.open(UserEndpoint::Connected(stream.into()), "test").unwrap();
    let bridge = Bridge::new(vec![host], memory.map.clone(), Arc::new(Nobody));
    let requester = Requester { segment: 0, sid: SourceId::new(0, 1, 0) };
    bridge.register(requester, function.group()).unwrap();
    assert_eq!(bridge.backend(requester), Some("vfio-user"));
    let read = |iova| {
        let mut data = [0; 8];
        serving.memory.read(Iova(iova), &mut data).map(|()| u64::from_ne_bytes(data))
    };
    assert!(read(0).is_err());

    bridge.attach(requester.into(), &SpaceKey::Identity, &mut std::iter::empty()).unwrap();
    memory.put(0x7000, 1);
    memory.put(HIGH + 0x1000, 2);
    assert_eq!((read(0x7000), read(HIGH + 0x1000)), (Ok(1), Ok(2)));
    assert!(read(RAM / 2).is_err());

    let space = SpaceKey::Paged(PagedSpace {
        unit: UnitId(0),
        tables: Tables::Second { root: Gpa(0x1000), width: 48 },
        domain: DomainId(1),
    });
    let mapping = Mapping { iova: Iova(0x5000), gpa: Gpa(0x7000), len: 0x1000, perm: Perm::ReadWrite };
    bridge.attach(requester.into(), &space, &mut [mapping].into_iter()).unwrap();
    assert_eq!((read(0x5000), read(0x7000).is_err()), (Ok(1), true));
    let beyond = Mapping { iova: Iova(0x9000), gpa: Gpa(RAM), len: 0x1000, perm: Perm::ReadWrite };
    let ops = [
        MapOp::Unmap(IovaRange::new(0x5000, 0x5fff)),
        MapOp::Map(Mapping { iova: Iova(0x6000), ..mapping }),
        MapOp::Map(beyond),
    ];
    let refused = bridge.apply(&space, &ops).refused;
    assert_eq!(
        refused.iter().map(|refusal| (refusal.range.first, refusal.cause)).collect::<Vec<_>>(),
        [(0x9000, RefusalCause::Target)]
    );
    assert_eq!((read(0x6000), read(0x5000).is_err()), (Ok(1), true));
    bridge.detach(requester.into());
    assert!(read(0x6000).is_err());
}

#[test]
fn the_process_gets_no_more_mappings_than_it_said_it_takes() {
    let (stream, _serving) = serving();
    let rig = Rig::connect(stream, PATIENT).unwrap();
    assert_eq!(rig.host.limits(rig.space()).entries, 1 << 20);
    assert_eq!(rig.host.limits(rig.space()).address_width(), 64);
}
