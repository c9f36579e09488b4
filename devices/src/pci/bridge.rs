//! What bridges have in common: what gets through them, downwards and upwards, and how what is below them is found.
//!
//! A bridge tells each function below it what gets through ([`PciFunction::path_changed`]); one that is a bridge itself
//! goes on from there. So what a function far below is reached by, and reaches, follows from one write to any bridge
//! above it before the write is complete.

pub mod header;
pub mod power;

use std::sync::Arc;

use vtd::SourceId;

use super::PciFunction;

/// First and last address.
pub type Range = (u64, u64);

/// What gets through all the bridges above a bus.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Path {
    /// Memory that is forwarded downwards.
    pub memory: Vec<Range>,
    /// Ports that are forwarded downwards.
    pub ports: Vec<Range>,
    /// First and last bus number that leads there; `None`: no bus number does.
    pub buses: Option<(u8, u8)>,
    /// Requests of functions get upwards: those for memory, and so messages.
    pub masters: bool,
}

impl Path {
    /// To the root bus: all of it.
    pub fn of_root() -> Self {
        Self { memory: vec![(0, u64::MAX)], ports: vec![(0, u64::MAX)], buses: Some((0, u8::MAX)), masters: true }
    }

    /// What of `below`, a bridge's own, gets through this, too.
    pub fn through(&self, below: &Self) -> Self {
        // What leads to a bus is the number of that bus.
        let within = |(from, to): (u8, u8), (first, last): (u8, u8)| {
            (first..=last).contains(&from).then_some((from, to.min(last)))
        };
        Self {
            memory: both(&self.memory, &below.memory),
            ports: both(&self.ports, &below.ports),
            buses: below.buses.and_then(|inner| within(inner, self.buses?)),
            masters: self.masters && below.masters,
        }
    }
}

/// What lies in a range of either.
fn both(one: &[Range], other: &[Range]) -> Vec<Range> {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))));
    pairs.filter(|(first, last)| first <= last).collect()
}

/// A function that is a bridge.
pub trait Bridge: PciFunction {
    /// The number of the bus below it in the names of the functions there.
    fn bus(&self) -> u8;
    /// The secondary and the subordinate bus number.
    fn buses(&self) -> (u8, u8);
    /// Whether configuration requests for `bus` go this way.
    fn leads_to(&self, bus: u8) -> bool {
        let (secondary, subordinate) = self.buses();
        secondary != 0 && (secondary..=subordinate).contains(&bus)
    }
    /// Does something with the function below, however far, that a configuration request for `sid` reaches.
    fn with_below(&self, sid: SourceId, act: &mut dyn FnMut(&dyn PciFunction));
    /// The functions on the bus below with their names, in whatever state it is.
    fn below(&self) -> Vec<(SourceId, Arc<dyn PciFunction>)>;
}
