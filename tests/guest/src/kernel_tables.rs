//! The page table that this kernel's IOMMU driver keeps for a function, and the frames behind a process' addresses.
//!
//! Both need root, and the table a kernel with `CONFIG_INTEL_IOMMU_DEBUGFS`.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

const PAGE_SHIFT: u32 = 12;
/// Bits of an address in an entry.
const ADDRESS: u64 = ((1 << 52) - 1) & !((1 << PAGE_SHIFT) - 1);

/// What a device may do with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Permission {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Permission {
    /// Reading only.
    pub const READ: Self = Self { read: true, write: false };
    /// Both.
    pub const READ_WRITE: Self = Self { read: true, write: true };

    /// What a kernel that was asked for this may make of it: up to 6.12, what can be written can be read.
    pub fn allows(self, held: Self) -> bool {
        held == self || (self.write && held == Self::READ_WRITE)
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.read { "r" } else { "" }, if self.write { "w" } else { "" })
    }
}

impl FromStr for Permission {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "r" => Ok(Self::READ),
            "w" => Ok(Self { read: false, write: true }),
            "rw" => Ok(Self::READ_WRITE),
            _ => bail!("'{text}' is not a permission"),
        }
    }
}

/// One 4 KiB page as a table translates it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// The page frame number of the host.
    pub frame: u64,
    /// What the device may do.
    pub permission: Permission,
}

/// A function's table.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Table {
    /// By IOVA, in pages.
    pub pages: BTreeMap<u64, Page>,
    /// Leaves of 4 KiB, 2 MiB and 1 GiB.
    pub leaves: [u64; 3],
    /// Whether the function is behind a table at all.
    pub translates: bool,
}

impl Table {
    /// The table of `bdf` (DDDD:BB:DD.F) at this moment.
    ///
    /// # Errors
    /// If the kernel does not show it.
    pub fn of(bdf: &str) -> Result<Self> {
        let file = format!("/sys/kernel/debug/iommu/intel/{bdf}/domain_translation_struct");
        let text = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
        text.parse().with_context(|| format!("the content of {file}"))
    }
}

/// A line for each leaf: the page number of its IOVA, `|`, and the entries on the way to it from the PML5E (0 where
/// there is none) to the leaf itself, which is the third for 1 GiB, the fourth for 2 MiB and the fifth for 4 KiB.
impl FromStr for Table {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut table = Self::default();
        for line in text.lines() {
            table.translates |= line.starts_with("Device ");
            let Some((iova, entries)) = line.split_once('|') else { continue };
            let entries: Vec<u64> = entries.split_whitespace().map(hex).collect::<Result<_>>()?;
            let level = 5usize.checked_sub(entries.len()).filter(|level| *level < 3);
            let (level, leaf) = level.zip(entries.last()).with_context(|| format!("not a leaf: {line}"))?;
            let (iova, count) = (hex(iova.trim())?, 1u64 << (9 * level));
            ensure!(iova % count == 0, "a leaf that is not at its size: {line}");
            let permission = Permission { read: leaf & 1 != 0, write: leaf & 2 != 0 };
            let frame = (leaf & ADDRESS) >> PAGE_SHIFT;
            for page in 0..count {
                let before = table.pages.insert(iova + page, Page { frame: frame + page, permission });
                ensure!(before.is_none(), "a page that is there twice: {line}");
            }
            table.leaves[level] += 1;
        }
        Ok(table)
    }
}

fn hex(text: &str) -> Result<u64> {
    let digits = text.strip_prefix("0x").with_context(|| format!("'{text}' is not a hex number"))?;
    u64::from_str_radix(digits, 16).with_context(|| format!("'{text}' is not a hex number"))
}

/// The frames behind the memory of a process.
pub struct Frames(File);

impl Frames {
    /// Of the process `pid`.
    ///
    /// # Errors
    /// If there is none.
    pub fn of(pid: u32) -> Result<Self> {
        let file = format!("/proc/{pid}/pagemap");
        Ok(Self(File::open(&file).with_context(|| format!("opening {file}"))?))
    }

    /// The page frame numbers of `count` pages from `address` on.
    ///
    /// # Errors
    /// If one of them is not in memory, or this process may not know.
    pub fn behind(&self, address: u64, count: u64) -> Result<Vec<u64>> {
        const PRESENT: u64 = 1 << 63;
        const FRAME: u64 = (1 << 55) - 1;
        let mut bytes = vec![0; usize::try_from(count * 8)?];
        self.0.read_exact_at(&mut bytes, (address >> PAGE_SHIFT) * 8).context("reading a pagemap")?;
        let entry = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |entry, byte| entry << 8 | u64::from(*byte));
        bytes
            .chunks_exact(8)
            .map(entry)
            .map(|entry| match entry & FRAME {
                _ if entry & PRESENT == 0 => bail!("a page from {address:#x} on is not in memory"),
                0 => bail!("the kernel hides frame numbers: run as root"),
                frame => Ok(frame),
            })
            .collect()
    }
}

/// The BARs of the functions that are bound to vfio-pci: physical addresses, each first and last.
pub struct HostBars(Vec<(u64, u64)>);

impl HostBars {
    /// Those of this machine.
    ///
    /// # Errors
    /// If sysfs cannot be read.
    pub fn of_vfio() -> Result<Self> {
        let mut bars = Vec::new();
        for device in fs::read_dir("/sys/bus/pci/drivers/vfio-pci")? {
            let resources = device?.path().join("resource");
            if resources.exists() {
                bars.extend(fs::read_to_string(resources)?.lines().take(6).filter_map(memory_bar));
            }
        }
        Ok(Self(bars))
    }

    /// Where page `gpa` of the guest can be, which is in a BAR: a BAR lies at a multiple of its size in the guest as in
    /// the host, so the bits below that are the same.
    pub fn can_be(&self, gpa: u64, frame: u64) -> bool {
        self.0.iter().any(|(first, last)| first + (gpa & (last - first)) == frame << PAGE_SHIFT)
    }
}

/// First and last address from a line of sysfs's `resource`, if it is that of a memory BAR.
fn memory_bar(line: &str) -> Option<(u64, u64)> {
    const MEMORY: u64 = 0x200;
    let mut numbers = line.split(' ').filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    let (first, last, flags) = (numbers.next()?, numbers.next()?, numbers.next()?);
    (flags & MEMORY != 0 && last > first).then_some((first, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Device 0000:00:09.0 @0x104800000\n\
        IOVA_PFN         \tPML5E             \tPML4E             \tPDPE              \tPDE               \tPTE\n\
        0x0000000000200 |\t0x0000000000000000\t0x0000000104801003\t0x0000000104802003\t0x0000000140200883\n\
        0x00000000fffe3 |\t0x0000000000000000\t0x0000000104801003\t0x0000000104802003\t0x0000000104803003\t0x000000012345a801\n";

    #[test]
    fn a_table_is_read_page_by_page() {
        let table: Table = TEXT.parse().unwrap();
        assert_eq!((table.leaves, table.pages.len(), table.translates), ([1, 1, 0], 513, true));
        assert_eq!(table.pages[&0x200], Page { frame: 0x140200, permission: Permission::READ_WRITE });
        assert_eq!(table.pages[&0x3ff], Page { frame: 0x1403ff, permission: Permission::READ_WRITE });
        assert_eq!(table.pages[&0xfffe3], Page { frame: 0x12345a, permission: Permission::READ });
        assert_eq!("".parse::<Table>().unwrap(), Table::default());
    }

    #[test]
    fn what_is_not_a_leaf_is_not_passed_over() {
        let entry = "\t0x0000000000000003";
        for bad in [
            format!("0x0000000000001 |{}", entry.repeat(4)),
            format!("0x0000000000000 |{}", entry.repeat(2)),
            format!("0x0000000000000 |{}", entry.repeat(6)),
            "0x0000000000000 |\tnone".to_owned(),
            format!("0x0000000000000 |{0}\n0x0000000000000 |{0}", entry.repeat(5)),
        ] {
            assert!(bad.parse::<Table>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_a_write_only_page_may_be_held_with_more() {
        let write = Permission { read: false, write: true };
        let all = [Permission::READ, write, Permission::READ_WRITE];
        let allowed: Vec<_> =
            all.iter().flat_map(|a| all.iter().filter(|b| a.allows(**b)).map(move |b| format!("{a} {b}"))).collect();
        assert_eq!(allowed, ["r r", "w w", "w rw", "rw rw"]);
    }

    #[test]
    fn a_page_of_a_bar_is_where_the_host_has_that_part_of_one() {
        let line = "0x00000000fea00000 0x00000000feafffff 0x0000000000040200";
        assert_eq!(memory_bar(line), Some((0xfea0_0000, 0xfeaf_ffff)));
        assert_eq!(memory_bar("0x000000000000c000 0x000000000000c01f 0x0000000000040101"), None, "of ports");
        assert_eq!(memory_bar("0x0000000000000000 0x0000000000000000 0x0000000000000000"), None);
        let bars = HostBars(vec![(0xfea0_0000, 0xfeaf_ffff), (0x8_0000_4000, 0x8_0000_7fff)]);
        assert!(bars.can_be(0xc010_3000, 0xfea0_3000 >> 12) && bars.can_be(0xc020_1000, 0x8_0000_5000 >> 12));
        assert!(!bars.can_be(0xc010_3000, 0xfea0_4000 >> 12) && !bars.can_be(0xc020_1000, 0x8_0000_6000 >> 12));
    }
}
