//! BARs of the assigned function: what of them can be mapped into the guest, and what answers for the rest.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use vfio_bridge::{Function, RegionInfo, RegionKind};

use super::VfioPciError;
use super::capabilities::Snapshot;
use super::msix::{Layout, Msix};
use super::reach::{Access, BARS, Decoded, Gates, Space};
use crate::BusDevice;
use crate::host::{HostWindow, MemorySlots};
use crate::pci::config::BAR0;
use crate::pci::{BarKind, BarTarget, ConfigSpace, Decoder};

const PAGE: u64 = 4096;

/// A BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bar {
    /// Its number.
    pub index: u8,
    /// What kind.
    pub kind: BarKind,
    /// Bytes, a power of two.
    pub size: u64,
}

/// What BARs are wired to.
pub struct Wiring<'a> {
    /// Their function.
    pub host: &'a Arc<dyn Function>,
    /// What answers for what is not mapped.
    pub trapped: &'a Arc<Trapped>,
    /// Puts windows into the guest.
    pub slots: &'a Arc<dyn MemorySlots>,
    /// Put BARs on their bus.
    pub decoders: Decoders<'a>,
}

/// The decoders of memory and of ports.
pub struct Decoders<'a> {
    /// Memory.
    pub memory: &'a Arc<Decoder>,
    /// Ports.
    pub io: &'a Arc<Decoder>,
}

/// The BARs that the host's function has, put into `space` for the guest, and how each is decoded.
pub fn find(
    wiring: &Wiring<'_>,
    snapshot: &Snapshot,
    layout: Option<&Layout>,
    space: &mut ConfigSpace,
) -> Result<(Vec<Bar>, [Option<Decoded>; BARS]), VfioPciError> {
    let (mut found, mut decoded) = (Vec::new(), [const { None }; BARS]);
    let mut upper_half = false;
    for bar in 0..6u8 {
        if std::mem::take(&mut upper_half) {
            continue;
        }
        let region = wiring.host.region(RegionKind::Bar(bar));
        let register = snapshot[usize::from(BAR0) + 4 * usize::from(bar)];
        let Some(kind) = BarKind::of(register.into()).filter(|_| region.size != 0) else { continue };
        upper_half = kind.is_64();
        let (smallest, largest) = kind.sizes();
        let fits = (smallest..=largest).contains(&region.size) && (!kind.is_64() || bar < 5);
        if !region.size.is_power_of_two() || !fits {
            return Err(VfioPciError::BarSize { bar, size: region.size });
        }
        space.add_bar(bar.into(), kind, region.size);
        found.push(Bar { index: bar, kind, size: region.size });
        decoded[usize::from(bar)] = Some(decode(wiring, bar, kind, &region, layout));
    }
    Ok((found, decoded))
}

fn decode(wiring: &Wiring<'_>, bar: u8, kind: BarKind, region: &RegionInfo, layout: Option<&Layout>) -> Decoded {
    let trapped = wiring.trapped.clone();
    if kind == BarKind::Io {
        // Ports cannot be mapped.
        let target = BarTarget::of_device(Arc::new(TrappedBar { trapped, bar, space: Space::Io }));
        return Decoded::new(Space::Io, wiring.decoders.io.clone(), target);
    }
    let holes: Vec<_> = layout.map(|layout| layout.trapped(bar).cloned().collect()).unwrap_or_default();
    let file = wiring.host.file(RegionKind::Bar(bar));
    let window = |(offset, len): (u64, u64)| {
        let file_offset = region.file_offset.checked_add(offset)?;
        let (fd, writable) = (file.clone()?, region.writable);
        let dma_buf = wiring.host.dma_buf(RegionKind::Bar(bar), offset, len);
        let window = HostWindow { fd, offset: file_offset, len, writable, dma_buf };
        Some((offset, window))
    };
    let windows = windows(region, &holes).into_iter().filter_map(window).collect();
    let device: Arc<dyn BusDevice> = Arc::new(TrappedBar { trapped, bar, space: Space::Memory });
    let target = BarTarget { device, windows, slots: Some(wiring.slots.clone()), bells: None };
    Decoded::new(Space::Memory, wiring.decoders.memory.clone(), target)
}

/// The parts of a region that can be mapped into the guest (F-1): what the host lets be mapped, less the pages with
/// anything in `trapped`. Nothing of a region smaller than a page.
pub fn windows(region: &RegionInfo, trapped: &[Range<u64>]) -> Vec<(u64, u64)> {
    let mut parts: Vec<(u64, u64)> = region
        .mappable
        .iter()
        .map(|(offset, len)| {
            (offset.next_multiple_of(PAGE), offset.saturating_add(*len).min(region.size) & !(PAGE - 1))
        })
        .collect();
    for hole in trapped {
        let (first, end) = (hole.start & !(PAGE - 1), hole.end.next_multiple_of(PAGE));
        parts = parts.iter().flat_map(|&(start, stop)| [(start, stop.min(first)), (start.max(end), stop)]).collect();
    }
    parts.retain(|(start, stop)| start < stop);
    parts.iter().map(|(start, stop)| (*start, stop - start)).collect()
}

/// What trapped accesses need: shared by all BARs of the function.
pub struct Trapped {
    gates: Arc<Gates>,
    msix: Option<(Layout, Mutex<Msix>)>,
}

impl Trapped {
    /// Through `gates`.
    pub fn new(gates: Arc<Gates>, msix: Option<(Layout, Msix)>) -> Arc<Self> {
        let msix = msix.map(|(layout, msix)| (layout, Mutex::new(msix)));
        Arc::new(Self { gates, msix })
    }

    /// MSI-X, if the function has it.
    pub fn msix(&self) -> Option<&Mutex<Msix>> {
        self.msix.as_ref().map(|(_, msix)| msix)
    }

    /// The table or pending-bit part of `bar` that `offset` lies in: `true` for the table, and the offset into it.
    fn msix_part(&self, bar: u8, offset: u64) -> Option<(&Mutex<Msix>, bool, u64)> {
        let (layout, msix) = self.msix.as_ref()?;
        if layout.table.0 == bar && layout.table.1.contains(&offset) {
            return Some((msix, true, offset - layout.table.1.start));
        }
        if layout.pba.0 == bar && layout.pba.1.contains(&offset) {
            return Some((msix, false, offset - layout.pba.1.start));
        }
        None
    }

    fn touches_msix(&self, bar: u8, offset: u64, len: usize) -> bool {
        let end = offset.saturating_add(len as u64);
        let overlaps = |range: &Range<u64>| range.start < end && offset < range.end;
        self.msix.as_ref().is_some_and(|(layout, _)| layout.trapped(bar).any(overlaps))
    }
}

/// One BAR on a bus: while its space is disabled it reads as ones, and writes to it are dropped (F-2).
struct TrappedBar {
    trapped: Arc<Trapped>,
    bar: u8,
    space: Space,
}

/// Lengths of the pieces of an access that each lie in one aligned 32-bit word.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Range<usize>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at;
        at = (start + 4 - ((offset as usize + start) & 3)).min(len);
        (start < len).then_some(start..at)
    })
}

impl TrappedBar {
    /// Writes what is the device's.
    fn write_device(&self, access: &Access<'_>, at: u64, data: &[u8]) {
        if let Err(e) = access.write(RegionKind::Bar(self.bar), at, data) {
            log::debug!("a write to BAR {} at {at:#x} was dropped: {e}", self.bar);
        }
    }
}

impl BusDevice for TrappedBar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Self { trapped, bar, space } = self;
        let Some(access) = trapped.gates.enter(*space) else { return };
        if !trapped.touches_msix(*bar, offset, data.len()) {
            access.read(RegionKind::Bar(*bar), offset, data);
            return;
        }
        for piece in pieces(offset, data.len()) {
            let at = offset + piece.start as u64;
            let data = &mut data[piece];
            let device = |data: &mut [u8]| access.read(RegionKind::Bar(*bar), at, data);
            match trapped.msix_part(*bar, at) {
                Some((msix, true, at)) => msix.lock().unwrap().read_table(at, data),
                Some((msix, false, at)) => msix.lock().unwrap().read_pba(at, data, device),
                None => device(data),
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Self { trapped, bar, space } = self;
        let Some(access) = trapped.gates.enter(*space) else { return };
        if !trapped.touches_msix(*bar, offset, data.len()) {
            self.write_device(&access, offset, data);
            return;
        }
        for piece in pieces(offset, data.len()) {
            let at = offset + piece.start as u64;
            let data = &data[piece];
            match trapped.msix_part(*bar, at) {
                Some((msix, true, at)) => msix.lock().unwrap().write_table(at, data),
                // Pending bits are read-only.
                Some((_, false, _)) => {}
                None => self.write_device(&access, at, data),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)] // One trapped range is what is meant.
    fn f1_windows_leave_out_the_pages_of_msix_and_everything_below_a_page() {
        let region =
            |size, mappable: &[(u64, u64)]| RegionInfo { size, mappable: mappable.to_vec(), ..Default::default() };
        let whole = region(0x4000, &[(0, 0x4000)]);
        assert_eq!(windows(&whole, &[]), [(0, 0x4000)]);
        assert_eq!(windows(&whole, &[0x2000..0x2410]), [(0, 0x2000), (0x3000, 0x1000)]);
        assert_eq!(windows(&whole, &[0xff0..0x1010, 0x3000..0x3008]), [(0x2000, 0x1000)]);
        assert_eq!(windows(&whole, &[0x0..0x4000]), []);
        assert_eq!(
            windows(&region(0x8000, &[(0x1000, 0x1000), (0x4000, 0x4000)]), &[0x5000..0x5001]),
            [(0x1000, 0x1000), (0x4000, 0x1000), (0x6000, 0x2000)]
        );
        assert_eq!(windows(&region(0x80, &[(0, 0x80)]), &[]), []);
        assert_eq!(windows(&region(0x2000, &[(0, u64::MAX)]), &[]), [(0, 0x2000)]);
    }

    #[test]
    fn f2_pieces_never_cross_a_word() {
        assert_eq!(pieces(0x10, 8).collect::<Vec<_>>(), [0..4, 4..8]);
        assert_eq!(pieces(0x13, 4).collect::<Vec<_>>(), [0..1, 1..4]);
        assert_eq!(pieces(0x11, 1).next(), Some(0..1));
    }
}
