//! Posting beside a reader that takes interrupts out, in every order of their steps.

use std::cell::{Cell, RefCell};

use super::posted::{CONTROL, DescriptorWords, WORDS, post};
use crate::spec::fault::InterruptFaultReason;
use crate::spec::irte::PostedControl;

const VECTOR: u8 = 0x45;
const URGENT: bool = true;
const NOT_URGENT: bool = false;

/// A descriptor for processor 9, in the place where EIME has it, and vector 0xf2.
fn control() -> PostedControl {
    PostedControl::new().with_vector(0xf2).with_destination(9)
}

type Words = [u64; WORDS];

fn with(control: PostedControl) -> Words {
    let mut words = [0; WORDS];
    words[CONTROL] = control.into_bits();
    words
}

fn bit(vector: u8) -> (usize, u64) {
    (usize::from(vector / 64), 1 << (vector % 64))
}

/// A descriptor of which somebody else does something before each access to it.
struct Shared<F> {
    words: RefCell<Words>,
    before_access: F,
    accesses: Cell<usize>,
}

impl<F: Fn(usize, &mut Words)> Shared<F> {
    fn new(words: Words, before_access: F) -> Self {
        Self { words: RefCell::new(words), before_access, accesses: Cell::new(0) }
    }

    fn access<T>(&self, then: impl FnOnce(&mut Words) -> T) -> Option<T> {
        let mut words = self.words.borrow_mut();
        (self.before_access)(self.accesses.replace(self.accesses.get() + 1), &mut words);
        Some(then(&mut words))
    }
}

impl<F: Fn(usize, &mut Words)> DescriptorWords for Shared<F> {
    fn get(&self, index: usize) -> Option<u64> {
        self.access(|words| words[index])
    }
    fn set_bits(&self, index: usize, bits: u64) -> Option<()> {
        self.access(|words| words[index] |= bits)
    }
    fn exchange(&self, index: usize, old: u64, new: u64) -> Option<bool> {
        self.access(|words| {
            let same = words[index] == old;
            if same {
                words[index] = new;
            }
            same
        })
    }
}

/// Posts [`VECTOR`] into `words`, that nobody else looks at.
fn posted(words: Words, urgent: bool) -> (Result<Option<PostedControl>, u8>, Words) {
    let alone = Shared::new(words, |_, _| ());
    let result = post(&alone, VECTOR, urgent, true).map_err(InterruptFaultReason::code);
    (result, alone.words.into_inner())
}

#[test]
fn a17_the_first_interrupt_notifies_and_the_next_ones_add_a_bit() {
    let mut expected = with(control().with_outstanding(true));
    expected[1] = 1 << 5;
    assert_eq!(posted(with(control()), NOT_URGENT), (Ok(Some(control())), expected));
    for urgent in [NOT_URGENT, URGENT] {
        assert_eq!(posted(expected, urgent), (Ok(None), expected), "the same again");
        let mut before = with(control().with_outstanding(true));
        before[3] = 1 << 63;
        assert_eq!(posted(before, urgent).1[3], 1 << 63, "the bits of others stay");
    }
}

#[test]
fn a17_every_vector_has_its_bit() {
    for vector in 0..=255 {
        let alone = Shared::new(with(control()), |_, _| ());
        post(&alone, vector, NOT_URGENT, true).unwrap();
        let words = alone.words.into_inner();
        let mut expected = with(control().with_outstanding(true));
        expected[bit(vector).0] = bit(vector).1;
        assert_eq!(words, expected, "vector {vector}");
    }
}

#[test]
fn a17_what_is_suppressed_is_recorded_only_and_what_is_urgent_is_not_suppressed() {
    let suppressed = control().with_suppressed(true);
    let mut expected = with(suppressed);
    expected[1] = 1 << 5;
    assert_eq!(posted(with(suppressed), NOT_URGENT), (Ok(None), expected));
    expected[CONTROL] = suppressed.with_outstanding(true).into_bits();
    assert_eq!(posted(with(suppressed), URGENT), (Ok(Some(suppressed)), expected));
    assert_eq!(posted(expected, URGENT), (Ok(None), expected));
}

#[test]
fn a17_a_descriptor_with_a_reserved_bit_is_not_written() {
    let reserved = (2..16).chain(24..32).map(|bit| with(PostedControl::from_bits(control().into_bits() | 1 << bit)));
    let behind = (5..WORDS).flat_map(|index| [0, 63].map(|bit| (index, bit))).map(|(index, bit)| {
        let mut words = with(control());
        words[index] = 1 << bit;
        words
    });
    for words in reserved.chain(behind) {
        assert_eq!(posted(words, URGENT), (Err(0x28), words));
    }
    // Without EIME the destination has 8 bits.
    for (destination, expected) in
        [(0x900, None), (0, None), (0xff00, None), (0x901, Some(0x28)), (0x1_0900, Some(0x28))]
    {
        let alone = Shared::new(with(control().with_destination(destination)), |_, _| ());
        let result = post(&alone, VECTOR, NOT_URGENT, false);
        assert_eq!(result.map_err(InterruptFaultReason::code).err(), expected, "{destination:#x}");
    }
}

/// Accesses of a posting that nobody disturbs: the control word and three others are checked, the bit is set, the
/// control word is looked at and exchanged.
const ACCESSES: usize = 7;

/// The steps of who takes interrupts out, from `step` to before `until`: ON is cleared, then PIR is taken word by word.
/// With `suppressing`, SN is cleared with it.
fn take_out(words: &mut Words, taken: &mut Words, step: &mut usize, until: usize) {
    while *step < until {
        match *step {
            0 => {
                let control = PostedControl::from_bits(words[CONTROL]);
                words[CONTROL] = control.with_outstanding(false).with_suppressed(false).into_bits();
            }
            index => taken[index - 1] |= std::mem::take(&mut words[index - 1]),
        }
        *step += 1;
    }
}

#[test]
fn a17_no_interrupt_is_lost_in_any_order_of_a_posting_and_who_takes_it_out() {
    // Five steps of the reader, each before one of the accesses of the posting, or behind all of them: as a row that
    // does not descend.
    let mut orders: Vec<Vec<usize>> = vec![vec![]];
    for _ in 0..5 {
        orders = orders
            .iter()
            .flat_map(|order| {
                (order.last().copied().unwrap_or(0)..=ACCESSES).map(move |next| [&order[..], &[next]].concat())
            })
            .collect();
    }
    assert_eq!(orders.len(), 792);
    let starts = [control(), control().with_outstanding(true), control().with_suppressed(true)];
    for (order, start) in orders.iter().flat_map(|order| starts.map(|start| (order, start))) {
        for urgent in [NOT_URGENT, URGENT] {
            let state = RefCell::new(([0; WORDS], 0));
            let shared = Shared::new(with(start), |access, words| {
                let (taken, step) = &mut *state.borrow_mut();
                take_out(words, taken, step, order.iter().filter(|at| **at <= access).count());
            });
            let notified = post(&shared, VECTOR, urgent, true).unwrap().is_some();
            let mut words = shared.words.into_inner();
            let (mut taken, mut step) = state.into_inner();
            take_out(&mut words, &mut taken, &mut step, 5);
            let (index, bit) = bit(VECTOR);
            let outstanding = PostedControl::from_bits(words[CONTROL]).outstanding();
            let what = format!("{order:?}, {start:?}, urgent: {urgent}");
            assert!(taken[index] & bit != 0 || words[index] & bit != 0 && outstanding && notified, "lost: {what}");
            // ON is who sets it, and there is one notification for it.
            assert!(!outstanding || notified, "nobody is notified: {what}");
            if start.outstanding() && order[0] == ACCESSES {
                assert!(!notified, "a notification that is not owed: {what}");
            }
        }
    }
}

#[test]
fn a17_suppression_that_comes_meanwhile_counts() {
    // Before the exchange: what was seen is not true any more.
    let shared = Shared::new(with(control()), |access, words| {
        if access == ACCESSES - 1 {
            words[CONTROL] |= PostedControl::new().with_suppressed(true).into_bits();
        }
    });
    assert_eq!(post(&shared, VECTOR, NOT_URGENT, true), Ok(None));
    let words = shared.words.into_inner();
    assert_eq!(words[CONTROL], control().with_suppressed(true).into_bits());
    assert_eq!(words[1], 1 << 5);
}

#[test]
fn a17_a_control_word_that_never_stops_changing_is_given_up_with_a_notification() {
    let shared = Shared::new(with(control()), |access, words| {
        words[CONTROL] = control().with_destination(access as u32).into_bits();
    });
    assert!(post(&shared, VECTOR, NOT_URGENT, true).unwrap().is_some());
    assert!(shared.accesses.get() <= 200);
    let words = shared.words.into_inner();
    assert!(PostedControl::from_bits(words[CONTROL]).outstanding() && words[1] == 1 << 5);
}

#[test]
fn a17_words_that_are_gone_are_a_fault() {
    struct Gone(usize, Cell<usize>);
    impl Gone {
        fn then<T>(&self, value: T) -> Option<T> {
            let access = self.1.replace(self.1.get() + 1);
            (access != self.0).then_some(value)
        }
    }
    impl DescriptorWords for Gone {
        fn get(&self, index: usize) -> Option<u64> {
            self.then(with(control())[index])
        }
        fn set_bits(&self, _: usize, _: u64) -> Option<()> {
            self.then(())
        }
        fn exchange(&self, _: usize, _: u64, _: u64) -> Option<bool> {
            self.then(true)
        }
    }
    for access in 0..ACCESSES {
        let result = post(&Gone(access, Cell::default()), VECTOR, NOT_URGENT, true);
        assert_eq!(result, Err(InterruptFaultReason::DescriptorAccess), "access {access}");
    }
    assert_eq!(post(&Gone(ACCESSES, Cell::default()), VECTOR, NOT_URGENT, true), Ok(Some(control())));
}
