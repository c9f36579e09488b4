//! Two PASIDs of one device, and its requests without one.

use anyhow::{Context, Result};
use guest_programs::iommufd::Purpose;
use guest_programs::memory::{Backing, DmaMemory, PAGE, pattern};
use guest_programs::vfio::Access;

use crate::{Rig, copy, expect};

const IOVA: u64 = 0x1000_0000;
const PASIDS: [Option<u32>; 3] = [None, Some(5), Some(0x12345)];

/// The same IOVAs lead to other memory for each.
pub fn run(rig: &Rig) -> Result<()> {
    let iommufd = &rig.iommufd;
    let purpose = Purpose { pasids: true, ..Purpose::default() };
    let mut memories = Vec::new();
    for (pasid, seed) in PASIDS.into_iter().zip(1u8..) {
        let memory = DmaMemory::new(2 * PAGE, Backing::Base)?;
        memory.write(0, &pattern(seed, PAGE));
        let ioas = iommufd.alloc_ioas()?;
        iommufd.map(ioas, IOVA, &memory, 0, 2 * PAGE, Access::ReadWrite).context("IOAS_MAP")?;
        let table = iommufd.alloc_hwpt(&rig.function, ioas, purpose).context("HWPT_ALLOC for PASIDs")?;
        match pasid {
            None => rig.function.attach(table).context("attaching")?,
            Some(pasid) => rig.function.attach_pasid(pasid, table).context("attaching a PASID")?,
        }
        memories.push((pasid, seed, ioas, memory));
    }
    let edu = rig.edu()?;
    for (pasid, seed, _, memory) in &memories {
        edu.set_pasid(*pasid)?;
        copy(&edu, IOVA, IOVA + PAGE as u64)?;
        expect(&format!("PASID {pasid:x?}"), memory, PAGE, *seed)?;
    }
    println!("pasids: {PASIDS:x?} reach what each was attached to");

    // What one loses, the others keep.
    let (pasid, _, ioas, lost) = &memories[1];
    edu.set_pasid(*pasid)?;
    copy(&edu, IOVA, IOVA + PAGE as u64)?;
    iommufd.unmap(*ioas, IOVA, 2 * PAGE).context("IOAS_UNMAP")?;
    lost.write(PAGE, &pattern(9, PAGE));
    copy(&edu, IOVA, IOVA + PAGE as u64)?;
    expect("a PASID that lost its memory", lost, PAGE, 9)?;
    for (pasid, seed, _, memory) in [&memories[0], &memories[2]] {
        memory.write(PAGE, &pattern(10, PAGE));
        edu.set_pasid(*pasid)?;
        copy(&edu, IOVA, IOVA + PAGE as u64)?;
        expect(&format!("PASID {pasid:x?}, which keeps its own"), memory, PAGE, *seed)?;
    }
    println!("pasids: what one loses, the others keep");
    Ok(())
}
