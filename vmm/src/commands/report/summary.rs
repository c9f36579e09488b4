//! What a trace says, counted. All of it is bounded: so many names, so many spans of time, whatever the trace has.

use std::collections::BTreeMap;

use vtd::IovaRange;

use super::line::Line;

/// Names of one kind that are kept; what comes after them is counted together.
const MOST_NAMES: usize = 64;
/// Spans of time.
const SPANS: usize = 480;
/// Refusals that are listed, and slow operations.
const LISTED: usize = 50;
/// Ranges of one batch of notifications that are remembered.
const MOST_RANGES: usize = 4096;
/// Where the counts of further names go.
const OTHERS: &str = "(others)";

/// Counts by name.
#[derive(Default)]
pub struct Named<T>(pub BTreeMap<String, T>);

impl<T: Default> Named<T> {
    fn at(&mut self, name: String) -> &mut T {
        let name = if self.0.len() < MOST_NAMES || self.0.contains_key(&name) { name } else { OTHERS.to_owned() };
        self.0.entry(name).or_default()
    }
}

/// A space of the host.
#[derive(Default, Clone, Debug)]
pub struct Container {
    /// Operations that the host did.
    pub maps: u64,
    /// Operations that the host did.
    pub unmaps: u64,
    /// Operations that the host refused.
    pub failed: u64,
    /// Bytes.
    pub mapped: u64,
    /// Bytes.
    pub unmapped: u64,
    /// What its operations took, in nanoseconds.
    pub ns: u64,
    /// Maps that no notification asked for.
    pub remainders: u64,
    /// Where something was mapped: ascending.
    pub used: Vec<IovaRange>,
}

/// A space of the guest.
#[derive(Default, Clone, Debug)]
pub struct Space {
    /// Notifications.
    pub maps: u64,
    /// Notifications.
    pub unmaps: u64,
    /// Mappings that were told again at an attach.
    pub replays: u64,
    /// What did not become real.
    pub refused: u64,
}

/// A function.
#[derive(Default, Clone, Debug)]
pub struct Function {
    /// How often it was attached.
    pub attaches: u64,
    /// How often that failed.
    pub failed: u64,
    /// Where it was last.
    pub space: String,
    /// What was refused to it, by cause.
    pub refused: BTreeMap<&'static str, u64>,
}

/// What happened in a span of time.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// Of the host.
    pub maps: u64,
    /// Of the host.
    pub unmaps: u64,
    /// Of the guest.
    pub refused: u64,
    /// Of the host, that no notification asked for.
    pub remainders: u64,
}

/// A line that is listed.
#[derive(Clone, Debug)]
pub struct Event {
    /// When, in nanoseconds.
    pub time: u64,
    /// How long it took, in nanoseconds.
    pub ns: u64,
    /// What it was.
    pub text: String,
}

/// The whole.
#[derive(Default)]
pub struct Summary {
    /// Lines that are of a trace.
    pub lines: u64,
    /// Lines that are not.
    pub others: u64,
    /// When the last one was, in nanoseconds.
    pub end: u64,
    /// By number.
    pub containers: Named<Container>,
    /// By name.
    pub spaces: Named<Space>,
    /// By address in the guest.
    pub functions: Named<Function>,
    /// Operations of the host.
    pub spans: Vec<Span>,
    /// How long each of them is, in nanoseconds.
    pub span: u64,
    /// The first of them.
    pub refusals: Vec<Event>,
    /// All of them.
    pub refused: u64,
    /// The slowest operations of the host, the slowest first.
    pub slowest: Vec<Event>,
    /// Batches of notifications.
    pub batches: u64,
    /// What was asked for since the last batch ended.
    asked: Vec<IovaRange>,
    /// More was asked for than is remembered, or a space is being filled: nothing is a remainder.
    any: bool,
}

/// The cause, as one of those that there are.
fn cause(text: Option<&str>) -> &'static str {
    ["limit", "memlock", "range", "target"].into_iter().find(|cause| text == Some(cause)).unwrap_or("other")
}

impl Summary {
    /// Counts a line of the file.
    pub fn add(&mut self, text: &str) {
        let Some(line) = Line::parse(text) else {
            self.others += u64::from(!text.trim().is_empty());
            return;
        };
        self.lines += 1;
        self.end = self.end.max(line.time);
        match line.what {
            ("notify", "map" | "unmap" | "replay" | "applied") => self.notified(&line),
            ("notify", "refused") => self.refused(&line),
            ("notify", "attach") => {
                self.functions.at(line.name("device")).attaches += 1;
                self.any = true;
            }
            ("notify", "attached") => {
                let function = self.functions.at(line.name("device"));
                function.space = line.name("space");
                function.failed += u64::from(!line.is_ok());
                (self.any, self.asked) = (false, Vec::new());
            }
            ("notify", "detach") => self.functions.at(line.name("device")).space.clear(),
            ("host", "map" | "unmap") => self.operation(&line),
            // What is mapped because of these no notification asked for.
            ("host", "memory" | "gone") => self.any = true,
            _ => {}
        }
    }

    fn notified(&mut self, line: &Line<'_>) {
        let space = self.spaces.at(line.name("space"));
        match line.what.1 {
            "map" => space.maps += 1,
            "unmap" => space.unmaps += 1,
            "replay" => space.replays += 1,
            _ => {
                self.batches += 1;
                (self.any, self.asked) = (false, Vec::new());
                return;
            }
        }
        if let ("map", Some(range)) = (line.what.1, line.iova()) {
            let full = self.asked.len() == MOST_RANGES;
            match self.asked.last_mut() {
                Some(last) if last.last.checked_add(1) == Some(range.first) => last.last = range.last,
                _ if full => self.any = true,
                _ => self.asked.push(range),
            }
        }
    }

    fn refused(&mut self, line: &Line<'_>) {
        self.refused += 1;
        self.spaces.at(line.name("space")).refused += 1;
        let cause = cause(line.value("cause"));
        *self.functions.at(line.name("device")).refused.entry(cause).or_default() += 1;
        if self.refusals.len() < LISTED {
            let text = format!("{} {} {}: {cause}", line.name("device"), line.name("space"), line.name("iova"));
            self.refusals.push(Event { time: line.time, ns: 0, text });
        }
        self.span_of(line.time).refused += 1;
    }

    fn operation(&mut self, line: &Line<'_>) {
        let (is_map, range) = (line.what.1 == "map", line.iova());
        let ns = line.number("ns").unwrap_or(0);
        // In a batch, what is mapped beside what was asked for is what is left of a mapping that was cut.
        let asked = |range: IovaRange| self.asked.iter().any(|asked| asked.intersection(range).is_some());
        let is_remainder = is_map && !self.any && range.is_some_and(|range| !asked(range));
        let name = line.name("container");
        let container = self.containers.at(name.clone());
        container.ns = container.ns.saturating_add(ns);
        if !line.is_ok() {
            container.failed += 1;
        } else if is_map {
            container.maps += 1;
            container.remainders += u64::from(is_remainder);
            if let Some(range) = range {
                container.mapped = container.mapped.saturating_add((range.last - range.first).saturating_add(1));
                container.use_range(range);
            }
        } else {
            container.unmaps += 1;
            container.unmapped = container.unmapped.saturating_add(line.number("bytes").unwrap_or(0));
        }
        let span = self.span_of(line.time);
        span.maps += u64::from(is_map);
        span.unmaps += u64::from(!is_map);
        span.remainders += u64::from(is_remainder);

        let is_slow = self.slowest.len() < LISTED || self.slowest.last().is_some_and(|least| least.ns < ns);
        if is_slow {
            let at = self.slowest.partition_point(|other| other.ns >= ns);
            let text = format!("{} in {name}: {}", line.what.1, line.name("iova"));
            self.slowest.insert(at, Event { time: line.time, ns, text });
            self.slowest.truncate(LISTED);
        }
    }

    /// The span that `time` is in. Spans become longer as the trace does.
    fn span_of(&mut self, time: u64) -> &mut Span {
        if self.span == 0 {
            self.span = 1_000_000;
        }
        while time / self.span >= SPANS as u64 {
            let pairs = self.spans.chunks(2).map(|pair| {
                pair.iter().fold(Span::default(), |sum, span| Span {
                    maps: sum.maps + span.maps,
                    unmaps: sum.unmaps + span.unmaps,
                    refused: sum.refused + span.refused,
                    remainders: sum.remainders + span.remainders,
                })
            });
            self.spans = pairs.collect();
            self.span *= 2;
        }
        let index = (time / self.span) as usize;
        if self.spans.len() <= index {
            self.spans.resize(index + 1, Span::default());
        }
        &mut self.spans[index]
    }
}

/// Bands of addresses that a picture of a container has, at most.
const MOST_BANDS: usize = 12;
/// Ranges that are this near are one band: bytes.
const NEAR: u64 = 64 << 20;

impl Container {
    fn use_range(&mut self, range: IovaRange) {
        let inside = |used: &IovaRange| used.covers(range);
        if self.used.iter().any(inside) {
            return;
        }
        self.used.push(range);
        self.used.sort_unstable();
        let mut bands: Vec<IovaRange> = Vec::with_capacity(self.used.len());
        for range in self.used.drain(..) {
            match bands.last_mut() {
                Some(band) if range.first.saturating_sub(band.last) <= NEAR => band.last = band.last.max(range.last),
                _ => bands.push(range),
            }
        }
        while bands.len() > MOST_BANDS {
            let gap = |at: &usize| bands[*at + 1].first - bands[*at].last;
            let Some(nearest) = (0..bands.len() - 1).min_by_key(gap) else { break };
            let joined = bands.remove(nearest + 1);
            bands[nearest].last = joined.last;
        }
        self.used = bands;
    }
}
