//! `--stats FILE`: what the whole run did, as JSON. The form is fixed; fields are only ever added.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

/// The file.
#[derive(Serialize, Default, Debug)]
pub struct Stats {
    /// Of this form: 1.
    pub version: u64,
    /// How the run ended; `null` while it runs.
    pub exit: Option<Exit>,
    /// Milliseconds since the start.
    pub wall_ms: u64,
    /// Resets that the guest went through.
    pub guest_resets: u64,
    /// In the order of the command line.
    pub devices: Vec<Device>,
    /// The root ports, by number.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
    /// The remapping units.
    pub units: Vec<Unit>,
    /// The last comparison of shadow, ledger and guest tables.
    pub audit: Audit,
}

/// How the run ended.
#[derive(Serialize, Clone, Debug)]
pub struct Exit {
    /// poweroff, reset, crash, error, quit, timeout or signal.
    pub reason: &'static str,
    /// The exit code; 128 and the signal's number for `signal`.
    pub code: u64,
}

/// A device.
#[derive(Serialize, Default, Debug)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// vfio, vfio-user, virtio-blk, virtio-net, virtio-rng, virtio-console, edu or pinblk.
    pub kind: &'static str,
    /// Its address in the host, for vfio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Its address in the guest; `none` behind a root port that the guest gave no bus number.
    pub addr: String,
    /// Its root port, if it is behind one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u8>,
    /// Its IOMMU group in the host, for vfio.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<u64>,
    /// What the bridge did, for all that are behind it: vfio, vfio-user, pinblk, virtio-blk and virtio-net.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<Bridge>,
    /// What it asked for by message, for vfio-user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dma_messages: Option<vfio_bridge::DmaMessages>,
    /// What it pinned, for pinblk, virtio-blk and virtio-net.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pins: Option<vfio_bridge::PinStats>,
}

/// A root port.
#[derive(Serialize, Default, Debug)]
pub struct Port {
    /// Its number.
    pub port: u8,
    /// Its own address in the guest.
    pub addr: String,
    /// The id of the device in its slot.
    pub device: Option<String>,
    /// The guest lets what is in the slot have power.
    pub powered: bool,
    /// The guest was asked to let go of the device.
    pub removing: bool,
}

/// What the bridge did for a device.
#[derive(Serialize, Default, Debug)]
pub struct Bridge {
    /// type1, iommufd, vfio-user or software.
    pub backend: &'static str,
    /// Its counts.
    #[serde(flatten)]
    pub counts: vfio_bridge::DeviceStats,
}

/// A remapping unit.
#[derive(Serialize, Default, Debug)]
pub struct Unit {
    /// vtd0.
    pub id: String,
    /// Its counts.
    #[serde(flatten)]
    pub counts: vtd::UnitStats,
}

/// A comparison of the books.
#[derive(Serialize, Clone, Default, Debug)]
pub struct Audit {
    /// Mappings compared.
    pub checked: u64,
    /// Mappings whose invalidation has not come yet.
    pub pending: u64,
    /// What differs.
    pub differences: Vec<String>,
}

/// The file that becomes `file` when all is written.
fn temporary(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Whether [`Stats::write`] can write `file`, as far as can be told now: leaves nothing behind.
pub fn check(file: &Path) -> io::Result<()> {
    if file.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let temporary = temporary(file);
    fs::File::create(&temporary)?;
    fs::remove_file(temporary)
}

impl Stats {
    /// Writes `file`, by way of a temporary file beside it: a reader sees the old one or the new one.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        let mut text = serde_json::to_string(self)?;
        text.push('\n');
        let temporary = temporary(file);
        let mut out = fs::File::create(&temporary)?;
        out.write_all(text.as_bytes()).and_then(|()| fs::rename(&temporary, file)).inspect_err(|_| {
            // Part of it is of no use to anybody.
            let _ = fs::remove_file(&temporary);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_the_documented_one() {
        let stats = Stats {
            version: 1,
            exit: Some(Exit { reason: "poweroff", code: 0 }),
            devices: vec![Device {
                id: "vfio0".into(),
                kind: "vfio",
                host: Some("0000:00:09.0".into()),
                addr: "00:05.0".into(),
                port: None,
                group: Some(3),
                bridge: Some(Bridge { backend: "type1", ..Default::default() }),
                dma_messages: None,
                pins: Some(vfio_bridge::PinStats { late: 1, ..Default::default() }),
            }],
            units: vec![Unit {
                id: "vtd0".into(),
                counts: vtd::UnitStats { faults: [("0x05".to_owned(), 1)].into(), ..Default::default() },
            }],
            ..Default::default()
        };
        let expected = serde_json::json!({"version":1,"exit":{"reason":"poweroff","code":0},"wall_ms":0,"guest_resets":0,
            "devices":[{"id":"vfio0","kind":"vfio","host":"0000:00:09.0","addr":"00:05.0","group":3,"backend":"type1",
              "host_maps":0,"host_unmaps":0,"mapped_bytes_total":0,"unmapped_bytes_total":0,"live_extents":0,"live_bytes":0,
              "peak_extents":0,"refused_maps":{"limit":0,"memlock":0,"range":0,"target":0,"other":0},"host_time_ns":0,
              "splits":0,"splits_open_ns":0,"unmaps_refused":0,"quarantined":0,
              "pins":{"pinned_pages":0,"pins":0,"refused":0,"notices":0,"left_pinned":0,"late":1}}],
            "units":[{"id":"vtd0","descriptors":{"context_cache":0,"iotlb":0,"device_tlb":0,"interrupt_entry":0,"pasid_cache":0,
              "pasid_iotlb":0,"page_response":0,"wait":0},
              "register_invalidations":0,"register_reads":0,"tail_writes":0,"tails_taken":0,"queue_errors":0,"faults":{"0x05":1},"faults_dropped":0,"interrupts_posted":0,
              "notifications":0,"leaves_walked":0,"map_ops":0,"unmap_ops":0,"maps_refused":0,"bounds_exhausted":0}],
            "audit":{"checked":0,"pending":0,"differences":[]}});
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let file = dir.as_path().join("stats.json");
        fs::write(&file, "old").unwrap();
        stats.write(&file).unwrap();
        let written: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(written, expected);
        assert_eq!(fs::read_dir(dir.as_path()).unwrap().count(), 1);
    }
}
