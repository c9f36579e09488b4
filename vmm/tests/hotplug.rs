//! `--root-ports`, `ctl add` and `ctl remove`, as a user sees them. What needs /dev/kvm says so where there is none.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

mod command;
mod rig;

use command::{causeway, said, text};
use rig::{has_kvm, image};

/// The suite of test images.
const SUITE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/suite"));
/// In 32-bit code: `mov al, 'A'; mov dx, 0x3f8; out dx, al`
const PRINT_A: &[u8] = &[0xb0, b'A', 0x66, 0xba, 0xf8, 0x03, 0xee];
/// `cli; hlt`
const SLEEP: &[u8] = &[0xfa, 0xf4];
/// For ever: `mov eax, 0x80008068; mov dx, 0xcf8; out dx, eax; mov dx, 0xcfe; in ax, dx; test al, 1; jz -20`, until the
/// button of root port 1 is pressed. Then `out dx, ax; mov dx, 0xcfc; mov ax, 0x400; out dx, ax; jmp -34`: its power is
/// off.
const LET_GO: &[u8] = &[
    0xb8, 0x68, 0x80, 0x00, 0x80, 0x66, 0xba, 0xf8, 0x0c, 0xef, 0x66, 0xba, 0xfe, 0x0c, 0x66, 0xed, 0xa8, 0x01, 0x74,
    0xec, 0x66, 0xef, 0x66, 0xba, 0xfc, 0x0c, 0x66, 0xb8, 0x00, 0x04, 0x66, 0xef, 0xeb, 0xde,
];

/// A machine whose guest has printed its `A`.
struct Machine {
    child: Child,
    socket: PathBuf,
    dir: TempDir,
    _image: TempFile,
}

impl Machine {
    fn start(code: &[u8], more: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.as_path().join("control");
        let image = image(&[PRINT_A, code].concat());
        let mut args = vec!["run", "--image", text(image.as_path()), "--memory", "16M", "--socket", text(&socket)];
        args.extend_from_slice(&["--timeout", "60"]);
        args.extend_from_slice(more);
        let mut child = causeway(&args).spawn().unwrap();
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        Self { child, socket, dir, _image: image }
    }

    /// Code, reply and message.
    fn ctl(&self, words: &[&str]) -> (i32, String, String) {
        let args = [&["ctl", text(&self.socket)], words].concat();
        said(causeway(&args).output().unwrap())
    }

    fn done(&self, words: &[&str]) -> Value {
        let (code, reply, message) = self.ctl(words);
        assert_eq!((code, message.as_str()), (0, ""), "{words:?}: {reply}");
        serde_json::from_str(&reply).unwrap()
    }

    /// Of each device its id and where it is; of each port what is in it, whether it has power, and whether that is to
    /// go.
    fn devices(&self) -> Value {
        let reply = self.done(&["devices"]);
        let devices = reply["devices"].as_array().unwrap().iter();
        let ports = reply["ports"].as_array().unwrap().iter();
        let devices: Vec<Value> = devices.map(|of| json!([of["id"], of["addr"], of["port"]])).collect();
        let ports: Vec<Value> = ports.map(|of| json!([of["device"], of["powered"], of["removing"]])).collect();
        json!([devices, ports])
    }

    /// The request is refused with this in the message, and nothing changed.
    fn refuses(&self, words: &[&str], part: &str) {
        let before = self.devices();
        let (code, _, message) = self.ctl(words);
        assert_eq!(code, 1, "{words:?}: {message}");
        assert!(message.contains(part), "{words:?}: {message}");
        assert_eq!(self.devices(), before, "{words:?}");
    }

    fn becomes(&self, wanted: &Value) {
        let start = Instant::now();
        while self.devices() != *wanted {
            assert!(start.elapsed() < Duration::from_secs(30), "{} instead of {wanted}", self.devices());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it; what it said.
    fn quit(self) -> String {
        self.done(&["quit"]);
        let output = self.child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{said}");
        drop(self.dir);
        said
    }
}

#[test]
fn f6_what_cannot_come_or_go_is_refused_and_changes_nothing() {
    if !has_kvm() {
        return;
    }
    let machine = Machine::start(SLEEP, &["--root-ports", "2", "--device", "edu", "--device", "edu,port=2,id=there"]);
    let at_start =
        json!([[["edu0", "00:01.0", null], ["there", "02:00.0", 2]], [[null, false, false], ["there", true, false]]]);
    assert_eq!(machine.devices(), at_start, "an image finds the buses numbered");
    for (words, part) in [
        (&["add", "--device", "edu,port=2"][..], "root port 2 has a device in it"),
        (&["add", "--device", "edu,port=3"], "root ports 1 to 2"),
        (&["add", "--device", "edu,id=there"], "another device has id=there"),
        (&["add", "--device", "edu,addr=05.0"], "behind root ports only"),
        (&["add", "--device", "virtio-console"], "cannot be added"),
        (&["add", "--device", "virtio-blk,file=/nowhere"], "/nowhere"),
        (&["add", "--device", "pcie-pci-bridge"], "cannot be added"),
        (&["add", "--device", "edu,bus=br"], "a conventional bus has no hot-plug"),
        (&["add", "--device", "pinblk"], "cannot be added"),
        (&["add", "--device", "floppy"], "unknown device"),
        (&["add", "--device", "vfio-user,fd=7"], "fd=N is for the start"),
        (&["add", "--device", "vfio-user,socket=/nowhere"], "/nowhere"),
        (&["add", "--device", "vfio,host=ffff:1f:1f.7"], "ffff:1f:1f.7"),
        (&["add", "--device", "vfio,host=ffff:1f:1f.7,backend=iommufd"], "ffff:1f:1f.7"),
        (&["remove", "nobody"], "there is no device nobody"),
        (&["remove", "edu0"], "on bus 0, and stays"),
    ] {
        machine.refuses(words, part);
    }
    for words in [&["add"][..], &["remove"], &["remove", "there", "--device", "there"], &["add", "edu"]] {
        assert_eq!(machine.ctl(words).0, 2, "{words:?}");
    }
    assert_eq!(machine.done(&["add", "--device", "edu"]), json!({"id": "edu1", "port": 1}));
    machine.refuses(&["add", "--device", "edu"], "all 2 root ports have a device in them");
    // This guest never turns it on.
    machine.refuses(&["remove", "edu1"], "is being added");
    machine.quit();
    let none = Machine::start(SLEEP, &["--root-ports", "0"]);
    assert!(none.ctl(&["add", "--device", "edu"]).2.contains("start it with --root-ports N"));
    none.quit();
}

#[test]
fn f6_a_device_goes_when_its_guest_takes_its_power_and_another_can_come() {
    if !has_kvm() {
        return;
    }
    let machine = Machine::start(LET_GO, &["--root-ports", "1", "--device", "edu,port=1"]);
    assert_eq!(machine.done(&["remove", "edu0"]), json!({"id": "edu0", "port": 1, "removing": true}));
    machine.becomes(&json!([[], [[null, false, false]]]));
    assert_eq!(machine.done(&["add", "--device", "edu,id=next"]), json!({"id": "next", "port": 1}));
    assert_eq!(machine.devices(), json!([[["next", "01:00.0", 1]], [["next", false, false]]]));
    let said = machine.quit();
    assert!(said.contains("edu0: it is gone"), "{said}");
}

#[test]
fn f6_virtio_devices_go_and_come_again_with_all_that_they_use() {
    if !has_kvm() {
        return;
    }
    let disk = TempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let blk = format!("virtio-blk,id=it,file={},port=1", text(disk.as_path()));
    for option in [&blk, "virtio-rng,id=it,port=1"] {
        let machine = Machine::start(LET_GO, &["--root-ports", "1", "--device", option]);
        let threads = || std::fs::read_dir(format!("/proc/{}/task", machine.child.id())).unwrap().count();
        // But for connections of `ctl`, which come and go.
        let files = || {
            let all = std::fs::read_dir(format!("/proc/{}/fd", machine.child.id())).unwrap();
            let names = all.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
            names.filter(|name| !name.to_string_lossy().starts_with("socket:")).count()
        };
        let there = json!([[["it", "01:00.0", 1]], [["it", true, false]]]);
        let mut used = Vec::new();
        for _ in 0..3 {
            machine.becomes(&there);
            used.push((threads(), files()));
            machine.done(&["remove", "it"]);
            machine.becomes(&json!([[], [[null, false, false]]]));
            assert_eq!(machine.done(&["audit"])["differences"], json!([]));
            assert!(threads() < used[0].0 && files() < used[0].1, "its thread and its files are gone");
            assert_eq!(machine.done(&["add", "--device", option]), json!({"id": "it", "port": 1}));
            // After a reset a card that is there has power, and the guest waits for the button again.
            machine.done(&["reset"]);
        }
        assert_eq!(used, vec![used[0]; 3], "nothing is left of one that went");
        machine.quit();
    }
}

#[test]
fn f6_functions_behind_a_bridge_have_addresses_and_stay() {
    if !has_kvm() {
        return;
    }
    let more = ["--root-ports", "1", "--device", "edu,bus=br", "--device", "pcie-pci-bridge,id=br,port=1"];
    let machine = Machine::start(SLEEP, &[&more[..], &["--device", "edu,bus=br,addr=1e.0"]].concat());
    let expected =
        json!([[["edu0", "02:01.0", null], ["br", "01:00.0", 1], ["edu1", "02:1e.0", null]], [["br", true, false]]]);
    assert_eq!(machine.devices(), expected);
    machine.refuses(&["remove", "edu0"], "on a conventional bus, and stays");
    machine.refuses(&["remove", "br"], "cannot be removed");
    machine.refuses(&["add", "--device", "edu,port=1"], "root port 1 has a device in it");
    machine.quit();
}

#[test]
fn f6_what_a_guest_does_not_let_go_of_is_taken_at_its_reset() {
    if !has_kvm() {
        return;
    }
    let machine = Machine::start(SLEEP, &["--root-ports", "1", "--device", "edu,port=1"]);
    machine.done(&["remove", "edu0"]);
    machine.refuses(&["remove", "edu0"], "is being removed");
    assert_eq!(machine.devices(), json!([[["edu0", "01:00.0", 1]], [["edu0", true, true]]]));
    machine.done(&["reset"]);
    assert_eq!(machine.devices(), json!([[], [[null, false, false]]]));
    machine.quit();
}

#[test]
fn f6_a_device_whose_process_ends_is_gone_by_surprise_and_can_come_again() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.as_path().join("edu");
    let serve = || {
        let mut child = causeway(&["device", "edu", "--socket", text(&path)]).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.as_mut().unwrap()).lines();
        let line = lines.next().unwrap().unwrap();
        assert!(line.contains("edu is served at"), "{line}");
        child
    };
    let machine = Machine::start(SLEEP, &["--root-ports", "1"]);
    let option = format!("vfio-user,socket={}", text(&path));
    for _ in 0..2 {
        let mut process = serve();
        assert_eq!(machine.done(&["add", "--device", &option]), json!({"id": "vfio-user0", "port": 1}));
        assert_eq!(machine.devices(), json!([[["vfio-user0", "01:00.0", 1]], [["vfio-user0", false, false]]]));
        assert_eq!(machine.done(&["audit"])["differences"], json!([]));
        process.kill().unwrap();
        process.wait().unwrap();
        machine.becomes(&json!([[], [[null, false, false]]]));
    }
    let said = machine.quit();
    assert!(said.contains("vfio-user0: its process is gone, and with it the device"), "{said}");
}

/// The process of a vfio-user device behind the port dies, the device is removed, and another one comes, over and over,
/// while two processors access it and switch its memory, its bus and its slot: what nobody heard is never there, what
/// nobody answers is ones (the image says so, and ends if not), nobody waits for ever, and nothing is left mapped.
#[test]
fn f3_a_device_goes_and_comes_under_accesses_of_two_processors() {
    if !has_kvm() {
        return;
    }
    let limit = Duration::from_secs(if std::env::var_os("CAUSEWAY_LONG").is_some() { 60 } else { 5 });
    let dir = TempDir::new().unwrap();
    let (path, suite, socket) = (dir.as_path().join("edu"), dir.as_path().join("suite"), dir.as_path().join("control"));
    std::fs::write(&suite, SUITE).unwrap();
    let serve = || {
        let _ = std::fs::remove_file(&path);
        let child = causeway(&["device", "edu", "--socket", text(&path)]).spawn().unwrap();
        let start = Instant::now();
        // When its file is there, it listens.
        while !path.exists() {
            assert!(start.elapsed() < Duration::from_secs(30), "nobody listens");
            std::thread::sleep(Duration::from_millis(2));
        }
        Process(child)
    };
    let mut process = serve();
    let device = format!("vfio-user,socket={},id=card,port=1", text(&path));
    let line = "test=f3_card_goes_and_comes_under_accesses outside=1";
    let options = ["--memory", "64M", "--cpus", "2", "--root-ports", "1", "--device", &device, "--timeout", "150"];
    let start = ["run", "--image", text(&suite), "--cmdline", line, "--socket", text(&socket)];
    let mut child = causeway(&[&start[..], &options].concat()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let ctl = |words: &[&str]| said(causeway(&[&["ctl", text(&socket)], words].concat()).output().unwrap());
    // The image says that it found the card: the first line is the test's name.
    assert!(lines.next().unwrap().starts_with("test f3_"));
    let begin = Instant::now();
    let mut cards = 0;
    while begin.elapsed() < limit || cards < 4 {
        cards += 1;
        if cards % 2 == 0 {
            process.0.kill().unwrap();
        } else {
            // It may be between the two moments at which the guest has the power off.
            while let (code @ 1.., _, message) = ctl(&["remove", "card"]) {
                assert!(code == 1 && message.contains("try again"), "{message}");
            }
        }
        while ctl(&["devices"]).1.contains("\"card\"") {
            assert!(begin.elapsed() < limit + Duration::from_secs(60), "the card is still there");
        }
        let audit: Value = serde_json::from_str(&ctl(&["audit"]).1).unwrap();
        assert_eq!(audit["differences"], json!([]), "with the card gone");
        process = serve();
        assert_eq!(ctl(&["add", "--device", &device]), (0, "{\"id\":\"card\",\"port\":1}\n".to_owned(), String::new()));
        let line = lines.next().unwrap_or_default();
        assert!(line.starts_with(&format!("card {cards} after ")), "{line} {:?}", lines.collect::<Vec<_>>());
    }
    println!("{cards} cards in {:?}", begin.elapsed());
    assert_eq!(ctl(&["quit"]).0, 0);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let gone = said.matches("card: its process is gone, and with it the device").count();
    assert_eq!(gone, cards / 2, "{said}");
    drop(process);
}

/// A process that ends with its test.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
