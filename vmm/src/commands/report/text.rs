//! What stands in the page, as text.

use std::fmt::{self, Write};

/// Text that is no markup, whatever it is.
pub struct Text<'a>(pub &'a str);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|letter| match letter {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            // Nor does it change the direction of what stands beside it.
            letter if letter.is_control() || ('\u{202a}'..='\u{202e}').contains(&letter) => f.write_char('\u{fffd}'),
            letter => f.write_char(letter),
        })
    }
}

/// To the millisecond.
pub fn seconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1_000_000_000, ns / 1_000_000 % 1000)
}

/// A time on an axis that ends at `end`: with as many digits as tell its ticks apart.
pub fn moment(ns: u64, end: u64) -> String {
    match end {
        0..50_000_000 => format!("{}.{:02} ms", ns / 1_000_000, ns / 10_000 % 100),
        50_000_000..20_000_000_000 => format!("{}.{:02} s", ns / 1_000_000_000, ns / 10_000_000 % 100),
        _ => format!("{}.{} s", ns / 1_000_000_000, ns / 100_000_000 % 10),
    }
}

/// A time that something took.
pub fn duration(ns: u64) -> String {
    match ns {
        0..1_000_000 => format!("{}.{} us", ns / 1000, ns / 100 % 10),
        1_000_000..10_000_000_000 => format!("{}.{:02} ms", ns / 1_000_000, ns / 10_000 % 100),
        _ => format!("{}.{:02} s", ns / 1_000_000_000, ns / 10_000_000 % 100),
    }
}

/// A number of bytes, for people.
pub fn bytes(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    while unit + 1 < units.len() && bytes >> (10 * (unit + 1)) != 0 {
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} bytes"),
        _ => {
            let tenths = (u128::from(bytes) * 10) >> (10 * unit);
            format!("{}.{} {}", tenths / 10, tenths % 10, units[unit])
        }
    }
}

/// What the container of this number is (docs/tracing.md).
pub fn kind_of_container(name: &str) -> &'static str {
    match name.parse::<u64>() {
        Ok(0..0x4000_0000) => "a group of the host",
        Ok(0x4000_0000..0x8000_0000) => "a space of the host",
        Ok(0x8000_0000..0xc000_0000) => "a vfio-user process",
        Ok(0xc000_0000..=0xffff_ffff) => "an emulated function",
        _ => "",
    }
}
