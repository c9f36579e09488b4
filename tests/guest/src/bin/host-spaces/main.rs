//! Runs in Causeway's host, in the place of Causeway: an edu function below the bridge, by iommufd and then by type1.
//! What a switch between two large spaces takes, what the device sees meanwhile; how many mappings one space holds; and
//! what a mapping costs beside the bare system call.

mod bare;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use guest_programs::memory::{Backing, DmaMemory, PAGE};
use guest_programs::vfio::{Access, Container};
use vfio_bridge::{
    Bdf, Bridge, Function, GroupId, GuestMap, HostFunction, HostIommu, HostPaths, HostSpaceId, Iommufd, Placement,
    Quarantine, Region, RegionKind, Type1, UnmapRange,
};
use vtd::{
    AttachRefused, DomainId, Gpa, Iova, Mapping, PagedSpace, Perm, RefusalCause, Requester, SourceId, SpaceKey,
    SpaceListener, Tables, UnitId,
};

/// Compares the backends of the bridge with an edu function.
#[derive(Parser)]
struct Arguments {
    /// The edu, as DDDD:BB:DD.F; bound to vfio-pci already.
    edu: Bdf,
    /// Live mappings of 4 KiB in one space.
    #[arg(long, default_value_t = 300_000)]
    mappings: u64,
    /// Extents of each of the two spaces of the switch.
    #[arg(long, default_value_t = 4_000)]
    extents: u64,
    /// How many switches the edu reads through.
    #[arg(long, default_value_t = 1_000)]
    switches: u32,
    /// Fails when a switch or a page takes longer than it may. For a machine that does nothing else.
    #[arg(long)]
    in_time: bool,
}

const EDU: Requester = Requester { segment: 0, sid: SourceId::new(0, 1, 0) };
const MEMORY: usize = 64 << 20;
const PAGES: u64 = (MEMORY / PAGE) as u64;
/// Below 4 GiB, since VFIO cuts what is written to a register into words of 4 bytes, of which the edu takes the first;
/// and below the interrupt window. Every other page is mapped, so that nothing merges.
const FIRST: u64 = 1 << 28;
const STEP: u64 = 2 * PAGE as u64;
/// Where the edu writes what it read; the same page in both spaces.
const RESULT: u64 = FIRST - 0x10_0000;
const RESULT_PAGE: u64 = PAGES - 1;

struct Nobody;

impl Quarantine for Nobody {
    fn quarantine(&self, _: &[Requester], why: &str) -> Result<(), String> {
        Err(why.to_owned())
    }
    fn stop_machine(&self, _: &[Requester], why: &str) {
        eprintln!("host-spaces: an unmap failed: {why}");
        std::process::exit(1);
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let memory = DmaMemory::new(MEMORY, Backing::Base)?;
    // SAFETY: the mapping stays to the end of the program, and all accesses to it are volatile.
    let region = unsafe { Region::ram(0, MEMORY as u64, memory.address(0), None) }?;
    let guest = GuestMap::new(vec![region])?;
    let by_iommufd = iommufd(&arguments, &memory, &guest)?;
    let by_type1 = type1(&arguments, &guest)?;
    cost_of_type1(&arguments, &memory, &guest)?;
    let times = by_type1.as_nanos() / by_iommufd.as_nanos().max(1);
    println!("switch: {by_type1:?} on type1, {by_iommufd:?} on iommufd: {times} times");
    ensure!(times >= 50 || !arguments.in_time, "a switch on iommufd takes too long");
    Ok(())
}

fn space(domain: u16) -> SpaceKey {
    let tables = Tables::Second { root: Gpa(u64::from(domain) << 12), width: 48 };
    SpaceKey::Paged(PagedSpace { unit: UnitId(0), tables, domain: DomainId(domain) })
}

/// Scattered pages, which lead to the memory's from `shift` on. The first of them is the one that the edu reads.
fn scattered(count: u64, shift: u64) -> impl Iterator<Item = Mapping> {
    let page = move |i: u64| (i + shift) % (PAGES - 1) * PAGE as u64;
    let mapping =
        move |i| Mapping { iova: Iova(FIRST + i * STEP), gpa: Gpa(page(i)), len: PAGE as u64, perm: Perm::ReadWrite };
    (0..count).map(mapping)
}

fn iommufd(arguments: &Arguments, memory: &DmaMemory, guest: &GuestMap) -> Result<Duration> {
    let host = Arc::new(Iommufd::new(None, guest)?);
    ensure!(host.pins_once(), "this kernel does not copy parts of what is mapped");
    let checked = HostPaths::default().check_for_iommufd(arguments.edu)?;
    let edu = Edu::new(host.open(&checked)?)?;
    let took = switches(arguments, memory, guest, &host, edu, checked.group())?;
    cost(guest, &host, arguments.in_time)?;
    let bridge = Bridge::new(vec![host.clone()], guest.clone(), Arc::new(Nobody));
    bridge.register(EDU, checked.group())?;
    let start = Instant::now();
    bridge.attach(EDU.into(), &space(1), &mut scattered(arguments.mappings, 0)).context("all mappings")?;
    let held = bridge.stats(EDU).context("statistics")?.live_extents;
    ensure!(held == arguments.mappings, "{held} extents are held");
    println!("iommufd: {held} mappings in one space, in {:?}", start.elapsed());
    let start = Instant::now();
    bridge.attach(EDU.into(), &SpaceKey::Blocked, &mut std::iter::empty())?;
    println!("iommufd: all gone in {:?}", start.elapsed());
    Ok(took)
}

/// The longest of the switches, with the edu reading all the while.
fn switches(
    arguments: &Arguments,
    memory: &DmaMemory,
    guest: &GuestMap,
    host: &Arc<Iommufd>,
    edu: Edu,
    group: GroupId,
) -> Result<Duration> {
    let fill = |shift| -> Result<HostSpaceId> {
        let space = host.create()?;
        for Mapping { iova, gpa, len, perm } in scattered(arguments.extents, shift) {
            host.map(space, iova.0, guest.host_mem(gpa.0, len).context("memory")?, perm)?;
        }
        let result = guest.host_mem(RESULT_PAGE * PAGE as u64, PAGE as u64).context("memory")?;
        host.map(space, RESULT, result, Perm::ReadWrite)?;
        Ok(space)
    };
    let spaces = [fill(0)?, fill(1)?];
    // Pages 0 and 1 are what the two spaces have at the same IOVA.
    memory.write(0, &[0x11; PAGE]);
    memory.write(PAGE, &[0x22; PAGE]);
    for space in [spaces[0], spaces[1]] {
        let start = Instant::now();
        host.attach(group, space)?;
        println!("iommufd: the first attach to a space of {} extents: {:?}", arguments.extents, start.elapsed());
    }
    let (mut seen, mut blocked_reads) = ([0u32; 2], 0);
    let mut times = thread::scope(|scope| -> Result<Vec<Duration>> {
        let switching = scope.spawn(|| -> std::io::Result<Vec<Duration>> {
            let switch = |i: u32| {
                let start = Instant::now();
                host.attach(group, spaces[i as usize % 2])?;
                let took = start.elapsed();
                // The edu's reads take 100 ms each: they come at any moment of a switch, or between two.
                thread::sleep(Duration::from_micros(u64::from(1000 + i * 7 % 2000)));
                Ok(took)
            };
            (0..arguments.switches).map(switch).collect()
        });
        while !switching.is_finished() {
            edu.copy_page(FIRST, RESULT)?;
            let page = memory.read(RESULT_PAGE as usize * PAGE, PAGE);
            // Linux's driver of VT-d blocks a function for the moment of an attach. What the bench's edu asks for then
            // is 0, in words of 4 bytes from the first one on; all later ones are there again.
            let blocked = page.chunks(4).take_while(|word| *word == [0; 4]).count();
            blocked_reads += u32::from(blocked > 0);
            let rest = &page[4 * blocked..];
            let Some(first) = rest.first() else { continue };
            let which = [0x11, 0x22].iter().position(|byte| rest.iter().all(|b| b == byte));
            seen[which.with_context(|| format!("the edu saw {first:#x} and others"))?] += 1;
        }
        Ok(switching.join().expect("the switches")?)
    })?;
    drop(edu);
    ensure!(seen.iter().sum::<u32>() >= 5, "only {seen:?} reads");
    times.sort_unstable();
    let (middle, longest) = (times[times.len() / 2], *times.last().context("a switch")?);
    println!("iommufd: {} switches: {middle:?}, at most {longest:?}; the edu saw {seen:?}", times.len());
    println!("iommufd: {blocked_reads} reads were blocked in the moment of an attach");
    ensure!(middle <= Duration::from_millis(1) || !arguments.in_time, "a switch takes too long");
    host.detach(group)?;
    spaces.into_iter().for_each(|space| host.destroy(space));
    Ok(middle)
}

fn type1(arguments: &Arguments, guest: &GuestMap) -> Result<Duration> {
    let host = Arc::new(Type1::new(None));
    let checked = HostPaths::default().check(arguments.edu)?;
    let _function = host.open(&checked)?;
    let room = host.limits_of(checked.group()).context("open")?.entries;
    let bridge = Bridge::new(vec![host], guest.clone(), Arc::new(Nobody));
    bridge.register(EDU, checked.group())?;
    let mut took = Duration::MAX;
    bridge.attach(EDU.into(), &space(1), &mut scattered(arguments.extents, 0))?;
    for (domain, shift) in [(2, 1), (1, 0), (2, 1)] {
        let start = Instant::now();
        bridge.attach(EDU.into(), &space(domain), &mut scattered(arguments.extents, shift))?;
        took = took.min(start.elapsed());
    }
    let refused = match bridge.attach(EDU.into(), &space(3), &mut scattered(arguments.mappings, 0)) {
        Err(AttachRefused::Partial(refused)) => refused,
        other => anyhow::bail!("{} mappings in a container of {room}: {other:?}", arguments.mappings),
    };
    ensure!(refused.iter().all(|refusal| refusal.cause == RefusalCause::Limit), "another cause than the limit");
    let held = bridge.stats(EDU).context("statistics")?.live_extents;
    ensure!(held == room && held + refused.len() as u64 == arguments.mappings, "{held} of {room} are held");
    println!("type1: {held} mappings in one container, {} refused", refused.len());
    Ok(took)
}

/// A map and an unmap of a page by iommufd's backend, and by the bare system calls.
fn cost(guest: &GuestMap, host: &Iommufd, in_time: bool) -> Result<()> {
    const ROUNDS: usize = 15;
    let (bare, space) = (bare::Bare::new(guest)?, host.create()?);
    let mut least = Least::default();
    for _ in 0..ROUNDS {
        least.ours(|| by_backend(host, space, guest))?;
        least.bare(|| {
            pages_apart().try_for_each(|iova| bare.copy(iova))?;
            Ok(pages_apart().try_for_each(|iova| bare.unmap(iova))?)
        })?;
    }
    host.destroy(space);
    least.compare("iommufd", in_time)
}

/// The same of type1. The container is another one each time, since a group is in one only.
fn cost_of_type1(arguments: &Arguments, memory: &DmaMemory, guest: &GuestMap) -> Result<()> {
    const ROUNDS: usize = 10;
    let mut least = Least::default();
    for _ in 0..ROUNDS {
        let host = Type1::new(None);
        let checked = HostPaths::default().check(arguments.edu)?;
        let function = host.open(&checked)?;
        let Some(Placement::PerGroup(space)) = host.placement(checked.group()) else {
            anyhow::bail!("{} has no container", arguments.edu);
        };
        least.ours(|| by_backend(&host, space, guest))?;
        drop((function, host));
        let bare = Container::open(&arguments.edu.to_string())?;
        let _device = bare.device(&arguments.edu.to_string())?;
        least.bare(|| {
            pages_apart().try_for_each(|iova| bare.map(iova, memory, 0, PAGE, Access::ReadWrite))?;
            Ok(pages_apart().try_for_each(|iova| bare.unmap(iova, PAGE as u64).map(drop))?)
        })?;
    }
    least.compare("type1", arguments.in_time)
}

/// Pages that are mapped and unmapped to know what one costs.
const COST_PAGES: u64 = 2_000;

fn pages_apart() -> impl Iterator<Item = u64> {
    (0..COST_PAGES).map(|i| FIRST + i * STEP)
}

fn by_backend(host: &dyn HostIommu, space: HostSpaceId, guest: &GuestMap) -> Result<()> {
    let mem = guest.host_mem(0, PAGE as u64).context("memory")?;
    pages_apart().try_for_each(|iova| host.map(space, iova, mem, Perm::ReadWrite))?;
    let mut pages = pages_apart().map(|first| UnmapRange::Span { first, last: first + (PAGE as u64 - 1) });
    Ok(pages.try_for_each(|page| host.unmap(space, page).map(drop))?)
}

/// The shortest times of several rounds, by turns.
struct Least {
    ours: Duration,
    bare: Duration,
}

impl Default for Least {
    fn default() -> Self {
        Self { ours: Duration::MAX, bare: Duration::MAX }
    }
}

impl Least {
    fn ours(&mut self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.ours = self.ours.min(time(work)?);
        Ok(())
    }

    fn bare(&mut self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.bare = self.bare.min(time(work)?);
        Ok(())
    }

    fn compare(&self, name: &str, in_time: bool) -> Result<()> {
        let percent = self.ours.as_nanos() * 100 / self.bare.as_nanos();
        let [ours, bare] = [self.ours, self.bare].map(|time| time / COST_PAGES as u32);
        println!("{name}: a page mapped and unmapped in {ours:?}, by the bare calls in {bare:?}: {percent} percent");
        ensure!(percent <= 110 || !in_time, "{name}: a page by the backend costs {percent} percent of the bare calls");
        Ok(())
    }
}

fn time(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

/// The device, through the bridge's function.
struct Edu(HostFunction);

const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 6;
const DMA_SOURCE: u64 = 0x80;
const DMA_DESTINATION: u64 = 0x88;
const DMA_COUNT: u64 = 0x90;
const DMA_COMMAND: u64 = 0x98;
const BUFFER: u64 = 0x4_0000;

impl Edu {
    fn new(function: HostFunction) -> Result<Self> {
        function.write(RegionKind::Config, COMMAND, &MEMORY_AND_MASTER.to_le_bytes())?;
        Ok(Self(function))
    }

    /// The device reads the page at `from` and writes it to `to`.
    fn copy_page(&self, from: u64, to: u64) -> Result<()> {
        self.dma(from, BUFFER, 1)?;
        self.dma(BUFFER, to, 3)
    }

    fn dma(&self, source: u64, destination: u64, command: u64) -> Result<()> {
        let words =
            [(DMA_SOURCE, source), (DMA_DESTINATION, destination), (DMA_COUNT, PAGE as u64), (DMA_COMMAND, command)];
        for (register, value) in words {
            self.0.write(RegionKind::Bar(0), register, &value.to_le_bytes())?;
        }
        let start = Instant::now();
        loop {
            let mut command = [0; 8];
            self.0.read(RegionKind::Bar(0), DMA_COMMAND, &mut command);
            if u64::from_le_bytes(command) & 1 == 0 {
                return Ok(());
            }
            ensure!(start.elapsed() < Duration::from_secs(20), "the edu does not end its DMA");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
