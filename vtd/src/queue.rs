//! The invalidation queue, with descriptors of 128 bits, and of 256 where scalable mode is offered. Section
//! 6.5.2.
//!
//! It is drained in the thread that moved the tail, a vCPU's, or that took one which rang a [bell](crate::TailBells).
//! Every descriptor before an erroneous one takes effect; the head stays at the erroneous one, and the queue goes on
//! from there when the guest clears IQE.

use vm_memory::GuestMemoryBackend;

use crate::ats::{Completion, PageResponse, ResponseCode, TlbScope};
use crate::config::MAX_HANDLE_MASK;
use crate::core::Core;
use crate::ids::{Gpa, Pasid, SourceId};
use crate::memory::{read_pair, read_words, write_word};
use crate::range::IovaRange;
use crate::scope::{ContextScope, Scope, context_scope_of, iotlb_scope_of, pasid_iotlb_scope_of, pasid_scope_of};
use crate::shadow::Spaces;
use crate::spec::ats::sized_range;
use crate::spec::invalidation::{
    ContextCacheLow, Descriptor, DeviceTlbHigh, DeviceTlbLow, InterruptEntryLow, IotlbHigh, IotlbLow, PageResponseHigh,
    PageResponseLow, PasidDeviceTlbHigh, PasidDeviceTlbLow, PasidLow, QueueError, WaitHigh, WaitLow, kind,
};
use crate::spec::registers::table_mode;
use crate::tables::interrupt::EntriesChanged;

/// The queue in use.
struct Queue {
    base: u64,
    /// Descriptors have 256 bits.
    wide: bool,
    /// Number of descriptors.
    size: u64,
    head: u64,
    /// What the register of the head says.
    told: u64,
    /// In bytes.
    tail: u64,
    /// The first function that did not answer a device-TLB invalidation.
    timed_out: Option<SourceId>,
}

impl Queue {
    /// The queue, if it is enabled and not stopped by an error.
    fn running<M: GuestMemoryBackend>(core: &Core<M>) -> Option<Self> {
        let registers = core.registers();
        let state = &registers.state;
        if !state.global_status.queued_invalidation() || registers.queue_is_stopped() {
            return None;
        }
        let address = state.queue_in_use;
        let wide = address.wide();
        let head = state.queue_head / Descriptor::size(wide);
        Some(Self {
            base: address.page() << 12,
            wide,
            size: (4096 << address.size()) / Descriptor::size(wide),
            head,
            told: head,
            tail: state.queue_tail,
            timed_out: None,
        })
    }

    /// Where the head is, in bytes.
    fn head_offset(&self) -> u64 {
        self.head * Descriptor::size(self.wide)
    }

    fn tell_head<M: GuestMemoryBackend>(&mut self, core: &Core<M>) {
        core.registers().state.queue_head = self.head_offset();
        self.told = self.head;
    }

    fn fetch<M: GuestMemoryBackend>(&self, memory: &M) -> Result<Descriptor, QueueError> {
        let address = self.base.checked_add(self.head_offset()).ok_or(QueueError::Fetch)?;
        if self.wide {
            let [low, high, third, fourth] = read_words(memory, Gpa(address)).ok_or(QueueError::Fetch)?;
            return Ok(Descriptor { low, high, upper: [third, fourth] });
        }
        let (low, high) = read_pair(memory, Gpa(address)).ok_or(QueueError::Fetch)?;
        Ok(Descriptor { low, high, upper: [0; 2] })
    }
}

/// Processes what lies between head and tail. Bounded by the size of the queue.
pub(crate) fn drain<M: GuestMemoryBackend>(core: &Core<M>, spaces: &mut Spaces) {
    let Some(mut queue) = Queue::running(core) else { return };
    spaces.begin_drain();
    let result = process(core, spaces, &mut queue);
    spaces.flush(core);
    spaces.end_drain();
    if let Some(source) = queue.timed_out {
        tell_timeout(core, source);
    }
    let Err(error) = result else {
        if queue.head != queue.told {
            queue.tell_head(core);
        }
        return;
    };
    core.counters.queue_errors.add(1);
    log::debug!("unit {}: the invalidation queue stopped at {}: {error:?}", core.config.id.0, queue.head);
    let mut registers = core.registers();
    registers.state.queue_head = queue.head_offset();
    let before = registers.fault_status();
    registers.state.queue_error_record = registers.state.queue_error_record.with_queue_error(error as u8);
    registers.set_fault_status(|status| status.with_queue_error(true));
    let message = registers.raise_fault_event(before);
    drop(registers);
    core.signal(message);
}

/// A function did not answer: ITE, and the queue goes on when the guest clears it. Section 6.5.2.11.
fn tell_timeout<M: GuestMemoryBackend>(core: &Core<M>, source: SourceId) {
    log::debug!("unit {}: {source} did not answer a device-TLB invalidation", core.config.id.0);
    let mut registers = core.registers();
    let before = registers.fault_status();
    registers.state.queue_error_record = registers.state.queue_error_record.with_timeout_source(source.0);
    registers.set_fault_status(|status| status.with_timeout_error(true));
    let message = registers.raise_fault_event(before);
    drop(registers);
    core.signal(message);
}

fn process<M: GuestMemoryBackend>(core: &Core<M>, spaces: &mut Spaces, queue: &mut Queue) -> Result<(), QueueError> {
    // The head is always in the queue, at a descriptor: see `restore.rs`.
    if queue.head_offset() == queue.tail {
        return Ok(());
    }
    // Bit 4 is reserved with wide descriptors.
    if !queue.tail.is_multiple_of(Descriptor::size(queue.wide)) {
        return Err(QueueError::UnalignedTail);
    }
    let tail = queue.tail / Descriptor::size(queue.wide);
    if tail >= queue.size {
        return Err(QueueError::InvalidTail);
    }
    let mode = Mode::of(core)?;
    if !queue.wide && mode != Mode::Legacy {
        return Err(QueueError::InvalidWidth);
    }
    while queue.head != tail {
        let descriptor = queue.fetch(&core.memory)?;
        let wait = handle(core, spaces, mode, descriptor, &mut queue.timed_out)?;
        queue.head = (queue.head + 1) % queue.size;
        if let Some(wait) = wait {
            spaces.flush(core);
            queue.tell_head(core);
            if queue.timed_out.is_some() {
                // It is aborted, and nothing behind it is fetched until ITE is cleared. Section 6.5.2.11.
                return Ok(());
            }
            complete(core, wait);
        }
    }
    Ok(())
}

/// Which descriptors there are, by TTM. Section 6.5.2.11.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Legacy,
    Scalable,
    Abort,
}

impl Mode {
    fn of<M>(core: &Core<M>) -> Result<Self, QueueError> {
        match core.translation.load().root.mode() {
            _ if core.config.scalable.is_none() => Ok(Self::Legacy),
            table_mode::LEGACY => Ok(Self::Legacy),
            table_mode::SCALABLE => Ok(Self::Scalable),
            table_mode::ABORT => Ok(Self::Abort),
            _ => Err(QueueError::InvalidTableMode),
        }
    }
}

/// What a wait descriptor asks for.
struct Wait {
    status: Option<(Gpa, u32)>,
    interrupt: bool,
}

/// Takes one descriptor in; everything but a wait takes effect at the next flush.
fn handle<M: GuestMemoryBackend>(
    core: &Core<M>,
    spaces: &mut Spaces,
    mode: Mode,
    descriptor: Descriptor,
    timed_out: &mut Option<SourceId>,
) -> Result<Option<Wait>, QueueError> {
    let is_known = match descriptor.kind() {
        kind::CONTEXT_CACHE | kind::IOTLB | kind::WAIT => true,
        kind::INTERRUPT_ENTRY => core.config.interrupt_remapping,
        kind::PASID_CACHE | kind::PASID_IOTLB => mode != Mode::Legacy,
        kind::DEVICE_TLB => core.config.device_tlb,
        kind::PASID_DEVICE_TLB => core.config.device_tlb && mode != Mode::Legacy,
        kind::PAGE_RESPONSE => core.config.page_requests && mode != Mode::Legacy,
        _ => false,
    };
    if !is_known {
        return Err(QueueError::InvalidType);
    }
    if descriptor.upper != [0; 2] {
        return Err(QueueError::Reserved);
    }
    match descriptor.kind() {
        kind::CONTEXT_CACHE => {
            let scope = context_scope(descriptor, mode == Mode::Scalable)?;
            core.counters.context_cache.add(1);
            spaces.invalidate_contexts(scope);
            Ok(None)
        }
        kind::IOTLB => {
            let scope = iotlb_scope(descriptor)?;
            core.counters.iotlb.add(1);
            spaces.invalidate_iotlb(scope);
            Ok(None)
        }
        kind::PASID_CACHE => {
            let scope = pasid_scope(descriptor)?;
            core.counters.pasid_cache.add(1);
            spaces.invalidate_contexts(scope);
            Ok(None)
        }
        kind::PASID_IOTLB => {
            let (scope, pasid) = pasid_iotlb_scope(descriptor)?;
            core.counters.pasid_iotlb.add(1);
            spaces.invalidate_pasid(scope, pasid);
            Ok(None)
        }
        kind::WAIT => {
            let (low, high) = (WaitLow::from_bits(descriptor.low), WaitHigh::from_bits(descriptor.high));
            if low.page_request_drain() && !core.config.page_requests {
                return Err(QueueError::Reserved);
            }
            if low.reserved() != 0 || high.reserved() != 0 {
                return Err(QueueError::Reserved);
            }
            core.counters.wait.add(1);
            let status = low.status_write().then_some((Gpa(high.address() << 2), low.status()));
            Ok(Some(Wait { status, interrupt: low.interrupt() }))
        }
        kind::DEVICE_TLB | kind::PASID_DEVICE_TLB => {
            let (source, of, range) = device_tlb_scope(descriptor)?;
            core.counters.device_tlb.add(1);
            // What it asks for anew is as the tables are now. Section 6.5.2.12.
            spaces.flush(core);
            let function = core.ats.of(&core.sources.load(), source);
            let name = function.filter(|(_, function)| function.invalidate(of, range) == Completion::Sent);
            match name {
                Some((name, _)) => spaces.wait_for_sessions_of(name),
                None => *timed_out = timed_out.or(Some(source)),
            }
            Ok(None)
        }
        kind::PAGE_RESPONSE => {
            let (source, response) = page_response(descriptor)?;
            core.counters.page_response.add(1);
            // What the function asks for anew is as the guest made it before it answered.
            spaces.flush(core);
            if let Some((_, function)) = core.ats.of(&core.sources.load(), source) {
                function.respond(response);
            }
            Ok(None)
        }
        kind::INTERRUPT_ENTRY => {
            let changed = changed_entries(descriptor)?;
            core.counters.interrupt_entry.add(1);
            spaces.invalidate_interrupt_entries(changed);
            Ok(None)
        }
        _ => Err(QueueError::InvalidType),
    }
}

fn context_scope(descriptor: Descriptor, scalable: bool) -> Result<ContextScope, QueueError> {
    let low = ContextCacheLow::from_bits(descriptor.low);
    if low.reserved() != 0 || low.reserved_high() != 0 || descriptor.high != 0 {
        return Err(QueueError::Reserved);
    }
    context_scope_of(low.granularity(), low.domain(), low.source(), low.function_mask(), scalable)
        .ok_or(QueueError::Reserved)
}

fn pasid_scope(descriptor: Descriptor) -> Result<ContextScope, QueueError> {
    let low = PasidLow::from_bits(descriptor.low);
    if low.reserved() != 0 || low.reserved_high() != 0 || descriptor.high != 0 {
        return Err(QueueError::Reserved);
    }
    pasid_scope_of(low.granularity(), low.domain(), low.pasid()).ok_or(QueueError::Reserved)
}

fn pasid_iotlb_scope(descriptor: Descriptor) -> Result<(Scope, Pasid), QueueError> {
    let (low, high) = (PasidLow::from_bits(descriptor.low), IotlbHigh::from_bits(descriptor.high));
    if low.reserved() != 0 || low.reserved_high() != 0 || high.reserved() != 0 {
        return Err(QueueError::Reserved);
    }
    let scope = pasid_iotlb_scope_of(low.granularity(), low.domain(), high.page(), high.address_mask());
    Ok((scope.ok_or(QueueError::Reserved)?, Pasid(low.pasid())))
}

fn iotlb_scope(descriptor: Descriptor) -> Result<Scope, QueueError> {
    let (low, high) = (IotlbLow::from_bits(descriptor.low), IotlbHigh::from_bits(descriptor.high));
    if low.reserved() != 0 || low.reserved_high() != 0 || high.reserved() != 0 {
        return Err(QueueError::Reserved);
    }
    iotlb_scope_of(low.granularity(), low.domain(), high.page(), high.address_mask()).ok_or(QueueError::Reserved)
}

fn device_tlb_scope(descriptor: Descriptor) -> Result<(SourceId, TlbScope, IovaRange), QueueError> {
    if descriptor.kind() == kind::DEVICE_TLB {
        let (low, high) = (DeviceTlbLow::from_bits(descriptor.low), DeviceTlbHigh::from_bits(descriptor.high));
        if low.reserved() != 0 || low.reserved_middle() != 0 || low.reserved_high() != 0 || high.reserved() != 0 {
            return Err(QueueError::Reserved);
        }
        return Ok((SourceId(low.source()), TlbScope::WithoutPasid, sized_range(high.page(), high.large())));
    }
    let (low, high) = (PasidDeviceTlbLow::from_bits(descriptor.low), PasidDeviceTlbHigh::from_bits(descriptor.high));
    if low.reserved() != 0 || low.reserved_high() != 0 || high.reserved() != 0 {
        return Err(QueueError::Reserved);
    }
    let of = if high.global() { TlbScope::EveryPasid } else { TlbScope::Pasid(Pasid(low.pasid())) };
    Ok((SourceId(low.source()), of, sized_range(high.page(), high.large())))
}

fn page_response(descriptor: Descriptor) -> Result<(SourceId, PageResponse), QueueError> {
    let (low, high) = (PageResponseLow::from_bits(descriptor.low), PageResponseHigh::from_bits(descriptor.high));
    if low.reserved() != 0 || low.reserved_high() != 0 || high.reserved() != 0 {
        return Err(QueueError::Reserved);
    }
    let pasid = low.pasid_present().then_some(Pasid(low.pasid()));
    let response = PageResponse { pasid, group: high.group(), code: ResponseCode::from_bits(low.code()) };
    Ok((SourceId(low.source()), response))
}

fn changed_entries(descriptor: Descriptor) -> Result<EntriesChanged, QueueError> {
    let low = InterruptEntryLow::from_bits(descriptor.low);
    if low.reserved() != 0 || low.reserved_high() != 0 || descriptor.high != 0 {
        return Err(QueueError::Reserved);
    }
    match (low.selective(), low.index_mask()) {
        (false, _) => Ok(EntriesChanged::All),
        (true, mask) if mask <= MAX_HANDLE_MASK => Ok(EntriesChanged::masked(low.index(), mask)),
        (true, _) => Err(QueueError::Reserved),
    }
}

fn complete<M: GuestMemoryBackend>(core: &Core<M>, wait: Wait) {
    if let Some((address, status)) = wait.status
        && !write_word(&core.memory, address, status)
    {
        log::debug!("unit {}: there is no memory at {address} for a wait status", core.config.id.0);
    }
    if wait.interrupt {
        let message = core.registers().raise_completion();
        core.signal(message);
    }
}
