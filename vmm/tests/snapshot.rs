//! `ctl snapshot` and `run --restore`, `ctl migrate` and `run --incoming`, as a user sees them. What
//! needs /dev/kvm says so where there is none.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vmm_sys_util::tempdir::TempDir;

mod command;
mod rig;

use command::{causeway, said, text};
use rig::{has_kvm, image};

/// The suite of test images.
const SUITE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/suite"));
/// Work of a second or two.
const ROUNDS: u64 = 400;

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
        let cmdline = format!("test=a14_work_goes_on rounds={rounds}");
        let args = ["--image", text(&self.image), "--memory", "64M", "--cmdline", &cmdline];
        self.machine(&[&args, more].concat())
    }

    /// A machine that goes on from this snapshot.
    fn restore(&self, snapshot: &Path) -> Machine {
        self.machine(&["--restore", text(snapshot)])
    }

    fn machine(&self, args: &[&str]) -> Machine {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let socket = self.path(&format!("control{number}"));
        let all = [&["run", "--timeout", "120", "--socket", text(&socket)], args].concat();
        Machine { child: causeway(&all).spawn().unwrap(), socket }
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
        let start = Instant::now();
        loop {
            let (code, reply, message) = self.ctl(words);
            match code {
                0 => return serde_json::from_str(&reply).unwrap(),
                4 if start.elapsed() < Duration::from_secs(30) && self.child.try_wait().unwrap().is_none() => {
                    std::thread::sleep(Duration::from_millis(5));
                }
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
    let snapshots: Vec<PathBuf> = (0..4).map(|n| bench.path(&format!("snapshot{n}"))).collect();
    for (snapshot, n) in snapshots.iter().zip(1u64..) {
        let taken = source.done(&["snapshot", text(snapshot)]);
        assert_eq!(taken["memory"], 64 << 20, "{taken}");
        std::thread::sleep(Duration::from_millis(40 * n));
    }
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
        let digest: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
        let mut manifest: Value =
            serde_json::from_str(&fs::read_to_string(saved.join("manifest.json")).unwrap()).unwrap();
        manifest["state"]["bytes"] = text.len().into();
        manifest["state"]["sha256"] = digest.into();
        fs::write(saved.join("manifest.json"), ordered(&manifest)).unwrap();
        fs::write(saved.join("state.json"), text).unwrap();
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
    const LONG: u64 = 1500;
    let bench = Bench::new();
    let mut machine = bench.start(LONG, &["--device", "edu"]);
    machine.done(&["status"]);
    let mut down = Vec::new();
    for n in 0..10 {
        let path = bench.path(&format!("move{n}"));
        let address = format!("unix:{}", text(&path));
        let next = bench.machine(&["--incoming", &address]);
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

/// Until the socket is there.
fn wait_for(path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "nobody listens at {}", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
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
    // One that hears all of it and says nothing; one that goes in the middle; one that refuses.
    let path = bench.path("other");
    for (last, part) in
        [(None, "is lost"), (Some(&b""[..]), "is lost"), (Some(b"\x05\x03\0\0\0\0\0\0\0bad"), "refuses it: bad")]
    {
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let other = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let Some(last) = last else { return };
            // Until the state is there.
            let mut head = [0; 9];
            loop {
                stream.read_exact(&mut head).unwrap();
                let len = u64::from_le_bytes(head[1..].try_into().unwrap());
                std::io::copy(&mut (&mut stream).take(len), &mut std::io::sink()).unwrap();
                if head[0] == 3 {
                    break;
                }
            }
            stream.write_all(last).unwrap();
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
