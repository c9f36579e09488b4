//! What Causeway's trace says that the host was handed: its lines `host ...`, one after the other (docs/tracing.md).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Context, Result, bail, ensure};

use crate::kernel_tables::Permission;

/// One mapping that the host was handed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First IOVA.
    pub first: u64,
    /// Last IOVA, inclusive.
    pub last: u64,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Address of the first byte in Causeway's process.
    pub hva: u64,
    /// What the device may do.
    pub permission: Permission,
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, last, gpa, hva, permission } = self;
        write!(f, "{first:#x}-{last:#x} to {gpa:#x} ({hva:#x}) {permission}")
    }
}

/// A container's mappings, by first IOVA.
pub type Extents = BTreeMap<u64, Extent>;

/// What one container holds after all that a trace says of it.
#[derive(Default, Debug)]
pub struct Replay {
    /// Guest RAM and BARs: first and last guest-physical address, and the address in the process.
    memory: Vec<(u64, u64, u64)>,
    /// Of these, the first addresses of parts of BARs.
    bars: BTreeSet<u64>,
    /// What the maps and unmaps left.
    pub extents: Extents,
    /// How many times the ledger was listed; each time it was what the maps and unmaps had left.
    pub ledgers: u64,
    /// Extents that a listing still owes.
    owed: u64,
    listing: Extents,
}

impl Replay {
    /// Reads the lines of `trace` that are about `container`.
    ///
    /// # Errors
    /// If an operation contradicts those before it, or the ledger does.
    pub fn of(trace: &str, container: &str) -> Result<Self> {
        let mut replay = Self::default();
        for line in trace.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let Some((_, what)) = line.split_once(' ').filter(|(_, what)| what.starts_with("host ")) else { continue };
            replay.take(what, container).with_context(|| format!("in the line '{line}'"))?;
        }
        ensure!(replay.owed == 0, "the ledger's last listing ends early");
        Ok(replay)
    }

    /// The container that `trace` has for `group` at its end: that of its number where the host gave it one for life,
    /// or the one that it was attached to last.
    ///
    /// # Errors
    /// If it is attached to none.
    pub fn container_of(trace: &str, group: &str) -> Result<String> {
        let mut container = Some(group.to_owned());
        for line in trace.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let mut words = line.split(' ').skip(1);
            let (Some("host"), Some(operation @ ("attach" | "detach"))) = (words.next(), words.next()) else {
                continue;
            };
            let values: BTreeMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
            if values.get("group") != Some(&group) || values.get("result") != Some(&"ok") {
                continue;
            }
            container = values.get("container").filter(|_| operation == "attach").map(|name| (*name).to_owned());
        }
        container.with_context(|| format!("group {group} is attached to nothing"))
    }

    fn take(&mut self, line: &str, container: &str) -> Result<()> {
        let operation = line.split(' ').nth(1).unwrap_or_default();
        let values: BTreeMap<&str, &str> = line.split(' ').filter_map(|word| word.split_once('=')).collect();
        let value = |key: &str| values.get(key).copied().with_context(|| format!("no {key}"));
        if operation == "memory" {
            let (first, last) = range(value("gpa")?)?;
            self.memory.push((first, last, number(value("hva")?)?));
            if values.contains_key("bar") {
                self.bars.insert(first);
            }
            return Ok(());
        }
        if operation == "gone" {
            let (first, last) = range(value("gpa")?)?;
            let before = self.memory.len();
            self.memory.retain(|(from, to, _)| (*from, *to) != (first, last));
            ensure!(self.memory.len() < before, "it was not there");
            self.bars.remove(&first);
            return Ok(());
        }
        // A group that leaves a space changes nothing in it.
        if operation == "detach" || value("container")? != container {
            return Ok(());
        }
        match operation {
            "create" | "attach" => Ok(()),
            "destroy" => {
                self.extents.clear();
                Ok(())
            }
            "map" if value("result")? != "ok" => Ok(()),
            "map" => {
                let (first, last) = range(value("iova")?)?;
                let gpa = number(value("gpa")?)?;
                let hva = self.hva(gpa, last - first)?;
                self.map(Extent { first, last, gpa, hva, permission: value("perm")?.parse()? })
            }
            "unmap" => {
                ensure!(value("result")? == "ok", "the host did not unmap");
                let (first, last) = range(value("iova")?)?;
                self.unmap(first, last, number(value("bytes")?)?)
            }
            "ledger" => {
                ensure!(self.owed == 0, "the listing before ends early");
                self.owed = value("extents")?.parse()?;
                self.listing.clear();
                self.listed()
            }
            "extent" => {
                self.owed = self.owed.checked_sub(1).context("more extents than the ledger was said to have")?;
                let (first, last) = range(value("iova")?)?;
                let (gpa, hva) = (number(value("gpa")?)?, number(value("hva")?)?);
                let extent = Extent { first, last, gpa, hva, permission: value("perm")?.parse()? };
                self.listing.insert(first, extent);
                self.listed()
            }
            other => bail!("an unknown operation '{other}'"),
        }
    }

    /// Whether `gpa` is in a BAR.
    pub fn is_bar(&self, gpa: u64) -> bool {
        let region = self.memory.iter().find(|(first, last, _)| *first <= gpa && gpa <= *last);
        region.is_some_and(|(first, ..)| self.bars.contains(first))
    }

    fn hva(&self, gpa: u64, more: u64) -> Result<u64> {
        let region = self.memory.iter().find(|(first, last, _)| *first <= gpa && gpa + more <= *last);
        let (first, _, hva) = region.with_context(|| format!("no memory of the guest at {gpa:#x}"))?;
        Ok(hva + (gpa - first))
    }

    fn map(&mut self, extent: Extent) -> Result<()> {
        let before = self.extents.range(..=extent.last).next_back().map(|(_, before)| *before);
        if let Some(before) = before.filter(|before| before.last >= extent.first) {
            bail!("{extent} overlaps {before}");
        }
        self.extents.insert(extent.first, extent);
        Ok(())
    }

    /// A host takes whole mappings away or none.
    fn unmap(&mut self, first: u64, last: u64, bytes: u64) -> Result<()> {
        let before = self.extents.range(..first).next_back().map(|(_, extent)| *extent);
        let gone: Vec<Extent> = self.extents.range(first..=last).map(|(_, extent)| *extent).collect();
        if let Some(cut) = before.iter().filter(|e| e.last >= first).chain(gone.iter().filter(|e| e.last > last)).next()
        {
            bail!("it cuts {cut}");
        }
        let size: u64 = gone.iter().map(|extent| extent.last - extent.first + 1).sum();
        ensure!(size == bytes, "{size:#x} bytes were mapped there");
        gone.iter().for_each(|extent| {
            self.extents.remove(&extent.first);
        });
        Ok(())
    }

    /// Once a listing is whole, it must be what the operations left.
    fn listed(&mut self) -> Result<()> {
        if self.owed > 0 {
            return Ok(());
        }
        for (first, extent) in &self.extents {
            ensure!(self.listing.get(first) == Some(extent), "the ledger does not have {extent}");
        }
        for (first, extent) in &self.listing {
            ensure!(self.extents.contains_key(first), "the host was not handed what the ledger has: {extent}");
        }
        self.ledgers += 1;
        Ok(())
    }
}

fn number(text: &str) -> Result<u64> {
    let digits = text.strip_prefix("0x").with_context(|| format!("'{text}' is not a hex number"))?;
    u64::from_str_radix(digits, 16).with_context(|| format!("'{text}' is not a hex number"))
}

fn range(text: &str) -> Result<(u64, u64)> {
    let (first, last) = text.split_once('-').with_context(|| format!("'{text}' is not a range"))?;
    let (first, last) = (number(first)?, number(last)?);
    ensure!(first <= last, "'{text}' is not a range");
    Ok((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0.1 host memory gpa=0x0-0xffff hva=0x70000\n\
        0.2 notify attach device=0000:00:01.0 space=identity\n\
        0.3 host map container=3 iova=0x4000-0x5fff gpa=0x1000 perm=rw ns=1 result=ok\n\
        0.3 host map container=4 iova=0x4000-0x5fff gpa=0x7000 perm=rw ns=1 result=ok\n\
        0.4 host map container=3 iova=0x8000-0x8fff gpa=0x2000 perm=r ns=1 result=ok\n\
        0.5 host map container=3 iova=0x9000-0x9fff gpa=0x2000 perm=r ns=1 result=No_space\n\
        0.6 host unmap container=3 iova=0x4000-0x7fff bytes=0x2000 ns=1 result=ok\n";

    fn with(line: &str) -> Result<Replay> {
        Replay::of(&format!("{TRACE}{line}\n"), "3")
    }

    #[test]
    fn a_bar_is_one_until_it_goes() {
        let bar = "0.7 host memory gpa=0xc0000000-0xc0001fff hva=0x90000 bar=0000:00:03.0\n";
        let came = with(bar.trim_end()).unwrap();
        assert!(came.is_bar(0xc000_1000) && !came.is_bar(0xc000_2000) && !came.is_bar(0x1000));
        let went = with(&format!("{bar}0.8 host gone gpa=0xc0000000-0xc0001fff")).unwrap();
        assert!(!went.is_bar(0xc000_1000));
    }

    #[test]
    fn what_is_left_is_what_was_mapped_and_not_unmapped() {
        let left = Replay::of(TRACE, "3").unwrap().extents;
        let extent = Extent { first: 0x8000, last: 0x8fff, gpa: 0x2000, hva: 0x72000, permission: Permission::READ };
        assert_eq!(left.values().copied().collect::<Vec<_>>(), [extent]);
        // A line that is not whole yet does not count.
        let cut = format!("{TRACE}0.7 host unmap container=3 iova=0x8000-0x8fff bytes=0x1000 ns=1 result=ok");
        assert_eq!(Replay::of(&cut, "3").unwrap().extents.len(), 1);
    }

    #[test]
    fn operations_that_contradict_each_other_are_refused() {
        let refused = |line: &str| with(line).unwrap_err().root_cause().to_string();
        let map = "0.7 host map container=3 iova=0x7000-0x8fff gpa=0x0 perm=rw ns=1 result=ok";
        assert!(refused(map).contains("overlaps"));
        let cut = "0.7 host unmap container=3 iova=0x8000-0x87ff bytes=0x1000 ns=1 result=ok";
        assert!(refused(cut).contains("cuts"));
        let bytes = "0.7 host unmap container=3 iova=0x8000-0x8fff bytes=0x0 ns=1 result=ok";
        assert!(refused(bytes).contains("0x1000 bytes were mapped"));
        let failed = "0.7 host unmap container=3 iova=0x8000-0x8fff bytes=0x0 ns=1 result=Invalid";
        assert!(refused(failed).contains("did not unmap"));
        let elsewhere = "0.7 host map container=3 iova=0x0-0xfff gpa=0x10000 perm=rw ns=1 result=ok";
        assert!(refused(elsewhere).contains("no memory"));
    }

    #[test]
    fn the_ledger_must_list_exactly_that() {
        let held = "0.8 host extent container=3 iova=0x8000-0x8fff gpa=0x2000 hva=0x72000 perm=r";
        let one = "0.7 host ledger container=3 extents=1 bytes=0x1000";
        assert_eq!(with(&format!("{one}\n{held}")).unwrap().ledgers, 1);
        assert_eq!(with("0.7 host ledger container=4 extents=0 bytes=0x0").unwrap().ledgers, 0);
        assert!(with(&format!("{one}\n{}", held.replace("0x72000", "0x73000"))).is_err());
        assert!(with(&format!("{one}\n{}", held.replace("perm=r", "perm=rw"))).is_err());
        assert!(with("0.7 host ledger container=3 extents=0 bytes=0x0").is_err());
        assert!(with(one).is_err());
        assert!(with(held).is_err());
    }

    #[test]
    fn a_group_is_in_the_container_that_it_was_attached_to_last() {
        assert_eq!(Replay::container_of(TRACE, "3").unwrap(), "3");
        let moves = "0.1 host create container=70 ns=1 result=ok\n\
            0.2 host attach container=70 group=3 ns=1 result=ok\n\
            0.3 host map container=70 iova=0x4000-0x5fff gpa=0x1000 perm=rw ns=1 result=ok\n\
            0.3 host attach container=71 group=4 ns=1 result=ok\n\
            0.4 host attach container=72 group=3 ns=1 result=Invalid_argument\n";
        let of = |more: &str, group| Replay::container_of(&format!("{moves}{more}"), group);
        assert_eq!((of("", "3").unwrap(), of("", "4").unwrap()), ("70".to_owned(), "71".to_owned()));
        let left = "0.5 host detach group=3 ns=1 result=ok\n";
        assert!(of(left, "3").is_err() && of(left, "4").is_ok());
        // A space that is given back holds nothing.
        let trace = format!("{TRACE}{moves}{left}");
        assert_eq!(Replay::of(&trace, "70").unwrap().extents.len(), 1);
        let trace = format!("{trace}0.6 host destroy container=70 ns=1 result=ok\n");
        assert_eq!(Replay::of(&trace, "70").unwrap().extents.len(), 0);
    }
}
