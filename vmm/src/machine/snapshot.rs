//! A machine as a folder: `causeway ctl PATH snapshot DIR` and `causeway run --restore DIR`.
//!
//! | file | |
//! |---|---|
//! | `manifest.json` | form and version, and length and digest of the others; written last |
//! | `state.json` | what the machine is made from, and what it is in |
//! | `memory` | RAM, in the order of its addresses; what is zero is a hole |
//!
//! The folder gets its name when all of it is on the disk, so that nothing that has the name is half. Reading believes
//! nothing: each file has the length and the digest that the manifest says, the manifest is what this program writes
//! byte by byte, and each state is checked by its device.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::Machine;
use super::saving::{Description, MachineState};
use crate::kvm::memory::Ram;

/// The form of snapshots that this program writes, the only one that it reads.
pub const VERSION: u32 = 1;
const FORM: &str = "causeway snapshot";
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const MEMORY: &str = "memory";
/// Bytes of a manifest, at most.
const MOST_MANIFEST: u64 = 4 << 10;
/// Bytes of a state, at most: that of 254 vCPUs and of as many devices as a machine can have is far smaller.
const MOST_STATE: u64 = 256 << 20;
/// Bytes that are moved at a time.
const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name is taken.
    #[error("{0} is there already; remove it, or use another name")]
    There(PathBuf),
    /// It cannot have a name.
    #[error("{0} is not the name of a folder")]
    NoName(PathBuf),
    /// The machine has no state now.
    #[error("{0}")]
    Machine(String),
    /// It has no manifest of ours.
    #[error("{path} is not a snapshot of causeway: {why}")]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It is of another version.
    #[error("{path} has version {found} of the form of snapshots, and this causeway reads version {VERSION}")]
    Version {
        /// The folder.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A file is not what it was.
    #[error("{path} is not what was saved: {why}; use another copy of the snapshot")]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

fn io_error(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { path: path.to_owned(), source }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    form: String,
    version: u32,
    state: Part,
    memory: Part,
}

/// What is said of a file.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Part {
    bytes: u64,
    sha256: String,
}

/// The first part of the state's file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Whole {
    machine: Description,
    state: MachineState,
}

fn hexadecimal(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the manifest is as bytes.
fn bytes_of(manifest: &Manifest) -> Vec<u8> {
    // It has no part that JSON has not.
    let mut bytes = serde_json::to_vec_pretty(manifest).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// A snapshot that was taken.
#[derive(Serialize, Debug)]
pub struct Taken {
    /// The folder.
    pub snapshot: PathBuf,
    /// Bytes of RAM.
    pub memory: u64,
    /// Bytes of it that are not in holes.
    pub stored: u64,
    /// Milliseconds for which the machine stood still.
    pub held_ms: u64,
}

/// A folder that goes, unless it gets its name.
struct Folder {
    path: PathBuf,
    named: bool,
}

impl Folder {
    /// Beside `wanted`, for this user alone: it has all of the guest's memory.
    fn beside(wanted: &Path) -> Result<Self, Error> {
        let name = wanted.file_name().ok_or_else(|| Error::NoName(wanted.to_owned()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let path = wanted.with_file_name(hidden);
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(io_error(&path))?;
        Ok(Self { path, named: false })
    }

    fn create(&self, name: &str) -> Result<(File, PathBuf), Error> {
        let path = self.path.join(name);
        let file = File::options().write(true).create_new(true).mode(0o600).open(&path).map_err(io_error(&path))?;
        Ok((file, path))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let (mut file, path) = self.create(name)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(io_error(&path))
    }

    /// Writes state and memory. Gives back the manifest, and how many bytes of memory are not in holes.
    fn fill(&self, whole: &Whole, ram: &Ram) -> Result<(Manifest, u64), Error> {
        let bytes = serde_json::to_vec(whole).map_err(|e| Error::Machine(format!("the state has no form: {e}")))?;
        self.write(STATE, &bytes)?;
        let state = Part { bytes: bytes.len() as u64, sha256: hexadecimal(Sha256::digest(&bytes)) };
        let (memory, stored) = write_memory(ram, self)?;
        Ok((Manifest { form: FORM.to_owned(), version: VERSION, state, memory }, stored))
    }

    /// Gives it its name.
    fn name(mut self, wanted: &Path) -> Result<(), Error> {
        let sync = |path: &Path| File::open(path).and_then(|folder| folder.sync_all());
        sync(&self.path).map_err(io_error(&self.path))?;
        fs::rename(&self.path, wanted).map_err(|source| match source.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory => Error::There(wanted.to_owned()),
            _ => Error::Io { path: wanted.to_owned(), source },
        })?;
        self.named = true;
        let parent = wanted.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        sync(parent).map_err(io_error(parent))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.named
            && let Err(e) = fs::remove_dir_all(&self.path)
        {
            log::warn!("{} could not be removed: {e}", self.path.display());
        }
    }
}

/// Calls `each` with the place in all of RAM and the content of each page that is not zero, in their order.
pub(super) fn nonzero_pages<E>(ram: &Ram, mut each: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
    let mut chunk = vec![0; CHUNK];
    let mut base = 0;
    for region in ram.iter() {
        let mut at = 0;
        while at < region.len() {
            let len = (region.len() - at).min(CHUNK as u64) as usize;
            let chunk = &mut chunk[..len];
            // All of it is inside.
            if region.read_slice(chunk, MemoryRegionAddress(at)).is_ok() {
                for (page, bytes) in (0..).step_by(PAGE).zip(chunk.chunks(PAGE)) {
                    if *bytes != ZEROS[..bytes.len()] {
                        each(base + at + page, bytes)?;
                    }
                }
            }
            at += len as u64;
        }
        base += region.len();
    }
    Ok(())
}

/// The digest of RAM: of its pages that are not zero, each behind its place.
#[derive(Default)]
pub(super) struct RamDigest(Sha256);

impl RamDigest {
    pub fn add(&mut self, at: u64, page: &[u8]) {
        self.0.update(at.to_le_bytes());
        self.0.update(page);
    }

    pub fn end(self) -> String {
        hexadecimal(self.0.finalize())
    }
}

/// Writes RAM to a file. Gives back what the manifest says of it, and how many bytes are not in holes.
fn write_memory(ram: &Ram, folder: &Folder) -> Result<(Part, u64), Error> {
    let (file, path) = folder.create(MEMORY)?;
    let failed = io_error(&path);
    let bytes = ram.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(bytes).map_err(&failed)?;
    let (mut digest, mut stored) = (RamDigest::default(), 0);
    nonzero_pages(ram, |at, page| {
        digest.add(at, page);
        stored += page.len() as u64;
        file.write_all_at(page, at)
    })
    .map_err(&failed)?;
    file.sync_all().map_err(&failed)?;
    Ok((Part { bytes, sha256: digest.end() }, stored))
}

impl Machine {
    /// Saves the machine as a folder, and lets it go on. `options` are those of its command line.
    ///
    /// # Errors
    /// The folder is not there then, and the machine goes on.
    pub fn snapshot(&mut self, wanted: &Path, options: Vec<String>) -> Result<Taken, Error> {
        self.can_be_saved().map_err(Error::Machine)?;
        if fs::symlink_metadata(wanted).is_ok() {
            return Err(Error::There(wanted.to_owned()));
        }
        let folder = Folder::beside(wanted)?;
        let start = Instant::now();
        let held = self.hold().map_err(Error::Machine)?;
        let written = self.state(&held).map_err(Error::Machine).and_then(|state| {
            let whole = Whole { machine: self.description(options), state };
            folder.fill(&whole, &self.ram)
        });
        self.let_go(held);
        let held_ms = start.elapsed().as_millis() as u64;
        let (manifest, stored) = written?;
        folder.write(MANIFEST, &bytes_of(&manifest))?;
        folder.name(wanted)?;
        Ok(Taken { snapshot: wanted.to_owned(), memory: manifest.memory.bytes, stored, held_ms })
    }
}

/// A snapshot that is there, whose manifest and state were read.
pub struct Snapshot {
    path: PathBuf,
    memory: Part,
    /// What the machine is made from.
    pub machine: Description,
    state: MachineState,
}

/// Reads a file of at most `most` bytes.
fn read(path: &Path, most: u64) -> Result<Vec<u8>, Error> {
    let failed = io_error(path);
    let file = File::open(path).map_err(&failed)?;
    let len = file.metadata().map_err(&failed)?.len();
    if len > most {
        return Err(Error::Broken {
            path: path.to_owned(),
            why: format!("it has {len} bytes, more than there can be"),
        });
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).map_err(&failed)?;
    Ok(bytes)
}

impl Snapshot {
    /// Opens the snapshot at `path`.
    ///
    /// # Errors
    /// It is none of this version of this program, or is not what was saved.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let foreign = |why: String| Error::Foreign { path: path.to_owned(), why };
        let bytes = read(&path.join(MANIFEST), MOST_MANIFEST)?;
        #[derive(Deserialize)]
        struct Head {
            form: String,
            version: u32,
        }
        let head: Head =
            serde_json::from_slice(&bytes).map_err(|e| foreign(format!("its manifest is not understood: {e}")))?;
        if head.form != FORM {
            return Err(foreign(format!("its form is `{}`", head.form)));
        }
        if head.version != VERSION {
            return Err(Error::Version { path: path.to_owned(), found: head.version });
        }
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|e| foreign(format!("its manifest is not understood: {e}")))?;
        if bytes_of(&manifest) != bytes {
            return Err(foreign("its manifest is not as it was written".to_owned()));
        }
        let file = path.join(STATE);
        let broken = |why: String| Error::Broken { path: file.clone(), why };
        let bytes = read(&file, MOST_STATE)?;
        let found = Part { bytes: bytes.len() as u64, sha256: hexadecimal(Sha256::digest(&bytes)) };
        if found != manifest.state {
            return Err(broken("its digest is another".to_owned()));
        }
        let Whole { machine, state } =
            serde_json::from_slice(&bytes).map_err(|e| broken(format!("it is not understood: {e}")))?;
        Ok(Self { path: path.to_owned(), memory: manifest.memory, machine, state })
    }

    /// Reads the memory into RAM that is all zeros. Gives back the state.
    ///
    /// # Errors
    /// It is not what was saved, or of another size.
    pub fn read_memory(self, ram: &Ram) -> Result<MachineState, Error> {
        let path = self.path.join(MEMORY);
        let failed = io_error(&path);
        let broken = |why: String| Error::Broken { path: path.clone(), why };
        let file = File::open(&path).map_err(&failed)?;
        let (len, size) =
            (file.metadata().map_err(&failed)?.len(), ram.iter().map(GuestMemoryRegion::len).sum::<u64>());
        if len != self.memory.bytes || len != size {
            let wanted = self.memory.bytes;
            return Err(broken(format!("it has {len} bytes, the manifest says {wanted}, and the machine has {size}")));
        }
        let mut digest = RamDigest::default();
        let (mut chunk, mut base) = (vec![0; CHUNK], 0);
        for region in ram.iter() {
            let mut at = 0;
            while at < region.len() {
                let len = (region.len() - at).min(CHUNK as u64) as usize;
                let chunk = &mut chunk[..len];
                file.read_exact_at(chunk, base + at).map_err(&failed)?;
                for (page, bytes) in (0..).step_by(PAGE).zip(chunk.chunks(PAGE)) {
                    if *bytes != ZEROS[..bytes.len()] {
                        digest.add(base + at + page, bytes);
                        let put = region.write_slice(bytes, MemoryRegionAddress(at + page));
                        put.map_err(|e| broken(format!("it cannot be put into RAM: {e}")))?;
                    }
                }
                at += len as u64;
            }
            base += region.len();
        }
        if digest.end() != self.memory.sha256 {
            return Err(broken("its digest is another".to_owned()));
        }
        Ok(self.state)
    }
}

impl Machine {
    /// Gives a machine that was made from `snapshot`, and has not run, its memory and its state.
    ///
    /// # Errors
    /// Something is not what was saved, or does not fit. Then the machine is not to be run.
    pub fn take_over(&mut self, snapshot: Snapshot) -> Result<(), Error> {
        let path = snapshot.path.clone();
        let state = snapshot.read_memory(&self.ram)?;
        let held = self.restore(state).map_err(|why| Error::Broken { path: path.join(STATE), why })?;
        self.begin(held);
        Ok(())
    }
}

#[cfg(test)]
#[path = "snapshot_test.rs"]
mod snapshot_test;
