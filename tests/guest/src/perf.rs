//! Counters of the kernel's perf for a unit that counts for the whole machine: `perf_event_open` with what sysfs says
//! of the unit's events.

use std::fs::{self, File};
use std::io::Read;
use std::mem::size_of;
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use perf_event_open_sys as sys;

/// A unit of perf's, by its name in sysfs.
pub struct Pmu(PathBuf);

/// The three numbers of an event.
#[derive(Default)]
struct Config([u64; 3]);

impl Pmu {
    /// The one with this name.
    ///
    /// # Errors
    /// If the kernel has none.
    pub fn named(name: &str) -> Result<Self> {
        let path = Path::new("/sys/bus/event_source/devices").join(name);
        ensure!(path.exists(), "perf has no {name}");
        Ok(Self(path))
    }

    fn read(&self, file: impl AsRef<Path>) -> Result<String> {
        let path = self.0.join(file);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(text.trim().to_owned())
    }

    /// Puts a term `name=value` where the unit's format has it.
    fn put(&self, config: &mut Config, term: &str) -> Result<()> {
        let (name, value) = term.split_once('=').unwrap_or((term, "1"));
        let value = value.strip_prefix("0x").map_or_else(|| value.parse(), |hex| u64::from_str_radix(hex, 16))?;
        let format = self.read(Path::new("format").join(name))?;
        let (word, bits) = format.split_once(':').with_context(|| format!("the format of {name} is {format}"))?;
        let (low, high) = bits.split_once('-').unwrap_or((bits, bits));
        let (low, high): (u32, u32) = (low.parse()?, high.parse()?);
        ensure!(high < 64 && value >> (high - low) <= 1, "{term} does not fit {format}");
        let word = match word {
            "config" => 0,
            "config1" => 1,
            "config2" => 2,
            other => bail!("{name} is in {other}"),
        };
        config.0[word] |= value << low;
        Ok(())
    }

    /// A counter of an event that sysfs names, with further terms (`filter_requester_id=0x10`), which counts from now
    /// on.
    ///
    /// # Errors
    /// If the unit does not have the event, or does not count what is asked.
    pub fn counter(&self, event: &str, terms: &[&str]) -> Result<Counter> {
        let mut config = Config::default();
        let named = self.read(Path::new("events").join(event))?;
        named.split(',').chain(terms.iter().copied()).try_for_each(|term| self.put(&mut config, term))?;
        let mut attributes = sys::bindings::perf_event_attr {
            size: size_of::<sys::bindings::perf_event_attr>() as u32,
            type_: self.read("type")?.parse()?,
            config: config.0[0],
            ..Default::default()
        };
        attributes.__bindgen_anon_3.config1 = config.0[1];
        attributes.__bindgen_anon_4.config2 = config.0[2];
        // SAFETY: the kernel reads the structure, whose size is in it.
        let fd = unsafe { sys::perf_event_open(&mut attributes, -1, 0, -1, 0) };
        ensure!(fd >= 0, "perf_event_open of {event} {terms:?}: {}", std::io::Error::last_os_error());
        // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
        Ok(Counter(unsafe { File::from_raw_fd(fd) }))
    }
}

/// A counter that counts until it is dropped.
pub struct Counter(File);

impl Counter {
    /// What it has counted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn count(&self) -> Result<u64> {
        let mut count = [0; size_of::<u64>()];
        (&self.0).read_exact(&mut count).context("reading a counter")?;
        Ok(u64::from_ne_bytes(count))
    }
}
