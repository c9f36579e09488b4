//! What `causeway ctl PATH top` draws: the statistics, and who is in which space. No space is read for it, only
//! counted.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Machine;
use super::stats::Stats;
use crate::config::shown;

/// A moment of the machine.
#[derive(Serialize, Debug)]
pub struct Top {
    /// As `status` has them.
    #[serde(flatten)]
    pub stats: Stats,
    /// running or paused.
    pub state: &'static str,
    /// The paged spaces of the guest that have functions.
    pub spaces: Vec<Space>,
    /// By id of the device: the space that it is attached to.
    pub attached: BTreeMap<String, String>,
}

/// A space.
#[derive(Serialize, Debug)]
pub struct Space {
    /// Its name.
    pub space: String,
    /// The ids of the devices in it.
    pub members: Vec<String>,
    /// Mappings that were granted in it; `null` where a bound has blocked it.
    pub mappings: Option<usize>,
}

impl Machine {
    /// This moment.
    pub fn top(&self, stats: Stats) -> Top {
        let name = |requester| self.id_of(requester).unwrap_or_else(|| shown(requester));
        let units = || self.units.iter().flat_map(|units| units.all());
        let spaces = units().flat_map(|unit| unit.space_sizes()).map(|size| Space {
            space: size.key.to_string(),
            members: size.members.into_iter().map(name).collect(),
            mappings: size.mappings,
        });
        let attached = units().flat_map(|unit| unit.attachments());
        let attached = attached.map(|(requester, space)| (name(requester), space.to_string()));
        let state = if self.is_paused() { "paused" } else { "running" };
        Top { stats, state, spaces: spaces.collect(), attached: attached.collect() }
    }
}
