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
}

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

    /// Passed, failed, skipped.
    pub fn counts(&self) -> (usize, usize, usize) {
        self.tally.lock().map(|tally| (tally.passed, tally.failed.len(), tally.skipped)).unwrap_or_default()
    }

    /// The failures' names again, and the last line. Whether all is well.
    pub fn finish(&self) -> bool {
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
