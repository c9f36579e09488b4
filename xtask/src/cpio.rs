//! The `newc` cpio format: initramfs images for L1 and its guests, the disk that carries QEMU into L1, and what comes
//! back from it.

use anyhow::{Context, Result, bail, ensure};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path};

const MAGIC: &[u8] = b"070701";
const TRAILER: &str = "TRAILER!!!";
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const KIND: u32 = 0o170_000;
/// An archive that comes out of L1 is not trusted to be small.
const LARGEST_FILE: usize = 1 << 30;

/// Writes one archive; [`Archive::finish`] ends it. Archives may follow each other in an initramfs.
pub struct Archive<W: Write> {
    out: W,
    written: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 1 }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        self.written += bytes.len();
        Ok(())
    }

    fn pad(&mut self, to: usize) -> Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.put(&[0; 512][..missing])
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len()).with_context(|| format!("{path} is too large for an archive"))?;
        let name_size = path.len() + 1;
        let inode = self.inode;
        self.inode += 1;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let header = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name_size:08x}{0:08x}",
            0, 1
        );
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)?;
        self.put(content)?;
        self.pad(4)
    }

    pub fn directory(&mut self, path: &str) -> Result<()> {
        self.entry(path, DIRECTORY | 0o755, &[])
    }

    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, SYMLINK | 0o777, target.as_bytes())
    }

    /// `mode` is the permission bits only.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(path, REGULAR | (mode & 0o7777), content)
    }

    /// Adds a file of this machine with its permission bits.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        let mode = std::fs::metadata(from)?.permissions().mode();
        self.file(path, mode, &content)
    }

    pub fn finish(mut self) -> Result<W> {
        self.entry(TRAILER, 0, &[])?;
        self.pad(512)?;
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Unpacks files and folders below `into`. Names that would leave it are refused; other kinds of entries are passed
/// over.
pub fn extract(mut from: impl Read, into: &Path) -> Result<usize> {
    let mut files = 0;
    loop {
        let mut header = [0u8; 110];
        from.read_exact(&mut header).context("the archive ends early")?;
        ensure!(header.starts_with(MAGIC), "not a newc archive");
        let field = |index: usize| -> Result<usize> {
            let digits = std::str::from_utf8(&header[6 + 8 * index..14 + 8 * index])?;
            Ok(usize::from_str_radix(digits, 16)?)
        };
        let (mode, size, name_size) = (u32::try_from(field(1)?)?, field(6)?, field(11)?);
        ensure!(size <= LARGEST_FILE && (1..=4096).contains(&name_size), "an entry of {size} bytes");
        let mut name = vec![0; (110 + name_size).next_multiple_of(4) - 110];
        from.read_exact(&mut name)?;
        let name = std::str::from_utf8(&name[..name_size - 1])?.to_owned();
        let mut content = vec![0; size.next_multiple_of(4)];
        from.read_exact(&mut content)?;
        if name == TRAILER {
            return Ok(files);
        }
        let relative = Path::new(&name);
        if relative.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
            bail!("the archive names {name}");
        }
        let path = into.join(relative);
        match mode & KIND {
            DIRECTORY => std::fs::create_dir_all(&path)?,
            REGULAR => {
                path.parent().map(std::fs::create_dir_all).transpose()?;
                std::fs::write(&path, &content[..size]).with_context(|| format!("cannot write {}", path.display()))?;
                std::fs::set_permissions(&path, PermissionsExt::from_mode(mode & 0o777))?;
                files += 1;
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("xtask-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn what_is_archived_comes_back_with_its_mode() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("a").unwrap();
        archive.file("a/odd", 0o751, b"12345").unwrap();
        archive.file("a/empty", 0o644, b"").unwrap();
        archive.symlink("a/link", "odd").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 512, 0, "a following archive must start aligned");
        let into = folder("extract");
        assert_eq!(extract(&bytes[..], &into).unwrap(), 2);
        assert_eq!(std::fs::read(into.join("a/odd")).unwrap(), b"12345");
        assert_eq!(std::fs::metadata(into.join("a/odd")).unwrap().permissions().mode() & 0o777, 0o751);
        std::fs::remove_dir_all(into).unwrap();
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        for name in ["../x", "/x", "a/../../x"] {
            let mut archive = Archive::new(Vec::new());
            archive.file(name, 0o644, b"x").unwrap();
            let bytes = archive.finish().unwrap();
            let into = folder("refuse");
            assert!(extract(&bytes[..], &into).is_err(), "{name}");
            std::fs::remove_dir_all(into).unwrap();
        }
    }

    #[test]
    fn a_cut_or_foreign_archive_is_an_error() {
        let mut archive = Archive::new(Vec::new());
        archive.file("x", 0o644, &[7; 3000]).unwrap();
        let bytes = archive.finish().unwrap();
        let into = folder("cut");
        assert!(extract(&bytes[..1000], &into).is_err());
        assert!(extract(&[0u8; 512][..], &into).is_err());
        std::fs::remove_dir_all(into).unwrap();
    }
}
