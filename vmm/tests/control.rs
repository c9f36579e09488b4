//! `causeway run --socket` and `causeway ctl`, as a user sees them. What needs /dev/kvm says so where there is none.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

mod command;
mod rig;

use command::{causeway, said, text};
use rig::{has_kvm, image};

/// In 32-bit code: `mov al, 'A'; mov dx, 0x3f8; out dx, al`
const PRINT_A: &[u8] = &[0xb0, b'A', 0x66, 0xba, 0xf8, 0x03, 0xee];
/// `mov dx, 0x3fd; in al, dx; test al, 1; jz -9; mov dx, 0x3f8; in al, dx; out dx, al; jmp -17`: prints what is typed.
const ECHO: &[u8] =
    &[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7, 0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xef];
/// `mov ax, 0x100; mov dx, 0x602; out dx, ax`: the power button is enabled. Then, until its status is set,
/// `mov dx, 0x600; in ax, dx; test ah, 1; jz -11`
const WAIT_FOR_POWER_BUTTON: &[u8] = &[
    0x66, 0xb8, 0x00, 0x01, 0x66, 0xba, 0x02, 0x06, 0x66, 0xef, 0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01,
    0x74, 0xf5,
];
/// `mov ax, 0x3400; mov dx, 0x604; out dx, ax; jmp .`
const POWER_OFF: &[u8] = &[0x66, 0xb8, 0x00, 0x34, 0x66, 0xba, 0x04, 0x06, 0x66, 0xef, 0xeb, 0xfe];

/// Code, reply and message of `causeway ctl`.
fn ctl(socket: &Path, verb: &str) -> (i32, String, String) {
    said(causeway(&["ctl", text(socket), verb]).output().unwrap())
}

/// The object of a verb that is done.
fn done(socket: &Path, verb: &str) -> Value {
    let (code, reply, message) = ctl(socket, verb);
    assert_eq!((code, reply.lines().count(), message.as_str()), (0, 1, ""), "{verb}: {reply}");
    serde_json::from_str(&reply).unwrap()
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: the call takes two numbers; the child was not waited for, so the number is still its.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
}

/// Its code, or the negative number of the signal that ended it; and what it said.
fn end(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    let code = output.status.code().unwrap_or_else(|| -output.status.signal().unwrap_or(0));
    (code, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A machine with a control socket, whose guest has printed its `A`.
struct Machine {
    child: Child,
    socket: PathBuf,
    dir: TempDir,
    _image: TempFile,
}

impl Machine {
    fn start(code: &[&[u8]], more: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.as_path().join("control");
        let image = image(&code.concat());
        let mut args = vec!["run", "--image", text(image.as_path()), "--memory", "16M", "--socket", text(&socket)];
        // A test that fails leaves nothing running, and one that waits in vain ends.
        args.extend_from_slice(&["--timeout", "60"]);
        args.extend_from_slice(more);
        let child = causeway(&args).stdin(Stdio::piped()).spawn().unwrap();
        let mut machine = Self { child, socket, dir, _image: image };
        assert_eq!(machine.read(), b'A');
        machine
    }

    fn read(&mut self) -> u8 {
        let mut byte = [0];
        self.child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        byte[0]
    }

    fn type_in(&mut self, byte: u8) {
        self.child.stdin.as_mut().unwrap().write_all(&[byte]).unwrap();
    }

    /// Whether the guest has printed something that was not read.
    fn has_printed(&self) -> bool {
        let fd = self.child.stdout.as_ref().unwrap().as_raw_fd();
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: the call is told of this one structure.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Ends it by `quit`; what it said.
    fn quit(self) -> String {
        assert_eq!(done(&self.socket, "quit"), json!({"quit": true}));
        let (code, said) = end(self.child);
        assert_eq!(code, 0, "{said}");
        assert_eq!(fs::read_dir(self.dir.as_path()).unwrap().count(), 0, "something is left behind");
        said
    }
}

/// One request over a connection of its own, and its reply.
fn ask(mut stream: UnixStream, request: &[u8]) -> Value {
    // One that is refused may be closed already.
    let _ = stream.write_all(request);
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"))
}

const STATUS: &[u8] = b"{\"verb\":\"status\"}\n";

#[test]
fn control_a_paused_guest_stands_still_and_runs_on() {
    if !has_kvm() {
        return;
    }
    // An assigned function, so that an audit has something to compare.
    let dir = TempDir::new().unwrap();
    let function = dir.as_path().join("edu");
    let mut device = causeway(&["device", "edu", "--socket", text(&function)]).spawn().unwrap();
    let mut served = String::new();
    BufReader::new(device.stderr.as_mut().unwrap()).read_line(&mut served).unwrap();
    assert!(served.contains("edu is served at"), "{served}");
    let option = format!("vfio-user,socket={}", function.display());
    let mut machine = Machine::start(&[PRINT_A, ECHO], &["--device", &option, "--cpus", "2", "--iommu", "vtd"]);
    let socket = machine.socket.clone();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let status = done(&socket, "status");
    assert_eq!((&status["state"], &status["exit"], &status["version"]), (&json!("running"), &Value::Null, &json!(1)));
    assert_eq!(status["audit"], json!({"checked": 0, "pending": 0, "differences": []}));
    assert_eq!(done(&socket, "devices"), json!({"devices": status["devices"]}));
    assert_eq!(status["devices"][0]["kind"], "vfio-user");
    machine.type_in(b'x');
    assert_eq!(machine.read(), b'x');
    // Twice is as good as once.
    for _ in 0..2 {
        assert_eq!(done(&socket, "pause"), json!({"state": "paused"}));
    }
    machine.type_in(b'y');
    for _ in 0..5 {
        let status = done(&socket, "status");
        assert_eq!(status["state"], "paused");
        let audit = done(&socket, "audit");
        assert_eq!(audit["differences"], json!([]));
        assert!(audit["checked"].as_u64() > Some(0), "{audit}");
        assert_eq!(done(&socket, "status")["audit"], audit);
        assert!(!machine.has_printed(), "a paused guest prints");
    }
    for _ in 0..2 {
        assert_eq!(done(&socket, "resume"), json!({"state": "running"}));
    }
    assert_eq!(machine.read(), b'y');
    let said = machine.quit();
    assert!(!said.contains("error"), "{said}");
    signal(&device, libc::SIGTERM);
    assert_eq!(end(device).0, -libc::SIGTERM);
}

#[test]
fn control_a_reset_boots_the_guest_again_and_leaves_a_paused_one_paused() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::start(&[PRINT_A, ECHO], &["--device", "edu"]);
    let socket = machine.socket.clone();
    assert_eq!(done(&socket, "reset"), json!({"state": "running"}));
    assert_eq!(machine.read(), b'A');
    done(&socket, "pause");
    assert_eq!(done(&socket, "reset"), json!({"state": "paused"}));
    let status = done(&socket, "status");
    assert_eq!((&status["state"], &status["guest_resets"]), (&json!("paused"), &json!(2)));
    assert!(!machine.has_printed(), "a paused guest boots");
    done(&socket, "resume");
    assert_eq!(machine.read(), b'A');
    machine.quit();

    let machine = Machine::start(&[PRINT_A, ECHO], &["--no-reboot"]);
    let (code, reply, message) = ctl(&machine.socket, "reset");
    assert_eq!((code, reply.as_str()), (1, ""));
    assert!(message.contains("--no-reboot, which forbids a reset: start it without"), "{message}");
    assert_eq!(done(&machine.socket, "status")["guest_resets"], 0);
    machine.quit();
}

#[test]
fn control_the_power_button_is_there_for_a_running_and_for_a_paused_guest() {
    if !has_kvm() {
        return;
    }
    for paused in [false, true] {
        let machine = Machine::start(&[PRINT_A, WAIT_FOR_POWER_BUTTON, POWER_OFF], &[]);
        if paused {
            done(&machine.socket, "pause");
            assert_eq!(done(&machine.socket, "power-button"), json!({"state": "paused"}));
            assert_eq!(done(&machine.socket, "resume"), json!({"state": "running"}));
        } else {
            assert_eq!(done(&machine.socket, "power-button"), json!({"state": "running"}));
        }
        assert_eq!(end(machine.child).0, 0);
        assert!(!machine.socket.exists());
    }
}

#[test]
fn control_a_trace_comes_to_its_file_and_is_refused_where_there_is_none() {
    if !has_kvm() {
        return;
    }
    let traced = TempDir::new().unwrap();
    let file = traced.as_path().join("trace");
    let machine = Machine::start(&[PRINT_A, ECHO], &["--trace", text(&file)]);
    assert_eq!(fs::read(&file).unwrap(), b"", "the trace is flushed by something else");
    assert_eq!(done(&machine.socket, "trace"), json!({"trace": text(&file)}));
    let trace = fs::read_to_string(&file).unwrap();
    assert!(trace.contains("host memory gpa=") && trace.ends_with('\n'), "{trace}");
    machine.quit();

    let machine = Machine::start(&[PRINT_A, ECHO], &[]);
    let (code, reply, message) = ctl(&machine.socket, "trace");
    assert_eq!((code, reply.as_str()), (1, ""));
    assert!(message.contains("start it with --trace FILE"), "{message}");
    machine.quit();
}

#[test]
fn control_whoever_asks_in_vain_has_a_code_and_a_message_and_no_reply() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name);
    drop(UnixListener::bind(at("stale")).unwrap());
    fs::write(at("file"), "").unwrap();
    let long = at(&"x".repeat(120));
    for (path, verb, code, part) in [
        (at("none"), "status", 4, "no machine replies at"),
        (at("stale"), "status", 4, "no machine replies at"),
        (at("file"), "quit", 4, "no machine replies at"),
        (long, "status", 2, "use a shorter path"),
        (at("none"), "fly", 2, "power-button"),
    ] {
        let (found, reply, message) = ctl(&path, verb);
        assert_eq!((found, reply.as_str()), (code, ""), "{message}");
        assert!(message.contains(part), "{message}");
    }
    for args in [&["ctl"][..], &["ctl", "x"], &["ctl", "x", "status", "now"], &["ctl", "x", "status", "--now"]] {
        assert_eq!(causeway(args).output().unwrap().status.code(), Some(2), "{args:?}");
    }
    // Somebody else is there: one who ends, and one who says something else.
    for (said, part) in [(&b""[..], "it ended before it replied"), (b"220 mail\r\n", "speaks something else")] {
        let path = at(&format!("other-{}", said.len()));
        let listener = UnixListener::bind(&path).unwrap();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            BufReader::new(&stream).read_line(&mut String::new()).unwrap();
            stream.write_all(said).unwrap();
        });
        let (code, reply, message) = ctl(&path, "status");
        assert_eq!((code, reply.as_str()), (4, ""), "{message}");
        assert!(message.contains(part), "{message}");
        other.join().unwrap();
    }
}

#[test]
fn control_a_path_that_cannot_be_had_is_code_2_before_anything_else() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.as_path().join(name);
    let _live = UnixListener::bind(at("live")).unwrap();
    fs::write(at("file"), "mine").unwrap();
    let long = at(&"x".repeat(120));
    for (path, part) in [
        (at("live"), "another process has a socket there"),
        (at("file"), "a file that is no socket is there; remove it, or use another path"),
        (at("none").join("control"), "use a path in a folder that is there"),
        (long, "use a shorter one"),
    ] {
        // The kernel that is not there would be the next to be said.
        let run = causeway(&["run", "--kernel", "/nonexistent/kernel", "--socket", text(&path)]).spawn().unwrap();
        let (code, message) = end(run);
        assert_eq!((code, message.lines().count()), (2, 1), "{message}");
        assert!(message.contains(part) && message.contains(text(&path)), "{message}");
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"mine");
    // A start that is refused later leaves none behind.
    let run = causeway(&["run", "--kernel", "/nonexistent/kernel", "--socket", text(&at("new"))]).spawn().unwrap();
    assert_eq!(end(run).0, 4);
    assert!(!at("new").exists());
}

#[test]
fn control_the_file_goes_with_the_machine_whatever_ends_it_and_what_a_kill_leaves_is_replaced() {
    if !has_kvm() {
        return;
    }
    let image = image(&[PRINT_A, ECHO].concat());
    let dir = TempDir::new().unwrap();
    let socket = dir.as_path().join("control");
    let start = |limit: &str| {
        let mut args = vec!["run", "--image", text(image.as_path()), "--memory", "16M", "--socket", text(&socket)];
        args.extend_from_slice(&["--timeout", limit]);
        let mut child = causeway(&args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        child
    };
    let machine = start("60");
    signal(&machine, libc::SIGKILL);
    assert_eq!(end(machine).0, -libc::SIGKILL);
    assert!(socket.exists());
    assert_eq!(ctl(&socket, "status").0, 4);
    for number in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // Also while it is paused.
        let machine = start("60");
        done(&socket, "pause");
        signal(&machine, number);
        assert_eq!(end(machine).0, -number);
        assert!(!socket.exists());
    }
    // The time limit holds for a paused guest.
    let machine = start("5");
    done(&socket, "pause");
    assert_eq!(end(machine).0, 10);
    assert!(!socket.exists());
    // What came into its place is not ours.
    let machine = start("60");
    let ours = fs::metadata(&socket).unwrap().ino();
    fs::remove_file(&socket).unwrap();
    fs::write(dir.as_path().join("other"), "theirs").unwrap();
    fs::rename(dir.as_path().join("other"), &socket).unwrap();
    assert_ne!(fs::metadata(&socket).unwrap().ino(), ours);
    signal(&machine, libc::SIGTERM);
    assert_eq!(end(machine).0, -libc::SIGTERM);
    assert_eq!(fs::read(&socket).unwrap(), b"theirs");
}

#[test]
fn control_a_signal_during_the_start_takes_the_socket_away() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (socket, device) = (dir.as_path().join("control"), dir.as_path().join("device"));
    let listener = UnixListener::bind(&device).unwrap();
    let device = format!("vfio-user,socket={}", device.display());
    let image = image(ECHO);
    let run = ["run", "--image", text(image.as_path()), "--device", &device, "--socket", text(&socket)];
    let machine = causeway(&run).spawn().unwrap();
    // The device does not answer, so the start waits.
    let (mut stream, _) = listener.accept().unwrap();
    stream.read_exact(&mut [0; 16]).unwrap();
    assert!(socket.exists());
    signal(&machine, libc::SIGTERM);
    let (code, said) = end(machine);
    assert_eq!(code, -libc::SIGTERM, "{said}");
    assert!(!socket.exists());
}

#[test]
fn control_a_thousand_clients_with_requests_and_garbage_beside_a_hundred_that_are_silent() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::start(&[PRINT_A, ECHO], &[]);
    let mut silent: Vec<UnixStream> = (0..100).map(|_| machine.connect()).collect();
    // Those that are taken hear nothing, the others that there are too many.
    let mut refused = silent.split_off(16);
    for stream in &mut refused {
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        assert!(reply.contains("too many clients") && reply.lines().count() == 1, "{reply}");
    }
    let (code, _, message) = ctl(&machine.socket, "status");
    assert_eq!(code, 1);
    assert!(message.contains("too many clients"), "{message}");
    // Places for four at a time, who all come at once.
    silent.truncate(12);
    let threads: Vec<_> = (0..4usize)
        .map(|thread| {
            let socket = machine.socket.clone();
            std::thread::spawn(move || {
                let mut served = 0;
                for number in 0..250 {
                    let stream = UnixStream::connect(&socket).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                    match (number + thread) % 4 {
                        0 => drop(stream),
                        1 => {
                            let reply = ask(stream, b"\xff\x00 {] garbage\n");
                            assert!(reply["error"].is_string(), "{reply}");
                        }
                        2 => {
                            let reply = ask(stream, b"{\"verb\":\"quit\",\"really\":true}\n");
                            assert!(reply["error"].is_string(), "{reply}");
                        }
                        _ => {
                            // One that left just now may have its place still.
                            let reply = ask(stream, STATUS);
                            let is_served = reply["ok"]["state"] == "running";
                            assert!(
                                is_served || reply["error"].as_str().unwrap().contains("too many clients"),
                                "{reply}"
                            );
                            served += usize::from(is_served);
                        }
                    }
                }
                served
            })
        })
        .collect();
    let served: usize = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert!(served > 0, "nobody was served");
    // Nothing changed, and those that were silent are clients still.
    for stream in silent.drain(..) {
        assert_eq!(ask(stream, STATUS)["ok"]["state"], "running");
    }
    machine.type_in(b'x');
    assert_eq!(machine.read(), b'x');
    machine.quit();
}

#[test]
fn control_who_never_reads_or_never_ends_a_line_is_cut_off_and_the_machine_runs() {
    if !has_kvm() {
        return;
    }
    let mut machine = Machine::start(&[PRINT_A, ECHO], &[]);
    let mut deaf = machine.connect();
    deaf.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    let requests = STATUS.repeat(100);
    // Its replies are longer than its requests: it is cut off before it could send all that.
    let failed = (0..200).find_map(|_| deaf.write_all(&requests).err()).expect("it is never cut off");
    assert!(matches!(failed.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{failed}");

    let mut endless = machine.connect();
    let failed = (0..1000).find_map(|_| endless.write_all(&[b'a'; 1000]).err()).expect("it is never cut off");
    assert!(matches!(failed.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{failed}");
    let mut reply = Vec::new();
    // It ends in an error: what it sent was not read.
    let _ = endless.read_to_end(&mut reply);
    let reply = String::from_utf8(reply).unwrap();
    assert!(reply.contains("a request has 4096 bytes at most") && reply.lines().count() == 1, "{reply}");

    machine.type_in(b'x');
    assert_eq!(machine.read(), b'x');
    machine.quit();
}

/// What the main thread of `child` has had of the processor, in ticks.
fn ticks(child: &Child) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{0}/task/{0}/stat", child.id())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11..=12].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

#[test]
fn control_without_open_files_for_clients_the_machine_says_so_and_does_not_spin() {
    if !has_kvm() {
        return;
    }
    let image = image(&[PRINT_A, ECHO].concat());
    let dir = TempDir::new().unwrap();
    let socket = dir.as_path().join("control");
    // The lowest limit that it starts with.
    let mut machine = (6..64)
        .find_map(|limit| {
            let script =
                format!("ulimit -n {limit}; exec \"$0\" run --memory 16M --timeout 60 --image \"$1\" --socket \"$2\"");
            let arguments = ["-c", &script, env!("CARGO_BIN_EXE_causeway"), text(image.as_path()), text(&socket)];
            let mut child = Command::new("sh")
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            match child.stdout.as_mut().unwrap().read_exact(&mut [0]) {
                Ok(()) => Some(child),
                Err(_) => {
                    assert!(end(child).1.contains("ulimit -n"));
                    assert!(!socket.exists());
                    None
                }
            }
        })
        .unwrap();
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    };
    let mut clients: Vec<UnixStream> = (0..16).map(|_| connect()).collect();
    let mut refused = 0;
    for stream in &mut clients {
        let reply = ask(stream.try_clone().unwrap(), STATUS);
        if reply["ok"].is_null() {
            assert!(reply["error"].as_str().unwrap().contains("raise its ulimit -n"), "{reply}");
            refused += 1;
        }
    }
    assert!(refused > 0, "there were files for all");
    let before = ticks(&machine);
    std::thread::sleep(Duration::from_millis(500));
    let used = ticks(&machine) - before;
    assert!(used < 10, "the main thread spins: {used} ticks in half a second");
    machine.stdin.as_mut().unwrap().write_all(b"x").unwrap();
    let mut byte = [0];
    machine.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
    drop(clients);
    signal(&machine, libc::SIGTERM);
    assert_eq!(end(machine).0, -libc::SIGTERM);
    assert!(!socket.exists());
}
