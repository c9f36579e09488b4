//! Guest RAM: a shared memfd where the host gives huge pages to shared memory or where another process gets it, else
//! anonymous memory, which gets them nearly everywhere. Start-up pays for each page of it once: pinned for a device, or
//! faulted in by the guest.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vtd::DirtyLog;

use crate::boot::layout;

/// Guest RAM, with what this process wrote there while that is asked for.
pub type Ram = GuestMemoryMmap<DirtyLog>;

/// Why there is no RAM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file behind it could not be made.
    #[error("the memory file of {size} bytes could not be created: {source}; use a smaller --memory")]
    File {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file could not be mapped.
    #[error("guest memory of {size} bytes could not be mapped: {reason}; use a smaller --memory")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the kernel said.
        reason: String,
    },
}

/// A file of `size` bytes in memory whose size nobody changes.
pub(super) fn memory_file(name: &CStr, size: u64) -> io::Result<File> {
    // SAFETY: the name is a C string, and the result is checked before it becomes an owned descriptor.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned this descriptor just now, nobody else has it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    // Other processes get this file. One that made it shorter would kill us at the next access (SIGBUS).
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: the call takes numbers.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

/// Where the kernel says who gets huge pages of shared memory.
const SHARED_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Whether `setting` (the file's text, the choice in brackets) gives huge pages to shared memory that asks for them.
fn shares_huge_pages(setting: &str) -> bool {
    ["[always]", "[within_size]", "[advise]", "[force]"].iter().any(|choice| setting.contains(choice))
}

/// Makes `size` bytes of RAM (a multiple of 4096), laid out as [`layout::ram_regions`] says. Nothing is touched yet.
/// With `for_processes` it is a file in any case: other processes get it.
pub fn create(size: u64, for_processes: bool) -> Result<Arc<Ram>, Error> {
    let shared =
        for_processes || fs::read_to_string(SHARED_HUGE_PAGES).is_ok_and(|setting| shares_huge_pages(&setting));
    log::debug!("guest memory is {}", if shared { "a shared file" } else { "anonymous" });
    let ram = if shared { shared_ram(size)? } else { anonymous_ram(size)? };
    for region in ram.iter() {
        // SAFETY: advice on a mapping of our own; it changes no content.
        if unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_HUGEPAGE) } != 0 {
            log::debug!("no huge pages for guest memory: {}", io::Error::last_os_error());
        }
    }
    Ok(Arc::new(ram))
}

fn map_error(size: u64) -> impl Fn(vm_memory::mmap::FromRangesError) -> Error {
    move |e| Error::Map { size, reason: e.to_string() }
}

fn shared_ram(size: u64) -> Result<Ram, Error> {
    let file = Arc::new(memory_file(c"causeway-ram", size).map_err(|source| Error::File { size, source })?);
    let mut offset = 0;
    let mut ranges = Vec::new();
    for (gpa, len) in layout::ram_regions(size) {
        ranges.push((GuestAddress(gpa), len as usize, Some(FileOffset::from_arc(file.clone(), offset))));
        offset += len;
    }
    Ram::from_ranges_with_files(ranges).map_err(map_error(size))
}

fn anonymous_ram(size: u64) -> Result<Ram, Error> {
    let ranges: Vec<_> =
        layout::ram_regions(size).into_iter().map(|(gpa, len)| (GuestAddress(gpa), len as usize)).collect();
    Ram::from_ranges(&ranges).map_err(map_error(size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn shared_ram_is_one_file_in_two_regions() {
        let ram = shared_ram(layout::LOW_RAM_MAX + (1 << 20)).unwrap();
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

    #[test]
    fn whoever_gets_the_file_behind_ram_cannot_change_its_size() {
        let size = 1 << 20;
        let ram = shared_ram(size).unwrap();
        let file = ram.find_region(GuestAddress(0)).unwrap().file_offset().unwrap().file();
        // As another process does it: with a descriptor of its own, or with the file opened anew.
        let again = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        for file in [file.try_clone().unwrap(), again] {
            for len in [0, size - 1, size + 1] {
                assert_eq!(file.set_len(len).unwrap_err().raw_os_error(), Some(libc::EPERM));
            }
            // SAFETY: the call takes numbers.
            let sealed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
            assert_eq!((sealed, file.metadata().unwrap().len()), (-1, size));
        }
        ram.write_obj(1u8, GuestAddress(size - 1)).unwrap();
    }

    #[test]
    fn anonymous_ram_has_the_same_layout() {
        let size = layout::LOW_RAM_MAX + (1 << 20);
        let regions = |ram: Ram| ram.iter().map(|region| (region.start_addr(), region.len())).collect::<Vec<_>>();
        assert_eq!(regions(anonymous_ram(size).unwrap()), regions(shared_ram(size).unwrap()));
    }

    #[test]
    fn the_hosts_choice_is_the_word_in_brackets() {
        assert!(shares_huge_pages("always within_size [advise] never deny force"));
        assert!(!shares_huge_pages("always within_size advise [never] deny force"));
        assert!(!shares_huge_pages("always within_size advise never [deny] force"));
    }
}
