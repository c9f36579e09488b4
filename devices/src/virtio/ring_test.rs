use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Broken, Chain, Part, Place, Ring, read, slice, total, write};

const SIZE: u16 = 8;
const MEMORY: usize = 0x4000;
const PLACE: Place = Place { size: SIZE, descriptors: 0x1000, available: 0x2000, used: 0x3000 };

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

fn put(memory: &GuestMemoryMmap, at: u64, (address, len, flags, next): Descriptor) {
    let at = |offset| GuestAddress(at + offset);
    memory.write_obj(address, at(0)).unwrap();
    memory.write_obj(len, at(8)).unwrap();
    memory.write_obj(flags, at(12)).unwrap();
    memory.write_obj(next, at(14)).unwrap();
}

fn offer(memory: &GuestMemoryMmap, heads: &[u16]) {
    for (index, head) in (0u64..).zip(heads) {
        memory.write_obj(*head, GuestAddress(PLACE.available + 4 + 2 * (index % u64::from(SIZE)))).unwrap();
    }
    memory.write_obj(heads.len() as u16, GuestAddress(PLACE.available + 2)).unwrap();
}

/// The same by the text of the specification (2.7.5 to 2.7.7), written another way. `None`: it makes no sense.
fn by_the_text(memory: &GuestMemoryMmap, head: u16) -> Option<Chain> {
    let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
    let (mut table, mut entries, mut index, mut inside) = (PLACE.descriptors, u64::from(SIZE), u64::from(head), false);
    let mut bytes = 0u64;
    loop {
        let at = |offset| GuestAddress(table.wrapping_add(16 * index + offset));
        if index >= entries || table.checked_add(16 * index + 15).is_none() {
            return None;
        }
        let address: u64 = memory.read_obj(at(0)).ok()?;
        let len: u32 = memory.read_obj(at(8)).ok()?;
        let flags: u16 = memory.read_obj(at(12)).ok()?;
        let next: u16 = memory.read_obj(at(14)).ok()?;
        if flags & INDIRECT != 0 {
            if inside || !len.is_multiple_of(16) || len / 16 > 0xffff {
                return None;
            }
            (table, entries, index, inside) = (address, u64::from(len / 16), 0, true);
            continue;
        }
        let part = Part { iova: address, len };
        if flags & WRITE != 0 {
            chain.writable.push(part);
        } else if chain.writable.is_empty() {
            chain.readable.push(part);
        } else {
            return None;
        }
        bytes += u64::from(len);
        if chain.readable.len() + chain.writable.len() > usize::from(SIZE) || bytes > u64::from(u32::MAX) {
            return None;
        }
        if flags & NEXT == 0 {
            return Some(chain);
        }
        index = next.into();
    }
}

/// One that a driver might write, or somebody who means ill.
fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        8 => Just(0x800u64),
        // Tables in the ring itself, and behind it.
        4 => (0u64..16).prop_map(|n| 0x1000 + 16 * n),
        1 => Just(MEMORY as u64 - 16),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => (0u32..10).prop_map(|n| 16 * n), 2 => 0u32..64, 1 => any::<u32>()];
    let flags = prop_oneof![2 => Just(0u16), 3 => Just(NEXT), 2 => Just(NEXT | WRITE), 2 => Just(WRITE), 2 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()];
    (address, len, flags, next)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn h2_what_a_ring_gives_is_what_the_text_says_or_nothing(
        descriptors in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![8 => 0u16..SIZE, 1 => any::<u16>()], 0..=usize::from(SIZE)),
        jump in prop_oneof![4 => Just(0u16), 1 => any::<u16>()],
    ) {
        let memory = memory();
        for (index, descriptor) in (0u64..).zip(descriptors) {
            put(&memory, PLACE.descriptors + 16 * index, descriptor);
        }
        offer(&memory, &heads);
        let available = (heads.len() as u16).wrapping_add(jump);
        memory.write_obj(available, GuestAddress(PLACE.available + 2)).unwrap();
        let mut ring = Ring::new(SIZE, &PLACE, true).unwrap();
        if available > SIZE {
            prop_assert_eq!(ring.pop(&memory), Err(Broken("the available ring has more buffers than entries")));
            return Ok(());
        }
        // Entries that were not written are 0.
        for index in 0..available {
            let head = heads.get(usize::from(index)).copied().unwrap_or(0);
            let got = ring.pop(&memory);
            match by_the_text(&memory, head) {
                Some(chain) => prop_assert_eq!(got, Ok(Some(chain))),
                None => {
                    prop_assert!(got.is_err(), "{:?}", got);
                    return Ok(());
                }
            }
        }
        prop_assert_eq!(ring.pop(&memory), Ok(None));
    }
}

#[test]
fn h2_a_buffer_that_leads_to_itself_ends() {
    let memory = memory();
    put(&memory, PLACE.descriptors, (0x800, 1, NEXT, 1));
    put(&memory, PLACE.descriptors + 16, (0x800, 1, NEXT, 0));
    offer(&memory, &[0]);
    let mut ring = Ring::new(SIZE, &PLACE, false).unwrap();
    assert!(ring.pop(&memory).is_err());
    // So does a table of descriptors that has a hundred thousand of them.
    put(&memory, PLACE.descriptors, (0, 16 * 0xffff, INDIRECT, 0));
    put(&memory, 0, (0x800, 1, NEXT, 0));
    let mut ring = Ring::new(SIZE, &PLACE, false).unwrap();
    assert!(ring.pop(&memory).is_err());
}

#[test]
fn h2_a_ring_out_of_memory_is_broken_wherever_it_is() {
    let memory = memory();
    offer(&memory, &[0]);
    put(&memory, PLACE.descriptors, (0x800, 1, 0, 0));
    memory.write_obj(1u16, GuestAddress(2)).unwrap();
    let places = [
        Place { descriptors: MEMORY as u64, ..PLACE },
        Place { available: MEMORY as u64, ..PLACE },
        Place { available: u64::MAX - 1, ..PLACE },
        Place { available: 0, ..PLACE },
    ];
    for place in places {
        assert!(Ring::new(SIZE, &place, true).unwrap().pop(&memory).is_err(), "{place:?}");
    }
    let mut ring = Ring::new(SIZE, &Place { used: MEMORY as u64, ..PLACE }, true).unwrap();
    assert!(ring.pop(&memory).is_ok());
    assert!(ring.push(&memory, 0, 1).is_err() && ring.enable_kicks(&memory).is_err());
    let mut ring = Ring::new(SIZE, &PLACE, true).unwrap();
    assert!(ring.push(&memory, SIZE, 1).is_err(), "no such buffer");
    for place in [
        Place { descriptors: 8, ..PLACE },
        Place { available: 1, ..PLACE },
        Place { used: 2, ..PLACE },
        Place { size: 3, ..PLACE },
        Place { size: 0, ..PLACE },
        Place { size: 2 * SIZE, ..PLACE },
    ] {
        assert!(Ring::new(SIZE, &place, true).is_err(), "{place:?}");
    }
}

#[test]
fn parts_are_read_and_written_across_their_ends() {
    let memory = memory();
    let parts = [Part { iova: 0x10, len: 3 }, Part { iova: 0x20, len: 0 }, Part { iova: 0x30, len: 5 }];
    assert_eq!(total(&parts), 8);
    write(&memory, &parts, &[1, 2, 3, 4, 5]).unwrap();
    let mut data = [0; 5];
    read(&memory, &parts, &mut data).unwrap();
    assert_eq!(data, [1, 2, 3, 4, 5]);
    memory.read_slice(&mut data[..2], GuestAddress(0x30)).unwrap();
    assert_eq!(data[..2], [4, 5]);
    assert!(read(&memory, &parts, &mut [0; 9]).is_err() && write(&memory, &parts, &[0; 9]).is_err());
    assert_eq!(slice(&parts, 2, 3), [Part { iova: 0x12, len: 1 }, Part { iova: 0x30, len: 2 }]);
    assert_eq!(slice(&parts, 3, 100), [Part { iova: 0x30, len: 5 }]);
    assert_eq!(slice(&parts, 8, 1), []);
    let last = [Part { iova: u64::MAX - 1, len: 8 }];
    assert!(read(&memory, &slice(&last, 4, 4), &mut [0; 4]).is_err());
}
