//! Devices whose state can be saved and put back into the same device of another machine.
//!
//! A device is held first: then nothing of it is under way, and it begins nothing. All devices are held before the
//! first is saved, for one may write into another's registers. What is put back is believed no more than what a guest
//! writes: it is checked, and a state that the device cannot be in changes nothing.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Why a device is not at rest, or has no state to be saved. A sentence says what helps.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct CannotSave(pub String);

/// Why a state is none of the device's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unfit {
    /// It was saved in another form.
    #[error("its state has version {found}, and version {known} is known")]
    Version {
        /// Of the state.
        found: u32,
        /// Of this device.
        known: u32,
    },
    /// It is no state of such a device.
    #[error("its state is not understood: {0}")]
    Form(String),
    /// The device cannot be in it.
    #[error("its {0} cannot be what was saved")]
    Value(&'static str),
    /// The process that emulates it refuses the state.
    #[error("its process does not take what was saved: {0}")]
    Process(String),
}

/// A device that can be saved.
pub trait Saves: Send + Sync {
    /// Comes to rest, until [`Saves::go_on`]: when this returns, nothing of it is under way, no interrupt of it either,
    /// and it begins nothing, though its registers take what is written.
    ///
    /// # Errors
    /// Something does not end. It is held all the same.
    fn hold(&self) -> Result<(), CannotSave> {
        Ok(())
    }
    /// Does what there is to do.
    fn go_on(&self) {}
    /// Fetches what of its state is elsewhere, once all devices are held; [`Saves::save`] follows.
    ///
    /// # Errors
    /// It cannot be had.
    fn gather(&self) -> Result<(), CannotSave> {
        Ok(())
    }
    /// Its state, while it is held.
    fn save(&self) -> Value;
    /// Puts a state back, while it is held. No interrupt is sent by that; lines get their level.
    ///
    /// # Errors
    /// It is no state of this device. Then nothing changed.
    fn restore(&self, state: &Value) -> Result<(), Unfit>;
}

#[derive(Serialize)]
struct Out<'a, T> {
    version: u32,
    state: &'a T,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct In {
    version: u32,
    state: Value,
}

/// `state` in the form of this version. It has nothing that JSON has not.
pub fn encode<T: Serialize>(version: u32, state: &T) -> Value {
    serde_json::to_value(Out { version, state }).unwrap_or_default()
}

/// What [`encode`] gave.
///
/// # Errors
/// It has another version, or is of another form.
pub fn decode<T: DeserializeOwned>(known: u32, value: &Value) -> Result<T, Unfit> {
    let form = |e: serde_json::Error| Unfit::Form(e.to_string());
    let In { version, state } = In::deserialize(value).map_err(form)?;
    if version != known {
        return Err(Unfit::Version { found: version, known });
    }
    T::deserialize(state).map_err(form)
}

/// `Ok` if a value can be what `what` is.
pub fn fits(what: &'static str, can_be: bool) -> Result<(), Unfit> {
    if can_be { Ok(()) } else { Err(Unfit::Value(what)) }
}

/// Bytes as hexadecimal digits, for fields of states: `#[serde(with = "hex")]`.
pub mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Two digits a byte.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 0xf)]);
        let text: String = bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect();
        serializer.serialize_str(&text)
    }

    fn digit(byte: u8) -> Option<u8> {
        // As they are written, so that one value has one form.
        Some(byte)
            .filter(|byte| !byte.is_ascii_uppercase())
            .and_then(|byte| char::from(byte).to_digit(16))
            .map(|n| n as u8)
    }

    /// What [`serialize`] wrote.
    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let pairs = text.as_bytes().chunks(2);
        let bytes = pairs.map(|pair| match pair {
            [high, low] => digit(*high).zip(digit(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        });
        bytes.collect::<Option<_>>().ok_or_else(|| D::Error::custom("bytes are pairs of hexadecimal digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Serialize, Deserialize, PartialEq, Debug)]
    #[serde(deny_unknown_fields)]
    struct State {
        #[serde(with = "hex")]
        bytes: Vec<u8>,
        number: u64,
    }

    #[test]
    fn a14_states_come_back_as_they_were_and_others_are_refused() {
        let state = State { bytes: vec![0, 0x7f, 0xff], number: u64::MAX };
        let saved = encode(3, &state);
        assert_eq!(saved, json!({"version": 3, "state": {"bytes": "007fff", "number": u64::MAX}}));
        assert_eq!(decode::<State>(3, &saved), Ok(state));
        assert_eq!(decode::<State>(4, &saved), Err(Unfit::Version { found: 3, known: 4 }));
        for broken in [
            json!(null),
            json!({"version": 3}),
            json!({"version": 3, "state": {"bytes": "00"}}),
            json!({"version": 3, "state": {"bytes": "0", "number": 1}}),
            json!({"version": 3, "state": {"bytes": "0G", "number": 1}}),
            json!({"version": 3, "state": {"bytes": "0A", "number": 1}}),
            json!({"version": 3, "state": {"bytes": "é", "number": 1}}),
            json!({"version": 3, "state": {"bytes": "00", "number": 1, "more": 1}}),
            json!({"version": 3, "state": {"bytes": "00", "number": 1}, "more": 1}),
        ] {
            assert!(matches!(decode::<State>(3, &broken), Err(Unfit::Form(_))), "{broken}");
        }
    }
}
