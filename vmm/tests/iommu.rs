//! `causeway ctl PATH iommu tables|mappings`, as a user sees them. What needs /dev/kvm says so where there is none.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Child;

use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

mod command;
mod rig;

use command::{causeway, said, text};
use rig::{has_kvm, image};

/// Where units are, and registers in each.
const UNITS: [u32; 2] = [0xfed9_0000, 0xfed9_4000];
const ROOT_TABLE_ADDRESS: u32 = 0x20;
const GLOBAL_COMMAND: u32 = 0x18;
/// Where tables are in the image, which is loaded at 1 MiB.
const TABLES: u64 = 0x10_1000;

/// `mov dword [address], value`
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// A guest that has the function 00:01.0 in domain 5 of the unit at `unit`, with three pages and a large one, turns
/// translation on there, prints `A` and waits for ever.
fn guest(unit: u32) -> TempFile {
    let mut code = [
        store(unit + ROOT_TABLE_ADDRESS, TABLES as u32),
        store(unit + ROOT_TABLE_ADDRESS + 4, 0),
        store(unit + GLOBAL_COMMAND, 1 << 30),
        store(unit + GLOBAL_COMMAND, 1 << 31),
    ]
    .concat();
    // `mov al, 'A'; mov dx, 0x3f8; out dx, al; jmp .`
    code.extend_from_slice(&[0xb0, b'A', 0x66, 0xba, 0xf8, 0x03, 0xee, 0xeb, 0xfe]);
    code.resize((TABLES - 0x10_0020) as usize, 0);
    let page = |entries: &[(usize, u64)]| {
        let mut page = vec![0u64; 512];
        entries.iter().for_each(|(index, entry)| page[*index] = *entry);
        page.into_iter().flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
    };
    let at = |index: u64| TABLES + index * 0x1000;
    let context = [(0x08 * 2, at(2) | 1), (0x08 * 2 + 1, 0x0502)];
    code.extend(page(&[(0, at(1) | 1)]));
    code.extend(page(&context));
    code.extend(page(&[(0, at(3) | 3)]));
    code.extend(page(&[(0, at(4) | 3)]));
    code.extend(page(&[(0, at(5) | 3), (2, 0x20_0000 | 0x81)]));
    code.extend(page(&[(5, 0x30_0003), (6, 0x30_1003), (9, 0x30_0002)]));
    image(&code)
}

/// The machine, its device, and what must live as long.
struct World {
    machine: Child,
    device: Child,
    socket: PathBuf,
    _dir: TempDir,
    _image: TempFile,
}

impl World {
    fn start() -> Self {
        Self::with(&[])
    }

    /// With these options, too.
    fn with(options: &[&str]) -> Self {
        Self::at(UNITS[0], "", options)
    }

    /// With the device of the other process at this place, and the unit for it.
    fn at(unit: u32, place: &str, options: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let (function, socket) = (dir.as_path().join("edu"), dir.as_path().join("control"));
        let mut device = causeway(&["device", "edu", "--socket", text(&function)]).spawn().unwrap();
        let mut served = String::new();
        BufReader::new(device.stderr.as_mut().unwrap()).read_line(&mut served).unwrap();
        let (image, option) = (guest(unit), format!("vfio-user,socket={},id=far{place}", function.display()));
        let args = ["run", "--image", text(image.as_path()), "--memory", "16M", "--socket", text(&socket)];
        let more = ["--timeout", "60", "--device", &option, "--device", "edu"];
        let mut machine = causeway(&[&args[..], &more, options].concat()).spawn().unwrap();
        let mut byte = [0];
        machine.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        assert_eq!(byte, [b'A']);
        Self { machine, device, socket, _dir: dir, _image: image }
    }

    fn ctl(&self, args: &[&str]) -> (i32, String, String) {
        ctl(&self.socket, args)
    }

    fn json(&self, args: &[&str]) -> Value {
        let (code, reply, message) = self.ctl(&[args, &["--json"]].concat());
        assert_eq!((code, message.as_str()), (0, ""), "{reply}");
        serde_json::from_str(&reply).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in [&mut self.machine, &mut self.device] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn ctl(socket: &Path, args: &[&str]) -> (i32, String, String) {
    said(causeway(&[&["ctl", text(socket)], args].concat()).output().unwrap())
}

#[test]
fn control_the_tables_of_a_guest_are_shown_and_what_the_host_holds_of_them_is_the_same() {
    if !has_kvm() {
        return;
    }
    let world = World::start();
    let (code, tables, message) = world.ctl(&["iommu", "tables"]);
    let expected = "\
translation is on, legacy mode, root table 0x101000
00:01.0 far, domain 5, second stage at 0x103000, 4 levels
  root entry 0000000000000000:0000000000102001, context entry 0000000000000502:0000000000103001
  0x5000-0x6fff                       0x300000 rw          2 x 4K   104003 105003 106003 300003
  0x9000-0x9fff                       0x300000 w           1 x 4K   104003 105003 106003 300002
  0x400000-0x5fffff                   0x200000 r           1 x 2M   104003 105003 200081
";
    assert_eq!((code, tables.as_str(), message.as_str()), (0, expected, ""));
    for device in ["far", "00:01.0", "0000:00:01.0"] {
        assert_eq!(world.ctl(&["iommu", "tables", "--device", device]).1, expected, "{device}");
    }
    let other = world.ctl(&["iommu", "tables", "--device", "edu0"]).1;
    assert!(other.contains("00:02.0 edu0, leads nowhere; blocked: fault 0x2 ContextNotPresent"), "{other}");
    let tables = world.json(&["iommu", "tables"]);
    assert_eq!(
        tables["functions"][0]["ranges"][2],
        json!({"first": "0x400000", "last": "0x5fffff", "level": 2,
        "entries": 1, "gpa": "0x200000", "perm": "r", "path": ["0x104003", "0x105003", "0x200081"]})
    );
    assert_eq!((&tables["mode"], &tables["complete"]), (&json!("legacy"), &json!(true)));

    let (code, mappings, message) = world.ctl(&["iommu", "mappings"]);
    let expected = "\
00:01.0 far: unit0/domain5/root0x103000/48bit, held by vfio-user
    0x5000-0x6fff                       0x300000 rw
    0x9000-0x9fff                       0x300000 w
    0x400000-0x5fffff                   0x200000 r
3 runs, 0 differences
";
    assert_eq!((code, mappings.as_str(), message.as_str()), (0, expected, ""));
    let mappings = world.json(&["iommu", "mappings", "--device", "far"]);
    let target = json!({"gpa": "0x300000", "perm": "rw"});
    assert_eq!(
        mappings["functions"][0]["ranges"][0],
        json!({"first": "0x5000", "last": "0x6fff", "granted": target, "held": target, "differs": false})
    );
    assert_eq!((&mappings["differences"], &mappings["complete"]), (&json!(0), &json!(true)));
    let top = world.ctl(&["top"]);
    let far = top.1.lines().find(|line| line.starts_with("far")).unwrap_or_else(|| panic!("{top:?}"));
    assert!(far.contains("00:01.0 vfio-user") && far.contains("unit0/domain5/root0x103000/48bit"), "{far}");
    assert!(top.1.contains("spaces (1)") && top.1.contains("edu0") && top.0 == 0, "{top:?}");
    // What is not there changes nothing.
    for (args, why) in [
        (&["iommu", "tables", "--device", "vfio9"][..], "there is no device vfio9"),
        (&["iommu", "mappings", "--device", "edu0"], "nothing is mapped for edu0 in the host"),
    ] {
        let (code, reply, message) = world.ctl(args);
        assert_eq!((code, reply.as_str()), (1, ""), "{args:?}");
        assert!(message.contains(why), "{message}");
    }
    assert_eq!(world.ctl(&["status", "--json"]).0, 2);
    assert_eq!(world.ctl(&["iommu"]).0, 2);
    assert_eq!(world.ctl(&["iommu", "read"]).0, 2);
}

#[test]
fn a13_functions_of_one_address_in_two_segments_are_shown_apart() {
    if !has_kvm() {
        return;
    }
    let units = ["--iommu", "vtd", "--iommu", "vtd,segment=1"];
    let world = World::at(UNITS[1], ",addr=0001:00:01.0", &units);
    let (code, tables, message) = world.ctl(&["iommu", "tables", "--device", "far"]);
    assert_eq!((code, message.as_str()), (0, ""));
    assert!(tables.contains("0001:00:01.0 far, domain 5, second stage at 0x103000"), "{tables}");
    assert_eq!(world.ctl(&["iommu", "tables", "--device", "0001:00:01.0"]).1, tables);
    // The one of segment 0 has the same id there, and nothing of this.
    for device in ["edu0", "01.0"] {
        let other = world.ctl(&["iommu", "tables", "--device", device]).1;
        assert!(!other.contains("far") && other.contains("translation is off"), "{other}");
    }
    let (code, mappings, message) = world.ctl(&["iommu", "mappings"]);
    assert_eq!((code, message.as_str()), (0, ""), "{mappings}");
    assert!(mappings.contains("0001:00:01.0 far: unit1/domain5/root0x103000/48bit"), "{mappings}");
    assert!(mappings.ends_with("3 runs, 0 differences\n"), "{mappings}");
    assert_eq!(world.ctl(&["iommu", "mappings", "--device", "0001:00:01.0"]).1, mappings);
    let (code, _, message) = world.ctl(&["iommu", "mappings", "--device", "01.0"]);
    assert!(code == 1 && message.contains("nothing is mapped for 01.0"), "{code}: {message}");
    let (code, _, message) = world.ctl(&["iommu", "tables", "--device", "0002:00:01.0"]);
    assert!(code == 1 && message.contains("there is no device 0002:00:01.0"), "{code}: {message}");
    let devices = world.ctl(&["devices"]).1;
    assert!(devices.contains("\"0001:00:01.0\"") && devices.contains("\"00:01.0\""), "{devices}");
}

/// Serves one connection with these pages.
fn serve(pages: Vec<Value>) -> (TempDir, PathBuf, std::thread::JoinHandle<Vec<Value>>) {
    let dir = TempDir::new().unwrap();
    let socket = dir.as_path().join("control");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut asked = Vec::new();
        let pages: Vec<String> = pages.into_iter().map(|page| json!({"ok": page}).to_string()).collect();
        for page in pages {
            let Some(Ok(line)) = lines.next() else { break };
            asked.push(serde_json::from_str(&line).unwrap());
            writeln!(&stream, "{page}").unwrap();
        }
        asked
    });
    (dir, socket, thread)
}

#[test]
fn control_differences_are_marked_and_are_an_exit_code_and_runs_go_on_over_pages() {
    let range = |first: u64, gpa: u64, held: Option<u64>| {
        let target = |gpa: u64| json!({"gpa": format!("{gpa:#x}"), "perm": "rw"});
        json!({"range": {"first": format!("{first:#x}"), "last": format!("{:#x}", first + 0xfff),
            "granted": target(gpa), "held": held.map(target), "differs": held != Some(gpa)}})
    };
    let function = json!({"function": {"id": "vfio0", "addr": "00:01.0", "space": "identity", "backend": "type1"}});
    let pages = || {
        vec![
            json!({"items": [function, range(0x1000, 0x5000, Some(0x5000))], "next": "0008.0.2000"}),
            json!({"items": [range(0x2000, 0x6000, Some(0x6000)), range(0x3000, 0x7000, None),
                {"difference": "it was stopped"}], "next": null}),
        ]
    };
    let (_dir, socket, server) = serve(pages());
    let (code, shown, _) = ctl(&socket, &["iommu", "mappings"]);
    let expected = "\
00:01.0 vfio0: identity, held by type1
    0x1000-0x2fff                       0x5000 rw
  ! 0x3000-0x3fff                       granted is 0x7000 rw, the host holds nothing
  ! it was stopped
2 runs, 2 differences
";
    assert_eq!((code, shown.as_str()), (8, expected));
    let asked = server.join().unwrap();
    assert_eq!(asked[1], json!({"verb": "iommu", "action": "mappings", "position": "0008.0.2000"}));
    let (_dir, socket, server) = serve(pages());
    let (code, shown, _) = ctl(&socket, &["iommu", "mappings", "--json"]);
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!((code, &shown["differences"]), (8, &json!(2)));
    assert_eq!(shown["functions"][0]["differences"], json!(["it was stopped"]));
    server.join().unwrap();
    // A machine that goes away in the middle.
    let (_dir, socket, server) = serve(pages()[..1].to_vec());
    assert_eq!(ctl(&socket, &["iommu", "mappings"]).0, 4);
    server.join().unwrap();
}

#[test]
fn control_tables_without_an_end_are_cut_off_and_it_is_said() {
    let items = (0..1000u64).map(|index| {
        let (first, last) = (format!("{:#x}", index * 0x2000), format!("{:#x}", index * 0x2000 + 0xfff));
        json!({"range": {"first": first, "last": last, "level": 1, "entries": 1, "nowhere": "x", "path": []}})
    });
    let items: Vec<Value> = items.collect();
    let page = json!({"enabled": true, "mode": "legacy", "root": "0x0", "items": items, "next": "0008.0.1000"});
    let (_dir, socket, server) = serve(vec![page; 70]);
    let (code, shown, _) = ctl(&socket, &["iommu", "tables"]);
    assert_eq!(code, 0);
    assert!(shown.ends_with("--device shows one function\n"), "{}", &shown[shown.len() - 200..]);
    // Its 65,536 runs, and nothing more is asked for.
    assert_eq!(server.join().unwrap().len(), 66);
}

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

/// A request about the IOMMU or dirty memory with a few bytes changed, cut or doubled. None becomes one that stops or
/// resets the machine: the verbs have nothing in common.
fn broken_request(random: &mut Random) -> Vec<u8> {
    const REQUESTS: [&str; 6] = [
        "{\"verb\":\"iommu\",\"action\":\"tables\",\"position\":\"0008.0.5000\"}",
        "{\"verb\":\"iommu\",\"action\":\"mappings\",\"device\":\"00:01.0\",\"position\":\"0008.0.-\"}",
        "{\"verb\":\"iommu\",\"action\":\"tables\",\"device\":\"far\"}",
        "{\"verb\":\"dirty\",\"action\":\"read\",\"from\":18446744073709551615,\"device\":\"nobody\"}",
        "{\"verb\":\"top\"}",
        "{\"verb\":\"status\"}",
    ];
    let mut request = REQUESTS[random.below(REQUESTS.len())].as_bytes().to_vec();
    for _ in 0..random.below(4) {
        let at = random.below(request.len());
        match random.below(4) {
            0 => request[at] = b"\"{}[]:,.-09afx\\\x00\xff "[random.below(18)],
            1 => drop(request.remove(at)),
            2 => request.insert(at, request[at]),
            _ => request.extend_from_within(at..),
        }
    }
    request.retain(|byte| *byte != b'\n');
    request.push(b'\n');
    request
}

#[test]
fn control_broken_requests_have_an_error_each_and_change_nothing() {
    if !has_kvm() {
        return;
    }
    let world = World::start();
    let held = |world: &World| (world.ctl(&["iommu", "mappings"]), world.json(&["iommu", "tables"]));
    let before = held(&world);
    let stream = std::os::unix::net::UnixStream::connect(&world.socket).unwrap();
    let mut replies = BufReader::new(stream.try_clone().unwrap()).lines();
    let (mut random, mut refused) = (Random(1), 0);
    for _ in 0..2000 {
        let request = broken_request(&mut random);
        if request.trim_ascii().is_empty() {
            continue;
        }
        (&stream).write_all(&request).unwrap();
        let reply = replies.next().unwrap().unwrap();
        let reply: Value = serde_json::from_str(&reply).unwrap_or_else(|e| panic!("{reply}: {e}"));
        let error = reply["error"].as_str();
        assert!(error.is_some_and(|why| !why.is_empty()) || reply["ok"].is_object(), "{reply}");
        refused += u32::from(error.is_some());
    }
    assert!(refused > 500, "only {refused} of them were refused");
    assert_eq!(held(&world), before);
    let (code, status, _) = world.ctl(&["status"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!((code, &status["state"], &status["guest_resets"]), (0, &json!("running"), &json!(0)));
}

#[test]
fn a13_each_unit_of_several_is_named_and_has_its_own() {
    if !has_kvm() {
        return;
    }
    // The guest turns the first unit on, and leaves the other one alone.
    let world = World::with(&["--iommu", "vtd", "--iommu", "vtd,devices=edu0"]);
    let (_, status, _) = world.ctl(&["status"]);
    let status: Value = serde_json::from_str(&status).unwrap();
    let ids: Vec<&Value> = status["units"].as_array().unwrap().iter().map(|unit| &unit["id"]).collect();
    assert_eq!(ids, ["vtd0", "vtd1"]);
    let (_, tables, _) = world.ctl(&["iommu", "tables"]);
    assert!(tables.starts_with("vtd0: translation is on, legacy mode, root table 0x101000\n00:01.0 far"), "{tables}");
    let (_, tables, _) = world.ctl(&["iommu", "tables", "--device", "edu0"]);
    assert!(tables.starts_with("vtd1: translation is off"), "{tables}");
    let (code, mappings, _) = world.ctl(&["iommu", "mappings"]);
    assert!(code == 0 && mappings.contains("unit0/domain5/"), "{mappings}");
    drop(world);

    // Behind the one that is off, the same function reaches all memory, whatever the tables of the other say.
    let world = World::with(&["--iommu", "vtd,devices=far", "--iommu", "vtd"]);
    let (code, mappings, _) = world.ctl(&["iommu", "mappings"]);
    assert!(code == 0 && mappings.contains("identity") && !mappings.contains("domain5"), "{mappings}");
}

#[test]
fn a13_units_that_no_machine_can_have_are_a_usage_error() {
    let refused = |units: &[&str]| {
        let units = units.iter().flat_map(|unit| ["--iommu", unit]);
        let args: Vec<&str> = ["run", "--image", "/dev/null", "--device", "edu"].into_iter().chain(units).collect();
        said(causeway(&args).output().unwrap())
    };
    for (units, part) in [
        (&["vtd", "vtd"][..], "just one --iommu vtd has no devices="),
        (&["vtd", "vtd,devices=other"], "there is no such device"),
        (&["vtd", "vtd,devices=edu0,pt=off"], "the same keys"),
        (&["vtd", "vtd,segment=1"], "segment=1: no device is there"),
        (&["vtd", "vtd,segment=8"], "segments are 0 to 7"),
    ] {
        let (code, _, message) = refused(units);
        assert!(code == 2 && message.contains(part), "{units:?}: {message}");
    }
}

#[test]
fn a13_a_function_in_a_segment_without_a_unit_is_a_usage_error() {
    let refused =
        |options: &[&str]| said(causeway(&[&["run", "--image", "/dev/null"], options].concat()).output().unwrap());
    let (code, _, message) = refused(&["--device", "edu,addr=0003:00:01.0,id=it"]);
    assert!(code == 2 && message.contains("it is in segment 3, which has no unit for it"), "{message}");
    assert!(message.contains("add --iommu vtd,segment=3"), "{message}");
}
