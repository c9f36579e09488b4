//! The console as a user sees it: readers that do not read, terminals, jobs. All of it needs /dev/kvm; what has none
//! says so.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use vmm_sys_util::tempfile::TempFile;

mod rig;

use rig::{has_kvm, image};

/// What nothing here takes nearly as long as.
const LONG: Duration = Duration::from_secs(60);
/// `mov al, 'A'; mov dx, 0x3f8; out dx, al; jmp .`
const PRINT_AND_LOOP: &[u8] = &[0xb0, b'A', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfe];
/// `mov ax, 0x3400; mov dx, 0x604; out dx, ax; jmp .`: SLP_EN and the sleep type of S5.
const POWER_OFF: &[u8] = &[0x66, 0xb8, 0x00, 0x34, 0x66, 0xba, 0x04, 0x06, 0x66, 0xef, 0xeb, 0xfe];
/// For [`prints`]: 2^32 times, which is for ever.
const FOR_EVER: u32 = 0;

/// What a guest prints again and again.
fn page() -> Vec<u8> {
    (0..4096u32).map(|at| ((at * 7) >> 4) as u8).collect()
}

/// A guest that writes to port 0x80, where nothing is, prints [`page`] so often, and then powers off.
fn prints(times: u32) -> TempFile {
    let data = 0x10_0020u32 + 27 + POWER_OFF.len() as u32;
    let mut code = vec![0xe6, 0x80, 0xbb]; // out 0x80, al; mov ebx, times
    code.extend(times.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xfc, 0xbe]); // mov dx, 0x3f8; cld; mov esi, data
    code.extend(data.to_le_bytes());
    code.push(0xb9); // mov ecx, 4096
    code.extend(4096u32.to_le_bytes());
    code.extend([0xf3, 0x6e, 0x4b, 0x75, 0xf1]); // rep outsb; dec ebx; jnz to the load of esi
    assert_eq!(code.len(), 27);
    code.extend(POWER_OFF);
    code.extend(page());
    image(&code)
}

fn run(image: &TempFile, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_causeway"));
    command.args(["run", "--memory", "16M", "--image", image.as_path().to_str().unwrap()]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: the call takes two numbers; the child was not waited for, so the number is still its.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
}

/// A program that does not outlive its test.
struct Program(Child);

impl Deref for Program {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Program {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It fails for one that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Program {
    Program(command.spawn().unwrap())
}

/// Whether `fd` has something to read within [`LONG`].
fn is_ready(fd: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `poll` is the one structure that the call is told of.
    unsafe { libc::poll(&raw mut poll, 1, LONG.as_millis() as i32) == 1 }
}

/// Waits for the end of a child.
fn end(child: &mut Child) -> ExitStatus {
    // SAFETY: the call takes numbers, and gives a new descriptor.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    // SAFETY: pidfd_open made it just now, nobody else has it.
    let process = unsafe { OwnedFd::from_raw_fd(process.try_into().unwrap()) };
    assert!(is_ready(&process), "the program did not end");
    child.wait().unwrap()
}

/// Looks again and again for what another process does without a sign.
fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < LONG, "waited for ever until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Reads lines until one has `part`.
fn hear(stderr: &mut BufReader<ChildStderr>, part: &str) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(!stderr.buffer().is_empty() || is_ready(stderr.get_ref()), "nothing with `{part}` was said");
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended without `{part}`");
        if line.contains(part) {
            return line;
        }
    }
}

fn rest(mut from: impl Read) -> String {
    let mut text = String::new();
    from.read_to_string(&mut text).unwrap();
    text
}

/// A pipe of one page, which is full.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    // SAFETY: the call takes numbers.
    assert_eq!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) }, 4096);
    writer.write_all(&[b'.'; 4096]).unwrap();
    (reader, writer)
}

/// A machine whose stdout nobody reads, and whose guest prints.
fn stalled(command: &mut Command) -> (Program, PipeReader, BufReader<ChildStderr>) {
    let (reader, writer) = full_pipe();
    let mut child = start(command.arg("-vv").stdout(writer));
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    hear(&mut stderr, "write to port 0x80");
    (child, reader, stderr)
}

#[test]
fn a_stdout_that_nobody_reads_holds_up_neither_the_time_limit_nor_a_signal() {
    if !has_kvm() {
        return;
    }
    let guest = prints(FOR_EVER);
    let (mut child, _reader, stderr) = stalled(&mut run(&guest, &["--timeout", "1", "--cpus", "2"]));
    assert_eq!(end(&mut child).code(), Some(10));
    let said = rest(stderr);
    assert!(said.contains("bytes of the guest's output were lost: nobody read them"), "{said}");
    for number in [libc::SIGTERM, libc::SIGINT] {
        let (mut child, _reader, _stderr) = stalled(&mut run(&guest, &[]));
        signal(&child, number);
        assert_eq!(end(&mut child).signal(), Some(number));
    }
}

#[test]
fn a_stderr_that_nobody_reads_holds_up_nothing_either() {
    if !has_kvm() {
        return;
    }
    let guest = prints(FOR_EVER);
    let (_reader, writer) = full_pipe();
    let mut command = run(&guest, &["--timeout", "1", "-vvv"]);
    let mut child = start(command.stdout(writer.try_clone().unwrap()).stderr(writer));
    assert_eq!(end(&mut child).code(), Some(10));
}

#[test]
fn output_that_waits_for_its_reader_does_not_hold_up_a_signal_and_is_said() {
    if !has_kvm() {
        return;
    }
    let guest = prints(2);
    let (mut child, _reader, mut stderr) = stalled(&mut run(&guest, &[]));
    hear(&mut stderr, "8192 bytes of the guest's output wait for a reader");
    signal(&child, libc::SIGTERM);
    hear(&mut stderr, "8192 bytes of the guest's output were lost: nobody read them");
    assert_eq!(end(&mut child).signal(), Some(libc::SIGTERM));
}

#[test]
fn a_reader_that_is_gone_is_said_with_what_it_missed() {
    if !has_kvm() {
        return;
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let guest = prints(3);
    let mut child = start(run(&guest, &[]).stdout(writer));
    assert_eq!(end(&mut child).code(), Some(0));
    let said = rest(child.stderr.take().unwrap());
    assert!(said.contains("12288 bytes of the guest's output were lost: Broken pipe"), "{said}");
}

#[test]
fn output_arrives_whole_whether_stdout_blocks_or_not_and_stays_as_it_is() {
    if !has_kvm() {
        return;
    }
    let guest = prints(3);
    for flag in [0, libc::O_NONBLOCK] {
        let (mut reader, writer) = full_pipe();
        let ours = writer.try_clone().unwrap();
        // SAFETY: these calls take numbers.
        let flags = || unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_GETFL) };
        let before = flags() | flag;
        // SAFETY: as above.
        assert_eq!(unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETFL, before) }, 0);
        let mut child = start(run(&guest, &[]).stdout(writer));
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        hear(&mut stderr, "wait for a reader");
        assert_eq!(flags(), before);
        drop(ours);
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(read.len(), 4 * 4096);
        assert!(read[4096..] == page().repeat(3), "it is not what was printed");
        assert_eq!(end(&mut child).code(), Some(0));
        let said = rest(stderr);
        assert!(!said.contains("lost"), "{said}");
    }
}

/// Both ends of a terminal.
struct Pty {
    keys: File,
    terminal: OwnedFd,
}

impl Pty {
    fn new() -> Self {
        let (mut keys, mut terminal) = (-1, -1);
        let none = std::ptr::null_mut();
        // SAFETY: the call writes two descriptors into variables of ours; the rest may be null.
        let made = unsafe { libc::openpty(&raw mut keys, &raw mut terminal, none, none.cast(), none.cast()) };
        assert_eq!(made, 0);
        for fd in [keys, terminal] {
            // SAFETY: the call takes numbers.
            assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
        }
        // SAFETY: openpty made these descriptors just now, nobody else has them.
        unsafe { Self { keys: File::from_raw_fd(keys), terminal: OwnedFd::from_raw_fd(terminal) } }
    }

    fn end(&self) -> Stdio {
        self.terminal.try_clone().unwrap().into()
    }

    /// Starts `command` as the leader of a session with this terminal, which is its stdin.
    fn spawn(&self, command: &mut Command) -> Program {
        command.stdin(self.end());
        // SAFETY: system calls that touch no memory, between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        start(command)
    }

    fn modes(&self) -> [libc::tcflag_t; 4] {
        let mut settings = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the call fills the structure.
        let settings = unsafe {
            assert_eq!(libc::tcgetattr(self.terminal.as_raw_fd(), settings.as_mut_ptr()), 0);
            settings.assume_init()
        };
        [settings.c_iflag, settings.c_oflag, settings.c_cflag, settings.c_lflag]
    }

    fn is_raw(&self) -> bool {
        self.modes()[3] & (libc::ICANON | libc::ISIG | libc::ECHO) == 0
    }

    fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }
}

/// A machine with a terminal, in whose guest something runs.
fn on_terminal(pty: &Pty, guest: &TempFile) -> Program {
    let mut child = pty.spawn(run(guest, &[]).stdout(Stdio::piped()));
    let mut printed = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut printed).unwrap();
    assert!(pty.is_raw());
    child
}

#[test]
fn keys_are_heard_while_nobody_reads_the_output() {
    if !has_kvm() {
        return;
    }
    let mut pty = Pty::new();
    let (_reader, writer) = full_pipe();
    let guest = prints(FOR_EVER);
    let mut child = pty.spawn(run(&guest, &["-vv"]).stdout(writer));
    hear(&mut BufReader::new(child.stderr.take().unwrap()), "write to port 0x80");
    assert!(pty.is_raw());
    pty.press(b"abc");
    pty.press(b"\x01x");
    assert_eq!(end(&mut child).code(), Some(0));
    assert!(!pty.is_raw());
}

#[test]
fn ctrl_a_x_quits_behind_a_paste_that_the_guest_does_not_read() {
    if !has_kvm() {
        return;
    }
    let guest = image(PRINT_AND_LOOP);
    for pasted in [5000, 3 << 20] {
        let mut pty = Pty::new();
        let before = pty.modes();
        let mut child = on_terminal(&pty, &guest);
        pty.press(&vec![b'a'; pasted]);
        pty.press(b"\x01x");
        assert_eq!(end(&mut child).code(), Some(0));
        assert_eq!(pty.modes(), before);
        // The guest's port has 64 bytes and we 1 MiB.
        let lost = pasted.saturating_sub(64 + (1 << 20));
        let said = rest(child.stderr.take().unwrap());
        let says_so = said.contains(&format!("{lost} bytes that were typed were lost"));
        assert_eq!(says_so, lost > 0, "{said}");
    }
}

#[test]
fn the_terminal_is_as_it_was_after_every_end() {
    if !has_kvm() {
        return;
    }
    let guest = image(PRINT_AND_LOOP);
    for number in [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGABRT,
        libc::SIGBUS,
        libc::SIGSEGV,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGXCPU,
    ] {
        let pty = Pty::new();
        let before = pty.modes();
        let mut child = on_terminal(&pty, &guest);
        signal(&child, number);
        let status = end(&mut child);
        assert_eq!(status.signal(), Some(number), "{status}: {}", rest(child.stderr.take().unwrap()));
        assert_eq!(pty.modes(), before, "after signal {number}");
    }
}

#[test]
fn a_stop_gives_the_terminal_back_until_the_machine_goes_on() {
    if !has_kvm() {
        return;
    }
    let mut pty = Pty::new();
    let before = pty.modes();
    let guest = image(PRINT_AND_LOOP);
    let mut child = on_terminal(&pty, &guest);
    for _ in 0..2 {
        signal(&child, libc::SIGTSTP);
        let mut status = 0;
        let pid = child.id().cast_signed();
        // SAFETY: `status` is ours.
        until("it stops", || unsafe { libc::waitpid(pid, &raw mut status, libc::WUNTRACED | libc::WNOHANG) } != 0);
        assert!(libc::WIFSTOPPED(status), "{status}");
        assert_eq!(pty.modes(), before);
        signal(&child, libc::SIGCONT);
        until("the terminal is raw again", || pty.is_raw());
    }
    pty.press(b"\x01x");
    assert_eq!(end(&mut child).code(), Some(0));
    assert_eq!(pty.modes(), before);
}

#[test]
fn a_background_job_runs_on_whatever_is_typed_at_the_shell() {
    if !has_kvm() {
        return;
    }
    let mut pty = Pty::new();
    let before = pty.modes();
    let script = r#"set -m
        "$0" run --memory 16M --image "$1" --timeout 3 &
        read -r line && echo "the shell read $line" >&2
        wait $!
        echo "status $?" >&2"#;
    let guest = image(PRINT_AND_LOOP);
    let mut shell = Command::new("sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_causeway"), guest.as_path().to_str().unwrap()]);
    let mut shell = pty.spawn(shell.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut printed = [0];
    shell.stdout.as_mut().unwrap().read_exact(&mut printed).unwrap();
    assert_eq!(pty.modes(), before);
    pty.press(b"ls\n");
    let mut stderr = BufReader::new(shell.stderr.take().unwrap());
    hear(&mut stderr, "the shell read ls");
    hear(&mut stderr, "status 10");
    assert!(end(&mut shell).success());
    assert_eq!(pty.modes(), before);
}

#[test]
fn a_background_job_that_comes_to_the_foreground_takes_the_terminal() {
    if !has_kvm() {
        return;
    }
    let mut pty = Pty::new();
    let before = pty.modes();
    let script = r#"set -m
        "$0" run --memory 16M --image "$1" --timeout 60 &
        read -r line
        fg
        echo "status $?" >&2"#;
    let guest = image(PRINT_AND_LOOP);
    let mut shell = Command::new("sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_causeway"), guest.as_path().to_str().unwrap()]);
    let mut shell = pty.spawn(shell.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut printed = [0];
    shell.stdout.as_mut().unwrap().read_exact(&mut printed).unwrap();
    pty.press(b"now\n");
    until("the terminal is raw", || pty.is_raw());
    pty.press(b"\x01x");
    hear(&mut BufReader::new(shell.stderr.take().unwrap()), "status 0");
    assert!(end(&mut shell).success());
    assert_eq!(pty.modes(), before);
}
