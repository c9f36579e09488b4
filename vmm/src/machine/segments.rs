//! The PCI segments of a machine: segment 0, with root ports, bridges and I/O ports, and those that functions
//! are in besides, each with one bus and configuration space of its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use devices::Bus;
use devices::bus::Overlap;
use devices::pci::{Ecam, PciFunction, PciRoot};
use vtd::Requester;

use super::Error;
use super::bars::{self, NoPlace};
use crate::boot::layout::{self, BarWindows, Window};

/// All of them.
pub(super) struct Segments {
    first: Arc<PciRoot>,
    /// By number.
    further: Vec<Arc<PciRoot>>,
}

impl Segments {
    /// The segments of these numbers, with `first` as segment 0, and configuration space of the others on `mmio`.
    pub fn new(first: Arc<PciRoot>, numbers: &BTreeSet<u16>, mmio: &Bus) -> Result<Self, Overlap> {
        let further = numbers.iter().filter(|number| **number != 0).map(|number| {
            let (root, at) = (first.beside(*number), layout::ecam_of(*number));
            mmio.insert(at, at + (layout::ecam_size(0) - 1), Arc::new(Ecam::new(root.clone())))?;
            Ok(root)
        });
        let further = further.collect::<Result<_, _>>()?;
        Ok(Self { first, further })
    }

    /// Segment 0.
    pub fn first(&self) -> &Arc<PciRoot> {
        &self.first
    }

    /// Those in which such a function is.
    pub fn of(&self, segment: u16) -> Result<&Arc<PciRoot>, Error> {
        self.all().find(|root| root.segment() == segment).ok_or(Error::NoSegment(segment))
    }

    /// All of them, by number.
    pub fn all(&self) -> impl Iterator<Item = &Arc<PciRoot>> {
        std::iter::once(&self.first).chain(&self.further)
    }

    /// The functions of all root buses, by name.
    pub fn functions(&self) -> Vec<(Requester, Arc<dyn PciFunction>)> {
        let of_root = |root: &Arc<PciRoot>| {
            let functions = root.functions().into_iter();
            functions.map(|(sid, function)| (root.requester(sid), function)).collect::<Vec<_>>()
        };
        self.all().flat_map(of_root).collect()
    }

    /// Makes every function quiet.
    pub fn quiesce(&self) {
        self.all().for_each(|root| root.quiesce());
    }

    /// Makes every function quiet, then resets them (rule 12: before any remapping unit).
    pub fn reset(&self) {
        self.quiesce();
        self.all().for_each(|root| root.reset());
    }

    /// The windows that have room for the BARs of each, in the order of [`Segments::all`].
    pub fn fitting(&self, ram: u64, width: u8) -> Result<Vec<BarWindows>, NoPlace> {
        let bars: Vec<_> = self.all().map(|root| (root.segment(), bars::all(root))).collect();
        bars::windows(&bars, ram, width)
    }

    /// The same windows with those above 4 GiB as `high` has them, of a machine that was saved.
    ///
    /// # Errors
    /// A segment has no entry there.
    pub fn as_saved(&self, fitting: Vec<BarWindows>, high: &[Option<[u64; 2]>]) -> Result<Vec<BarWindows>, Error> {
        if fitting.len() != high.len() {
            return Err(Error::OtherSegments { saved: high.len(), here: fitting.len() });
        }
        let window = |[first, last]: [u64; 2]| Window { first, last };
        Ok(fitting.into_iter().zip(high).map(|(it, high)| BarWindows { high: high.map(window), ..it }).collect())
    }

    /// Gives every BAR an address, as firmware does. No vCPU may run.
    pub fn assign(&self, windows: &[BarWindows]) {
        self.all().zip(windows).for_each(|(root, windows)| bars::assign(root, windows));
    }
}

#[cfg(test)]
#[path = "segments_test.rs"]
mod segments_test;
