//! The disk of a virtio-blk: a file, or a block device of the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::Told;
use devices::virtio::blk::{Disk, IoFailed, SECTOR};
use devices::virtio::ring::{Part, total};
use vtd::Perm;

use super::pinned_io::{PinnedIo, advance};

/// Zeroes that are written at a time where the file takes no order to have them.
const ZEROES: usize = 1 << 20;

/// The file, not in use yet.
pub struct DiskFile {
    file: File,
    size: u64,
    read_only: bool,
}

impl DiskFile {
    /// The file at `path`: a regular one, or a block device.
    ///
    /// # Errors
    /// It cannot be opened so, is something else, or has less than a sector.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let metadata = file.metadata()?;
        let refused = |why| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return refused("it is neither a file nor a block device");
        }
        let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
        if size < SECTOR {
            return refused("it has less than 512 bytes");
        }
        Ok(Self { file, size, read_only })
    }
}

/// A disk in use.
pub struct FileDisk {
    file: DiskFile,
    serial: String,
    io: PinnedIo,
    told: Told,
    /// Its file system cannot say what is in memory.
    waits: AtomicBool,
}

/// `preadv` or `pwritev`.
type Call = unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

impl FileDisk {
    /// The disk with these data, which go by `io`.
    pub fn new(file: DiskFile, serial: String, io: PinnedIo) -> Self {
        Self { file, serial, io, told: Told::default(), waits: AtomicBool::new(false) }
    }

    /// What went wrong in the host, for the user.
    fn judge(&self, done: io::Result<()>) -> Result<(), IoFailed> {
        done.map_err(|e| {
            let serial = &self.serial;
            self.told.once(|| log::error!("{serial}: its file failed: {e}; further errors are not logged"));
            IoFailed
        })
    }

    fn transfer(&self, call: Call, access: Perm, offset: u64, parts: &[Part]) -> Result<(), IoFailed> {
        let file = self.file.file.as_raw_fd();
        let done = self.io.with(parts, access, |mut left| {
            let mut at = offset as libc::off_t;
            left = advance(left, 0);
            while !left.is_empty() {
                // SAFETY: each part lies in pages that are pinned for this access and stay so until this returns;
                // they are the guest's, so nobody here has a reference to them.
                let moved = unsafe { call(file, left.as_ptr(), left.len() as libc::c_int, at) };
                match moved {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    1.. => {
                        at += moved as libc::off_t;
                        left = advance(left, moved as usize);
                    }
                    _ => match io::Error::last_os_error() {
                        e if e.kind() == io::ErrorKind::Interrupted => {}
                        e => return Err(e),
                    },
                }
            }
            Ok(())
        });
        self.judge(done.map_err(|_| IoFailed)?)
    }

    /// Reads what the host has in memory. `None`: it is not all there, or this file system cannot say.
    fn read_cached(&self, offset: u64, parts: &[Part]) -> Option<Result<(), IoFailed>> {
        let wanted = total(parts);
        let read = self.io.with(parts, Perm::Write, |parts| {
            let (file, at, count) = (self.file.file.as_raw_fd(), offset as libc::off_t, parts.len() as libc::c_int);
            // SAFETY: as in `transfer`.
            let moved = unsafe { libc::preadv2(file, parts.as_ptr(), count, at, libc::RWF_NOWAIT) };
            if moved < 0 && io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN) {
                // Its file system does not know of such reads; or it fails, which the thread that tries next says.
                self.waits.store(true, Ordering::Relaxed);
            }
            moved
        });
        match read {
            Ok(moved) if moved >= 0 && moved as u64 == wanted => Some(Ok(())),
            Ok(_) => None,
            // A second try would be a second fault.
            Err(_) => Some(Err(IoFailed)),
        }
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        let (file, at) = (&self.file.file, offset as libc::off_t);
        // SAFETY: the call takes numbers.
        let done =
            unsafe { libc::fallocate(file.as_raw_fd(), how | libc::FALLOC_FL_KEEP_SIZE, at, len as libc::off_t) };
        if done == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            e if !matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => return Err(e),
            _ => {}
        }
        let zeroes = vec![0; ZEROES.min(len as usize)];
        let mut done = 0;
        while done < len {
            let part = &zeroes[..zeroes.len().min((len - done) as usize)];
            file.write_all_at(part, offset + done)?;
            done += part.len() as u64;
        }
        Ok(())
    }
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        self.file.size
    }

    fn is_read_only(&self) -> bool {
        self.file.read_only
    }

    fn serial(&self) -> &str {
        &self.serial
    }

    fn read(&self, offset: u64, parts: &[Part]) -> Result<(), IoFailed> {
        self.transfer(libc::preadv, Perm::Write, offset, parts)
    }

    fn read_at_once(&self, offset: u64, parts: &[Part]) -> Option<Result<(), IoFailed>> {
        if self.waits.load(Ordering::Relaxed) { None } else { self.read_cached(offset, parts) }
    }

    fn write(&self, offset: u64, parts: &[Part]) -> Result<(), IoFailed> {
        self.transfer(libc::pwritev, Perm::Read, offset, parts)
    }

    fn flush(&self) -> Result<(), IoFailed> {
        self.judge(self.file.file.sync_data())
    }

    fn clear(&self, offset: u64, len: u64, unmap: bool) -> Result<(), IoFailed> {
        self.judge(self.zero(offset, len, unmap))
    }
}
