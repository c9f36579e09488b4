//! The pair of 8259A interrupt controllers (Intel's data sheet 231468): registers only.
//!
//! Nothing is connected to their inputs and their output: interrupts come by the IOAPIC. Guests look whether they are
//! there before they believe that ISA interrupts, and so the timer's, exist; then they mask everything in them.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::BusDevice;
use crate::saved::{Saves, Unfit, decode, encode};

/// One controller's two ports.
pub struct Pic(Mutex<State>);

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    mask: u8,
    awaited: Awaited,
    /// The first initialization word asked for a fourth.
    wants_fourth: bool,
    /// There is no cascade, and so no third word.
    single: bool,
}

/// What a write to the data port is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
enum Awaited {
    Mask,
    Second,
    Third,
    Fourth,
}

const POWER_ON: State = State { mask: 0xff, awaited: Awaited::Mask, wants_fourth: false, single: false };

impl Pic {
    /// First port of the master; its second is the next one.
    pub const MASTER: u64 = 0x20;
    /// First port of the slave.
    pub const SLAVE: u64 = 0xa0;

    /// A controller that masks everything.
    pub fn new() -> Self {
        Self(Mutex::new(POWER_ON))
    }

    /// Back to power-on.
    pub fn reset(&self) {
        *self.0.lock().unwrap() = POWER_ON;
    }
}

impl Saves for Pic {
    fn save(&self) -> Value {
        encode(1, &*self.0.lock().unwrap())
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        *self.0.lock().unwrap() = decode(1, state)?;
        Ok(())
    }
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Pic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // Requests, what is in service, and a poll: nothing.
        data[0] = if offset == 1 { self.0.lock().unwrap().mask } else { 0 };
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (state, value) = (&mut *self.0.lock().unwrap(), data[0]);
        if offset == 0 {
            // Bit 4 makes it the first initialization word; the others command what is not there.
            if value & 0x10 != 0 {
                *state =
                    State { mask: 0, awaited: Awaited::Second, wants_fourth: value & 1 != 0, single: value & 2 != 0 };
            }
            return;
        }
        let last = if state.wants_fourth { Awaited::Fourth } else { Awaited::Mask };
        state.awaited = match state.awaited {
            Awaited::Mask => {
                state.mask = value;
                Awaited::Mask
            }
            Awaited::Second if !state.single => Awaited::Third,
            Awaited::Second | Awaited::Third => last,
            Awaited::Fourth => Awaited::Mask,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pic: &Pic, offset: u64) -> u8 {
        let mut data = [0];
        pic.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn pic_mask_is_what_was_written_and_everything_after_power_on() {
        let pic = Pic::new();
        assert_eq!(read(&pic, 1), 0xff);
        pic.write(1, &[0xfb]);
        assert_eq!((read(&pic, 1), read(&pic, 0)), (0xfb, 0));
        let mut word = [0; 4];
        pic.read(1, &mut word);
        assert_eq!(word, [0xfb, 0xff, 0xff, 0xff], "one port has one byte");
        pic.reset();
        assert_eq!(read(&pic, 1), 0xff);
    }

    #[test]
    fn pic_initialization_words_are_not_masks() {
        // First word, how many more it asks for.
        for (first, more) in [(0x11, 3), (0x10, 2), (0x13, 2), (0x12, 1)] {
            let pic = Pic::new();
            pic.write(1, &[0xfb]);
            pic.write(0, &[first]);
            for word in 0..more {
                assert_eq!(read(&pic, 1), 0, "{first:#x}: the mask is clear before word {word}");
                pic.write(1, &[0x20]);
            }
            assert_eq!(read(&pic, 1), 0, "{first:#x}");
            pic.write(1, &[0xfe]);
            assert_eq!(read(&pic, 1), 0xfe, "{first:#x}");
        }
        let pic = Pic::new();
        pic.write(0, &[0x20]);
        pic.write(1, &[0x7f]);
        assert_eq!(read(&pic, 1), 0x7f, "an end of interrupt begins nothing");
    }
}
