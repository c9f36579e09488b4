//! What can be told before a function is opened, and, of the host's limits, before anything is mapped.

use std::collections::BTreeSet;
use std::os::unix::fs::FileTypeExt;

use vfio_bridge::{CheckedFunction, GroupId, HostPaths, Limits, Memlock, check_memlock};

use super::Error;
use super::backend::{Candidate, Chosen, choose};
use crate::boot::layout;
use crate::config::{Backend, DeviceKind, DeviceOption, UserSocket, VtdOption};

/// Guest address widths that a unit can have, the narrowest first.
const WIDTHS: [u8; 3] = [39, 48, 57];
/// What a unit has when nobody asks: 57 bits mean five levels, which cost a guest more than they give.
const WIDEST_BY_DEFAULT: u8 = 48;

/// A function that can be assigned, as far as can be told without opening anything.
pub enum Checked {
    /// Of the host, and by which of its interfaces.
    Vfio(CheckedFunction, Backend),
    /// Of another process.
    User {
        /// Where that is.
        socket: UserSocket,
        /// It is given no file of the guest's memory.
        confine: bool,
    },
}

impl Checked {
    pub(super) fn group(&self) -> Option<GroupId> {
        match self {
            Self::Vfio(function, _) => Some(function.group()),
            Self::User { .. } => None,
        }
    }

    /// Whether it is assigned by `backend`.
    pub(super) fn is_by(&self, wanted: Backend) -> bool {
        matches!(self, Self::Vfio(_, backend) if *backend == wanted)
    }
}

/// Checks that open nothing: the functions among `devices`, in their order. `unit` is `None` under `--iommu none`.
pub fn check(devices: &[DeviceOption], unit: Option<&VtdOption>, ram: u64) -> Result<Vec<Checked>, Error> {
    let any_edu = |wanted: fn(bool, bool, bool) -> bool| {
        let is_wanted = |device: &DeviceOption| matches!(device.kind, DeviceKind::Edu { pasid, ats, pri } if wanted(pasid, ats, pri));
        devices.iter().any(is_wanted)
    };
    if any_edu(|pasid, _, _| pasid) && unit.is_none_or(|unit| unit.pasid_bits == 0) {
        return Err(Error::NoPasids);
    }
    if any_edu(|_, ats, _| ats) && unit.is_none_or(|unit| !unit.device_tlb) {
        return Err(Error::NoDeviceTlbs);
    }
    if any_edu(|_, _, pri| pri) && unit.is_none_or(|unit| !unit.page_requests) {
        return Err(Error::NoPageRequests);
    }
    let Some(first) = devices.iter().find(|device| device.kind.follows_unit()) else { return Ok(Vec::new()) };
    let kind = first.kind.name();
    match unit {
        None => return Err(Error::NoUnit { kind }),
        Some(unit) if !unit.dma_translation => return Err(Error::NoTranslation { kind }),
        Some(unit) if unit.has_first_stage() => return Err(Error::FirstStage { kind }),
        Some(unit) if unit.second_stage_dirty => return Err(Error::SecondStageDirty { kind }),
        Some(unit) => {
            let needs = devices.iter().find(|device| device.kind.needs_caching_mode());
            if let Some(needs) = needs.filter(|_| !unit.caching_mode) {
                return Err(Error::NoCachingMode { kind: needs.kind.name() });
            }
        }
    }
    let paths = HostPaths::default();
    let candidates = devices.iter().filter_map(|device| match device.kind {
        DeviceKind::Vfio { host: bdf, backend: asked } => {
            Some(Candidate { bdf, asked, type1: paths.check(bdf), iommufd: paths.check_for_iommufd(bdf) })
        }
        DeviceKind::VfioUser { .. }
        | DeviceKind::PciBridge
        | DeviceKind::Edu { .. }
        | DeviceKind::PinBlk { .. }
        | DeviceKind::Virtio(_) => None,
    });
    let mut chosen = choose(candidates.collect())?.into_iter();
    let checked = devices.iter().filter_map(|device| match &device.kind {
        DeviceKind::Vfio { .. } => chosen.next().map(|Chosen { function, backend, why }| {
            log::info!("{} is assigned by {backend}: {why}", function.bdf());
            Ok(Checked::Vfio(function, backend))
        }),
        DeviceKind::VfioUser { socket, confine } => {
            Some(check_socket(socket).map(|()| Checked::User { socket: socket.clone(), confine: *confine }))
        }
        DeviceKind::PciBridge | DeviceKind::Edu { .. } | DeviceKind::PinBlk { .. } | DeviceKind::Virtio(_) => None,
    });
    let checked = checked.collect::<Result<Vec<_>, _>>()?;
    let groups_by = |backend: Backend| -> BTreeSet<GroupId> {
        checked.iter().filter(|checked| checked.is_by(backend)).filter_map(Checked::group).collect()
    };
    let (type1, iommufd) = (groups_by(Backend::Type1), groups_by(Backend::Iommufd));
    if type1.is_empty() && iommufd.is_empty() {
        // Nothing is locked for other processes.
        return Ok(checked);
    }
    let memlock = Memlock::of_this_process();
    check_memlock(memlock, ram, type1.len() as u64)?;
    if !iommufd.is_empty() {
        // iommufd counts by user, beside what a process locks, and memory once in whatever number of spaces.
        check_memlock(Memlock { locked: 0, ..memlock }, ram, 1)?;
    }
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_memory(&text));
    match memory {
        Some(available) if ram > available => Err(Error::HostMemory { ram, available }),
        _ => Ok(checked),
    }
}

fn check_socket(socket: &UserSocket) -> Result<(), Error> {
    let metadata = std::fs::metadata(socket.path());
    let metadata = metadata.map_err(|source| Error::Socket { socket: socket.clone(), source })?;
    if metadata.file_type().is_socket() { Ok(()) } else { Err(Error::NoSocket(socket.clone())) }
}

/// Bytes that can be locked, from the text of /proc/meminfo: what is available, and what swapping makes so.
fn available_memory(meminfo: &str) -> Option<u64> {
    let field = |name: &str| {
        let value = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(field("MemAvailable:")?.saturating_add(field("SwapFree:").unwrap_or(0)))
}

/// The unit's guest address width: what was asked for if every group's host can map it, else the widest that all can.
pub fn unit_width(asked: Option<u8>, hosts: &[(GroupId, Limits)]) -> Result<u8, Error> {
    let narrowest = hosts.iter().map(|(group, limits)| (limits.address_width(), *group)).min();
    let Some((host, group)) = narrowest else { return Ok(asked.unwrap_or(WIDEST_BY_DEFAULT)) };
    match asked {
        _ if host < WIDTHS[0] => Err(Error::TooNarrow { host, group }),
        Some(asked) if asked > host => Err(Error::Width { asked, host, group }),
        Some(asked) => Ok(asked),
        None => Ok(widest(host.min(WIDEST_BY_DEFAULT))),
    }
}

/// Whether every group's host can map `ram` bytes of guest memory where they would be.
pub fn check_ram(hosts: &[(GroupId, Limits)], ram: u64) -> Result<(), Error> {
    for (group, limits) in hosts {
        for (first, len) in layout::ram_regions(ram) {
            if let Some(range) = limits.reserved_in(first, first + (len - 1)).first() {
                return Err(Error::Reserved { group: *group, first: range.first, last: range.last, ram });
            }
        }
    }
    Ok(())
}

/// The widest unit that a host of `bits` can follow.
pub(super) fn widest(bits: u8) -> u8 {
    WIDTHS.into_iter().rev().find(|width| *width <= bits).unwrap_or(WIDTHS[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use vtd::IovaRange;

    fn host(group: u32, bits: u32) -> (GroupId, Limits) {
        let last = u64::MAX >> (64 - bits);
        let limits = Limits {
            iova_ranges: vec![IovaRange { first: 0, last: 0xfedf_ffff }, IovaRange { first: 0xfef0_0000, last }],
            page_sizes: 0x4020_1000,
            entries: 65_535,
            memlock: None,
            unmap_all: true,
        };
        (GroupId(group), limits)
    }

    #[test]
    fn the_unit_is_as_wide_as_every_host_can_follow() {
        assert_eq!(unit_width(None, &[]).unwrap(), 48);
        assert_eq!(unit_width(Some(57), &[]).unwrap(), 57);
        assert_eq!(unit_width(None, &[host(1, 48)]).unwrap(), 48);
        assert_eq!(unit_width(None, &[host(1, 57)]).unwrap(), 48);
        assert_eq!(unit_width(None, &[host(1, 48), host(2, 46)]).unwrap(), 39);
        assert_eq!(unit_width(Some(39), &[host(1, 48)]).unwrap(), 39);
    }

    #[test]
    fn a_unit_wider_than_the_host_is_refused_with_the_width_that_works() {
        let message = unit_width(Some(57), &[host(4, 48)]).unwrap_err().to_string();
        assert!(message.contains("aw-bits=57") && message.contains("48 bits; use aw-bits=48"), "{message}");
        assert!(matches!(unit_width(None, &[host(4, 38)]), Err(Error::TooNarrow { host: 38, .. })));
    }

    #[test]
    fn a_vfio_device_needs_a_unit_with_caching_mode() {
        for text in ["vfio,host=00:09.0", "vfio-user,socket=/nowhere", "pinblk"] {
            let devices = ["edu".parse().unwrap(), text.parse().unwrap()];
            assert!(matches!(check(&devices, None, 1 << 20), Err(Error::NoUnit { .. })));
            let off = VtdOption { caching_mode: false, ..Default::default() };
            assert!(matches!(check(&devices, Some(&off), 1 << 20), Err(Error::NoCachingMode { .. })));
            assert!(check(&devices[..1], None, 1 << 20).unwrap().is_empty());
        }
    }

    #[test]
    fn a_device_that_the_guest_is_to_confine_needs_a_unit_that_translates() {
        let off = VtdOption { dma_translation: false, ..Default::default() };
        for text in ["vfio,host=00:09.0", "vfio-user,socket=/nowhere", "pinblk", "virtio-blk,file=/nowhere"] {
            let devices = ["edu".parse().unwrap(), text.parse().unwrap()];
            let error = check(&devices, Some(&off), 1 << 20).map(drop).unwrap_err();
            assert!(matches!(error, Error::NoTranslation { .. }), "{text}: {error}");
            assert!(error.to_string().contains("use dma-translation=on"), "{error}");
            assert!(check(&devices[..1], Some(&off), 1 << 20).unwrap().is_empty());
        }
    }

    #[test]
    fn a_virtio_device_needs_no_caching_mode_and_takes_it_from_nobody() {
        let off = VtdOption { caching_mode: false, ..Default::default() };
        for virtio in ["virtio-blk,file=/nowhere", "virtio-net,tap=none"] {
            let alone = [virtio.parse().unwrap()];
            assert!(check(&alone, Some(&off), 1 << 20).unwrap().is_empty());
            assert!(matches!(check(&alone, None, 1 << 20), Err(Error::NoUnit { .. })));
            let beside = [virtio.parse().unwrap(), "vfio,host=00:09.0".parse().unwrap()];
            assert!(matches!(check(&beside, Some(&off), 1 << 20), Err(Error::NoCachingMode { kind: "vfio" })));
        }
    }

    #[test]
    fn a_vfio_device_needs_a_unit_without_a_first_stage() {
        for text in ["vfio,host=00:09.0", "vfio-user,socket=/nowhere", "pinblk"] {
            let devices = ["edu".parse().unwrap(), text.parse().unwrap()];
            for stages in [vtd::Stages::First, vtd::Stages::Both] {
                let first = VtdOption { scalable: Some(stages), ..Default::default() };
                assert!(matches!(check(&devices, Some(&first), 1 << 20), Err(Error::FirstStage { .. })));
                assert!(check(&devices[..1], Some(&first), 1 << 20).unwrap().is_empty());
            }
        }
    }

    #[test]
    fn a_vfio_device_needs_a_unit_without_flags_of_the_second_stage() {
        for text in ["vfio,host=00:09.0", "vfio-user,socket=/nowhere", "pinblk"] {
            let devices = ["edu".parse().unwrap(), text.parse().unwrap()];
            let scalable = Some(vtd::Stages::Second);
            let flags = VtdOption { scalable, second_stage_dirty: true, ..Default::default() };
            assert!(matches!(check(&devices, Some(&flags), 1 << 20), Err(Error::SecondStageDirty { .. })));
            assert!(check(&devices[..1], Some(&flags), 1 << 20).unwrap().is_empty());
        }
    }

    #[test]
    fn an_edu_with_pasids_needs_a_unit_with_them() {
        let devices = ["edu,pasid=on".parse().unwrap()];
        let refused = |unit: Option<&VtdOption>| matches!(check(&devices, unit, 1 << 20), Err(Error::NoPasids));
        assert!(refused(None) && refused(Some(&VtdOption::default())));
        let scalable = Some(vtd::Stages::Second);
        assert!(!refused(Some(&VtdOption { scalable, pasid_bits: 1, ..Default::default() })));
    }

    #[test]
    fn an_edu_with_ats_or_pri_needs_a_unit_with_it() {
        let (ats, pri) = (["edu,ats=on".parse().unwrap()], ["edu,ats=on,pri=on".parse().unwrap()]);
        let without = VtdOption::default();
        let with_ats = VtdOption { device_tlb: true, ..Default::default() };
        let with_both = VtdOption { page_requests: true, scalable: Some(vtd::Stages::Second), ..with_ats.clone() };
        for unit in [None, Some(&without)] {
            assert!(matches!(check(&ats, unit, 1 << 20), Err(Error::NoDeviceTlbs)));
        }
        assert!(check(&ats, Some(&with_ats), 1 << 20).unwrap().is_empty());
        assert!(matches!(check(&pri, Some(&with_ats), 1 << 20), Err(Error::NoPageRequests)));
        assert!(check(&pri, Some(&with_both), 1 << 20).unwrap().is_empty());
    }

    #[test]
    fn a_vfio_user_device_needs_a_socket_that_is_there() {
        let refused = |text: &str| {
            let devices = [text.parse().unwrap()];
            check(&devices, Some(&VtdOption::default()), 1 << 20).err().unwrap().to_string()
        };
        assert!(refused("vfio-user,socket=/nowhere/at/all").contains("start its process first"));
        assert!(refused("vfio-user,socket=/dev/null").contains("is not a socket"));
        assert!(refused("vfio-user,fd=1000000").contains("descriptor 1000000"));
    }

    #[test]
    fn available_memory_is_read_with_swap() {
        let text = "MemTotal: 100 kB\nMemAvailable:  3000 kB\nSwapFree:   96 kB\n";
        assert_eq!(available_memory(text), Some(3096 * 1024));
        assert_eq!(available_memory("MemTotal: 100 kB\n"), None);
    }
}
