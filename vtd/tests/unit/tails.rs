//! Tails that ring a bell instead of being written.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vtd::spec::registers::offset;
use vtd::{QueueShape, TailBells};

use crate::rig::{NVME, QUEUE, Rig, wait_interrupt};

/// Bells that the test rings.
#[derive(Default)]
struct Bells {
    hang: AtomicBool,
    rang: Mutex<BTreeSet<u64>>,
    queues: Mutex<Vec<Option<QueueShape>>>,
}

impl Bells {
    fn of(rig: &Rig) -> Arc<Self> {
        let bells = Arc::new(Self::default());
        rig.unit.set_tail_bells(bells.clone());
        bells
    }

    fn ring(&self, tail: u64) {
        self.rang.lock().unwrap().insert(tail);
    }
}

impl TailBells for Bells {
    fn queue_changed(&self, queue: Option<QueueShape>) {
        self.hang.store(queue.is_some(), Ordering::Relaxed);
        self.rang.lock().unwrap().clear();
        self.queues.lock().unwrap().push(queue);
    }
    fn hang(&self) -> bool {
        self.hang.load(Ordering::Relaxed)
    }
    fn take(&self, tail: &mut dyn FnMut(u64)) {
        std::mem::take(&mut *self.rang.lock().unwrap()).into_iter().for_each(tail);
    }
}

fn rig() -> (Rig, Arc<Bells>) {
    let mut rig = Rig::new();
    let bells = Bells::of(&rig);
    rig.enable_queue();
    (rig, bells)
}

/// Head and tail, in descriptors.
fn place(rig: &Rig) -> (u64, u64) {
    (rig.read64(offset::IQH) / 16, rig.read64(offset::IQT) / 16)
}

#[test]
fn a6_a_tail_that_rang_is_served_and_read_as_if_it_were_written() {
    let (mut rig, bells) = rig();
    rig.push(&[wait_interrupt(), wait_interrupt()]);
    bells.ring(32);
    assert_eq!(place(&rig), (0, 0));
    rig.unit.serve_tails();
    assert_eq!(place(&rig), (2, 2));
    let stats = rig.unit.stats();
    assert_eq!((stats.descriptors.wait, stats.tails_taken, stats.tail_writes), (2, 1, 1));
}

#[test]
fn a6_of_several_tails_the_one_furthest_from_the_head_counts() {
    let (mut rig, bells) = rig();
    rig.push(&[wait_interrupt(); 250]);
    bells.ring(250 * 16);
    rig.unit.serve_tails();
    // Around the end: 3 is further than 254. It is neither the first nor the last that the bells say.
    rig.push(&[wait_interrupt(); 9]);
    [254, 3, 1].into_iter().for_each(|place| bells.ring(16 * place));
    rig.unit.serve_tails();
    assert_eq!(place(&rig), (3, 3));
    assert_eq!(rig.unit.stats().descriptors.wait, 259);
    // The same tail again says nothing new.
    bells.ring(16 * 3);
    rig.unit.serve_tails();
    assert_eq!((place(&rig), rig.unit.stats().descriptors.wait), ((3, 3), 259));
}

#[test]
fn a6_whatever_comes_to_the_unit_comes_after_the_tails_that_rang() {
    type Act = (&'static str, fn(&Rig));
    let acts: [Act; 7] = [
        ("a command", |rig| rig.write64(offset::RTADDR, 0x5000)),
        ("a tail that is written", |rig| rig.write64(offset::IQT, 16)),
        ("the mask of an event", |rig| rig.write32(offset::IECTL, 1 << 31)),
        ("fault status", |rig| rig.write32(offset::FSTS, 0)),
        ("an audit", |rig| drop(rig.unit.attachments())),
        ("a save", |rig| drop(rig.unit.save())),
        ("a function", |rig| rig.unit.remove_requester(NVME)),
    ];
    for (what, act) in acts {
        let (mut rig, bells) = rig();
        rig.push(&[wait_interrupt()]);
        bells.ring(16);
        act(&rig);
        assert_eq!(rig.unit.stats().tails_taken, 1, "{what}");
        assert_eq!(place(&rig), (1, 1), "{what}");
    }
}

#[test]
fn a6_bells_hear_of_the_queue_and_forget_what_belongs_to_the_one_before() {
    let (mut rig, bells) = rig();
    let shape = QueueShape { descriptors: 256, descriptor: 16 };
    let queues = || std::mem::take(&mut *bells.queues.lock().unwrap());
    assert_eq!(queues(), [None, Some(shape)]);
    rig.push(&[wait_interrupt()]);
    bells.ring(16);
    let saved = rig.unit.save();
    // What rang is in what was saved, not in the bells.
    assert_eq!((saved.queue_head, saved.queue_tail), (16, 16));
    rig.unit.reset();
    assert_eq!(queues(), [None]);
    bells.ring(48);
    rig.unit.serve_tails();
    assert_eq!(place(&rig), (0, 0), "no bell hangs");
    rig.unit.restore(saved).unwrap();
    assert_eq!((queues(), place(&rig)), (vec![None, Some(shape)], (1, 1)));
    let off = rig.read32(offset::GSTS) & !(1 << 26);
    rig.write32(offset::GCMD, off);
    assert_eq!(queues(), [None, None]);
}

#[test]
fn a6_a_queue_that_stopped_goes_on_with_the_tails_that_rang_meanwhile() {
    let (mut rig, bells) = rig();
    rig.push(&[wait_interrupt(), (0xff, 0), wait_interrupt()]);
    bells.ring(32);
    rig.unit.serve_tails();
    assert_eq!((place(&rig), rig.unit.stats().queue_errors), ((1, 2), 1));
    bells.ring(48);
    rig.unit.serve_tails();
    assert_eq!(place(&rig), (1, 3));
    let (low, high) = wait_interrupt();
    rig.store(QUEUE + 16, low);
    rig.store(QUEUE + 24, high);
    rig.write32(offset::FSTS, 1 << 4);
    assert_eq!((place(&rig), rig.unit.stats().descriptors.wait), ((3, 3), 3));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is written or rung, in whatever order bells are taken, each descriptor of a guest that moves its tail
    /// forward is processed once, and no bell takes the unit out of its queue.
    #[test]
    fn a6_each_descriptor_is_processed_once_however_its_tail_comes(
        steps in prop::collection::vec((1usize..40, any::<bool>(), any::<bool>()), 1..80)
    ) {
        let (mut rig, bells) = rig();
        let (mut pushed, mut waiting) = (0u64, 0u64);
        for (count, rings, serves) in steps {
            // A guest keeps room for what is not processed.
            if waiting + count as u64 >= 255 {
                rig.unit.serve_tails();
                waiting = 0;
            }
            rig.push(&vec![wait_interrupt(); count]);
            pushed += count as u64;
            waiting += count as u64;
            let tail = pushed % 256 * 16;
            if rings { bells.ring(tail) } else { rig.write64(offset::IQT, tail) }
            if serves { rig.unit.serve_tails() }
            if serves || !rings { waiting = 0 }
        }
        rig.unit.serve_tails();
        prop_assert_eq!(rig.unit.stats().descriptors.wait, pushed);
        prop_assert_eq!(place(&rig), (pushed % 256, pushed % 256));
    }

    /// A hostile guest rings anything: the unit stays in the queue, and a look costs no more than the queue has.
    #[test]
    fn a6_bells_of_a_hostile_guest_are_bounded(tails in prop::collection::vec(any::<u64>(), 1..300)) {
        let (mut rig, bells) = rig();
        rig.push(&vec![wait_interrupt(); 256]);
        for tail in tails {
            bells.ring(tail);
            let before = rig.unit.stats().descriptors.wait;
            rig.unit.serve_tails();
            prop_assert!(rig.unit.stats().descriptors.wait - before <= 256);
            prop_assert!(rig.read64(offset::IQH) < 4096 && rig.read64(offset::IQT) < 4096);
        }
    }
}
