//! One device, two PASIDs, two spaces beside its own (C-4).

use anyhow::{Result, ensure};
use guest_programs::memory::PAGE;
use vtd::{MapOp, Mapping, Pasid, Perm, SpaceKey, SpaceListener, Stream};

use crate::mock::{FIRST_IOVA, Kind};
use crate::rig::{Rig, mapping, range, requester, space};

const ONE: u32 = 5;
const OTHER: u32 = 0x9_0009;
/// The kernel's mock fails each second attach of it (`IOMMU_TEST_PASID_RESERVED`).
const FAILING: u32 = 1024;

fn stream(pasid: u32) -> Stream {
    Stream { requester: requester(0), pasid: Some(Pasid(pasid)) }
}

/// The page at the first IOVA, by the number of the space.
fn page_of(domain: u16) -> u64 {
    u64::from(domain) * 16
}

fn live(domain: u16) -> Vec<Mapping> {
    vec![mapping(FIRST_IOVA, page_of(domain), 2, Perm::ReadWrite)]
}

fn attach(rig: &Rig, pasid: u32, domain: u16) -> Result<()> {
    rig.bridge.attach(stream(pasid), &space(domain), &mut live(domain).into_iter())?;
    Ok(())
}

/// Requests with `pasid` reach what the space `domain` has; of none, nothing.
fn reaches(rig: &Rig, pasid: Option<u32>, domain: Option<u16>) -> Result<()> {
    for candidate in 1..=4 {
        let address = rig.memory.address(page_of(candidate) as usize * PAGE);
        let there = rig.mocks[0].reaches(pasid, FIRST_IOVA, 2 * PAGE as u64, address);
        ensure!(there == (domain == Some(candidate)), "PASID {pasid:x?}: space {candidate} is reached: {there}");
    }
    if let Some(pasid) = pasid {
        ensure!(rig.mocks[0].is_where_it_says(pasid), "the kernel has PASID {pasid:#x} elsewhere");
    }
    Ok(())
}

/// All of it.
pub fn run() -> Result<()> {
    let rig = Rig::new(&[Kind { pasids: true, ..Kind::default() }])?;
    rig.attach(0, &space(1), &live(1))?;
    attach(&rig, ONE, 2)?;
    attach(&rig, OTHER, 3)?;
    let all = |none, one, other| -> Result<()> {
        reaches(&rig, None, none)?;
        reaches(&rig, Some(ONE), one)?;
        reaches(&rig, Some(OTHER), other)
    };
    all(Some(1), Some(2), Some(3))?;
    ensure!(rig.bridge.space_of(stream(ONE)) == Some(space(2)), "it is attached elsewhere");

    // What goes from a space goes for those in it.
    rig.apply(&space(2), &[MapOp::Unmap(range(FIRST_IOVA, 2))])?;
    all(Some(1), None, Some(3))?;
    rig.apply(&space(2), &[MapOp::Map(live(2)[0])])?;
    all(Some(1), Some(2), Some(3))?;

    // Each moves by itself: one to where the other is, the device without PASID to where one was.
    attach(&rig, ONE, 3)?;
    all(Some(1), Some(3), Some(3))?;
    rig.attach(0, &space(2), &live(2))?;
    all(Some(2), Some(3), Some(3))?;
    rig.bridge.detach(stream(OTHER));
    all(Some(2), Some(3), None)?;
    rig.attach(0, &SpaceKey::Blocked, &[])?;
    all(None, Some(3), None)?;
    println!("parts: two PASIDs and the requests without one, each in its own space");

    // An attach that the kernel fails: it is nowhere, or where it was, and the others are where they were.
    attach(&rig, FAILING, 4)?;
    reaches(&rig, Some(FAILING), Some(4))?;
    let failed = attach(&rig, FAILING, 2);
    let now = rig.bridge.space_of(stream(FAILING));
    ensure!(failed.is_err(), "the kernel does not fail it");
    let domain = (1..=4).find(|domain| now == Some(space(*domain)));
    ensure!(domain != Some(2), "an attach that failed is taken for one");
    reaches(&rig, Some(FAILING), domain)?;
    all(None, Some(3), None)?;
    attach(&rig, FAILING, 2)?;
    reaches(&rig, Some(FAILING), Some(2))?;
    println!("parts: an attach that fails is undone ({domain:?}), and done again");

    // More bits than there are.
    ensure!(attach(&rig, 1 << 20, 2).is_err(), "PASIDs of a mock have 20 bits");
    for pasid in [ONE, FAILING] {
        rig.bridge.detach(stream(pasid));
        reaches(&rig, Some(pasid), None)?;
    }
    Ok(())
}
