use std::sync::Arc;

use vtd::{Msi, Requester, SourceId};

use super::{Cause, NO_VECTOR, Vectors};
use crate::testing::FakeInterrupts;

const ENABLE: u16 = 0x8000;
const MASK: u16 = 0x4000;

fn vectors() -> (Vectors, Arc<FakeInterrupts>) {
    let interrupts = Arc::new(FakeInterrupts::default());
    let requester = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };
    (Vectors::new(requester, interrupts.clone(), 2), interrupts)
}

fn program(vectors: &Vectors, vector: u64, data: u32, masked: bool) {
    for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, data), (12, masked.into())] {
        vectors.write_table(16 * vector + at, &u32::to_le_bytes(value));
    }
}

fn message(data: u32) -> Msi {
    Msi { address: 0xfee0_0000, data }
}

#[test]
fn h1_a_cause_sends_the_message_of_its_vector() {
    let (vectors, sent) = vectors();
    vectors.set_control(ENABLE, true);
    (0..3).for_each(|vector| program(&vectors, vector, 0x40 + vector as u32, false));
    vectors.set_vector_of(Cause::Config, 0);
    vectors.set_vector_of(Cause::Queue(0), 2);
    vectors.set_vector_of(Cause::Queue(1), 3);
    assert_eq!(vectors.vector_of(Cause::Queue(1)), NO_VECTOR, "there is no such vector");
    vectors.raise(Cause::Queue(0));
    vectors.raise(Cause::Config);
    vectors.raise(Cause::Queue(1));
    vectors.raise(Cause::Queue(7));
    assert_eq!(sent.take(), [message(0x42), message(0x40)]);
    // None without the kind enabled, and none without Bus Master.
    for (control, master) in [(0, true), (ENABLE, false)] {
        vectors.set_control(control, master);
        vectors.raise(Cause::Queue(0));
        assert_eq!(sent.take(), []);
    }
}

#[test]
fn h1_what_comes_while_a_vector_is_masked_comes_once_when_it_is_not() {
    let (vectors, sent) = vectors();
    vectors.set_control(ENABLE | MASK, true);
    vectors.set_vector_of(Cause::Queue(0), 1);
    program(&vectors, 1, 7, true);
    let pending = || {
        let mut bits = [0xff; 8];
        vectors.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    };
    for _ in 0..3 {
        vectors.raise(Cause::Queue(0));
    }
    assert_eq!(pending(), 2);
    vectors.set_control(ENABLE, true);
    assert_eq!((sent.take(), pending()), (vec![], 2));
    vectors.write_table(16 + 12, &[0; 4]);
    assert_eq!((sent.take(), pending()), (vec![message(7)], 0));
    // Disabling forgets.
    vectors.set_control(ENABLE | MASK, true);
    vectors.raise(Cause::Queue(0));
    vectors.set_control(0, true);
    vectors.set_control(ENABLE, true);
    assert_eq!(sent.take(), []);
}

#[test]
fn h1_every_access_to_the_table_has_a_result() {
    let (vectors, _) = vectors();
    program(&vectors, 2, 0x1234_5678, false);
    vectors.write_table(16 * 2 + 12, &[0xff; 4]);
    let read = |offset, len: usize| {
        let mut data = vec![0xaa; len];
        vectors.read_table(offset, &mut data);
        data
    };
    assert_eq!(read(40, 8), [0x78, 0x56, 0x34, 0x12, 1, 0, 0, 0], "bits that are reserved stay 0");
    for (offset, len) in [(40, 1), (40, 2), (42, 4), (44, 8), (48, 4), (0xfff8, 8)] {
        assert_eq!(read(offset, len), vec![0; len], "{offset:#x}");
        vectors.write_table(offset, &vec![0xee; len]);
    }
    assert_eq!(read(40, 8), [0x78, 0x56, 0x34, 0x12, 1, 0, 0, 0]);
    vectors.reset();
    assert_eq!(read(40, 8), [0, 0, 0, 0, 1, 0, 0, 0]);
    let mut bits = [0xff; 8];
    vectors.read_pending(0xff8, &mut bits);
    assert_eq!(bits, [0; 8]);
}
