//! Where each field stands: the layouts of the specification in numbers. All other tests build their tables with the
//! crate's own types, so a field in the wrong place would be wrong on both sides there.

use vtd::spec::ats::TranslationData;
use vtd::spec::fault::{FaultReason, FaultRecordHigh, InterruptFaultReason};
use vtd::spec::invalidation::{
    ContextCacheLow, Descriptor, DeviceTlbHigh, DeviceTlbLow, InterruptEntryLow, IotlbHigh, IotlbLow, PageResponseHigh,
    PageResponseLow, PasidDeviceTlbHigh, PasidDeviceTlbLow, QueueError, WaitHigh, WaitLow, granularity, kind,
};
use vtd::spec::irte::{
    ADDRESS_PREFIX, CompatibilityAddress, CompatibilityData, DeliveryMode, IoapicEntry, IrteHigh, IrteLow,
    PostedControl, PostedIrteHigh, PostedIrteLow, RemappableAddress, RemappableData, SourceValidation,
};
use vtd::spec::registers::{
    Capability, ContextCommand, EventControl, ExtendedCapability, FaultStatus, Global, InterruptTableAddress,
    InvalidateAddress, IotlbInvalidate, QueueAddress, QueueErrorRecord, RootTableAddress, offset,
};
use vtd::spec::root_context::{ContextEntryHigh, ContextEntryLow, RootEntryLow, TranslationType};
use vtd::spec::second_stage::{SecondStageEntry, entry_span, levels};
use vtd::{UnitConfig, UnitId};

/// Of a type: each field, its first bit and its width. The field is read from ones in just these bits.
macro_rules! layout {
    ($type:ident: $($field:ident $first:literal $width:literal),+ $(,)?) => {
        $(
            let ones = (u128::MAX >> (128 - $width)) << $first;
            let holds = <$type>::from_bits(ones.try_into().expect("in the type"));
            let none = <$type>::from_bits((!ones & u128::from(u64::MAX)) as _);
            let name = concat!(stringify!($type), ".", stringify!($field));
            assert_eq!(u64::from(holds.$field()), u64::MAX >> (64 - $width), "{name} is not where it belongs");
            assert_eq!(u64::from(none.$field()), 0, "{name} has bits of others");
        )+
    };
}

#[test]
fn the_fields_of_root_and_context_entries_are_where_the_specification_has_them() {
    layout!(RootEntryLow:
        present 0 1, reserved 1 11, context_table 12 52
    );
    layout!(ContextEntryLow:
        present 0 1, fault_processing_disable 1 1, translation_type 2 2, reserved 4 8, second_stage 12 52
    );
    layout!(ContextEntryHigh:
        address_width 0 3, available 3 4, reserved_low 7 1, domain 8 16, reserved 24 40
    );
}

#[test]
fn the_fields_of_second_stage_entries_are_where_the_specification_has_them() {
    layout!(SecondStageEntry:
        read 0 1, write 1 1, execute 2 1, memory_type 3 4, page_size 7 1, accessed 8 1, dirty 9 1,
        ignored 10 1, snoop 11 1, page 12 40, ignored_high 52 10, transient 62 1, ignored_top 63 1
    );
}

#[test]
fn the_fields_of_descriptors_are_where_the_specification_has_them() {
    layout!(ContextCacheLow:
        kind 0 4, granularity 4 2, reserved 6 10, domain 16 16, source 32 16, function_mask 48 2,
        reserved_high 50 14
    );
    layout!(IotlbLow:
        kind 0 4, granularity 4 2, drain_writes 6 1, drain_reads 7 1, reserved 8 8, domain 16 16,
        reserved_high 32 32
    );
    layout!(IotlbHigh:
        address_mask 0 6, leaf_only 6 1, reserved 7 5, page 12 52
    );
    layout!(InterruptEntryLow:
        kind 0 4, selective 4 1, reserved 5 22, index_mask 27 5, index 32 16, reserved_high 48 16
    );
    layout!(WaitLow:
        kind 0 4, interrupt 4 1, status_write 5 1, fence 6 1, page_request_drain 7 1, reserved 8 24, status 32 32
    );
    layout!(DeviceTlbLow:
        kind 0 4, reserved 4 12, max_pending 16 5, reserved_middle 21 11, source 32 16, reserved_high 48 16
    );
    layout!(DeviceTlbHigh:
        large 0 1, reserved 1 11, page 12 52
    );
    layout!(PasidDeviceTlbLow:
        kind 0 4, max_pending 4 5, reserved 9 7, source 16 16, pasid 32 20, reserved_high 52 12
    );
    layout!(PasidDeviceTlbHigh:
        global 0 1, reserved 1 10, large 11 1, page 12 52
    );
    layout!(PageResponseLow:
        kind 0 4, pasid_present 4 1, reserved 5 7, code 12 4, source 16 16, pasid 32 20, reserved_high 52 12
    );
    layout!(PageResponseHigh:
        ignored 0 3, group 3 9, reserved 12 52
    );
    layout!(TranslationData:
        read 0 1, write 1 1, untranslated_only 2 1, execute 3 1, privileged 4 1, global 5 1, non_snooped 10 1,
        large 11 1, page 12 52
    );
    layout!(WaitHigh:
        reserved 0 2, address 2 62
    );
}

#[test]
fn the_fields_of_interrupt_entries_and_messages_are_where_the_specification_has_them() {
    layout!(RemappableAddress:
        ignored 0 2, handle_high 2 1, subhandle_valid 3 1, remappable 4 1, handle_low 5 15, prefix 20 12
    );
    layout!(RemappableData:
        subhandle 0 16, reserved 16 16
    );
    layout!(CompatibilityAddress:
        ignored 0 2, logical 2 1, redirection_hint 3 1, remappable 4 1, destination 12 8, prefix 20 12,
        destination_high 40 24
    );
    layout!(CompatibilityData:
        vector 0 8, delivery_mode 8 3, assert 14 1, level 15 1
    );
    layout!(IoapicEntry:
        vector 0 8, reserved 8 3, index_high 11 1, delivery_status 12 1, active_low 13 1, remote_irr 14 1,
        level 15 1, masked 16 1, reserved_high 17 31, remappable 48 1, index_low 49 15
    );
    layout!(IrteLow:
        present 0 1, fault_processing_disable 1 1, logical 2 1, redirection_hint 3 1, level 4 1,
        delivery_mode 5 3, available 8 4, reserved 12 3, posted 15 1, vector 16 8, reserved_high 24 8,
        destination 32 32
    );
    layout!(PostedIrteLow:
        present 0 1, fault_processing_disable 1 1, reserved 2 6, available 8 4, reserved_middle 12 2,
        urgent 14 1, posted 15 1, vector 16 8, reserved_high 24 14, descriptor_low 38 26
    );
    layout!(IrteHigh:
        source 0 16, source_qualifier 16 2, validation 18 2, reserved 20 44
    );
    layout!(PostedIrteHigh:
        source 0 16, source_qualifier 16 2, validation 18 2, reserved 20 12, descriptor_high 32 32
    );
    layout!(PostedControl:
        outstanding 0 1, suppressed 1 1, reserved 2 14, vector 16 8, reserved_middle 24 8, destination 32 32
    );
}

#[test]
fn the_fields_of_fault_records_are_where_the_specification_has_them() {
    layout!(FaultRecordHigh:
        source 0 16, type_2 28 1, privileged 29 1, execute 30 1, pasid_present 31 1, reason 32 8, pasid 40 20,
        address_type 60 2, type_1 62 1, fault 63 1
    );
}

#[test]
fn the_fields_of_registers_are_where_the_specification_has_them() {
    layout!(Capability:
        number_of_domains 0 3, advanced_fault_logging 3 1, write_buffer_flush 4 1, protected_low 5 1,
        protected_high 6 1, caching_mode 7 1, adjusted_widths 8 5, max_guest_width 16 6, zero_length_read 22 1,
        fault_record_offset 24 10, large_pages 34 4, page_selective 39 1, fault_records 40 8,
        max_address_mask 48 6, drain_writes 54 1, drain_reads 55 1, first_stage_1g 56 1,
        posted_interrupts 59 1, first_stage_5_levels 60 1, enhanced_sirtp 62 1, enhanced_srtp 63 1
    );
    layout!(ExtendedCapability:
        coherent 0 1, queued_invalidation 1 1, device_tlb 2 1, interrupt_remapping 3 1,
        extended_interrupt_mode 4 1, pass_through 6 1, snoop_control 7 1, iotlb_offset 8 10,
        max_handle_mask 20 4, page_requests 29 1, no_write_flag 33 1, page_request_drain 42 1
    );
    layout!(Global:
        compatibility_format 23 1, interrupt_table_pointer 24 1, interrupt_remapping 25 1,
        queued_invalidation 26 1, write_buffer_flush 27 1, advanced_fault_log 28 1, fault_log_pointer 29 1,
        root_table_pointer 30 1, translation 31 1
    );
    layout!(RootTableAddress:
        mode 10 2, page 12 52
    );
    layout!(ContextCommand:
        domain 0 16, source 16 16, function_mask 32 2, actual 59 2, granularity 61 2, invalidate 63 1
    );
    layout!(IotlbInvalidate:
        domain 32 16, drain_writes 48 1, drain_reads 49 1, actual 57 2, granularity 60 2, invalidate 63 1
    );
    layout!(InvalidateAddress:
        address_mask 0 6, leaf_only 6 1, page 12 52
    );
    layout!(FaultStatus:
        overflow 0 1, pending 1 1, advanced_overflow 2 1, advanced_pending 3 1, queue_error 4 1,
        completion_error 5 1, timeout_error 6 1, record 8 8
    );
    layout!(EventControl:
        pending 30 1, masked 31 1
    );
    layout!(QueueAddress:
        size 0 3, wide 11 1, page 12 52
    );
    layout!(InterruptTableAddress:
        size 0 4, extended_mode 11 1, page 12 52
    );
    layout!(QueueErrorRecord:
        queue_error 0 4, timeout_source 32 16, completion_source 48 16
    );
}

#[test]
fn registers_are_where_the_specification_has_them() {
    let expected = [
        (offset::VER, 0x00),
        (offset::CAP, 0x08),
        (offset::ECAP, 0x10),
        (offset::GCMD, 0x18),
        (offset::GSTS, 0x1c),
        (offset::RTADDR, 0x20),
        (offset::CCMD, 0x28),
        (offset::FSTS, 0x34),
        (offset::FECTL, 0x38),
        (offset::FEDATA, 0x3c),
        (offset::FEADDR, 0x40),
        (offset::FEUADDR, 0x44),
        (offset::IQH, 0x80),
        (offset::IQT, 0x88),
        (offset::IQA, 0x90),
        (offset::ICS, 0x9c),
        (offset::IECTL, 0xa0),
        (offset::IEDATA, 0xa4),
        (offset::IEADDR, 0xa8),
        (offset::IEUADDR, 0xac),
        (offset::IQERCD, 0xb0),
        (offset::IRTA, 0xb8),
        (offset::PQH, 0xc0),
        (offset::PQT, 0xc8),
        (offset::PQA, 0xd0),
        (offset::PRS, 0xdc),
        (offset::PECTL, 0xe0),
        (offset::PEDATA, 0xe4),
        (offset::PEADDR, 0xe8),
        (offset::PEUADDR, 0xec),
        (offset::IVA, 0xf0),
        (offset::IOTLB, 0xf8),
        (offset::FRCD, 0x220),
    ];
    for (at, number) in expected {
        assert_eq!(at, number);
    }
}

#[test]
fn codes_are_the_specifications() {
    let scalable = [
        0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3a, 0x40, 0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x50, 0x51,
        0x52, 0x58, 0x59, 0x5a, 0x5b, 0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7a, 0x7b, 0x7c,
        0x7d, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x89, 0x90, 0x91,
    ];
    let codes: Vec<u8> = (0x1..=0xe).chain(scalable).collect();
    assert_eq!(FaultReason::ALL.map(FaultReason::code).to_vec(), codes);
    assert_eq!(InterruptFaultReason::ALL.map(InterruptFaultReason::code).to_vec(), (0x20..=0x28).collect::<Vec<u8>>());
    let unqualified: Vec<u8> =
        FaultReason::ALL.into_iter().filter(|reason| !reason.qualified()).map(FaultReason::code).collect();
    let of_scalable_mode = [0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3a, 0x40, 0x50, 0x58];
    assert_eq!(unqualified[..4], [0x1, 0x8, 0x9, 0xa], "what is found before the context entry");
    assert_eq!(unqualified[4..], of_scalable_mode, "and a PASID directory or table that cannot be read");
    let of_entry = InterruptFaultReason::ALL.into_iter().filter(|reason| reason.qualified());
    assert_eq!(of_entry.map(InterruptFaultReason::code).collect::<Vec<_>>(), [0x22, 0x24, 0x26, 0x27, 0x28]);
    assert_eq!(
        [kind::CONTEXT_CACHE, kind::IOTLB, kind::DEVICE_TLB, kind::INTERRUPT_ENTRY, kind::WAIT],
        [1, 2, 3, 4, 5]
    );
    assert_eq!([kind::PASID_IOTLB, kind::PASID_CACHE, kind::PASID_DEVICE_TLB, kind::PAGE_RESPONSE], [6, 7, 8, 9]);
    assert_eq!([granularity::GLOBAL, granularity::DOMAIN, granularity::SELECTIVE], [1, 2, 3]);
    let errors = [
        QueueError::InvalidTail,
        QueueError::Fetch,
        QueueError::InvalidType,
        QueueError::Reserved,
        QueueError::InvalidWidth,
        QueueError::UnalignedTail,
        QueueError::InvalidTableMode,
    ];
    assert_eq!(errors.map(|error| error as u8), [1, 2, 3, 4, 5, 6, 7]);
    // The type of a descriptor has four bits below and three more from bit 9 on.
    for (low, number) in [(0xf, 0xf), (1 << 9, 0x10), (7 << 9, 0x70), (!(0xf | 7 << 9), 0)] {
        assert_eq!(Descriptor { low, high: u64::MAX, upper: [u64::MAX; 2] }.kind(), number, "{low:#x}");
    }
    let types =
        [Some(TranslationType::Untranslated), Some(TranslationType::DeviceTlb), Some(TranslationType::PassThrough)];
    assert_eq!([0, 1, 2, 3].map(TranslationType::from_bits), [types[0], types[1], types[2], None]);
    let validations = [SourceValidation::None, SourceValidation::SourceId, SourceValidation::BusRange].map(Some);
    assert_eq!([0, 1, 2, 3].map(SourceValidation::from_bits), [validations[0], validations[1], validations[2], None]);
    let modes = (0..8).map(|bits| DeliveryMode::from_bits(bits).map(|mode| mode as u8)).collect::<Vec<_>>();
    assert_eq!(modes, [Some(0), Some(1), Some(2), None, Some(4), Some(5), None, Some(7)]);
}

#[test]
fn sizes_follow_their_fields() {
    assert_eq!([1, 2, 3, 4, 5].map(entry_span), [1 << 12, 1 << 21, 1 << 30, 1 << 39, 1 << 48]);
    assert_eq!([39, 48, 57].map(levels), [3, 4, 5]);
    let entries = |size| InterruptTableAddress::new().with_size(size).entries();
    assert_eq!([0, 7, 15].map(entries), [2, 256, 65_536]);
    let entry = IoapicEntry::new().with_index_high(true).with_index_low(0x1234);
    assert_eq!(entry.index(), 0x9234);
    assert_eq!(entry.request_address().handle(), 0x9234);
    // Interrupts are at 0xfeexxxxx; bit 4 is the format.
    assert_eq!(RemappableAddress::new().with_handle(0x8001).into_bits(), 0xfee0_0000 | 1 << 5 | 1 << 4 | 1 << 2);
    assert_eq!((CompatibilityAddress::new().into_bits(), ADDRESS_PREFIX), (0xfee0_0000, 0xfee));
}

#[test]
fn a4_capability_registers_say_this_and_nothing_else() {
    let mut config = UnitConfig::new(UnitId(0), 48);
    // ND, CM, SAGAW, MGAW, ZLR, FRO, SLLPS, PSI, NFR, MAMV, DWD and DRD, ESRTPS.
    let capability = 6
        | 1 << 7
        | 0b00110 << 8
        | 47 << 16
        | 1 << 22
        | 0x22 << 24
        | 3 << 34
        | 1 << 39
        | 7 << 40
        | 18 << 48
        | 3 << 54
        | 1 << 63;
    assert_eq!(config.capability().into_bits(), capability);
    // C, QI, PT, IRO.
    assert_eq!(config.extended_capability().into_bits(), 0b0100_0011 | 0xf << 8);
    config.interrupt_remapping = true;
    config.extended_interrupt_mode = true;
    // ESIRTPS; IR, EIM, MHMV.
    assert_eq!(config.capability().into_bits(), capability | 1 << 62);
    assert_eq!(config.extended_capability().into_bits(), 0b0101_1011 | 0xf << 8 | 15 << 20);
    assert_eq!(config.version(), 0x10);
}
