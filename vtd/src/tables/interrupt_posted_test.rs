//! posted entries, what is looked up of them, and what is posted by it.

use super::*;

/// Remapping on, with posted entries whose descriptors are below 2^`width`.
fn posting_within(width: u8) -> Remapping {
    Remapping { posted_within: Some(width), ..extended() }
}

const DESCRIPTOR: Gpa = Gpa(0x8_0040);

/// A present entry that posts vector 0x45, for anybody.
fn posted_entry(descriptor: Gpa) -> Irte {
    let low = PostedIrteLow::new().with_present(true).with_posted(true).with_vector(0x45);
    let low = low.with_descriptor_low((descriptor.0 >> 6) as u32 & 0x3ff_ffff);
    let high = PostedIrteHigh::new().with_descriptor_high((descriptor.0 >> 32) as u32);
    Irte { low: IrteLow::from_bits(low.into_bits()), high: IrteHigh::from_bits(high.into_bits()) }
}

/// What [`posted_entry`] is looked up as.
fn posting() -> Posting {
    Posting {
        requester: NVME,
        index: 5,
        silenced: false,
        descriptor: DESCRIPTOR,
        vector: 0x45,
        urgent: false,
        extended_mode: true,
    }
}

/// What becomes of a request through `entry`, and the fault's reason.
fn looked_up(remapping: Remapping, entry: Irte) -> Result<Remapped, u8> {
    let memory = memory();
    store(&memory, 5, entry);
    remapping.remap(&memory, NVME, request(5)).map_err(|error| fault(Err(error)).0)
}

#[test]
fn a9_a_posted_entry_is_a_fault_where_posting_is_not_offered() {
    assert_eq!(through(extended(), posted_entry(DESCRIPTOR), NVME), Err(0x24));
}

#[test]
fn a17_a_posted_entry_is_looked_up_with_all_that_it_says() {
    let entry = posted_entry(DESCRIPTOR);
    assert_eq!(looked_up(posting_within(48), entry), Ok(Remapped::Posted(posting())));
    let low = PostedIrteLow::from_bits(entry.low.into_bits());
    let with = |low: PostedIrteLow| Irte { low: IrteLow::from_bits(low.into_bits()), ..entry };
    // Bits 11:8 are for software.
    assert_eq!(looked_up(posting_within(48), with(low.with_available(0xf))), Ok(Remapped::Posted(posting())));
    let cases = [
        (with(low.with_urgent(true)), Posting { urgent: true, ..posting() }),
        (with(low.with_fault_processing_disable(true)), Posting { silenced: true, ..posting() }),
        (with(low.with_vector(0xff)), Posting { vector: 0xff, ..posting() }),
        (posted_entry(Gpa(0xffff_ffff_ffc0)), Posting { descriptor: Gpa(0xffff_ffff_ffc0), ..posting() }),
    ];
    for (entry, expected) in cases {
        assert_eq!(looked_up(posting_within(48), entry), Ok(Remapped::Posted(expected)));
    }
    let xapic = Remapping { table: table(7), ..posting_within(48) };
    assert_eq!(looked_up(xapic, entry), Ok(Remapped::Posted(Posting { extended_mode: false, ..posting() })));
    // Where posting is offered, entries that are not posted are as before.
    assert_eq!(through(posting_within(48), self::entry(), NVME), Ok(DELIVERED));
}

#[test]
fn a17_reserved_bits_of_a_posted_entry_are_a_fault() {
    let good = posted_entry(DESCRIPTOR);
    let low = (2..8).chain(12..14).chain(24..38).map(|bit| (good.low.into_bits() | 1 << bit, good.high.into_bits()));
    // Bits 83:82 are SVT, of which 11 is reserved; 127:112 are address bits 63:48.
    let high = (20..32).chain(48..64).map(|bit| (good.low.into_bits(), good.high.into_bits() | 1 << bit));
    let validation = (good.low.into_bits(), good.high.into_bits() | 3 << 18);
    for (low, high) in low.chain(high).chain([validation]) {
        let entry = Irte { low: IrteLow::from_bits(low), high: IrteHigh::from_bits(high) };
        assert_eq!(looked_up(posting_within(48), entry), Err(0x24), "{high:x}:{low:x}");
        let absent = Irte { low: IrteLow::from_bits(low & !1), ..entry };
        assert_eq!(looked_up(posting_within(48), absent), Err(0x22));
    }
    // The width is that of guest-physical addresses.
    for (width, expected) in [(39, Err(0x24)), (40, Ok(()))] {
        let found = looked_up(posting_within(width), posted_entry(Gpa(1 << 39)));
        assert_eq!(found.map(drop), expected, "{width} bits");
    }
}

#[test]
fn a17_a_posted_entry_is_for_its_source_only() {
    let entry = |source: Requester| {
        let posted = posted_entry(DESCRIPTOR);
        Irte { high: posted.high.with_validation(1).with_source(source.sid.0), ..posted }
    };
    assert_eq!(looked_up(posting_within(48), entry(NVME)), Ok(Remapped::Posted(posting())));
    assert_eq!(looked_up(posting_within(48), entry(NIC)), Err(0x26));
}

#[test]
fn a17_a_notification_goes_to_the_processor_that_the_descriptor_names() {
    let memory = memory();
    let post = |control: PostedControl, extended_mode| {
        memory.write_slice(&[0; 64], GuestAddress(DESCRIPTOR.0)).unwrap();
        memory.write_obj(control.into_bits(), GuestAddress(DESCRIPTOR.0 + 32)).unwrap();
        Posting { extended_mode, ..posting() }.post(&memory).unwrap()
    };
    let control = PostedControl::new().with_vector(0xf2);
    let cases = [
        (0x900, false, 0xfee0_9000),
        (0xff00, false, 0xfeef_f000),
        (9, true, 0xfee0_9000),
        (0x1234_5678, true, 0x0012_3456_0000_0000 << 8 | 0xfee7_8000),
    ];
    for (destination, extended_mode, address) in cases {
        let sent = post(control.with_destination(destination), extended_mode);
        assert_eq!(sent, Some(Msi { address, data: 0xf2 }), "{destination:#x}");
        let pir: [u64; 5] = memory.read_obj(GuestAddress(DESCRIPTOR.0)).unwrap();
        assert_eq!(pir, [0, 1 << 5, 0, 0, control.with_destination(destination).with_outstanding(true).into_bits()]);
    }
    assert_eq!(post(control.with_suppressed(true), true), None);
}

#[test]
fn a17_a_descriptor_that_is_not_there_or_has_a_reserved_bit_is_a_fault_of_the_entry() {
    let memory = memory();
    for silenced in [false, true] {
        let fault = |reason| Err(RemapFault { requester: NVME, index: 5, reason, silenced });
        // The first address behind memory, and the window.
        for descriptor in [2 << 20, 0xfee0_0000, 0xffff_ffff_ffff_ffc0] {
            let posting = Posting { descriptor: Gpa(descriptor), silenced, ..posting() };
            assert_eq!(posting.post(&memory), fault(InterruptFaultReason::DescriptorAccess), "{descriptor:#x}");
        }
        memory.write_obj(4u64, GuestAddress(DESCRIPTOR.0 + 32)).unwrap();
        let posting = Posting { silenced, ..posting() };
        assert_eq!(posting.post(&memory), fault(InterruptFaultReason::DescriptorReserved));
        assert_eq!(memory.read_obj::<[u64; 4]>(GuestAddress(DESCRIPTOR.0)).unwrap(), [0; 4]);
    }
    let last = Posting { descriptor: Gpa((2 << 20) - 64), ..posting() };
    assert!(last.post(&memory).is_ok());
}
