//! Multiboot 1 (the Multiboot Specification 0.6.96): the header in the file, and the information for the image.

use super::elf::number;
use super::{Segment, StartInfo};
use crate::boot::E820_RAM;
use crate::boot::layout;

/// What EAX holds at the entry point.
pub const LOADER_MAGIC: u64 = 0x2bad_b002;
const HEADER_MAGIC: u64 = 0x1bad_b002;
/// The header lies in the first 8192 bytes, aligned to 4.
const SEARCHED: usize = 8192;

/// The lower 16 flags must be understood: page-aligned modules, a memory map. Video modes are not.
const UNDERSTOOD: u32 = 0b11;
/// The header has the addresses of the a.out kludge.
const HAS_ADDRESSES: u32 = 1 << 16;

/// A multiboot header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    at: u64,
    flags: u32,
}

/// Finds the header: magic and checksum.
pub fn find(file: &[u8]) -> Option<Header> {
    let searched = &file[..file.len().min(SEARCHED)];
    (0..searched.len() as u64).step_by(4).find_map(|at| {
        let word = |index: u64| number(searched, at + 4 * index, 4);
        let (magic, flags, checksum) = (word(0)?, word(1)?, word(2)?);
        (magic == HEADER_MAGIC && (magic + flags + checksum) as u32 == 0).then_some(Header { at, flags: flags as u32 })
    })
}

impl Header {
    /// Whether we can do all that the image asks for.
    pub fn check(self) -> Result<(), &'static str> {
        if self.flags & 0xffff & !UNDERSTOOD != 0 {
            return Err("its multiboot header asks for a video mode or another feature that is not offered");
        }
        Ok(())
    }

    /// What the a.out kludge loads, and its entry point. `None`: the file must be an ELF file.
    pub fn kludge(self, file: &[u8]) -> Option<Result<(Segment, u64), &'static str>> {
        (self.flags & HAS_ADDRESSES != 0).then(|| {
            let word = |index: u64| number(file, self.at + 4 * index, 4).ok_or("its multiboot header is truncated");
            let (header, load, load_end, bss_end, entry) = (word(3)?, word(4)?, word(5)?, word(6)?, word(7)?);
            const WRONG: &str = "the addresses in its multiboot header contradict each other";
            let offset = header.checked_sub(load).and_then(|into| self.at.checked_sub(into)).ok_or(WRONG)?;
            let in_file = file.len() as u64 - offset;
            let loaded = match load_end {
                0 => in_file,
                end => end.checked_sub(load).ok_or(WRONG)?,
            };
            if loaded > in_file {
                return Err("its multiboot header loads more than the file has");
            }
            let len = match bss_end {
                0 => loaded,
                end => end.checked_sub(load).filter(|len| *len >= loaded).ok_or(WRONG)?,
            };
            Ok((Segment { gpa: load, len, file: offset as usize..(offset + loaded) as usize }, entry))
        })
    }
}

const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MMAP: u32 = 1 << 6;
const INFO_LOADER: u32 = 1 << 9;

const INFO: u64 = layout::BOOT_PARAMS;
const MODULES: u64 = INFO + 0x100;
const LOADER_NAME: u64 = INFO + 0x140;
const MMAP: u64 = INFO + 0x200;
const NAME: &[u8] = b"causeway\0";

/// The information structure and what it points at: (address, bytes). The first is what EBX points at.
pub fn information(start: &StartInfo) -> Vec<(u64, Vec<u8>)> {
    let mut mmap = Vec::new();
    for (addr, len, kind) in &start.memory {
        mmap.extend_from_slice(&20u32.to_le_bytes());
        mmap.extend_from_slice(&addr.to_le_bytes());
        mmap.extend_from_slice(&len.to_le_bytes());
        mmap.extend_from_slice(&kind.to_le_bytes());
    }
    let kib_from = |first: u64| {
        let region = start.memory.iter().find(|(addr, _, kind)| *addr == first && *kind == E820_RAM);
        region.map_or(0, |(_, len, _)| (len >> 10) as u32)
    };
    let module: Vec<u8> = match start.module {
        None => Vec::new(),
        Some((at, len)) => {
            [at as u32, (at + len) as u32, start.module_name as u32, 0].into_iter().flat_map(u32::to_le_bytes).collect()
        }
    };
    let modules = u32::from(start.module.is_some());
    let mut info = vec![0; 116];
    let mut put = |at: usize, value: u32| info[at..at + 4].copy_from_slice(&value.to_le_bytes());
    put(0, INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MMAP | INFO_LOADER);
    put(4, kib_from(0));
    put(8, kib_from(layout::HIGH_MEMORY));
    put(16, start.cmdline as u32);
    put(20, modules);
    put(24, MODULES as u32);
    put(44, mmap.len() as u32);
    put(48, MMAP as u32);
    put(64, LOADER_NAME as u32);
    vec![(INFO, info), (MODULES, module), (LOADER_NAME, NAME.to_vec()), (MMAP, mmap)]
}
