//! Counters of a unit: atomic, so that counting costs no lock, and read out as one serialisable struct.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

use crate::spec::fault::{FaultReason, InterruptFaultReason};

/// What a unit counted since it was made.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct UnitStats {
    /// Descriptors of the invalidation queue, by type.
    pub descriptors: DescriptorStats,
    /// Invalidations through CCMD and IOTLB_REG.
    pub register_invalidations: u64,
    /// Reads of registers that the unit was asked for: none where the guest has a [`crate::RegisterPage`] of them.
    pub register_reads: u64,
    /// Writes of the queue's tail that the unit was given.
    pub tail_writes: u64,
    /// Writes of the queue's tail that rang a bell of [`crate::TailBells`] instead.
    pub tails_taken: u64,
    /// Times that the queue stopped with IQE.
    pub queue_errors: u64,
    /// Faults by reason, "0x05" for a write that is not permitted; only those that happened.
    pub faults: BTreeMap<String, u64>,
    /// Faults without a record of their own: collapsed with one of the same source id, or every record was full.
    pub faults_dropped: u64,
    /// Interrupts that were recorded in posted interrupt descriptors.
    pub interrupts_posted: u64,
    /// Notifications that were owed for them.
    pub notifications: u64,
    /// Leaves of guest tables that re-syncs looked at.
    pub leaves_walked: u64,
    /// Maps given to the listener.
    pub map_ops: u64,
    /// Unmaps given to the listener.
    pub unmap_ops: u64,
    /// Pieces of mappings that the host refused.
    pub maps_refused: u64,
    /// Times that a space or a requester was blocked because a bound was exhausted.
    pub bounds_exhausted: u64,
}

/// Descriptors of the invalidation queue, by type.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct DescriptorStats {
    /// Context-cache invalidate.
    pub context_cache: u64,
    /// IOTLB invalidate.
    pub iotlb: u64,
    /// Device-TLB invalidate, PASID-based or not.
    pub device_tlb: u64,
    /// PASID-cache invalidate.
    pub pasid_cache: u64,
    /// PASID-based IOTLB invalidate.
    pub pasid_iotlb: u64,
    /// Page group response.
    pub page_response: u64,
    /// Interrupt-entry-cache invalidate.
    pub interrupt_entry: u64,
    /// Invalidation wait.
    pub wait: u64,
}

/// A counter.
#[derive(Default, Debug)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A counter of what is done with the queue lock held, and so by one thread at a time.
#[derive(Default, Debug)]
pub(crate) struct QueueCounter(AtomicU64);

impl QueueCounter {
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One counter a reason.
#[derive(Debug)]
pub(crate) struct ByReason<const REASONS: usize>([Counter; REASONS]);

impl<const REASONS: usize> Default for ByReason<REASONS> {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

/// The living counters.
#[derive(Default, Debug)]
pub(crate) struct Counters {
    pub(crate) context_cache: QueueCounter,
    pub(crate) iotlb: QueueCounter,
    pub(crate) device_tlb: QueueCounter,
    pub(crate) page_response: QueueCounter,
    pub(crate) pasid_cache: QueueCounter,
    pub(crate) pasid_iotlb: QueueCounter,
    pub(crate) interrupt_entry: QueueCounter,
    pub(crate) wait: QueueCounter,
    pub(crate) register_invalidations: QueueCounter,
    pub(crate) register_reads: Counter,
    pub(crate) tail_writes: QueueCounter,
    pub(crate) tails_taken: QueueCounter,
    pub(crate) queue_errors: QueueCounter,
    pub(crate) faults: ByReason<{ FaultReason::ALL.len() }>,
    pub(crate) interrupt_faults: ByReason<{ InterruptFaultReason::ALL.len() }>,
    pub(crate) faults_dropped: Counter,
    pub(crate) interrupts_posted: Counter,
    pub(crate) notifications: Counter,
    pub(crate) leaves_walked: QueueCounter,
    pub(crate) map_ops: QueueCounter,
    pub(crate) unmap_ops: QueueCounter,
    pub(crate) maps_refused: Counter,
    pub(crate) bounds_exhausted: QueueCounter,
}

impl Counters {
    pub(crate) fn fault(&self, reason: FaultReason) {
        if let Some(index) = FaultReason::ALL.iter().position(|each| *each == reason) {
            self.faults.0[index].add(1);
        }
    }

    pub(crate) fn interrupt_fault(&self, reason: InterruptFaultReason) {
        if let Some(index) = InterruptFaultReason::ALL.iter().position(|each| *each == reason) {
            self.interrupt_faults.0[index].add(1);
        }
    }

    pub(crate) fn snapshot(&self) -> UnitStats {
        let faults = FaultReason::ALL.iter().map(|reason| reason.code()).zip(&self.faults.0);
        let interrupts = InterruptFaultReason::ALL.iter().map(|reason| reason.code()).zip(&self.interrupt_faults.0);
        let faults = faults.chain(interrupts).filter(|(_, counter)| counter.get() > 0);
        UnitStats {
            descriptors: DescriptorStats {
                context_cache: self.context_cache.get(),
                iotlb: self.iotlb.get(),
                device_tlb: self.device_tlb.get(),
                page_response: self.page_response.get(),
                pasid_cache: self.pasid_cache.get(),
                pasid_iotlb: self.pasid_iotlb.get(),
                interrupt_entry: self.interrupt_entry.get(),
                wait: self.wait.get(),
            },
            register_invalidations: self.register_invalidations.get(),
            register_reads: self.register_reads.get(),
            tail_writes: self.tail_writes.get(),
            tails_taken: self.tails_taken.get(),
            queue_errors: self.queue_errors.get(),
            faults: faults.map(|(code, counter)| (format!("{code:#04x}"), counter.get())).collect(),
            faults_dropped: self.faults_dropped.get(),
            interrupts_posted: self.interrupts_posted.get(),
            notifications: self.notifications.get(),
            leaves_walked: self.leaves_walked.get(),
            map_ops: self.map_ops.get(),
            unmap_ops: self.unmap_ops.get(),
            maps_refused: self.maps_refused.get(),
            bounds_exhausted: self.bounds_exhausted.get(),
        }
    }
}
