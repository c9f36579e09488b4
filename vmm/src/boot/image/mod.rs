//! Bare-metal images: PVH (an ELF file with the PVH note) and multiboot 1 (32-bit ELF, or any file with the a.out
//! kludge). Both are entered in 32-bit protected mode without paging.

mod elf;
mod multiboot;
mod pvh;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::layout;
use crate::boot::{self, GDT_ENTRIES, Mode, Start, memory_map, write_error};
use crate::kvm::memory::Ram;
pub use elf::section;

/// Why an image cannot be booted. Found before anything runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is no image.
    #[error(
        "{path} is not an image that can be booted: {reason}; `--image` takes an ELF file with a PVH note or a multiboot 1 \
         image, `--kernel` a bzImage"
    )]
    NotAnImage {
        /// Its path.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// It wants to be where there is no room for it.
    #[error(
        "{path} wants to be loaded at {first:#x}-{last:#x}, but an image can be from {:#x} to {end:#x} here, and below {:#x} where \
         nothing is that it is told (not at {}): link it there, or give more `--memory`",
        layout::HIGH_MEMORY,
        layout::EBDA,
        told()
    )]
    Place {
        /// Its path.
        path: PathBuf,
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
        /// Where usable memory ends.
        end: u64,
    },
}

/// A piece of memory with content from the file, and zeros behind it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Where it goes.
    gpa: u64,
    /// Its bytes in memory.
    len: u64,
    /// Its bytes in the file, at most `len`.
    file: Range<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Protocol {
    Pvh,
    Multiboot,
}

/// What the file asks for.
#[derive(PartialEq, Eq, Debug)]
struct Layout {
    protocol: Protocol,
    entry: u64,
    segments: Vec<Segment>,
}

/// What both protocols tell an image.
struct StartInfo {
    /// Address of the command line.
    cmdline: u64,
    /// Address of the root of the ACPI tables.
    rsdp: u64,
    /// (address, length, kind).
    memory: Vec<(u64, u64, u32)>,
    /// The initrd: address and length.
    module: Option<(u64, u64)>,
    /// Address of the module's text.
    module_name: u64,
}

/// Looks at a file. Multiboot goes first where a 32-bit file has both, as other loaders do it.
fn inspect(file: &[u8]) -> Result<Layout, String> {
    let elf = elf::is_elf(file).then(|| elf::parse(file));
    if let Some(header) = multiboot::find(file) {
        if let Some(kludge) = header.kludge(file) {
            header.check()?;
            let (segment, entry) = kludge?;
            return Ok(Layout { protocol: Protocol::Multiboot, entry, segments: vec![segment] });
        }
        if let Some(Ok(elf)) = &elf
            && !elf.is_64
        {
            header.check()?;
            return Ok(Layout { protocol: Protocol::Multiboot, entry: elf.entry, segments: elf.segments.clone() });
        }
    }
    let elf = elf.ok_or("it is neither an ELF file nor has it a multiboot header with addresses")??;
    let entry = elf.pvh_entry.ok_or("this ELF file has neither a PVH note nor (for 32 bits) a multiboot header")?;
    Ok(Layout { protocol: Protocol::Pvh, entry, segments: elf.segments })
}

/// What an image finds below 1 MiB, by first and last address: the page with the BIOS data area and the descriptor
/// table, the information that it is given, its command line.
const TOLD: [(u64, u64); 3] = [
    (0, 0xfff),
    (layout::BOOT_PARAMS, layout::BOOT_PARAMS + 0xfff),
    (layout::CMDLINE, layout::CMDLINE + layout::CMDLINE_MAX - 1),
];

fn told() -> String {
    TOLD.map(|(first, last)| format!("{first:#x}-{last:#x}")).join(", ")
}

/// Whether an image may be at `first` to `last`, where memory ends at `end`.
fn is_free(first: u64, last: u64, end: u64) -> bool {
    let is_high = first >= layout::HIGH_MEMORY && last < end;
    let is_low = last < layout::EBDA && TOLD.iter().all(|told| last < told.0 || first > told.1);
    is_high || is_low
}

/// The end of RAM below 4 GiB, where images may be.
fn usable(ram: u64) -> u64 {
    layout::ram_regions(ram)[0].1
}

/// The reason why the segments cannot be loaded into `ram` bytes of RAM.
fn check_places(layout: &Layout, path: &Path, ram: u64) -> Result<(), Error> {
    let not = |reason: &str| Error::NotAnImage { path: path.to_owned(), reason: reason.to_owned() };
    let end = usable(ram);
    let mut places = Vec::with_capacity(layout.segments.len());
    for segment in &layout.segments {
        let last = segment.gpa.checked_add(segment.len - 1).ok_or_else(|| not("a segment wraps around"))?;
        if !is_free(segment.gpa, last, end) {
            return Err(Error::Place { path: path.to_owned(), first: segment.gpa, last, end });
        }
        places.push((segment.gpa, last));
    }
    places.sort_unstable();
    if places.windows(2).any(|pair| pair[0].1 >= pair[1].0) {
        return Err(not("its segments overlap"));
    }
    if !places.iter().any(|(first, last)| (*first..=*last).contains(&layout.entry)) {
        return Err(not("its entry point is in none of its segments"));
    }
    Ok(())
}

/// An image with its module and command line, checked and ready to be loaded as often as the guest starts anew.
pub struct Image {
    file: Vec<u8>,
    layout: Layout,
    module: Option<(Vec<u8>, u64)>,
    module_name: String,
    cmdline: String,
}

fn read(what: &'static str, path: &Path, at_most: u64) -> Result<Vec<u8>, boot::Error> {
    let error = |source| boot::Error::Read { what, path: path.to_owned(), source };
    let (file, _): (File, u64) = boot::open(what, path)?;
    let mut content = Vec::new();
    // One byte more shows that it is too long, whatever the file's metadata said.
    file.take(at_most.saturating_add(1)).read_to_end(&mut content).map_err(error)?;
    if content.len() as u64 > at_most {
        return Err(error(std::io::Error::other(format!("it is larger than the guest's memory of {at_most} bytes"))));
    }
    Ok(content)
}

impl Image {
    /// Opens and checks everything, for a guest with `ram` bytes of memory.
    pub fn open(path: &Path, initrd: Option<&Path>, cmdline: &str, ram: u64) -> Result<Self, boot::Error> {
        let file = read("the image", path, usable(ram))?;
        let layout = inspect(&file).map_err(|reason| Error::NotAnImage { path: path.to_owned(), reason })?;
        if layout.segments.iter().any(|segment| segment.len == 0) || layout.segments.is_empty() {
            return Err(Error::NotAnImage { path: path.to_owned(), reason: "it has nothing to load".to_owned() }.into());
        }
        check_places(&layout, path, ram)?;
        let image_end = layout.segments.iter().map(|segment| segment.gpa + segment.len).max().unwrap_or(0);
        let module = match initrd {
            None => None,
            Some(initrd) => {
                let content = read("the initrd", initrd, usable(ram))?;
                let at = (usable(ram) - content.len() as u64) & !0xfff;
                if at < image_end {
                    let initrd = content.len() as u64;
                    let room = usable(layout::LOW_RAM_MAX).saturating_sub(image_end);
                    if initrd > room & !0xfff {
                        return Err(boot::Error::InitrdTooLarge { initrd, room });
                    }
                    return Err(boot::Error::DoesNotFit { kernel_end: image_end, initrd, ram: usable(ram) });
                }
                Some((content, at))
            }
        };
        let cmdline = match layout.protocol {
            Protocol::Pvh => cmdline.to_owned(),
            // Its first word is the image's own name.
            Protocol::Multiboot => format!("{} {cmdline}", path.display()),
        };
        let module_name = initrd.map(|initrd| initrd.display().to_string()).unwrap_or_default();
        let max = layout::CMDLINE_MAX / 2 - 1;
        for text in [&cmdline, &module_name] {
            if text.len() as u64 > max {
                return Err(boot::Error::CmdlineTooLong { len: text.len() as u64, max });
            }
        }
        Ok(Self { file, layout, module, module_name, cmdline })
    }

    /// Writes the image and what it is told. Gives back how the boot processor starts.
    pub fn load(&self, ram: &Ram, ram_size: u64, rsdp: u64) -> Result<Start, boot::Error> {
        for segment in &self.layout.segments {
            let content = &self.file[segment.file.clone()];
            ram.write_slice(content, GuestAddress(segment.gpa)).map_err(write_error("the image"))?;
            let zeros = segment.gpa + content.len() as u64..segment.gpa + segment.len;
            clear(ram, zeros).map_err(write_error("the image"))?;
        }
        if let Some((content, at)) = &self.module {
            ram.write_slice(content, GuestAddress(*at)).map_err(write_error("the initrd"))?;
        }
        let module_name = layout::CMDLINE + layout::CMDLINE_MAX / 2;
        for (at, text) in [(layout::CMDLINE, &self.cmdline), (module_name, &self.module_name)] {
            let mut line = text.clone().into_bytes();
            line.push(0);
            ram.write_slice(&line, GuestAddress(at)).map_err(write_error("the command line"))?;
        }
        let info = StartInfo {
            cmdline: layout::CMDLINE,
            rsdp,
            memory: memory_map(ram_size),
            module: self.module.as_ref().map(|(content, at)| (*at, content.len() as u64)),
            module_name,
        };
        let (pieces, rax) = match self.layout.protocol {
            Protocol::Pvh => (pvh::information(&info), 0),
            Protocol::Multiboot => (multiboot::information(&info), multiboot::LOADER_MAGIC),
        };
        for (at, bytes) in &pieces {
            ram.write_slice(bytes, GuestAddress(*at)).map_err(write_error("the start information"))?;
        }
        let table: [u64; GDT_ENTRIES] =
            [0, 0, boot::segment_descriptor(boot::CODE_32), boot::segment_descriptor(boot::DATA)];
        for (index, entry) in table.into_iter().enumerate() {
            ram.write_obj(entry, GuestAddress(layout::GDT + 8 * index as u64))
                .map_err(write_error("the descriptor table"))?;
        }
        let rbx = pieces.first().map_or(0, |(at, _)| *at);
        Ok(Start { mode: Mode::Protected, rip: self.layout.entry, rax, rbx, ..Start::default() })
    }
}

/// Writes zeros.
fn clear(ram: &Ram, range: Range<u64>) -> Result<(), GuestMemoryError> {
    let zeros = [0; 4096];
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(zeros.len() as u64) as usize;
        ram.write_slice(&zeros[..len], GuestAddress(at))?;
        at += len as u64;
    }
    Ok(())
}

#[cfg(test)]
#[path = "image_test.rs"]
mod image_test;
