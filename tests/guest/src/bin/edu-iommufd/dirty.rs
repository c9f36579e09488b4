//! What the device writes, by the dirty bits of a second stage.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use guest_programs::edu::Direction;
use guest_programs::iommufd::Purpose;
use guest_programs::memory::{Backing, DmaMemory, PAGE, pattern};
use guest_programs::random::Random;
use guest_programs::vfio::Access;

use crate::Rig;

/// Pages that the device may write.
const PAGES: usize = 256;
/// Pages behind them that it may only read.
const READ_ONLY: usize = 8;
const IOVA: u64 = 0x1000_0000;

/// Random DMAs of some bytes, over the end of a page, too, and now and then a read of what is dirty.
pub fn run(rig: &Rig, transfers: u32) -> Result<()> {
    let iommufd = &rig.iommufd;
    let memory = DmaMemory::new((PAGES + READ_ONLY) * PAGE, Backing::Base)?;
    let ioas = iommufd.alloc_ioas()?;
    iommufd.map(ioas, IOVA, &memory, 0, PAGES * PAGE, Access::ReadWrite).context("IOAS_MAP")?;
    let behind = IOVA + (PAGES * PAGE) as u64;
    iommufd.map(ioas, behind, &memory, PAGES * PAGE, READ_ONLY * PAGE, Access::ReadOnly).context("IOAS_MAP")?;
    let purpose = Purpose { dirty_tracking: true, ..Purpose::default() };
    let table = iommufd.alloc_hwpt(&rig.function, ioas, purpose).context("HWPT_ALLOC with dirty tracking")?;
    rig.function.attach(table).context("attaching")?;
    let edu = rig.edu()?;

    // What is written before is not looked for.
    edu.dma(Direction::ToMemory, IOVA, PAGE)?;
    iommufd.track_dirty(table, true).context("HWPT_SET_DIRTY_TRACKING")?;
    let mut random = Random::new(7);
    let (mut written, mut reads, mut found) = (BTreeSet::new(), 0, 0);
    let read = |keep| -> Result<BTreeSet<usize>> {
        let pages = iommufd.dirty_pages(table, IOVA, PAGES + READ_ONLY, keep).context("HWPT_GET_DIRTY_BITMAP")?;
        Ok(pages.into_iter().collect())
    };
    ensure!(read(false)?.is_empty(), "dirty before anything was written");
    memory.write(0, &pattern(9, PAGE));
    for transfer in 0..=transfers {
        if transfer == transfers || random.below(10) == 0 {
            let keep = random.below(2) == 0;
            let dirty = read(keep)?;
            ensure!(dirty == written, "dirty: {dirty:?}, written: {written:?}, after {transfer} DMAs");
            (reads, found) = (reads + 1, found + dirty.len());
            if !keep {
                written.clear();
            }
        }
        let (offset, len) = (random.below(PAGES * PAGE - PAGE), 1 + random.below(PAGE));
        match random.below(4) {
            0 => edu.dma(Direction::FromMemory, IOVA + offset as u64, len)?,
            1 => edu.dma(Direction::ToMemory, behind + (offset % (READ_ONLY * PAGE)) as u64, 1)?,
            _ => {
                edu.dma(Direction::ToMemory, IOVA + offset as u64, len)?;
                written.extend(offset / PAGE..=(offset + len - 1) / PAGE);
            }
        }
    }
    ensure!(found > 0, "nothing was written");
    iommufd.track_dirty(table, false).context("HWPT_SET_DIRTY_TRACKING off")?;
    println!("dirty: {transfers} DMAs, {reads} reads with {found} pages: those that were written and no other");
    Ok(())
}
