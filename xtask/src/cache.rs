//! The bench's cache: where it is, who may use it, and what makes its contents stale.

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// The cache folder, locked for as long as this or a clone lives (the lock dies with the process).
#[derive(Clone)]
pub struct Cache {
    pub folder: PathBuf,
    _lock: Arc<File>,
}

/// The workspace's root folder.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned).unwrap_or_default()
}

/// cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), |dir| workspace().join(dir))
}

/// A line of progress, on stderr.
pub fn progress(text: impl std::fmt::Display) {
    eprintln!("bench: {text}");
}

impl Cache {
    /// Opens `CAUSEWAY_BENCH`, or `bench` in the target folder, and waits until no other run has it.
    pub fn open() -> Result<Self> {
        let folder = std::env::var_os("CAUSEWAY_BENCH").map_or_else(|| target().join("bench"), PathBuf::from);
        std::fs::create_dir_all(folder.join("logs")).with_context(|| format!("cannot create {}", folder.display()))?;
        let folder = folder.canonicalize()?;
        let lock = File::create(folder.join("lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress(format_args!("another run has {}: waiting for it", folder.display()));
                lock.lock()?;
            }
            Err(TryLockError::Error(error)) => return Err(error).context("cannot lock the cache"),
        }
        // A run that was killed left its folders.
        let left = folder.join("run");
        if left.exists() {
            std::fs::remove_dir_all(&left).with_context(|| format!("cannot remove {}", left.display()))?;
        }
        Ok(Self { folder, _lock: Arc::new(lock) })
    }

    /// A cache inside of this one, for what is kept twice.
    pub fn inner(&self, name: &str) -> Result<Self> {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(folder.join("logs")).with_context(|| format!("cannot create {}", folder.display()))?;
        Ok(Self { folder, _lock: Arc::clone(&self._lock) })
    }

    /// Removes the logs of earlier runs whose names begin with `start`.
    pub fn forget_logs(&self, start: &str) -> Result<()> {
        for entry in std::fs::read_dir(self.path("logs"))? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(start) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Refuses to start what would fill the disk.
    pub fn need_free(&self, bytes: u64) -> Result<()> {
        let result = Command::new("df").args(["-Pk"]).arg(&self.folder).output().context("cannot run df")?;
        let text = String::from_utf8_lossy(&result.stdout).into_owned();
        let free = text.lines().nth(1).and_then(|line| line.split_whitespace().nth(3)?.parse::<u64>().ok());
        let Some(free) = free else { bail!("df does not say how much is free in {}", self.folder.display()) };
        ensure!(
            free * 1024 >= bytes,
            "{} has {:.1} GB free and {:.1} GB are needed; CAUSEWAY_BENCH=DIR puts the bench elsewhere",
            self.folder.display(),
            free as f64 / 1048576.0,
            bytes as f64 / f64::from(1 << 30)
        );
        Ok(())
    }

    /// Whether the artefact `name` was made by this `recipe`.
    pub fn is_fresh(&self, name: &str, recipe: &str) -> bool {
        std::fs::read_to_string(self.path(&format!("{name}.stamp"))).is_ok_and(|stamp| stamp == recipe)
    }

    pub fn forget(&self, name: &str) -> Result<()> {
        match std::fs::remove_file(self.path(&format!("{name}.stamp"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// To be called once the artefact is whole.
    pub fn stamp(&self, name: &str, recipe: &str) -> Result<()> {
        Ok(std::fs::write(self.path(&format!("{name}.stamp")), recipe)?)
    }
}

/// A hash of everything an artefact is made from.
pub fn recipe(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_tells_its_parts_apart() {
        assert_ne!(recipe(&["ab", "c"]), recipe(&["a", "bc"]));
        assert_eq!(recipe(&["ab", "c"]), recipe(&["ab", "c"]));
    }
}
