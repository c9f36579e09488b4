//! Messages and entries of every kind, over a table in memory.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::ids::SourceId;
use crate::spec::irte::IoapicEntry;

#[path = "interrupt_posted_test.rs"]
mod posted;

type Memory = GuestMemoryMmap<()>;

impl Remapping {
    /// As [`Remapping::remap`], of what is not posted.
    fn message(&self, memory: &Memory, sender: impl Into<Sender>, msi: Msi) -> Result<Msi, RemapError> {
        self.remap(memory, sender, msi).map(|remapped| match remapped {
            Remapped::Message(msi) => msi,
            Remapped::Posted(posting) => panic!("{posting:?} is no message"),
        })
    }
}

const TABLE: u64 = 0x4000;
const NVME: Requester = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };
const NIC: Requester = Requester { segment: 0, sid: SourceId::new(1, 0, 1) };

/// A table of `2^(size + 1)` entries.
fn table(size: u8) -> InterruptTableAddress {
    InterruptTableAddress::new().with_page(TABLE >> 12).with_size(size)
}

/// Remapping on, with 256 entries and 32-bit destinations.
fn extended() -> Remapping {
    let table = table(7).with_extended_mode(true);
    Remapping { enabled: true, compatibility: false, table, posted_within: None }
}

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
}

fn store(memory: &Memory, index: u64, entry: Irte) {
    let at = TABLE + index * Irte::SIZE;
    memory.write_obj(entry.low.into_bits(), GuestAddress(at)).unwrap();
    memory.write_obj(entry.high.into_bits(), GuestAddress(at + 8)).unwrap();
}

/// A present entry for vector 0x41 on processor 9, in the place where EIME has it, for anybody.
fn entry() -> Irte {
    Irte { low: IrteLow::new().with_present(true).with_vector(0x41).with_destination(9), high: IrteHigh::new() }
}

/// What [`entry`] makes.
const DELIVERED: Msi = Msi { address: 0xfee0_9000, data: 0x41 };

/// A request in remappable format, as a driver composes it.
fn request(handle: u16) -> Msi {
    let address = RemappableAddress::new().with_handle(handle);
    Msi { address: u64::from(address.into_bits()), data: 0 }
}

/// The same with SHV.
fn with_subhandle(handle: u16, subhandle: u16) -> Msi {
    let address = RemappableAddress::new().with_handle(handle).with_subhandle_valid(true);
    Msi { address: u64::from(address.into_bits()), data: u32::from(subhandle) }
}

/// A fault as (reason, index, silenced).
fn fault(result: Result<Msi, RemapError>) -> (u8, u16, bool) {
    match result {
        Err(RemapError::Fault(fault)) => {
            assert_eq!(fault.requester, NVME);
            (fault.reason.code(), fault.index, fault.silenced)
        }
        other => panic!("{other:x?} is no fault"),
    }
}

/// What `entry` makes of a request of `requester`, and the fault's reason.
fn through(remapping: Remapping, entry: Irte, requester: Requester) -> Result<Msi, u8> {
    let memory = memory();
    store(&memory, 5, entry);
    remapping.message(&memory, requester, request(5)).map_err(|error| match error {
        RemapError::Fault(fault) => {
            assert_eq!((fault.index, fault.requester), (5, requester));
            fault.reason.code()
        }
        RemapError::NotAnInterrupt(_) | RemapError::NoUnit(_) => panic!("{error}"),
    })
}

#[test]
fn a9_requests_are_laid_out_as_linux_writes_them() {
    // fill_msi_msg: SHV and the format are set, the index is in bits 19:5, its bit 15 in bit 2.
    let address = |handle| with_subhandle(handle, 0).address;
    assert_eq!(address(0), 0xfee0_0018);
    assert_eq!(address(1), 0xfee0_0038);
    assert_eq!(address(0x7fff), 0xfeef_fff8);
    assert_eq!(address(0x8000), 0xfee0_001c);
    assert_eq!(RemappableAddress::from_bits(0xfeef_fffc).handle(), 0xffff);
    // The redirection table entry of pin 4, index 0x8003, level-triggered, active low.
    let pin = IoapicEntry::from_bits(3 << 49 | 1 << 48 | 1 << 15 | 1 << 13 | 1 << 11 | 4);
    assert!(pin.remappable() && pin.level() && pin.active_low() && !pin.masked());
    assert_eq!((pin.index(), pin.vector()), (0x8003, 4));
    assert_eq!(u64::from(pin.request_address().into_bits()), request(0x8003).address);
    // dmar.h: vector at 16, destination at 32, source id at 64, SQ at 80, SVT at 82.
    let low = IrteLow::from_bits(0x1234_5678_0041_0001 | 7 << 5 | 1 << 4 | 1 << 3 | 1 << 2 | 1 << 1);
    assert!(low.present() && low.fault_processing_disable() && low.logical() && low.redirection_hint() && low.level());
    assert_eq!((low.delivery_mode(), low.vector(), low.destination()), (7, 0x41, 0x1234_5678));
    let high = IrteHigh::from_bits(2 << 18 | 3 << 16 | 0x0018);
    assert_eq!((high.validation(), high.source_qualifier(), high.source()), (2, 3, 0x18));
    let posted = PostedIrteLow::from_bits(0x3ff_ffff << 38 | 0x41 << 16 | 3 << 14);
    assert!(posted.posted() && posted.urgent() && !posted.present());
    assert_eq!((posted.vector(), posted.descriptor_low()), (0x41, 0x3ff_ffff));
}

#[test]
fn a9_with_remapping_off_every_interrupt_passes() {
    let memory = memory();
    let off = Remapping { enabled: false, ..extended() };
    for msi in [request(5), with_subhandle(9, 0x1234), Msi { address: 0xfee0_1000, data: 0x4041 }] {
        assert_eq!(off.message(&memory, NVME, msi), Ok(msi));
    }
}

#[test]
fn a9_a_message_outside_of_the_window_is_no_interrupt() {
    let memory = memory();
    for remapping in [extended(), Remapping::default()] {
        for address in [0, 0xfedf_fffc, 0xfef0_0000, 0x1_fee0_0018, 0xff00_0000_fee0_0018, u64::MAX] {
            let msi = Msi { address, data: 0 };
            assert_eq!(remapping.message(&memory, NVME, msi), Err(RemapError::NotAnInterrupt(address)));
        }
    }
}

#[test]
fn a9_compatibility_format_passes_only_with_cfis_and_without_eime() {
    let memory = memory();
    for bits in 0..4 {
        let (compatibility, extended_mode) = (bits & 1 != 0, bits & 2 != 0);
        let table = table(7).with_extended_mode(extended_mode);
        let remapping = Remapping { compatibility, table, ..extended() };
        for msi in [Msi { address: 0xfee0_1000, data: 0x41 }, Msi { address: 0xfeef_ffec, data: 0xffff }] {
            let result = remapping.message(&memory, NVME, msi);
            if compatibility && !extended_mode {
                assert_eq!(result, Ok(msi));
            } else {
                assert_eq!(fault(result), (0x25, 0, false));
            }
        }
    }
}

#[test]
fn a9_a_request_leads_to_its_entry() {
    let memory = memory();
    let remapping = Remapping { table: table(15).with_extended_mode(true), ..extended() };
    for index in [0u16, 1, 255, 0x7fff, 0x8000, 0xffff] {
        assert_eq!(fault(remapping.message(&memory, NVME, request(index))), (0x22, index, false));
        store(&memory, u64::from(index), entry());
        assert_eq!(remapping.message(&memory, NVME, request(index)), Ok(DELIVERED));
        store(&memory, u64::from(index), Irte::default());
    }
}

#[test]
fn a9_the_subhandle_is_added_and_never_wraps() {
    let memory = memory();
    // Handle, subhandle, and the index of the entry that is used, or the fault. Tables of 256 and of 65536 entries.
    let cases = [
        (7, 0u16, 0u16, Ok(0u64)),
        (7, 3, 4, Ok(7)),
        (7, 0, 255, Ok(255)),
        (7, 255, 0, Ok(255)),
        (7, 255, 1, Err((0x21, 256, false))),
        (7, 0, 256, Err((0x21, 256, false))),
        (7, 0xffff, 5, Err((0x21, 0xffff, false))),
        (15, 0xff00, 0xff, Ok(0xffff)),
        (15, 0xffff, 0, Ok(0xffff)),
        (15, 0xffff, 1, Err((0x21, 0xffff, false))),
        (15, 0xffff, 0xffff, Err((0x21, 0xffff, false))),
        (0, 0, 1, Ok(1)),
        (0, 1, 1, Err((0x21, 2, false))),
    ];
    // A wrapped index would find this one.
    store(&memory, 4, entry());
    for (size, handle, subhandle, expected) in cases {
        let remapping = Remapping { table: table(size).with_extended_mode(true), ..extended() };
        let result = remapping.message(&memory, NVME, with_subhandle(handle, subhandle));
        match expected {
            Ok(index) => {
                assert_eq!(fault(result), (0x22, index as u16, false));
                store(&memory, index, entry());
                let result = remapping.message(&memory, NVME, with_subhandle(handle, subhandle));
                assert_eq!(result, Ok(DELIVERED), "{handle:#x} + {subhandle:#x}");
                store(&memory, index, Irte::default());
            }
            Err(expected) => assert_eq!(fault(result), expected, "{handle:#x} + {subhandle:#x}"),
        }
    }
}

#[test]
fn a9_data_counts_only_with_shv() {
    let memory = memory();
    store(&memory, 5, entry());
    for bit in 0..32 {
        let data = 1 << bit;
        assert_eq!(extended().message(&memory, NVME, Msi { data, ..request(5) }), Ok(DELIVERED));
        if bit >= 16 {
            let result = extended().message(&memory, NVME, Msi { data, ..with_subhandle(5, 0) });
            assert_eq!(fault(result), (0x20, 0, false), "data bit {bit}");
        }
    }
    // Address bits 1:0 are don't care.
    let msi = request(5);
    assert_eq!(extended().message(&memory, NVME, Msi { address: msi.address | 3, ..msi }), Ok(DELIVERED));
}

#[test]
fn a9_a_table_that_cannot_be_read_is_a_fault() {
    let memory = memory();
    // No memory; an entry just beyond memory; an entry beyond the address space.
    let cases = [(0x1000_0000u64, 0), ((2 << 20) - 4096, 256), (u64::MAX << 16, 0xffff)];
    for (base, index) in cases {
        let table = table(15).with_page(base >> 12);
        let remapping = Remapping { table, ..extended() };
        assert_eq!(fault(remapping.message(&memory, NVME, request(index))), (0x23, index, false));
    }
}

#[test]
fn a9_each_reserved_bit_of_an_entry_is_checked() {
    let defined_low = IrteLow::new()
        .with_fault_processing_disable(true)
        .with_logical(true)
        .with_redirection_hint(true)
        .with_level(true)
        .with_available(0xf)
        .with_vector(0xff);
    let destination = |bits: u32| IrteLow::new().with_destination(bits).into_bits();
    for (extended_mode, destination) in [(true, destination(u32::MAX)), (false, destination(0xff00))] {
        let remapping = Remapping { table: table(7).with_extended_mode(extended_mode), ..extended() };
        let delivery_mode = 0b111u64 << 5;
        let plain = Irte { low: IrteLow::new().with_present(true), high: IrteHigh::new() };
        for bit in 1..64 {
            if delivery_mode >> bit & 1 != 0 {
                continue;
            }
            let entry = Irte { low: IrteLow::from_bits(plain.low.into_bits() | 1 << bit), ..plain };
            let reserved = (defined_low.into_bits() | destination) >> bit & 1 == 0;
            let result = through(remapping, entry, NVME);
            assert_eq!(result.err(), reserved.then_some(0x24), "bit {bit} with EIME {extended_mode}");
        }
        for bit in 64..128 {
            let entry = Irte { high: IrteHigh::from_bits(1 << (bit - 64)), ..plain };
            // Without SVT, SID and SQ do not matter. SVT 01 and 10 do not match.
            // NIC is not on bus 0, where SVT 10 with SID 0 would let it pass.
            let expected = match bit {
                64..82 => None,
                82 | 83 => Some(0x26),
                _ => Some(0x24),
            };
            assert_eq!(through(remapping, entry, NIC).err(), expected, "bit {bit} with EIME {extended_mode}");
        }
    }
}

#[test]
fn a9_reserved_values_are_checked() {
    for mode in 0..8 {
        let low = entry().low.with_delivery_mode(mode);
        let expected = if mode == 3 || mode == 6 {
            Err(0x24)
        } else {
            Ok(Msi { data: u32::from(mode) << 8 | DELIVERED.data, ..DELIVERED })
        };
        assert_eq!(through(extended(), Irte { low, ..entry() }, NVME), expected, "DLM {mode}");
    }
    let high = IrteHigh::new().with_validation(3).with_source(NVME.sid.0);
    assert_eq!(through(extended(), Irte { high, ..entry() }, NVME), Err(0x24), "SVT 3");
}

#[test]
fn a9_a_source_that_is_not_checked_uses_every_entry() {
    let memory = memory();
    for validation in 1..=2 {
        store(&memory, 1, Irte { high: IrteHigh::new().with_validation(validation).with_source(0x4242), ..entry() });
        let sender = |checked| Sender { checked, ..NVME.into() };
        assert_eq!(extended().message(&memory, sender(false), request(1)), Ok(DELIVERED));
        assert_eq!(fault(extended().message(&memory, sender(true), request(1))), (0x26, 1, false));
    }
}

#[test]
fn a9_the_source_id_is_checked_in_the_bits_that_sq_leaves() {
    let sid = SourceId::new(2, 5, 0b101);
    for (qualifier, ignored) in [(0, 0u16), (1, 0b100), (2, 0b110), (3, 0b111)] {
        let high = IrteHigh::new().with_validation(1).with_source_qualifier(qualifier).with_source(sid.0);
        for flipped in 0..16 {
            let requester = Requester { segment: 0, sid: SourceId(sid.0 ^ 1 << flipped) };
            let expected = if ignored >> flipped & 1 != 0 { Ok(DELIVERED) } else { Err(0x26) };
            let result = through(extended(), Irte { high, ..entry() }, requester);
            assert_eq!(result, expected, "SQ {qualifier}, bit {flipped}");
        }
        let exact = Requester { segment: 0, sid };
        assert_eq!(through(extended(), Irte { high, ..entry() }, exact), Ok(DELIVERED));
    }
}

#[test]
fn a9_a_bus_range_starts_in_the_high_byte() {
    // First, last, the buses that may use it. As set_irte_verify_bus: start << 8 | end.
    let cases: [(u8, u8, &[u8]); 5] = [
        (2, 5, &[2, 3, 4, 5]),
        (3, 3, &[3]),
        (5, 2, &[]),
        (0, 255, &[0, 1, 2, 3, 4, 5, 6, 254, 255]),
        (255, 255, &[255]),
    ];
    for (first, last, buses) in cases {
        // SQ does not matter here.
        for qualifier in 0..4 {
            let source = u16::from(first) << 8 | u16::from(last);
            let high = IrteHigh::new().with_validation(2).with_source(source).with_source_qualifier(qualifier);
            for bus in [0, 1, 2, 3, 4, 5, 6, 254, 255] {
                let requester = Requester { segment: 0, sid: SourceId::new(bus, 31, 7) };
                let expected = if buses.contains(&bus) { Ok(DELIVERED) } else { Err(0x26) };
                let result = through(extended(), Irte { high, ..entry() }, requester);
                assert_eq!(result, expected, "bus {bus} of {first} to {last}");
            }
        }
    }
}

#[test]
fn a9_fpd_silences_what_is_found_in_the_entry_and_nothing_else() {
    let memory = memory();
    let silencing = IrteLow::new().with_fault_processing_disable(true);
    let present = silencing.with_present(true);
    let foreign = IrteHigh::new().with_validation(1).with_source(0xffff);
    let cases = [
        (Irte { low: silencing, high: IrteHigh::new() }, 0x22),
        (Irte { low: present.with_reserved(1), high: IrteHigh::new() }, 0x24),
        (Irte { low: present.with_posted(true), high: IrteHigh::new() }, 0x24),
        (Irte { low: present, high: foreign }, 0x26),
    ];
    for (entry, reason) in cases {
        store(&memory, 5, entry);
        assert_eq!(fault(extended().message(&memory, NVME, request(5))), (reason, 5, true));
        let loud = Irte { low: entry.low.with_fault_processing_disable(false), ..entry };
        store(&memory, 5, loud);
        assert_eq!(fault(extended().message(&memory, NVME, request(5))), (reason, 5, false));
    }
    for reason in InterruptFaultReason::ALL {
        assert_eq!(reason.qualified(), [0x22, 0x24, 0x26, 0x27, 0x28].contains(&reason.code()));
    }
}

#[test]
fn a9_the_message_for_the_processors_has_all_that_the_entry_says() {
    let low = entry().low;
    // The entry with EIME, and the message. KVM takes destination bits 31:8 in address bits 63:40.
    let cases = [
        (low, 0xfee0_9000, 0x41),
        (low.with_logical(true), 0xfee0_9004, 0x41),
        (low.with_redirection_hint(true), 0xfee0_9008, 0x41),
        (low.with_logical(true).with_redirection_hint(true).with_delivery_mode(1), 0xfee0_900c, 0x141),
        (low.with_level(true), 0xfee0_9000, 0xc041),
        (low.with_delivery_mode(4).with_vector(0), 0xfee0_9000, 0x400),
        (low.with_vector(0xff), 0xfee0_9000, 0xff),
        (low.with_destination(0xff), 0xfeef_f000, 0x41),
        (low.with_destination(0x100), 0x100_fee0_0000, 0x41),
        (low.with_destination(0x1234_5678), 0x0012_3456_0000_0000 << 8 | 0xfee7_8000, 0x41),
        (low.with_destination(u32::MAX), 0xffff_ff00_feef_f000, 0x41),
    ];
    for (low, address, data) in cases {
        assert_eq!(through(extended(), Irte { low, ..entry() }, NVME), Ok(Msi { address, data }), "{low:?}");
    }
    // Without EIME the destination is in bits 15:8 of its field.
    let xapic = Remapping { table: table(7), ..extended() };
    for destination in [0u32, 1, 0x7f, 0xff] {
        let low = low.with_destination(destination << 8);
        let address = 0xfee0_0000 | u64::from(destination) << 12;
        assert_eq!(through(xapic, Irte { low, ..entry() }, NVME), Ok(Msi { address, data: 0x41 }));
        assert_eq!(
            through(xapic, Irte { low: low.with_destination(destination << 8 | 1), ..entry() }, NVME),
            Err(0x24)
        );
    }
}

#[test]
fn a9_an_entry_that_changes_while_it_is_read_is_never_mixed() {
    let old = Irte { high: IrteHigh::new().with_validation(1).with_source(NVME.sid.0), ..entry() };
    let new = Irte { low: entry().low.with_vector(0x52), high: IrteHigh::new().with_validation(1).with_source(0x100) };
    // Each is what memory goes through, as the lower and the upper word; the change comes after any number of reads.
    // Linux writes the lower word first; the specification asks for the upper one first when an entry becomes present.
    let gone = Irte::default();
    let histories = [
        [old, Irte { low: gone.low, ..old }, gone],
        [gone, Irte { high: new.high, ..gone }, new],
        [old, Irte { low: new.low, ..old }, new],
        [old, old, new],
    ];
    for history in histories {
        for first in 0..8 {
            for second in first..8 {
                let mut reads = 0;
                let read = read_whole(|word| {
                    let moment = usize::from(reads >= first) + usize::from(reads >= second);
                    reads += 1;
                    let Irte { low, high } = history[moment];
                    Some([low.into_bits(), high.into_bits()][word])
                });
                assert!(read.is_some_and(|entry| history.contains(&entry)), "{history:?}: {first}, {second}: {read:?}");
            }
        }
    }
}

#[test]
fn a9_an_entry_that_never_stops_changing_is_not_present() {
    let mut reads = 0u64;
    let read = read_whole(|word| {
        reads += 1;
        Some(if word == 0 { 1 | reads << 16 } else { 0 })
    });
    assert!(read.is_some_and(|entry| !entry.low.present()));
    assert_eq!(reads, 1 + 2 * READS as u64);
}

#[test]
fn a9_an_invalidation_names_a_range_of_entries() {
    let range = |first, count| EntriesChanged::Range { first, count };
    let cases = [
        (5, 0, range(5, 1)),
        (5, 1, range(4, 2)),
        (0xffff, 0, range(0xffff, 1)),
        (0xffff, 4, range(0xfff0, 16)),
        (0x1234, 15, range(0, 0x8000)),
        (0x9234, 15, range(0x8000, 0x8000)),
    ];
    for (index, mask, expected) in cases {
        assert_eq!(EntriesChanged::masked(index, mask), expected);
    }
    assert_eq!(range(4, 2).join(range(8, 1)), range(4, 5));
    assert_eq!(range(8, 1).join(range(4, 2)), range(4, 5));
    assert_eq!(range(0, 0x8000).join(range(0xffff, 1)), range(0, 0x1_0000));
    assert_eq!(range(0, 64).join(range(3, 1)), range(0, 64));
    assert_eq!(range(4, 2).join(EntriesChanged::All), EntriesChanged::All);
}

#[test]
fn a9_an_invalidation_concerns_the_messages_of_its_entries() {
    let compatibility = Msi { address: 0xfee0_1000, data: 0x41 };
    let changed = EntriesChanged::Range { first: 4, count: 4 };
    for (msi, concerned) in [
        (request(3), false),
        (request(4), true),
        (request(7), true),
        (request(8), false),
        (with_subhandle(2, 2), true),
        (with_subhandle(4, 4), false),
        // Beyond every table: 16 bits would say 5.
        (with_subhandle(0xffff, 6), false),
        (compatibility, false),
        (Msi { address: 0x1_0000_0000 | request(4).address, data: 0 }, false),
    ] {
        assert_eq!(changed.concerns(msi), concerned, "{msi:x?}");
        assert!(EntriesChanged::All.concerns(msi));
    }
}
