//! Drives an edu function through this kernel's VFIO type1 and says whether its DMA reached exactly what was mapped.
//!
//! One scenario a run. Each line of output names the scenario; exit code 0 if everything held, 1 if not, 2 for usage.
//! Memory is "reached" if its bytes changed, or came out of the device: the device itself never reports a fault.

mod arguments;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use arguments::{Arguments, Scenario};
use clap::Parser;
use guest_programs::affinity::{Interrupt, wait_for_handlers};
use guest_programs::edu::{self, BUFFER_SIZE, Direction, Edu};
use guest_programs::kernel_log::KernelLog;
use guest_programs::memory::{Backing, DmaMemory, PAGE, pattern};
use guest_programs::random::Random;
use guest_programs::vfio::{self, Access, Container};

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let bdf = arguments.bdf.map_or_else(|| vfio::find_function(edu::VENDOR, edu::DEVICE), Ok)?;
    vfio::bind(&bdf)?;
    let container = Container::open(&bdf)?;
    let edu = Edu::new(container.device(&bdf)?).with_context(|| format!("{bdf} is not an edu"))?;
    let bench = Bench { bdf, container, edu, iova: arguments.iova, expect_fault: arguments.expect_fault };
    match arguments.scenario {
        Scenario::Roundtrip => bench.roundtrip(),
        Scenario::Msi => bench.msi(),
        Scenario::MsiByDma => bench.msi_by_dma(),
        Scenario::Message { address, data } => bench.message(address, u32::try_from(data)?),
        Scenario::Outside => bench.outside(),
        Scenario::Armed => bench.armed(),
        Scenario::Readonly => bench.readonly(),
        Scenario::Big => bench.big(),
        Scenario::Busy { until, at_home_from } => bench.busy(&until, at_home_from.as_deref()),
        Scenario::Loop { steps, seed } => bench.random_loop(steps, seed),
        Scenario::Crowded { pieces, huge } => bench.crowded(pieces, huge),
        Scenario::Storm { moves, twice } => bench.storm(moves, twice),
    }
}

/// Interrupts that are being raised.
#[derive(Default)]
struct Raising {
    handled: AtomicU64,
    over: AtomicBool,
}

impl Raising {
    fn handled(&self) -> u64 {
        self.handled.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Waits until something is so; false if the end comes before.
    fn until(&self, mut so: impl FnMut() -> Result<bool>) -> Result<bool> {
        while !self.is_over() {
            if so()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Moves the interrupt away from one of the first two processors: from where to where.
    fn move_on(&self, interrupt: &Interrupt, moves: u64) -> Result<Option<(usize, usize)>> {
        let (old, new) = if moves.is_multiple_of(2) { (0, 1) } else { (1, 0) };
        let moved = self.until(|| {
            interrupt.ask_for(new)?;
            interrupt.is_at(new)
        })?;
        Ok(moved.then_some((old, new)))
    }
}

const PAGE_LEN: u64 = PAGE as u64;
const FAULT_WAIT: Duration = Duration::from_secs(1);
const MOVE_DEADLINE: Duration = Duration::from_secs(10);
const FAULT_DEADLINE: Duration = Duration::from_secs(20);

struct Bench {
    bdf: String,
    container: Container,
    edu: Edu,
    iova: u64,
    expect_fault: bool,
}

impl Bench {
    /// Fills the device's buffer with `data`, through a mapping at `iova` that is gone afterwards.
    fn load(&self, iova: u64, data: &[u8]) -> Result<()> {
        let memory = DmaMemory::new(PAGE, Backing::Base)?;
        memory.write(0, data);
        self.container.map(iova, &memory, 0, PAGE, Access::ReadWrite).context("MAP_DMA")?;
        self.edu.dma(Direction::FromMemory, iova, data.len())?;
        self.unmap_whole(iova, PAGE_LEN)
    }

    /// What the device's buffer holds, through a mapping at `iova` that is gone afterwards.
    fn unload(&self, iova: u64) -> Result<Vec<u8>> {
        let memory = DmaMemory::new(PAGE, Backing::Base)?;
        self.container.map(iova, &memory, 0, PAGE, Access::ReadWrite).context("MAP_DMA")?;
        self.edu.dma(Direction::ToMemory, iova, BUFFER_SIZE)?;
        self.unmap_whole(iova, PAGE_LEN)?;
        Ok(memory.read(0, BUFFER_SIZE))
    }

    /// The device still reaches what is mapped: without this, a device that does nothing would pass for one that is
    /// confined.
    fn still_works(&self, iova: u64) -> Result<()> {
        let data = pattern(201, PAGE);
        self.load(iova, &data)?;
        ensure!(self.unload(iova)? == data, "the device does not reach memory that is mapped for it");
        Ok(())
    }

    fn unmap_whole(&self, iova: u64, size: u64) -> Result<()> {
        let unmapped = self.container.unmap(iova, size).context("UNMAP_DMA")?;
        ensure!(unmapped == size, "UNMAP_DMA of {size:#x} bytes at {iova:#x} took away {unmapped:#x}");
        Ok(())
    }

    /// Runs `dma`, which must be blocked at `iova`. If its fault is expected in the log, runs it until the line is
    /// there: Linux prints three faults in 5 s and drops the others.
    fn blocked(&self, iova: u64, dma: impl Fn() -> Result<()>) -> Result<()> {
        if !self.expect_fault {
            return dma();
        }
        let device = format!("[{}]", self.bdf.split_once(':').context("a BDF without segment")?.1);
        let address = format!("fault addr {iova:#x} ");
        let mut log = KernelLog::from_now()?;
        let start = Instant::now();
        loop {
            dma()?;
            match log.wait_for(&["DMAR:", &device, &address], FAULT_WAIT) {
                Ok(line) => {
                    println!("fault: {line}");
                    return Ok(());
                }
                Err(e) if start.elapsed() > FAULT_DEADLINE => return Err(e),
                Err(_) => {}
            }
        }
    }

    fn roundtrip(&self) -> Result<()> {
        let memory = DmaMemory::new(2 * PAGE, Backing::Base)?;
        let data = pattern(3, PAGE);
        memory.write(0, &data);
        self.container.map(self.iova, &memory, 0, 2 * PAGE, Access::ReadWrite).context("MAP_DMA")?;
        self.edu.dma(Direction::FromMemory, self.iova, PAGE)?;
        self.edu.dma(Direction::ToMemory, self.iova + PAGE_LEN, PAGE)?;
        ensure!(memory.read(PAGE, PAGE) == data, "the second page does not hold what the first one does");
        ensure!(memory.read(0, PAGE) == data, "the first page changed");
        self.unmap_whole(self.iova, 2 * PAGE_LEN)?;
        println!("roundtrip: {PAGE} bytes through {:#x} came back", self.iova);
        Ok(())
    }

    fn msi(&self) -> Result<()> {
        let memory = DmaMemory::new(PAGE, Backing::Base)?;
        self.container.map(self.iova, &memory, 0, PAGE, Access::ReadWrite).context("MAP_DMA")?;
        self.edu.check_msi(self.iova)
    }

    fn msi_by_dma(&self) -> Result<()> {
        let eventfd = self.edu.enable_msi()?;
        let (address, data) = vfio::msi_message(&self.bdf)?;
        for _ in 0..2 {
            self.message(address, data)?;
            self.edu.expect_interrupt(&eventfd, 0)?;
        }
        // One that came twice would be counted now.
        self.edu.interrupt(&eventfd)?;
        println!("msi-by-dma: {data:#x} at {address:#x} arrived twice, for two");
        Ok(())
    }

    fn message(&self, address: u64, data: u32) -> Result<()> {
        self.load(self.iova, &data.to_le_bytes())?;
        self.edu.dma(Direction::ToMemory, address, size_of::<u32>())
    }

    fn outside(&self) -> Result<()> {
        let memory = DmaMemory::new(PAGE, Backing::Base)?;
        let secret = pattern(11, PAGE);
        memory.write(0, &secret);
        self.container.map(self.iova, &memory, 0, PAGE, Access::ReadWrite).context("MAP_DMA")?;
        let known = pattern(77, PAGE);
        let spare = self.iova + 16 * PAGE_LEN;
        // The page's own physical address is the IOVA that would reach it if nothing translated.
        let physical = memory.physical_address(0)?;
        ensure!(physical != self.iova, "the page's physical address is the IOVA by chance: choose another --iova");
        for (what, iova) in [("the page after the mapping", self.iova + PAGE_LEN), ("its physical address", physical)] {
            self.load(spare, &known)?;
            self.blocked(iova, || self.edu.dma(Direction::ToMemory, iova, PAGE))?;
            ensure!(memory.read(0, PAGE) == secret, "a device write to {what} ({iova:#x}) changed the memory");
            println!("outside: write to {what} ({iova:#x}) changed nothing");

            self.load(spare, &known)?;
            self.blocked(iova, || self.edu.dma(Direction::FromMemory, iova, PAGE))?;
            ensure!(self.unload(spare)? != secret, "a device read of {what} ({iova:#x}) got the memory");
            println!("outside: read of {what} ({iova:#x}) got nothing of it");
        }
        self.still_works(spare)
    }

    fn armed(&self) -> Result<()> {
        let spare = self.iova + 16 * PAGE_LEN;
        self.load(spare, &pattern(42, PAGE))?;
        let memory = DmaMemory::new(PAGE, Backing::Base)?;
        let before = pattern(5, PAGE);
        memory.write(0, &before);
        let map = || self.container.map(self.iova, &memory, 0, PAGE, Access::ReadWrite).context("MAP_DMA");

        map()?;
        self.edu.program(Direction::ToMemory, self.iova, PAGE);
        self.unmap_whole(self.iova, PAGE_LEN)?;
        self.blocked(self.iova, || {
            self.edu.start(Direction::ToMemory);
            self.edu.wait()
        })?;
        ensure!(memory.read(0, PAGE) == before, "DMA programmed before UNMAP and fired after it changed the memory");
        println!("armed: programmed while mapped, fired after UNMAP: memory unchanged");

        // The doorbell comes first and UNMAP while the DMA is pending: whatever it has not written when UNMAP returns,
        // it must not write later.
        map()?;
        self.edu.program(Direction::ToMemory, self.iova, PAGE);
        self.edu.start(Direction::ToMemory);
        self.unmap_whole(self.iova, PAGE_LEN)?;
        let at_return = memory.read(0, PAGE);
        let pending = self.edu.busy() && at_return == before;
        self.edu.wait()?;
        ensure!(memory.read(0, PAGE) == at_return, "DMA in flight changed the memory after UNMAP returned");
        let when = if pending { "still pending" } else { "already done" };
        println!("armed: fired while mapped, {when} when UNMAP returned: memory unchanged since");
        self.still_works(spare)
    }

    fn readonly(&self) -> Result<()> {
        let memory = DmaMemory::new(PAGE, Backing::Base)?;
        let data = pattern(19, PAGE);
        memory.write(0, &data);
        let spare = self.iova + 16 * PAGE_LEN;
        let map = || self.container.map(self.iova, &memory, 0, PAGE, Access::ReadOnly).context("MAP_DMA");
        map()?;
        self.edu.dma(Direction::FromMemory, self.iova, PAGE)?;
        ensure!(self.unload(spare)? == data, "the device could not read the read-only mapping");
        println!("readonly: the device read the mapping");

        // QEMU's unit reports no fault for a write that meets the cached translation of a read.
        self.unmap_whole(self.iova, PAGE_LEN)?;
        map()?;
        self.load(spare, &pattern(99, PAGE))?;
        self.blocked(self.iova, || self.edu.dma(Direction::ToMemory, self.iova, PAGE))?;
        ensure!(memory.read(0, PAGE) == data, "the device wrote the read-only mapping");
        println!("readonly: the device's write changed nothing");
        self.still_works(spare)?;
        self.unmap_whole(self.iova, PAGE_LEN)
    }

    fn big(&self) -> Result<()> {
        const SPAN: u64 = 1 << 30;
        let iova = self.iova.next_multiple_of(SPAN).max(SPAN);
        let (memory, backing) = [Backing::Huge1G, Backing::Huge2M, Backing::Base]
            .into_iter()
            .find_map(|b| {
                let len = if b == Backing::Huge1G { 1 << 30 } else { 2 << 20 };
                DmaMemory::new(len, b).ok().map(|m| (m, b))
            })
            .context("no memory")?;
        let len = memory.len() as u64;
        // The same memory over and over: the IOVA space is full, the guest's memory is not.
        let map_all = || (0..SPAN / len).try_for_each(|i| self.map_at(iova + i * len, &memory));
        let places = [0, SPAN / 2 - PAGE_LEN, SPAN / 2, SPAN - PAGE_LEN];
        let in_memory = |place: u64| usize::try_from(place % len).context("an offset inside the memory");
        let spare = iova - PAGE_LEN;

        let reaches = |place: u64, seed: u8| -> Result<bool> {
            let data = pattern(seed, PAGE);
            self.load(spare, &data)?;
            memory.write(in_memory(place)?, &pattern(seed.wrapping_add(1), PAGE));
            self.edu.dma(Direction::ToMemory, iova + place, PAGE)?;
            Ok(memory.read(in_memory(place)?, PAGE) == data)
        };

        map_all()?;
        for (seed, place) in (20..).step_by(2).zip(places) {
            ensure!(reaches(place, seed)?, "the device did not reach {:#x}", iova + place);
        }
        println!("big: {SPAN:#x} bytes at {iova:#x} mapped in pieces of {len:#x} ({backing:?}), reached at 4 places");
        self.unmap_whole(iova, SPAN)?;
        for (seed, place) in (40..).step_by(2).zip(places) {
            ensure!(!reaches(place, seed)?, "the device reached {:#x} after UNMAP", iova + place);
        }
        println!("big: unmapped whole, reached nowhere");

        if len < SPAN {
            map_all()?;
            self.unmap_whole(iova, SPAN / 2)?;
            for (seed, place) in (60..).step_by(2).zip(places) {
                let mapped = place >= SPAN / 2;
                ensure!(reaches(place, seed)? == mapped, "with the lower half unmapped, {:#x} is wrong", iova + place);
            }
            self.unmap_whole(iova + SPAN / 2, SPAN / 2)?;
            println!("big: lower half unmapped, upper half still reached");
        }
        Ok(())
    }

    fn crowded(&self, pieces: u64, huge: bool) -> Result<()> {
        ensure!(pieces >= 4 && pieces.is_multiple_of(2), "an even number of mappings, at least 4");
        let (len, backing) = if huge { (2 << 20, Backing::Huge2M) } else { (PAGE, Backing::Base) };
        let memory = DmaMemory::new(2 * len, backing).context("memory to map")?;
        let start = self.iova.next_multiple_of(2 << 20);
        // With a gap between them, and the same two pieces of memory over and over.
        let at = |piece: u64| start + piece * 2 * len as u64;
        let map = |piece: u64| {
            let offset = (piece % 2) as usize * len;
            self.container
                .map(at(piece), &memory, offset, len, Access::ReadWrite)
                .with_context(|| format!("MAP_DMA of piece {piece}"))
        };
        // Whether what the device reads in the first piece arrives in the memory of an odd piece.
        let reaches = |odd: u64, seed: u8| -> Result<bool> {
            let data = pattern(seed, PAGE);
            memory.write(0, &data);
            memory.write(len, &pattern(seed.wrapping_add(1), PAGE));
            self.edu.dma(Direction::FromMemory, at(0), PAGE)?;
            self.edu.dma(Direction::ToMemory, at(odd), PAGE)?;
            Ok(memory.read(len, PAGE) == data)
        };
        (0..pieces).try_for_each(map)?;
        ensure!(reaches(1, 10)?, "the device does not reach what was mapped first");
        ensure!(!reaches(pieces - 1, 20)?, "the device reaches the last piece: the host took all of them");
        println!("crowded: {pieces} mappings of {len:#x} bytes: the first is reached, the last is not");
        let half = pieces / 2;
        self.unmap_whole_pieces(at(half), at(pieces - 1) + len as u64, half * len as u64)?;
        (2..half).try_for_each(|piece| self.unmap_whole(at(piece), len as u64))?;
        map(pieces - 1)?;
        ensure!(reaches(pieces - 1, 30)?, "the device does not reach what was mapped when there was room again");
        ensure!(reaches(1, 40)?, "the device does not reach what was mapped first any more");
        println!("crowded: after unmapping, the last is mapped again and reached");
        Ok(())
    }

    /// Unmaps all between `from` and `to`, which is `size` bytes of mappings.
    fn unmap_whole_pieces(&self, from: u64, to: u64, size: u64) -> Result<()> {
        let unmapped = self.container.unmap(from, to - from).context("UNMAP_DMA")?;
        ensure!(unmapped == size, "UNMAP_DMA from {from:#x} to {to:#x} took away {unmapped:#x} instead of {size:#x}");
        Ok(())
    }

    fn storm(&self, moves: u64, may_be_twice: u64) -> Result<()> {
        const CHECKED: usize = 64;
        let mut twice = 0;
        let eventfd = self.edu.enable_msi()?;
        let interrupt = Interrupt::of_function(&self.bdf)?;
        for processor in (0..2).cycle().take(CHECKED) {
            let start = Instant::now();
            interrupt.ask_for(processor)?;
            // A move is finished by the first interrupt after it; one that is asked for before waits for another
            // interrupt.
            while !interrupt.is_at(processor)? {
                ensure!(start.elapsed() < MOVE_DEADLINE, "the interrupt does not move to processor {processor}");
                twice += self.edu.count_interrupt(&eventfd)? - 1;
                interrupt.ask_for(processor)?;
            }
            // As in `raise_while`: one that meets the handler of the one before is not counted.
            wait_for_handlers()?;
            let mut expected = interrupt.arrived()?;
            let count = self.edu.count_interrupt(&eventfd)?;
            twice += count - 1;
            expected[processor] += count;
            let arrived = interrupt.arrived()?;
            ensure!(arrived == expected, "moved to processor {processor}: {arrived:?} arrived instead of {expected:?}");
        }
        println!("storm: {CHECKED} moves, and each time the interrupt arrived at its new processor and at no other");

        let watch = |raising: &Raising| {
            for moves in 0..CHECKED as u64 {
                let Some((old, new)) = raising.move_on(&interrupt, moves)? else { break };
                // Whatever was raised before one that arrived at the new processor has been handled: interrupts are
                // raised one by one. From here on the old processor has no more of them.
                let before = interrupt.arrived()?;
                raising.until(|| Ok(interrupt.arrived()?[new] > before[new]))?;
                let (before, handled) = (interrupt.arrived()?[old], raising.handled());
                raising.until(|| Ok(raising.handled() >= handled + 5))?;
                let after = interrupt.arrived()?[old];
                ensure!(after == before, "{} more at processor {old} after the move to {new}", after - before);
            }
            Ok(())
        };
        let (raised, (), arrived) = self.raise_while(&eventfd, &interrupt, false, &mut twice, watch)?;
        println!(
            "storm: {raised} interrupts, {CHECKED} moves, and after none of them one more at the old processor: {arrived:?}"
        );

        // Most of what is asked for waits for an interrupt, and something else is asked for meanwhile.
        let storm = |moves: u64| {
            move |raising: &Raising| {
                let (mut asked, mut moved, mut was_first) = (0u64, 0, interrupt.is_at(0)?);
                while moved < moves && !raising.is_over() {
                    interrupt.ask_for(asked as usize % 2)?;
                    asked += 1;
                    let is_first = interrupt.is_at(0)?;
                    moved += u64::from(is_first != was_first);
                    was_first = is_first;
                }
                Ok(asked)
            }
        };
        let before = twice;
        let (raised, asked, arrived) = self.raise_while(&eventfd, &interrupt, false, &mut twice, storm(moves))?;
        let signalled = raised + twice - before;
        ensure!(arrived.iter().sum::<u64>() <= signalled, "{raised} interrupts raised, {arrived:?} arrived");
        ensure!(arrived.iter().take(2).all(|&count| count > 0), "the storm did not move the interrupt: {arrived:?}");
        println!(
            "storm: {raised} interrupts during {moves} moves of {asked} asked for, each signalled once: {arrived:?}"
        );

        let (moves, before) = (moves.min(CHECKED as u64), twice);
        let (raised, asked, arrived) = self.raise_while(&eventfd, &interrupt, true, &mut twice, storm(moves))?;
        let signalled = raised + twice - before;
        ensure!(arrived.iter().sum::<u64>() == signalled, "{raised} interrupts raised, {arrived:?} arrived");
        ensure!(arrived.iter().take(2).all(|&count| count > 0), "the storm did not move the interrupt: {arrived:?}");
        println!(
            "storm: {raised} interrupts during {moves} moves of {asked} asked for, each counted once: {arrived:?}"
        );
        println!("twice: {twice}");
        ensure!(twice <= may_be_twice, "{twice} interrupts arrived twice");
        Ok(())
    }

    /// Raises interrupts one by one until `mover`, which moves them, is done: how many, what `mover` says, and how many
    /// arrived where. Each must come to `eventfd` before the next is raised; what comes more than once is added to
    /// `twice`.
    ///
    /// With `handled`, the next one is raised when the handler of the one before has returned, and not in the middle of
    /// it, where it signals the eventfd: an interrupt that meets its handler still running on the other processor makes
    /// it run once more there, and is not counted in the kernel's table (`handle_edge_irq`).
    fn raise_while<T: Send>(
        &self,
        eventfd: &OwnedFd,
        interrupt: &Interrupt,
        handled: bool,
        twice: &mut u64,
        mover: impl FnOnce(&Raising) -> Result<T> + Send,
    ) -> Result<(u64, T, Vec<u64>)> {
        let before = interrupt.arrived()?;
        let raising = Raising::default();
        let (raised, said) = std::thread::scope(|scope| {
            let mover = scope.spawn(|| mover(&raising));
            let mut result = Ok(());
            while result.is_ok() && !mover.is_finished() {
                let number = raising.handled();
                let count = self.edu.count_interrupt(eventfd);
                result =
                    count.map(|count| *twice += count - 1).with_context(|| format!("interrupt {number} of the storm"));
                if handled {
                    result = result.and_then(|()| wait_for_handlers());
                }
                raising.handled.fetch_add(1, Ordering::SeqCst);
            }
            raising.over.store(true, Ordering::SeqCst);
            let said = mover.join().map_err(|_| anyhow::anyhow!("the mover panicked"))?;
            result.and(said.map(|said| (raising.handled(), said)))
        })?;
        let arrived = interrupt.arrived()?.iter().zip(&before).map(|(after, before)| after - before).collect();
        Ok((raised, said, arrived))
    }

    fn map_at(&self, iova: u64, memory: &DmaMemory) -> Result<()> {
        self.container
            .map(iova, memory, 0, memory.len(), Access::ReadWrite)
            .with_context(|| format!("MAP_DMA at {iova:#x}"))
    }

    fn busy(&self, until: &Path, at_home_from: Option<&Path>) -> Result<()> {
        let mut pages = 0u64;
        println!("busy: begins");
        while !until.exists() {
            if at_home_from.is_some_and(Path::exists) {
                pages += self.busy_at_home(until)?;
                break;
            }
            self.still_works(self.iova + pages % 16 * PAGE_LEN)?;
            pages += 1;
        }
        ensure!(pages > 0, "{} was there before the first page", until.display());
        println!("busy: {pages} pages came back");
        Ok(())
    }

    /// How many pages went into the device and came back before `until` was there.
    fn busy_at_home(&self, until: &Path) -> Result<u64> {
        let (memory, elsewhere) = (DmaMemory::new(PAGE, Backing::Base)?, DmaMemory::new(PAGE, Backing::Base)?);
        self.container.map(self.iova, &elsewhere, 0, PAGE, Access::ReadWrite).context("MAP_DMA")?;
        ensure!(
            elsewhere.physical_address(0)? != self.iova,
            "a page is at {:#x} by chance: choose another --iova",
            self.iova
        );
        let home = memory.physical_address(0)?;
        self.container.map(home, &memory, 0, PAGE, Access::ReadWrite).context("MAP_DMA")?;
        // From here on it is pinned.
        ensure!(memory.physical_address(0)? == home, "the page moved before it was mapped");
        println!("busy: at home, {home:#x}");
        let mut pages = 0;
        while !until.exists() {
            let data = pattern(pages as u8, PAGE);
            memory.write(0, &data);
            self.edu.dma(Direction::FromMemory, home, PAGE)?;
            memory.write(0, &pattern(pages as u8 ^ 0x80, PAGE));
            self.edu.dma(Direction::ToMemory, home, PAGE)?;
            ensure!(memory.read(0, PAGE) == data, "the device does not reach its page at {home:#x}");
            pages += 1;
        }
        self.unmap_whole(home, PAGE_LEN)?;
        self.unmap_whole(self.iova, PAGE_LEN)?;
        Ok(pages)
    }

    fn random_loop(&self, steps: u32, seed: u64) -> Result<()> {
        const SLOTS: usize = 16;
        const SLOT_PAGES: usize = 64;
        let mut random = Random::new(seed);
        let memory = DmaMemory::new(SLOTS * SLOT_PAGES * PAGE, Backing::Base)?;
        // The pages that are mapped in each slot of the IOVA space, as (first page, pages).
        let mut slots: [Option<(usize, usize)>; SLOTS] = [None; SLOTS];
        let spare = self.iova - PAGE_LEN;
        let (mut reached, mut blocked) = (0, 0);
        for step in 0..steps {
            let slot = random.below(SLOTS);
            let at = |(first, _): (usize, usize)| (slot * SLOT_PAGES + first) * PAGE;
            match slots[slot].take() {
                Some(pages) => self.unmap_whole(self.iova + at(pages) as u64, (pages.1 * PAGE) as u64)?,
                None => {
                    let first = random.below(SLOT_PAGES);
                    let pages = (first, 1 + random.below(SLOT_PAGES - first));
                    self.container
                        .map(self.iova + at(pages) as u64, &memory, at(pages), pages.1 * PAGE, Access::ReadWrite)
                        .context("MAP_DMA")?;
                    slots[slot] = Some(pages);
                }
            }
            // The slot just touched, and now and then any other.
            let probed = if random.below(2) == 0 { slot } else { random.below(SLOTS) };
            let page = match slots[probed] {
                Some((first, count)) if random.below(4) != 0 => first + random.below(count),
                _ => random.below(SLOT_PAGES),
            };
            let mapped = slots[probed].is_some_and(|(first, count)| (first..first + count).contains(&page));
            let offset = (probed * SLOT_PAGES + page) * PAGE;
            let old = pattern(step as u8, PAGE);
            let new = pattern((step as u8).wrapping_add(128), PAGE);
            self.load(spare, &new)?;
            memory.write(offset, &old);
            self.edu.dma(Direction::ToMemory, self.iova + offset as u64, PAGE)?;
            let expected = if mapped { &new } else { &old };
            if memory.read(offset, PAGE) != *expected {
                bail!(
                    "step {step}: {:#x} is mapped: {mapped}, and the memory says otherwise",
                    self.iova + offset as u64
                );
            }
            *(if mapped { &mut reached } else { &mut blocked }) += 1;
        }
        println!("loop: {steps} steps from seed {seed}: {reached} reached as mapped, {blocked} blocked as unmapped");
        Ok(())
    }
}
