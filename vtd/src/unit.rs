//! The unit: dispatch of register accesses, and the command state machine.
//!
//! Locks, in this order: `spaces` (the [queue lock](crate::queue_lock): one drain, one command or one attach at a time;
//! the listener is called with it held), then `registers` (a few instructions at a time, never while the listener or
//! the message sink is called). Register reads take the second only, and so do writes that give no command: what a
//! fault handler does never waits behind another processor's drain, unless it makes a queue go on that had stopped, or
//! tails ring [bells](crate::TailBells), after which each write comes.
//! Emulated DMA takes neither, unless it has a fault to record (see [`crate::Endpoint`]).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use arc_swap::ArcSwap;
use vm_memory::GuestMemoryBackend;

use crate::ats::{AtsFunction, Functions};
use crate::audit::{Audit, AuditHost};
use crate::config::{ConfigError, UnitConfig};
use crate::core::Core;
use crate::ids::{Requester, SourceId};
use crate::listener::{AttachRefused, Mapping, SpaceListener};
use crate::msi::{Msi, MsiSink};
use crate::queue;
use crate::queue_lock::{QueueGuard, QueueLock};
use crate::range::{GpaRange, IovaRange};
use crate::registers::page::RegisterPage;
use crate::registers::restore::{self, RestoreError};
use crate::registers::saved_space::SpaceState;
use crate::registers::state::State;
use crate::registers::{Command, Registers};
use crate::scope::{context_scope_of, iotlb_scope_of};
use crate::shadow::{SpaceView, Spaces};
use crate::source_ids::Source;
use crate::space::{PagedSpace, SpaceKey};
use crate::spec::registers::{Global, offset as register};
use crate::stats::{Counters, UnitStats};
use crate::tables::context::Translation;
use crate::tables::interrupt::{Posting, RemapError, RemapFault, RemapListener, Remapped, Remapping, Sender};
use crate::tables::second_stage::{Found, Merge, walk_range};
use crate::tail_bells::TailBells;
use crate::tails;

/// An emulated remapping unit over guest memory `M`.
pub struct Unit<M> {
    pub(crate) core: Core<M>,
    spaces: QueueLock<Spaces>,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Unit<M> {
    /// A unit as it is at power-on. `listener` hears of every space that has assigned functions; `messages` delivers
    /// the unit's own interrupts.
    pub fn new(
        config: UnitConfig,
        memory: M,
        listener: Arc<dyn SpaceListener>,
        messages: Arc<dyn MsiSink>,
    ) -> Result<Arc<Self>, ConfigError> {
        config.validate()?;
        Ok(Arc::new(Self {
            core: Core {
                config,
                memory,
                listener,
                messages,
                registers: Mutex::new(Registers::new(config)),
                translation: ArcSwap::default(),
                sources: ArcSwap::default(),
                remapping: ArcSwap::from_pointee(Remapping::off(&config)),
                remap_listener: Mutex::default(),
                ats: Functions::default(),
                tail_bells: OnceLock::new(),
                counters: Counters::default(),
            },
            spaces: QueueLock::default(),
        }))
    }

    /// The description that it was built from; its capability registers follow from that.
    pub fn config(&self) -> &UnitConfig {
        &self.core.config
    }

    /// Reads registers at `offset` into the window: the bytes that are there, 8 at most, whatever the place.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.core.counters.register_reads.add(1);
        self.core.registers().read(offset, data);
    }

    /// `page` has what the registers read from now on, instead of the page before it: a guest may be given it to read
    /// in place of [`Self::read`]. What a write, a fault or a completion changes is there before the write returns, or
    /// before the message of the fault or the completion is sent.
    pub fn show_registers(&self, page: Arc<dyn RegisterPage>) {
        self.core.registers().show_in(page);
    }

    /// Writes registers at `offset` into the window. When it returns, the commands that it gave are done.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // Most writes do not wait for the lock, and some do: none is for a listener.
        self.spaces.assert_not_inside();
        let mut value = [0; 8];
        let Some(bytes) = value.get_mut(..data.len()) else { return };
        bytes.copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        // The queue lock first: between this register write and its command no other command comes. A tail that rang a
        // bell was written before.
        let after_tails = tails::may_wait(&self.core);
        let mut spaces = (after_tails || Registers::commands(offset, data.len())).then(|| self.spaces());
        let mut registers = self.core.registers();
        if spaces.is_none() && registers.resumes(offset, data.len(), value) {
            drop(registers);
            spaces = Some(self.spaces());
            registers = self.core.registers();
        }
        let outcome = registers.write(offset, data.len(), value);
        drop(registers);
        self.core.signal(outcome.message);
        let Some((spaces, command)) = spaces.as_deref_mut().zip(outcome.command) else { return };
        match command {
            Command::Global(value) => self.global_command(spaces, value),
            Command::Context => self.context_command(spaces),
            Command::Iotlb => self.iotlb_command(spaces),
            Command::Drain => {
                self.core.counters.tail_writes.add((offset == register::IQT).into());
                queue::drain(&self.core, spaces);
            }
            Command::Enhanced(command) => {
                let counting = self.core.registers().enhanced_command(command);
                spaces.set_counting(counting);
            }
        }
    }

    /// Tails that ring one of `bells` are as if they were written, from now on and for good. Only the first call
    /// counts.
    ///
    /// Whatever waits for a drain here serves them first, so they are in order with all that it does; somebody is to
    /// call [`Self::serve_tails`] besides, when one has rung. IQT reads what was written once that has been served.
    pub fn set_tail_bells(&self, bells: Arc<dyn TailBells>) {
        let _ = self.core.tail_bells.set(bells);
    }

    /// Serves the tails that rang a bell before this was called; when it returns, the commands that they gave are done.
    pub fn serve_tails(&self) {
        drop(self.spaces());
    }

    /// `requester`, an assigned function, is behind the unit: it is attached to what the guest's tables say, with every
    /// live mapping in place when this returns (B-5).
    ///
    /// # Errors
    /// The listener's, when it could not attach the function at all; it is then not behind the unit.
    pub fn add_requester(&self, requester: Requester) -> Result<(), AttachRefused> {
        self.spaces().add_requester(&self.core, requester)
    }

    /// `requester` is not behind the unit any more; nothing of it stays mapped.
    pub fn remove_requester(&self, requester: Requester) {
        self.spaces().remove_requester(&self.core, requester);
    }

    /// The requests of these functions carry these source ids from now on, `None` if no bus number leads to one: the
    /// guest wrote a bridge's secondary or subordinate bus number. When this returns, each assigned function is
    /// where the tables say about its new id, no access with an old one is under way, and every route of an interrupt
    /// was made again. All changes take effect together, so that functions may swap their ids.
    ///
    /// A function is named by the requester that it was added with, here and everywhere else, whatever its id is now;
    /// what the guest reads in fault records is the id. While functions share an id, or have none, and translation is
    /// on, they reach nothing, and their interrupts pass only entries that do not ask for the source. Ids are no state
    /// of the unit: they survive [`Self::reset`], and go with the bridges when a machine is saved and restored.
    ///
    /// Not to be called inside a [`crate::DmaSession`], which it would wait for.
    pub fn renumber(&self, changes: &[(Requester, Option<SourceId>)]) {
        self.spaces().renumber(&self.core, changes);
    }

    /// The function that is called `name` is behind a bridge that makes its requests in its own name: they carry the id
    /// of `alias` ([`Self::renumber`]), whatever that is, until the function is removed. Functions with one alias have
    /// one id together, and one context entry.
    ///
    /// To be called before the function is added. A bridge is a name like any other, of which nothing need be added.
    pub fn set_alias(&self, name: Requester, alias: Requester) {
        self.spaces().set_alias(&self.core, name, alias);
    }

    /// The source id of the requests of the function of this name; `None` while it has none.
    pub fn source_id(&self, name: Requester) -> Option<SourceId> {
        self.core.sources.load().of(name).id()
    }

    /// The guest-physical map changed in `range`: a BAR appeared, moved (that is two ranges) or went away (B-15). The
    /// map that the listener resolves guest-physical addresses with is exchanged first; the host may still have the old
    /// memory mapped then. When this returns, no assigned function in a paged space reaches what was behind `range`
    /// before, and every leaf of the guest's tables that leads there, and that the guest invalidated since it wrote it,
    /// was offered to the listener anew; what it refused is forgotten, as always. What leads elsewhere is not touched,
    /// not for an instant. A leaf that the guest changed and did not invalidate yet may take effect here if it leads
    /// into `range`, and is gone if it led there.
    ///
    /// A space of which nothing leads to `range` costs a look at its shadow. Another is walked, and blocked if the
    /// bounds do not allow to walk all of it. Functions that wait for room, or for memory, are tried again.
    ///
    /// Not here: functions in the identity space, of which only the listener knows what is in it; and emulated devices:
    /// what an [`crate::Endpoint`] caches are guest-physical addresses, and each access looks these up in the guest
    /// memory that the unit was made with, which is as it was.
    ///
    /// `range` is taken with all of the pages that it has a part of.
    pub fn memory_changed(&self, range: GpaRange) {
        self.spaces().memory_changed(&self.core, range.of_whole_pages());
    }

    /// Looks at `ranges` of what `requester` is attached to, and tells the listener what the tables say there now. A
    /// guest need not say what it adds where there is no Caching Mode (section 6.1): a function whose accesses are
    /// looked up in the listener's book looks here first for what it does not find, as hardware walks the tables for
    /// what no cache has. What it finds is held until the guest invalidates it. With Caching Mode this does nothing:
    /// the guest says everything.
    ///
    /// Ranges are taken with all of the pages that they have a part of. One look costs what an invalidation of these
    /// pages does, and no more than the bounds allow.
    ///
    /// Waits for a drain that is under way, so not to be called by whom that may wait for: with anything pinned, or
    /// inside a [`crate::DmaSession`].
    pub fn look_at(&self, requester: Requester, ranges: &[IovaRange]) {
        if !self.core.config.caching_mode {
            self.spaces().look_at(&self.core, requester, ranges);
        }
    }

    /// `function` is what device-TLB invalidations and page responses for `requester`, an emulated function, go to from
    /// now on; when it is gone they go nowhere, and invalidations time out.
    pub fn set_ats_function(&self, requester: Requester, function: Weak<dyn AtsFunction>) {
        self.core.ats.add(requester, function);
    }

    /// `listener` hears of every change to interrupt remapping from now on, instead of the one before it. The unit
    /// keeps it alive: it should hold the unit weakly.
    pub fn set_remap_listener(&self, listener: Arc<dyn RemapListener>) {
        *self.core.remap_listener.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(listener);
    }

    /// What becomes of it when `requester` sends `msi`, as the guest's tables say now: to make a route of it, or to
    /// [post](Self::post) it when it fires, until [`RemapListener::entries_changed`] says that it is to be asked again.
    /// Takes no lock; records nothing.
    ///
    /// In the address, bits 63:40 are bits 31:8 of the destination, as KVM takes it with KVM_X2APIC_API_USE_32BIT_IDS.
    ///
    /// # Errors
    /// The message is not delivered. If it fires all the same, its fault is to be given to
    /// [`Self::record_remap_fault`], or the message to [`Self::deliver`], which asks again.
    pub fn remap(&self, requester: Requester, msi: Msi) -> Result<Remapped, RemapError> {
        let source = self.core.sources.load().of(requester);
        let checked = self.core.config.unchecked_source != Some(requester.sid);
        let sender = Sender { requester: source.seen(requester), known: source.own().is_some(), checked };
        let remapped = self.core.remapping.load().remap(&self.core.memory, sender, msi);
        if source != Source::None {
            return remapped;
        }
        // There is no id to record a fault with.
        match remapped {
            Err(RemapError::Fault(fault)) => Err(RemapFault { silenced: true, ..fault }.into()),
            Ok(Remapped::Posted(posting)) => Ok(Remapped::Posted(Posting { silenced: true, ..posting })),
            other => other,
        }
    }

    /// `requester` sends `msi` now: as [`Self::remap`], but it is posted if that is what its entry says, and a fault is
    /// recorded. Gives what the processors get: nothing if it is posted and nobody is to be notified.
    ///
    /// # Errors
    /// The message is not delivered.
    pub fn deliver(&self, requester: Requester, msi: Msi) -> Result<Option<Msi>, RemapError> {
        let remapped = self.remap(requester, msi).inspect_err(|error| {
            if let RemapError::Fault(fault) = error {
                self.record_remap_fault(fault);
            }
        });
        match remapped? {
            Remapped::Message(msi) => Ok(Some(msi)),
            Remapped::Posted(posting) => Ok(self.post(&posting)?),
        }
    }

    /// A message that [`Self::remap`] said is posted fires: it is recorded in its descriptor. Gives the
    /// notification that a processor is to get, if one is owed. What the descriptor says is looked at now; what the
    /// entry said is as it was when it was looked up.
    ///
    /// # Errors
    /// The descriptor has a reserved bit set, or is not in memory; that fault is recorded.
    pub fn post(&self, posting: &Posting) -> Result<Option<Msi>, RemapFault> {
        let notification = posting.post(&self.core.memory).inspect_err(|fault| self.record_remap_fault(fault))?;
        self.core.counters.interrupts_posted.add(1);
        self.core.counters.notifications.add(notification.is_some().into());
        Ok(notification)
    }

    /// An interrupt that [`Self::remap`] refused with `fault` fired. Never to be called for one that did not: Windows
    /// stops at a fault that no device made.
    pub fn record_remap_fault(&self, fault: &RemapFault) {
        self.core.record_remap_fault(fault);
    }

    /// Power-on state: translation and interrupt remapping off, every function in the identity space. Functions
    /// must be quiet before (rule 12).
    pub fn reset(&self) {
        let mut spaces = self.spaces();
        tails::tell(&self.core, None);
        self.core.registers().state.reset();
        self.core.translation.store(Arc::default());
        self.core.set_remapping(Remapping::off(&self.core.config));
        spaces.forget_reports();
        spaces.set_counting(false);
        spaces.refresh(&self.core);
    }

    /// The registers, to be saved, with the boundaries of what the listener was told. Waits for a drain.
    pub fn save(&self) -> State {
        let spaces = self.spaces();
        let saved = spaces.saved();
        State { spaces: saved, ..self.core.registers().state.clone() }
    }

    /// Puts saved registers back, and attaches every function to what the guest's tables say. Guest memory must
    /// be in place. Descriptors between head and tail are processed.
    ///
    /// # Errors
    /// The state has another version, or is none that a unit of this configuration can be in. Then nothing changed.
    pub fn restore(&self, mut state: State) -> Result<(), RestoreError> {
        let mut spaces = self.spaces();
        state.check(&self.core.config)?;
        let told = self.told_before(std::mem::take(&mut state.spaces))?;
        tails::tell(&self.core, None);
        let status = state.global_status;
        let translation = Translation { enabled: status.translation(), root: state.root_table_in_use };
        let remapping = Remapping {
            enabled: status.interrupt_remapping(),
            compatibility: status.compatibility_format(),
            table: state.interrupt_table_in_use,
            ..Remapping::off(&self.core.config)
        };
        let counting = {
            let mut registers = self.core.registers();
            registers.put(state);
            registers.counts()
        };
        spaces.set_counting(counting);
        self.core.translation.store(Arc::new(translation));
        self.core.set_remapping(remapping);
        spaces.refresh_as_told(&self.core, told);
        queue::drain(&self.core, &mut spaces);
        tails::tell(&self.core, tails::queue(&self.core));
        Ok(())
    }

    /// What the listener was told of each space when that was saved.
    fn told_before(&self, saved: Vec<SpaceState>) -> Result<BTreeMap<PagedSpace, Vec<Mapping>>, RestoreError> {
        let unit = self.core.config.id;
        let of_space = |space: &SpaceState| {
            let key = PagedSpace { unit, tables: space.tables(), domain: space.domain };
            Ok((key, restore::told(space)?))
        };
        saved.iter().map(of_space).collect()
    }

    /// What it counted so far.
    pub fn stats(&self) -> UnitStats {
        self.core.counters.snapshot()
    }

    /// The spaces that have members, with their shadows. Waits for a drain.
    pub fn spaces_snapshot(&self) -> Vec<SpaceView> {
        self.spaces().views()
    }

    /// What each assigned function is attached to. Waits for a drain.
    pub fn attachments(&self) -> Vec<(Requester, SpaceKey)> {
        self.spaces().attachments()
    }

    /// What the guest's tables say about a space now, for an audit; `None` when the bounds do not allow to say. Runs of
    /// contiguous leaves are joined.
    pub fn walk(&self, space: &PagedSpace) -> Option<Vec<Mapping>> {
        let entries_left = self.core.config.bounds.table_entries;
        let mut found = Found { entries_left, ..Found::default() };
        let (memory, config) = (&self.core.memory, &self.core.config);
        walk_range(memory, config, space, IovaRange::ALL, Merge::Range, &mut found).ok()?;
        Some(found.runs)
    }

    /// Compares the guest's tables with the shadows, and has `host` compare these with what the host holds, in one
    /// moment between two drains. See [`crate::audit`]. The lock order is that of [`SpaceListener`]: `host` may take
    /// what a listener may.
    pub fn audit(&self, host: &mut AuditHost<'_>) -> Audit {
        self.spaces().audit(&self.core, host)
    }

    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn spaces(&self) -> QueueGuard<'_, Spaces> {
        let mut spaces = self.spaces.lock();
        // This is the only way to the queue: whoever is at it comes after every tail that the guest wrote before.
        if tails::take(&self.core) {
            queue::drain(&self.core, &mut spaces);
        }
        spaces
    }

    /// GCMD. A guest gives one command at a time, with the bits of what is on already; several at once are taken in the
    /// order queue, root table, translation, interrupt remapping. Section 11.4.4.1. Commands of what is not
    /// offered are dropped.
    fn global_command(&self, spaces: &mut Spaces, command: Global) {
        let core = &self.core;
        // Its root table may be set, as QEMU has it, and is never looked at.
        let command = command.with_translation(command.translation() && core.config.dma_translation);
        let status = |change: &dyn Fn(Global) -> Global| {
            let mut registers = core.registers();
            registers.state.global_status = change(registers.state.global_status);
        };
        let before = core.registers().state.global_status;

        if command.queued_invalidation() != before.queued_invalidation() {
            tails::tell(core, None);
            let mut registers = core.registers();
            // The head is 0 whenever the queue is off. Windows enables the queue with a non-zero tail: it is drained.
            registers.state.queue_head = 0;
            registers.state.queue_in_use = registers.state.queue_address;
            let on = command.queued_invalidation();
            registers.state.global_status = registers.state.global_status.with_queued_invalidation(on);
            drop(registers);
            queue::drain(core, spaces);
            tails::tell(core, tails::queue(core));
        }

        let mut translation = **core.translation.load();
        if command.root_table_pointer() {
            let mut registers = core.registers();
            registers.state.root_table_in_use = registers.state.root_table_address;
            translation.root = registers.state.root_table_in_use;
        }
        translation.enabled = command.translation();
        // ESRTPS: setting the root pointer invalidates every cache, also when it is the same pointer again (kdump).
        if command.root_table_pointer() || translation.enabled != before.translation() {
            core.translation.store(Arc::new(translation));
            spaces.refresh(core);
        }
        status(&|status| {
            status
                .with_root_table_pointer(status.root_table_pointer() || command.root_table_pointer())
                .with_translation(command.translation())
        });
        if core.config.interrupt_remapping {
            self.interrupt_command(command);
        }
    }

    /// SIRTP, IRE and CFI of GCMD. The table can be set while remapping is on (kdump).
    fn interrupt_command(&self, command: Global) {
        let core = &self.core;
        let before = **core.remapping.load();
        let table = if command.interrupt_table_pointer() {
            let mut registers = core.registers();
            registers.state.interrupt_table_in_use = registers.state.interrupt_table_address;
            registers.state.interrupt_table_in_use
        } else {
            before.table
        };
        let enabled = command.interrupt_remapping();
        let remapping = Remapping { enabled, compatibility: command.compatibility_format(), table, ..before };
        // ESIRTPS: setting the table pointer invalidates the whole cache, also when it is the same pointer again.
        if command.interrupt_table_pointer() || remapping != before {
            core.set_remapping(remapping);
        }
        // The guest polls for these: every route is in place.
        let mut registers = core.registers();
        let status = registers.state.global_status;
        registers.state.global_status = status
            .with_interrupt_table_pointer(status.interrupt_table_pointer() || command.interrupt_table_pointer())
            .with_interrupt_remapping(enabled)
            .with_compatibility_format(remapping.compatibility);
    }

    /// CCMD with ICC set. Section 11.4.6.1. Refused (CAIG 0, no effect) while the queue is on.
    fn context_command(&self, spaces: &mut Spaces) {
        let command = self.core.registers().state.context_command;
        let scope = (!self.queue_is_on())
            .then(|| {
                let scalable = self.core.translation.load().is_scalable();
                let (granularity, mask) = (command.granularity(), command.function_mask());
                context_scope_of(granularity, command.domain(), command.source(), mask, scalable)
            })
            .flatten();
        let done = scope.map_or(0, |scope| {
            self.core.counters.register_invalidations.add(1);
            spaces.invalidate_contexts(scope);
            spaces.flush(&self.core);
            command.granularity()
        });
        self.core.registers().state.context_command = command.with_actual(done).with_invalidate(false);
    }

    /// IOTLB_REG with IVT set. Section 11.4.6.4. Refused (IAIG 0, no effect) while the queue is on.
    fn iotlb_command(&self, spaces: &mut Spaces) {
        let (command, address) = {
            let registers = self.core.registers();
            (registers.state.iotlb_invalidate, registers.state.invalidate_address)
        };
        let scope = (!self.queue_is_on())
            .then(|| iotlb_scope_of(command.granularity(), command.domain(), address.page(), address.address_mask()))
            .flatten();
        let done = scope.map_or(0, |scope| {
            self.core.counters.register_invalidations.add(1);
            spaces.invalidate_iotlb(scope);
            spaces.flush(&self.core);
            command.granularity()
        });
        self.core.registers().state.iotlb_invalidate = command.with_actual(done).with_invalidate(false);
    }

    fn queue_is_on(&self) -> bool {
        self.core.registers().state.global_status.queued_invalidation()
    }
}
