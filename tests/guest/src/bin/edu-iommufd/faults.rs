//! Page requests: what the device asks for comes to this program, which answers.

use anyhow::{Context, Result, ensure};
use guest_programs::edu::Direction;
use guest_programs::first_stage::{TABLES, Tables};
use guest_programs::iommufd::Purpose;
use guest_programs::memory::{Backing, DmaMemory, PAGE, pattern};
use guest_programs::vfio::Access;

use crate::{Rig, copy, expect};

const BELOW: u64 = 0x1000_0000;
const IOVA: u64 = 0x40_0000_0000;
const PASID: u32 = 7;
const DATA: usize = 3;
/// IOMMU_HWPT_PGFAULT's permissions.
const READ: u32 = 1;
const WRITE: u32 = 2;

/// Two pages are asked for and given, a third one is refused.
pub fn run(rig: &Rig) -> Result<()> {
    let iommufd = &rig.iommufd;
    let memory = DmaMemory::new((TABLES + DATA) * PAGE, Backing::Base)?;
    let offset = |page: usize| (TABLES + page) * PAGE;
    let iova = |page: usize| IOVA + (page * PAGE) as u64;
    let ioas = iommufd.alloc_ioas()?;
    iommufd.map(ioas, BELOW, &memory, 0, memory.len(), Access::ReadWrite).context("IOAS_MAP")?;
    let parent = Purpose { parent: true, pasids: true, ..Purpose::default() };
    let parent = iommufd.alloc_hwpt(&rig.function, ioas, parent).context("HWPT_ALLOC of a parent")?;
    rig.function.attach(parent).context("attaching")?;
    let faults = iommufd.alloc_fault_queue().context("FAULT_QUEUE_ALLOC")?;
    let tables = Tables::new(&memory, BELOW, IOVA);
    let nested = iommufd
        .alloc_nested(&rig.function, parent, tables.root(), Some(&faults), true)
        .context("HWPT_ALLOC nested, with faults")?;
    rig.function.attach_pasid(PASID, nested).context("attaching a PASID")?;
    let edu = rig.edu()?;
    edu.set_pasid(Some(PASID))?;

    // Starts a DMA of a page, which is asked for, and gives that page or refuses it.
    let asked_for = |direction: Direction, page: usize, given: bool| -> Result<()> {
        edu.program(direction, iova(page), PAGE);
        edu.start(direction);
        let fault = faults.next()?;
        ensure!(fault.addr == iova(page), "a fault at {:#x} instead of {:#x}", fault.addr, iova(page));
        ensure!(fault.pasid == PASID, "a fault of PASID {}", fault.pasid);
        let wanted = if direction == Direction::ToMemory { WRITE } else { READ };
        ensure!(fault.perm & wanted != 0, "permission {:#x} instead of {wanted:#x}", fault.perm);
        ensure!(edu.busy(), "it did not wait for the answer");
        if given {
            tables.set(page, Some(BELOW + offset(page) as u64), wanted == WRITE);
        }
        faults.answer(&fault, given)?;
        edu.wait()
    };
    memory.write(offset(0), &pattern(1, PAGE));
    asked_for(Direction::FromMemory, 0, true)?;
    asked_for(Direction::ToMemory, 1, true)?;
    expect("pages that were asked for", &memory, offset(1), 1)?;
    copy(&edu, iova(0), iova(1))?;
    println!("faults: two pages were asked for, given, and reached");

    memory.write(offset(2), &pattern(2, PAGE));
    asked_for(Direction::ToMemory, 2, false)?;
    expect("a page that was refused", &memory, offset(2), 2)?;
    println!("faults: a page that was refused is not reached");
    Ok(())
}
