//! Requests with a PASID.

use vtd::spec::fault::FaultRecordHigh;
use vtd::spec::pasid::{ContextHigh, ContextLow};
use vtd::spec::registers::offset;
use vtd::{Access, ConfigError, DmaError, Endpoint, Iova, Pasid, Perm, Stages, Stream, UnitConfig, UnitId};

use crate::pasid_tables::{
    config, first_stage, pasid_cache_domain, pasid_cache_of, pasid_iotlb_of, pasid_iotlb_pages, pass_through,
    second_stage,
};
use crate::rig::{Memory, NVME, Rig, iotlb_domain, iotlb_global, iotlb_pages};

fn with_pasids() -> UnitConfig {
    UnitConfig { scalable: Some(Stages::Both), pasid_bits: 13, ..config(48) }
}

/// A unit with PASIDs, which the context entry of NVME permits.
fn rig() -> Rig {
    let mut rig = Rig::scalable(with_pasids());
    rig.permit_pasids();
    rig
}

impl Rig {
    /// The context entry of NVME permits PASIDs.
    pub fn permit_pasids(&mut self) {
        let context = self.directory_address(NVME, 0) & !0xfff;
        let low = ContextLow::new().with_present(true).with_pasid(true).with_directory(context >> 12);
        self.set_scalable_context(NVME, low, ContextHigh::new());
    }
}

fn endpoint(rig: &Rig, pasid: u32) -> Endpoint<Memory> {
    rig.unit.endpoint_of(Stream { requester: NVME, pasid: Some(Pasid(pasid)) })
}

fn translate(endpoint: &Endpoint<Memory>, iova: u64, access: Access) -> Result<u64, u8> {
    endpoint.enter().translate(Iova(iova), access).map(|gpa| gpa.0).map_err(|error| match error {
        DmaError::Fault(fault) => fault.reason.code(),
        other => panic!("{other}"),
    })
}

fn read(endpoint: &Endpoint<Memory>, iova: u64) -> Result<u64, u8> {
    translate(endpoint, iova, Access::Read)
}

#[test]
fn a4_pasids_are_offered_when_asked_for() {
    for bits in 0..=20u8 {
        let config = UnitConfig { pasid_bits: bits, ..with_pasids() };
        assert_eq!(config.validate(), Ok(()));
        let extended = config.extended_capability().into_bits();
        assert_eq!((extended >> 40 & 1, extended >> 35 & 0x1f), (u64::from(bits != 0), u64::from(bits.max(1) - 1)));
    }
    let too_many = UnitConfig { pasid_bits: 21, ..with_pasids() };
    assert_eq!(too_many.validate(), Err(ConfigError::PasidBits(21)));
    let alone = UnitConfig { pasid_bits: 1, ..UnitConfig::new(UnitId(0), 48) };
    assert_eq!(alone.validate(), Err(ConfigError::PasidsAlone));
}

#[test]
fn a2_each_pasid_reaches_what_its_entry_says() {
    let mut rig = rig();
    let (second, first) = (rig.table(), rig.table());
    rig.pages(second, 0x5000, 0x80_0000, 1);
    rig.set_entry(NVME, 0, pass_through(1));
    rig.set_entry(NVME, 7, second_stage(second, 48, 2));
    rig.set_entry(NVME, 0x1fff, first_stage(first, 4, 3));
    let none = rig.unit.endpoint(NVME);
    let [seven, last, eight] = [7, 0x1fff, 8].map(|pasid| endpoint(&rig, pasid));
    for _ in 0..2 {
        assert_eq!((read(&none, 0x5000), read(&seven, 0x5000)), (Ok(0x5000), Ok(0x80_0000)));
        assert_eq!((read(&last, 0x5000), read(&eight, 0x5000)), (Err(0x71), Err(0x59)));
    }
    // An invalidation of one does nothing to what the others have cached.
    rig.leaf(second, 48, 0x5000, 0x90_0000, Some(Perm::ReadWrite), 1);
    assert!(rig.submit(&[pasid_iotlb_of(1, 0), pasid_iotlb_of(3, 0x1fff)]));
    assert_eq!(read(&seven, 0x5000), Ok(0x80_0000));
    assert!(rig.submit(&[pasid_iotlb_of(2, 7)]));
    assert_eq!(read(&seven, 0x5000), Ok(0x90_0000));
    rig.set_entry(NVME, 7, [0; 8]);
    assert!(rig.submit(&[pasid_cache_of(2, 7)]));
    assert_eq!((read(&none, 0x5000), read(&seven, 0x5000)), (Ok(0x5000), Err(0x59)));
}

#[test]
fn a6_an_invalidation_of_one_pasid_leaves_the_others_of_its_domain() {
    let mut rig = rig();
    let tables = [7, 8, 0].map(|pasid| {
        let root = rig.table();
        rig.set_entry(NVME, pasid, first_stage(root, 4, 2));
        (pasid, root)
    });
    // Each PASID has two pages, in one table of level 1.
    let leaves = tables.map(|(_, root)| {
        let mut table = root;
        for _ in 0..3 {
            let next = rig.table();
            rig.store(table, next | 7);
            table = next;
        }
        [table + 5 * 8, table + 6 * 8]
    });
    let set = |rig: &Rig, to: u64| leaves.iter().flatten().for_each(|leaf| rig.store(*leaf, to | 7 | 3 << 5));
    let endpoints = [endpoint(&rig, 7), endpoint(&rig, 8), rig.unit.endpoint(NVME)];
    let found = || endpoints.each_ref().map(|each| [0x5000, 0x6000].map(|iova| read(each, iova) == Ok(0x90_0000)));
    let (none, both, first) = ([false, false], [true, true], [true, false]);
    for (descriptor, reached) in [
        (pasid_iotlb_of(2, 7), [both, none, none]),
        (pasid_iotlb_of(2, 8), [none, both, none]),
        // Requests without PASID are translated by RID_PASID.
        (pasid_iotlb_of(2, 0), [none, none, both]),
        (pasid_iotlb_of(2, 9), [none, none, none]),
        (pasid_iotlb_of(3, 7), [none, none, none]),
        (pasid_iotlb_pages(2, 7, 0x5000, 0), [first, none, none]),
        (pasid_cache_of(2, 8), [none, both, none]),
        (pasid_cache_of(3, 8), [none, none, none]),
        (pasid_cache_domain(2), [both, both, both]),
        (iotlb_domain(2), [both, both, both]),
        (iotlb_pages(2, 0x7777_0000, 0), [both, both, both]),
    ] {
        set(&rig, 0x80_0000);
        assert!(rig.submit(&[iotlb_domain(2)]));
        assert_eq!(found(), [none; 3]);
        set(&rig, 0x90_0000);
        assert!(rig.submit(&[descriptor]));
        assert_eq!(found(), reached, "{descriptor:x?}");
    }
}

#[test]
fn a8_a_record_has_the_pasid_in_full() {
    let rig = Rig::scalable(UnitConfig { pasid_bits: 20, ..with_pasids() });
    for (record, pasid) in [None, Some(Pasid(0)), Some(Pasid(0xa_bcde))].into_iter().enumerate() {
        let endpoint = rig.unit.endpoint_of(Stream { requester: NVME, pasid });
        assert_eq!(translate(&endpoint, 0x5000, Access::Write), Err(0x39));
        let at = offset::FRCD + 16 * record as u64;
        let high = FaultRecordHigh::from_bits(rig.read64(at + 8));
        assert_eq!((high.pasid_present(), high.pasid()), (pasid.is_some(), pasid.map_or(0, |pasid| pasid.0)));
        assert_eq!((high.fault(), high.type_1(), rig.read64(at)), (true, false, 0x5000));
        rig.write32(at + 12, 1 << 31);
    }
    // Such a record can be restored; where there are no PASIDs, too, since a function may send one all the same.
    let saved = rig.unit.save();
    rig.unit.restore(saved.clone()).unwrap();
    let without = Rig::scalable(UnitConfig { pasid_bits: 0, ..with_pasids() });
    assert_eq!(without.unit.restore(saved), Ok(()));
}

#[test]
fn a12_the_interrupt_range_translates_with_a_pasid_except_in_pass_through() {
    let mut rig = rig();
    let second = rig.table();
    rig.pages(second, 0xfee0_0000, 0x80_0000, 1);
    rig.set_entry(NVME, 0, second_stage(second, 48, 2));
    rig.set_entry(NVME, 7, second_stage(second, 48, 2));
    rig.set_entry(NVME, 8, pass_through(3));
    let interrupts = |endpoint: &Endpoint<Memory>| {
        let translated = endpoint.enter().translate(Iova(0xfee0_0000), Access::Write);
        matches!(translated, Err(DmaError::InterruptRange(_)))
    };
    let [seven, eight] = [7, 8].map(|pasid| endpoint(&rig, pasid));
    assert!(interrupts(&rig.unit.endpoint(NVME)));
    assert_eq!((read(&seven, 0xfee0_0123), read(&eight, 0xfee0_0000)), (Ok(0x80_0123), Err(0x87)));
    assert_eq!(read(&eight, 0xfef0_0000), Ok(0xfef0_0000));
    rig.command(|on| on.with_translation(false));
    assert!(interrupts(&seven), "without translation a PASID is ignored");
    assert_eq!(read(&seven, 0x1000), Ok(0x1000));
}

#[test]
fn a3_rta2_a_pasid_in_legacy_mode() {
    let mut rig = rig();
    rig.table_mode = 0;
    rig.set_root();
    assert_eq!(read(&endpoint(&rig, 7), 0x5000), Err(0x31));
}

#[test]
fn a3_sct6_a_context_entry_that_permits_no_pasid() {
    let mut rig = rig();
    rig.set_entry(NVME, 7, pass_through(1));
    assert_eq!(read(&endpoint(&rig, 7), 0x5000), Ok(0x5000));
    let context = rig.scalable_context_address(NVME);
    rig.store(context, rig.load(context) & !8);
    assert!(rig.submit(&[iotlb_global()]));
    assert_eq!(read(&endpoint(&rig, 7), 0x5000), Err(0x45));
}

#[test]
fn a3_sct7_and_sgn10_a_pasid_that_is_too_large() {
    let config = UnitConfig { pasid_bits: 16, ..with_pasids() };
    let mut rig = Rig::scalable(config);
    rig.set_entry(NVME, 0x1fff, pass_through(1));
    let context = rig.scalable_context_address(NVME);
    rig.store(context, rig.load(context) | 8);
    let reason = |pasid: u32| read(&endpoint(&rig, pasid), 0x5000);
    assert_eq!((reason(0x1fff), reason(0x2000), reason(0xffff)), (Ok(0x5000), Err(0x46), Err(0x46)));
    assert_eq!((reason(0x1_0000), reason(0xf_ffff), reason(u32::MAX)), (Err(0x89), Err(0x89), Err(0x89)));
}

#[test]
fn a3_sct9_the_pasid_of_requests_without_one() {
    let mut rig = rig();
    rig.set_entry(NVME, 7, pass_through(1));
    let context = rig.scalable_context_address(NVME);
    rig.store(context + 8, 7);
    assert_eq!((read(&rig.unit.endpoint(NVME), 0x5000), read(&endpoint(&rig, 7), 0x5000)), (Ok(0x5000), Err(0x48)));
}
