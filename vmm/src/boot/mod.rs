//! Loads a Linux bzImage and enters it by the 64-bit boot protocol (Documentation/arch/x86/boot.rst of the kernel).

pub mod firmware;
pub mod image;
pub mod layout;

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::boot::image::Image;
use crate::config::MAX_ROOT_PORTS;
use crate::kvm::memory::Ram;

/// Usable memory, in a memory map.
pub const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Offset of the setup header in a bzImage.
const SETUP_HEADER: u64 = 0x1f1;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point, from where the protected-mode code is loaded.
const ENTRY_64: u64 = 0x200;
/// Boot protocol 2.12: `xloadflags` exists.
const PROTOCOL_2_12: u16 = 0x020c;

/// Why a guest cannot be booted. All but [`Error::Write`] are found before anything runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{what} {path} cannot be read: {source}")]
    Read {
        /// "the kernel" or "the initrd".
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What should be a file is none: reading it could wait for ever.
    #[error("{what} {path} cannot be used: it is {kind}, and a regular file is needed")]
    NotAFile {
        /// "the kernel" or "the initrd".
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file is no kernel that can be booted.
    #[error("{path} is not a kernel that can be booted: {reason}")]
    NotAKernel {
        /// Its path.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// The command line is too long.
    #[error("the command line has {len} bytes, this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Its length.
        len: u64,
        /// What the kernel takes.
        max: u64,
    },
    /// RAM is too small for the kernel and the initrd.
    #[error(
        "the kernel needs memory up to {kernel_end:#x} and the initrd has {initrd} bytes: {ram} bytes of memory are too few; use a \
         larger --memory"
    )]
    DoesNotFit {
        /// End of what the kernel needs while it unpacks itself.
        kernel_end: u64,
        /// Size of the initrd.
        initrd: u64,
        /// RAM below 4 GiB.
        ram: u64,
    },
    /// No RAM is large enough, because both must be below an address.
    #[error(
        "the initrd has {initrd} bytes, and between the kernel and the highest address that an initrd can have there are {room}, \
         however much memory there is; use a smaller initrd"
    )]
    InitrdTooLarge {
        /// Size of the initrd.
        initrd: u64,
        /// Bytes that there are for it at most.
        room: u64,
    },
    /// The bare-metal image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// Guest memory could not be written.
    #[error("{what} could not be written to guest memory: {reason}")]
    Write {
        /// What was being written.
        what: &'static str,
        /// Why.
        reason: String,
    },
}

/// Turns an error of writing `what` into ours.
pub fn write_error(what: &'static str) -> impl Fn(vm_memory::GuestMemoryError) -> Error {
    move |e| Error::Write { what, reason: e.to_string() }
}

/// How the boot processor starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Start {
    /// Its mode.
    pub mode: Mode,
    /// The entry point.
    pub rip: u64,
    /// Registers that the boot protocol gives a meaning.
    pub rsp: u64,
    /// As above.
    pub rax: u64,
    /// As above.
    pub rbx: u64,
    /// As above.
    pub rsi: u64,
}

/// The processor's mode at the entry point.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// 64 bits, with an identity map of the first 4 GiB.
    #[default]
    Long,
    /// 32 bits, without paging.
    Protected,
}

/// What the guest is started with.
pub enum Payload {
    /// A Linux kernel.
    Kernel(Kernel),
    /// A bare-metal image.
    Image(Image),
}

impl Payload {
    /// Writes everything into RAM. Gives back how the boot processor starts.
    pub fn load(&mut self, ram: &Ram, ram_size: u64, rsdp: u64) -> Result<Start, Error> {
        write_bios_data(ram)?;
        match self {
            Self::Kernel(kernel) => kernel.load(ram, ram_size, rsdp),
            Self::Image(image) => image.load(ram, ram_size, rsdp),
        }
    }
}

/// A kernel with its initrd and command line, checked and ready to be loaded as often as the guest starts anew.
pub struct Kernel {
    kernel: File,
    header: setup_header,
    initrd: Option<(File, u64)>,
    initrd_at: u64,
    cmdline: String,
}

/// Opens a regular file. Gives back its length too.
pub fn open(what: &'static str, path: &Path) -> Result<(File, u64), Error> {
    let read = |source| Error::Read { what, path: path.to_owned(), source };
    let check = |file: FileType| match kind(file) {
        None => Ok(()),
        Some(kind) => Err(Error::NotAFile { what, path: path.to_owned(), kind }),
    };
    // Before it is opened: that has effects on devices. Should something else be there a moment later, opening it does
    // not wait.
    check(fs::metadata(path).map_err(read)?.file_type())?;
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    check(metadata.file_type())?;
    Ok((file, metadata.len()))
}

/// What a file is that is no regular one.
fn kind(file: FileType) -> Option<&'static str> {
    match file {
        _ if file.is_file() => None,
        _ if file.is_dir() => Some("a directory"),
        _ if file.is_fifo() => Some("a pipe"),
        _ if file.is_socket() => Some("a socket"),
        _ if file.is_block_device() => Some("a block device"),
        _ => Some("a character device"),
    }
}

fn read_header(kernel: &File, path: &Path) -> Result<setup_header, Error> {
    let not = |reason| Error::NotAKernel { path: path.to_owned(), reason };
    let mut header = setup_header::default();
    kernel
        .read_exact_at(header.as_mut_slice(), SETUP_HEADER)
        .map_err(|_| not("the file is too short for a bzImage"))?;
    let (magic, version, flags, xflags) = (header.header, header.version, header.loadflags, header.xloadflags);
    if magic != HEADER_MAGIC {
        return Err(not("it has no Linux boot header (a bzImage or vmlinuz is expected)"));
    }
    if flags & LOADED_HIGH == 0 || version < PROTOCOL_2_12 {
        return Err(not("its boot protocol is older than 2.12"));
    }
    if xflags & XLF_KERNEL_64 == 0 {
        return Err(not("it has no 64-bit entry point"));
    }
    Ok(header)
}

impl Kernel {
    /// Opens and checks everything, for a guest with `ram` bytes of memory.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str, ram: u64) -> Result<Self, Error> {
        let (file, kernel_size) = open("the kernel", kernel)?;
        let header = read_header(&file, kernel)?;
        let initrd = initrd.map(|path| open("the initrd", path)).transpose()?;

        let max = u64::from(header.cmdline_size).min(layout::CMDLINE_MAX - 1);
        if cmdline.len() as u64 > max {
            return Err(Error::CmdlineTooLong { len: cmdline.len() as u64, max });
        }

        let low_ram = layout::ram_regions(ram)[0].1;
        // The kernel unpacks itself to `pref_address` and needs `init_size` bytes there.
        let (preferred, init_size) = (header.pref_address, u64::from(header.init_size));
        let kernel_end = preferred.saturating_add(init_size).max(layout::HIGH_MEMORY + kernel_size);
        let initrd_size = initrd.as_ref().map_or(0, |(_, size)| *size);
        let limit = low_ram.min(u64::from(header.initrd_addr_max).saturating_add(1));
        let initrd_at = limit.saturating_sub(initrd_size) & !0xfff;
        let highest = layout::LOW_RAM_MAX.min(u64::from(header.initrd_addr_max).saturating_add(1));
        let room = highest.saturating_sub(kernel_end);
        if initrd_size > room & !0xfff {
            return Err(Error::InitrdTooLarge { initrd: initrd_size, room });
        }
        if kernel_end > low_ram || initrd_at < kernel_end {
            return Err(Error::DoesNotFit { kernel_end, initrd: initrd_size, ram: low_ram });
        }
        Ok(Self { kernel: file, header, initrd, initrd_at, cmdline: cmdline.to_owned() })
    }

    /// Writes kernel, initrd, command line, boot parameters, page tables and descriptor table. Gives back how the
    /// boot processor starts.
    pub fn load(&mut self, ram: &Ram, ram_size: u64, rsdp: u64) -> Result<Start, Error> {
        self.kernel.seek(SeekFrom::Start(0)).map_err(|e| Error::Write { what: "the kernel", reason: e.to_string() })?;
        let at = GuestAddress(layout::HIGH_MEMORY);
        let loaded = BzImage::load(ram, Some(at), &mut self.kernel, None)
            .map_err(|e| Error::Write { what: "the kernel", reason: e.to_string() })?;

        let mut params = boot_params { hdr: self.header, acpi_rsdp_addr: rsdp, ..Default::default() };
        params.hdr.type_of_loader = 0xff; // a loader without a number of its own
        params.hdr.code32_start = loaded.kernel_load.0 as u32;
        params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
        if let Some((file, size)) = &mut self.initrd {
            file.seek(SeekFrom::Start(0)).map_err(|e| Error::Write { what: "the initrd", reason: e.to_string() })?;
            ram.read_exact_volatile_from(GuestAddress(self.initrd_at), file, *size as usize)
                .map_err(write_error("the initrd"))?;
            params.hdr.ramdisk_image = self.initrd_at as u32;
            params.hdr.ramdisk_size = *size as u32;
        }
        for (index, (addr, size, kind)) in memory_map(ram_size).into_iter().enumerate() {
            params.e820_table[index] = boot_e820_entry { addr, size, r#type: kind };
            params.e820_entries = index as u8 + 1;
        }
        LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(layout::BOOT_PARAMS)), ram)
            .map_err(|e| Error::Write { what: "the boot parameters", reason: e.to_string() })?;

        let mut line = self.cmdline.clone().into_bytes();
        line.push(0);
        ram.write_slice(&line, GuestAddress(layout::CMDLINE)).map_err(write_error("the command line"))?;
        write_page_tables(ram).map_err(write_error("the page tables"))?;
        let table: [u64; GDT_ENTRIES] = [0, 0, segment_descriptor(CODE), segment_descriptor(DATA)];
        for (index, entry) in table.into_iter().enumerate() {
            ram.write_obj(entry, GuestAddress(layout::GDT + 8 * index as u64))
                .map_err(write_error("the descriptor table"))?;
        }
        Ok(Start {
            mode: Mode::Long,
            rip: loaded.kernel_load.0 + ENTRY_64,
            rsp: layout::BOOT_STACK,
            rsi: layout::BOOT_PARAMS,
            ..Start::default()
        })
    }
}

/// The memory map that the guest is told: (address, length, kind).
pub fn memory_map(ram: u64) -> Vec<(u64, u64, u32)> {
    let regions = layout::ram_regions(ram);
    let mut map = vec![
        (0, layout::EBDA, E820_RAM),
        (layout::EBDA, layout::LOW_HOLE_START - layout::EBDA, E820_RESERVED),
        (layout::ACPI_TABLES, layout::ACPI_LAST + 1 - layout::ACPI_TABLES, E820_RESERVED),
        (layout::HIGH_MEMORY, regions[0].1 - layout::HIGH_MEMORY, E820_RAM),
        // Linux uses ECAM only where firmware says that it is reserved: here, of as many buses as there can be.
        (layout::ECAM, layout::ecam_size(MAX_ROOT_PORTS), E820_RESERVED),
    ];
    map.extend(regions[1..].iter().map(|(first, len)| (*first, *len, E820_RAM)));
    map
}

/// What firmware leaves in the BIOS data area: where the extended one is, from which trampolines are placed downwards,
/// and the KiB of memory below it.
pub fn write_bios_data(ram: &Ram) -> Result<(), Error> {
    let kib = |bytes: u64| (bytes >> 10) as u16;
    let words = [
        (layout::BIOS_DATA + 0x0e, (layout::EBDA >> 4) as u16), // a segment
        (layout::BIOS_DATA + 0x13, kib(layout::EBDA)),
        (layout::EBDA, kib(layout::LOW_HOLE_START - layout::EBDA)),
    ];
    for (at, word) in words {
        ram.write_obj(word, GuestAddress(at)).map_err(write_error("the BIOS data area"))?;
    }
    Ok(())
}

/// Entries of the boot processor's descriptor table.
pub const GDT_ENTRIES: usize = 4;
/// Access byte and flags of the 64-bit code segment, and of the data segment, with their selectors: the boot protocol
/// wants `__BOOT_CS` 0x10 and `__BOOT_DS` 0x18.
pub const CODE: Segment = Segment { selector: 0x10, access: 0x9b, flags: 0xa };
/// The 32-bit code segment of bare-metal images.
pub const CODE_32: Segment = Segment { selector: 0x10, access: 0x9b, flags: 0xc };
/// The data segment.
pub const DATA: Segment = Segment { selector: 0x18, access: 0x93, flags: 0xc };

/// A flat segment.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Its selector.
    pub selector: u16,
    /// Access byte: present, privilege, type.
    pub access: u8,
    /// Granularity, size, long mode: the descriptor's upper flags.
    pub flags: u8,
}

/// The descriptor of a flat segment: base 0, limit 4 GiB.
pub const fn segment_descriptor(segment: Segment) -> u64 {
    0xffff | (segment.access as u64) << 40 | 0xf << 48 | (segment.flags as u64) << 52
}

fn write_page_tables(ram: &Ram) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 0x80;
    let pdpt = layout::PAGE_TABLES + 0x1000;
    let directories = pdpt + 0x1000;
    ram.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(layout::PAGE_TABLES))?;
    for gib in 0..4 {
        ram.write_obj((directories + gib * 0x1000) | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
    }
    let leaves: Vec<u8> = (0..2048u64).flat_map(|page| (page << 21 | PRESENT_WRITABLE | LARGE).to_le_bytes()).collect();
    ram.write_slice(&leaves, GuestAddress(directories))
}

#[cfg(test)]
#[path = "boot_test.rs"]
mod boot_test;
