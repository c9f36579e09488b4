//! First-stage tables of this program over a page table of the kernel's.

use anyhow::{Context, Result, ensure};
use guest_programs::edu::Direction;
use guest_programs::first_stage::{Noted, TABLES, Tables};
use guest_programs::iommufd::Purpose;
use guest_programs::memory::{Backing, DmaMemory, PAGE, pattern};
use guest_programs::vfio::Access;

use crate::{Rig, copy, expect, holds};

/// Where the memory is in the address space below: what a guest of this program would call physical.
const BELOW: u64 = 0x1000_0000;
/// What the tables translate.
const IOVA: u64 = 0x40_0000_0000;
/// Pages of data behind the tables.
const DATA: usize = 4;

/// A page goes from one to the other; entries change, and pages go away below.
pub fn run(rig: &Rig) -> Result<()> {
    let iommufd = &rig.iommufd;
    let memory = DmaMemory::new((TABLES + DATA) * PAGE, Backing::Base)?;
    let offset = |page: usize| (TABLES + page) * PAGE;
    let below = |page: usize| BELOW + offset(page) as u64;
    let iova = |page: usize| IOVA + (page * PAGE) as u64;
    let ioas = iommufd.alloc_ioas()?;
    for page in 0..TABLES + DATA {
        let at = page * PAGE;
        iommufd.map(ioas, BELOW + at as u64, &memory, at, PAGE, Access::ReadWrite).context("IOAS_MAP")?;
    }
    let purpose = Purpose { parent: true, ..Purpose::default() };
    let parent = iommufd.alloc_hwpt(&rig.function, ioas, purpose).context("HWPT_ALLOC of a parent")?;
    let tables = Tables::new(&memory, BELOW, IOVA);
    let nested =
        iommufd.alloc_nested(&rig.function, parent, tables.root(), None, false).context("HWPT_ALLOC nested")?;
    rig.function.attach(nested).context("attaching")?;
    let edu = rig.edu()?;
    let write = |page: usize, seed: u8| memory.write(offset(page), &pattern(seed, PAGE));

    tables.set(0, Some(below(0)), false);
    tables.set(1, Some(below(1)), true);
    write(0, 1);
    copy(&edu, iova(0), iova(1))?;
    expect("through both stages", &memory, offset(1), 1)?;
    let (read, written) = (tables.noted(0), tables.noted(1));
    ensure!(read == Noted { accessed: true, dirty: false }, "of a page that was read: {read:?}");
    ensure!(written == Noted { accessed: true, dirty: true }, "of a page that was written: {written:?}");
    println!("nested: a page went through both stages, and the entries say accessed and dirty");

    // The first stage alone says that it may not be written.
    write(0, 2);
    copy(&edu, iova(1), iova(0))?;
    expect("a write without permission", &memory, offset(0), 2)?;

    // Another target is seen at the latest when the kernel has invalidated.
    tables.set(0, Some(below(2)), false);
    write(2, 3);
    iommufd.invalidate(nested, iova(0), 1).context("HWPT_INVALIDATE")?;
    copy(&edu, iova(0), iova(1))?;
    expect("an entry that changed", &memory, offset(1), 3)?;
    println!("nested: an entry that changed leads elsewhere after its invalidation");

    // All of a table at once.
    tables.set(0, None, false);
    tables.set(3, Some(below(3)), true);
    iommufd.invalidate(nested, 0, u64::MAX).context("HWPT_INVALIDATE of everything")?;
    write(1, 4);
    write(3, 5);
    edu.dma(Direction::FromMemory, iova(1), PAGE)?;
    edu.dma(Direction::FromMemory, iova(0), PAGE)?;
    edu.dma(Direction::ToMemory, iova(3), PAGE)?;
    ensure!(!holds(&memory, offset(3), 3), "a page was read whose entry is gone");
    println!("nested: nothing is read through an entry that is gone");

    // The second stage takes a page away that the first one still grants.
    write(3, 6);
    copy(&edu, iova(1), iova(3))?;
    expect("before the unmap below", &memory, offset(3), 4)?;
    iommufd.unmap(ioas, below(3), PAGE).context("IOAS_UNMAP")?;
    write(3, 7);
    copy(&edu, iova(1), iova(3))?;
    expect("after the unmap below", &memory, offset(3), 7)?;
    println!("nested: what the address space below lost is not reached");

    // So is a table that goes away below, and everything it leads to.
    let leaves = BELOW + ((TABLES - 1) * PAGE) as u64;
    iommufd.unmap(ioas, leaves, PAGE).context("IOAS_UNMAP of a table")?;
    write(0, 8);
    write(1, 9);
    edu.dma(Direction::ToMemory, iova(1), PAGE)?;
    expect("after a table went below", &memory, offset(1), 9)?;
    println!("nested: nothing is reached through a table that the address space below lost");
    Ok(())
}
