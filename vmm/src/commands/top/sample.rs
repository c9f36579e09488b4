//! A moment of a machine, as it said it, and what happened between two of them.

use std::collections::BTreeMap;

use serde::Deserialize;

/// A moment. What a machine does not say is nothing.
#[derive(Deserialize, Clone, Default, Debug)]
#[serde(default)]
pub struct Sample {
    /// running or paused.
    pub state: String,
    /// Since the start, in milliseconds.
    pub wall_ms: u64,
    /// Of the guest.
    pub guest_resets: u64,
    /// All of them.
    pub devices: Vec<Device>,
    /// The remapping units.
    pub units: Vec<Unit>,
    /// The paged spaces.
    pub spaces: Vec<Space>,
    /// By id of the device: where it is.
    pub attached: BTreeMap<String, String>,
    /// The last one.
    pub audit: Audit,
}

/// A device.
#[derive(Deserialize, Clone, Default, Debug)]
#[serde(default)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: String,
    /// Address in the guest.
    pub addr: String,
    /// Who holds its mappings.
    pub backend: Option<String>,
    /// Operations of the host.
    pub host_maps: u64,
    /// Operations of the host.
    pub host_unmaps: u64,
    /// What the host holds.
    pub live_extents: u64,
    /// What the host holds.
    pub live_bytes: u64,
    /// By cause.
    pub refused_maps: BTreeMap<String, u64>,
    /// Extents that were cut while part of them was live.
    pub splits: u64,
    /// Of the host.
    pub unmaps_refused: u64,
    /// It was stopped.
    pub quarantined: u64,
}

/// A remapping unit.
#[derive(Deserialize, Clone, Default, Debug)]
#[serde(default)]
pub struct Unit {
    /// Its id.
    pub id: String,
    /// Of the invalidation queue, by type.
    pub descriptors: BTreeMap<String, u64>,
    /// By register.
    pub register_invalidations: u64,
    /// By reason.
    pub faults: BTreeMap<String, u64>,
    /// That found no record.
    pub faults_dropped: u64,
    /// Notifications.
    pub map_ops: u64,
    /// Notifications.
    pub unmap_ops: u64,
}

/// A space.
#[derive(Deserialize, Clone, Default, Debug)]
#[serde(default)]
pub struct Space {
    /// Its name.
    pub space: String,
    /// Who is in it.
    pub members: Vec<String>,
    /// `None`: it is blocked.
    pub mappings: Option<u64>,
}

/// An audit.
#[derive(Deserialize, Clone, Default, Debug)]
#[serde(default)]
pub struct Audit {
    /// Comparisons.
    pub checked: u64,
    /// What differs.
    pub differences: Vec<String>,
}

impl Device {
    /// Operations of the host.
    pub fn operations(&self) -> u64 {
        self.host_maps.saturating_add(self.host_unmaps)
    }

    /// What the host refused.
    pub fn refused(&self) -> u64 {
        self.refused_maps.values().fold(self.unmaps_refused, |sum, more| sum.saturating_add(*more))
    }
}

impl Unit {
    /// Invalidations of what is cached: what is no wait.
    pub fn invalidations(&self) -> u64 {
        let of_queue = self.descriptors.iter().filter(|(kind, _)| *kind != "wait").map(|(_, count)| count);
        of_queue.fold(self.register_invalidations, |sum, more| sum.saturating_add(*more))
    }

    /// Faults that were recorded.
    pub fn faults(&self) -> u64 {
        self.faults.values().fold(0, |sum, more| u64::saturating_add(sum, *more))
    }
}

impl Sample {
    /// Operations of the host by all devices. Functions that share a space count the same ones.
    pub fn operations(&self) -> u64 {
        self.devices.iter().map(Device::operations).fold(0, u64::saturating_add)
    }

    /// Invalidations by all units.
    pub fn invalidations(&self) -> u64 {
        self.units.iter().map(Unit::invalidations).fold(0, u64::saturating_add)
    }

    /// Faults of all units.
    pub fn faults(&self) -> u64 {
        self.units.iter().map(Unit::faults).fold(0, u64::saturating_add)
    }

    /// What was refused to all devices.
    pub fn refused(&self) -> u64 {
        self.devices.iter().map(Device::refused).fold(0, u64::saturating_add)
    }

    /// The device with this id.
    pub fn device(&self, id: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.id == id)
    }
}

/// How much more a second, between a count and a later one, `ms` milliseconds apart.
pub fn rate(before: u64, now: u64, ms: u64) -> u64 {
    let more = u128::from(now.saturating_sub(before)) * 1000;
    more.checked_div(ms.into()).and_then(|rate| rate.try_into().ok()).unwrap_or(0)
}
