//! Posted interrupts as a guest programs them. How a descriptor is changed is tested beside `tables/posted.rs`,
//! what an entry says beside `tables/interrupt.rs`.

use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vtd::spec::fault::InterruptFaultReason;
use vtd::spec::irte::{Irte, IrteHigh, IrteLow, PostedControl, PostedIrteHigh, PostedIrteLow, RemappableAddress};
use vtd::spec::registers::{InterruptTableAddress, offset};
use vtd::{DirtyLog, Gpa, Msi, Posting, RemapError, RemapFault, Remapped, UnitConfig, UnitId};

use crate::rig::{NVME, Rig};

const NOTIFICATION: Msi = Msi { address: 0xfee0_9000, data: 0xf2 };

fn config() -> UnitConfig {
    let config =
        UnitConfig { interrupt_remapping: true, extended_interrupt_mode: true, ..UnitConfig::new(UnitId(0), 48) };
    UnitConfig { posted_interrupts: true, ..config }
}

/// A unit that remaps, with 256 entries and destinations of 32 bits, and a descriptor for processor 9.
struct Posted {
    rig: Rig,
    table: u64,
    descriptor: u64,
}

impl Posted {
    fn new() -> Self {
        Self::of(config())
    }

    fn of(config: UnitConfig) -> Self {
        let mut rig = Rig::with(config);
        rig.enable_queue();
        let (table, descriptor) = (rig.table(), rig.table() + 64);
        let address = InterruptTableAddress::new().with_page(table >> 12).with_size(7).with_extended_mode(true);
        rig.write64(offset::IRTA, address.into_bits());
        rig.command(|on| on.with_interrupt_table_pointer(true));
        rig.command(|on| on.with_interrupt_remapping(true));
        let posted = Self { rig, table, descriptor };
        posted.set_control(control());
        posted
    }

    fn set_control(&self, control: PostedControl) {
        self.rig.store(self.descriptor + 32, control.into_bits());
    }

    fn control(&self) -> PostedControl {
        PostedControl::from_bits(self.rig.load(self.descriptor + 32))
    }

    /// The vectors in PIR, taken out.
    fn take(&self) -> Vec<u64> {
        let words = (0..4u64).map(|word| (word, self.rig.load(self.descriptor + word * 8)));
        let vectors = words
            .flat_map(|(word, bits)| (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word * 64 + bit));
        let vectors = vectors.collect();
        (0..4u64).for_each(|word| self.rig.store(self.descriptor + word * 8, 0));
        vectors
    }

    fn set(&self, index: u64, entry: Irte) {
        self.rig.store(self.table + index * 16 + 8, entry.high.into_bits());
        self.rig.store(self.table + index * 16, entry.low.into_bits());
    }

    fn deliver(&self, handle: u16) -> Result<Option<Msi>, u8> {
        self.rig.unit.deliver(NVME, message(handle)).map_err(|error| match error {
            RemapError::Fault(fault) => fault.reason.code(),
            RemapError::NotAnInterrupt(_) | RemapError::NoUnit(_) => panic!("{error}"),
        })
    }
}

fn control() -> PostedControl {
    PostedControl::new().with_vector(0xf2).with_destination(9)
}

fn message(handle: u16) -> Msi {
    Msi { address: RemappableAddress::new().with_handle(handle).into_bits().into(), data: 0 }
}

/// A present entry that posts `vector`.
fn entry(descriptor: u64, vector: u8) -> Irte {
    let low = PostedIrteLow::new().with_present(true).with_posted(true).with_vector(vector);
    let low = low.with_descriptor_low((descriptor >> 6) as u32 & 0x3ff_ffff);
    let high = PostedIrteHigh::new().with_descriptor_high((descriptor >> 32) as u32);
    Irte { low: IrteLow::from_bits(low.into_bits()), high: IrteHigh::from_bits(high.into_bits()) }
}

#[test]
fn a17_messages_are_posted_when_they_fire_and_not_when_they_are_looked_up() {
    let posted = Posted::new();
    posted.set(5, entry(posted.descriptor, 0x45));
    posted.set(6, entry(posted.descriptor, 0xc1));
    for _ in 0..3 {
        assert!(matches!(posted.rig.unit.remap(NVME, message(5)), Ok(Remapped::Posted(_))));
    }
    assert_eq!((posted.take(), posted.control()), (vec![], control()));
    assert_eq!(posted.deliver(5), Ok(Some(NOTIFICATION)));
    assert_eq!(posted.deliver(6), Ok(None));
    assert_eq!(posted.deliver(5), Ok(None));
    assert_eq!((posted.take(), posted.control()), (vec![0x45, 0xc1], control().with_outstanding(true)));
    posted.set_control(control());
    assert_eq!(posted.deliver(6), Ok(Some(NOTIFICATION)));
    let stats = posted.rig.unit.stats();
    assert_eq!((stats.interrupts_posted, stats.notifications), (4, 2));
    assert!(stats.faults.is_empty() && posted.rig.messages.take().is_empty());
}

#[test]
fn a17_a_unit_that_does_not_offer_it_posts_nothing() {
    let posted = Posted::of(UnitConfig { posted_interrupts: false, ..config() });
    assert!(!posted.rig.unit.config().capability().posted_interrupts());
    posted.set(5, entry(posted.descriptor, 0x45));
    assert_eq!((posted.deliver(5), posted.take()), (Err(0x24), vec![]));
}

#[test]
fn a17_what_was_looked_up_is_posted_as_the_entry_said_then() {
    let posted = Posted::new();
    posted.set(5, entry(posted.descriptor, 0x45));
    let Ok(Remapped::Posted(posting)) = posted.rig.unit.remap(NVME, message(5)) else { panic!("it is not posted") };
    posted.set(5, Irte::default());
    assert_eq!(posted.rig.unit.post(&posting), Ok(Some(NOTIFICATION)));
    assert_eq!(posted.take(), [0x45]);
    assert_eq!(posted.deliver(5), Err(0x22));
}

#[test]
fn a17_a_fault_of_a_descriptor_is_recorded_with_the_index_when_it_fires() {
    let posted = Posted::new();
    let beyond = 1 << 40;
    posted.set(5, entry(beyond, 0x45));
    let Ok(Remapped::Posted(posting)) = posted.rig.unit.remap(NVME, message(5)) else { panic!("it is not posted") };
    assert_eq!(posted.rig.fault_records(), []);
    let fault =
        RemapFault { requester: NVME, index: 5, reason: InterruptFaultReason::DescriptorAccess, silenced: false };
    assert_eq!(posted.rig.unit.post(&posting), Err(fault));
    assert_eq!(posted.rig.fault_records(), [(0, NVME.sid, 0x27, 5 << 48, false)]);
    posted.set_control(control().with_reserved(1));
    posted.set(5, entry(posted.descriptor, 0x45));
    assert_eq!(posted.deliver(5), Err(0x28));
    assert_eq!((posted.take(), posted.control()), (vec![], control().with_reserved(1)));
    // FPD silences both.
    for descriptor in [beyond, posted.descriptor] {
        let entry = entry(descriptor, 0x45);
        posted.set(5, Irte { low: entry.low.with_fault_processing_disable(true), ..entry });
        assert!(posted.deliver(5).is_err());
    }
    let stats = posted.rig.unit.stats();
    assert_eq!((stats.faults["0x27"], stats.faults["0x28"], stats.faults_dropped), (2, 2, 1));
    assert_eq!((stats.interrupts_posted, stats.notifications), (0, 0));
}

#[test]
fn a17_a_function_without_an_id_leaves_no_record_of_a_descriptor() {
    let posted = Posted::new();
    posted.rig.unit.renumber(&[(NVME, None)]);
    posted.set(5, entry(1 << 40, 0x45));
    assert_eq!(posted.deliver(5), Err(0x27));
    assert_eq!(posted.rig.fault_records(), []);
}

#[test]
fn a17_posting_goes_on_after_a_reset_and_in_a_restored_unit() {
    let posted = Posted::new();
    posted.set(5, entry(posted.descriptor, 0x45));
    let saved = posted.rig.unit.save();
    posted.rig.unit.reset();
    // Interrupts pass until remapping is on again.
    assert_eq!(posted.deliver(5), Ok(Some(message(5))));
    posted.rig.unit.restore(saved).unwrap();
    assert_eq!((posted.deliver(5), posted.take()), (Ok(Some(NOTIFICATION)), vec![0x45]));
    posted.rig.unit.reset();
    let address = InterruptTableAddress::new().with_page(posted.table >> 12).with_size(7).with_extended_mode(true);
    posted.rig.write64(offset::IRTA, address.into_bits());
    posted.rig.command(|on| on.with_interrupt_table_pointer(true));
    posted.rig.command(|on| on.with_interrupt_remapping(true));
    assert_eq!((posted.deliver(5), posted.take()), (Ok(None), vec![0x45]));
}

#[test]
fn a17_what_is_posted_is_in_the_log_of_dirty_memory() {
    let posted = Posted::new();
    posted.set(5, entry(posted.descriptor, 0x45));
    posted.rig.memory.iter().for_each(|region| region.bitmap().log().start());
    let page = posted.descriptor >> 12;
    // A bit and ON; then a bit, as ON is set.
    for notified in [true, false] {
        assert_eq!(posted.deliver(5).map(|sent| sent.is_some()), Ok(notified));
        for region in posted.rig.memory.iter() {
            let slice: BS<'_, DirtyLog> = region.bitmap();
            let taken: Vec<u64> = slice.log().take().collect();
            assert_eq!(taken[page as usize / 64], 1 << (page % 64));
        }
    }
}

#[test]
fn a17_two_threads_post_into_one_descriptor_and_every_vector_is_there() {
    let posted = Arc::new(Posted::new());
    let posting = |vector: u8| Posting {
        requester: NVME,
        index: 5,
        silenced: false,
        descriptor: Gpa(posted.descriptor),
        vector,
        urgent: false,
        extended_mode: true,
    };
    let notified: usize = std::thread::scope(|scope| {
        let posters: Vec<_> = [0, 1]
            .map(|odd| {
                let postings: Vec<_> = (0..=127).map(|half| posting(2 * half + odd)).collect();
                let unit = &posted.rig.unit;
                scope.spawn(move || postings.iter().filter(|posting| unit.post(posting).unwrap().is_some()).count())
            })
            .into_iter()
            .collect();
        posters.into_iter().map(|poster| poster.join().unwrap()).sum()
    });
    assert_eq!((notified, posted.take()), (1, (0..=255).collect()));
}
