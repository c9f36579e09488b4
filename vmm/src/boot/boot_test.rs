use super::*;
use crate::kvm::memory;
use std::io::Write;
use vmm_sys_util::tempfile::TempFile;

const RAM: u64 = 64 << 20;

/// The smallest file that has what a loader looks at.
fn bzimage(edit: impl Fn(&mut setup_header)) -> TempFile {
    let mut header = setup_header {
        setup_sects: 1,
        header: HEADER_MAGIC,
        version: 0x20f,
        loadflags: LOADED_HIGH,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        initrd_addr_max: 0x7fff_ffff,
        pref_address: 0x100_0000,
        init_size: 0x100_0000,
        ..Default::default()
    };
    edit(&mut header);
    let mut image = vec![0u8; 1024];
    image[0x1f1..0x1f1 + header.as_slice().len()].copy_from_slice(header.as_slice());
    image.extend_from_slice(b"protected-mode code");
    let file = TempFile::new().unwrap();
    file.as_file().write_all(&image).unwrap();
    file
}

fn open_payload(kernel: &TempFile, initrd: Option<&TempFile>, cmdline: &str) -> Result<Kernel, Error> {
    Kernel::open(kernel.as_path(), initrd.map(TempFile::as_path), cmdline, RAM)
}

#[test]
fn kernel_initrd_and_command_line_are_where_the_boot_parameters_say() {
    let kernel = bzimage(|_| {});
    let initrd = TempFile::new().unwrap();
    initrd.as_file().write_all(&[7; 5000]).unwrap();
    let ram = memory::create(RAM, false).unwrap();

    let mut payload = open_payload(&kernel, Some(&initrd), "console=ttyS0").unwrap();
    // Twice: a guest reset loads everything again.
    for _ in 0..2 {
        let start = payload.load(&ram, RAM, layout::ACPI_TABLES).unwrap();
        assert_eq!(start.rip, layout::HIGH_MEMORY + 0x200);
        let code: [u8; 19] = ram.read_obj(GuestAddress(layout::HIGH_MEMORY)).unwrap();
        assert_eq!(&code, b"protected-mode code");

        let params: boot_params = ram.read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap();
        let (image, size, rsdp, line) =
            (params.hdr.ramdisk_image, params.hdr.ramdisk_size, params.acpi_rsdp_addr, params.hdr.cmd_line_ptr);
        assert_eq!((size, rsdp), (5000, layout::ACPI_TABLES));
        assert_eq!(u64::from(image) % 4096, 0);
        let first_and_last: [u8; 2] = [0, 4999].map(|i| ram.read_obj(GuestAddress(u64::from(image) + i)).unwrap());
        assert_eq!(first_and_last, [7, 7]);
        let text: [u8; 14] = ram.read_obj(GuestAddress(line.into())).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
        ram.write_obj(0u64, GuestAddress(layout::HIGH_MEMORY)).unwrap();
    }
}

#[test]
fn the_memory_map_says_what_ram_is_and_nothing_overlaps() {
    for size in [RAM, 5 << 30] {
        let map = memory_map(size);
        let mut sorted = map.clone();
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let ram: u64 = map.iter().filter(|(.., kind)| *kind == E820_RAM).map(|(_, len, _)| len).sum();
        assert_eq!(ram, size - (layout::HIGH_MEMORY - layout::EBDA));
        let first_is_as_said = map[0] == (0, 0x9_fc00, E820_RAM) && map[1] == (0x9_fc00, 0x400, E820_RESERVED);
        assert!(first_is_as_said, "{map:x?}");
    }
}

#[test]
fn the_bios_data_area_is_as_firmware_leaves_it_whatever_is_booted() {
    let kernel = Payload::Kernel(open_payload(&bzimage(|_| {}), None, "").unwrap());
    // `jmp .`, behind a multiboot header with addresses.
    let words = [0x1bad_b002u32, 0x1_0000, 0xe451_4ffe, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020, 0xfeeb];
    let image = TempFile::new().unwrap();
    image.as_file().write_all(&words.map(u32::to_le_bytes).concat()).unwrap();
    let image = Payload::Image(Image::open(image.as_path(), None, "", RAM).unwrap());
    for mut payload in [kernel, image] {
        let ram = memory::create(RAM, false).unwrap();
        // Twice: the guest may have written there before its reset.
        for _ in 0..2 {
            payload.load(&ram, RAM, layout::ACPI_TABLES).unwrap();
            let word = |at| ram.read_obj::<u16>(GuestAddress(at)).unwrap();
            assert_eq!((word(0x40e), word(0x413), word(0x9_fc00)), (0x9fc0, 639, 1));
            ram.write_slice(&[0; 0x100], GuestAddress(0x400)).unwrap();
        }
    }
}

#[test]
fn page_tables_map_four_gib_to_themselves() {
    let ram = memory::create(RAM, false).unwrap();
    write_page_tables(&ram).unwrap();
    let entry = |address: u64| ram.read_obj::<u64>(GuestAddress(address)).unwrap();
    for address in [0u64, 0x20_0000, 0x1234_5678, 0xfee0_0000, 0xffff_ffff] {
        let level3 = entry(layout::PAGE_TABLES + (address >> 39 & 511) * 8) & !0xfff;
        let level2 = entry(level3 + (address >> 30 & 511) * 8) & !0xfff;
        let leaf = entry(level2 + (address >> 21 & 511) * 8);
        assert_eq!((leaf & 0x83, leaf & !0x1f_ffff), (0x83, address & !0x1f_ffff));
    }
}

#[test]
fn what_is_not_a_kernel_is_refused_with_the_reason() {
    let text = TempFile::new().unwrap();
    text.as_file().write_all(&[b'x'; 4096]).unwrap();
    let short = TempFile::new().unwrap();
    for (file, reason) in [
        (text, "no Linux boot header"),
        (short, "too short"),
        (bzimage(|header| header.version = 0x204), "older than 2.12"),
        (bzimage(|header| header.xloadflags = 0), "no 64-bit entry"),
    ] {
        let message = open_payload(&file, None, "").err().unwrap().to_string();
        assert!(message.contains(reason), "{message}");
    }
    let missing = Kernel::open(Path::new("/nonexistent/kernel"), None, "", RAM).err().unwrap();
    assert!(matches!(missing, Error::Read { what: "the kernel", .. }));
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting_for_it() {
    let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let pipe = dir.as_path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: the name is a NUL-terminated string that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let socket = dir.as_path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (path, kind) in [
        (dir.as_path(), "a directory"),
        (&pipe, "a pipe"),
        (&socket, "a socket"),
        (Path::new("/dev/null"), "a character device"),
    ] {
        let message = Kernel::open(path, None, "", RAM).err().unwrap().to_string();
        assert_eq!(
            message,
            format!("the kernel {} cannot be used: it is {kind}, and a regular file is needed", path.display())
        );
        let kernel = bzimage(|_| {});
        let message = Kernel::open(kernel.as_path(), Some(path), "", RAM).err().unwrap().to_string();
        assert!(message.contains(kind), "{message}");
        let message = Image::open(path, None, "", RAM).err().unwrap().to_string();
        assert!(message.contains(kind), "{message}");
    }
}

#[test]
fn an_initrd_that_no_memory_is_large_enough_for_is_told_from_one_that_needs_more() {
    let kernel = bzimage(|_| {});
    let refused = |initrd: u64, ram: u64| {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(initrd).unwrap();
        Kernel::open(kernel.as_path(), Some(file.as_path()), "", ram).err().map(|e| e.to_string())
    };
    // Below 0x8000_0000, the kernel's limit, and behind the 32 MiB that the kernel needs.
    let most = (2u64 << 30) - (32 << 20);
    for ram in [RAM, 16 << 30] {
        let message = refused(most + 1, ram).unwrap();
        assert!(message.contains("smaller initrd") && message.contains(&most.to_string()), "{message}");
    }
    assert!(refused(most, RAM).unwrap().contains("larger --memory"));
    assert_eq!(refused(most, 2 << 30), None);
}

#[test]
fn what_does_not_fit_is_refused_before_anything_runs() {
    let kernel = bzimage(|header| header.init_size = RAM as u32);
    assert!(matches!(open_payload(&kernel, None, ""), Err(Error::DoesNotFit { .. })));

    let initrd = TempFile::new().unwrap();
    initrd.as_file().set_len(RAM).unwrap();
    assert!(matches!(open_payload(&bzimage(|_| {}), Some(&initrd), ""), Err(Error::DoesNotFit { .. })));

    let long = "x".repeat(2048);
    assert!(matches!(open_payload(&bzimage(|_| {}), None, &long), Err(Error::CmdlineTooLong { max: 2047, .. })));
}
