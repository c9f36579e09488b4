//! Legacy tables with everything that can be wrong in them, and how it is told.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};
use vtd::spec::fault::FaultReason;
use vtd::spec::registers::{EventControl, FaultStatus, offset};
use vtd::spec::root_context::{ContextEntryHigh, ContextEntryLow};
use vtd::{Access, DmaError, Endpoint, Gpa, Iova, Msi, Perm, UnitConfig, UnitId};

use crate::rig::{MEMORY, Memory, NVME, Rig, context_global, iotlb_global, requester};

type Translation = Result<Gpa, Option<FaultReason>>;

/// Translates once; faults by their reason, `None` for what is no fault.
fn translate(endpoint: &Endpoint<Memory>, iova: u64, access: Access) -> Translation {
    endpoint.enter().translate(Iova(iova), access).map_err(|error| match error {
        DmaError::Fault(fault) => Some(fault.reason),
        DmaError::InterruptRange(_)
        | DmaError::NoSourceId(_)
        | DmaError::NoMemory { .. }
        | DmaError::Unsupported(_) => None,
    })
}

fn read(endpoint: &Endpoint<Memory>, iova: u64) -> Translation {
    translate(endpoint, iova, Access::Read)
}

/// A unit of 57 bits with an endpoint in domain 1, and the root of its table, of `width` bits.
fn rig(width: u8) -> (Rig, u64, Arc<Endpoint<Memory>>) {
    let mut rig = Rig::with(UnitConfig::new(UnitId(0), 57));
    rig.enable_queue();
    rig.enable_translation();
    let root = rig.table();
    rig.set_paged(NVME, root, width, 1);
    let endpoint = Arc::new(rig.unit.endpoint(NVME));
    (rig, root, endpoint)
}

#[test]
fn a1_tables_of_3_4_and_5_levels_with_leaves_of_each_size() {
    for width in [39, 48, 57] {
        let (mut rig, root, endpoint) = rig(width);
        let top = 1u64 << (width - 1);
        for (level, size) in [(1, 1u64 << 12), (2, 1 << 21), (3, 1 << 30)] {
            let iova = top + (u64::from(level) << 32);
            rig.leaf(root, width, iova, 8 << 30, Some(Perm::ReadWrite), level);
            assert_eq!(read(&endpoint, iova + 0x123), Ok(Gpa((8 << 30) + 0x123)));
            assert_eq!(read(&endpoint, iova + size - 1), Ok(Gpa((8 << 30) + size - 1)));
            assert_eq!(read(&endpoint, iova + size), Err(Some(FaultReason::ReadNotPermitted)));
        }
    }
}

#[test]
fn a1_permissions_are_anded_downwards() {
    let bits = |rw: u64, page: u64| rw | page << 12;
    for upper in 1..4u64 {
        for lower in 1..4u64 {
            let (mut rig, root, endpoint) = rig(39);
            let entry = rig.entry_address(root, 39, 0x5000, 1);
            rig.store(entry, bits(lower, 9));
            let directory = rig.entry_address(root, 39, 0x5000, 2);
            rig.store(directory, rig.load(directory) & !3 | upper);
            let both = upper & lower;
            let expect = |ok: bool, reason| if ok { Ok(Gpa(0x9000)) } else { Err(Some(reason)) };
            assert_eq!(read(&endpoint, 0x5000), expect(both & 1 != 0, FaultReason::ReadNotPermitted));
            let written = translate(&endpoint, 0x5000, Access::Write);
            assert_eq!(written, expect(both & 2 != 0, FaultReason::WriteNotPermitted));
            // ZLR: no data moves, so any permission will do.
            let nothing = translate(&endpoint, 0x5000, Access::ZeroLengthRead);
            assert_eq!(nothing, expect(both != 0, FaultReason::ReadNotPermitted));
        }
    }
}

#[test]
fn a1_pass_through_and_translation_off_are_untranslated() {
    let (mut rig, _, endpoint) = rig(48);
    rig.set_pass_through(NVME, 4);
    assert_eq!(read(&endpoint, 0x1234_5678), Ok(Gpa(0x1234_5678)));
    // Its pointer is ignored, whatever it holds.
    let low = ContextEntryLow::new().with_present(true).with_translation_type(2).with_second_stage((1 << 52) - 1);
    rig.set_context(NVME, low, ContextEntryHigh::new().with_address_width(2).with_domain(4));
    assert!(rig.submit(&[context_global()]));
    assert_eq!(read(&endpoint, 0x1234_5678), Ok(Gpa(0x1234_5678)));
    rig.clear_context(NVME);
    rig.command(|on| on.with_translation(false));
    assert_eq!(read(&endpoint, 0x1234_5678), Ok(Gpa(0x1234_5678)));
    rig.command(|on| on.with_translation(true));
    assert_eq!(read(&endpoint, 0x1234_5678), Err(Some(FaultReason::ContextNotPresent)));
}

#[test]
fn a3_root_entries() {
    let reasons = |low: u64, high: u64| {
        let (rig, _, endpoint) = rig(48);
        rig.store(rig.root_table + 8, high);
        rig.store(rig.root_table, low);
        read(&endpoint, 0x1000)
    };
    assert_eq!(reasons(0, 0), Err(Some(FaultReason::RootNotPresent)));
    assert_eq!(reasons(0xffe, !0), Err(Some(FaultReason::RootNotPresent)), "nothing is checked before P");
    for bit in 1..12 {
        assert_eq!(reasons(0x20_0001 | 1 << bit, 0), Err(Some(FaultReason::RootReserved)), "bit {bit}");
    }
    for bit in 48..64 {
        assert_eq!(reasons(0x20_0001 | 1 << bit, 0), Err(Some(FaultReason::RootReserved)), "bit {bit}");
    }
    for bit in 0..64 {
        assert_eq!(reasons(0x20_0001, 1 << bit), Err(Some(FaultReason::RootReserved)), "bit {}", bit + 64);
    }
    assert_eq!(reasons(MEMORY | 1, 0), Err(Some(FaultReason::ContextTableAccess)));
}

#[test]
fn a3_root_table_pointers() {
    let (mut rig, _, endpoint) = rig(48);
    let good = rig.root_table;
    for bad in [MEMORY, 1 << 48, !0xfff, good | 0x400, good | 0x800, good | 0xc00] {
        rig.root_table = bad;
        rig.set_root();
        assert_eq!(read(&endpoint, 0x1000), Err(Some(FaultReason::RootTableAccess)), "{bad:#x}");
    }
}

#[test]
fn a3_context_entries() {
    let (mut rig, root, endpoint) = rig(48);
    let entry = rig.context_address(NVME);
    let low = ContextEntryLow::new().with_present(true).with_second_stage(root >> 12).into_bits();
    let high = ContextEntryHigh::new().with_address_width(2).with_domain(1).into_bits();
    let mut reason = |low: u64, high: u64| {
        rig.store(entry + 8, high);
        rig.store(entry, low);
        assert!(rig.submit(&[iotlb_global()]));
        read(&endpoint, 0x1000).unwrap_err().unwrap()
    };
    // The table behind a good entry is empty.
    let good = FaultReason::ReadNotPermitted;
    assert_eq!(reason(low, high), good);
    assert_eq!(reason(low & !1, !0), FaultReason::ContextNotPresent);
    for bit in 0..64 {
        let expected = match bit {
            0 => FaultReason::ContextNotPresent,
            1 => good,
            2 | 3 | 4..12 | 48..64 => {
                if bit == 2 {
                    FaultReason::ContextInvalid
                } else if bit == 3 {
                    continue;
                } else {
                    FaultReason::ContextReserved
                }
            }
            // Other roots: somewhere in memory or outside of it.
            _ => continue,
        };
        assert_eq!(reason(low ^ 1 << bit, high), expected, "bit {bit}");
    }
    for bit in (3..64).filter(|bit| !(8..24).contains(bit)) {
        let expected = if (3..7).contains(&bit) { good } else { FaultReason::ContextReserved };
        assert_eq!(reason(low, high ^ 1 << bit), expected, "bit {}", bit + 64);
    }
    for width in [0, 4, 5, 6, 7] {
        assert_eq!(reason(low, high & !7 | width), FaultReason::ContextInvalid, "AW {width}");
        assert_eq!(reason(low | 2 << 2, high & !7 | width), FaultReason::ContextInvalid, "AW {width}, pass-through");
    }
    assert_eq!(reason(low | 3 << 2, high), FaultReason::ContextInvalid, "TT 11");
    assert_eq!(reason(low & 0xfff | MEMORY, high), FaultReason::PagingTableAccess);
}

#[test]
fn a3_widths_and_types_that_are_not_offered() {
    let mut config = UnitConfig::new(UnitId(0), 39);
    config.pass_through = false;
    let mut rig = Rig::with(config);
    rig.enable_translation();
    let endpoint = rig.unit.endpoint(NVME);
    let root = rig.table();
    for (width, reason) in [(39, FaultReason::ReadNotPermitted), (48, FaultReason::ContextInvalid)] {
        rig.set_paged(NVME, root, width, 1);
        assert_eq!(read(&endpoint, 0x1000), Err(Some(reason)));
    }
    let low = ContextEntryLow::new().with_present(true).with_translation_type(2);
    rig.set_context(NVME, low, ContextEntryHigh::new().with_address_width(1));
    assert_eq!(read(&endpoint, 0x1000), Err(Some(FaultReason::ContextInvalid)));
}

#[test]
fn a3_an_address_beyond_the_width_of_the_entry() {
    for width in [39, 48, 57] {
        let (_rig, _, endpoint) = rig(width);
        let beyond = Err(Some(FaultReason::AddressBeyondWidth));
        assert_eq!(read(&endpoint, (1 << width) - 1), Err(Some(FaultReason::ReadNotPermitted)));
        assert_eq!(read(&endpoint, 1 << width), beyond);
        assert_eq!(read(&endpoint, u64::MAX), beyond);
    }
}

#[test]
fn a3_reserved_bits_of_paging_entries() {
    let (mut rig, root, endpoint) = rig(57);
    for level in 1..=5u8 {
        let iova = 0x1_0000_0000 * u64::from(level);
        for leaf in [false, true] {
            if leaf && level > 3 || !leaf && level == 1 {
                continue;
            }
            let entry = rig.entry_address(root, 57, iova, level);
            let table = rig.table();
            let good = if leaf { 8 << 30 | u64::from(level > 1) << 7 | 3 } else { table | 3 };
            for bit in 2..64u32 {
                // PS of a table makes it a leaf, and the other way round.
                if bit == 7 && level > 1 && level < 4 || leaf && bit == 33 {
                    continue;
                }
                rig.store(entry, good ^ 1 << bit);
                assert!(rig.submit(&[iotlb_global()]));
                let address_low = if leaf { 12 + 9 * (u32::from(level) - 1) } else { 12 };
                let reserved = match bit {
                    7 => level > 3,
                    11 | 62 | 48..=51 => true,
                    12..=47 => leaf && bit < address_low,
                    _ => false,
                };
                let result = read(&endpoint, iova);
                let is_reserved = result == Err(Some(FaultReason::PagingReserved));
                assert_eq!(is_reserved, reserved, "level {level}, leaf {leaf}, bit {bit}: {result:?}");
                // Without R and W the same entry is not present, and nothing else is looked at.
                rig.store(entry, good & !3 ^ 1 << bit);
                assert!(rig.submit(&[iotlb_global()]));
                assert_eq!(read(&endpoint, iova), Err(Some(FaultReason::ReadNotPermitted)));
            }
            rig.store(entry, 0);
        }
    }
}

#[test]
fn a3_tables_outside_memory_and_outputs_in_the_interrupt_range() {
    let (mut rig, root, endpoint) = rig(48);
    let directory = rig.entry_address(root, 48, 0x1000, 2);
    rig.store(directory, MEMORY | 3);
    assert_eq!(read(&endpoint, 0x1000), Err(Some(FaultReason::PagingTableAccess)));
    rig.leaf(root, 48, 1 << 32, 0xfee0_0000, Some(Perm::ReadWrite), 2);
    assert_eq!(read(&endpoint, 1 << 32), Err(Some(FaultReason::OutputInInterruptRange)));
    assert_eq!(read(&endpoint, (1 << 32) + 0xf_f000), Err(Some(FaultReason::OutputInInterruptRange)));
    assert_eq!(read(&endpoint, (1 << 32) + 0x10_0000), Ok(Gpa(0xfef0_0000)));
    // What is not permitted is not asked where it leads.
    rig.leaf(root, 48, 2 << 32, 0xfee0_0000, Some(Perm::Read), 2);
    assert_eq!(translate(&endpoint, 2 << 32, Access::Write), Err(Some(FaultReason::WriteNotPermitted)));
    assert_eq!(read(&endpoint, 2 << 32), Err(Some(FaultReason::OutputInInterruptRange)));
}

#[test]
fn a12_the_interrupt_range_is_never_translated() {
    let (mut rig, root, endpoint) = rig(48);
    rig.leaf(root, 48, 0xc000_0000, 8 << 30, Some(Perm::ReadWrite), 3);
    for iova in [0xfee0_0000, 0xfeef_ffff] {
        assert_eq!(read(&endpoint, iova), Err(None));
        assert_eq!(translate(&endpoint, iova, Access::Write), Err(None));
    }
    assert_eq!(read(&endpoint, 0xfedf_ffff), Ok(Gpa((8 << 30) + 0x3edf_ffff)));
    assert_eq!(read(&endpoint, 0xfef0_0000), Ok(Gpa((8 << 30) + 0x3ef0_0000)));
    assert_eq!(rig.fault_records(), []);
}

#[test]
fn a8_a_fault_is_recorded_with_all_that_it_says() {
    let (rig, _, endpoint) = rig(48);
    assert!(translate(&endpoint, 0x1234_5678, Access::Write).is_err());
    assert_eq!(rig.fault_records(), [(0, NVME.sid, 5, 0x1234_5000, false)]);
    let status = FaultStatus::from_bits(rig.read32(offset::FSTS));
    assert_eq!((status.pending(), status.overflow(), status.record()), (true, false, 0));
    assert_eq!(rig.unit.stats().faults.get("0x05"), Some(&1));
    // F is write-1-to-clear, and PPF goes with the last one.
    rig.write32(offset::FRCD + 12, 0);
    assert_eq!(rig.fault_records().len(), 1);
    rig.write32(offset::FRCD + 12, 1 << 31);
    assert_eq!(rig.fault_records(), []);
    assert!(!FaultStatus::from_bits(rig.read32(offset::FSTS)).pending());
    assert!(read(&endpoint, 0x4000).is_err());
    assert_eq!(rig.fault_records(), [(1, NVME.sid, 6, 0x4000, true)]);
    assert_eq!(FaultStatus::from_bits(rig.read32(offset::FSTS)).record(), 1);
}

#[test]
fn a8_faults_of_one_source_collapse_until_the_guest_has_read_them() {
    let (rig, _, endpoint) = rig(48);
    for page in 0..20 {
        assert!(read(&endpoint, page << 12).is_err());
    }
    assert_eq!(rig.fault_records().len(), 1);
    let stats = rig.unit.stats();
    assert_eq!((stats.faults["0x06"], stats.faults_dropped), (20, 19));
    assert!(!FaultStatus::from_bits(rig.read32(offset::FSTS)).overflow());
}

#[test]
fn a8_records_overflow() {
    let (mut rig, root, _) = rig(48);
    let fault = |rig: &Rig, device: u8| {
        assert!(read(&rig.unit.endpoint(requester(0, device, 0)), 0x1000).is_err());
    };
    for device in 4..14 {
        rig.set_paged(requester(0, device, 0), root, 48, 1);
    }
    (4..12).for_each(|device| fault(&rig, device));
    let status = || FaultStatus::from_bits(rig.read32(offset::FSTS));
    assert_eq!((rig.fault_records().len(), status().overflow()), (8, false));
    fault(&rig, 12);
    assert!(status().overflow());
    // Records are free again, but nothing is recorded before PFO is cleared.
    for record in 0..8 {
        rig.write32(offset::FRCD + 16 * record + 12, 1 << 31);
    }
    fault(&rig, 13);
    assert_eq!(rig.fault_records(), []);
    rig.write32(offset::FSTS, FaultStatus::new().with_overflow(true).into_bits());
    assert_eq!(status().into_bits() & 0x7f, 0);
    fault(&rig, 13);
    assert_eq!(rig.fault_records().len(), 1);
    assert_eq!(rig.unit.stats().faults_dropped, 2);
}

#[test]
fn a8_fault_processing_disable_silences_qualified_faults_only() {
    let (mut rig, root, endpoint) = rig(48);
    let entry = rig.context_address(NVME);
    let low = ContextEntryLow::new().with_fault_processing_disable(true).with_second_stage(root >> 12);
    for low in [low.with_present(true), low, low.with_present(true).with_reserved(1), low.with_translation_type(3)] {
        rig.store(entry, low.into_bits());
        assert!(read(&endpoint, 0x1000).is_err());
        assert_eq!(rig.fault_records(), []);
    }
    let root_entry = rig.load(rig.root_table);
    rig.store(rig.root_table, root_entry | 2);
    assert!(read(&endpoint, 0x1000).is_err());
    assert_eq!(rig.fault_records().len(), 1);
}

#[test]
fn a8_the_event_follows_its_mask_and_its_conditions() {
    let (rig, _, endpoint) = rig(48);
    let control = || EventControl::from_bits(rig.read32(offset::FECTL));
    rig.write32(offset::FEDATA, 0x4041);
    rig.write32(offset::FEADDR, 0xfee0_2008);
    rig.write32(offset::FEUADDR, 0x500);
    assert!(control().masked(), "comes up masked");
    assert!(read(&endpoint, 0x1000).is_err());
    assert_eq!(rig.messages.take(), []);
    assert!(control().pending());
    let message = Msi { address: 0x500_fee0_2008, data: 0x4041 };
    rig.write32(offset::FECTL, 0);
    assert_eq!(rig.messages.take(), [message]);
    assert!(!control().pending());
    // A condition is there already: no second message until the guest has served it.
    let other = rig.unit.endpoint(requester(0, 9, 0));
    assert!(read(&other, 0x1000).is_err());
    assert_eq!((rig.messages.take(), rig.fault_records().len()), (vec![], 2));
    for record in 0..2 {
        rig.write32(offset::FRCD + 16 * record + 12, 1 << 31);
    }
    assert!(read(&endpoint, 0x1000).is_err());
    assert_eq!(rig.messages.take(), [message]);
}

#[test]
fn a8_a_fault_in_a_session_is_recorded_at_once_and_its_message_is_sent_when_the_session_is_over() {
    let (rig, _, endpoint) = rig(48);
    rig.write32(offset::FEADDR, 0xfee0_0000);
    rig.write32(offset::FECTL, 0);
    let session = endpoint.enter();
    for page in 1..3u64 {
        assert!(session.translate(Iova(page << 12), Access::Read).is_err());
        assert_eq!((rig.fault_records().len(), rig.messages.take()), (1, vec![]));
    }
    drop(session);
    assert_eq!(rig.messages.take(), [Msi { address: 0xfee0_0000, data: 0 }]);
    rig.write32(offset::FRCD + 12, 1 << 31);
    // An access in a session of its own, whichever way it goes.
    assert!(endpoint.read(Iova(0x1000), &mut [0; 4]).is_err());
    assert_eq!(rig.messages.take().len(), 1);
    // And none without a fault.
    drop(endpoint.enter());
    assert_eq!(rig.messages.take(), []);
}

#[test]
fn a8_a_fault_handler_does_not_wait_behind_a_drain() {
    let (mut rig, root) = Rig::with_nvme();
    let endpoint = rig.unit.endpoint(requester(0, 9, 0));
    assert!(read(&endpoint, 0x1000).is_err());
    rig.pages(root, 0x4000, 0x8000, 1);
    rig.push(&[iotlb_global()]);
    // The listener, and the drain with it, stands still.
    let told = rig.listener.0.lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| rig.ring());
        while rig.unit.stats().map_ops == 0 {
            std::thread::yield_now();
        }
        let (done, handled) = mpsc::channel();
        let unit = rig.unit.clone();
        scope.spawn(move || {
            let write = |at: u64, value: u32| unit.write(at, &value.to_le_bytes());
            let mut status = [0; 4];
            unit.read(offset::FSTS, &mut status);
            write(offset::FRCD + 12, 1 << 31);
            // What Linux clears, and everything; IQE is not set.
            write(offset::FSTS, 0x81);
            write(offset::FSTS, u32::MAX);
            unit.write(offset::FSTS - 4, &u64::MAX.to_le_bytes());
            write(offset::FECTL, 0);
            unit.read(offset::FSTS, &mut status);
            done.send(u32::from_le_bytes(status)).unwrap();
        });
        let status = handled.recv_timeout(Duration::from_secs(60));
        drop(told);
        assert_eq!(status, Ok(0), "FSTS as the handler left it");
    });
}

#[test]
fn a8_a_masked_event_is_withdrawn_with_its_last_condition() {
    let (rig, _, endpoint) = rig(48);
    assert!(read(&endpoint, 0x1000).is_err());
    rig.write32(offset::FRCD + 12, 1 << 31);
    assert_eq!(rig.read32(offset::FECTL), 0x8000_0000);
    rig.write32(offset::FECTL, 0);
    assert_eq!(rig.messages.take(), []);
}

#[test]
fn a8_no_fault_without_a_request() {
    // An assigned function whose tables are broken: the host blocks it, and nothing is told before it makes a request.
    let (mut rig, root) = Rig::with_nvme();
    rig.store(root, 1 << 62 | 3);
    rig.memory.write_slice(&[0xff; 4096], GuestAddress(root + 8)).unwrap();
    assert!(rig.submit(&[iotlb_global()]));
    assert_eq!((rig.fault_records(), rig.messages.take()), (vec![], vec![]));
}
