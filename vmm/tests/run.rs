//! The program as a user sees it: exit codes and messages. Guests are a few instructions in the clothes of a Linux
//! kernel; those tests need /dev/kvm and say so where there is none.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

/// `mov al, 'A'; mov dx, 0x3f8; out dx, al`
const PRINT_A: &[u8] = &[0xb0, b'A', 0x66, 0xba, 0xf8, 0x03, 0xee];
/// `mov ax, 0x3400; mov dx, 0x604; out dx, ax`: SLP_EN and the sleep type of S5.
const POWER_OFF: &[u8] = &[0x66, 0xb8, 0x00, 0x34, 0x66, 0xba, 0x04, 0x06, 0x66, 0xef];
/// `mov al, 6; mov dx, 0xcf9; out dx, al`
const RESET: &[u8] = &[0xb0, 0x06, 0x66, 0xba, 0xf9, 0x0c, 0xee];
/// `wait: mov dx, 0x3fd; in al, dx; test al, 1; jz wait`: until there is something to read from the serial port.
const WAIT_FOR_INPUT: &[u8] = &[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7];
/// `jmp .`
const LOOP: &[u8] = &[0xeb, 0xfe];
/// `ud2` without an interrupt table: a triple fault.
const CRASH: &[u8] = &[0x0f, 0x0b];

fn kernel(code: &[&[u8]]) -> TempFile {
    let mut image = vec![0u8; 1024 + 0x200];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup sectors
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes()); // protocol version
    put(0x211, &[1]); // loaded high
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // highest initrd address
    put(0x236, &1u16.to_le_bytes()); // 64-bit entry
    put(0x238, &2047u32.to_le_bytes()); // command line size
    put(0x258, &0x100_0000u64.to_le_bytes()); // preferred address
    put(0x260, &0x10_0000u32.to_le_bytes()); // memory needed there
    code.iter().for_each(|part| image.extend_from_slice(part));
    let file = TempFile::new().unwrap();
    file.as_file().write_all(&image).unwrap();
    file
}

fn causeway(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_causeway"));
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = causeway(args).output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (status.code().unwrap_or(-1), text(&stdout), text(&stderr))
}

fn has_kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("no /dev/kvm: nothing to check");
    }
    there
}

fn run_guest(code: &[&[u8]], more: &[&str]) -> (i32, String, String) {
    let kernel = kernel(code);
    let mut args = vec!["run", "--kernel", kernel.as_path().to_str().unwrap(), "--memory", "64M"];
    args.extend_from_slice(more);
    run(&args)
}

/// Writes its argument to isa-debug-exit: `mov al, value; out 0xf4, al`.
fn debug_exit(value: u8) -> [u8; 4] {
    [0xb0, value, 0xe6, 0xf4]
}

/// Code at 1 MiB behind a multiboot header with addresses, entered at 0x100020.
fn image(code: &[&[u8]]) -> TempFile {
    let words = [0x1bad_b002u32, 0x1_0000, 0xe451_4ffe, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020];
    let mut image: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    code.iter().for_each(|part| image.extend_from_slice(part));
    let file = TempFile::new().unwrap();
    file.as_file().write_all(&image).unwrap();
    file
}

fn run_image(code: &[&[u8]], more: &[&str]) -> (i32, String, String) {
    let image = image(code);
    let mut args = vec!["run", "--image", path(image.as_path()), "--memory", "16M"];
    args.extend_from_slice(more);
    run(&args)
}

/// In 32-bit code: `mov dx, 0x3f8; out dx, al`
const PRINT_AL: &[u8] = &[0x66, 0xba, 0xf8, 0x03, 0xee];

#[test]
fn an_image_ends_with_the_code_it_chose() {
    if !has_kvm() {
        return;
    }
    for value in [0u8, 0x10, 0x7f] {
        let (code, out, err) = run_image(&[&[0xb0, b'A'], PRINT_AL, &debug_exit(value), LOOP], &["--device", "edu"]);
        assert_eq!((code, out.as_str()), (i32::from(value) << 1 | 1, "A"), "{err}");
    }
}

#[test]
fn an_image_finds_its_protocol_fw_cfg_and_assigned_bars() {
    if !has_kvm() {
        return;
    }
    let code: &[&[u8]] = &[
        &[0x3d, 0x02, 0xb0, 0xad, 0x2b], // cmp eax, 0x2badb002
        &[0x75, 0xfe],                   // jne .
        // mov dx, 0x510; xor eax, eax; out dx, ax; inc dx
        &[0x66, 0xba, 0x10, 0x05, 0x31, 0xc0, 0x66, 0xef, 0x66, 0x42],
        &[0xec], // in al, dx: the Q of the signature
        PRINT_AL,
        // mov al, [0xe0008013]: the highest byte of the edu's BAR 0, in ECAM
        &[0xa0, 0x13, 0x80, 0x00, 0xe0],
        PRINT_AL,
        // mov al, [0xc0000000]: the edu's identification
        &[0xa1, 0x00, 0x00, 0x00, 0xc0],
        &[0xe6, 0xf4],
        LOOP,
    ];
    let image = image(code);
    let args = ["run", "--image", path(image.as_path()), "--memory", "16M", "--device", "edu", "--timeout", "5"];
    let Output { status, stdout, stderr } = causeway(&args).output().unwrap();
    assert_eq!(stdout, [b'Q', 0xc0], "{}", String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some((0xed << 1 | 1) & 0xff));
}

#[test]
fn images_that_hang_crash_or_are_none_have_their_codes() {
    let text = TempFile::new().unwrap();
    text.as_file().write_all(b"no image").unwrap();
    for (args, part) in [
        (&["run", "--image", "/nonexistent/image"][..], "/nonexistent/image"),
        (&["run", "--image", path(text.as_path())], "is not an image"),
    ] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str(), err.lines().count()), (4, "", 1), "{args:?}: {err}");
        assert!(err.contains(part), "{err}");
    }
    if !has_kvm() {
        return;
    }
    assert_eq!(run_image(&[LOOP], &["--timeout", "0.5"]).0, 10);
    assert_eq!(run_image(&[CRASH], &[]).0, 8);
}

#[test]
fn an_image_that_goes_where_nothing_is_has_crashed() {
    if !has_kvm() {
        return;
    }
    // mov eax, 0xd0000000; jmp eax: the PCI window
    let (code, _, err) = run_image(&[&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]], &["--timeout", "20"]);
    assert_eq!(code, 8, "{err}");
    assert!(err.contains("the guest crashed"), "{err}");
}

#[test]
fn an_image_finds_the_test_device_that_it_knows_from_qemu() {
    if !has_kvm() {
        return;
    }
    let code: &[&[u8]] = &[
        // mov eax, 0x04030201; mov dx, 0xe0; out dx, eax; inc dx; in al, dx
        &[0xb8, 1, 2, 3, 4, 0x66, 0xba, 0xe0, 0x00, 0xef, 0x66, 0x42, 0xec],
        // mov [0xff00fff0], al; xor eax, eax; mov al, [0xff00fff0]
        &[0xa2, 0xf0, 0xff, 0x00, 0xff, 0x31, 0xc0, 0xa0, 0xf0, 0xff, 0x00, 0xff],
        &[0xe6, 0xf4],
        LOOP,
    ];
    let (code, _, err) = run_image(code, &["--timeout", "20"]);
    assert_eq!(code, 2 << 1 | 1, "{err}");
}

#[test]
fn nothing_prints_help() {
    let (code, out, _) = run(&[]);
    assert_eq!(code, 0);
    assert!(out.contains("Usage: causeway"), "{out}");
}

#[test]
fn wrong_usage_is_code_2_and_runs_nothing() {
    for args in [
        &["run"][..],
        &["run", "--kernel", "k", "--image", "i"],
        &["fly"],
        &["run", "--kernel", "k", "--device", "edu,id=a", "--device", "edu,id=a"],
        &["run", "--kernel", "k", "--iommu", "vtd,intremap=off,eim=on"],
        &["run", "--kernel", "k", "--device", "edu,addr=5.0", "--device", "vfio,host=ffff:ff:1f.7,addr=05.0"],
        &["run", "--kernel", "k", "--device", "edu,addr=5.1"],
        &["run", "--kernel", "k", "--timeout", "1e-10"],
    ] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}");
        assert!(!err.is_empty());
    }
}

#[test]
fn a_refused_start_is_code_4_with_one_message() {
    let text = TempFile::new().unwrap();
    text.as_file().write_all(&[b'x'; 8192]).unwrap();
    let text = text.as_path().to_str().unwrap();
    let good = kernel(&[LOOP]);
    let good = good.as_path().to_str().unwrap();
    let vfio = "vfio,host=ffff:ff:1f.7";
    for (args, part) in [
        (&["run", "--kernel", "/nonexistent/kernel"][..], "/nonexistent/kernel"),
        (&["run", "--kernel", text], "is not a kernel"),
        (&["run", "--kernel", good, "--initrd", "/nonexistent/initrd"], "/nonexistent/initrd"),
        (&["run", "--kernel", good, "--device", vfio], "no PCI function ffff:ff:1f.7"),
        (&["run", "--kernel", good, "--device", vfio, "--iommu", "none"], "--iommu none"),
        (&["run", "--kernel", good, "--device", vfio, "--iommu", "vtd,caching-mode=off"], "caching-mode=on"),
    ] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str(), err.lines().count()), (4, "", 1), "{args:?}: {err}");
        assert!(err.contains(part), "{err}");
    }
}

#[test]
fn outputs_that_cannot_be_written_are_code_2_before_anything_else() {
    let dir = TempDir::new().unwrap();
    let folder = path(dir.as_path());
    for option in ["--stats", "--trace", "--log"] {
        for file in ["/nonexistent/file", folder] {
            // The kernel that is not there would be the next to be said.
            let (code, out, err) = run(&["run", "--kernel", "/nonexistent/kernel", option, file]);
            assert_eq!((code, out.as_str(), err.lines().count()), (2, "", 1), "{option} {file}: {err}");
            assert!(err.contains(file), "{err}");
        }
    }
    // What is asked for is not there before it is written.
    let stats = dir.as_path().join("stats");
    assert_eq!(run(&["run", "--kernel", "/nonexistent/kernel", "--stats", path(&stats)]).0, 4);
    assert_eq!(std::fs::read_dir(dir.as_path()).unwrap().count(), 0);
}

#[test]
fn a_file_to_write_that_waits_for_its_reader_does_not_hold_up_a_signal() {
    use std::os::unix::process::ExitStatusExt;
    let dir = TempDir::new().unwrap();
    let pipe = dir.as_path().join("pipe");
    let name = std::ffi::CString::new(path(&pipe)).unwrap();
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let mut child = causeway(&["run", "--kernel", "k", "--trace", path(&pipe)]).spawn().unwrap();
    // SAFETY: the child was not waited for, so the process id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) }, 0);
    assert_eq!(wait(&mut child).signal(), Some(libc::SIGTERM));
}

#[test]
fn an_error_that_nobody_can_hear_has_its_code_all_the_same() {
    for (args, code) in [
        (&["run", "--kernel", "k", "--device", "edu,id=a", "--device", "edu,id=a"][..], 2),
        (&["run", "--kernel", "/nonexistent/kernel"], 4),
        (&["test", "--filter", "no_such_test"], 2),
        (&["fly"], 2),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let status = causeway(args).stdout(writer.try_clone().unwrap()).stderr(writer).status().unwrap();
        assert_eq!(status.code(), Some(code), "{args:?}: {status}");
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(causeway(&["test", "--list"]).stdout(writer).status().unwrap().code(), Some(0));
}

#[test]
fn a_limit_on_open_files_that_is_too_low_is_said_with_what_to_do() {
    if !has_kvm() {
        return;
    }
    let image = image(&[LOOP]);
    let mut refused = 0;
    for limit in 6..32 {
        let script = format!("ulimit -n {limit}; exec \"$0\" run --memory 16M --timeout 0.01 --image \"$1\"");
        let arguments = ["-c", &script, env!("CARGO_BIN_EXE_causeway"), path(image.as_path())];
        let output = Command::new("sh").args(arguments).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.code() {
            Some(10) => break,
            _ => {
                assert!(said.contains("raise the limit on open files: ulimit -n"), "{limit}: {said}");
                refused += 1;
            }
        }
    }
    assert!((1..26).contains(&refused), "{refused} limits were refused");
}

#[test]
fn memory_that_kvm_does_not_take_is_refused_with_what_to_do() {
    if !has_kvm() {
        return;
    }
    let kernel = kernel(&[LOOP]);
    let (code, _, err) = run(&["run", "--kernel", path(kernel.as_path()), "--memory", "9T"]);
    assert_eq!(code, 4, "{err}");
    assert!(err.contains("memory") && err.contains("use a smaller --memory"), "{err}");
}

#[test]
fn power_off_is_code_0_and_the_serial_port_is_stdout() {
    if !has_kvm() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let stats = dir.as_path().join("stats.json");
    let (code, out, err) = run_guest(&[PRINT_A, POWER_OFF, LOOP], &["--stats", stats.to_str().unwrap()]);
    assert_eq!((code, out.as_str()), (0, "A"));
    assert!(!err.contains("error") && !err.contains("warn"), "{err}");
    let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(stats).unwrap()).unwrap();
    assert_eq!(stats["exit"], serde_json::json!({"reason": "poweroff", "code": 0}));
    assert_eq!(stats["units"][0]["id"], "vtd0");
}

#[test]
fn a_guest_reads_the_registers_of_the_unit_without_an_exit() {
    if !has_kvm() {
        return;
    }
    let (dir, unit) = (TempDir::new().unwrap(), 0xfed9_0000u32.to_le_bytes());
    let stats = dir.as_path().join("stats.json");
    let [event_address, event_high] = [0xfed9_0040u32, 0xfed9_0044].map(u32::to_le_bytes);
    let code: &[&[u8]] = &[
        // mov ecx, 10000; mov eax, [version]; loop: what is read for ever costs nothing.
        &[0xb9, 0x10, 0x27, 0, 0, 0xa1],
        &unit,
        &[0xe2, 0xf9],
        // mov dword [event address], 0xfee01230; mov al, [there + 1]; shr: the byte that was written.
        &[0xc7, 0x05],
        &event_address,
        &0xfee0_1230u32.to_le_bytes(),
        &[0xa0],
        &(u32::from_le_bytes(event_address) + 1).to_le_bytes(),
        // add al, 'A' - 0x12
        &[0x04, b'A' - 0x12],
        PRINT_AL,
        // add dword [event upper address], 5: a read and a write of it.
        &[0x83, 0x05],
        &event_high,
        &[5, 0xa0],
        &event_high,
        &[0x04, b'A'],
        PRINT_AL,
        &debug_exit(0),
        LOOP,
    ];
    let (code, out, err) = run_image(code, &["--stats", path(&stats)]);
    assert_eq!((code, out.as_str()), (1, "AF"), "{err}");
    let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(stats).unwrap()).unwrap();
    assert_eq!(stats["units"][0]["register_reads"], 0);
}

#[test]
fn statistics_that_cannot_be_written_at_the_end_are_an_error() {
    if !has_kvm() {
        return;
    }
    let kernel = kernel(&[PRINT_A, WAIT_FOR_INPUT, POWER_OFF, LOOP]);
    let run = |gone: bool| {
        let dir = TempDir::new().unwrap();
        let folder = dir.as_path().join("of the statistics");
        std::fs::create_dir(&folder).unwrap();
        let stats = folder.join("stats.json");
        let arguments = ["run", "--kernel", path(kernel.as_path()), "--memory", "64M", "--stats", path(&stats)];
        let mut command = causeway(&arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // The guest runs once it has printed.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        if gone {
            std::fs::remove_dir(&folder).unwrap();
        }
        child.stdin.take().unwrap().write_all(b"!").unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said.matches("the statistics could not be written to").count(), stats.exists())
    };
    assert_eq!(run(false), (Some(0), 0, true));
    assert_eq!(run(true), (Some(6), 1, false));
}

#[test]
fn a_reset_starts_the_guest_anew_and_is_a_crash_under_no_reboot() {
    if !has_kvm() {
        return;
    }
    let (code, out, _) = run_guest(&[PRINT_A, RESET, LOOP], &["--no-reboot", "--device", "edu"]);
    assert_eq!((code, out.as_str()), (8, "A"));
    let (code, out, _) = run_guest(&[PRINT_A, RESET, LOOP], &["--timeout", "3", "--cpus", "2", "--device", "edu"]);
    assert_eq!(code, 10);
    assert!(out.len() > 1, "the guest printed {out}");
}

#[test]
fn a_triple_fault_is_code_8_and_the_time_limit_is_code_10() {
    if !has_kvm() {
        return;
    }
    let (code, _, err) = run_guest(&[CRASH], &[]);
    assert_eq!(code, 8, "{err}");
    let (code, _, err) = run_guest(&[LOOP], &["--timeout", "0.5"]);
    assert_eq!(code, 10, "{err}");
}

#[test]
fn a_signal_from_outside_ends_it_by_that_signal() {
    use std::os::unix::process::ExitStatusExt;
    if !has_kvm() {
        return;
    }
    let kernel = kernel(&[PRINT_A, LOOP]);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut child = causeway(&["run", "--kernel", path(kernel.as_path()), "--memory", "64M", "--cpus", "2"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The guest runs once it has printed.
        let mut printed = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut printed).unwrap();
        // SAFETY: the child was not waited for, so the process id is still its own.
        assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
        let status = wait(&mut child);
        assert_eq!(status.signal(), Some(signal));
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn wait(child: &mut std::process::Child) -> std::process::ExitStatus {
    for _ in 0..1000 {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().unwrap();
    panic!("the program did not end within 10 s");
}
