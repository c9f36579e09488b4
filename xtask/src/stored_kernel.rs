//! A guest's kernel without its compression, which in the nested bench each guest would undo beneath two emulations;
//! here it is done once. What results is still a bzImage: the distribution's setup header, then the kernel as it
//! unpacks itself, each part at its place, and at the 64-bit entry point a jump to it. It has no other entry point,
//! cannot be relocated, and its addresses are not randomized.

use anyhow::{Context, Result, bail, ensure};
use std::io::Read;

/// Where a boot loader puts the protected-mode code.
const LOADED_AT: u64 = 0x10_0000;
/// The 64-bit entry point in it, and what may stand there.
const ENTRY: usize = 0x200;
const JUMP_BYTES: usize = 7;
const LARGEST: u64 = 512 << 20;
const SEGMENT_LOAD: u64 = 1;

/// A little-endian number of so many bytes.
fn number(bytes: &[u8], at: u64, len: usize) -> Result<u64> {
    let at = usize::try_from(at)?;
    let part = at.checked_add(len).and_then(|end| bytes.get(at..end)).context("the file is too short")?;
    Ok(part.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn part(bytes: &[u8], at: u64, len: u64) -> Result<&[u8]> {
    let (at, len) = (usize::try_from(at)?, usize::try_from(len)?);
    at.checked_add(len).and_then(|end| bytes.get(at..end)).context("the file is too short")
}

/// The same kernel, uncompressed.
///
/// # Errors
/// It is no bzImage, or compressed in a way that is not known here.
pub fn stored(bzimage: &[u8]) -> Result<Vec<u8>> {
    ensure!(part(bzimage, 0x202, 4)? == b"HdrS", "it is no bzImage");
    let sectors = match number(bzimage, 0x1f1, 1)? {
        0 => 4,
        sectors => sectors,
    };
    let setup = part(bzimage, 0, (sectors + 1) * 512)?;
    let (offset, length) = (number(bzimage, 0x248, 4)?, number(bzimage, 0x24c, 4)?);
    let kernel = decompress(part(bzimage, setup.len() as u64 + offset, length)?)?;
    ensure!(kernel.starts_with(b"\x7fELF\x02\x01"), "what it holds is no 64-bit ELF file");
    let entry = number(&kernel, 24, 8)?;
    let (table, count) = (number(&kernel, 32, 8)?, number(&kernel, 56, 2)?);
    let mut code: Vec<u8> = Vec::new();
    for index in 0..count {
        let header = part(&kernel, table.saturating_add(index * 56), 56)?;
        let field = |at| number(header, at, 8);
        if number(header, 0, 4)? != SEGMENT_LOAD {
            continue;
        }
        let (address, size, space) = (field(24)?, field(32)?, field(40)?);
        let content = part(&kernel, field(8)?, size)?;
        // Behind the entry point, which is ours.
        let at = address.checked_sub(LOADED_AT).filter(|at| *at >= (ENTRY + JUMP_BYTES) as u64);
        let at = at.with_context(|| format!("a part of it belongs to {address:#x}"))?;
        ensure!(size <= space && at.saturating_add(space) <= LARGEST, "a part of it is too large");
        let (at, space) = (usize::try_from(at)?, usize::try_from(space)?);
        // Memory that the kernel takes for zero has to be.
        code.resize(code.len().max(at + space), 0);
        code[at..at + content.len()].copy_from_slice(content);
    }
    ensure!(entry >= LOADED_AT && entry - LOADED_AT < code.len() as u64, "its entry point {entry:#x} is outside of it");
    // mov eax, entry; jmp rax
    let target = u32::try_from(entry)?.to_le_bytes();
    let jump = [0xb8, target[0], target[1], target[2], target[3], 0xff, 0xe0];
    code[ENTRY..ENTRY + JUMP_BYTES].copy_from_slice(&jump);
    Ok([setup, &code].concat())
}

/// The kernel's build puts the size behind what is compressed.
fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    if payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        ruzstd::decoding::StreamingDecoder::new(payload)?.take(LARGEST).read_to_end(&mut content)?;
    } else if payload.starts_with(b"\xfd7zXZ\0") {
        let size = payload.len().saturating_sub(4);
        lzma_rs::xz_decompress(&mut &payload[..size], &mut content).map_err(|error| anyhow::anyhow!("{error}"))?;
    } else {
        bail!("it is compressed in a way that is not known here");
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ELF_ENTRY: u64 = 0x100_0010;

    /// An ELF file of two parts, the second with memory beyond its content.
    fn elf(edit: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(64, 0);
        file[24..32].copy_from_slice(&ELF_ENTRY.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[56..58].copy_from_slice(&3u16.to_le_bytes());
        // kind, offset, physical address, size, space
        for (kind, offset, address, size, space) in
            [(1u64, 300u64, 0x100_0000u64, 20u64, 20u64), (4, 0, 0, 8, 8), (1, 320, 0x100_1000, 4, 0x800)]
        {
            for value in [kind, offset, 0, address, size, space, 0] {
                file.extend(value.to_le_bytes());
            }
        }
        file.resize(300, 0);
        file.extend([0x11; 20]);
        file.extend([0x22; 4]);
        edit(&mut file);
        file
    }

    fn bzimage(content: &[u8]) -> Vec<u8> {
        let mut payload = ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Uncompressed);
        payload.extend((content.len() as u32).to_le_bytes());
        let mut file = vec![0; 1024];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend([0x90; 16]);
        file.extend(payload);
        file.extend([0x90; 100]);
        file
    }

    #[test]
    fn each_part_is_where_the_kernel_would_unpack_it() {
        let packed = bzimage(&elf(|_| {}));
        let stored = stored(&packed).unwrap();
        assert_eq!(stored[..1024], packed[..1024]);
        let code = &stored[1024..];
        let at = |address: usize| address - 0x10_0000;
        assert_eq!(code.len(), at(0x100_1800));
        assert_eq!(code[at(0x100_0000)..at(0x100_0000) + 20], [0x11; 20]);
        assert_eq!(code[at(0x100_1000)..at(0x100_1000) + 4], [0x22; 4]);
        assert_eq!(code[0x200..0x207], [0xb8, 0x10, 0, 0, 1, 0xff, 0xe0]);
        let set = code.iter().filter(|byte| **byte != 0).count();
        assert_eq!(set, 20 + 4 + 5);
    }

    #[test]
    fn what_cannot_be_unpacked_is_said() {
        let wrong = |bytes: &[u8]| stored(bytes).unwrap_err().to_string();
        assert!(wrong(b"short").contains("too short"));
        assert!(wrong(&vec![0; 4096]).contains("no bzImage"));
        assert!(wrong(&bzimage(b"text")).contains("ELF"));
        let mut gzip = bzimage(b"");
        gzip[1024 + 16..1024 + 18].copy_from_slice(&[0x1f, 0x8b]);
        assert!(wrong(&gzip).contains("not known here"));
        let low = elf(|file| file[64 + 24..64 + 32].copy_from_slice(&0x10_0000u64.to_le_bytes()));
        assert!(wrong(&bzimage(&low)).contains("belongs to"));
        let large = elf(|file| file[64 + 40..64 + 48].copy_from_slice(&u64::MAX.to_le_bytes()));
        assert!(wrong(&bzimage(&large)).contains("too large"));
        let outside = elf(|file| file[24..32].copy_from_slice(&0x200_0000u64.to_le_bytes()));
        assert!(wrong(&bzimage(&outside)).contains("entry point"));
        let beyond = elf(|file| file[64 + 8..64 + 16].copy_from_slice(&u64::MAX.to_le_bytes()));
        assert!(wrong(&bzimage(&beyond)).contains("too short"));
    }
}
