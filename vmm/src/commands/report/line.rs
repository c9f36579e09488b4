//! A line of a trace (docs/tracing.md). Who made the file is not known: what cannot be read is no line, and no name is
//! longer than [`LONGEST_NAME`].

use vtd::IovaRange;

/// The longest name that is kept, in characters.
const LONGEST_NAME: usize = 96;

/// A line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Line<'a> {
    /// Nanoseconds since the start.
    pub time: u64,
    /// `notify map`, `host unmap`: who says what.
    pub what: (&'a str, &'a str),
    values: &'a str,
}

impl<'a> Line<'a> {
    /// The line that `text` is.
    pub fn parse(text: &'a str) -> Option<Self> {
        let (time, rest) = text.trim_end().split_once(' ')?;
        let (who, rest) = rest.split_once(' ')?;
        let (operation, values) = rest.split_once(' ').unwrap_or((rest, ""));
        let (seconds, nanoseconds) = time.split_once('.')?;
        let seconds = seconds.parse::<u64>().ok()?.checked_mul(1_000_000_000)?;
        let nanoseconds = nanoseconds.parse::<u64>().ok().filter(|_| nanoseconds.len() == 9)?;
        let known = matches!(who, "notify" | "host") && !operation.is_empty();
        known.then_some(Self { time: seconds.checked_add(nanoseconds)?, what: (who, operation), values })
    }

    /// The value of a key.
    pub fn value(&self, key: &str) -> Option<&'a str> {
        self.values.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
    }

    /// The value of a key, as a name of bounded length.
    pub fn name(&self, key: &str) -> String {
        self.value(key).unwrap_or("?").chars().take(LONGEST_NAME).collect()
    }

    /// A number: decimal, or hexadecimal with 0x.
    pub fn number(&self, key: &str) -> Option<u64> {
        number(self.value(key)?)
    }

    /// The IOVAs.
    pub fn iova(&self) -> Option<IovaRange> {
        let (first, last) = self.value("iova")?.split_once('-')?;
        let range = IovaRange::new(number(first)?, number(last)?);
        (range.first <= range.last).then_some(range)
    }

    /// What came of it: `ok`, or a text without blanks.
    pub fn is_ok(&self) -> bool {
        self.value("result") == Some("ok")
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}
