//! The unit's counters, by perf.

use anyhow::{Context, Result, ensure};
use guest_programs::iommufd::Purpose;
use guest_programs::memory::{Backing, DmaMemory, PAGE};
use guest_programs::perf::Pmu;
use guest_programs::vfio::Access;

use crate::{Rig, copy};

const IOVA: u64 = 0x1000_0000;
const PAGES: u64 = 8;
const ROUNDS: u64 = 5;

/// The number that requests of a function carry: bus, device and function.
fn requester(bdf: &str) -> Result<u64> {
    let hex = |text: Option<&str>| u64::from_str_radix(text.context("no BDF")?, 16).context("no BDF");
    let mut parts = bdf.split([':', '.']).skip(1);
    Ok(hex(parts.next())? << 8 | hex(parts.next())? << 3 | hex(parts.next())?)
}

/// Each page is copied to the next one, some times: two requests each, and one that is no hit for each page.
pub fn run(rig: &Rig, unit: &str) -> Result<()> {
    let iommufd = &rig.iommufd;
    let memory = DmaMemory::new(PAGES as usize * PAGE, Backing::Base)?;
    let ioas = iommufd.alloc_ioas()?;
    iommufd.map(ioas, IOVA, &memory, 0, memory.len(), Access::ReadWrite).context("IOAS_MAP")?;
    let table = iommufd.alloc_hwpt(&rig.function, ioas, Purpose::default()).context("HWPT_ALLOC")?;
    rig.function.attach(table).context("attaching")?;
    let edu = rig.edu()?;

    let pmu = Pmu::named(unit)?;
    let own = requester(&rig.bdf)?;
    let [own, other] = [own, own ^ 0xff].map(|id| format!("filter_requester_id={id:#x}"));
    let of = |event, id| pmu.counter(event, &["filter_requester_id_en=1", id]);
    let counters = [
        ("iommu_requests", pmu.counter("iommu_requests", &[])?, 2 * PAGES * ROUNDS),
        ("iommu_requests of the edu", of("iommu_requests", &own)?, 2 * PAGES * ROUNDS),
        ("iommu_requests of another function", of("iommu_requests", &other)?, 0),
        ("iotlb_lookup", pmu.counter("iotlb_lookup", &[])?, 2 * PAGES * ROUNDS),
        ("iotlb_hit", pmu.counter("iotlb_hit", &[])?, 2 * PAGES * ROUNDS - PAGES),
        ("ctxt_cache_lookup", pmu.counter("ctxt_cache_lookup", &[])?, 1),
    ];
    let before = counters.iter().map(|(_, counter, _)| counter.count()).collect::<Result<Vec<_>>>()?;
    ensure!(before.iter().all(|count| *count == 0), "counted before anything was asked for: {before:?}");
    for page in (0..ROUNDS).flat_map(|_| 0..PAGES) {
        let at = |page: u64| IOVA + page % PAGES * PAGE as u64;
        copy(&edu, at(page), at(page + 1))?;
    }
    for (name, counter, wanted) in &counters {
        let count = counter.count()?;
        ensure!(count == *wanted, "{name}: {count} instead of {wanted}");
        println!("counted: {name}: {count}");
    }
    Ok(())
}
