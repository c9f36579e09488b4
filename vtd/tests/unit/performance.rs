//! Performance monitoring and the enhanced commands.

use vtd::spec::performance::{Capability, command, offset};
use vtd::spec::registers;
use vtd::{Access, Endpoint, Iova, Msi, Pasid, RestoreError, Stages, State, Stream, UnitConfig, UnitId};

use crate::nested;
use crate::pasid_tables::{config, first_stage, second_stage};
use crate::rig::{Memory, NIC, NVME, Rig, iotlb_global, iotlb_pages};

/// Where requests of tests go: 16 pages in one directory.
const IOVA: u64 = 0x10_0000;
const ALL_ONES: u64 = (1 << 48) - 1;

/// (Group, events) of what is counted.
const REQUESTS: (u8, u32) = (0, 1 << 1);
const CONTEXT: [(u8, u32); 2] = [(2, 1 << 0), (2, 1 << 1)];
const PASID: [(u8, u32); 2] = [(2, 1 << 2), (2, 1 << 3)];
const SECOND: [(u8, u32); 2] = [(2, 1 << 4), (2, 1 << 5)];
const FIRST: [(u8, u32); 2] = [(2, 1 << 6), (2, 1 << 7)];
const IOTLB: [(u8, u32); 2] = [(3, 1 << 0), (3, 1 << 1)];

/// Bits of a counter's configuration.
const INTERRUPT: u64 = 1 << 1;
const FREEZE: u64 = 1 << 2;

/// EN of a filter, and where the filters are in a counter's configuration.
const EN: u32 = 1 << 31;
const RID: u64 = 0x8;
const DID: u64 = 0xc;
const PASID_FILTER: u64 = 0x10;
const AT: u64 = 0x14;
const PTL: u64 = 0x18;

fn counting() -> UnitConfig {
    UnitConfig { performance_counters: true, ..UnitConfig::new(UnitId(0), 48) }
}

impl Rig {
    /// Gives an enhanced command; its status.
    fn enhanced(&self, command: u8, operand: u64) -> u64 {
        self.write64(offset::ECMD, u64::from(command) | operand << 16);
        let response = self.read64(offset::ECRSP);
        assert_eq!(response & !0xfe, 0, "it is done, and has no result");
        response >> 1
    }

    fn counter_register(index: usize) -> u64 {
        offset::PERFCNTRCFG + index as u64 * offset::CONFIGURATION_STRIDE
    }

    fn configure(&self, index: usize, (group, events): (u8, u32), flags: u64) {
        self.write64(Self::counter_register(index), u64::from(group) << 8 | u64::from(events) << 32 | flags);
    }

    fn filter(&self, index: usize, filter: u64, value: u32) {
        self.write32(Self::counter_register(index) + filter, value);
    }

    /// The counters from 0 on count these, from 0.
    fn count(&self, events: &[(u8, u32)]) {
        for (index, event) in events.iter().enumerate() {
            self.configure(index, *event, 0);
            assert_eq!(self.enhanced(command::ENABLE, index as u64), 0);
        }
    }

    fn counter(&self, index: usize) -> u64 {
        self.read64(offset::PERFCNTR + index as u64 * offset::COUNTER_STRIDE)
    }

    fn set_counter(&self, index: usize, value: u64) {
        self.write64(offset::PERFCNTR + index as u64 * offset::COUNTER_STRIDE, value);
    }

    /// What the first `N` counters have.
    fn counters<const N: usize>(&self) -> [u64; N] {
        std::array::from_fn(|index| self.counter(index))
    }
}

/// NVME is emulated and in domain 1, which has 16 pages.
fn rig() -> (Rig, u64, Endpoint<Memory>) {
    let mut rig = Rig::with(counting());
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, 48, 1);
    rig.pages(root, IOVA, 0x80_0000, 16);
    let endpoint = rig.unit.endpoint(NVME);
    (rig, root, endpoint)
}

fn read(endpoint: &Endpoint<Memory>, page: u64) -> bool {
    endpoint.enter().translate(Iova(IOVA + page * 4096), Access::Read).is_ok()
}

#[test]
fn a15_each_look_up_of_a_request_is_counted() {
    let (mut rig, _, endpoint) = rig();
    rig.count(&[REQUESTS, IOTLB[0], IOTLB[1], CONTEXT[0], CONTEXT[1], SECOND[0], SECOND[1], PASID[0]]);
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [1, 1, 0, 1, 0, 1, 0, 0], "nothing is cached");
    assert!(read(&endpoint, 1));
    assert_eq!(rig.counters(), [2, 2, 0, 1, 0, 2, 1, 0], "its directory is");
    for _ in 0..5 {
        assert!(read(&endpoint, 1));
    }
    assert_eq!(rig.counters(), [7, 7, 5, 1, 0, 2, 1, 0], "the page is");
    assert!(rig.submit(&[iotlb_pages(1, IOVA, 0)]));
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [8, 8, 5, 2, 1, 3, 1, 0], "the context entry is");
    // A transfer is a request for each of its pages.
    endpoint.read(Iova(IOVA + 0x4ffc), &mut [0; 4096]).unwrap();
    assert_eq!(rig.counters(), [10, 10, 5, 2, 1, 5, 3, 0]);
    // What is blocked, and what is no request.
    assert!(!read(&endpoint, 100));
    assert_eq!(rig.counters(), [11, 11, 5, 2, 1, 6, 4, 0]);
    assert!(endpoint.enter().translate(Iova(0xfee0_0000), Access::Write).is_err());
    assert_eq!(rig.counters(), [11, 11, 5, 2, 1, 6, 4, 0]);
}

#[test]
fn a15_counting_neither_loses_nor_keeps_a_translation() {
    let (mut rig, root, endpoint) = rig();
    assert!(read(&endpoint, 0));
    // What was cached before is found, and what is cached meanwhile afterwards.
    rig.count(&[IOTLB[0], IOTLB[1]]);
    assert!(read(&endpoint, 0) && read(&endpoint, 1));
    assert_eq!(rig.counters(), [2, 1]);
    rig.clear(root, IOVA, 2);
    assert!(read(&endpoint, 0) && read(&endpoint, 1));
    assert_eq!(rig.counters(), [4, 3]);
    rig.enhanced(command::DISABLE, 0);
    rig.enhanced(command::DISABLE, 1);
    assert!(read(&endpoint, 0) && read(&endpoint, 1));
    // An invalidation takes effect while requests are counted, as ever.
    rig.count(&[IOTLB[0]]);
    assert!(rig.submit(&[iotlb_pages(1, IOVA, 1)]));
    assert!(!read(&endpoint, 0) && !read(&endpoint, 1));
    assert_eq!(rig.counters(), [6, 3]);
}

#[test]
fn a15_nothing_is_counted_unless_a_counter_is_enabled_and_not_frozen() {
    let (rig, _, endpoint) = rig();
    rig.configure(0, REQUESTS, 0);
    rig.configure(1, REQUESTS, 0);
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [0, 0]);
    assert_eq!(rig.enhanced(command::FREEZE, 0), 0);
    assert_eq!(rig.read64(offset::PERFFRZSTS), 0xff);
    // As Linux does it: frozen while they are changed.
    assert_eq!(rig.enhanced(command::ENABLE, 1), 0);
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [0, 0]);
    assert_eq!(rig.enhanced(command::UNFREEZE, 0), 0);
    assert_eq!(rig.read64(offset::PERFFRZSTS), 0);
    assert!(read(&endpoint, 0));
    // An endpoint that comes later is counted, too.
    let later = rig.unit.endpoint(NVME);
    assert!(read(&later, 0));
    assert_eq!(rig.counters(), [0, 2]);
    assert_eq!(rig.read64(Rig::counter_register(1)) & 1, 1, "EN");
    // What is disabled is no longer frozen either.
    rig.enhanced(command::FREEZE, 0);
    assert_eq!(rig.enhanced(command::DISABLE, 1), 0);
    assert_eq!((rig.read64(offset::PERFFRZSTS), rig.read64(Rig::counter_register(1)) & 1), (0xfd, 0));
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [0, 2]);
}

#[test]
fn a15_scalable_mode_counts_the_stages_apart() {
    let config = UnitConfig { scalable: Some(Stages::Both), performance_counters: true, ..config(48) };
    let mut rig = Rig::scalable(config);
    let (second, first) = (rig.table(), rig.table());
    rig.pages(second, IOVA, 0x80_0000, 16);
    rig.set_entry(NVME, 0, second_stage(second, 48, 1));
    // P, R/W and U/S, from the root down to a page of 2 MiB.
    let (middle, last) = (rig.table(), rig.table());
    [(first, middle), (middle, last)].iter().for_each(|(table, next)| rig.store(*table, next | 7));
    rig.store(last, 0x80_0000 | 0xe7);
    rig.set_entry(NIC, 0, first_stage(first, 4, 2));
    let (nvme, nic) = (rig.unit.endpoint(NVME), rig.unit.endpoint(NIC));
    rig.count(&[CONTEXT[0], CONTEXT[1], PASID[0], PASID[1], SECOND[0], SECOND[1], FIRST[0], FIRST[1]]);
    assert!(read(&nvme, 0));
    assert_eq!(rig.counters(), [1, 0, 1, 0, 1, 0, 0, 0]);
    assert!(read(&nic, 0) && read(&nic, 1));
    assert_eq!(rig.counters(), [2, 0, 2, 0, 1, 0, 2, 1]);
    // Beyond what is cached of the tables.
    assert!(nic.enter().translate(Iova(IOVA + 0x20_0000), Access::Read).is_err());
    assert_eq!(rig.counters(), [3, 1, 3, 1, 1, 0, 3, 1]);
}

#[test]
fn a15_nested_translation_counts_both_stages() {
    let config = UnitConfig { performance_counters: true, ..nested::offered() };
    let (rig, endpoint) = nested::two_pages(config, IOVA);
    rig.count(&[IOTLB[0], IOTLB[1], SECOND[0], SECOND[1], FIRST[0], FIRST[1]]);
    assert!(read(&endpoint, 0));
    // The four tables of the first stage and the page are looked up in the second one; the tables in one directory.
    assert_eq!(rig.counters(), [1, 0, 5, 3, 1, 0]);
    assert!(read(&endpoint, 1));
    assert_eq!(
        rig.counters(),
        [2, 0, 6, 4, 2, 1],
        "what is cached of the first stage names its last table as memory has it"
    );
    assert!(read(&endpoint, 1));
    assert_eq!(rig.counters(), [3, 1, 6, 4, 2, 1]);
}

#[test]
fn a15_filters_let_pass_what_they_name() {
    let (mut rig, root, nvme) = rig();
    rig.set_paged(NIC, root, 48, 2);
    let nic = rig.unit.endpoint(NIC);
    let (source, other) = (u32::from(NVME.sid.0), u32::from(NIC.sid.0));
    let cases = [
        (REQUESTS, RID, source, [3, 0]),
        (REQUESTS, RID, other, [0, 3]),
        (REQUESTS, AT, 1, [3, 3]),
        (REQUESTS, AT, 0, [0, 0]),
        // No request has a PASID: none with one, none with any, all without.
        (REQUESTS, PASID_FILTER, 0, [0, 0]),
        (REQUESTS, PASID_FILTER, 1 << 20, [0, 0]),
        (REQUESTS, PASID_FILTER, 2 << 20, [3, 3]),
        (IOTLB[1], DID, 1, [2, 0]),
        (IOTLB[1], DID, 2, [0, 2]),
        (IOTLB[1], PTL, 0b1, [2, 2]),
        (IOTLB[1], PTL, 0b1_1110, [0, 0]),
        (SECOND[1], PTL, 0b10, [1, 1]),
        (SECOND[1], PTL, 0b1, [0, 0]),
        (SECOND[1], DID, 1, [1, 0]),
    ];
    for (event, filter, value, expected) in cases {
        for (endpoint, expected) in [&nvme, &nic].into_iter().zip(expected) {
            assert!(rig.submit(&[iotlb_global()]));
            // One page for the context entry and the directory.
            assert!(read(endpoint, 9));
            rig.set_counter(0, 0);
            rig.configure(0, event, 0);
            rig.filter(0, filter, EN | value);
            assert_eq!(rig.enhanced(command::ENABLE, 0), 0);
            assert!(read(endpoint, 0) && read(endpoint, 0) && read(endpoint, 0));
            rig.enhanced(command::DISABLE, 0);
            rig.filter(0, filter, 0);
            assert_eq!(rig.counter(0), expected, "{event:?} at {filter:#x} with {value:#x}");
        }
    }
}

#[test]
fn a15_filters_tell_pasids_apart() {
    let config = UnitConfig { pasid_bits: 8, performance_counters: true, ..config(48) };
    let mut rig = Rig::scalable(config);
    let root = rig.table();
    rig.pages(root, IOVA, 0x80_0000, 16);
    rig.permit_pasids();
    rig.set_entry(NVME, 0, second_stage(root, 48, 1));
    rig.set_entry(NVME, 7, second_stage(root, 48, 2));
    let of = |pasid: Option<u32>| rig.unit.endpoint_of(Stream { requester: NVME, pasid: pasid.map(Pasid) });
    let (without, seven) = (of(None), of(Some(7)));
    rig.count(&[]);
    for (index, filter) in [7, 8, 1 << 20, 2 << 20].into_iter().enumerate() {
        rig.configure(index, REQUESTS, 0);
        rig.filter(index, PASID_FILTER, EN | filter);
        assert_eq!(rig.enhanced(command::ENABLE, index as u64), 0);
    }
    assert!(read(&without, 0));
    assert_eq!(rig.counters(), [0, 0, 0, 1]);
    assert!(read(&seven, 0) && read(&seven, 0));
    assert_eq!(rig.counters(), [2, 0, 2, 1]);
}

/// The message of an overflow.
const MESSAGE: Msi = Msi { address: 0xfee0_1000, data: 0x42 };

fn set_message(rig: &Rig, masked: bool) {
    rig.write32(offset::PERFINTRDATA, MESSAGE.data);
    rig.write32(offset::PERFINTRADDR, MESSAGE.address as u32);
    rig.write32(offset::PERFINTRCTL, u32::from(masked) << 31);
}

#[test]
fn a15_an_overflow_is_told_by_interrupt_when_the_session_is_over() {
    let (rig, _, endpoint) = rig();
    set_message(&rig, false);
    rig.configure(0, REQUESTS, INTERRUPT);
    rig.configure(1, IOTLB[0], 0);
    // Bits beyond the width are ignored.
    rig.set_counter(0, u64::MAX - 1);
    rig.set_counter(1, ALL_ONES);
    assert_eq!(rig.counters(), [ALL_ONES - 1, ALL_ONES]);
    (0..2).for_each(|index| assert_eq!(rig.enhanced(command::ENABLE, index), 0));
    assert!(read(&endpoint, 0));
    assert_eq!((rig.read64(offset::PERFOVFSTS), rig.read32(offset::PERFINTRSTS)), (0b10, 0), "not asked for");
    assert_eq!((rig.counters(), rig.messages.take()), ([ALL_ONES, 0], vec![]));
    let session = endpoint.enter();
    assert!(session.translate(Iova(IOVA), Access::Read).is_ok());
    assert_eq!((rig.read64(offset::PERFOVFSTS), rig.read32(offset::PERFINTRSTS)), (0b11, 1));
    assert_eq!(rig.messages.take(), []);
    drop(session);
    assert_eq!((rig.counters(), rig.messages.take()), ([0, 1], vec![MESSAGE]));
    // It goes on; and each status bit is cleared by a one.
    assert!(read(&endpoint, 0));
    assert_eq!((rig.counters(), rig.messages.take()), ([1, 2], vec![]));
    rig.write64(offset::PERFOVFSTS, 0b10);
    assert_eq!(rig.read64(offset::PERFOVFSTS), 0b01);
    rig.write32(offset::PERFINTRSTS, 0);
    assert_eq!(rig.read32(offset::PERFINTRSTS), 1);
    rig.write32(offset::PERFINTRSTS, 1);
    assert_eq!(rig.read32(offset::PERFINTRSTS), 0);
}

#[test]
fn a15_a_masked_overflow_is_told_when_it_is_unmasked_unless_it_was_served() {
    let (rig, _, endpoint) = rig();
    set_message(&rig, true);
    rig.configure(0, REQUESTS, INTERRUPT);
    for served in [false, true] {
        rig.set_counter(0, ALL_ONES);
        assert_eq!(rig.enhanced(command::ENABLE, 0), 0);
        assert!(read(&endpoint, 0));
        assert_eq!((rig.read32(offset::PERFINTRCTL), rig.messages.take()), (0b11 << 30, vec![]), "IM and IP");
        if served {
            rig.write32(offset::PERFINTRSTS, 1);
            assert_eq!(rig.read32(offset::PERFINTRCTL), 1 << 31, "IM");
        }
        rig.write32(offset::PERFINTRCTL, 0);
        assert_eq!(rig.messages.take(), if served { vec![] } else { vec![MESSAGE] });
        rig.write32(offset::PERFINTRCTL, 1 << 31);
    }
}

#[test]
fn a15_a_fault_and_an_overflow_of_one_request_are_both_told() {
    let (rig, _, endpoint) = rig();
    set_message(&rig, false);
    rig.write32(registers::offset::FEDATA, 0x33);
    rig.write32(registers::offset::FEADDR, 0xfee0_2000);
    rig.write32(registers::offset::FECTL, 0);
    rig.configure(0, REQUESTS, INTERRUPT);
    rig.set_counter(0, ALL_ONES);
    rig.enhanced(command::ENABLE, 0);
    assert!(!read(&endpoint, 100));
    assert_eq!(rig.messages.take(), [Msi { address: 0xfee0_2000, data: 0x33 }, MESSAGE]);
}

#[test]
fn a15_an_overflow_can_freeze_all_counters() {
    let (rig, _, endpoint) = rig();
    rig.configure(0, REQUESTS, FREEZE);
    rig.configure(1, IOTLB[0], 0);
    rig.set_counter(0, ALL_ONES);
    (0..2).for_each(|index| assert_eq!(rig.enhanced(command::ENABLE, index), 0));
    assert!(read(&endpoint, 0));
    // The request that it was counted with is counted whole.
    assert_eq!((rig.counters(), rig.read64(offset::PERFFRZSTS)), ([0, 1], 0xff));
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [0, 1]);
    rig.enhanced(command::UNFREEZE, 0);
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [1, 2]);
}

#[test]
fn a15_a_counter_that_is_configured_wrongly_is_not_enabled() {
    let cases = [
        ("no event", (0, 0), None),
        ("an event that is not counted", (0, 1 << 0), None),
        ("one that is, and one that is not", (0, 0b11), None),
        ("a group without events", (1, 1), None),
        ("a group that is none", (15, 1), None),
        ("several events with a filter", (2, 0b11), Some((RID, 0))),
        ("requests by domain", REQUESTS, Some((DID, 0))),
        ("look-ups by domain", IOTLB[0], Some((DID, 0))),
        ("look-ups by level", SECOND[0], Some((PTL, 1))),
        ("hits by address type", IOTLB[1], Some((AT, 1))),
        ("hits of context entries by level", CONTEXT[1], Some((PTL, 1))),
        ("a mode of PASIDs that is none", REQUESTS, Some((PASID_FILTER, 3 << 20))),
    ];
    let (rig, _, endpoint) = rig();
    for (why, event, filter) in cases {
        rig.configure(3, event, 0);
        if let Some((filter, value)) = filter {
            rig.filter(3, filter, EN | value);
        }
        assert_eq!(rig.enhanced(command::ENABLE, 3), 16, "{why}");
        assert!(read(&endpoint, 0));
        assert_eq!((rig.read64(Rig::counter_register(3)) & 1, rig.counter(3)), (0, 0), "{why}");
        if let Some((filter, value)) = filter {
            // Only what is enabled counts.
            rig.filter(3, filter, value);
        }
    }
    rig.configure(3, (2, 0xff), INTERRUPT | FREEZE);
    assert_eq!(rig.enhanced(command::ENABLE, 3), 0, "all events of a group");
    for (command, operand) in [(command::ENABLE, 8), (command::DISABLE, 8), (command::ENABLE, (1 << 48) - 1)] {
        assert_eq!(rig.enhanced(command, operand), 16, "there is no counter {operand}");
    }
}

#[test]
fn a15_commands_that_are_none_say_so() {
    let (rig, _, endpoint) = rig();
    rig.count(&[REQUESTS]);
    for command in (0..=255).filter(|command| !(240..=245).contains(command)) {
        assert_eq!(rig.enhanced(command, 0), 1, "{command}");
    }
    assert!(read(&endpoint, 0));
    assert_eq!(rig.counters(), [1]);
    assert_eq!(rig.read64(offset::ECMD), 0);
    // The upper half of an operand comes first, and gives no command.
    rig.write32(offset::ECMD + 4, 1);
    assert_eq!(rig.read64(offset::ECRSP), 1 << 1);
    rig.write32(offset::ECMD, u32::from(command::DISABLE));
    assert_eq!(rig.read64(offset::ECRSP), 16 << 1, "there is no counter 0x10000");
    rig.write32(offset::ECMD + 4, 0);
    rig.write32(offset::ECMD, u32::from(command::DISABLE));
    assert_eq!((rig.read64(offset::ECRSP), rig.read64(Rig::counter_register(0)) & 1), (0, 0));
}

#[test]
fn a15_what_is_enabled_cannot_be_configured() {
    let (rig, _, _) = rig();
    rig.filter(0, RID, EN | 7);
    rig.count(&[REQUESTS]);
    let before = rig.unit.save();
    rig.configure(0, IOTLB[0], INTERRUPT);
    [RID, DID, PASID_FILTER, AT, PTL].iter().for_each(|filter| rig.filter(0, *filter, u32::MAX));
    assert_eq!(rig.unit.save(), before);
    // CWE is set.
    rig.set_counter(0, 5);
    assert_eq!(rig.counter(0), 5);
    // One command sets all configuration back, another all values.
    rig.set_counter(1, 6);
    rig.enhanced(command::FREEZE, 0);
    assert_eq!(rig.enhanced(command::RESET_CONFIGURATION, 0), 0);
    assert_eq!((rig.read64(Rig::counter_register(0)), rig.read64(Rig::counter_register(0) + RID)), (0, 0));
    assert_eq!((rig.counters(), rig.read64(offset::PERFFRZSTS)), ([5, 6], 0));
    assert_eq!(rig.enhanced(command::RESET_VALUES, 0), 0);
    assert_eq!(rig.counters(), [0; 8]);
}

#[test]
fn a15_registers_have_the_bits_that_they_have() {
    let (rig, _, _) = rig();
    assert_eq!(rig.read64(registers::offset::CAP) >> 61 & 1, 1, "ECMDS");
    assert_eq!(rig.read64(registers::offset::ECAP) >> 51 & 1, 1, "PMS");
    assert_eq!(rig.unit.config().register_window(), 0x4000);
    assert_eq!(rig.read64(offset::PERFCAP), Capability::OFFERED.into_bits());
    let offsets = [offset::PERFCFGOFF, offset::PERFFRZOFF, offset::PERFOVFOFF, offset::PERFCNTROFF];
    assert_eq!(offsets.map(|at| rig.read32(at)), [0x1000, 0x1800, 0x1808, 0x2000]);
    assert_eq!([0, 1, 2, 3, 4, 5].map(|group| rig.read64(offset::PERFEVNTCAP + 8 * group)), [2, 0, 0xff, 3, 0, 0]);
    assert_eq!([0, 8, 16, 24].map(|at| rig.read64(0x430 + at)), [0, 0, 0, 0x3f << 48]);
    let cases = [
        (offset::PERFINTRSTS, 4, 0, 0),
        (offset::PERFINTRCTL, 4, 1 << 31, 1 << 31),
        (offset::PERFINTRDATA, 4, 0xffff, 0),
        (offset::PERFINTRADDR, 4, 0xffff_fffc, 0),
        (offset::PERFINTRUADDR, 4, 0xffff_ffff, 0),
        (offset::ECEO, 8, 0, 0),
        (offset::ECRSP, 8, 0, 0),
        (offset::PERFFRZSTS, 8, 0, 0),
        (offset::PERFOVFSTS, 8, 0, 0),
        (Rig::counter_register(7), 8, 0x0fff_ffff_0000_0f06, 0),
        (Rig::counter_register(7) + RID, 4, 0x8000_ffff, 0),
        (Rig::counter_register(7) + DID, 4, 0x8000_ffff, 0),
        (Rig::counter_register(7) + PASID_FILTER, 8, 0x8000_0001_803f_ffff, 0),
        (Rig::counter_register(7) + PTL, 8, 0x8000_001f, 0),
        (Rig::counter_register(7) + 0x80, 8, 0, 0),
        (offset::PERFCNTR + 7 * offset::COUNTER_STRIDE, 8, ALL_ONES, 0),
        (offset::PERFCNTR + 7 * offset::COUNTER_STRIDE + 8, 8, 0, 0),
    ];
    for (at, size, writable, initial) in cases {
        let read = || if size == 8 { rig.read64(at) } else { u64::from(rig.read32(at)) };
        let write = |value: u64| if size == 8 { rig.write64(at, value) } else { rig.write32(at, value as u32) };
        assert_eq!(read(), initial, "{at:#x} at first");
        write(u64::MAX);
        assert_eq!(read(), writable, "{at:#x} with ones");
        write(0);
        assert_eq!(read(), 0, "{at:#x} with zeros");
    }
    // Whatever else is written anywhere is survived.
    for value in [u64::MAX, 0x5555_5555_5555_5555, 0] {
        for at in (0..0x4010).step_by(4) {
            rig.write32(at, value as u32);
            rig.write64(at & !7, value);
        }
    }
    assert_eq!(rig.read64(offset::PERFCAP), Capability::OFFERED.into_bits());
}

#[test]
fn a15_without_the_option_there_is_nothing() {
    let (rig, _) = Rig::with_nvme();
    assert_eq!(rig.unit.config().register_window(), 0x1000);
    assert_eq!((rig.read64(registers::offset::CAP) >> 61 & 1, rig.read64(registers::offset::ECAP) >> 51 & 1), (0, 0));
    for at in (0x300..0x4000).step_by(8) {
        rig.write64(at, u64::MAX);
        assert_eq!(rig.read64(at), 0, "{at:#x}");
    }
    rig.write64(offset::ECMD, command::RESET_VALUES.into());
    assert_eq!(rig.read64(offset::ECRSP), 0);
}

#[test]
fn a15_counters_are_saved_and_restored_and_set_back_by_a_reset() {
    let (rig, _, endpoint) = rig();
    set_message(&rig, false);
    rig.configure(2, REQUESTS, INTERRUPT);
    rig.filter(2, RID, EN | u32::from(NVME.sid.0));
    rig.set_counter(2, ALL_ONES);
    rig.enhanced(command::ENABLE, 2);
    let saved = rig.unit.save();
    let text = serde_json::to_string(&saved).unwrap();
    rig.unit.reset();
    assert_eq!(rig.unit.save().performance, Some(vtd::PerformanceState::default()));
    assert!(read(&endpoint, 0));
    assert_eq!((rig.counter(2), rig.messages.take()), (0, vec![]), "nothing counts after a reset");
    rig.unit.restore(serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(rig.unit.save(), saved);
    assert!(read(&endpoint, 0));
    assert_eq!((rig.counter(2), rig.messages.take()), (0, vec![MESSAGE]), "it counts again");

    // What no unit with counters can hold.
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut json["performance"]);
        serde_json::from_value::<State>(json).unwrap()
    };
    let register = |register, value| Err(RestoreError::Register { register, value });
    let before = rig.unit.save();
    let bad: [(&str, u64, State); 7] = [
        ("PERFINTRSTS", 2, with(&|json| json["interrupt_status"] = 2.into())),
        ("PERFINTRCTL", 1, with(&|json| json["event"]["control"] = 1.into())),
        ("ECRSP", 1, with(&|json| json["response"] = 1.into())),
        ("PERFCNTRCFG", 8, with(&|json| json["counters"][0]["configuration"] = 8.into())),
        // Enabled, and it could not be.
        ("PERFCNTRCFG", 1, with(&|json| json["counters"][0]["configuration"] = 1.into())),
        ("a filter of PERFCNTRCFG", 1 << 16, with(&|json| json["counters"][1]["filters"][0] = (1 << 16).into())),
        ("PERFCNTR", 1 << 48, with(&|json| json["counters"][7]["value"] = (1u64 << 48).into())),
    ];
    for (name, value, state) in bad {
        assert_eq!(rig.unit.restore(state), register(name, value));
    }
    assert_eq!(rig.unit.save(), before);
    assert_eq!(Rig::new().unit.restore(saved), register("PERFCAP", 1), "of a unit that offers less");
    // What was saved where there are no counters has them as at power-on.
    assert_eq!(rig.unit.restore(State::default()), Ok(()));
    assert_eq!(rig.unit.save().performance, Some(vtd::PerformanceState::default()));
}
