//! The unit: dispatch of register accesses, and the command state machine.
//!
//! Locks, in this order: `spaces` (the queue lock: one drain, one command or one attach at a time; the listener is called
//! with it held), then `registers` (a few instructions at a time, never while the listener or the message sink is
//! called). Register reads take the second only, and so do writes that give no command: what a fault handler does never
//! waits behind another processor's drain, unless it makes a queue go on that had stopped. Emulated DMA takes neither,
//! unless it has a fault to record (see [`crate::Endpoint`]).

use std::sync::{Arc, Mutex, MutexGuard};

use arc_swap::ArcSwap;
use vm_memory::GuestMemoryBackend;

use crate::audit::{Audit, AuditHost};
use crate::config::{ConfigError, UnitConfig};
use crate::endpoint::Endpoint;
use crate::fault::{Fault, Recorded};
use crate::ids::{Gpa, Requester, SourceId};
use crate::memory::write_word;
use crate::queue::{self, context_scope_of, iotlb_scope_of};
use crate::registers::{Command, Registers};
use crate::remap::{EntriesChanged, RemapError, RemapFault, RemapListener, Remapping, Sender};
use crate::space::{AttachRefused, Mapping, Msi, MsiSink, PagedSpace, SpaceKey, SpaceListener};
use crate::spaces::{Source, Sources, SpaceView, Spaces};
use crate::spec::registers::{
    ContextCommand, Global, InterruptTableAddress, InvalidateAddress, IotlbInvalidate, RootTableAddress,
};
use crate::state::State;
use crate::stats::{Counters, UnitStats};
use crate::tables::Translation;
use crate::walk::{Found, Merge, walk_range};

/// What every part of a unit uses.
pub(crate) struct Shared<M> {
    pub(crate) config: UnitConfig,
    pub(crate) memory: M,
    pub(crate) listener: Arc<dyn SpaceListener>,
    messages: Arc<dyn MsiSink>,
    registers: Mutex<Registers>,
    pub(crate) translation: ArcSwap<Translation>,
    pub(crate) sources: ArcSwap<Sources>,
    remapping: ArcSwap<Remapping>,
    remap_listener: Mutex<Option<Arc<dyn RemapListener>>>,
    pub(crate) counters: Counters,
}

impl<M: GuestMemoryBackend> Shared<M> {
    pub(crate) fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Sends a message of the unit itself: a write of 32 bits, which is an interrupt only where interrupts are, as on hardware.
    pub(crate) fn signal(&self, message: Option<Msi>) {
        let Some(message) = message else { return };
        if message.is_interrupt() {
            self.messages.signal(message);
        } else if !write_word(&self.memory, Gpa(message.address), message.data) {
            log::debug!("unit {}: there is no memory at {:#x} for an event", self.config.id.0, message.address);
        }
    }

    /// Counts a fault and, unless the guest silenced it, records it. The message that is to be sent then is given back: it may be a
    /// system call, so whoever is inside a DMA session sends it when that is over.
    #[must_use]
    pub(crate) fn record(&self, fault: &Fault) -> Option<Msi> {
        self.counters.fault(fault.reason);
        if fault.silenced {
            return None;
        }
        let recorded = self.registers().record_fault(fault);
        self.recorded(recorded)
    }

    /// The same for an interrupt that fired.
    fn record_remap_fault(&self, fault: &RemapFault) {
        self.counters.interrupt_fault(fault.reason);
        if fault.silenced {
            return;
        }
        let recorded = self.registers().record_remap_fault(fault);
        self.signal(self.recorded(recorded));
    }

    fn recorded(&self, (recorded, message): (Recorded, Option<Msi>)) -> Option<Msi> {
        if recorded == Recorded::Dropped {
            self.counters.faults_dropped.add(1);
        }
        message
    }

    /// Tells the remap listener; the queue lock is held.
    pub(crate) fn entries_changed(&self, changed: EntriesChanged) {
        let listener = self.remap_listener.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        if let Some(listener) = listener {
            listener.entries_changed(changed);
        }
    }

    /// How interrupts are remapped changes as a whole.
    fn set_remapping(&self, remapping: Remapping) {
        self.remapping.store(Arc::new(remapping));
        self.entries_changed(EntriesChanged::All);
    }
}

/// An emulated remapping unit over guest memory `M`.
pub struct Unit<M> {
    pub(crate) shared: Shared<M>,
    spaces: Mutex<Spaces>,
}

impl<M: GuestMemoryBackend + Clone + Send + Sync> Unit<M> {
    /// A unit as it is at power-on. `listener` hears of every space that has assigned functions; `messages` delivers the
    /// unit's own interrupts.
    pub fn new(
        config: UnitConfig,
        memory: M,
        listener: Arc<dyn SpaceListener>,
        messages: Arc<dyn MsiSink>,
    ) -> Result<Arc<Self>, ConfigError> {
        config.validate()?;
        Ok(Arc::new(Self {
            shared: Shared {
                config,
                memory,
                listener,
                messages,
                registers: Mutex::new(Registers::new(config)),
                translation: ArcSwap::default(),
                sources: ArcSwap::default(),
                remapping: ArcSwap::default(),
                remap_listener: Mutex::default(),
                counters: Counters::default(),
            },
            spaces: Mutex::default(),
        }))
    }

    /// The description that it was built from; its capability registers follow from that.
    pub fn config(&self) -> &UnitConfig {
        &self.shared.config
    }

    /// Reads registers at `offset` into the window. Every (offset, size) is defined; see `registers.rs`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = self.shared.registers().read(offset, data.len()).to_le_bytes();
        data.fill(0);
        let len = data.len().min(value.len());
        data[..len].copy_from_slice(&value[..len]);
    }

    /// Writes registers at `offset` into the window. When it returns, the commands that it gave are done.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut value = [0; 8];
        let Some(bytes) = value.get_mut(..data.len()) else { return };
        bytes.copy_from_slice(data);
        let value = u64::from_le_bytes(value);
        // The queue lock first: between this register write and its command no other command comes.
        let mut spaces = Registers::commands(offset, data.len()).then(|| self.spaces());
        let mut registers = self.shared.registers();
        if spaces.is_none() && registers.resumes(offset, data.len(), value) {
            drop(registers);
            spaces = Some(self.spaces());
            registers = self.shared.registers();
        }
        let outcome = registers.write(offset, data.len(), value);
        drop(registers);
        self.shared.signal(outcome.message);
        let Some((spaces, command)) = spaces.as_deref_mut().zip(outcome.command) else { return };
        match command {
            Command::Global(value) => self.global_command(spaces, Global::from_bits(value)),
            Command::Context => self.context_command(spaces),
            Command::Iotlb => self.iotlb_command(spaces),
            Command::Drain => queue::drain(&self.shared, spaces),
        }
    }

    /// `requester`, an assigned function, is behind the unit: it is attached to what the guest's tables say, with every
    /// live mapping in place when this returns (B-5).
    ///
    /// # Errors
    /// The listener's, when it could not attach the function at all; it is then not behind the unit.
    pub fn add_requester(&self, requester: Requester) -> Result<(), AttachRefused> {
        self.spaces().add_requester(&self.shared, requester)
    }

    /// `requester` is not behind the unit any more; nothing of it stays mapped.
    pub fn remove_requester(&self, requester: Requester) {
        self.spaces().remove_requester(&self.shared, requester);
    }

    /// The requests of these functions carry these source ids from now on, `None` if no bus number leads to one: the guest wrote a
    /// bridge's secondary or subordinate bus number. When this returns, each assigned function is where the tables say about
    /// its new id, no access with an old one is under way, and every route of an interrupt was made again. All changes take effect
    /// together, so that functions may swap their ids.
    ///
    /// A function is named by the requester that it was added with, here and everywhere else, whatever its id is now; what the
    /// guest reads in fault records is the id. While functions share an id, or have none, and translation is on, they reach nothing,
    /// and their interrupts pass only entries that do not ask for the source. Ids are no state of the unit: they survive
    /// [`Self::reset`], and go with the bridges when a machine is saved and restored.
    ///
    /// Not to be called inside a [`crate::DmaSession`], which it would wait for.
    pub fn renumber(&self, changes: &[(Requester, Option<SourceId>)]) {
        self.spaces().renumber(&self.shared, changes);
    }

    /// The way to guest memory for an emulated device. The device is there for as long as the endpoint is: when it is dropped,
    /// another function that shared its source id has that alone. So it is not to be dropped inside a [`crate::DmaSession`] of
    /// another endpoint, or by a listener or a sink that the unit calls.
    pub fn endpoint(self: &Arc<Self>, requester: Requester) -> Endpoint<M> {
        let endpoint = Endpoint::new(self.clone(), requester);
        self.spaces().add_endpoint(&self.shared, requester, endpoint.iotlb());
        endpoint
    }

    /// `listener` hears of every change to interrupt remapping from now on, instead of the one before it. The unit keeps it
    /// alive: it should hold the unit weakly.
    pub fn set_remap_listener(&self, listener: Arc<dyn RemapListener>) {
        *self.shared.remap_listener.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(listener);
    }

    /// What the processors get when `requester` sends `msi`, as the guest's tables say now: to make a route of it, until
    /// [`RemapListener::entries_changed`] says that it is to be asked again. Takes no lock; records nothing.
    ///
    /// In the address, bits 63:40 are bits 31:8 of the destination, as KVM takes it with KVM_X2APIC_API_USE_32BIT_IDS.
    ///
    /// # Errors
    /// The message is not delivered. If it fires all the same, its fault is to be given to [`Self::record_remap_fault`], or
    /// the message to [`Self::deliver`], which asks again.
    pub fn remap(&self, requester: Requester, msi: Msi) -> Result<Msi, RemapError> {
        let source = self.shared.sources.load().of(requester);
        let checked = self.shared.config.unchecked_source != Some(requester.sid);
        let sender = Sender { requester: source.seen(requester), known: source.own().is_some(), checked };
        let remapped = self.shared.remapping.load().remap(&self.shared.memory, sender, msi);
        remapped.map_err(|error| match error {
            // There is no id to record it with.
            RemapError::Fault(fault) if source == Source::None => RemapFault { silenced: true, ..fault }.into(),
            other => other,
        })
    }

    /// `requester` sends `msi` now: as [`Self::remap`], and a fault is recorded.
    ///
    /// # Errors
    /// The message is not delivered.
    pub fn deliver(&self, requester: Requester, msi: Msi) -> Result<Msi, RemapError> {
        self.remap(requester, msi).inspect_err(|error| {
            if let RemapError::Fault(fault) = error {
                self.record_remap_fault(fault);
            }
        })
    }

    /// An interrupt that [`Self::remap`] refused with `fault` fired. Never to be called for one that did not: Windows stops
    /// at a fault that no device made.
    pub fn record_remap_fault(&self, fault: &RemapFault) {
        self.shared.record_remap_fault(fault);
    }

    /// Power-on state: translation and interrupt remapping off, every function in the identity space. Functions
    /// must be quiet before (rule 12).
    pub fn reset(&self) {
        let mut spaces = self.spaces();
        self.shared.registers().state.reset();
        self.shared.translation.store(Arc::default());
        self.shared.set_remapping(Remapping::default());
        spaces.forget_reports();
        spaces.refresh(&self.shared);
    }

    /// The registers, to be saved. Waits for a drain.
    pub fn save(&self) -> State {
        let _spaces = self.spaces();
        self.shared.registers().state.clone()
    }

    /// Puts saved registers back, and attaches every function to what the guest's tables say. Guest memory must be
    /// in place. Descriptors between head and tail are processed.
    pub fn restore(&self, state: State) {
        let mut spaces = self.spaces();
        let status = Global::from_bits(state.global_status);
        let translation =
            Translation { enabled: status.translation(), root: RootTableAddress::from_bits(state.root_table_in_use) };
        let remapping = Remapping {
            enabled: status.interrupt_remapping(),
            compatibility: status.compatibility_format(),
            table: InterruptTableAddress::from_bits(state.interrupt_table_in_use),
        };
        self.shared.registers().state = state;
        self.shared.translation.store(Arc::new(translation));
        self.shared.set_remapping(remapping);
        spaces.refresh(&self.shared);
        queue::drain(&self.shared, &mut spaces);
    }

    /// What it counted so far.
    pub fn stats(&self) -> UnitStats {
        self.shared.counters.snapshot()
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
        let entries_left = self.shared.config.bounds.table_entries;
        let mut found = Found { entries_left, ..Found::default() };
        let everywhere = (0, u64::MAX);
        let (memory, config) = (&self.shared.memory, &self.shared.config);
        walk_range(memory, config, space, everywhere, Merge::Range, &mut found).ok()?;
        Some(found.runs)
    }

    /// Compares the guest's tables with the shadows, and has `host` compare these with what the host holds, in one moment
    /// between two drains. See [`crate::audit`]. The lock order is that of [`SpaceListener`]: `host` may take what a listener may.
    pub fn audit(&self, host: &mut AuditHost<'_>) -> Audit {
        self.spaces().audit(&self.shared, host)
    }

    pub(crate) fn spaces(&self) -> MutexGuard<'_, Spaces> {
        self.spaces.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// GCMD. A guest gives one command at a time, with the bits of what is on already; several at once are taken in the
    /// order queue, root table, translation, interrupt remapping. Section 11.4.4.1. Commands of what is not
    /// offered are dropped.
    fn global_command(&self, spaces: &mut Spaces, command: Global) {
        let shared = &self.shared;
        let status = |change: &dyn Fn(Global) -> Global| {
            let mut registers = shared.registers();
            let changed = change(Global::from_bits(registers.state.global_status));
            registers.state.global_status = changed.into_bits();
        };
        let before = Global::from_bits(shared.registers().state.global_status);

        if command.queued_invalidation() != before.queued_invalidation() {
            let mut registers = shared.registers();
            // The head is 0 whenever the queue is off. Windows enables the queue with a non-zero tail: it is drained.
            registers.state.queue_head = 0;
            registers.state.queue_in_use = registers.state.queue_address;
            let on = command.queued_invalidation();
            let status = Global::from_bits(registers.state.global_status).with_queued_invalidation(on);
            registers.state.global_status = status.into_bits();
            drop(registers);
            queue::drain(shared, spaces);
        }

        let mut translation = **shared.translation.load();
        if command.root_table_pointer() {
            let mut registers = shared.registers();
            registers.state.root_table_in_use = registers.state.root_table_address;
            translation.root = RootTableAddress::from_bits(registers.state.root_table_in_use);
        }
        translation.enabled = command.translation();
        // ESRTPS: setting the root pointer invalidates every cache, also when it is the same pointer again (kdump).
        if command.root_table_pointer() || translation.enabled != before.translation() {
            shared.translation.store(Arc::new(translation));
            spaces.refresh(shared);
        }
        status(&|status| {
            status
                .with_root_table_pointer(status.root_table_pointer() || command.root_table_pointer())
                .with_translation(command.translation())
        });
        if shared.config.interrupt_remapping {
            self.interrupt_command(command);
        }
    }

    /// SIRTP, IRE and CFI of GCMD. The table can be set while remapping is on (kdump).
    fn interrupt_command(&self, command: Global) {
        let shared = &self.shared;
        let before = **shared.remapping.load();
        let table = if command.interrupt_table_pointer() {
            let mut registers = shared.registers();
            registers.state.interrupt_table_in_use = registers.state.interrupt_table_address;
            InterruptTableAddress::from_bits(registers.state.interrupt_table_in_use)
        } else {
            before.table
        };
        let enabled = command.interrupt_remapping();
        let remapping = Remapping { enabled, compatibility: command.compatibility_format(), table };
        // ESIRTPS: setting the table pointer invalidates the whole cache, also when it is the same pointer again.
        if command.interrupt_table_pointer() || remapping != before {
            shared.set_remapping(remapping);
        }
        // The guest polls for these: every route is in place.
        let mut registers = shared.registers();
        let status = Global::from_bits(registers.state.global_status);
        registers.state.global_status = status
            .with_interrupt_table_pointer(status.interrupt_table_pointer() || command.interrupt_table_pointer())
            .with_interrupt_remapping(enabled)
            .with_compatibility_format(remapping.compatibility)
            .into_bits();
    }

    /// CCMD with ICC set. Section 11.4.6.1. Refused (CAIG 0, no effect) while the queue is on.
    fn context_command(&self, spaces: &mut Spaces) {
        let command = ContextCommand::from_bits(self.shared.registers().state.context_command);
        let scope = (!self.queue_is_on())
            .then(|| {
                context_scope_of(command.granularity(), command.domain(), command.source(), command.function_mask())
            })
            .flatten();
        let done = scope.map_or(0, |scope| {
            self.shared.counters.register_invalidations.add(1);
            spaces.invalidate_contexts(scope);
            spaces.flush(&self.shared);
            command.granularity()
        });
        self.shared.registers().state.context_command = command.with_actual(done).with_invalidate(false).into_bits();
    }

    /// IOTLB_REG with IVT set. Section 11.4.6.4. Refused (IAIG 0, no effect) while the queue is on.
    fn iotlb_command(&self, spaces: &mut Spaces) {
        let (command, address) = {
            let registers = self.shared.registers();
            let address = InvalidateAddress::from_bits(registers.state.invalidate_address);
            (IotlbInvalidate::from_bits(registers.state.iotlb_invalidate), address)
        };
        let scope = (!self.queue_is_on())
            .then(|| iotlb_scope_of(command.granularity(), command.domain(), address.page(), address.address_mask()))
            .flatten();
        let done = scope.map_or(0, |scope| {
            self.shared.counters.register_invalidations.add(1);
            spaces.invalidate_iotlb(scope);
            spaces.flush(&self.shared);
            command.granularity()
        });
        self.shared.registers().state.iotlb_invalidate = command.with_actual(done).with_invalidate(false).into_bits();
    }

    fn queue_is_on(&self) -> bool {
        Global::from_bits(self.shared.registers().state.global_status).queued_invalidation()
    }
}
