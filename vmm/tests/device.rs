//! `causeway device` and `--device vfio-user`, as a user sees them. What needs /dev/kvm says so where there is none.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use vmm_sys_util::tempdir::TempDir;

mod rig;

use rig::{has_kvm, image};

/// `mov al, 'A'; mov dx, 0x3f8; out dx, al; jmp .`
const PRINT_AND_LOOP: &[u8] = &[0xb0, b'A', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfe];

fn causeway(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_causeway"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A device process that is served at `path`.
fn serve(path: &Path) -> Child {
    let mut child = causeway(&["device", "edu", "--socket", path.to_str().unwrap()]).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.as_mut().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    assert!(line.contains("edu is served at"), "{line}");
    child
}

fn signal(child: &Child, signal: i32) {
    // SAFETY: the call takes two numbers; the child was not waited for, so the number is still its.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), signal) }, 0);
}

fn end(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    use std::os::unix::process::ExitStatusExt;
    let code = output.status.code().unwrap_or_else(|| -output.status.signal().unwrap_or(0));
    (code, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_signal_ends_the_device_and_takes_its_socket_away() {
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("edu");
    let device = serve(&path);
    // Somebody is there already.
    let (code, message) = end(causeway(&["device", "edu", "--socket", path.to_str().unwrap()]).spawn().unwrap());
    assert_eq!(code, 4);
    assert!(message.contains("cannot be listened at"), "{message}");
    signal(&device, libc::SIGTERM);
    assert_eq!(end(device).0, -libc::SIGTERM);
    assert!(!path.exists());

    // One that was left behind is taken over; a file is not.
    drop(UnixListener::bind(&path).unwrap());
    let device = serve(&path);
    signal(&device, libc::SIGINT);
    assert_eq!(end(device).0, -libc::SIGINT);
    std::fs::write(&path, "mine").unwrap();
    assert_eq!(end(causeway(&["device", "edu", "--socket", path.to_str().unwrap()]).spawn().unwrap()).0, 4);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn wrong_starts_are_refused_with_the_reason() {
    for (args, code, part) in [
        (&["device", "edu"][..], 2, "--socket"),
        (&["device", "floppy", "--socket", "x"], 2, "edu"),
        (&["device", "edu", "--fd", "1"], 2, "standard descriptors"),
        (&["device", "edu", "--fd", "1000"], 4, "descriptor 1000 is not a socket"),
        (&["device", "edu", "--socket", "/nowhere/at/all"], 4, "cannot be listened at"),
    ] {
        let (found, message) = end(causeway(args).spawn().unwrap());
        assert_eq!(found, code, "{message}");
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn a_socket_with_nobody_or_somebody_else_behind_it_refuses_the_start() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let image = image(PRINT_AND_LOOP);
    let run = |path: &Path| {
        let device = format!("vfio-user,socket={}", path.display());
        let image = image.as_path().to_str().unwrap();
        end(causeway(&["run", "--image", image, "--memory", "32M", "--device", &device]).spawn().unwrap())
    };
    let nobody = dir.as_path().join("nobody");
    drop(UnixListener::bind(&nobody).unwrap());
    let (code, message) = run(&nobody);
    assert_eq!(code, 4);
    assert!(message.contains("nobody cannot be assigned"), "{message}");

    let other = dir.as_path().join("other");
    let listener = UnixListener::bind(&other).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n").unwrap();
    });
    let (code, message) = run(&other);
    assert_eq!(code, 4);
    assert!(message.contains("other cannot be assigned"), "{message}");
    thread.join().unwrap();
}

#[test]
fn a_signal_ends_a_start_that_waits_for_a_silent_device() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("silent");
    let listener = UnixListener::bind(&path).unwrap();
    let device = format!("vfio-user,socket={}", path.display());
    let image = image(PRINT_AND_LOOP);
    for number in [libc::SIGTERM, libc::SIGINT] {
        let run = ["run", "--image", image.as_path().to_str().unwrap(), "--memory", "32M", "--device", &device];
        let machine = causeway(&run).spawn().unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        // It asks which version is spoken, and would wait for the answer for 10 s.
        std::io::Read::read_exact(&mut stream, &mut [0; 16]).unwrap();
        signal(&machine, number);
        let (code, message) = end(machine);
        assert_eq!(code, -number, "{message}");
        assert!(message.contains("before the guest ran"), "{message}");
    }
}

#[test]
fn a_device_that_dies_leaves_its_guest_running_and_serves_again_when_it_is_started_again() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("edu");
    let image = image(PRINT_AND_LOOP);
    let option = format!("vfio-user,socket={}", path.display());
    let run = ["run", "--image", image.as_path().to_str().unwrap(), "--memory", "32M", "--device", &option];
    for _ in 0..2 {
        let device = serve(&path);
        // Two guests, one after the other, at one device.
        for last in [false, true] {
            let mut machine = causeway(&run).spawn().unwrap();
            let mut byte = [0];
            std::io::Read::read_exact(machine.stdout.as_mut().unwrap(), &mut byte).unwrap();
            assert_eq!(&byte, b"A");
            if last {
                signal(&device, libc::SIGKILL);
                let mut lines = BufReader::new(machine.stderr.as_mut().unwrap()).lines();
                assert!(lines.any(|line| line.unwrap().contains("the device is gone")));
            }
            assert!(machine.try_wait().unwrap().is_none(), "the guest does not run any more");
            signal(&machine, libc::SIGTERM);
            let (code, message) = end(machine);
            assert_eq!(code, -libc::SIGTERM, "{message}");
            assert!(!message.contains("the device is gone"), "{message}");
        }
        assert_eq!(end(device).0, -libc::SIGKILL);
    }
}

#[test]
fn a_confined_device_has_no_file_of_the_guests_memory() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let (path, stats) = (dir.as_path().join("edu"), dir.as_path().join("stats.json"));
    let image = image(PRINT_AND_LOOP);
    let device = serve(&path);
    for (confine, files) in [("off", true), ("on", false)] {
        let option = format!("vfio-user,socket={},confine={confine}", path.display());
        let run = ["run", "--image", image.as_path().to_str().unwrap(), "--memory", "32M", "--device", &option];
        let mut machine = causeway(&run).args(["--stats", stats.to_str().unwrap()]).spawn().unwrap();
        std::io::Read::read_exact(machine.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        // Translation is off, so it reaches all of it, and there was nothing that it waits for.
        let open = std::fs::read_dir(format!("/proc/{}/fd", device.id())).unwrap();
        let links = open.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        let memory = links.filter(|link| link.to_string_lossy().contains("memfd")).count();
        assert_eq!(memory > 0, files, "confine={confine}: {memory} files of memory");
        signal(&machine, libc::SIGTERM);
        let (code, message) = end(machine);
        assert_eq!(code, -libc::SIGTERM, "{message}");
        let said = if files { "trusted to use only what is mapped" } else { "is given no memory" };
        assert!(message.contains(said), "{message}");
        let text = std::fs::read_to_string(&stats).unwrap();
        assert!(text.contains(r#""dma_messages":{"reads":0,"writes":0,"bytes":0,"blocked":0,"refused":0}"#), "{text}");
    }
    signal(&device, libc::SIGTERM);
    assert_eq!(end(device).0, -libc::SIGTERM);
}
