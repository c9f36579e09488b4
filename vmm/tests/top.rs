//! `causeway ctl PATH top` as a user sees it: at a terminal, which is as it was after every end, and where there is
//! none. The machine is played by the tests.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;

/// What nothing here takes nearly as long as.
const LONG: Duration = Duration::from_secs(60);

fn causeway(socket: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_causeway"));
    command.args(["ctl", socket.to_str().unwrap(), "top"]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn moment(number: u64) -> Value {
    json!({"version": 1, "state": "running", "wall_ms": 1000 * number, "guest_resets": 0,
        "devices": [{"id": "vfio0", "kind": "vfio", "addr": "00:01.0", "backend": "type1",
            "host_maps": 40 * number, "host_unmaps": 2 * number, "live_extents": 3, "live_bytes": 12288,
            "refused_maps": {"limit": 0}, "splits": 0}],
        "units": [{"id": "vtd0", "descriptors": {"iotlb": 9 * number}, "faults": {}, "map_ops": 1, "unmap_ops": 1}],
        "spaces": [{"space": "unit0/domain2/root0x1000/48bit", "members": ["vfio0"], "mappings": 3}],
        "attached": {"vfio0": "unit0/domain2/root0x1000/48bit"}})
}

/// A machine that replies as often as it is told to, and hands its connection on then.
fn machine(replies: u64) -> (TempDir, PathBuf, Receiver<UnixStream>) {
    let dir = TempDir::new().unwrap();
    let socket = dir.as_path().join("control");
    let listener = UnixListener::bind(&socket).unwrap();
    let (over, is_over): (Sender<UnixStream>, _) = channel();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        for number in 1..=replies {
            let Some(Ok(line)) = lines.next() else { return };
            assert_eq!(line, "{\"verb\":\"top\"}");
            if writeln!(&stream, "{}", json!({"ok": moment(number)})).is_err() {
                return;
            }
        }
        let _ = over.send(stream);
    });
    (dir, socket, is_over)
}

/// Both ends of a terminal.
struct Pty {
    keys: File,
    terminal: OwnedFd,
    seen: String,
}

impl Pty {
    fn new() -> Self {
        let (mut keys, mut terminal) = (-1, -1);
        let none = std::ptr::null_mut();
        let size = libc::winsize { ws_row: 24, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the call writes two descriptors into variables of ours, and reads the size; the rest may be null.
        let made = unsafe { libc::openpty(&raw mut keys, &raw mut terminal, none, none.cast(), &raw const size) };
        assert_eq!(made, 0);
        for fd in [keys, terminal] {
            // SAFETY: the call takes numbers.
            assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
        }
        // SAFETY: openpty made these descriptors just now, nobody else has them.
        let (keys, terminal) = unsafe { (File::from_raw_fd(keys), OwnedFd::from_raw_fd(terminal)) };
        Self { keys, terminal, seen: String::new() }
    }

    /// Starts `command` as the leader of a session with this terminal.
    fn spawn(&self, command: &mut Command) -> Child {
        let end = || Stdio::from(self.terminal.try_clone().unwrap());
        command.stdin(end()).stdout(end());
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
        command.spawn().unwrap()
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

    /// Reads until `part` was on the screen.
    fn shows(&mut self, part: &str) {
        let start = Instant::now();
        while !self.seen.contains(part) {
            assert!(start.elapsed() < LONG, "{part} is not shown: {}", self.seen);
            let mut poll = libc::pollfd { fd: self.keys.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: `poll` is the one structure that the call is told of.
            if unsafe { libc::poll(&raw mut poll, 1, 1000) } == 1 {
                let mut bytes = [0; 4096];
                let count = self.keys.read(&mut bytes).unwrap();
                self.seen += &String::from_utf8_lossy(&bytes[..count]);
            }
        }
    }
}

/// Its code, or the negative number of the signal that ended it; and what it said.
fn end(mut child: Child, pty: &mut Pty) -> (i32, String) {
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() > LONG => {
                let _ = child.kill();
                panic!("it did not end");
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    // It left its screen, and the cursor is there.
    pty.shows("\x1b[?1049l");
    pty.shows("\x1b[?25h");
    let mut said = String::new();
    child.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
    (status.code().unwrap_or_else(|| -status.signal().unwrap_or(0)), said)
}

#[test]
fn top_is_one_picture_as_text_where_no_terminal_is_or_once_is_said() {
    for more in [&[][..], &["--once"]] {
        let (_dir, socket, _over) = machine(2);
        let output = causeway(&socket, more).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        assert!(text.contains("host operations 42/s  invalidations 9/s"), "{text}");
        assert!(text.lines().any(|line| line.starts_with("vfio0") && line.contains("12.0K")), "{text}");
        assert!(!text.contains('\x1b') && !text.contains("q leaves"), "{text}");
    }
    // A machine that knows no such verb, and none at all.
    let dir = TempDir::new().unwrap();
    let socket = dir.as_path().join("control");
    let listener = UnixListener::bind(&socket).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"{\"error\":\"unknown variant `top`\"}\n").unwrap();
        // Until it has gone.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let output = causeway(&socket, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    server.join().unwrap();
    assert_eq!(causeway(&socket, &[]).output().unwrap().status.code(), Some(4));
}

#[test]
fn top_draws_anew_until_a_key_and_the_terminal_is_as_it_was() {
    let (_dir, socket, _over) = machine(1000);
    let mut pty = Pty::new();
    let before = pty.modes();
    let child = pty.spawn(&mut causeway(&socket, &[]));
    pty.shows("\x1b[?1049h");
    pty.shows("vfio0");
    // Of the second moment: nothing but what changed is drawn.
    pty.shows("42");
    assert_ne!(pty.modes(), before, "the terminal is not raw");
    pty.keys.write_all(b"xq").unwrap();
    assert_eq!(end(child, &mut pty), (0, String::new()));
    assert_eq!(pty.modes(), before);
}

#[test]
fn top_puts_the_terminal_back_at_signals_and_when_the_machine_goes() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let (_dir, socket, _over) = machine(1000);
        let mut pty = Pty::new();
        let before = pty.modes();
        let child = pty.spawn(&mut causeway(&socket, &[]));
        pty.shows("vfio0");
        // SAFETY: the call takes two numbers; the child was not waited for, so the number is still its.
        assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
        assert_eq!(end(child, &mut pty).0, -signal);
        assert_eq!(pty.modes(), before, "{signal}");
    }
    let (_dir, socket, over) = machine(1);
    let mut pty = Pty::new();
    let before = pty.modes();
    let child = pty.spawn(&mut causeway(&socket, &[]));
    pty.shows("vfio0");
    drop(over.recv_timeout(LONG).unwrap());
    let (code, said) = end(child, &mut pty);
    assert_eq!((code, pty.modes()), (4, before), "{said}");
    assert!(said.contains("no machine replies at"), "{said}");
}

#[test]
fn top_can_be_left_while_the_machine_is_busy_and_says_that_it_is() {
    let (_dir, socket, over) = machine(1);
    let mut pty = Pty::new();
    let child = pty.spawn(&mut causeway(&socket, &[]));
    pty.shows("vfio0");
    let mut stream = over.recv_timeout(LONG).unwrap();
    // Blanks are not drawn.
    pty.shows("busy");
    pty.keys.write_all(b"q").unwrap();
    assert_eq!(end(child, &mut pty).0, 0);
    // It asked once more, and no second time meanwhile.
    stream.set_nonblocking(true).unwrap();
    let mut asked = String::new();
    if let Err(e) = stream.read_to_string(&mut asked) {
        assert_eq!(e.kind(), ErrorKind::ConnectionReset);
    }
    assert!(asked.lines().count() <= 1, "{asked}");
}
