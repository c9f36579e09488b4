//! What the tests of the program share that boot small images.

use std::io::Write;

use vmm_sys_util::tempfile::TempFile;

/// Whether this machine has /dev/kvm; says so where it has not.
pub fn has_kvm() -> bool {
    let there = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        eprintln!("no /dev/kvm: nothing to check");
    }
    there
}

/// 32-bit code behind a multiboot header with addresses.
pub fn image(code: &[u8]) -> TempFile {
    let words = [0x1bad_b002u32, 0x1_0000, 0xe451_4ffe, 0x10_0000, 0x10_0000, 0, 0, 0x10_0020];
    let mut image: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    image.extend_from_slice(code);
    let file = TempFile::new().unwrap();
    file.as_file().write_all(&image).unwrap();
    file
}
