//! The state of a port: its registers. What is in its slot is saved by itself, and put back after the port.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::RootPort;
use crate::saved::{Saves, Unfit, decode, encode, fits, hex};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(with = "hex")]
    config: Vec<u8>,
    /// It had reason to interrupt, and has sent its message.
    interrupts: bool,
}

impl Saves for RootPort {
    fn save(&self) -> Value {
        let state = self.lock();
        encode(1, &Saved { config: state.config.bytes().to_vec(), interrupts: state.interrupts })
    }

    /// The same slots have a card as when it was saved.
    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { config, interrupts } = decode(1, state)?;
        let state = &mut *self.lock();
        let (slot, before) = (state.slot, state.config.bytes().to_vec());
        state.config.restore(&config, &slot.own())?;
        let (present, linked) = (slot.is_present(&state.config), slot.is_linked(&state.config));
        let possible =
            fits("slot", present == state.reserved).and(fits("link", slot.shows_link(&state.config) == linked));
        if possible.is_err() {
            // What was there before fits.
            state.config.restore(&before, &slot.own())?;
            return possible;
        }
        (state.linked, state.interrupts) = (linked, interrupts);
        self.follow(state);
        Ok(())
    }
}
