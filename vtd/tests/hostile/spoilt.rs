//! A saved state that is changed as a script says, in its serialised form: what a source that lies would send.

use serde_json::Value;
use vtd::State;

use super::Script;

/// `state`, in which some values are others.
pub fn spoilt(state: &State, script: &mut Script<'_>) -> String {
    let mut state = serde_json::to_value(state).unwrap();
    for _ in 0..=script.below(4) {
        let count = values(&mut state, &mut |_, _| {});
        let (chosen, how) = ((u64::from(script.byte()) << 8 | u64::from(script.byte())) % count, script.byte());
        values(&mut state, &mut |number, value| {
            if number == chosen {
                change(value, how, script);
            }
        });
    }
    state.to_string()
}

/// Calls `with` for each value in `value`, and for the whole; how many there are.
fn values(value: &mut Value, with: &mut dyn FnMut(u64, &mut Value)) -> u64 {
    fn each(value: &mut Value, next: &mut u64, with: &mut dyn FnMut(u64, &mut Value)) {
        with(*next, value);
        *next += 1;
        match value {
            Value::Array(all) => all.iter_mut().for_each(|value| each(value, next, with)),
            Value::Object(all) => all.values_mut().for_each(|value| each(value, next, with)),
            _ => {}
        }
    }
    let mut next = 0;
    each(value, &mut next, with);
    next
}

fn change(value: &mut Value, how: u8, script: &mut Script<'_>) {
    match value {
        Value::Number(number) => {
            *value = script.value(number.as_u64().unwrap_or(0)).into();
        }
        Value::Array(all) => match how % 4 {
            0 => drop(all.pop()),
            1 => all.reverse(),
            _ => all.extend(all.first().cloned()),
        },
        Value::Object(all) => {
            let name = all.keys().nth(usize::from(how) % all.len().max(1)).cloned();
            name.map(|name| all.remove(&name));
        }
        Value::Bool(set) => *set = !*set,
        Value::Null | Value::String(_) => *value = script.word().into(),
    }
}
