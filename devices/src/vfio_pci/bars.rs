//! BARs of the assigned function: what of them can be mapped into the guest, and the gate in front of what is trapped.
//!
//! The gate is a lock around one bit, "memory is enabled" (F-3). An access tests the bit and reaches the device under
//! the shared side; whoever closes the gate takes the exclusive side for the moment of clearing the bit, which waits
//! for the accesses in flight. Under the exclusive side nothing else happens: no guest memory, no BAR, no vCPU is
//! touched.

use std::ops::Range;
use std::sync::{Arc, Mutex, RwLock};

use vfio_bridge::{Function, RegionInfo, RegionKind};

use super::VfioPciError;
use super::capabilities::Snapshot;
use super::msix::{Layout, Msix};
use crate::BusDevice;
use crate::host::{HostWindow, MemorySlots};
use crate::pci::config::BAR0;
use crate::pci::{BarKind, BarTarget, ConfigSpace};

const PAGE: u64 = 4096;

/// A memory BAR.
pub struct Bar {
    /// What kind.
    pub kind: BarKind,
    /// Bytes, a power of two.
    pub size: u64,
    /// What answers: the windows are what of it can be mapped.
    pub target: BarTarget,
}

/// The BARs of a function, by their numbers.
#[derive(Default)]
pub struct Bars {
    /// Those in memory.
    pub memory: [Option<Bar>; 6],
    /// The numbers of those in I/O space, which are not offered.
    pub io: Vec<u8>,
}

/// The BARs that `host` has, put into `space` for the guest.
pub fn find(
    host: &Arc<dyn Function>,
    snapshot: &Snapshot,
    layout: Option<&Layout>,
    trapped: &Arc<Trapped>,
    slots: &Arc<dyn MemorySlots>,
    space: &mut ConfigSpace,
) -> Result<Bars, VfioPciError> {
    let mut found = Bars::default();
    let mut upper_half = false;
    for bar in 0..6u8 {
        if std::mem::take(&mut upper_half) {
            continue;
        }
        let region = host.region(RegionKind::Bar(bar));
        let register = snapshot[usize::from(BAR0) + 4 * usize::from(bar)];
        if region.size == 0 {
            continue;
        }
        let Some(kind) = BarKind::of(register.into()) else {
            // Reserved types have bit 0 clear.
            found.io.extend(Some(bar).filter(|_| register & 1 != 0));
            continue;
        };
        upper_half = kind.is_64();
        let fits = if kind.is_64() { bar < 5 } else { region.size <= 1 << 31 };
        if !region.size.is_power_of_two() || region.size < 16 || !fits {
            return Err(VfioPciError::BarSize { bar, size: region.size });
        }
        space.add_bar(bar.into(), kind, region.size);
        let holes: Vec<_> = layout.map(|layout| layout.trapped(bar).cloned().collect()).unwrap_or_default();
        let file = host.file(RegionKind::Bar(bar));
        let window = |(offset, len): (u64, u64)| {
            let file_offset = region.file_offset.checked_add(offset)?;
            let (fd, writable) = (file.clone()?, region.writable);
            let dma_buf = host.dma_buf(RegionKind::Bar(bar), offset, len);
            Some((offset, HostWindow { fd, offset: file_offset, len, writable, dma_buf }))
        };
        let windows = windows(&region, &holes).into_iter().filter_map(window).collect();
        let device: Arc<dyn BusDevice> = Arc::new(TrappedBar { shared: trapped.clone(), bar });
        let target = BarTarget { device, windows, slots: Some(slots.clone()) };
        found.memory[usize::from(bar)] = Some(Bar { kind, size: region.size, target });
    }
    Ok(found)
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
    host: Arc<dyn Function>,
    /// Whether memory is enabled.
    gate: RwLock<bool>,
    msix: Option<(Layout, Mutex<Msix>)>,
}

impl Trapped {
    /// With the gate closed.
    pub fn new(host: Arc<dyn Function>, msix: Option<(Layout, Msix)>) -> Arc<Self> {
        let msix = msix.map(|(layout, msix)| (layout, Mutex::new(msix)));
        Arc::new(Self { host, gate: RwLock::new(false), msix })
    }

    /// MSI-X, if the function has it.
    pub fn msix(&self) -> Option<&Mutex<Msix>> {
        self.msix.as_ref().map(|(_, msix)| msix)
    }

    /// No access reaches the device after this returns, until [`Trapped::open`].
    pub fn close(&self) {
        *self.gate.write().unwrap() = false;
    }

    /// Accesses reach the device again.
    pub fn open(&self) {
        *self.gate.write().unwrap() = true;
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

/// One BAR on the bus: while memory is disabled it reads as ones, and writes to it are dropped (F-2).
pub struct TrappedBar {
    /// What it shares with the others.
    pub shared: Arc<Trapped>,
    /// Which BAR.
    pub bar: u8,
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

impl BusDevice for TrappedBar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Self { shared, bar } = self;
        let open = shared.gate.read().unwrap();
        if !*open {
            return;
        }
        if !shared.touches_msix(*bar, offset, data.len()) {
            shared.host.read(RegionKind::Bar(*bar), offset, data);
            return;
        }
        for piece in pieces(offset, data.len()) {
            let at = offset + piece.start as u64;
            let data = &mut data[piece];
            match shared.msix_part(*bar, at) {
                Some((msix, true, at)) => msix.lock().unwrap().read_table(at, data),
                Some((msix, false, in_pba)) => {
                    msix.lock().unwrap().read_pba((RegionKind::Bar(*bar), at), in_pba, data);
                }
                None => shared.host.read(RegionKind::Bar(*bar), at, data),
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Self { shared, bar } = self;
        let open = shared.gate.read().unwrap();
        if !*open {
            return;
        }
        let to_host = |at, data: &[u8]| {
            if let Err(e) = shared.host.write(RegionKind::Bar(*bar), at, data) {
                log::debug!("a write to BAR {bar} at {at:#x} was dropped: {e}");
            }
        };
        if !shared.touches_msix(*bar, offset, data.len()) {
            to_host(offset, data);
            return;
        }
        for piece in pieces(offset, data.len()) {
            let at = offset + piece.start as u64;
            let data = &data[piece];
            match shared.msix_part(*bar, at) {
                Some((msix, true, at)) => msix.lock().unwrap().write_table(at, data),
                // Pending bits are read-only.
                Some((_, false, _)) => {}
                None => to_host(at, data),
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
