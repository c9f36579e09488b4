//! Interrupt remapping as a guest programs it, and as who makes routes of it hears of it. What
//! becomes of a message is tested beside `tables/interrupt.rs`.

use std::sync::{Arc, Mutex, Weak};

use vm_memory::{Bytes, GuestAddress};
use vtd::spec::fault::InterruptFaultReason;
use vtd::spec::invalidation::{InterruptEntryLow, QueueError, kind};
use vtd::spec::irte::{IrteHigh, IrteLow, RemappableAddress};
use vtd::spec::registers::{EventControl, FaultStatus, Global, InterruptTableAddress, QueueErrorRecord, offset};
use vtd::{EntriesChanged, Msi, RemapError, RemapFault, RemapListener, Requester, Unit, UnitConfig, UnitId};

use crate::rig::{Memory, NIC, NVME, QUEUE, Rig, STATUS, iotlb_global, wait_status};

/// 512 entries.
const SIZE: u8 = 8;
const COMPATIBILITY: Msi = Msi { address: 0xfee0_1000, data: 0x31 };

/// Hears of changes, and does what the one who makes the routes does: asks the unit again.
struct Routes {
    unit: Weak<Unit<Memory>>,
    memory: Memory,
    message: Msi,
    heard: Mutex<Vec<Heard>>,
}

/// What was said; what became of the message; the wait status at that moment.
type Heard = (EntriesChanged, Result<vtd::Remapped, RemapError>, u32);

impl Routes {
    fn changes(&self) -> Vec<EntriesChanged> {
        std::mem::take(&mut *self.heard.lock().unwrap()).into_iter().map(|(changed, ..)| changed).collect()
    }
}

impl RemapListener for Routes {
    fn entries_changed(&self, changed: EntriesChanged) {
        let unit = self.unit.upgrade().unwrap();
        // From another thread: no lock that the drain holds is in the way.
        let remapped = std::thread::scope(|scope| scope.spawn(|| unit.remap(NVME, self.message)).join().unwrap());
        let status: u32 = self.memory.read_obj(GuestAddress(STATUS)).unwrap();
        self.heard.lock().unwrap().push((changed, remapped, status));
    }
}

fn config() -> UnitConfig {
    UnitConfig { interrupt_remapping: true, extended_interrupt_mode: true, ..UnitConfig::new(UnitId(0), 48) }
}

struct Remapped {
    rig: Rig,
    routes: Arc<Routes>,
    table: u64,
}

impl Remapped {
    /// A unit with the queue on and remapping off.
    fn off() -> Self {
        let mut rig = Rig::with(config());
        rig.enable_queue();
        let (unit, memory) = (Arc::downgrade(&rig.unit), rig.memory.clone());
        let routes = Arc::new(Routes { unit, memory, message: message(5), heard: Mutex::default() });
        rig.unit.set_remap_listener(routes.clone());
        let table = rig.table();
        assert_eq!(rig.table(), table + 4096, "512 entries have two pages");
        Self { rig, routes, table }
    }

    /// The way of Linux: SIRTP, then IRE, with 32-bit destinations.
    fn on() -> Self {
        let on = Self::off();
        on.set_table(on.table, true);
        on.rig.command(|on| on.with_interrupt_remapping(true));
        on.routes.changes();
        on
    }

    fn set_table(&self, table: u64, extended_mode: bool) {
        let address = InterruptTableAddress::new().with_page(table >> 12).with_size(SIZE);
        self.rig.write64(offset::IRTA, address.with_extended_mode(extended_mode).into_bits());
        self.rig.command(|on| on.with_interrupt_table_pointer(true));
    }

    fn entry(&self, index: u64, low: IrteLow, high: IrteHigh) {
        self.rig.store(self.table + index * 16 + 8, high.into_bits());
        self.rig.store(self.table + index * 16, low.into_bits());
    }

    fn remap(&self, msi: Msi) -> Result<Msi, u8> {
        match self.rig.unit.remap(NVME, msi) {
            Ok(vtd::Remapped::Message(msi)) => Ok(msi),
            Err(RemapError::Fault(fault)) => Err(fault.reason.code()),
            other => panic!("{other:?}"),
        }
    }

    fn queue_error(&self) -> Option<u8> {
        FaultStatus::from_bits(self.rig.read32(offset::FSTS))
            .queue_error()
            .then(|| QueueErrorRecord::from_bits(self.rig.read64(offset::IQERCD)).queue_error())
    }
}

fn message(handle: u16) -> Msi {
    Msi { address: RemappableAddress::new().with_handle(handle).into_bits().into(), data: 0 }
}

fn to(vector: u8, destination: u32) -> IrteLow {
    IrteLow::new().with_present(true).with_vector(vector).with_destination(destination)
}

fn from(requester: Requester) -> IrteHigh {
    IrteHigh::new().with_validation(1).with_source(requester.sid.0)
}

fn entries_all() -> (u64, u64) {
    (InterruptEntryLow::new().with_kind(kind::INTERRUPT_ENTRY).into_bits(), 0)
}

fn entries(index: u16, mask: u8) -> (u64, u64) {
    let low = InterruptEntryLow::new().with_kind(kind::INTERRUPT_ENTRY).with_selective(true);
    (low.with_index(index).with_index_mask(mask).into_bits(), 0)
}

fn range(first: u16, count: u32) -> EntriesChanged {
    EntriesChanged::Range { first, count }
}

/// GSTS: IRTPS, IRES, CFIS.
fn status(rig: &Rig) -> (bool, bool, bool) {
    let status = rig.status();
    (status.interrupt_table_pointer(), status.interrupt_remapping(), status.compatibility_format())
}

#[test]
fn a5_irta_has_what_is_offered() {
    let cases = [(false, false, 0u64), (true, false, !0xff0), (true, true, !0x7f0)];
    for (interrupt_remapping, extended_interrupt_mode, writable) in cases {
        let config = UnitConfig { interrupt_remapping, extended_interrupt_mode, ..UnitConfig::new(UnitId(0), 48) };
        let rig = Rig::with(config);
        rig.write64(offset::IRTA, u64::MAX);
        assert_eq!(rig.read64(offset::IRTA), writable);
        rig.write32(offset::IRTA + 4, 0);
        assert_eq!(rig.read64(offset::IRTA), writable & 0xffff_ffff);
        rig.write32(offset::IRTA, 0);
        assert_eq!(rig.read64(offset::IRTA), 0);
    }
}

#[test]
fn a5_commands_of_interrupt_remapping_show_in_the_status() {
    let unit = Remapped::off();
    assert_eq!(status(&unit.rig), (false, false, false));
    unit.rig.command(|on| on.with_compatibility_format(true));
    assert_eq!(status(&unit.rig), (false, false, true));
    unit.set_table(unit.table, false);
    assert_eq!(status(&unit.rig), (true, false, true));
    unit.rig.command(|on| on.with_interrupt_remapping(true));
    assert_eq!(status(&unit.rig), (true, true, true));
    // As Linux blocks compatibility format once remapping is on.
    unit.rig.command(|on| on.with_compatibility_format(false));
    assert_eq!(status(&unit.rig), (true, true, false));
    assert!(unit.rig.status().queued_invalidation());
    unit.rig.command(|on| on.with_interrupt_remapping(false));
    assert_eq!(status(&unit.rig), (true, false, false));
}

#[test]
fn a5_the_table_counts_from_sirtp_on_also_while_remapping_is_on() {
    let mut unit = Remapped::on();
    unit.entry(5, to(0x41, 2), from(NVME));
    assert_eq!(unit.remap(message(5)), Ok(Msi { address: 0xfee0_2000, data: 0x41 }));
    let other = unit.rig.table();
    unit.rig.store(other + 5 * 16, to(0x52, 3).into_bits());
    unit.rig.store(other + 5 * 16 + 8, from(NVME).into_bits());
    let address = InterruptTableAddress::new().with_page(other >> 12).with_size(1).with_extended_mode(true);
    unit.rig.write64(offset::IRTA, address.into_bits());
    assert_eq!(unit.remap(message(5)), Ok(Msi { address: 0xfee0_2000, data: 0x41 }));
    unit.rig.command(|on| on.with_interrupt_table_pointer(true));
    assert_eq!(status(&unit.rig), (true, true, false));
    // Four entries.
    assert_eq!(unit.remap(message(5)), Err(0x21));
    unit.set_table(other, true);
    assert_eq!(unit.remap(message(5)), Ok(Msi { address: 0xfee0_3000, data: 0x52 }));
    assert_eq!(unit.routes.changes(), [EntriesChanged::All; 2]);
    // kdump: the same table again.
    unit.set_table(other, true);
    assert_eq!(unit.routes.changes(), [EntriesChanged::All]);
    assert_eq!(unit.remap(message(5)), Ok(Msi { address: 0xfee0_3000, data: 0x52 }));
}

#[test]
fn a9_compatibility_format_follows_cfis_and_eime() {
    let unit = Remapped::off();
    assert_eq!(unit.remap(COMPATIBILITY), Ok(COMPATIBILITY));
    unit.set_table(unit.table, false);
    unit.rig.command(|on| on.with_interrupt_remapping(true));
    assert_eq!(unit.remap(COMPATIBILITY), Err(0x25));
    unit.rig.command(|on| on.with_compatibility_format(true));
    assert_eq!(unit.remap(COMPATIBILITY), Ok(COMPATIBILITY));
    unit.set_table(unit.table, true);
    assert_eq!(unit.remap(COMPATIBILITY), Err(0x25));
    unit.rig.command(|on| on.with_interrupt_remapping(false));
    assert_eq!(unit.remap(COMPATIBILITY), Ok(COMPATIBILITY));
}

#[test]
fn a9_who_makes_routes_hears_of_every_command_once() {
    let unit = Remapped::off();
    unit.rig.enable_translation();
    assert_eq!(unit.routes.changes(), []);
    unit.set_table(unit.table, true);
    assert_eq!(unit.routes.changes(), [EntriesChanged::All]);
    unit.rig.command(|on| on.with_interrupt_remapping(true));
    assert_eq!(unit.routes.changes(), [EntriesChanged::All]);
    unit.rig.command(|on| on);
    unit.rig.set_root();
    assert_eq!(unit.routes.changes(), []);
    unit.rig.command(|on| on.with_compatibility_format(true));
    assert_eq!(unit.routes.changes(), [EntriesChanged::All]);
    unit.rig.command(|on| on.with_interrupt_remapping(false).with_interrupt_table_pointer(true));
    assert_eq!(unit.routes.changes(), [EntriesChanged::All]);
}

#[test]
fn a9_an_invalidation_is_heard_at_its_granularity_before_the_wait_status() {
    let mut unit = Remapped::on();
    let cases = [
        (entries_all(), EntriesChanged::All),
        (entries(5, 0), range(5, 1)),
        (entries(5, 2), range(4, 4)),
        (entries(0xffff, 15), range(0x8000, 0x8000)),
    ];
    for (vector, (descriptor, expected)) in (0x41..).zip(cases) {
        unit.entry(5, to(vector, 2), from(NVME));
        assert!(unit.rig.submit(&[descriptor]));
        let heard = std::mem::take(&mut *unit.routes.heard.lock().unwrap());
        // The listener already finds the new entry, and the guest is told of nothing yet.
        let delivered = Ok(Msi { address: 0xfee0_2000, data: u32::from(vector) });
        assert_eq!(heard, [(expected, delivered.map(vtd::Remapped::Message), 0)], "{descriptor:x?}");
    }
    assert_eq!(unit.rig.unit.stats().descriptors.interrupt_entry, 4);
}

#[test]
fn a9_routes_are_replaced_once_a_wait() {
    let mut unit = Remapped::on();
    assert!(unit.rig.submit(&[entries(8, 1), iotlb_global(), entries(2, 0), entries(3, 0)]));
    assert_eq!(unit.routes.changes(), [range(2, 8)]);
    assert!(unit.rig.submit(&[entries(8, 1), wait_status(77), entries(2, 0)]));
    assert_eq!(unit.routes.changes(), [range(8, 2), range(2, 1)]);
    assert!(unit.rig.submit(&[entries(8, 1), entries_all(), entries(2, 0)]));
    assert_eq!(unit.routes.changes(), [EntriesChanged::All]);
    // Also without a wait, and what comes before an error.
    unit.rig.push(&[entries(1, 0)]);
    unit.rig.ring();
    assert_eq!(unit.routes.changes(), [range(1, 1)]);
    unit.rig.push(&[entries(6, 0), (u64::MAX, u64::MAX)]);
    unit.rig.ring();
    assert_eq!(unit.routes.changes(), [range(6, 1)]);
    assert_eq!(unit.queue_error(), Some(QueueError::InvalidType as u8));
}

#[test]
fn rule5_a_full_queue_of_entry_invalidations_changes_the_routes_a_bounded_number_of_times() {
    let mut unit = Remapped::on();
    let invalidations: Vec<_> = (0..512).map(|index| entries(index, 0)).collect();
    for expected in [Err(0x22), Ok(Msi { address: 0xfee0_2000, data: 0x41 })] {
        unit.rig.full_queue(&invalidations);
        let changes = unit.routes.changes();
        assert!(changes.len() <= 100, "{} changes", changes.len());
        assert_eq!(changes.last(), Some(&EntriesChanged::All), "the rest is looked at together");
        assert_eq!(unit.remap(message(5)), expected);
        unit.entry(5, to(0x41, 2), from(NVME));
    }
    // In another drain a few are looked at one by one again.
    unit.rig.command(|on| on.with_queued_invalidation(false));
    unit.rig.enable_queue();
    assert!(unit.rig.submit(&[entries(5, 0)]));
    assert_eq!(unit.routes.changes(), [range(5, 1)]);
}

#[test]
fn a9_reserved_bits_of_an_invalidation_stop_the_queue() {
    let reserved_low = (5..9).chain(12..27).chain(48..64).map(|bit| (1u64 << bit, 0));
    let reserved_high = (0..64).map(|bit| (0, 1u64 << bit));
    for (low, high) in reserved_low.chain(reserved_high) {
        let mut unit = Remapped::on();
        unit.rig.push(&[(entries(5, 0).0 | low, high)]);
        unit.rig.ring();
        assert_eq!(unit.queue_error(), Some(QueueError::Reserved as u8), "{low:#x}, {high:#x}");
        assert_eq!(unit.routes.changes(), []);
    }
    for mask in 0..32 {
        let mut unit = Remapped::on();
        unit.rig.push(&[entries(5, mask)]);
        unit.rig.ring();
        let expected = (mask > vtd::config::MAX_HANDLE_MASK).then_some(QueueError::Reserved as u8);
        assert_eq!(unit.queue_error(), expected, "IM {mask}");
    }
}

#[test]
fn a9_nothing_of_it_exists_unless_it_is_offered() {
    let mut rig = Rig::new();
    rig.enable_queue();
    rig.command(|on| on.with_interrupt_remapping(true).with_interrupt_table_pointer(true));
    assert_eq!(rig.unit.remap(NVME, message(5)), Ok(message(5).into()));
    assert_eq!(rig.unit.remap(NVME, COMPATIBILITY), Ok(COMPATIBILITY.into()));
    rig.push(&[entries(5, 0)]);
    rig.ring();
    assert_eq!(QueueErrorRecord::from_bits(rig.read64(offset::IQERCD)).queue_error(), QueueError::InvalidType as u8);
}

#[test]
fn a8_an_interrupt_fault_is_recorded_when_it_fires_and_never_before() {
    let unit = Remapped::on();
    let rig = &unit.rig;
    rig.write32(offset::FEDATA, 0x4021);
    rig.write64(offset::FEADDR, 0x100_fee0_1000);
    rig.write32(offset::FECTL, 0);
    unit.entry(5, to(0x41, 2), from(NIC));
    let refused = rig.unit.remap(NVME, message(5));
    let fault = RemapFault { requester: NVME, index: 5, reason: InterruptFaultReason::SourceBlocked, silenced: false };
    assert_eq!(refused, Err(RemapError::Fault(fault)));
    assert_eq!((rig.fault_records(), rig.unit.stats().faults.len()), (vec![], 0));
    assert_eq!(rig.messages.take(), []);

    rig.unit.record_remap_fault(&fault);
    // FI has the index in bits 63:48.
    let record = (0, NVME.sid, 0x26, 5 << 48, false);
    assert_eq!(rig.fault_records(), [record]);
    // The unit's own message is in compatibility format, and is not remapped.
    let event = Msi { address: 0x100_fee0_1000, data: 0x4021 };
    assert_eq!(rig.messages.take(), [event]);

    // A second one of the same function collapses; another function has its own record.
    assert!(rig.unit.deliver(NVME, message(600)).is_err());
    assert!(rig.unit.deliver(NIC, message(511)).is_err());
    assert_eq!(rig.fault_records(), [record, (1, NIC.sid, 0x22, 511 << 48, false)]);
    assert_eq!(rig.messages.take(), [], "the guest has not served the first");
    let stats = rig.unit.stats();
    assert_eq!((stats.faults["0x26"], stats.faults["0x21"], stats.faults["0x22"]), (1, 1, 1));
    assert_eq!(stats.faults_dropped, 1);
}

#[test]
fn a8_each_interrupt_fault_has_its_reason_and_its_index() {
    let unit = Remapped::on();
    let rig = &unit.rig;
    unit.entry(6, to(0x41, 2).with_reserved(1), from(NVME));
    unit.entry(7, to(0x41, 2), from(NIC));
    let subhandle = Msi { address: message(5).address | 1 << 3, data: 0x1_0000 };
    let cases = [
        (subhandle, 0x20, 0),
        (message(512), 0x21, 512),
        (message(5), 0x22, 5),
        (message(6), 0x24, 6),
        (COMPATIBILITY, 0x25, 0),
        (message(7), 0x26, 7),
    ];
    for (number, (msi, reason, index)) in cases.into_iter().enumerate() {
        assert!(rig.unit.deliver(NVME, msi).is_err());
        assert_eq!(rig.fault_records(), [(number, NVME.sid, reason, index << 48, false)]);
        rig.write32(offset::FRCD + number as u64 * 16 + 12, 1 << 31);
    }
    assert_eq!(rig.fault_records(), []);
    // A write to memory is no interrupt, and no fault of remapping.
    let msi = Msi { address: 0x1000, data: 0 };
    assert_eq!(rig.unit.deliver(NVME, msi), Err(RemapError::NotAnInterrupt(0x1000)));
    assert_eq!(rig.fault_records(), []);
}

#[test]
fn a8_fpd_of_an_entry_silences_its_faults() {
    let unit = Remapped::on();
    unit.entry(5, IrteLow::new().with_fault_processing_disable(true), IrteHigh::new());
    assert!(unit.rig.unit.deliver(NVME, message(5)).is_err());
    assert_eq!(unit.rig.fault_records(), []);
    assert_eq!(unit.rig.unit.stats().faults["0x22"], 1);
    assert_eq!(FaultStatus::from_bits(unit.rig.read32(offset::FSTS)).into_bits(), 0);
    assert!(EventControl::from_bits(unit.rig.read32(offset::FECTL)).masked());
}

#[test]
fn a9_what_is_delivered_is_not_recorded() {
    let unit = Remapped::on();
    unit.entry(5, to(0x41, 0x1_0203), from(NVME));
    let delivered = Msi { address: 0x1_0200_fee0_3000, data: 0x41 };
    assert_eq!(unit.rig.unit.deliver(NVME, message(5)), Ok(Some(delivered)));
    assert_eq!(unit.rig.fault_records(), []);
}

#[test]
fn a9_without_a_listener_the_queue_goes_on() {
    let mut rig = Rig::with(config());
    rig.enable_queue();
    assert!(rig.submit(&[entries_all(), entries(1, 0)]));
}

#[test]
fn a11_reset_turns_remapping_off() {
    let unit = Remapped::on();
    unit.rig.unit.reset();
    assert_eq!(unit.routes.changes(), [EntriesChanged::All]);
    assert_eq!(unit.remap(COMPATIBILITY), Ok(COMPATIBILITY));
    assert_eq!((status(&unit.rig), unit.rig.read64(offset::IRTA)), ((false, false, false), 0));
    assert_eq!(unit.rig.unit.save(), Rig::with(config()).unit.save());
}

#[test]
fn a11_a_copied_table_set_under_remapping_remaps_on_as_the_old_one() {
    let mut unit = Remapped::on();
    unit.entry(5, to(0x41, 2), from(NVME));
    let old = unit.remap(message(5));
    assert!(old.is_ok());
    // kdump: the new kernel copies the table, and gives the copy while remapping is on.
    let copy = unit.rig.table();
    assert_eq!(unit.rig.table(), copy + 4096);
    for word in (0..8192).step_by(8) {
        unit.rig.store(copy + word, unit.rig.load(unit.table + word));
    }
    unit.set_table(copy, true);
    // Whoever looked while the routes were made anew saw the same.
    let heard: Vec<_> = unit.routes.heard.lock().unwrap().drain(..).map(|(what, seen, _)| (what, seen.ok())).collect();
    assert_eq!(heard, [(EntriesChanged::All, old.ok().map(vtd::Remapped::Message))]);
    assert_eq!((unit.remap(message(5)), status(&unit.rig)), (old, (true, true, false)));
    // The old table means nothing any more.
    unit.entry(5, IrteLow::new(), IrteHigh::new());
    assert!(unit.rig.submit(&[entries(5, 0)]));
    assert!(unit.remap(message(5)).is_ok());
}

#[test]
fn a14_a_restored_unit_remaps_as_the_saved_one() {
    let unit = Remapped::on();
    unit.rig.command(|on| on.with_compatibility_format(true));
    unit.entry(5, to(0x41, 2), from(NVME));
    // Written, but not yet in use.
    unit.rig.write64(offset::IRTA, 0x7003);
    let mut other = Remapped::off();
    let pages: Vec<u64> = (0..1024).map(|word| unit.rig.load(unit.table + word * 8)).collect();
    pages.iter().zip(0u64..).for_each(|(word, at)| other.rig.store(unit.table + at * 8, *word));
    other.rig.unit.restore(unit.rig.unit.save()).unwrap();
    assert_eq!(other.routes.changes(), [EntriesChanged::All]);
    assert_eq!(other.rig.unit.save(), unit.rig.unit.save());
    assert_eq!((status(&other.rig), other.rig.read64(offset::IRTA)), ((true, true, true), 0x7003));
    assert_eq!(other.remap(message(5)), Ok(Msi { address: 0xfee0_2000, data: 0x41 }));
    assert_eq!(other.remap(COMPATIBILITY), Err(0x25), "EIME");
    // The queue goes on where it stood.
    other.rig.write64(offset::IQA, QUEUE);
    assert!(other.rig.submit(&[entries(5, 0)]));
    assert_eq!(other.routes.changes(), [range(5, 1)]);
}

#[test]
fn a9_a_unit_that_remaps_interrupts_only_translates_nothing_whatever_it_is_told() {
    let mut rig = Rig::with(UnitConfig { dma_translation: false, ..config() });
    rig.unit.add_requester(NVME).unwrap();
    rig.enable_queue();
    // A root table of which no entry is present: with translation on nothing would be reached.
    rig.write64(offset::RTADDR, rig.root_table);
    let queue = Global::new().with_queued_invalidation(true);
    for command in [queue.with_root_table_pointer(true), queue.with_translation(true)] {
        rig.write32(offset::GCMD, command.into_bits());
        assert_eq!(rig.status(), queue.with_root_table_pointer(true));
    }
    assert!(rig.submit(&[iotlb_global()]));
    assert_eq!(rig.unit.endpoint(NIC).enter().translate(vtd::Iova(0x5000), vtd::Access::Write), Ok(vtd::Gpa(0x5000)));
    assert_eq!(rig.listener.attached(NVME), Some(vtd::SpaceKey::Identity));
    // A state in which it translated is none of such a unit.
    let saved = rig.unit.save();
    let status = saved.global_status.with_translation(true);
    let refused = rig.unit.restore(vtd::State { global_status: status, ..saved.clone() });
    let value = status.into_bits().into();
    assert_eq!(refused, Err(vtd::RestoreError::Register { register: "GSTS", value }));
    assert_eq!(rig.unit.restore(saved.clone()), Ok(()));
    // Interrupts it remaps: here to nothing, since no entry is present.
    rig.write64(offset::IRTA, rig.root_table);
    rig.command(|on| on.with_interrupt_table_pointer(true));
    rig.command(|on| on.with_interrupt_remapping(true));
    assert_eq!(rig.unit.remap(NVME, COMPATIBILITY).map_err(|_| ()), Err(()));
}
