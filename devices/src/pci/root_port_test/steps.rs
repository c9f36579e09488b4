//! A root port under anything that a guest writes, and anything that comes and goes.

use proptest::prelude::*;

use super::*;

/// What a hostile guest, and who plugs, do.
#[derive(Clone, Debug)]
enum Step {
    /// Into the port's configuration space.
    Port(u16, u32),
    /// Into the card's, at the address that it has.
    Card(u16, u32),
    Insert,
    Press,
    TakeIfOff,
    Surprise,
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let address = prop_oneof![Just(0xc010_0000u32), Just(0xc020_0000), Just(0xc01f_f000), Just(0)];
    let step = prop_oneof![
        3 => (0u16..0x44, any::<u32>()).prop_map(|(at, value)| Step::Port(4 * at, value)),
        3 => (0u8..4, 0u8..4).prop_map(|(a, b)| Step::Port(0x18, u32::from(b) << 16 | u32::from(a) << 8)),
        2 => Just(Step::Port(0x20, 0xc010_c010)),
        2 => any::<u8>().prop_map(|bits| Step::Port(0x04, bits.into())),
        3 => any::<u16>().prop_map(|bits| Step::Port(SLOT_CONTROL, bits.into())),
        1 => any::<bool>().prop_map(|on| Step::Port(0x3c, u32::from(on) << 22)),
        1 => any::<bool>().prop_map(|on| Step::Port(LINK_CONTROL, u32::from(on) << 4)),
        1 => any::<bool>().prop_map(|on| Step::Port(POWER + 4, if on { 0 } else { 3 })),
        3 => address.prop_map(|address| Step::Card(0x10, address)),
        3 => Just(Step::Card(0x04, COMMAND_MEMORY.into())),
        2 => Just(Step::Insert),
        1 => Just(Step::Press),
        1 => Just(Step::TakeIfOff),
        1 => Just(Step::Surprise),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// Whatever is written, and whatever comes and goes: a BAR answers exactly where the registers say, a card exactly
    /// at the id that they say, and the unit was told that one.
    #[test]
    fn f6_the_registers_of_a_port_are_the_truth_about_its_card(steps in steps()) {
        let world = World::new();
        let mut present = false;
        for step in steps {
            let before = world.port.slot_state();
            match step {
                Step::Port(at, value) => world.write(at, value),
                Step::Card(at, value) => {
                    if let Some(id) = before.id {
                        world.root.config_write(id, at, &value.to_le_bytes());
                    }
                }
                Step::Insert if !present => {
                    world.port.insert(world.card(&world.port));
                    present = true;
                }
                Step::Insert => prop_assert_eq!(world.port.reserve(), Err(Occupied(1))),
                Step::Press => world.port.press_button(),
                Step::TakeIfOff => {
                    let taken = world.port.take_if_off().is_some();
                    prop_assert_eq!(taken, present && !before.powered);
                    present &= !taken;
                }
                Step::Surprise => {
                    prop_assert_eq!(world.port.take_by_surprise().is_some(), present);
                    present = false;
                }
                Step::Reset => world.root.reset(),
            }
            let state = world.port.slot_state();
            prop_assert_eq!(state.present, present);
            prop_assert_eq!(world.read16(SLOT_STATUS) & !0x149, 0, "no other bit is ever set");
            let buses = world.read(world.port.requester().sid, 0x18).to_le_bytes();
            let id = (buses[1] != 0 && buses[1] <= buses[2]).then(|| SourceId::new(buses[1], 0, 0));
            prop_assert_eq!(state.id, id);
            if present {
                prop_assert_eq!(world.told(CARD), id);
            } else {
                prop_assert_eq!(world.told.0.lock().unwrap().get(&CARD).copied().flatten(), None);
            }
            let powered = world.read16(SLOT_CONTROL) & POWER_OFF == 0;
            let linked = present && powered && world.read16(LINK_CONTROL) & 1 << 4 == 0;
            prop_assert_eq!(world.read16(LINK_STATUS) & 1 << 13 != 0, linked);
            let reachable = linked && world.read16(0x3e) & 1 << 6 == 0 && world.read16(POWER + 4) & 3 == 0;
            if let Some(id) = id {
                prop_assert_eq!(world.read(id, 0) == 0x5678_1234, reachable);
                prop_assert!(reachable || world.read(id, 0) == u32::MAX);
            }
            // Where the card decodes, by its own registers; nobody but the port can be asked where no bus leads to it.
            let Some(function) = world.port.function_below() else { continue };
            let mut own = [0; 8];
            function.config_read(0x10, &mut own[..4]);
            function.config_read(0x14, &mut own[4..]);
            let mut command = [0; 2];
            function.config_read(COMMAND, &mut command);
            let bar = u64::from_le_bytes(own) & !0xfff;
            let forwards = world.read16(COMMAND) & COMMAND_MEMORY != 0
                && world.forwarded().iter().any(|(a, b)| *a <= bar && bar + 0xfff <= *b);
            let decodes = u16::from_le_bytes(command) & COMMAND_MEMORY != 0 && bar != 0;
            prop_assert_eq!(world.answers_at(bar), reachable && forwards && decodes);
        }
    }
}
