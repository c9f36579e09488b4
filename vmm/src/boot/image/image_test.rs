use std::io::Write;

use proptest::prelude::*;
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::kvm::memory;

const RAM: u64 = 64 << 20;
const ENTRY: u32 = 0x10_0040;

/// An ELF file with one segment at 1 MiB and, if `note`, a PVH note; code from offset 0x200.
fn elf(is_64: bool, note: bool) -> Vec<u8> {
    let mut file = vec![0u8; 0x200];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', if is_64 { 2 } else { 1 }, 1, 1]);
    put(16, &TYPE_EXECUTABLE_386);
    put(18, &(if is_64 { 62u16 } else { 3 }).to_le_bytes());
    let header = |kind: u32, offset: u64, address: u64, file: u64, memory: u64| -> Vec<u8> {
        let words = [offset, address, address, file, memory];
        let mut bytes = kind.to_le_bytes().to_vec();
        if is_64 {
            bytes.extend([5, 0, 0, 0]);
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        } else {
            bytes.extend(words.iter().flat_map(|word| (*word as u32).to_le_bytes()));
        }
        bytes
    };
    let size = if is_64 { 56 } else { 32 };
    if is_64 {
        put(24, &u64::from(ENTRY).to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(54, &[size, 0, 2, 0]);
    } else {
        put(24, &ENTRY.to_le_bytes());
        put(28, &52u32.to_le_bytes());
        put(42, &[size, 0, 2, 0]);
    }
    let table = if is_64 { 64 } else { 52 };
    put(table, &header(1, 0x200, 0x10_0000, 0x100, 0x2000));
    let note_len = if note { 20 } else { 0 };
    put(table + usize::from(size), &header(4, 0x1e0, 0, note_len, note_len));
    let entry = (ENTRY + 4).to_le_bytes();
    put(0x1e0, &[&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0][..], b"Xen\0", &entry].concat());
    file.extend([0x90; 0x100]);
    file
}
const TYPE_EXECUTABLE_386: [u8; 2] = [2, 0];

/// Two pages at `address` and an entry point in them.
fn elf_at(address: u64) -> Vec<u8> {
    let mut file = elf(true, true);
    file[64 + 24..64 + 32].copy_from_slice(&address.to_le_bytes());
    file[0x1f0..0x1f4].copy_from_slice(&(address as u32).to_le_bytes());
    file
}

/// Puts a multiboot header with `flags` and, if they say so, `addresses` at `at`.
fn add_header(file: &mut [u8], at: usize, flags: u32, addresses: [u32; 5]) {
    let magic = 0x1bad_b002u32;
    let words = [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags)];
    for (i, word) in words.into_iter().chain(addresses).enumerate() {
        file[at + 4 * i..at + 4 * i + 4].copy_from_slice(&word.to_le_bytes());
    }
}

fn kludge(addresses: [u32; 5]) -> Vec<u8> {
    let mut file = vec![0x90; 0x400];
    add_header(&mut file, 0x40, 0x1_0003, addresses);
    file
}

const GOOD: [u32; 5] = [0x10_0020, 0x10_0000, 0x10_0100, 0x10_1000, 0x10_0080];

fn file(content: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(content).unwrap();
    file
}

fn open(content: &[u8]) -> Result<Image, boot::Error> {
    Image::open(file(content).as_path(), None, "", RAM)
}

fn refusal(content: &[u8]) -> String {
    match open(content) {
        Ok(_) => panic!("it was taken"),
        Err(e) => e.to_string(),
    }
}

fn word(ram: &Ram, at: u64) -> u64 {
    u64::from(ram.read_obj::<u32>(GuestAddress(at)).unwrap())
}

#[test]
fn pvh_images_are_entered_at_their_note_with_the_start_information() {
    for is_64 in [false, true] {
        let (image, initrd) = (file(&elf(is_64, true)), file(&[7; 5000]));
        let image = Image::open(image.as_path(), Some(initrd.as_path()), "test=a b", RAM).unwrap();
        let ram = memory::create(RAM, false).unwrap();
        // Twice: a guest reset loads everything again, also what the guest left behind the content of a segment.
        for _ in 0..2 {
            let start = image.load(&ram, RAM, 0xe_0000).unwrap();
            assert_eq!((start.mode, start.rip), (Mode::Protected, u64::from(ENTRY) + 4));
            let info = start.rbx;
            assert_eq!((word(&ram, info), word(&ram, info + 4)), (0x336e_c578, 1), "magic, version");
            assert_eq!(word(&ram, info + 12), 1, "modules");
            let module = word(&ram, info + 16);
            let (at, len) = (word(&ram, module), word(&ram, module + 8));
            assert_eq!((at % 4096, len, word(&ram, at)), (0, 5000, 0x0707_0707));
            let line: [u8; 9] = ram.read_obj(GuestAddress(word(&ram, info + 24))).unwrap();
            assert_eq!(&line, b"test=a b\0");
            assert_eq!(word(&ram, info + 32), 0xe_0000, "RSDP");
            let (map, entries) = (word(&ram, info + 40), word(&ram, info + 48));
            assert_eq!(entries, memory_map(RAM).len() as u64);
            assert_eq!((word(&ram, map + 8), word(&ram, map + 16)), (0x9_fc00, 1), "the first region is RAM");
            assert_eq!((word(&ram, 0x10_0000), word(&ram, 0x10_0100)), (0x9090_9090, 0));
            ram.write_obj(u64::MAX, GuestAddress(0x10_0100)).unwrap();
        }
    }
}

#[test]
fn multiboot_elf_goes_before_its_note_and_is_told_memory_module_and_command_line() {
    let mut content = elf(false, true);
    add_header(&mut content, 0x100, 3, [0; 5]);
    let (image, initrd) = (file(&content), file(b"module"));
    let name = image.as_path().to_owned();
    let image = Image::open(&name, Some(initrd.as_path()), "x=1", RAM).unwrap();
    let ram = memory::create(RAM, false).unwrap();
    let start = image.load(&ram, RAM, 0).unwrap();
    assert_eq!((start.rip, start.rax, start.mode), (u64::from(ENTRY), 0x2bad_b002, Mode::Protected));
    let info = start.rbx;
    assert_eq!(word(&ram, info), 0b10_0100_1101, "memory, command line, modules, memory map, loader");
    assert_eq!((word(&ram, info + 4), word(&ram, info + 8)), (639, (RAM >> 10) - 1024));
    let line = format!("{} x=1\0", name.display()).into_bytes();
    let mut told = vec![0; line.len()];
    ram.read_slice(&mut told, GuestAddress(word(&ram, info + 16))).unwrap();
    assert_eq!(told, line);
    let module = word(&ram, info + 24);
    assert_eq!((word(&ram, info + 20), word(&ram, module + 4) - word(&ram, module)), (1, 6));
    let (len, map) = (word(&ram, info + 44), word(&ram, info + 48));
    assert_eq!((len, word(&ram, map), word(&ram, map + 20)), (24 * memory_map(RAM).len() as u64, 20, 1));
}

#[test]
fn the_kludge_loads_a_file_of_any_kind_where_its_header_says() {
    let image = open(&kludge(GOOD)).unwrap();
    let segment = Segment { gpa: 0x10_0000, len: 0x1000, file: 0x20..0x120 };
    assert_eq!(image.layout, Layout { protocol: Protocol::Multiboot, entry: 0x10_0080, segments: vec![segment] });
    // No ends given: the rest of the file, and nothing behind it.
    let image = open(&kludge([0x10_0020, 0x10_0000, 0, 0, 0x10_0080])).unwrap();
    assert_eq!(image.layout.segments, [Segment { gpa: 0x10_0000, len: 0x3e0, file: 0x20..0x400 }]);
}

#[test]
fn what_is_no_image_is_refused_with_the_reason() {
    let mut no_note = elf(true, false);
    let mut video = elf(false, false);
    add_header(&mut video, 0x100, 7, [0; 5]);
    let mut other = elf(true, true);
    other[18] = 40;
    let mut pie = elf(true, true);
    pie[16] = 3;
    let outside = elf_at(0x6000);
    let low = elf_at(0x9_f000);
    let hole = elf_at(0xc_0000);
    let mut wraps = elf(true, true);
    wraps[64 + 24..64 + 32].copy_from_slice(&(u64::MAX - 0x10).to_le_bytes());
    let mut entry = elf(true, true);
    entry[0x1f0..0x1f4].copy_from_slice(&0x20_0000u32.to_le_bytes());
    let mut more_in_file = elf(true, true);
    more_in_file[64 + 40..64 + 48].copy_from_slice(&1u64.to_le_bytes());
    let truncated = elf(true, true)[..0x280].to_vec();
    let headers_gone = elf(true, true)[..70].to_vec();
    let wrong = |at: usize, value: u32| {
        let mut addresses = GOOD;
        addresses[at] = value;
        kludge(addresses)
    };
    for (content, part) in [
        (&b""[..], "neither an ELF file"),
        (b"#!/bin/sh\n", "neither an ELF file"),
        (b"\x7fELF", "neither a 32-bit nor a 64-bit"),
        (b"\x7fELF\x02\x01", "header is truncated"),
        (&no_note, "neither a PVH note"),
        (&video, "video mode"),
        (&other, "another processor"),
        (&pie, "not an ELF executable"),
        (&outside, "wants to be loaded at 0x6000-0x7fff"),
        (&low, "wants to be loaded at 0x9f000-0xa0fff"),
        (&hole, "wants to be loaded at 0xc0000-0xc1fff"),
        (&wraps, "wraps around"),
        (&entry, "entry point is in none"),
        (&more_in_file, "more bytes in the file"),
        (&truncated, "beyond the end of the file"),
        (&headers_gone, "program headers are truncated"),
        (&wrong(0, 0x0f_0000), "contradict"),
        (&wrong(1, 0x10_0030), "contradict"),
        (&wrong(2, 0x10_4000), "more than the file has"),
        (&wrong(3, 0x10_0080), "contradict"),
        (&wrong(3, 0x7000_0000), "wants to be loaded"),
        (&wrong(4, 0), "entry point is in none"),
    ] {
        let message = refusal(content);
        assert!(message.contains(part), "{message}, not: {part}");
    }
    // The remedy names the other way in.
    no_note.truncate(0x1e0);
    assert!(refusal(&no_note).contains("`--kernel` a bzImage"));
}

#[test]
fn images_below_640_kib_load_where_nothing_of_ours_is() {
    for address in [0x1000u64, 0x5000, 0x8000, 0x1_e000, 0x3_0000, 0x9_dc00] {
        let image = open(&elf_at(address)).unwrap();
        let ram = memory::create(RAM, false).unwrap();
        let start = image.load(&ram, RAM, 0xe_0000).unwrap();
        assert_eq!((start.rip, word(&ram, address), word(&ram, address + 0x100)), (address, 0x9090_9090, 0));
        let (info, line) = (start.rbx, word(&ram, start.rbx + 24));
        assert_eq!((word(&ram, info), word(&ram, line) & 0xff), (0x336e_c578, 0), "{address:#x}");
    }
    for address in [0u64, 0x400, 0x6000, 0x7000, 0x1_f000, 0x2_0000, 0x2_f000, 0x9_e000, 0x9_fc00, 0xe_0000, 0xf_f000] {
        assert!(refusal(&elf_at(address)).contains("wants to be loaded at"), "{address:#x}");
    }
}

#[test]
fn segments_that_overlap_are_refused_so_that_loading_is_bounded_by_ram() {
    let mut content = elf(true, true);
    let segment: Vec<u8> = content[64..120].to_vec();
    content.splice(0x200..0x200, std::iter::repeat_n(segment, 60_000).flatten());
    content[32..40].copy_from_slice(&0x200u64.to_le_bytes());
    content[56..58].copy_from_slice(&60_000u16.to_le_bytes());
    // The PVH note is the first program header.
    content.copy_within(120..176, 0x200);
    assert!(refusal(&content).contains("overlap"));
}

#[test]
fn a_module_must_fit_above_the_image() {
    let (image, initrd) = (file(&elf(true, true)), TempFile::new().unwrap());
    initrd.as_file().set_len(RAM - 0x10_0000).unwrap();
    let opened = Image::open(image.as_path(), Some(initrd.as_path()), "", RAM);
    assert!(matches!(opened, Err(boot::Error::DoesNotFit { .. })));
    initrd.as_file().set_len(RAM + 1).unwrap();
    assert!(matches!(Image::open(image.as_path(), Some(initrd.as_path()), "", RAM), Err(boot::Error::Read { .. })));
}

fn taken_images_load(content: &[u8]) {
    let Ok(image) = open(content) else { return };
    let ram = memory::create(RAM, false).unwrap();
    let start = image.load(&ram, RAM, 0).unwrap();
    assert!(start.rip < RAM && start.rip >= 0x1000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever the bytes are: refused, or loaded inside RAM.
    #[test]
    fn files_with_any_damage_are_refused_or_load(
        kind in 0..4u8,
        damage in proptest::collection::vec((0..0x200usize, any::<u8>()), 0..12),
        cut in proptest::option::of(0..0x400usize),
    ) {
        let mut content = match kind {
            0 => elf(false, true),
            1 => elf(true, true),
            2 => kludge(GOOD),
            _ => {
                let mut content = elf(false, false);
                add_header(&mut content, 0x100, 3, [0; 5]);
                content
            }
        };
        for (at, value) in damage {
            content[at] = value;
        }
        content.truncate(cut.unwrap_or(content.len()));
        taken_images_load(&content);
    }

    /// Addresses of the kludge that are near each other, so that many are taken.
    #[test]
    fn kludges_with_any_addresses_are_refused_or_load(
        words in proptest::array::uniform5(prop_oneof![0x0f_ff00..0x10_0500u32, any::<u32>(), Just(0)]),
    ) {
        taken_images_load(&kludge(words));
    }
}
