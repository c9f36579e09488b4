//! performance counters, of the requests of an emulated device: without Caching Mode no other is there.

use images::memory::{page, pages};
use images::tables::READ_WRITE;
use images::vtd::{iotlb_pages, offset::FSTS};
use images::world::IOVA;
use images::x86::{enable_interrupts, interrupts, wait_for};
use images::{World, check, check_eq};

images::tests!(
    a15_counters_move_by_what_a_device_asks_for => "--iommu vtd,perf=on,caching-mode=off",
    a15_frozen_counters_stand_still => "--iommu vtd,perf=on,caching-mode=off",
    a15_an_overflow_interrupts_and_freezes => "--iommu vtd,perf=on,caching-mode=off",
    a15_what_cannot_be_counted_is_refused => "--iommu vtd,perf=on,caching-mode=off",
    a15_counters_are_not_offered_unless_asked_for,
);

const PERFCAP: u64 = 0x300;
const PERFCFGOFF: u64 = 0x310;
const PERFFRZOFF: u64 = 0x314;
const PERFOVFOFF: u64 = 0x318;
const PERFCNTROFF: u64 = 0x31c;
const PERFINTRSTS: u64 = 0x324;
const PERFINTRCTL: u64 = 0x328;
const PERFINTRDATA: u64 = 0x32c;
const PERFINTRADDR: u64 = 0x330;
const PERFEVNTCAP: u64 = 0x380;
const ECMD: u64 = 0x400;
const ECRSP: u64 = 0x410;
const ECCAP_3: u64 = 0x448;

const ENABLE: u8 = 240;
const DISABLE: u8 = 241;
const RESET_CONFIGURATION: u8 = 242;
const FREEZE: u8 = 244;
const UNFREEZE: u8 = 245;

/// (Group, event) of what the tests count.
const REQUESTS: (u64, u64) = (0, 1 << 1);
const SECOND_STAGE_LOOKUP: (u64, u64) = (2, 1 << 4);
const IOTLB_LOOKUP: (u64, u64) = (3, 1 << 0);
const IOTLB_HIT: (u64, u64) = (3, 1 << 1);

/// Bits of a configuration: an interrupt, and a freeze, on overflow.
const INTERRUPT: u64 = 1 << 1;
const FREEZES: u64 = 1 << 2;
const VECTOR: u8 = 0x93;

/// A world whose unit has counters, found as a driver finds them.
struct Counters {
    world: World,
    configurations: u64,
    counters: u64,
    stride: u64,
}

impl Counters {
    fn new() -> Self {
        let (world, _) = World::recorded_with_domain();
        let unit = &world.unit;
        check_eq!((unit.capability(61, 1), unit.extended(51, 1)), (1, 1), "ECMDS and PMS");
        let capability = unit.read64(PERFCAP);
        check!(capability & 0xffff >= 4 && capability >> 50 & 1 == 1, "PERFCAP is {capability:#x}");
        check_eq!(unit.read64(ECCAP_3) >> 48, 0x3f, "the commands of counters");
        for (group, bits) in [REQUESTS, SECOND_STAGE_LOOKUP, IOTLB_LOOKUP, IOTLB_HIT] {
            check_eq!(unit.read64(PERFEVNTCAP + 8 * group) & bits, bits, "an event of a group");
        }
        let [configurations, counters] = [PERFCFGOFF, PERFCNTROFF].map(|at| unit.read32(at).into());
        Self { configurations, counters, stride: 1 << ((capability >> 52 & 7) + 10), world }
    }

    /// The status of an enhanced command.
    fn command(&self, command: u8, operand: u64) -> u64 {
        self.world.unit.write64(ECMD, u64::from(command) | operand << 16);
        wait_for("an enhanced command", || self.world.unit.read64(ECRSP) & 1 == 0);
        self.world.unit.read64(ECRSP) >> 1
    }

    fn count(&self, index: u64, (group, event): (u64, u64), flags: u64) {
        self.world.unit.write64(self.configurations + 0x100 * index, group << 8 | event << 32 | flags);
        check_eq!(self.command(ENABLE, index), 0, "the status of the command that enables a counter");
    }

    fn value(&self, index: u64) -> u64 {
        self.world.unit.read64(self.counters + self.stride * index)
    }

    fn set(&self, index: u64, value: u64) {
        self.world.unit.write64(self.counters + self.stride * index, value);
    }
}

fn a15_counters_move_by_what_a_device_asks_for() {
    let mut counters = Counters::new();
    let domain = counters.world.domain(1, counters.world.levels());
    counters.world.attach(counters.world.edu.sid, &domain);
    let memory = pages(2, 4096);
    (0..2).for_each(|page| domain.map(IOVA + page * 4096, memory + page * 4096, READ_WRITE));
    counters.world.unit.invalidate(&[iotlb_pages(1, IOVA, 1)]);
    for (index, event) in [REQUESTS, IOTLB_LOOKUP, IOTLB_HIT, SECOND_STAGE_LOOKUP].into_iter().enumerate() {
        counters.count(index as u64, event, 0);
    }
    let all = || [0, 1, 2, 3].map(|index| counters.value(index));
    let edu = &counters.world.edu;
    edu.dma_write(IOVA, 8);
    check_eq!(all(), [1, 1, 0, 1], "after one transfer");
    for _ in 0..10 {
        edu.dma_write(IOVA + 16, 64);
    }
    check_eq!(all(), [11, 11, 10, 1], "after ten more of the same page");
    // Into the next page.
    edu.dma_read(IOVA + 4096 - 8, 16);
    check_eq!(all(), [13, 13, 11, 2], "after one of two pages");
    counters.world.no_fault();
    check_eq!(counters.command(DISABLE, 0), 0, "the status of the command that disables a counter");
    counters.world.edu.dma_write(IOVA, 8);
    check_eq!([counters.value(0), counters.value(1)], [13, 14], "after a transfer that one of them did not count");
    // Another function is another requester, and none of these.
    check_eq!(counters.command(RESET_CONFIGURATION, 0), 0, "the status of a reset");
    counters.world.unit.write32(counters.configurations + 8, 1 << 31 | 0xfff8);
    counters.count(0, REQUESTS, 0);
    counters.world.edu.dma_write(IOVA, 8);
    check_eq!(counters.value(0), 13, "requests of a requester that there is not");
}

fn a15_frozen_counters_stand_still() {
    let counters = Counters::new();
    counters.count(0, REQUESTS, 0);
    let freeze = counters.world.unit.read32(PERFFRZOFF).into();
    for round in 0..3 {
        check_eq!(counters.command(FREEZE, 0), 0, "the status of a freeze");
        check!(counters.world.unit.read64(freeze) & 1 == 1, "the counter is not frozen");
        counters.world.edu.dma_write(counters.world.edu.scratch, 8);
        check_eq!(counters.value(0), round, "what was counted");
        check_eq!(counters.command(UNFREEZE, 0), 0, "the status of an unfreeze");
        counters.world.edu.dma_write(counters.world.edu.scratch, 8);
        check_eq!(counters.value(0), round + 1, "what was counted");
    }
}

fn a15_an_overflow_interrupts_and_freezes() {
    let counters = Counters::new();
    let (unit, id) = (&counters.world.unit, enable_interrupts());
    unit.write32(PERFINTRDATA, VECTOR.into());
    unit.write32(PERFINTRADDR, 0xfee0_0000 | u32::from(id) << 12);
    unit.write32(PERFINTRCTL, 0);
    counters.set(0, u64::MAX - 2);
    counters.count(0, REQUESTS, INTERRUPT | FREEZES);
    let overflow = u64::from(unit.read32(PERFOVFOFF));
    for transfer in 1..=3 {
        check_eq!((interrupts(VECTOR), unit.read64(overflow)), (0, 0), "interrupts and overflows before transfer");
        check!(transfer <= 3, "more than three");
        counters.world.edu.dma_write(counters.world.edu.scratch, 8);
    }
    wait_for("the interrupt of an overflow", || interrupts(VECTOR) == 1);
    check_eq!((unit.read64(overflow), unit.read32(PERFINTRSTS), counters.value(0)), (1, 1, 0), "what is told of it");
    counters.world.edu.dma_write(counters.world.edu.scratch, 8);
    check_eq!(counters.value(0), 0, "the counter, which is frozen");
    unit.write64(overflow, 1);
    unit.write32(PERFINTRSTS, 1);
    check_eq!((unit.read64(overflow), unit.read32(PERFINTRSTS)), (0, 0), "what was acknowledged");
    check_eq!(counters.command(UNFREEZE, 0), 0, "the status of an unfreeze");
    counters.world.edu.dma_write(counters.world.edu.scratch, 8);
    check_eq!((counters.value(0), interrupts(VECTOR)), (1, 1), "the counter goes on");
}

fn a15_what_cannot_be_counted_is_refused() {
    let counters = Counters::new();
    let configure = |value: u64| counters.world.unit.write64(counters.configurations, value);
    for (what, value) in [("nothing", 0), ("clocks", 1 << 32), ("a group that is none", 9 << 8 | 1 << 32)] {
        configure(value);
        check!(counters.command(ENABLE, 0) == 16, "{what} is counted");
    }
    configure(2 << 32);
    check_eq!(counters.command(ENABLE, 0xffff), 16, "a counter that there is not");
    check_eq!(counters.command(7, 0), 1, "a command that is none");
    check_eq!(counters.command(ENABLE, 0), 0, "requests");
    configure(0);
    check_eq!(counters.world.unit.read64(counters.configurations), 2 << 32 | 1, "an enabled counter's configuration");
}

fn a15_counters_are_not_offered_unless_asked_for() {
    let (world, _) = World::recorded_with_domain();
    check_eq!((world.unit.capability(61, 1), world.unit.extended(51, 1)), (0, 0), "ECMDS and PMS");
    world.unit.write64(ECMD, FREEZE.into());
    check_eq!((world.unit.read64(PERFCAP), world.unit.read64(ECRSP)), (0, 0), "PERFCAP and ECRSP");
    check_eq!(world.unit.read32(FSTS), 0, "FSTS");
    let memory = page();
    world.edu.dma_write(memory, 8);
    check!(world.unit.take_fault().is_some(), "a page of no domain was reached");
}
