//! Assigned functions: what is checked before anything runs, what the host allows, and what is said about it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};

use devices::vfio_pci::{VfioPci, VfioPciError};
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use vfio_bridge::{
    Bdf, Bridge, CheckedFunction, GroupId, GuestMap, GuestMapError, HostFunction, HostIommu, HostPaths, Limits,
    Memlock, OpenError, Quarantine, RegisterError, Trace, TracedHost, Type1, VfioDeviceFd, check_memlock,
};
use vtd::{AttachRefused, Requester};

use crate::control::{Control, Stop};
use crate::layout;
use crate::memory::Ram;
use crate::options::VtdOption;
use crate::vm::{self, call};

/// Guest address widths that a unit can have, the narrowest first.
const WIDTHS: [u8; 3] = [39, 48, 57];
/// What a unit has when nobody asks: 57 bits mean five levels, which cost a guest more than they give.
const WIDEST_BY_DEFAULT: u8 = 48;

/// Why functions cannot be assigned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Without a unit nothing would confine the device.
    #[error(
        "--iommu none with a vfio device is refused: nothing inside the guest could confine the device; leave --iommu out, or use \
         --iommu vtd"
    )]
    NoUnit,
    /// Without Caching Mode the guest does not say what it maps.
    #[error(
        "caching-mode=off with a vfio device is refused: the guest would not say what it maps, and the device could not follow; \
         use caching-mode=on"
    )]
    NoCachingMode,
    /// The unit would be wider than the host.
    #[error("aw-bits={asked} is refused: the host IOMMU of group {group} maps {host} bits; use aw-bits={}", widest(*.host))]
    Width {
        /// What was asked for.
        asked: u8,
        /// What the host maps.
        host: u8,
        /// The group whose IOMMU is the narrowest.
        group: GroupId,
    },
    /// Not even the narrowest unit fits.
    #[error(
        "the host IOMMU of group {group} maps only {host} bits, and the narrowest unit has 39: the device cannot be assigned"
    )]
    TooNarrow {
        /// What the host maps.
        host: u8,
        /// Its group.
        group: GroupId,
    },
    /// The host keeps a range where the guest's RAM would be.
    #[error(
        "the host IOMMU of group {group} cannot map {first:#x}-{last:#x}, where guest memory would be: the device cannot be assigned \
         with {} MiB of memory; use a smaller --memory",
        .ram >> 20
    )]
    Reserved {
        /// Its group.
        group: GroupId,
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
        /// Bytes of RAM.
        ram: u64,
    },
    /// What would be locked is not there.
    #[error(
        "an assigned device keeps the guest's {} MiB of memory locked, and the host has {} MiB left; use a smaller --memory",
        .ram >> 20, .available >> 20
    )]
    HostMemory {
        /// Bytes of RAM.
        ram: u64,
        /// Bytes that the host can still give.
        available: u64,
    },
    /// Guest memory is not as the bridge needs it.
    #[error(transparent)]
    GuestMap(#[from] GuestMapError),
    /// A function is there twice.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The host did not take the identity mappings.
    #[error("{bdf} could not be given the guest's memory: {source}")]
    Attach {
        /// The function.
        bdf: Bdf,
        /// Why.
        source: AttachRefused,
    },
    /// The function is not as PCI wants it.
    #[error("{bdf} cannot be assigned: {source}")]
    Function {
        /// The function.
        bdf: Bdf,
        /// Why.
        source: VfioPciError,
    },
    /// KVM.
    #[error(transparent)]
    Vm(#[from] vm::Error),
}

/// The widest unit that a host of `bits` can follow.
fn widest(bits: u8) -> u8 {
    WIDTHS.into_iter().rev().find(|width| *width <= bits).unwrap_or(WIDTHS[0])
}

/// Checks that open nothing. `unit` is `None` under `--iommu none`.
pub fn check(wanted: &[Bdf], unit: Option<&VtdOption>, ram: u64) -> Result<Vec<CheckedFunction>, Error> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    match unit {
        None => return Err(Error::NoUnit),
        Some(unit) if !unit.caching_mode => return Err(Error::NoCachingMode),
        Some(_) => {}
    }
    let paths = HostPaths::default();
    let checked = wanted.iter().map(|bdf| paths.check(*bdf)).collect::<Result<Vec<_>, _>>()?;
    let groups: BTreeSet<GroupId> = checked.iter().map(CheckedFunction::group).collect();
    check_memlock(Memlock::of_this_process(), ram, groups.len() as u64)?;
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_memory(&text));
    match memory {
        Some(available) if ram > available => Err(Error::HostMemory { ram, available }),
        _ => Ok(checked),
    }
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

/// The functions, open, and the bridge to their host IOMMU.
pub struct Assigned {
    /// What the units tell of.
    pub bridge: Arc<Bridge>,
    /// Open functions, in the order they were checked.
    pub functions: Vec<HostFunction>,
    /// What the host allows, by group.
    pub limits: Vec<(GroupId, Limits)>,
    /// Stops functions.
    pub breaker: Arc<Breaker>,
}

/// Opens what was checked. Every group is in the KVM-VFIO device afterwards (F-7).
pub fn open(
    vm: &VmFd,
    ram: &Arc<Ram>,
    ram_size: u64,
    checked: &[CheckedFunction],
    control: &Arc<Control>,
    trace: Option<&Arc<Trace>>,
) -> Result<Assigned, Error> {
    let kvm_vfio = if checked.is_empty() {
        None
    } else {
        let mut device = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, ..Default::default() };
        let device = vm.create_device(&mut device).map_err(call("KVM_CREATE_DEVICE of the VFIO device"))?;
        Some(Arc::new(VfioDeviceFd::new_from_kvm(device)))
    };
    let type1 = Arc::new(Type1::new(kvm_vfio));
    let functions = checked.iter().map(|function| type1.open(function)).collect::<Result<Vec<_>, _>>()?;
    let groups: BTreeSet<GroupId> = checked.iter().map(CheckedFunction::group).collect();
    let limits: Vec<(GroupId, Limits)> =
        groups.into_iter().filter_map(|group| Some((group, type1.limits_of(group)?))).collect();
    for (group, limits) in &limits {
        for (first, len) in layout::ram_regions(ram_size) {
            if let Some(range) = limits.reserved_in(first, first + (len - 1)).first() {
                return Err(Error::Reserved { group: *group, first: range.first, last: range.last, ram: ram_size });
            }
        }
    }
    let breaker = Arc::new(Breaker { functions: Mutex::default(), control: control.clone() });
    let guest = GuestMap::of_memory(ram.clone())?;
    let host: Arc<dyn HostIommu> = match trace {
        Some(trace) => {
            trace.memory(&guest);
            Arc::new(TracedHost::new(type1, trace.clone()))
        }
        None => type1,
    };
    let bridge = Arc::new(Bridge::new(host, guest, breaker.clone()));
    Ok(Assigned { bridge, functions, limits, breaker })
}

fn page_sizes(mask: u64) -> String {
    let names: Vec<String> = (12..64u32)
        .filter(|bit| mask >> bit & 1 != 0)
        .map(|bit| match bit {
            0..20 => format!("{}K", 1u64 << (bit - 10)),
            20..30 => format!("{}M", 1u64 << (bit - 20)),
            _ => format!("{}G", 1u64 << (bit - 30)),
        })
        .collect();
    names.join(", ")
}

/// Says what the host allows (B-13), and what it costs (B-12).
pub fn report(limits: &[(GroupId, Limits)], ram: u64) {
    for (group, limits) in limits {
        let ranges: Vec<String> = limits.iova_ranges.iter().map(ToString::to_string).collect();
        let memlock = limits.memlock.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        log::info!(
            "host group {group}: maps {} with pages of {}, {} mappings; locked memory {memlock}",
            ranges.join(" and "),
            page_sizes(limits.page_sizes),
            limits.entries
        );
    }
    if limits.len() > 1 {
        log::info!(
            "{} host groups pin the guest's memory once each while they are untranslated: {} MiB in all",
            limits.len(),
            (ram >> 20) * limits.len() as u64
        );
    }
}

/// Says how each function is reset (F-4); a warning where what the guest told it can outlive a reset of the guest.
pub fn report_resets(functions: &[HostFunction]) {
    for function in functions {
        let (bdf, way) = (function.bdf(), function.reset_way());
        if way.is_sure() {
            log::info!("{bdf} {way}");
        } else {
            log::warn!(
                "{bdf} {way}: DMA that the guest began before a reset may go on when its next driver enables bus mastering"
            );
        }
    }
}

/// Stops functions whose mappings the host did not take away (B-11).
pub struct Breaker {
    functions: Mutex<BTreeMap<Requester, Weak<VfioPci>>>,
    control: Arc<Control>,
}

impl Breaker {
    /// `function` is the function at `requester`.
    pub fn add(&self, requester: Requester, function: &Arc<VfioPci>) {
        self.functions.lock().unwrap().insert(requester, Arc::downgrade(function));
    }
}

impl Quarantine for Breaker {
    fn quarantine(&self, functions: &[Requester], why: &str) -> Result<(), String> {
        for requester in functions {
            let function = self.functions.lock().unwrap().get(requester).and_then(Weak::upgrade);
            // A function that is not plugged in yet, or not any more, has its Bus Master bit off.
            let Some(function) = function else { continue };
            log::error!("the function {requester} is stopped: {why}");
            function.quarantine()?;
        }
        Ok(())
    }

    fn stop_machine(&self, functions: &[Requester], why: &str) {
        let names: Vec<String> = functions.iter().map(ToString::to_string).collect();
        self.control.halt(Stop::Error(format!("{} could not be stopped: {why}", names.join(", "))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_bridge::IovaRange;

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
        let bdf = "00:09.0".parse().unwrap();
        assert!(matches!(check(&[bdf], None, 1 << 20), Err(Error::NoUnit)));
        let off = VtdOption { caching_mode: false, ..Default::default() };
        assert!(matches!(check(&[bdf], Some(&off), 1 << 20), Err(Error::NoCachingMode)));
        assert!(check(&[], None, 1 << 20).unwrap().is_empty());
    }

    #[test]
    fn available_memory_is_read_with_swap() {
        let text = "MemTotal: 100 kB\nMemAvailable:  3000 kB\nSwapFree:   96 kB\n";
        assert_eq!(available_memory(text), Some(3096 * 1024));
        assert_eq!(available_memory("MemTotal: 100 kB\n"), None);
    }

    #[test]
    fn page_sizes_are_named() {
        assert_eq!(page_sizes(0x4020_1000), "4K, 2M, 1G");
    }
}
