//! The grammar of option values: `kind[,key=value]...`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use vtd::Stages;

use crate::config::{
    Backend, DeviceKind, DeviceOption, IommuOption, MAX_ROOT_PORTS, MAX_SEGMENTS, Place, RootSlot, Slot, UserSocket,
    VirtioKind, VtdOption, WorkerOption, slot_of_port,
};

/// Why an option's value is wrong. A sentence for the user.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BadOption(String);

impl fmt::Display for BadOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadOption {}

impl BadOption {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

fn bad<T>(message: impl Into<String>) -> Result<T, BadOption> {
    Err(BadOption(message.into()))
}

/// A decimal or 0x number.
pub fn number(text: &str) -> Result<u64, BadOption> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16),
        None if !text.starts_with('+') => text.parse(),
        _ => return bad(format!("`{text}` is not a number")),
    };
    parsed.or_else(|_| bad(format!("`{text}` is not a number")))
}

/// A size: a number with an optional binary suffix K, M, G or T.
pub fn size(text: &str) -> Result<u64, BadOption> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        Some(b't' | b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let value =
        number(digits).map_err(|_| BadOption(format!("`{text}` is not a size (a number, then K, M, G or T)")))?;
    value.checked_mul(1 << shift).ok_or_else(|| BadOption(format!("the size {text} is too large")))
}

/// Guest memory: a size, at least 16 MiB and a multiple of 4 KiB.
pub fn memory(text: &str) -> Result<u64, BadOption> {
    match size(text)? {
        bytes if bytes % 4096 != 0 => bad(format!("the memory size {text} is not a multiple of 4K")),
        bytes if bytes < 16 << 20 => bad(format!("the memory size {text} is less than 16M")),
        bytes if bytes > 1 << 46 => bad(format!("the memory size {text} is more than 64T")),
        bytes => Ok(bytes),
    }
}

fn switch(key: &str, text: &str) -> Result<bool, BadOption> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => bad(format!("{key}={text}: `on` or `off` is expected")),
    }
}

/// The keys of one option value.
struct Keys<'a> {
    kind: &'a str,
    values: BTreeMap<&'a str, &'a str>,
}

impl<'a> Keys<'a> {
    fn parse(kind: &'a str, rest: Option<&'a str>, valid: &[&str]) -> Result<Self, BadOption> {
        let mut values = BTreeMap::new();
        for item in rest.into_iter().flat_map(|rest| rest.split(',')) {
            let Some((key, value)) = item.split_once('=') else {
                return bad(format!("{kind}: `{item}` is not key=value; the keys are {}", valid.join(", ")));
            };
            if !valid.contains(&key) {
                return bad(format!("{kind}: unknown key `{key}`; the keys are {}", valid.join(", ")));
            }
            if values.insert(key, value).is_some() {
                return bad(format!("{kind}: the key `{key}` is given twice; the keys are {}", valid.join(", ")));
            }
        }
        Ok(Self { kind, values })
    }

    fn get<T>(&self, key: &str, parse: impl FnOnce(&str) -> Result<T, BadOption>) -> Result<Option<T>, BadOption> {
        self.values
            .get(key)
            .map(|value| parse(value).map_err(|e| BadOption(format!("{}: {key}: {e}", self.kind))))
            .transpose()
    }

    fn switch(&self, key: &str) -> Result<Option<bool>, BadOption> {
        self.get(key, |value| switch(key, value))
    }
}

fn split_kind(text: &str) -> (&str, Option<&str>) {
    text.split_once(',').map_or((text, None), |(kind, rest)| (kind, Some(rest)))
}

impl std::str::FromStr for IommuOption {
    type Err = BadOption;

    fn from_str(text: &str) -> Result<Self, BadOption> {
        const KEYS: [&str; 19] = [
            "ats",
            "aw-bits",
            "caching-mode",
            "devices",
            "dma-translation",
            "eim",
            "intremap",
            "ioapic-check",
            "nest",
            "pasid-bits",
            "perf",
            "posted",
            "pri",
            "pt",
            "scalable",
            "segment",
            "slads",
            "stage",
            "worker",
        ];
        let (kind, rest) = split_kind(text);
        match kind {
            "none" => {
                Keys::parse(kind, rest, &[])?;
                Ok(Self::None)
            }
            "vtd" => {
                let keys = Keys::parse(kind, rest, &KEYS)?;
                let aw_bits = keys.get("aw-bits", |value| match number(value)? {
                    bits @ (39 | 48 | 57) => Ok(bits as u8),
                    _ => bad(format!("`{value}` is not 39, 48 or 57")),
                })?;
                let default = VtdOption::default();
                let interrupt_remapping = keys.switch("intremap")?.unwrap_or(default.interrupt_remapping);
                let extended_interrupt_mode = keys.switch("eim")?.unwrap_or(interrupt_remapping);
                if extended_interrupt_mode && !interrupt_remapping {
                    return bad("vtd: eim=on needs intremap=on: it is a mode of interrupt remapping");
                }
                let posted_interrupts = keys.switch("posted")?.unwrap_or(default.posted_interrupts);
                if posted_interrupts && !interrupt_remapping {
                    return bad("vtd: posted=on needs intremap=on: an interrupt is posted by an entry of its table");
                }
                let stages = keys.get("stage", |value| match value {
                    "second" => Ok(Stages::Second),
                    "first" => Ok(Stages::First),
                    "both" => Ok(Stages::Both),
                    _ => bad(format!("`{value}` is not first, second or both")),
                })?;
                let scalable = match (keys.switch("scalable")?, stages) {
                    (Some(true), stages) => Some(stages.unwrap_or(Stages::Second)),
                    (_, None) => default.scalable,
                    (_, Some(_)) => return bad("vtd: stage needs scalable=on: it is one of scalable mode"),
                };
                let nested = keys.switch("nest")?.unwrap_or(default.nested);
                if nested && scalable != Some(Stages::Both) {
                    return bad("vtd: nest=on needs scalable=on,stage=both: it is the one stage over the other");
                }
                let second_stage_dirty = keys.switch("slads")?.unwrap_or(default.second_stage_dirty);
                if second_stage_dirty && !matches!(scalable, Some(Stages::Second | Stages::Both)) {
                    return bad("vtd: slads=on needs scalable=on with the second stage, whose flags they are");
                }
                let segment = keys.get("segment", |value| segment(value, number(value)?))?;
                let pasid_bits = keys.get("pasid-bits", |value| match number(value)? {
                    bits @ 0..=20 => Ok(bits as u8),
                    _ => bad(format!("`{value}` is not 0 to 20")),
                })?;
                let pasid_bits = pasid_bits.unwrap_or(default.pasid_bits);
                if pasid_bits != 0 && scalable.is_none() {
                    return bad("vtd: pasid-bits needs scalable=on: PASIDs are of scalable mode");
                }
                let device_tlb = keys.switch("ats")?.unwrap_or(default.device_tlb);
                let page_requests = keys.switch("pri")?.unwrap_or(default.page_requests);
                if page_requests && !(device_tlb && scalable.is_some()) {
                    return bad("vtd: pri=on needs ats=on,scalable=on: a page request says what a device-TLB missed");
                }
                let dma_translation = keys.switch("dma-translation")?.unwrap_or(default.dma_translation);
                let pass_through = keys.switch("pt")?.unwrap_or(default.pass_through && dma_translation);
                let performance_counters = keys.switch("perf")?.unwrap_or(default.performance_counters);
                let translates = scalable.is_some() || device_tlb || performance_counters || pass_through;
                if !dma_translation && (translates || !interrupt_remapping) {
                    return bad(
                        "vtd: dma-translation=off needs intremap=on, and none of scalable, ats, perf and pt: such a unit \
                         remaps interrupts, and nothing else",
                    );
                }
                let worker = keys.get("worker", |value| match value {
                    "off" => Ok(WorkerOption::Off),
                    "on" => Ok(WorkerOption::On),
                    "always" => Ok(WorkerOption::Always),
                    _ => bad(format!("`{value}` is not off, on or always")),
                })?;
                let worker = worker.unwrap_or(default.worker);
                if device_tlb && worker != WorkerOption::Off {
                    return bad(
                        "vtd: worker needs ats=off: after a time-out Linux goes by the tail register, which a worker \
                         moves late",
                    );
                }
                Ok(Self::Vtd(VtdOption {
                    dma_translation,
                    aw_bits,
                    caching_mode: keys.switch("caching-mode")?.unwrap_or(default.caching_mode),
                    pass_through,
                    interrupt_remapping,
                    extended_interrupt_mode,
                    posted_interrupts,
                    scalable,
                    nested,
                    second_stage_dirty,
                    pasid_bits,
                    device_tlb,
                    page_requests,
                    performance_counters,
                    worker,
                    ioapic_check: keys.switch("ioapic-check")?.unwrap_or(default.ioapic_check),
                    devices: keys.get("devices", names)?.unwrap_or_default(),
                    segment: segment.unwrap_or(default.segment),
                }))
            }
            _ => bad(format!("unknown IOMMU `{kind}`; it is vtd or none")),
        }
    }
}

fn hex(text: &str, digits: std::ops::RangeInclusive<usize>, max: u32) -> Option<u32> {
    let fits = digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| u32::from_str_radix(text, 16).ok()).flatten().filter(|value| *value <= max)
}

/// The number of a segment, which was given as `text`.
fn segment(text: &str, number: u64) -> Result<u16, BadOption> {
    let fits = u16::try_from(number).ok().filter(|number| *number < MAX_SEGMENTS);
    fits.ok_or_else(|| BadOption(format!("`{text}`: segments are 0 to {}", MAX_SEGMENTS - 1)))
}

/// A slot of segment 0, or one of bus 0 of another.
fn root_slot(text: &str) -> Result<RootSlot, BadOption> {
    let Some((number, rest)) = text.split_once(':') else { return slot(text).map(RootSlot::first) };
    match (hex(number, 4..=4, 0xffff), rest.strip_prefix("00:")) {
        (Some(number), Some(rest)) => Ok(RootSlot { segment: segment(text, number.into())?, slot: slot(rest)? }),
        (Some(_), None) => {
            bad(format!("`{text}`: there is bus 00 only; what is behind a port or bridge has port= or bus="))
        }
        _ => bad(format!("`{text}` is not a slot (DD.F of segment 0, or SSSS:00:DD.F, hexadecimal)")),
    }
}

fn slot(text: &str) -> Result<Slot, BadOption> {
    let parsed =
        text.split_once('.').and_then(|(device, function)| Some((hex(device, 1..=2, 0x1f)?, hex(function, 1..=1, 7)?)));
    match parsed {
        Some((0, _)) => bad(format!("`{text}`: slot 00 is the host bridge's")),
        Some((0x1f, _)) => bad(format!("`{text}`: slot 1f is kept")),
        Some((device, function)) => Ok(Slot { device: device as u8, function: function as u8 }),
        None => bad(format!("`{text}` is not a slot (DD.F, hexadecimal, 01.0 to 1e.7)")),
    }
}

/// A descriptor that this process was started with; not one of the standard ones.
pub fn descriptor(text: &str) -> Result<i32, BadOption> {
    match number(text)? {
        fd @ 3.. => i32::try_from(fd).or_else(|_| bad(format!("`{text}` is not a descriptor"))),
        _ => bad(format!("`{text}` is one of the standard descriptors")),
    }
}

fn path(text: &str) -> Result<PathBuf, BadOption> {
    if text.is_empty() { bad("a path is expected") } else { Ok(text.into()) }
}

/// Of `--user-socket`: the id of a device, and where its process listens.
///
/// # Errors
/// One of them is missing.
pub fn user_socket(text: &str) -> Result<(String, PathBuf), BadOption> {
    match text.split_once('=') {
        Some((id, place)) if !id.is_empty() => Ok((id.to_owned(), path(place)?)),
        _ => bad("ID=PATH is expected"),
    }
}

/// The name of an interface, as Linux allows it.
fn interface(text: &str) -> Result<String, BadOption> {
    let fits = (1..=15).contains(&text.len()) && !matches!(text, "." | "..");
    let valid = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    if fits && text.bytes().all(valid) {
        return Ok(text.to_owned());
    }
    bad(format!("`{text}` is not the name of an interface (1 to 15 bytes, no space, `/`, `:` or `%`)"))
}

/// The address of one interface, no group's.
fn mac(text: &str) -> Result<[u8; 6], BadOption> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| hex(byte, 2..=2, 0xff).map(|byte| byte as u8)).collect();
    match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
        Some(mac) if mac[0] & 1 == 0 && mac != [0; 6] => Ok(mac),
        _ => bad(format!("`{text}` is not the address of an interface (xx:xx:xx:xx:xx:xx, the first one even)")),
    }
}

fn identifier(text: &str) -> Result<String, BadOption> {
    let fits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if fits { Ok(text.to_owned()) } else { bad(format!("`{text}` is not a name (letters, digits, `-`, `_` and `.`)")) }
}

/// Ids or slots, with `+` between them.
fn names(text: &str) -> Result<Vec<String>, BadOption> {
    let address = |text: &str| root_slot(text).map(RootSlot::in_full);
    text.split('+').map(|name| if name.contains(':') { address(name) } else { identifier(name) }).collect()
}

/// The number of a root port.
fn port(text: &str) -> Result<u8, BadOption> {
    match number(text)? {
        port @ 1..=15 => Ok(port as u8),
        _ => bad(format!("`{text}` is not the number of a root port (1 to {MAX_ROOT_PORTS})")),
    }
}

impl std::str::FromStr for DeviceOption {
    type Err = BadOption;

    fn from_str(text: &str) -> Result<Self, BadOption> {
        let (kind, rest) = split_kind(text);
        let (keys, kind) = match kind {
            "vfio" => {
                let keys = Keys::parse(kind, rest, &["addr", "backend", "bus", "host", "id", "port"])?;
                let backend = keys.get("backend", |value| match value {
                    "auto" => Ok(None),
                    "type1" => Ok(Some(Backend::Type1)),
                    "iommufd" => Ok(Some(Backend::Iommufd)),
                    _ => bad(format!("`{value}` is not auto, type1 or iommufd")),
                })?;
                let host = keys
                    .get("host", |text| text.parse().map_err(|e: vfio_bridge::BdfError| BadOption(e.to_string())))?
                    .ok_or_else(|| BadOption("vfio: host=BDF is missing".into()))?;
                (keys, DeviceKind::Vfio { host, backend: backend.flatten() })
            }
            "pcie-pci-bridge" => (Keys::parse(kind, rest, &["addr", "id", "port"])?, DeviceKind::PciBridge),
            "edu" => {
                let keys = Keys::parse(kind, rest, &["addr", "ats", "bus", "id", "pasid", "port", "pri"])?;
                let on = |key: &str| keys.switch(key).map(|on| on.unwrap_or(false));
                let (pasid, ats, pri) = (on("pasid")?, on("ats")?, on("pri")?);
                if pri && !ats {
                    return bad("edu: pri=on needs ats=on: it asks for what its device-TLB misses");
                }
                (keys, DeviceKind::Edu { pasid, ats, pri })
            }
            "pinblk" => {
                let keys = Keys::parse(kind, rest, &["addr", "bus", "direct", "file", "id", "port"])?;
                let file = keys.get("file", path)?;
                let direct = keys.switch("direct")?.unwrap_or(false);
                if direct && file.is_none() {
                    return bad("pinblk: direct=on needs file=PATH");
                }
                (keys, DeviceKind::PinBlk { file, direct })
            }
            "vfio-user" => {
                let keys = Keys::parse(kind, rest, &["addr", "bus", "confine", "fd", "id", "socket", "port"])?;
                let path = keys.get("socket", |text| path(text).map(UserSocket::Path))?;
                let socket = match (path, keys.get("fd", descriptor)?) {
                    (Some(path), None) => path,
                    (None, Some(fd)) => UserSocket::Fd(fd),
                    (None, None) => return bad("vfio-user: socket=PATH (or fd=N) is missing"),
                    (Some(_), Some(_)) => return bad("vfio-user: socket=PATH and fd=N exclude each other"),
                };
                let confine = keys.switch("confine")?.unwrap_or(false);
                (keys, DeviceKind::VfioUser { socket, confine })
            }
            "virtio-blk" => {
                let keys = Keys::parse(kind, rest, &["addr", "bus", "file", "id", "readonly", "port"])?;
                let file =
                    keys.get("file", path)?.ok_or_else(|| BadOption("virtio-blk: file=PATH is missing".into()))?;
                let read_only = keys.switch("readonly")?.unwrap_or(false);
                (keys, DeviceKind::Virtio(VirtioKind::Blk { file, read_only }))
            }
            "virtio-net" => {
                let keys = Keys::parse(kind, rest, &["addr", "bus", "id", "mac", "tap", "port"])?;
                let tap =
                    keys.get("tap", interface)?.ok_or_else(|| BadOption("virtio-net: tap=NAME is missing".into()))?;
                let mac = keys.get("mac", mac)?;
                (keys, DeviceKind::Virtio(VirtioKind::Net { tap, mac }))
            }
            "virtio-console" => {
                (Keys::parse(kind, rest, &["addr", "bus", "id", "port"])?, DeviceKind::Virtio(VirtioKind::Console))
            }
            "virtio-rng" => {
                (Keys::parse(kind, rest, &["addr", "bus", "id", "port"])?, DeviceKind::Virtio(VirtioKind::Rng))
            }
            _ => {
                return bad(format!(
                    "unknown device `{kind}`; it is vfio, vfio-user, virtio-blk, virtio-net, virtio-rng, virtio-console, edu, pinblk or pcie-pci-bridge"
                ));
            }
        };
        let (addr, port, bus) = (keys.get("addr", root_slot)?, keys.get("port", port)?, keys.get("bus", identifier)?);
        if port.is_some() && (addr.is_some() || bus.is_some()) {
            return bad(format!("{}: port= excludes addr= and bus=: behind a root port there is one place", keys.kind));
        }
        if bus.is_some() && addr.is_some_and(|addr| addr.segment != 0) {
            return bad(format!("{}: bus= excludes an addr= in another segment: bridges are in segment 0", keys.kind));
        }
        if kind == DeviceKind::PciBridge && addr.is_some_and(|addr| addr.segment != 0) {
            return bad("pcie-pci-bridge: addr= is a slot of segment 0: the others have functions of bus 0 only");
        }
        if bus.is_some() && matches!(kind, DeviceKind::Edu { .. }) && kind != DeviceKind::PLAIN_EDU {
            return bad("edu: bus= excludes pasid=on and ats=on: a conventional bus has neither");
        }
        Ok(Self { id: keys.get("id", identifier)?, addr, port, bus, kind })
    }
}

/// A bus that devices are given slots of.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Bus {
    /// Bus 0 of this segment.
    Root(u16),
    /// Below the bridge with this place in the list of devices.
    Bridge(usize),
}

impl Bus {
    fn segment(self) -> u16 {
        match self {
            Self::Root(segment) => segment,
            Self::Bridge(_) => 0,
        }
    }
}

/// Gives every device its place, of which there are `root_ports` besides bus 0 and the buses of bridges: the one that
/// it was given, whatever the order, else the lowest slot of its bus that is free.
pub fn place_devices(devices: &[DeviceOption], root_ports: u8) -> Result<Vec<Place>, BadOption> {
    let mut filled = BTreeSet::new();
    for port in devices.iter().filter_map(|device| device.port) {
        if port > root_ports {
            return bad(format!("port={port}: there are {root_ports} root ports; use --root-ports {port}"));
        }
        if !filled.insert(port) {
            return bad(format!("port={port} is given to two devices"));
        }
    }
    let names = name_devices(devices)?;
    let bridge_of = |device: &DeviceOption| {
        let Some(bus) = &device.bus else { return Ok(None) };
        let found = names.iter().position(|name| name == bus).filter(|at| devices[*at].kind == DeviceKind::PciBridge);
        found.map(Some).ok_or_else(|| BadOption(format!("bus={bus}: there is no pcie-pci-bridge with id={bus}")))
    };
    let of_ports: Vec<Slot> = (1..=root_ports).map(slot_of_port).collect();
    // By the bridge, or the segment.
    let mut taken: BTreeMap<Bus, BTreeSet<Slot>> = BTreeMap::new();
    let bus_of = |device: &DeviceOption| {
        let segment = device.addr.map_or(0, |addr| addr.segment);
        Ok::<_, BadOption>(bridge_of(device)?.map_or(Bus::Root(segment), Bus::Bridge))
    };
    for device in devices {
        let (bus, Some(addr)) = (bus_of(device)?, device.addr) else { continue };
        if bus == Bus::Root(0) && of_ports.iter().any(|port| port.device == addr.slot.device) {
            return bad(format!("addr={addr} is a root port's; use a slot below {}", of_ports[0]));
        }
        if !taken.entry(bus).or_default().insert(addr.slot) {
            return bad(format!("addr={addr} is given to two devices"));
        }
    }
    // Guests look for further functions only where there is a function 0.
    for (bus, taken) in &taken {
        let zero = |slot: &Slot| Slot { function: 0, ..*slot };
        if let Some(slot) = taken.iter().find(|slot| !taken.contains(&zero(slot))) {
            let [this, zero] = [*slot, zero(slot)].map(|slot| RootSlot { segment: bus.segment(), slot });
            return bad(format!("addr={this} needs a device with addr={zero} too"));
        }
    }
    taken.entry(Bus::Root(0)).or_default().extend(of_ports);
    let mut places = Vec::with_capacity(devices.len());
    for device in devices {
        if let Some(port) = device.port {
            places.push(Place::Port(port));
            continue;
        }
        let bus = bus_of(device)?;
        let taken = taken.entry(bus).or_default();
        let free = (1..0x1f).find(|device| !taken.iter().any(|slot| slot.device == *device));
        let slot = device.addr.map(|addr| addr.slot).or_else(|| free.map(|device| Slot { device, function: 0 }));
        let Some(slot) = slot else {
            let bus = device.bus.as_deref().map_or_else(|| "bus 0".to_owned(), |bus| format!("bus={bus}"));
            return bad(format!("there is no free slot on {bus} for all of these devices"));
        };
        taken.insert(slot);
        places.push(match bus {
            Bus::Root(segment) => Place::Root(RootSlot { segment, slot }),
            Bus::Bridge(bridge) => Place::Bridge { bridge, slot },
        });
    }
    Ok(places)
}

/// Gives every device its id: the one it was given, or the first free of `vfio0`, `vfio1`, ...
pub fn name_devices(devices: &[DeviceOption]) -> Result<Vec<String>, BadOption> {
    let mut taken = BTreeSet::new();
    for id in devices.iter().filter_map(|device| device.id.as_deref()) {
        if !taken.insert(id.to_owned()) {
            return bad(format!("two devices have id={id}"));
        }
    }
    let mut outside = BTreeSet::new();
    for device in devices {
        if let Some(twice) = device.kind.outside().filter(|this| !outside.insert(this.clone())) {
            return bad(format!("{twice} is given to two devices"));
        }
    }
    let mut names = Vec::with_capacity(devices.len());
    for device in devices {
        let name = device.id.clone().or_else(|| {
            (0..=devices.len()).map(|n| format!("{}{n}", device.kind.name())).find(|name| !taken.contains(name))
        });
        let Some(name) = name else { return bad("a device has no free id") };
        taken.insert(name.clone());
        names.push(name);
    }
    Ok(names)
}

/// A duration in seconds, from a millisecond to 30 years; fractions are allowed.
pub fn seconds(text: &str) -> Result<std::time::Duration, BadOption> {
    text.parse()
        .ok()
        .filter(|seconds| (0.001..=1e9).contains(seconds))
        .and_then(|seconds: f64| std::time::Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| BadOption(format!("`{text}` is not a number of seconds from 0.001 to 1000000000")))
}

#[cfg(test)]
#[path = "options_test.rs"]
mod options_test;
