//! Guest RAM: one memfd, shared, so that other processes and iommufd can be given the file.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::layout;

/// Guest RAM, without a dirty bitmap.
pub type Ram = GuestMemoryMmap<()>;

/// Why there is no RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file behind it could not be made.
    #[error("the memory file of {size} bytes could not be created: {source}")]
    File {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file could not be mapped.
    #[error("guest memory of {size} bytes could not be mapped: {reason}")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        reason: String,
    },
}

fn memory_file(size: u64) -> io::Result<File> {
    // SAFETY: the name is a C string literal, and the result is checked before it becomes an owned descriptor.
    let fd = unsafe { libc::memfd_create(c"causeway-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned this descriptor just now, nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    Ok(file)
}

/// Makes `size` bytes of RAM (a multiple of 4096), laid out as [`layout::ram_regions`] says. Nothing is touched yet.
pub fn create(size: u64) -> Result<Arc<Ram>, Error> {
    let file = Arc::new(memory_file(size).map_err(|source| Error::File { size, source })?);
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (gpa, len) in layout::ram_regions(size) {
        ranges.push((GuestAddress(gpa), len as usize, Some(FileOffset::from_arc(file.clone(), offset))));
        offset += len;
    }
    Ram::from_ranges_with_files(ranges).map(Arc::new).map_err(|e| Error::Map { size, reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    #[test]
    fn ram_is_one_shared_file_in_two_regions() {
        let ram = create(layout::LOW_RAM_MAX + (1 << 20)).unwrap();
        assert_eq!(ram.num_regions(), 2);
        ram.write_obj(0x1122_3344u32, GuestAddress(layout::FOUR_GIB)).unwrap();
        let high = ram.find_region(GuestAddress(layout::FOUR_GIB)).unwrap();
        let file = high.file_offset().unwrap();
        assert_eq!(file.start(), layout::LOW_RAM_MAX);
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(file.file(), &mut bytes, file.start()).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 0x1122_3344);
        assert!(ram.read_obj::<u8>(GuestAddress(0xfee0_0000)).is_err());
    }
}
