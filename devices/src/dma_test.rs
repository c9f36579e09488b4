use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::{
    Applied, AttachRefused, Iova, MapOp, Mapping, Msi, MsiSink, Requester, SourceId, SpaceKey, SpaceListener, Stream,
    Unit, UnitConfig, UnitId,
};

use super::{DirectMemory, DmaFailed, DmaTarget};

/// No function is assigned, so nobody has to be told anything.
struct Nobody;

impl SpaceListener for Nobody {
    fn attach(&self, _: Stream, _: &SpaceKey, _: &mut dyn Iterator<Item = Mapping>) -> Result<(), AttachRefused> {
        Ok(())
    }
    fn detach(&self, _: Stream) {}
    fn apply(&self, _: &SpaceKey, _: &[MapOp]) -> Applied {
        Applied::default()
    }
}

impl MsiSink for Nobody {
    fn signal(&self, _: Msi) {}
}

#[test]
fn dma_moves_all_of_it_or_says_that_it_did_not() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let unit = Unit::new(UnitConfig::new(UnitId(0), 48), memory.clone(), Arc::new(Nobody), Arc::new(Nobody)).unwrap();
    let endpoint = unit.endpoint(Requester { segment: 0, sid: SourceId::new(0, 3, 0) });
    let targets: [Box<dyn DmaTarget>; 2] = [Box::new(endpoint), Box::new(DirectMemory(memory.clone()))];
    for target in targets {
        memory.write_slice(&[1, 2, 3, 4], GuestAddress(0x2ffe)).unwrap();
        let mut data = [0; 4];
        assert_eq!(target.read(Iova(0x2ffe), &mut data), Ok(()));
        assert_eq!(data, [1, 2, 3, 4]);
        assert_eq!(target.write(Iova(0x4ffe), &data), Ok(()));
        let mut there = [0; 4];
        memory.read_slice(&mut there, GuestAddress(0x4ffe)).unwrap();
        assert_eq!(there, data);
        assert_eq!(target.read(Iova(0xfffe), &mut data), Err(DmaFailed));
        assert_eq!(target.write(Iova(0xfffe), &data), Err(DmaFailed));
        assert_eq!(target.write(Iova(1 << 40), &data), Err(DmaFailed));
    }
}
