//! What `cargo xtask test` prints: a line a test, failures with their output, and the counts.

use std::sync::{Arc, Mutex};
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    /// With everything that helps.
    Failed(String),
    /// With the reason.
    Skipped(String),
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
    times: Vec<(Duration, String)>,
}

/// How many of what took longest are named at the end.
const SLOWEST: usize = 10;

/// Prints each result as it comes; clones share the counts.
#[derive(Clone)]
pub struct Reporter {
    tally: Arc<Mutex<Tally>>,
    print: bool,
}

impl Reporter {
    pub fn new(print: bool) -> Self {
        Self { tally: Arc::default(), print }
    }

    pub fn add(&self, name: &str, outcome: Outcome, time: Option<Duration>) {
        let Ok(mut tally) = self.tally.lock() else { return };
        tally.times.extend(time.map(|time| (time, name.to_owned())));
        let time = time.map_or(String::new(), |time| format!(" ({:.1} s)", time.as_secs_f64()));
        let text = match &outcome {
            Outcome::Passed => {
                tally.passed += 1;
                format!("ok      {name}{time}")
            }
            Outcome::Failed(output) => {
                tally.failed.push(name.to_owned());
                let output: String = output.lines().map(|line| format!("        | {line}\n")).collect();
                format!("FAILED  {name}{time}\n{output}")
            }
            Outcome::Skipped(reason) => {
                tally.skipped += 1;
                format!("skipped {name}: {reason}")
            }
        };
        if self.print {
            println!("{}", text.trim_end());
        }
    }

    /// Something that is not a test took so long.
    pub fn took(&self, name: &str, time: Duration) {
        if let Ok(mut tally) = self.tally.lock() {
            tally.times.push((time, name.to_owned()));
        }
    }

    /// What took longest, the longest first.
    fn slowest(&self) -> Vec<(Duration, String)> {
        let mut times = self.tally.lock().map(|tally| tally.times.clone()).unwrap_or_default();
        times.sort_by(|a, b| b.cmp(a));
        times.truncate(SLOWEST);
        times
    }

    /// Passed, failed, skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.tally.lock().map(|tally| (tally.passed, tally.failed.len(), tally.skipped)).unwrap_or_default()
    }

    /// What took longest, the failures' names again, and the last line. Whether all is well.
    pub fn finish(&self) -> bool {
        for (time, name) in self.slowest() {
            println!("slow: {:6.1} s  {name}", time.as_secs_f64());
        }
        let (passed, failed, skipped) = self.counts();
        if let Ok(tally) = self.tally.lock() {
            for name in &tally.failed {
                println!("failed: {name}");
            }
        }
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        failed == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_ones_are_named_and_what_has_no_time_is_not() {
        let reporter = Reporter::new(false);
        for seconds in 0..20 {
            reporter.add(&format!("case {seconds}"), Outcome::Passed, Some(Duration::from_secs(seconds)));
        }
        reporter.add("without a time", Outcome::Passed, None);
        reporter.took("a step", Duration::from_millis(18_500));
        let names: Vec<String> = reporter.slowest().into_iter().map(|(_, name)| name).collect();
        assert_eq!(names[..3], ["case 19", "a step", "case 18"]);
        assert_eq!(names.len(), SLOWEST);
        assert_eq!(reporter.counts(), (21, 0, 0));
    }
}
