//! A copy of the tree in which one mutation after the other is put in, built and tested.

use super::list::Mutation;
use crate::cache::workspace;
use crate::children::end_with_this_process;
use crate::crate_tests::{self, verdicts};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A mutation can make a test go on for ever: ten times what the slowest of them takes.
const TEST_LIMIT: Duration = Duration::from_secs(120);
const BUILD_LIMIT: Duration = Duration::from_secs(1200);
/// Or ask for memory without end: KiB of address space for each process.
const MEMORY_LIMIT: u64 = 8 << 20;
/// How the line of a test that failed ends. One is enough.
const FAILED: &str = " ... FAILED";

#[derive(Debug, Clone)]
pub enum Verdict {
    /// By these tests.
    Killed(Vec<String>),
    Survived,
}

/// The copy, with a target folder beside it.
pub struct Lane {
    tree: PathBuf,
    target: PathBuf,
}

impl Lane {
    /// Brings the copy up to date: only files that changed are written, so that what was built before is of use.
    pub fn new(folder: &Path) -> Result<Self> {
        let lane = Self { tree: folder.join("tree"), target: folder.join("target") };
        std::fs::create_dir_all(&lane.tree).with_context(|| format!("cannot create {}", lane.tree.display()))?;
        let listed = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(workspace())
            .output()
            .context("cannot run git")?;
        ensure!(listed.status.success(), "git does not list the tree's files");
        let text = String::from_utf8(listed.stdout)?;
        let names: Vec<&str> = text.split_terminator('\0').collect();
        lane.remove_others(&names)?;
        for name in names {
            // A file that was removed and not yet committed is still listed.
            if let Ok(content) = std::fs::read(workspace().join(name)) {
                lane.write(name, &content)?;
            }
        }
        Ok(lane)
    }

    /// What an earlier tree had, or a test that failed left behind.
    fn remove_others(&self, names: &[&str]) -> Result<()> {
        let mut folders = vec![self.tree.clone()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder)? {
                let path = entry?.path();
                let name = path.strip_prefix(&self.tree)?.to_string_lossy().into_owned();
                if path.is_dir() {
                    folders.push(path);
                } else if !names.contains(&name.as_str()) {
                    std::fs::remove_file(&path)?;
                }
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let file = self.tree.join(name);
        if std::fs::read(&file).is_ok_and(|before| before == content) {
            return Ok(());
        }
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))
    }

    /// Puts the mutation in, does the work, and takes it out again.
    pub fn with<T>(&self, mutation: &Mutation, work: impl FnOnce(&Self) -> Result<T>) -> Result<T> {
        let right = std::fs::read_to_string(self.tree.join(&mutation.file))
            .with_context(|| format!("{}: cannot read {}", mutation.title(), mutation.file))?;
        self.write(&mutation.file, mutation.apply(&right)?.as_bytes())?;
        let result = work(self);
        self.write(&mutation.file, right.as_bytes())?;
        result
    }

    /// Runs the crate's tests until one of them fails.
    ///
    /// # Errors
    /// The mutation does not build, which would say nothing of the tests.
    pub fn crate_tests(&self, mutation: &Mutation) -> Result<Verdict> {
        self.tests_of(&mutation.title(), &["--package", &mutation.package])
    }

    /// Runs the tests of a crate as it is: what fails then would be taken for a mutation that was noticed.
    ///
    /// # Errors
    /// A test fails, or does not end within the limits.
    pub fn unbroken(&self, package: &str) -> Result<()> {
        match self.tests_of(package, &["--package", package])? {
            Verdict::Survived => Ok(()),
            Verdict::Killed(tests) => bail!("{package} fails without any mutation: {}", tests.join(", ")),
        }
    }

    fn tests_of(&self, title: &str, arguments: &[&str]) -> Result<Verdict> {
        let build = ["test", "--no-run", "--quiet", "--message-format=json-render-diagnostics"];
        let Some(built) = self.run(self.cargo(&[&build, arguments].concat()), BUILD_LIMIT, None)? else {
            bail!("{title}: building takes more than {} s", BUILD_LIMIT.as_secs());
        };
        let errors = String::from_utf8_lossy(&built.stderr);
        ensure!(built.status.success(), "{title}: does not build\n{errors}");
        let mut executables = crate_tests::executables(&built.stdout)?;
        // They take longest, and are needed by few.
        executables.sort_by_key(|executable| executable.prefix.ends_with("::models"));
        for executable in executables {
            let mut command = Command::new(&executable.file);
            command.current_dir(&executable.folder).env("CARGO_MANIFEST_DIR", &executable.folder);
            let Some(result) = self.run(command, TEST_LIMIT, Some(FAILED))? else {
                return Ok(Verdict::Killed(vec![format!("{} does not end", executable.prefix)]));
            };
            if !result.status.success() {
                let text = String::from_utf8_lossy(&result.stdout);
                let mut failed: Vec<String> = failures(&text).map(|test| executable.full_name(test)).collect();
                if failed.is_empty() {
                    failed.push(format!("{} ends with {}", executable.prefix, result.status));
                }
                failed.sort();
                return Ok(Verdict::Killed(failed));
            }
        }
        Ok(Verdict::Survived)
    }

    /// The tests of the suite of images that fail, with both of its devices.
    pub fn image_tests(&self) -> Result<Vec<String>> {
        let build = self.cargo(&["build", "--quiet", "--package", "vmm", "--bin", "causeway"]);
        let built = self.run(build, BUILD_LIMIT, None)?.context("building the suite takes too long")?;
        ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let mut failed = Vec::new();
        for (place, options) in [("emulated", &["--device", "edu"][..]), ("vfio_user", &[])] {
            let mut command = Command::new(self.target.join("debug/causeway"));
            command.args(["test", "--timeout", "60"]).args(options).current_dir(&self.tree);
            match self.run(command, BUILD_LIMIT, None)? {
                Some(result) => {
                    let text = String::from_utf8_lossy(&result.stdout).into_owned();
                    failed.extend(failures(&text).map(|test| format!("images::{place}::{test}")));
                }
                None => failed.push(format!("images::{place} does not end")),
            }
        }
        failed.sort();
        Ok(failed)
    }

    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = crate_tests::cargo();
        command.args(arguments).current_dir(&self.tree).env("CARGO_TARGET_DIR", &self.target);
        command
    }

    /// Runs a command with the limits; `None` if it had to be ended. Once a line ends with `enough`, it is ended, too,
    /// and what it would have said after that is not known.
    fn run(&self, command: Command, limit: Duration, enough: Option<&'static str>) -> Result<Option<Output>> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("ulimit -c 0; ulimit -v {MEMORY_LIMIT}; exec \"$@\""), "sh"]);
        limited.arg(command.get_program()).args(command.get_args()).process_group(0);
        command.get_current_dir().map(|folder| limited.current_dir(folder));
        limited.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        // What fails is not looked at any closer, and does not wait for the tests that take long.
        limited.env("PROPTEST_MAX_SHRINK_ITERS", "0").env("RUST_TEST_THREADS", "8");
        // A mutation that goes on for ever does so no longer than this tool.
        end_with_this_process(&mut limited, libc::SIGKILL);
        let mut child = limited
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        let group = child.id();
        let said_enough = Arc::new(AtomicBool::new(false));
        let reader = |pipe: Option<Box<dyn Read + Send>>| {
            let said_enough = said_enough.clone();
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                for line in pipe.into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n')) {
                    let Ok(mut line) = line else { break };
                    if enough.is_some_and(|enough| line.ends_with(enough.as_bytes())) {
                        said_enough.store(true, Ordering::Relaxed);
                    }
                    line.push(b'\n');
                    bytes.append(&mut line);
                }
                bytes
            })
        };
        let stdout = reader(child.stdout.take().map(|pipe| Box::new(pipe) as Box<_>));
        let stderr = reader(child.stderr.take().map(|pipe| Box::new(pipe) as Box<_>));
        let end = Instant::now() + limit;
        let (mut status, mut in_time) = (None, true);
        while status.is_none() && in_time && !said_enough.load(Ordering::Relaxed) {
            status = child.try_wait()?;
            in_time = Instant::now() < end;
            std::thread::sleep(Duration::from_millis(20));
        }
        // Also what a test that failed started and left behind.
        let _ = Command::new("kill").args(["-KILL", "--", &format!("-{group}")]).stderr(Stdio::null()).status();
        let ended = child.wait()?;
        let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
        let status = status.or_else(|| said_enough.load(Ordering::Relaxed).then_some(ended));
        Ok(status.map(|status| Output { status, stdout, stderr }))
    }
}

fn failures(text: &str) -> impl Iterator<Item = &str> {
    verdicts(text).into_iter().filter(|(_, verdict)| verdict.starts_with("FAILED")).map(|(test, _)| test)
}

/// Another thread panicked while it held a lock.
pub fn poisoned() -> anyhow::Error {
    anyhow!("a lane panicked")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane() -> Lane {
        Lane { tree: PathBuf::from("/"), target: PathBuf::from("/nonexistent") }
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir("/");
        command
    }

    #[test]
    fn a_command_that_does_not_end_is_ended_with_what_it_started() {
        let started = Instant::now();
        let script = "sleep 1000 & sleep 1000";
        assert!(lane().run(shell(script), Duration::from_millis(200), None).unwrap().is_none());
        // The pipes are read to their end, so nothing that holds them is left.
        assert!(started.elapsed() < Duration::from_secs(500));
    }

    #[test]
    fn a_command_that_said_enough_is_ended() {
        let started = Instant::now();
        let script = "echo 'test a ... ok'; echo 'test b ... FAILED'; sleep 1000";
        let output = lane().run(shell(script), Duration::from_secs(600), Some(FAILED)).unwrap().unwrap();
        assert!(!output.status.success() && started.elapsed() < Duration::from_secs(500));
        assert_eq!(failures(&String::from_utf8(output.stdout).unwrap()).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn what_a_command_prints_and_its_status_come_back() {
        let output =
            lane().run(shell("echo out; echo err >&2; exit 3"), Duration::from_secs(60), Some("ou")).unwrap().unwrap();
        assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(output.status.code(), Some(3));
    }

    #[test]
    fn tests_that_fail_are_read_from_both_kinds_of_output() {
        let text = "test a ... ok\ntest b ... FAILED\ntest c ... FAILED (timeout)\ntest d ... skipped: why\n";
        let mut failed: Vec<&str> = failures(text).collect();
        failed.sort_unstable();
        assert_eq!(failed, ["b", "c"]);
    }
}
