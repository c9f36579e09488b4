use proptest::prelude::*;

use super::{DRIVER_OK, Effect, Elsewhere, FEATURES_OK, Registers, SIZE};

const OFFERED: u64 = 3 << 32 | 0x21;
const NEEDED: u64 = 3 << 32;

fn registers() -> Registers {
    Registers::new(OFFERED, NEEDED, &[64, 8])
}

fn read(registers: &Registers, offset: u64, len: usize) -> u64 {
    let mut data = vec![0; len];
    registers.read(offset, &mut data, &Elsewhere { config_vector: 0xffff, queue_vector: 0xffff, status: 0 });
    data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn accept(registers: &mut Registers, features: u64) -> u64 {
    for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
        registers.write(0x08, &select.to_le_bytes());
        registers.write(0x0c, &half.to_le_bytes());
    }
    registers.write(0x14, &[1 | 2 | FEATURES_OK]);
    read(registers, 0x14, 1)
}

#[test]
fn h1_a_driver_that_leaves_out_what_is_needed_is_refused() {
    for (features, agreed) in [
        (OFFERED, true),
        (NEEDED, true),
        (OFFERED & !(1 << 33), false),
        (OFFERED & !(1 << 32), false),
        (0, false),
        (NEEDED | 2, false),
        (NEEDED | 1 << 63, false),
    ] {
        let mut registers = registers();
        let status = accept(&mut registers, features);
        assert_eq!(status & u64::from(FEATURES_OK) != 0, agreed, "{features:#x}");
        // Without agreement it never starts.
        let effect = registers.write(0x14, &[status as u8 | DRIVER_OK]);
        assert_eq!(effect == Effect::Start, agreed);
        assert_eq!(registers.is_started(), agreed);
        // What was agreed on stays.
        registers.write(0x0c, &[0; 4]);
        assert!(!agreed || registers.features() == features);
    }
}

#[test]
fn h1_status_bits_go_by_a_reset_alone() {
    let mut registers = registers();
    accept(&mut registers, NEEDED);
    registers.write(0x14, &[1]);
    assert_eq!(read(&registers, 0x14, 1), u64::from(1 | 2 | FEATURES_OK));
    // DEVICE_NEEDS_RESET is the device's to set.
    registers.write(0x14, &[0x40]);
    assert_eq!(read(&registers, 0x14, 1), u64::from(1 | 2 | FEATURES_OK));
    assert_eq!(registers.write(0x14, &[0]), Effect::Reset);
}

#[test]
fn h1_a_queue_is_set_up_before_it_is_used_and_not_after() {
    let mut registers = registers();
    accept(&mut registers, NEEDED);
    assert_eq!((read(&registers, 0x12, 2), read(&registers, 0x18, 2)), (2, 64));
    registers.write(0x16, &[1, 0]);
    assert_eq!((read(&registers, 0x18, 2), read(&registers, 0x1e, 2)), (8, 1));
    for (size, is) in [(16u16, 8), (3, 8), (0, 8), (4, 4)] {
        registers.write(0x18, &size.to_le_bytes());
        assert_eq!(read(&registers, 0x18, 2), is);
    }
    // By halves, and whole.
    registers.write(0x20, &0x1000u32.to_le_bytes());
    registers.write(0x24, &7u32.to_le_bytes());
    registers.write(0x28, &0x8_0000_2000u64.to_le_bytes());
    registers.write(0x34, &9u32.to_le_bytes());
    let place = registers.queues()[1].place;
    assert_eq!((place.descriptors, place.available, place.used), (0x7_0000_1000, 0x8_0000_2000, 9 << 32));
    registers.write(0x1c, &[2, 0]);
    assert!(!registers.queues()[1].enabled);
    registers.write(0x1c, &[1, 0]);
    registers.write(0x18, &[2, 0]);
    registers.write(0x20, &[0; 8]);
    registers.write(0x1c, &[0, 0]);
    assert_eq!((registers.queues()[1].place, registers.queues()[1].enabled), (place, true));
    registers.write(0x14, &[1 | 2 | FEATURES_OK | DRIVER_OK]);
    registers.write(0x16, &[0, 0]);
    registers.write(0x1c, &[1, 0]);
    assert!(!registers.queues()[0].enabled, "the driver has said that it is ready");
    registers.write(0x16, &[2, 0]);
    assert_eq!(read(&registers, 0x18, 2), 0, "there is no such queue");
    registers.reset();
    assert_eq!(registers.queues()[1].place.size, 8);
}

proptest! {
    #[test]
    fn h1_every_access_has_a_result(
        accesses in prop::collection::vec((0..SIZE, prop::sample::select(vec![1usize, 2, 4, 8]), any::<u64>()), 0..200),
    ) {
        let mut registers = registers();
        for (offset, len, value) in accesses {
            if offset + len as u64 > SIZE {
                continue;
            }
            if registers.write(offset, &value.to_le_bytes()[..len]) == Effect::Reset {
                registers.reset();
            }
            read(&registers, offset, len);
            for (queue, most) in registers.queues().iter().zip([64, 8]) {
                prop_assert!(queue.place.size.is_power_of_two() && queue.place.size <= most);
            }
            prop_assert!(!registers.is_started() || registers.features() & NEEDED == NEEDED);
        }
    }
}
