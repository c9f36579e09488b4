//! Reads ELF files: the segments, the entry point and the PVH note. Only what a boot loader needs; everything checked,
//! because the file is whatever somebody gave us.

use std::ops::Range;

use super::Segment;

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// The note with the 32-bit entry point: XEN_ELFNOTE_PHYS32_ENTRY.
const NOTE_PVH_ENTRY: u32 = 18;

/// What an ELF file says.
#[derive(Debug, PartialEq, Eq)]
pub struct Elf {
    /// Whether it is a 64-bit file.
    pub is_64: bool,
    /// The entry point, as a physical address.
    pub entry: u64,
    /// The entry point of the PVH note, if there is one.
    pub pvh_entry: Option<u64>,
    /// What is loaded.
    pub segments: Vec<Segment>,
}

/// Little-endian numbers of a byte slice; `None` beyond its end.
pub fn number(bytes: &[u8], at: u64, len: usize) -> Option<u64> {
    let range = part(at, len as u64)?;
    let mut value = [0; 8];
    value[..len].copy_from_slice(bytes.get(range)?);
    Some(u64::from_le_bytes(value))
}

fn part(at: u64, len: u64) -> Option<Range<usize>> {
    let end = at.checked_add(len)?;
    Some(usize::try_from(at).ok()?..usize::try_from(end).ok()?)
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    virtual_address: u64,
    physical_address: u64,
    file_size: u64,
    memory_size: u64,
}

impl ProgramHeader {
    fn read(file: &[u8], at: u64, is_64: bool) -> Option<Self> {
        let field = |offset_32, offset_64, len_64| match is_64 {
            true => number(file, at.checked_add(offset_64)?, len_64),
            false => number(file, at.checked_add(offset_32)?, 4),
        };
        Some(Self {
            kind: field(0, 0, 4)? as u32,
            offset: field(4, 8, 8)?,
            virtual_address: field(8, 16, 8)?,
            physical_address: field(12, 24, 8)?,
            file_size: field(16, 32, 8)?,
            memory_size: field(20, 40, 8)?,
        })
    }
}

/// Whether the file begins as an ELF file does.
pub fn is_elf(file: &[u8]) -> bool {
    file.starts_with(MAGIC)
}

/// Parses `file`, which [`is_elf`].
///
/// # Errors
/// What is wrong with it, for the user.
pub fn parse(file: &[u8]) -> Result<Elf, &'static str> {
    const TRUNCATED: &str = "its ELF header is truncated";
    let is_64 = match file.get(4) {
        Some(&CLASS_32) => false,
        Some(&CLASS_64) => true,
        _ => return Err("it is neither a 32-bit nor a 64-bit ELF file"),
    };
    if file.get(5) != Some(&LITTLE_ENDIAN) {
        return Err("it is not a little-endian ELF file");
    }
    let field = |offset_32, offset_64, len_32, len_64| match is_64 {
        true => number(file, offset_64, len_64).ok_or(TRUNCATED),
        false => number(file, offset_32, len_32).ok_or(TRUNCATED),
    };
    if field(16, 16, 2, 2)? as u16 != TYPE_EXECUTABLE {
        return Err("it is not an ELF executable (position-independent and relocatable files cannot be booted)");
    }
    if !matches!((is_64, field(18, 18, 2, 2)? as u16), (false, MACHINE_386) | (true, MACHINE_X86_64)) {
        return Err("it is an ELF file for another processor");
    }
    let entry = field(24, 24, 4, 8)?;
    let table = field(28, 32, 4, 8)?;
    let entry_size = field(42, 54, 2, 2)?;
    let entries = field(44, 56, 2, 2)?;
    if entry_size < if is_64 { 56 } else { 32 } {
        return Err("its program headers are too small");
    }
    let mut elf = Elf { is_64, entry, pvh_entry: None, segments: Vec::new() };
    let mut physical_entry = None;
    for index in 0..entries {
        let header = table
            .checked_add(index * entry_size)
            .and_then(|at| ProgramHeader::read(file, at, is_64))
            .ok_or("its program headers are truncated")?;
        let content = part(header.offset, header.file_size).filter(|range| range.end <= file.len());
        match header.kind {
            SEGMENT_LOAD if header.memory_size > 0 => {
                let file = content.ok_or("a segment lies beyond the end of the file")?;
                if header.file_size > header.memory_size {
                    return Err("a segment has more bytes in the file than in memory");
                }
                if let Some(into) = entry.checked_sub(header.virtual_address).filter(|into| *into < header.memory_size)
                {
                    physical_entry = header.physical_address.checked_add(into);
                }
                elf.segments.push(Segment { gpa: header.physical_address, len: header.memory_size, file });
            }
            SEGMENT_NOTE if elf.pvh_entry.is_none() => {
                let range = content.ok_or("a note lies beyond the end of the file")?;
                elf.pvh_entry = pvh_note(&file[range]);
            }
            _ => {}
        }
    }
    elf.entry = physical_entry.unwrap_or(entry);
    Ok(elf)
}

/// The entry point in the first PVH note of `notes`. Each note is at least 12 bytes, so this ends.
fn pvh_note(notes: &[u8]) -> Option<u64> {
    let mut at = 0u64;
    loop {
        let name_len = number(notes, at, 4)?;
        let value_len = number(notes, at + 4, 4)?;
        let kind = number(notes, at + 8, 4)?;
        let name_at = at + 12;
        let value_at = name_at.checked_add(name_len.next_multiple_of(4))?;
        let name = notes.get(part(name_at, name_len)?)?;
        if name == b"Xen\0" && kind == u64::from(NOTE_PVH_ENTRY) {
            return match value_len {
                4 => number(notes, value_at, 4),
                8 => number(notes, value_at, 8),
                _ => None,
            };
        }
        at = value_at.checked_add(value_len.next_multiple_of(4))?;
    }
}

/// The content of the first section called `name`.
pub fn section<'a>(file: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let is_64 = is_elf(file) && file.get(4) == Some(&CLASS_64);
    let (table, size) =
        if is_64 { (number(file, 40, 8)?, number(file, 58, 2)?) } else { (number(file, 32, 4)?, number(file, 46, 2)?) };
    let (count, names) =
        if is_64 { (number(file, 60, 2)?, number(file, 62, 2)?) } else { (number(file, 48, 2)?, number(file, 50, 2)?) };
    let header = |index: u64| table.checked_add(index * size);
    let content = |index: u64| {
        let at = header(index)?;
        let (offset, len) = if is_64 {
            (number(file, at.checked_add(24)?, 8)?, number(file, at.checked_add(32)?, 8)?)
        } else {
            (number(file, at.checked_add(16)?, 4)?, number(file, at.checked_add(20)?, 4)?)
        };
        file.get(part(offset, len)?)
    };
    let names = content(names)?;
    (0..count).find_map(|index| {
        let at = number(file, header(index)?, 4)? as usize;
        let rest = names.get(at..)?;
        (rest.starts_with(name) && rest.get(name.len()) == Some(&0)).then(|| content(index)).flatten()
    })
}
