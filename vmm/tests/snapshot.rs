//! `ctl snapshot` and `run --restore`, `ctl migrate` and `run --incoming`, as a user sees them. What
//! needs /dev/kvm says so where there is none.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vmm_sys_util::tempdir::TempDir;

mod command;
mod rig;
#[path = "snapshot/segments.rs"]
mod segments;
#[path = "snapshot/tcp.rs"]
mod tcp;

use command::{causeway, said, text};
use rig::{has_kvm, image};

/// The suite of test images.
const SUITE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/suite"));
/// Work of a second or two.
const ROUNDS: u64 = 400;

/// The same where each access of the device goes to another process.
const FEW: u64 = 600;

/// What the image says that has done the work: the last number of its row.
fn wanted(rounds: u64) -> String {
    let next = |number: u64| {
        let number = number ^ number << 13;
        let number = number ^ number >> 7;
        number ^ number << 17
    };
    let number = (0..rounds).fold(0x1234_5678_9abc_def1, |number, _| next(number));
    format!("{rounds} rounds: {number:016x}")
}

/// What the image says that did the work.
fn result(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    let line = out.lines().find(|line| line.contains(" rounds: "));
    let why = || format!("{out}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "{}", why());
    line.unwrap_or_else(|| panic!("{}", why())).to_owned()
}

/// A folder with the image in it.
struct Bench {
    dir: TempDir,
    image: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let image = dir.as_path().join("suite");
        fs::File::create(&image).unwrap().write_all(SUITE).unwrap();
        Self { dir, image }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.as_path().join(name)
    }

    /// A machine that works, with these options more; and its control socket.
    fn start(&self, rounds: u64, more: &[&str]) -> Machine {
        // A second processor works, too, where there is one.
        let second = if more.contains(&"--cpus") { " second=1" } else { "" };
        let cmdline = format!("test=a14_work_goes_on rounds={rounds}{second}");
        let args = ["--image", text(&self.image), "--memory", "64M", "--cmdline", &cmdline];
        self.machine(&[&args, more].concat())
    }

    /// A machine that goes on from this snapshot.
    fn restore(&self, snapshot: &Path) -> Machine {
        self.machine(&["--restore", text(snapshot)])
    }

    /// A process with an edu, and where it listens.
    fn edu(&self) -> (Device, PathBuf) {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = self.path(&format!("edu{number}"));
        let child = causeway(&["device", "edu", "--socket", text(&path)]).spawn().unwrap();
        wait_for(&path);
        (Device(child), path)
    }

    fn machine(&self, args: &[&str]) -> Machine {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let socket = self.path(&format!("control{number}"));
        let all = [&["run", "--timeout", "120", "--socket", text(&socket)], args].concat();
        Machine { child: causeway(&all).spawn().unwrap(), socket }
    }
}

/// A process that ends with its test.
struct Device(Child);

impl Drop for Device {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Machine {
    child: Child,
    socket: PathBuf,
}

impl Machine {
    fn ctl(&self, words: &[&str]) -> (i32, String, String) {
        said(causeway(&[&["ctl", text(&self.socket)], words].concat()).output().unwrap())
    }

    /// The reply, as soon as the machine is there.
    fn done(&mut self, words: &[&str]) -> Value {
        self.done_before_the_end(words).unwrap_or_else(|| panic!("{words:?}: the machine has ended"))
    }

    /// The same, of a machine that may have done its work; `None`: it has.
    fn done_before_the_end(&mut self, words: &[&str]) -> Option<Value> {
        let start = Instant::now();
        loop {
            let (code, reply, message) = self.ctl(words);
            match code {
                0 => return Some(serde_json::from_str(&reply).unwrap()),
                4 if self.child.try_wait().unwrap().is_some() => return None,
                4 if start.elapsed() < Duration::from_secs(30) => std::thread::sleep(Duration::from_millis(5)),
                _ => panic!("{words:?}: {code}: {message}"),
            }
        }
    }

    fn end(self) -> Output {
        self.child.wait_with_output().unwrap()
    }
}

#[test]
fn a14_a_machine_that_was_saved_in_the_middle_ends_as_one_that_was_not() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let mut source = bench.start(ROUNDS, &["--device", "edu"]);
    let mut snapshots: Vec<PathBuf> = (0..4).map(|n| bench.path(&format!("snapshot{n}"))).collect();
    let mut count = 0;
    for (snapshot, n) in snapshots.iter().zip(1u64..) {
        // On a fast machine the work is over before the last.
        let Some(taken) = source.done_before_the_end(&["snapshot", text(snapshot)]) else { break };
        assert_eq!(taken["memory"], 64 << 20, "{taken}");
        count += 1;
        std::thread::sleep(Duration::from_millis(20 * n));
    }
    assert!(count >= 2, "{count} snapshots");
    snapshots.truncate(count);
    // The machine that was saved goes on.
    assert_eq!(result(&source.end()), wanted(ROUNDS));
    for snapshot in &snapshots {
        assert_eq!(result(&bench.restore(snapshot).end()), wanted(ROUNDS), "{}", snapshot.display());
    }
}

#[test]
fn a17_interrupts_are_posted_in_a_machine_that_was_saved_as_in_one_that_was_not() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let cmdline = ["--memory", "64M", "--cmdline", "test=a17_posting_goes_on rounds=100"];
    let devices = ["--iommu", "vtd,posted=on", "--device", "edu"];
    let mut source = bench.machine(&[&["--image", text(&bench.image)][..], &cmdline, &devices].concat());
    let snapshots = ["a", "b", "c"].map(|name| bench.path(name));
    for snapshot in &snapshots {
        source.done(&["snapshot", text(snapshot)]);
        std::thread::sleep(Duration::from_millis(40));
    }
    let restored = snapshots.iter().map(|snapshot| bench.restore(snapshot));
    for machine in [source].into_iter().chain(restored) {
        let output = machine.end();
        let out = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.code() == Some(1) && out.ends_with("posted 100\nok\n"), "{:?}: {out}", output.status);
    }
}

#[test]
fn a14_a_function_of_another_process_is_saved_and_goes_on_in_a_new_process() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let (first, socket) = bench.edu();
    let mut source = bench.start(FEW, &["--device", &format!("vfio-user,socket={},id=other", text(&socket))]);
    let snapshots: Vec<PathBuf> = (0..2).map(|n| bench.path(&format!("snapshot{n}"))).collect();
    for (snapshot, n) in snapshots.iter().zip(1u64..) {
        source.done(&["snapshot", text(snapshot)]);
        std::thread::sleep(Duration::from_millis(40 * n));
    }
    // The function goes on, as its machine does.
    assert_eq!(result(&source.end()), wanted(FEW));
    // Where it was: the process serves one client after the other, until it is gone.
    assert_eq!(result(&bench.restore(&snapshots[0]).end()), wanted(FEW));
    drop(first);
    for snapshot in &snapshots {
        let (_new, socket) = bench.edu();
        let place = format!("other={}", text(&socket));
        let machine = bench.machine(&["--restore", text(snapshot), "--user-socket", &place]);
        assert_eq!(result(&machine.end()), wanted(FEW), "{}", snapshot.display());
    }
}

/// In 32-bit code: `mov al, 'A'; mov dx, 0x3f8; out dx, al; cli; hlt`
const PRINT_AND_SLEEP: &[u8] = &[0xb0, b'A', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xfa, 0xf4];

#[test]
fn a14_what_cannot_be_saved_or_restored_is_refused_with_the_reason_and_nothing_is_left() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let image = image(PRINT_AND_SLEEP);
    let there = bench.path("there");
    fs::create_dir(&there).unwrap();
    let mut machine = bench.machine(&["--image", text(image.as_path()), "--memory", "16M", "--device", "pinblk"]);
    machine.done(&["status"]);
    let refused = |machine: &Machine, folder: &Path, part: &str| {
        let (code, _, message) = machine.ctl(&["snapshot", text(folder)]);
        assert!(code == 1 && message.contains(part), "{code}: {message}");
    };
    refused(&machine, &bench.path("new"), "pinblk0 (pinblk) cannot be saved");
    machine.done(&["quit"]);
    machine.end();

    let mut machine = bench.machine(&["--image", text(image.as_path()), "--memory", "16M", "--device", "edu"]);
    machine.done(&["status"]);
    refused(&machine, &there, "is there already");
    refused(&machine, &bench.path("no/such/folder"), "No such file");
    for words in [&["snapshot"][..], &["snapshot", "a", "--device", "edu0"]] {
        assert_eq!(machine.ctl(words).0, 2, "{words:?}");
    }
    let saved = bench.path("saved");
    assert_eq!(machine.done(&["snapshot", text(&saved)])["snapshot"], text(&saved));
    assert_eq!(machine.done(&["status"])["state"], "running");
    machine.done(&["pause"]);
    machine.done(&["snapshot", text(&bench.path("paused"))]);
    assert_eq!(machine.done(&["status"])["state"], "paused", "it stays so");
    machine.done(&["quit"]);
    machine.end();
    let left: Vec<_> = fs::read_dir(bench.dir.as_path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");

    let restore = |more: &[&str]| {
        said(causeway(&[&["run", "--timeout", "20", "--restore", text(&saved)], more].concat()).output().unwrap())
    };
    for option in [&["--memory", "32M"][..], &["--device", "edu"], &["--image", "x"], &["--cpus", "1"]] {
        assert_eq!(restore(option).0, 2, "{option:?}");
    }
    // What a device cannot be in, in a snapshot that is whole otherwise.
    let state = fs::read_to_string(saved.join("state.json")).unwrap();
    let wrong = |from: &str, to: &str, part: &str| {
        assert_eq!(state.matches(from).count(), 1, "{from}");
        let text = state.replace(from, to);
        rewrite(&saved, &text);
        let (code, _, message) = restore(&[]);
        assert!(code == 4 && message.contains(part), "{from} -> {to}: {code}: {message}");
    };
    wrong("\"irq_status\":0", "\"irq_status\":-1", "edu0 (edu): its state is not understood");
    wrong("\"command\":0,\"count\":0", "\"command\":8,\"count\":0", "edu0 (edu): its command cannot be");
    wrong(
        "--device=edu,pasid=off,addr=01.0,id=edu0\"",
        "--device=edu,pasid=off,addr=02.0,id=edu0\"",
        "edu0 (edu): its state is missing",
    );
    wrong("--device=edu,pasid=off,addr=01.0,id=edu0\"", "--device=floppy\"", "unknown device");
    wrong("\"physical_bits\":", "\"physical_bits\":1", "physical addresses");
    wrong("\"global_status\":0", "\"global_status\":1", "the remapping unit vtd0: GSTS");
}

/// Gives a snapshot another state, of which its manifest says what it is.
fn rewrite(saved: &Path, state: &str) {
    let digest: String = Sha256::digest(state).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut manifest: Value = serde_json::from_str(&fs::read_to_string(saved.join("manifest.json")).unwrap()).unwrap();
    manifest["state"]["bytes"] = state.len().into();
    manifest["state"]["sha256"] = digest.into();
    fs::write(saved.join("manifest.json"), ordered(&manifest)).unwrap();
    fs::write(saved.join("state.json"), state).unwrap();
}

/// The fields of a manifest in the order in which they are written.
fn ordered(of: &Value) -> String {
    let part = |name: &str| {
        format!("  {name:?}: {{\n    \"bytes\": {},\n    \"sha256\": {}\n  }}", of[name]["bytes"], of[name]["sha256"])
    };
    format!(
        "{{\n  \"form\": {},\n  \"version\": {},\n{},\n{}\n}}\n",
        of["form"],
        of["version"],
        part("state"),
        part("memory")
    )
}

#[test]
fn a14_a_machine_moves_ten_times_under_dma_and_its_memory_is_the_same() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let machine = bench.start(LONG, &["--device", "edu"]);
    ten_moves(&bench, machine, |_| Vec::new());
}

#[test]
fn a14_a_machine_moves_ten_times_under_dma_of_another_process_each_time_to_a_new_one() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let (first, socket) = bench.edu();
    let machine = bench.start(LONG, &["--device", &format!("vfio-user,socket={},id=other", text(&socket))]);
    let mut processes = vec![first];
    ten_moves(&bench, machine, |bench| {
        let (process, socket) = bench.edu();
        processes.push(process);
        vec!["--user-socket".to_owned(), format!("other={}", text(&socket))]
    });
}

/// Rounds of work that ten moves do not outlast.
const LONG: u64 = 1500;

/// Moves a machine ten times; `more`: the options of each destination. Its work is that of one that did not move.
fn ten_moves(bench: &Bench, mut machine: Machine, mut more: impl FnMut(&Bench) -> Vec<String>) {
    machine.done(&["status"]);
    let mut down = Vec::new();
    for n in 0..10 {
        let path = bench.path(&format!("move{n}"));
        let address = format!("unix:{}", text(&path));
        let more = more(bench);
        let args = ["--incoming", &address].into_iter().chain(more.iter().map(String::as_str));
        let next = bench.machine(&args.collect::<Vec<_>>());
        wait_for(&path);
        let moved = machine.done(&["migrate", &address, "--verify"]);
        assert_eq!(moved["migrated"], address, "{moved}");
        down.push(moved["down_ms"].as_u64().unwrap());
        assert_eq!(machine.end().status.code(), Some(0), "the source ends");
        machine = next;
    }
    println!("down-times in ms: {down:?}");
    assert_eq!(result(&machine.end()), wanted(LONG));
}

/// Until the socket's file is there: then somebody listens.
fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "nobody listens at {}", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a14_who_waits_for_a_machine_and_is_ended_leaves_no_file() {
    let (bench, number) = (Bench::new(), libc::SIGTERM);
    let path = bench.path("move");
    let mut child = causeway(&["run", "--incoming", &format!("unix:{}", text(&path))]).spawn().unwrap();
    wait_for(&path);
    // SAFETY: a process of this test, that was not waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, number) }, 0);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(number));
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "the image is all that is there");
}

#[test]
fn a14_a_machine_that_cannot_move_goes_on_where_it_is() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let mut machine = bench.start(ROUNDS, &["--device", "edu"]);
    machine.done(&["status"]);
    let refused = |machine: &Machine, address: &str, part: &str| {
        let (code, _, message) = machine.ctl(&["migrate", address]);
        assert!(code == 1 && message.contains("goes on here") && message.contains(part), "{code}: {message}");
    };
    refused(&machine, &format!("unix:{}", text(&bench.path("nobody"))), "nobody is reached");
    // One that hears all of it and says nothing; one that goes in the middle; one that refuses; one that is ready, is
    // told to go on, and is gone before it does.
    let path = bench.path("other");
    let (refuses, ready) = (&b"\x05\x03\0\0\0\0\0\0\0bad"[..], &b"\x04\0\0\0\0\0\0\0\0"[..]);
    for (last, part) in [
        (None, "is lost"),
        (Some(&b""[..]), "is lost"),
        (Some(refuses), "refuses it: bad"),
        (Some(ready), "told to go on"),
    ] {
        let listener = UnixListener::bind(&path).unwrap();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let Some(last) = last else { return };
            until(&mut stream, STATE);
            stream.write_all(last).unwrap();
            if last == ready {
                until(&mut stream, GO);
            }
        });
        refused(&machine, &format!("unix:{}", text(&path)), part);
        other.join().unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(machine.done(&["status"])["state"], "running");
    }
    for words in [&["migrate"][..], &["migrate", "nowhere"], &["migrate", "unix:/a", "--device", "edu0"]] {
        assert_eq!(machine.ctl(words).0, 2, "{words:?}");
    }
    assert_eq!(result(&machine.end()), wanted(ROUNDS));
}

const STATE: u8 = 3;
const GO: u8 = 6;

/// Takes messages until one of this kind is there.
fn until(stream: &mut (impl Read + ?Sized), kind: u8) {
    let mut head = [0; 9];
    loop {
        stream.read_exact(&mut head).unwrap();
        let len = u64::from_le_bytes(head[1..].try_into().unwrap());
        std::io::copy(&mut (&mut *stream).take(len), &mut std::io::sink()).unwrap();
        if head[0] == kind {
            return;
        }
    }
}

#[test]
fn a14_a_machine_that_may_be_elsewhere_stays_held_until_somebody_resumes_it() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let (_process, socket) = bench.edu();
    let mut machine = bench.start(FEW, &["--device", &format!("vfio-user,socket={}", text(&socket))]);
    machine.done(&["status"]);
    let path = bench.path("other");
    let listener = UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        until(&mut stream, STATE);
        stream.write_all(b"\x04\0\0\0\0\0\0\0\0").unwrap();
        until(&mut stream, GO);
        // It is there, and does not say what it does.
        stream.write_all(b"\x04\0\0\0\0\0\0\0\0").unwrap();
        stream
    });
    let (code, _, message) = machine.ctl(&["migrate", &format!("unix:{}", text(&path))]);
    assert!(code == 1 && message.contains("it is not known whether the machine moved"), "{code}: {message}");
    drop(other.join().unwrap());
    assert_eq!(machine.done(&["status"])["state"], "paused");
    // It can be saved meanwhile, and stays as it is.
    let saved = bench.path("saved");
    machine.done(&["snapshot", text(&saved)]);
    assert_eq!(machine.done(&["status"])["state"], "paused");
    assert_eq!(machine.done(&["resume"])["state"], "running");
    assert_eq!(result(&machine.end()), wanted(FEW));
    assert_eq!(result(&bench.restore(&saved).end()), wanted(FEW));
}

#[test]
fn a14_a_destination_that_is_not_told_to_go_on_ends_and_the_source_goes_on() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let ((_first, here), (_second, there)) = (bench.edu(), bench.edu());
    let mut machine = bench.start(FEW, &["--device", &format!("vfio-user,socket={},id=other", text(&here))]);
    machine.done(&["status"]);
    let (between, path) = (bench.path("between"), bench.path("move"));
    let place = format!("other={}", text(&there));
    let next = bench.machine(&["--incoming", &format!("unix:{}", text(&path)), "--user-socket", &place]);
    wait_for(&path);
    let listener = UnixListener::bind(&between).unwrap();
    // Everything goes through but the last message of the source: the connection ends in its place.
    let way = std::thread::spawn(move || {
        let (mut source, _) = listener.accept().unwrap();
        let mut destination = UnixStream::connect(path).unwrap();
        let (mut from, mut to) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        let back = std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        let mut head = [0; 9];
        loop {
            source.read_exact(&mut head).unwrap();
            if head[0] == GO {
                break;
            }
            let len = u64::from_le_bytes(head[1..].try_into().unwrap());
            destination.write_all(&head).unwrap();
            std::io::copy(&mut (&mut source).take(len), &mut destination).unwrap();
        }
        destination.shutdown(std::net::Shutdown::Both).unwrap();
        source.shutdown(std::net::Shutdown::Both).unwrap();
        back.join().unwrap().unwrap();
    });
    let (code, _, message) = machine.ctl(&["migrate", &format!("unix:{}", text(&between))]);
    assert!(code == 1 && message.contains("goes on here") && message.contains("told to go on"), "{code}: {message}");
    way.join().unwrap();
    let (code, _, message) = said(next.end());
    assert!(code == 4 && message.contains("the machine goes on where it was"), "{code}: {message}");
    assert_eq!(result(&machine.end()), wanted(FEW));
}

#[test]
fn a14_a_function_of_another_process_that_cannot_be_saved_or_put_back_is_refused_with_the_reason() {
    if !has_kvm() {
        return;
    }
    let bench = Bench::new();
    let (process, socket) = bench.edu();
    let device = format!("vfio-user,socket={},id=other", text(&socket));
    let mut machine = bench.start(FEW, &["--device", &device]);
    machine.done(&["status"]);
    let saved = bench.path("saved");
    machine.done(&["snapshot", text(&saved)]);
    // Its process is gone: nothing is held, and nothing is left. A guest that ran would find ones, and end.
    machine.done(&["pause"]);
    drop(process);
    let (_other, place) = bench.edu();
    let place = text(&place);
    let (code, _, message) = machine.ctl(&["snapshot", text(&bench.path("late"))]);
    assert!(code == 1 && message.contains("other (vfio-user) cannot be saved"), "{code}: {message}");
    let (code, _, message) = machine.ctl(&["migrate", &format!("unix:{place}")]);
    assert!(
        code == 1 && message.contains("other (vfio-user)") && message.contains("goes on here"),
        "{code}: {message}"
    );
    assert!(!bench.path("late").exists());
    machine.done(&["quit"]);
    machine.end();
    // Nobody is at the place of before, or somebody who is none; no such device.
    let restore =
        |more: &[&str]| said(causeway(&[&["run", "--restore", text(&saved)], more].concat()).output().unwrap());
    for (more, code, part) in [
        (&[][..], 4, "refused"),
        (&["--user-socket", "other=/nowhere"], 4, "/nowhere"),
        (&["--user-socket", &format!("edu0={place}")], 4, "no vfio-user device edu0"),
        (&["--user-socket", place], 2, "ID=PATH"),
        (&["--user-socket", "=x"], 2, "ID=PATH"),
    ] {
        let (found, _, message) = restore(more);
        assert!(found == code && message.contains(part), "{more:?}: {found}: {message}");
    }
    assert_eq!(said(causeway(&["run", "--image", "x", "--user-socket", "a=b"]).output().unwrap()).0, 2);
    // A state that its process does not take, in a snapshot that is whole otherwise.
    let state = fs::read_to_string(saved.join("state.json")).unwrap();
    let mut whole: Value = serde_json::from_str(&state).unwrap();
    let process = whole["state"]["functions"]["00:01.0"]["state"]["process"].take();
    let process = process.as_str().expect("a state of the process");
    // What is behind the first brace.
    let broken = state.replace(process, &format!("7b7b{}", &process[4..]));
    rewrite(&saved, &broken);
    let (code, _, message) = restore(&["--user-socket", &format!("other={place}")]);
    assert!(code == 4 && message.contains("its process does not take what was saved"), "{code}: {message}");
    // The process serves the next.
    rewrite(&saved, &state);
    let machine = bench.machine(&["--restore", text(&saved), "--user-socket", &format!("other={place}")]);
    assert_eq!(result(&machine.end()), wanted(FEW));
}
