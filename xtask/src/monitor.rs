//! QEMU's monitor: wakes a processor that sleeps over an interrupt, and tells what the processor of a QEMU that does
//! not end is doing.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::cache::progress;

/// How long QEMU has for an answer: it has none while its main loop is stuck.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const PROMPT: &str = "(qemu) ";
/// How often, and how far apart, one looks where the processor is.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// How often one looks whether interrupts wait at the processor, and after how many looks at the same ones they are
/// taken for lost.
const BETWEEN_WATCHES: Duration = Duration::from_secs(1);
const WATCHES: u32 = 5;
/// An interrupt of L1's serial console, which has no other effect.
const WAKE: &str = "chardev-send-break console";

/// QEMU's own monitor, as its standard input.
pub struct Monitor {
    stream: UnixStream,
    /// The prompt after the greeting was seen.
    greeted: bool,
    next_watch: Instant,
    /// The interrupts that wait, as it was told last, and how many looks in a row found them.
    waiting: (String, u32),
    /// The run's, for what is said.
    name: String,
    /// One is told once: a machine with too much to do looks the same.
    said: bool,
}

impl Monitor {
    fn new(stream: UnixStream, name: &str) -> Self {
        let (waiting, name) = (Default::default(), name.to_owned());
        Self { stream, greeted: false, next_watch: Instant::now(), waiting, name, said: false }
    }

    pub fn attach(command: &mut Command, name: &str) -> std::io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(ANSWER_LIMIT))?;
        ours.set_write_timeout(Some(ANSWER_LIMIT))?;
        command.stdin(OwnedFd::from(theirs));
        command.args(["-chardev", "socket,id=monitor,fd=0", "-mon", "chardev=monitor,mode=readline"]);
        Ok(Self::new(ours, name))
    }

    /// To be called again and again. QEMU 10.0's SVM clears bits of the processor's interrupt requests without a lock,
    /// at each entry to a guest and each exit, and may so undo one that comes at that moment (docs/nested-bench.md):
    /// then it waits at the local APIC for ever, unless another one comes. So another one comes.
    ///
    /// # Errors
    /// The monitor does not answer.
    pub fn watch(&mut self) -> std::io::Result<()> {
        if Instant::now() < self.next_watch {
            return Ok(());
        }
        self.next_watch = Instant::now() + BETWEEN_WATCHES;
        if self.is_asleep()? {
            if !std::mem::replace(&mut self.said, true) {
                progress(format_args!(
                    "{}: L1's processor has not taken interrupt {} for {WATCHES} s; it is woken, and each time (docs/nested-bench.md)",
                    self.name, self.waiting.0
                ));
            }
            self.waiting = Default::default();
            self.ask(WAKE)?;
        }
        Ok(())
    }

    /// Looks once; whether interrupts have waited for too long.
    fn is_asleep(&mut self) -> std::io::Result<bool> {
        let answer = self.ask("info lapic")?;
        let waiting = answer.lines().find_map(|line| line.strip_prefix("IRR")).map_or("", str::trim);
        if waiting.is_empty() || waiting == "(none)" {
            self.waiting = Default::default();
        } else if waiting == self.waiting.0 {
            self.waiting.1 += 1;
        } else {
            self.waiting = (waiting.to_owned(), 1);
        }
        Ok(self.waiting.1 >= WATCHES)
    }

    /// The processor's registers, and where it was at several moments after that.
    pub fn processor(&mut self) -> String {
        let mut text = String::new();
        let mut look = || -> std::io::Result<()> {
            for line in self.ask("info registers")?.lines().filter(|line| !is_floating_point(line)) {
                let _ = writeln!(text, "{line}");
            }
            text.push_str("and then, 50 ms apart:\n");
            for _ in 0..LOOKS {
                std::thread::sleep(BETWEEN_LOOKS);
                if let Some(line) = self.ask("info registers")?.lines().find(|line| line.starts_with("RIP=")) {
                    let _ = writeln!(text, "{line}");
                }
            }
            text.push_str(&self.ask("info lapic")?);
            Ok(())
        };
        if let Err(error) = look() {
            let _ = writeln!(text, "QEMU's monitor does not answer: {error}");
        }
        text
    }

    fn ask(&mut self, question: &str) -> std::io::Result<String> {
        if !self.greeted {
            self.until_prompt()?;
            self.greeted = true;
        }
        writeln!(self.stream, "{question}")?;
        let answer = self.until_prompt()?;
        // The first line is the question, as a terminal would show it.
        Ok(answer.split_once('\n').map_or_else(String::new, |(_, rest)| rest.replace('\r', "")))
    }

    fn until_prompt(&mut self) -> std::io::Result<String> {
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !answer.ends_with(PROMPT.as_bytes()) {
            match self.stream.read(&mut buffer)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                size => answer.extend_from_slice(&buffer[..size]),
            }
        }
        answer.truncate(answer.len() - PROMPT.len());
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

/// Registers that say nothing of where a kernel is.
fn is_floating_point(line: &str) -> bool {
    ["FCW", "FPR", "XMM", "YMM", "ZMM", "Opmask"].iter().any(|name| line.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// A monitor that greets, repeats each question, and answers it with the next answer; then it is silent, but there.
    /// And its questions.
    fn answering(answers: Vec<String>) -> (Monitor, Arc<Mutex<Vec<String>>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let questions = Arc::clone(&asked);
        std::thread::spawn(move || {
            let _ = write!(theirs, "QEMU 10.0.2 monitor\r\n{PROMPT}");
            for answer in answers {
                let mut question = Vec::new();
                while question.last() != Some(&b'\n') {
                    let mut byte = [0];
                    theirs.read_exact(&mut byte).unwrap();
                    question.push(byte[0]);
                }
                let question = String::from_utf8(question).unwrap().trim().to_owned();
                questions.lock().unwrap().push(question.clone());
                write!(theirs, "{question}\r\n{answer}{PROMPT}").unwrap();
            }
            let _ = theirs.read(&mut [0]);
        });
        (Monitor::new(ours, "test"), asked)
    }

    fn registers(count: usize) -> Vec<String> {
        (0..count).map(|number| format!("CPU#0\r\nRIP={number}\r\n")).collect()
    }

    #[test]
    fn a_processor_is_looked_at_again_and_again() {
        let (mut monitor, asked) = answering(registers(LOOKS + 2));
        let text = monitor.processor();
        assert_eq!(text.matches("RIP=").count(), LOOKS + 2, "{text}");
        assert!(text.starts_with("CPU#0\nRIP=0\n"), "{text}");
        assert_eq!(asked.lock().unwrap().last().map(String::as_str), Some("info lapic"));
    }

    #[test]
    fn a_monitor_that_does_not_answer_is_said() {
        let text = answering(registers(1)).0.processor();
        assert!(text.contains("RIP=0") && text.contains("does not answer"), "{text}");
    }

    #[test]
    fn a_processor_is_woken_when_the_same_interrupts_wait_all_the_time() {
        let lapic = |waiting: &str| format!("ISR\t (none)\r\nIRR\t {waiting}\r\n\r\nAPR 0x00\r\n");
        let asleep =
            ["236 ", "(none)", "236 ", "236 ", "236 ", "236 ", "48 236 ", "236 ", "236 ", "236 ", "236 ", "236 "];
        let mut answers: Vec<String> = asleep.iter().map(|waiting| lapic(waiting)).collect();
        // To the break, and afterwards.
        answers.extend([String::new(), lapic("(none)")]);
        let (mut monitor, asked) = answering(answers);
        for _ in 0..=asleep.len() {
            monitor.next_watch = Instant::now();
            monitor.watch().unwrap();
        }
        let asked = asked.lock().unwrap();
        let woken: Vec<usize> = (0..asked.len()).filter(|at| asked[*at] == WAKE).collect();
        assert_eq!(woken, [asleep.len()], "only after so many looks in a row");
        assert_eq!(asked.len(), asleep.len() + 2);
    }

    #[test]
    fn a_processor_is_not_asked_all_the_time() {
        let (mut monitor, asked) = answering(vec!["IRR\t (none)\r\n".to_owned(); 2]);
        monitor.watch().unwrap();
        monitor.watch().unwrap();
        assert_eq!(asked.lock().unwrap().len(), 1);
    }
}
