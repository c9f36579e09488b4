//! A kernel with an iommufd that is only in memory, for tests: it checks what Linux checks, keeps what each device
//! reaches, and can refuse any call.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vtd::{IovaRange, Perm};

use super::kernel::Kernel;
use super::sys::{DeviceInfo, Hwpt, Ioas, Place, With};
use crate::bridge::guest_map::{HostMem, MemKind, PAGE_SIZE};
use crate::host::{HostDevice, HostStream, UnmapRange};

/// A call that changes something.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    AllocHwpt(HostDevice, Ioas),
    Map(Place),
    MapFile(Place),
    MapDmaBuf(Place),
    Copy(Place, Place),
    Unmap(Ioas),
    Attach(HostStream, Hwpt),
    Detach(HostStream),
    Track(Hwpt, bool),
    Read(Hwpt, IovaRange),
}

/// What is mapped at an IOVA. Areas that were copied from each other share their pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Area {
    len: u64,
    hva: u64,
    perm: Perm,
    pages: u32,
    /// What is behind it.
    target: Target,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    Pages,
    /// A BAR whose memory was not disabled since.
    Bar,
    /// One whose memory was: nothing is reached any more.
    Revoked,
    /// What has no pages, and was taken for such while no page table was there.
    None,
}

#[derive(Clone, Copy)]
struct Table {
    ioas: Ioas,
    unit: u32,
    with: With,
    tracked: bool,
}

/// A device, and what stands above it.
#[derive(Clone)]
pub struct Device {
    /// Its group: the kernel attaches that as a whole.
    pub group: u32,
    /// The unit of the host above it, which takes page tables that were made for it only.
    pub unit: u32,
    /// Where it can be mapped.
    pub ranges: Vec<IovaRange>,
    /// What the kernel says of it.
    pub info: DeviceInfo,
}

type Refuse = Box<dyn FnMut(&Call) -> Option<i32> + Send>;

#[derive(Default)]
struct State {
    made: u32,
    ioases: BTreeMap<u32, BTreeMap<u64, Area>>,
    tables: BTreeMap<u32, Table>,
    at: BTreeMap<HostStream, Hwpt>,
    /// By page table: IOVAs of dirty pages.
    dirty: BTreeMap<u32, BTreeSet<u64>>,
    /// What devices write in the last moment.
    late: Vec<(HostStream, u64)>,
    calls: Vec<Call>,
    refuse: Option<Refuse>,
    /// The memory of BARs is disabled.
    revoked: bool,
}

/// The kernel.
pub struct Fake {
    devices: BTreeMap<HostDevice, Device>,
    /// Whether it copies parts of what is mapped, maps by file and by dma-buf, and makes page tables for PASIDs.
    pub copies_parts: bool,
    pub maps_files: bool,
    pub knows_dma_bufs: bool,
    pub makes_pasid_tables: bool,
    /// What every IOVA must be a multiple of.
    pub alignment: u64,
    state: Mutex<State>,
}

impl Fake {
    pub fn new(devices: impl IntoIterator<Item = (HostDevice, Device)>) -> Self {
        Self {
            devices: devices.into_iter().collect(),
            copies_parts: true,
            maps_files: true,
            knows_dma_bufs: true,
            makes_pasid_tables: true,
            alignment: PAGE_SIZE,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on a call for which `refuse` gives an errno fails with it and changes nothing.
    pub fn refuse(&self, refuse: impl FnMut(&Call) -> Option<i32> + Send + 'static) {
        self.state().refuse = Some(Box::new(refuse));
    }

    pub fn refuse_nothing(&self) {
        self.state().refuse = None;
    }

    /// The memory of BARs is disabled: what leads there ends. It does not come back when it is enabled.
    pub fn disable_bars(&self) {
        let mut state = self.state();
        state.revoked = true;
        let areas = state.ioases.values_mut().flat_map(BTreeMap::values_mut);
        areas.filter(|area| area.target == Target::Bar).for_each(|area| area.target = Target::Revoked);
    }

    pub fn enable_bars(&self) {
        self.state().revoked = false;
    }

    /// What was asked for since the last time.
    pub fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state().calls)
    }

    /// Where the requests of `stream` get with `iova`: host address and permission.
    pub fn translate(&self, stream: HostStream, iova: u64) -> Option<(u64, Perm)> {
        let state = self.state();
        let areas = state.areas_of(*state.at.get(&stream)?);
        let (first, area) = areas.range(..=iova).next_back()?;
        (iova - first < area.len && area.target != Target::Revoked).then(|| (area.hva + (iova - first), area.perm))
    }

    /// The requests of `stream` write the page at `iova`.
    pub fn write(&self, stream: HostStream, iova: u64) {
        self.state().write(stream, iova);
    }

    /// The requests of `stream` write the page at `iova` in the next attach or unmap, before it changes anything.
    pub fn write_late(&self, stream: HostStream, iova: u64) {
        self.state().late.push((stream, iova));
    }

    /// Whether all page tables of `ioas` are tracked, or none.
    pub fn tracked(&self) -> Vec<bool> {
        self.state().tables.values().map(|table| table.tracked).collect()
    }

    /// The page table that the requests of `stream` go by.
    pub fn table_of(&self, stream: HostStream) -> Option<Hwpt> {
        self.state().at.get(&stream).copied()
    }

    /// How many IOASes, page tables and mappings there are.
    pub fn objects(&self) -> (usize, usize, usize) {
        let state = self.state();
        (state.ioases.len(), state.tables.len(), state.ioases.values().map(BTreeMap::len).sum())
    }

    /// How many pages are pinned: each as often as it was mapped and not copied, where a page table has it.
    pub fn pinned(&self) -> usize {
        let state = self.state();
        let filled: BTreeSet<u32> = state.tables.values().map(|table| table.ioas.0).collect();
        let areas = filled.iter().filter_map(|ioas| state.ioases.get(ioas)).flat_map(BTreeMap::values);
        let pages = areas
            .filter(|area| area.target == Target::Pages)
            .flat_map(|area| (area.hva..area.hva + area.len).step_by(PAGE_SIZE as usize).map(|hva| (area.pages, hva)));
        pages.collect::<BTreeSet<_>>().len()
    }

    fn device(&self, device: HostDevice) -> Result<&Device, i32> {
        self.devices.get(&device).ok_or(libc::ENODEV)
    }

    /// Books `call`, then does it.
    fn serve<T>(&self, call: Call, serve: impl FnOnce(&mut State) -> Result<T, i32>) -> io::Result<T> {
        let mut state = self.state();
        state.calls.push(call);
        let refused = state.refuse.as_mut().and_then(|refuse| refuse(&call));
        refused.map_or_else(|| serve(&mut state), Err).map_err(io::Error::from_raw_os_error)
    }

    fn insert(&self, state: &mut State, at: Place, area: Area) -> Result<(), i32> {
        let aligned = [at.iova, area.len, area.hva].iter().all(|n| n.is_multiple_of(PAGE_SIZE));
        let last = at.iova.checked_add(area.len.wrapping_sub(1)).ok_or(libc::EOVERFLOW)?;
        if area.len == 0 || !aligned {
            return Err(libc::EINVAL);
        }
        let attached = state.at.iter().filter(|(_, hwpt)| state.tables[&hwpt.0].ioas == at.ioas);
        for (stream, _) in attached {
            if !fits(&self.devices[&stream.device], at.iova, last) {
                return Err(libc::EINVAL);
            }
        }
        let areas = state.ioases.get_mut(&at.ioas.0).ok_or(libc::ENOENT)?;
        if areas.range(..=last).next_back().is_some_and(|(first, other)| first + (other.len - 1) >= at.iova) {
            return Err(libc::EEXIST);
        }
        areas.insert(at.iova, area);
        Ok(())
    }

    fn map_new(&self, state: &mut State, at: Place, mem: &HostMem<'_>, perm: Perm, target: Target) -> Result<(), i32> {
        if target == Target::None && state.tables.values().any(|table| table.ioas == at.ioas) {
            return Err(libc::EFAULT);
        }
        let pages = state.next();
        self.insert(state, at, Area { len: mem.size(), hva: mem.hva(), perm, pages, target })
    }
}

fn fits(device: &Device, first: u64, last: u64) -> bool {
    device.ranges.iter().any(|range| range.first <= first && last <= range.last)
}

impl State {
    fn write_what_is_late(&mut self) {
        std::mem::take(&mut self.late).into_iter().for_each(|(stream, iova)| self.write(stream, iova));
    }

    /// As hardware: a dirty bit is set in the page table that is used, if that keeps them.
    fn write(&mut self, stream: HostStream, iova: u64) {
        let Some(hwpt) = self.at.get(&stream).copied().filter(|hwpt| self.tables[&hwpt.0].tracked) else { return };
        let area = self.areas_of(hwpt).range(..=iova).next_back();
        if area.is_some_and(|(first, area)| iova - first < area.len && area.perm.writable()) {
            self.dirty.entry(hwpt.0).or_default().insert(iova - iova % PAGE_SIZE);
        }
    }

    fn areas_of(&self, hwpt: Hwpt) -> &BTreeMap<u64, Area> {
        &self.ioases[&self.tables[&hwpt.0].ioas.0]
    }

    fn next(&mut self) -> u32 {
        self.made += 1;
        self.made
    }
}

impl Kernel for Fake {
    fn alloc_ioas(&self) -> io::Result<Ioas> {
        let mut state = self.state();
        let id = state.next();
        state.ioases.insert(id, BTreeMap::new());
        Ok(Ioas(id))
    }

    fn alloc_hwpt(&self, device: HostDevice, ioas: Ioas, with: With) -> io::Result<Hwpt> {
        self.serve(Call::AllocHwpt(device, ioas), |state| {
            let unit = self.device(device)?.unit;
            if with.dirty_bits && !self.device(device)?.info.dirty_bits {
                return Err(libc::EOPNOTSUPP);
            }
            if with.pasids && !self.makes_pasid_tables {
                return Err(libc::EOPNOTSUPP);
            }
            if !state.ioases.contains_key(&ioas.0) {
                return Err(libc::ENOENT);
            }
            if state.ioases[&ioas.0].values().any(|area| area.target == Target::None) {
                return Err(libc::EFAULT);
            }
            let id = state.next();
            state.tables.insert(id, Table { ioas, unit, with, tracked: false });
            Ok(Hwpt(id))
        })
    }

    fn destroy(&self, id: u32) -> io::Result<()> {
        let mut state = self.state();
        let in_use = state.at.values().any(|hwpt| hwpt.0 == id);
        if in_use || state.tables.values().any(|table| table.ioas.0 == id) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        let gone = state.tables.remove(&id).is_some() || state.ioases.remove(&id).is_some();
        if gone { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOENT)) }
    }

    fn map(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
        let target = if mem.kind() == MemKind::Ram { Target::Pages } else { Target::None };
        self.serve(Call::Map(at), |state| self.map_new(state, at, mem, perm, target))
    }

    fn map_file(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
        self.serve(Call::MapFile(at), |state| {
            mem.backing().ok_or(libc::EBADF)?;
            if self.maps_files { self.map_new(state, at, mem, perm, Target::Pages) } else { Err(libc::ENOTTY) }
        })
    }

    fn map_dma_buf(&self, at: Place, mem: &HostMem<'_>, perm: Perm) -> io::Result<()> {
        self.serve(Call::MapDmaBuf(at), |state| {
            mem.dma_buf().ok_or(libc::EBADF)?;
            match (self.knows_dma_bufs, state.revoked) {
                (false, _) => self.map_new(state, at, mem, perm, Target::None),
                (true, true) => Err(libc::ENODEV),
                (true, false) => self.map_new(state, at, mem, perm, Target::Bar),
            }
        })
    }

    fn copy(&self, to: Place, from: Place, len: u64, perm: Perm) -> io::Result<()> {
        self.serve(Call::Copy(to, from), |state| {
            let areas = state.ioases.get(&from.ioas.0).ok_or(libc::ENOENT)?;
            let (first, area) = areas.range(..=from.iova).next_back().ok_or(libc::ENOENT)?;
            let (offset, area) = (from.iova - first, *area);
            if offset.checked_add(len).is_none_or(|end| end > area.len) {
                return Err(libc::ENOENT);
            }
            if !self.copies_parts && len != area.len {
                return Err(libc::EINVAL);
            }
            if perm.writable() && !area.perm.writable() {
                return Err(libc::EPERM);
            }
            self.insert(state, to, Area { len, hva: area.hva + offset, perm, ..area })
        })
    }

    fn unmap(&self, ioas: Ioas, range: UnmapRange) -> io::Result<u64> {
        self.serve(Call::Unmap(ioas), |state| {
            state.write_what_is_late();
            let areas = state.ioases.get_mut(&ioas.0).ok_or(libc::ENOENT)?;
            let (first, last) = match range {
                UnmapRange::All => (0, u64::MAX),
                UnmapRange::Span { first, last } => (first, last),
            };
            let mut bytes = 0;
            let under = |(at, area): (&u64, &Area)| (*at, *at + (area.len - 1));
            while let Some((at, end)) = areas.range(..=last).next_back().map(under).filter(|(_, end)| *end >= first) {
                if at < first || end > last {
                    return Err(libc::ENOENT);
                }
                areas.remove(&at);
                for (hwpt, dirty) in &mut state.dirty {
                    let filled = state.tables.get(hwpt).is_some_and(|table| table.ioas == ioas);
                    dirty.retain(|page| !filled || !(at..=end).contains(page));
                }
                bytes += end - at + 1;
            }
            if bytes == 0 && range != UnmapRange::All { Err(libc::ENOENT) } else { Ok(bytes) }
        })
    }

    fn track_dirty(&self, hwpt: Hwpt, on: bool) -> io::Result<()> {
        self.serve(Call::Track(hwpt, on), |state| {
            let table = state.tables.get_mut(&hwpt.0).ok_or(libc::ENOENT)?;
            if !table.with.dirty_bits {
                return Err(libc::EOPNOTSUPP);
            }
            table.tracked = on;
            if on {
                state.dirty.remove(&hwpt.0);
            }
            Ok(())
        })
    }

    fn dirty_bitmap(&self, hwpt: Hwpt, range: IovaRange, words: &mut [u64], keep: bool) -> io::Result<()> {
        self.serve(Call::Read(hwpt, range), |state| {
            let table = state.tables.get(&hwpt.0).copied().ok_or(libc::ENOENT)?;
            if !table.tracked {
                return if table.with.dirty_bits { Ok(()) } else { Err(libc::EOPNOTSUPP) };
            }
            let mut next = range.first;
            let areas = &state.ioases[&table.ioas.0];
            while let Some((first, area)) = areas.range(..=next).next_back()
                && next <= range.last
                && next - first < area.len
            {
                next = first + area.len;
            }
            // Without a word, as Linux 6.12.
            let Some(last) = next.min(range.last.saturating_add(1)).checked_sub(1).filter(|last| *last >= range.first)
            else {
                return Ok(());
            };
            let Some(dirty) = state.dirty.get_mut(&hwpt.0) else { return Ok(()) };
            for page in dirty.range(range.first..=last).copied().collect::<Vec<_>>() {
                let bit = (page - range.first) / PAGE_SIZE;
                words[(bit / 64) as usize] |= 1 << (bit % 64);
                if !keep {
                    dirty.remove(&page);
                }
            }
            Ok(())
        })
    }

    fn iova_ranges(&self, ioas: Ioas) -> io::Result<(Vec<IovaRange>, u64)> {
        let state = self.state();
        let attached = state.at.iter().filter(|(_, hwpt)| state.tables[&hwpt.0].ioas == ioas);
        let all = vec![IovaRange { first: 0, last: u64::MAX }];
        let ranges = attached.fold(all, |ranges, (stream, _)| {
            let its = &self.devices[&stream.device].ranges;
            ranges.iter().flat_map(|a| its.iter().filter_map(|b| a.intersection(*b))).collect()
        });
        Ok((ranges, self.alignment))
    }

    fn device_info(&self, device: HostDevice) -> DeviceInfo {
        self.devices.get(&device).map(|device| device.info).unwrap_or_default()
    }

    fn attach(&self, stream: HostStream, to: Hwpt) -> io::Result<()> {
        self.serve(Call::Attach(stream, to), |state| {
            state.write_what_is_late();
            let device = self.device(stream.device)?;
            let table = *state.tables.get(&to.0).ok_or(libc::ENOENT)?;
            if table.unit != device.unit || table.with.dirty_bits && !device.info.dirty_bits {
                return Err(libc::EINVAL);
            }
            if !state.areas_of(to).iter().all(|(first, area)| fits(device, *first, first + (area.len - 1))) {
                return Err(libc::EADDRINUSE);
            }
            let itself = HostStream { pasid: None, ..stream };
            if stream.pasid.is_some() {
                let whole = state.at.get(&itself).is_none_or(|hwpt| state.tables[&hwpt.0].with.pasids);
                if !table.with.pasids || !whole {
                    return Err(libc::EINVAL);
                }
                state.at.insert(stream, to);
                return Ok(());
            }
            let has_parts = state.at.keys().any(|other| other.device == stream.device && other.pasid.is_some());
            if has_parts && !table.with.pasids {
                return Err(libc::EINVAL);
            }
            let of_group =
                |other: &HostStream| other.pasid.is_none() && self.devices[&other.device].group == device.group;
            let group: Vec<HostStream> = state.at.keys().copied().filter(of_group).collect();
            if !group.contains(&stream) {
                if group.iter().any(|other| state.at[other] != to) {
                    return Err(libc::EINVAL);
                }
                state.at.insert(stream, to);
            }
            // One that is attached takes its group along.
            group.into_iter().for_each(|other| {
                state.at.insert(other, to);
            });
            Ok(())
        })
    }

    fn detach(&self, stream: HostStream) -> io::Result<()> {
        self.serve(Call::Detach(stream), |state| {
            self.device(stream.device)?;
            state.at.remove(&stream);
            Ok(())
        })
    }
}
