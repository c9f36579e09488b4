use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vtd::{
    Applied, AttachRefused, Iova, MapOp, Mapping, Msi, MsiSink, Requester, SourceId, SpaceKey, SpaceListener, Stream,
    Unit, UnitConfig, UnitId,
};

use super::{BehindUnit, DirectMemory, DmaFailed, DmaTarget, pieces};
use crate::ats::{AtsFailed, DeviceTlb};
use crate::pci::{BarTarget, Decoder};
use crate::{Bus, BusDevice};

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
    let behind = BehindUnit { endpoint, decoder: Arc::new(Decoder::new(Arc::default())) };
    let targets: [Box<dyn DmaTarget>; 2] = [Box::new(behind), Box::new(DirectMemory(memory.clone()))];
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

/// Registers that remember what was asked of them, and read as their offsets.
#[derive(Default)]
struct Registers(Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.lock().unwrap().push((offset, Vec::new()));
        data.iter_mut().enumerate().for_each(|(i, byte)| *byte = (offset as usize + i) as u8);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.0.lock().unwrap().push((offset, data.to_vec()));
    }
}

#[test]
fn b10_emulated_dma_reaches_the_bars_of_other_functions_and_not_its_own() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let unit = Unit::new(UnitConfig::new(UnitId(0), 48), memory.clone(), Arc::new(Nobody), Arc::new(Nobody)).unwrap();
    let own = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };
    let bus = Arc::new(Bus::default());
    let decoder = Arc::new(Decoder::new(bus.clone()));
    let target = BehindUnit { endpoint: unit.endpoint(own), decoder: decoder.clone() };
    let (peer, mine, no_bar) = (Arc::<Registers>::default(), Arc::<Registers>::default(), Arc::<Registers>::default());
    let other = Requester { sid: SourceId::new(0, 4, 0), ..own };
    let (of_peer, of_mine) = (BarTarget::of_device(peer.clone()), BarTarget::of_device(mine.clone()));
    // Where RAM ends, two pages of another function; then its own.
    assert!(decoder.set(other, 0, Some((0x1_0000, 0x1_1fff)), &of_peer));
    assert!(decoder.set(own, 0, Some((0x1_2000, 0x1_2fff)), &of_mine));
    bus.insert(0x1_3000, 0x1_3fff, no_bar.clone()).unwrap();
    let asked = |registers: &Registers| std::mem::take(&mut *registers.0.lock().unwrap());

    memory.write_slice(&[0xaa; 4], GuestAddress(0xfffc)).unwrap();
    let mut data = [0; 19];
    assert_eq!(target.read(Iova(0xfffc), &mut data), Ok(()));
    assert_eq!(data[..4], [0xaa; 4]);
    assert!(data[4..].iter().copied().eq(0..15));
    let offsets = |asked: Vec<(u64, Vec<u8>)>| asked.into_iter().map(|(offset, _)| offset).collect::<Vec<_>>();
    assert_eq!(offsets(asked(&peer)), [0, 8, 12, 14]);
    // Over the edge of a page.
    assert_eq!(target.write(Iova(0x1_0ffc), &[1, 2, 3, 4, 5, 6, 7, 8]), Ok(()));
    assert_eq!(asked(&peer), [(0xffc, vec![1, 2, 3, 4]), (0x1000, vec![5, 6, 7, 8])]);
    // Into its own; what came before arrived.
    assert_eq!(target.write(Iova(0x1_1ff8), &[9; 16]), Err(DmaFailed));
    assert_eq!((asked(&peer), asked(&mine)), (vec![(0x1ff8, vec![9; 8])], vec![]));
    // What is no BAR: no register of the machine, nothing, and where addresses end.
    for iova in [0x1_3000, 0x1_4000, u64::MAX - 3] {
        assert_eq!(target.write(Iova(iova), &[9; 8]), Err(DmaFailed));
        assert_eq!(target.read(Iova(iova), &mut data), Err(DmaFailed));
    }
    assert_eq!(asked(&no_bar), []);
    // It is gone with the BAR.
    decoder.set(other, 0, None, &of_peer);
    assert_eq!(target.write(Iova(0x1_0000), &[9; 8]), Err(DmaFailed));
    assert_eq!(asked(&peer), []);
    // From BARs that are in front of memory into that: nobody is, so from one into nothing.
    assert!(decoder.set(other, 0, Some((0x1_0000, 0x1_0fff)), &of_peer));
    assert_eq!(target.write(Iova(0x1_0ffe), &[7; 4]), Err(DmaFailed));
    assert_eq!(asked(&peer), [(0xffe, vec![7; 2])]);
}

#[test]
fn b10_pieces_are_aligned_and_of_a_registers_size() {
    let cut = |address, len| pieces(address, len).map(|piece| piece.len()).collect::<Vec<_>>();
    assert_eq!(cut(0x1000, 32), [8; 4]);
    assert_eq!(cut(0x1001, 15), [1, 2, 4, 8]);
    assert_eq!(cut(0x1004, 7), [4, 2, 1]);
    assert!(cut(0x1000, 0).is_empty());
    for (address, len) in [(0x1007, 4089), (3, 1), (0xfff, 1)] {
        assert_eq!(cut(address, len).iter().sum::<usize>(), len);
    }
}

#[test]
fn a12_an_address_of_a_device_tlb_may_be_a_bar() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    let config = UnitConfig { device_tlb: true, ..UnitConfig::new(UnitId(0), 39) };
    let unit = Unit::new(config, memory.clone(), Arc::new(Nobody), Arc::new(Nobody)).unwrap();
    let own = Requester { segment: 0, sid: SourceId::new(0, 3, 0) };
    // Root, context (TT is 01, 39 bits), three levels; page 0 leads to memory, page 1 to another function's BAR, page 2
    // to its own, page 3 to nothing.
    let context = 0x2000 + 16 * u64::from(own.sid.0);
    let leads_to = [0x8000, 0x2_0000, 0x3_0000, 0x4_0000];
    let tables = [(0x1000, 0x2001), (context, 0x3005), (context + 8, 1), (0x3000, 0x4003), (0x4000, 0x5003)];
    let leaves = leads_to.iter().zip((0x5000..).step_by(8)).map(|(to, at)| (at, to | 3));
    for (at, word) in tables.into_iter().chain(leaves) {
        memory.write_obj::<u64>(word, GuestAddress(at)).unwrap();
    }
    unit.write(0x20, &0x1000_u64.to_le_bytes());
    unit.write(0x18, &(1_u32 << 30 | 1 << 31).to_le_bytes());
    let decoder = Arc::new(Decoder::new(Arc::new(Bus::default())));
    let (peer, mine) = (Arc::<Registers>::default(), Arc::<Registers>::default());
    let (of_peer, of_mine) = (BarTarget::of_device(peer.clone()), BarTarget::of_device(mine.clone()));
    assert!(decoder.set(Requester { sid: SourceId::new(0, 4, 0), ..own }, 0, Some((0x2_0000, 0x2_0fff)), &of_peer));
    assert!(decoder.set(own, 0, Some((0x3_0000, 0x3_0fff)), &of_mine));
    let target = BehindUnit { endpoint: unit.endpoint(own), decoder };
    let (ats, tlb) = (target.ats().unwrap(), DeviceTlb::default());
    let asked = |registers: &Registers| std::mem::take(&mut *registers.0.lock().unwrap());

    for cached in [false, true] {
        assert_eq!(tlb.is_empty(), !cached);
        assert_eq!(ats.write_by(&tlb, Iova(0x10), &[7; 8]), Ok(()));
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x8010)).unwrap(), 0x0707_0707_0707_0707);
        memory.write_obj::<u64>(0, GuestAddress(0x8010)).unwrap();
        assert_eq!(ats.write_by(&tlb, Iova(0x1014), &[9; 12]), Ok(()));
        assert_eq!(asked(&peer), [(0x14, vec![9; 4]), (0x18, vec![9; 8])]);
        let mut data = [0; 4];
        assert_eq!((ats.read_by(&tlb, Iova(0x1020), &mut data), data), (Ok(()), [0x20, 0x21, 0x22, 0x23]));
        assert_eq!(asked(&peer), [(0x20, vec![])]);
        for iova in [0x2000, 0x3000] {
            assert_eq!(ats.write_by(&tlb, Iova(iova), &[9; 8]), Err(AtsFailed::Failed));
        }
        assert_eq!(asked(&mine), []);
        assert_eq!(ats.write_by(&tlb, Iova(0x4000), &[9; 8]), Err(AtsFailed::Missing));
        assert_eq!(tlb.len(), 4);
    }
    // The interrupt address range is for untranslated requests.
    assert_eq!(ats.write_by(&tlb, Iova(0xfee0_0000), &[0; 4]), Err(AtsFailed::Failed));
}
