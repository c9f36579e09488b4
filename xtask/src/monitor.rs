//! Asks a QEMU that does not end what its processor is doing.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

/// How long QEMU has for an answer: it has none while its main loop is stuck.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const PROMPT: &str = "(qemu) ";
/// How often, and how far apart, one looks where the processor is.
const LOOKS: usize = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// QEMU's own monitor, as its standard input.
pub struct Monitor(UnixStream);

impl Monitor {
    pub fn attach(command: &mut Command) -> std::io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(ANSWER_LIMIT))?;
        ours.set_write_timeout(Some(ANSWER_LIMIT))?;
        command.stdin(OwnedFd::from(theirs));
        command.args(["-chardev", "socket,id=monitor,fd=0", "-mon", "chardev=monitor,mode=readline"]);
        Ok(Self(ours))
    }

    /// The processor's registers, and where it was at several moments after that.
    pub fn processor(&mut self) -> String {
        let mut text = String::new();
        let mut look = || -> std::io::Result<()> {
            self.until_prompt()?;
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
        writeln!(self.0, "{question}")?;
        let answer = self.until_prompt()?;
        // The first line is the question, as a terminal would show it.
        Ok(answer.split_once('\n').map_or_else(String::new, |(_, rest)| rest.replace('\r', "")))
    }

    fn until_prompt(&mut self) -> std::io::Result<String> {
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while !answer.ends_with(PROMPT.as_bytes()) {
            match self.0.read(&mut buffer)? {
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

    /// A monitor that greets, repeats each question, and answers it.
    fn answering(answers: usize) -> Monitor {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        std::thread::spawn(move || {
            let _ = write!(theirs, "QEMU 10.0.2 monitor\r\n{PROMPT}");
            for number in 0..answers {
                let mut question = Vec::new();
                while question.last() != Some(&b'\n') {
                    let mut byte = [0];
                    theirs.read_exact(&mut byte).unwrap();
                    question.push(byte[0]);
                }
                let question = String::from_utf8(question).unwrap();
                write!(theirs, "{}\r\nCPU#0\r\nRIP={number} of {question}{PROMPT}", question.trim()).unwrap();
            }
            // Silent, but there.
            let _ = theirs.read(&mut [0]);
        });
        Monitor(ours)
    }

    #[test]
    fn a_processor_is_looked_at_again_and_again() {
        let text = answering(LOOKS + 2).processor();
        assert_eq!(text.matches("RIP=").count(), LOOKS + 2, "{text}");
        assert!(text.starts_with("CPU#0\nRIP=0 of info registers"), "{text}");
        assert!(text.contains(&format!("RIP={} of info lapic", LOOKS + 1)), "{text}");
    }

    #[test]
    fn a_monitor_that_does_not_answer_is_said() {
        let text = answering(1).processor();
        assert!(text.contains("RIP=0 of") && text.contains("does not answer"), "{text}");
    }
}
