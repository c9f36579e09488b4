//! The bits of each register that a guest can write; the others stay 0. Sections 11.4.4 to 11.4.8.

use crate::config::UnitConfig;
use crate::spec::registers::{ContextCommand, InterruptTableAddress, IotlbInvalidate, QueueAddress};

/// RTADDR: the mode, and the page.
pub(super) const ROOT_TABLE_ADDRESS: u64 = !0x3ff;
/// IQT: the tail, in bytes.
pub(super) const QUEUE_TAIL: u64 = 0x7_fff0;
/// IVA.
pub(super) const INVALIDATE_ADDRESS: u64 = !0xf80;
/// PQH and PQT: an offset, in bytes.
pub(super) const PAGE_QUEUE_OFFSET: u64 = 0x7_ffe0;
/// FEDATA, IEDATA and PEDATA.
pub(super) const EVENT_DATA: u32 = 0xffff;
/// FEADDR, IEADDR and PEADDR.
pub(super) const EVENT_ADDRESS: u32 = !3;
/// CCMD.
pub(super) const CONTEXT_COMMAND: u64 = ContextCommand::new()
    .with_domain(u16::MAX)
    .with_source(u16::MAX)
    .with_function_mask(3)
    .with_granularity(3)
    .with_invalidate(true)
    .into_bits();
/// IOTLB.
pub(super) const IOTLB_INVALIDATE: u64 = IotlbInvalidate::new()
    .with_domain(u16::MAX)
    .with_drain_writes(true)
    .with_drain_reads(true)
    .with_granularity(3)
    .with_invalidate(true)
    .into_bits();

/// IQA: DW is of scalable mode, and there are no address bits beyond the width of the unit.
pub(super) const fn queue_address(config: &UnitConfig) -> u64 {
    let wide = if config.scalable.is_some() { QueueAddress::new().with_wide(true).into_bits() } else { 0 };
    queue_pages(config) | wide
}

/// PQA, where page requests are offered, and of IQA all but DW: there are no address bits beyond the width of the unit.
pub(super) const fn queue_pages(config: &UnitConfig) -> u64 {
    ((1 << config.host_address_width) - 1) & !0xff8
}

/// IRTA, where interrupt remapping is offered.
pub(super) const fn interrupt_table_address(config: &UnitConfig) -> u64 {
    if !config.interrupt_remapping {
        return 0;
    }
    let writable = InterruptTableAddress::new().with_size(0xf).with_page(u64::MAX >> 12);
    writable.with_extended_mode(config.extended_interrupt_mode).into_bits()
}
