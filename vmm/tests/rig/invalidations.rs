//! Guests that invalidate: a few instructions, which need /dev/kvm. Shared by the tests and the benchmark of the
//! worker, of which neither uses all.
#![allow(dead_code)]

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;
use vmm_sys_util::tempdir::TempDir;

/// `mov al, 0; out 0xf4, al`: the end.
pub const END: &[u8] = &[0xb0, 0, 0xe6, 0xf4, 0xeb, 0xfe];
/// A wait descriptor in each of 256 places of a queue at 8 MiB, which writes 1 at 9 MiB.
const WAITS: &[u8] = &[
    0xbf, 0, 0, 0x80, 0, // mov edi, 0x800000
    0xb9, 0, 1, 0, 0, // mov ecx, 256
    0xc7, 0x07, 0x25, 0, 0, 0, // mov dword [edi], 0x25
    0xc7, 0x47, 0x04, 1, 0, 0, 0, // mov dword [edi + 4], 1
    0xc7, 0x47, 0x08, 0, 0, 0x90, 0, // mov dword [edi + 8], 0x900000
    0xc7, 0x47, 0x0c, 0, 0, 0, 0, // mov dword [edi + 12], 0
    0x83, 0xc7, 16, // add edi, 16
    0xe2, 0xe0, // loop
];
/// The same in every other place, and an invalidation of the whole IOTLB before each.
const INVALIDATIONS_AND_WAITS: &[u8] = &[
    0xbf, 0, 0, 0x80, 0, // mov edi, 0x800000
    0xb9, 128, 0, 0, 0, // mov ecx, 128
    0xc7, 0x07, 0x12, 0, 0, 0, // mov dword [edi], 0x12
    0xc7, 0x47, 0x10, 0x25, 0, 0, 0, // mov dword [edi + 16], 0x25
    0xc7, 0x47, 0x14, 1, 0, 0, 0, // mov dword [edi + 20], 1
    0xc7, 0x47, 0x18, 0, 0, 0x90, 0, // mov dword [edi + 24], 0x900000
    0x83, 0xc7, 32, // add edi, 32
    0xe2, 0xe0, // loop
];

/// Fills a queue for a guest whose tail goes on by so many descriptors, one or two, of which the last says that they
/// are done: a guest that went on at one before would run round the queue.
pub fn queue(step: u8) -> &'static [u8] {
    if step == 1 { WAITS } else { INVALIDATIONS_AND_WAITS }
}

/// Turns the queue on, with the unit at `ebx`.
pub const QUEUE_ON: &[u8] = &[
    0xbb, 0, 0, 0xd9, 0xfe, // mov ebx, 0xfed90000
    0xc7, 0x83, 0x88, 0, 0, 0, 0, 0, 0, 0, // IQT
    0xc7, 0x83, 0x90, 0, 0, 0, 0, 0, 0x80, 0, // IQA
    0xc7, 0x83, 0x94, 0, 0, 0, 0, 0, 0, 0, //
    0xc7, 0x43, 0x18, 0, 0, 0, 4, // QIE
    0xbe, 0, 0, 0x90, 0, // mov esi, 0x900000
    0x31, 0xc0, // xor eax, eax
];
/// `c7 43 18 0`: QIE off.
pub const QUEUE_OFF: &[u8] = &[0xc7, 0x43, 0x18, 0, 0, 0, 0];
/// `mov eax, [ebx + 0x88]`: IQT, which a guest like Xen goes on from.
pub const READ_TAIL: &[u8] = &[0x8b, 0x83, 0x88, 0, 0, 0];

/// `count` invalidations as Linux makes them: the tail goes on by one or two, then the status is looked at, and FSTS in
/// each turn. `first` comes at the beginning of each.
pub fn invalidate(count: u32, step: u8, first: &[u8]) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(count.to_le_bytes());
    let begin = code.len();
    code.extend(first);
    code.extend([0xc7, 0x06, 0, 0, 0, 0]); // mov dword [esi], 0
    code.extend([0x83, 0xc0, 16 * step]); // add eax, step
    code.extend([0x25, 0xff, 0x0f, 0, 0]); // and eax, 0xfff
    code.extend([0x89, 0x83, 0x88, 0, 0, 0]); // mov [ebx + 0x88], eax
    code.extend([0x8b, 0x53, 0x34]); // mov edx, [ebx + 0x34]
    code.extend([0x83, 0x3e, 1, 0x75, 0xf8]); // cmp dword [esi], 1; jne
    let back = code.len() + 2 - begin;
    code.extend([0xe2, (back as u8).wrapping_neg()]);
    code
}

pub fn has_kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("no /dev/kvm: nothing to check");
    }
    there
}

/// The statistics of a machine with this unit that ran `code`.
pub fn run(unit: &str, code: &[&[u8]]) -> Value {
    let dir = TempDir::new().unwrap();
    let (image, stats) = (dir.as_path().join("image"), dir.as_path().join("stats.json"));
    let words = [0x1bad_b002u32, 0x1_0000, 0xe451_4ffe, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020];
    let mut file = std::fs::File::create(&image).unwrap();
    words.iter().for_each(|word| file.write_all(&word.to_le_bytes()).unwrap());
    code.iter().chain([&END]).for_each(|part| file.write_all(part).unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_causeway"));
    command.args(["run", "--memory", "16M", "--timeout", "120", "--iommu", unit, "--image"]).arg(image);
    let output = command.arg("--stats").arg(&stats).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&std::fs::read(stats).unwrap()).unwrap()
}
