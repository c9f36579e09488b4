//! A `pinblk` device: emulated here, and behind the bridge like an assigned function.

use std::path::Path;
use std::sync::Arc;

use devices::pci::Decoder;
use devices::pinblk::PinBlk;
use vfio_bridge::{Bridge, PinLimits, Quarantine, RegisterClientError, Software};
use vtd::{Requester, Unit};

use super::pinned_reads::{FileSource, Outside, PAGES, PinnedReads};
use super::quarantine::Breaker;
use super::{Error, UserRequests};
use crate::kvm::irq::KvmInterrupts;
use crate::kvm::memory::Ram;

/// What a device is connected to.
pub struct PinBlkWiring<'a> {
    /// Its name in the guest.
    pub requester: Requester,
    /// The unit that it is behind.
    pub unit: &'a Arc<Unit<Ram>>,
    /// What the unit tells.
    pub bridge: &'a Bridge,
    /// The host of such devices.
    pub software: &'a Software,
    /// Stops the machine.
    pub breaker: Arc<Breaker>,
    /// Where its messages go.
    pub interrupts: Arc<KvmInterrupts>,
    /// Where its BAR is decoded.
    pub decoder: Arc<Decoder>,
}

/// A device that reads `file`; a pattern in memory, if there is none. It is behind the unit when this returns.
/// `direct`: past the host's page cache.
pub fn plug_pinblk(
    file: Option<&Path>,
    direct: bool,
    wiring: PinBlkWiring<'_>,
) -> Result<(Arc<PinBlk>, Arc<PinnedReads>), Error> {
    let PinBlkWiring { requester, unit, bridge, software, breaker, interrupts, decoder } = wiring;
    let source = file.map_or_else(FileSource::in_memory, |file| FileSource::open(file, direct));
    let name = || file.map_or_else(|| "in memory".to_owned(), |file| file.display().to_string());
    let source = source.map_err(|source| Error::PinBlkFile { name: name(), source })?;
    bridge.register(requester, software.open())?;
    let limits = PinLimits { pages: PAGES, ..PinLimits::default() };
    let requests = UserRequests { endpoint: unit.endpoint(requester), interrupts: interrupts.clone() };
    let outside = Outside {
        requests: Box::new(requests),
        deadline: limits.deadline,
        stop_machine: Box::new(move |why| breaker.stop_machine(&[requester], why)),
    };
    let register = |notifier| -> Result<_, RegisterClientError> { bridge.register_client(requester, notifier, limits) };
    let reads = PinnedReads::new(Box::new(source), outside, register)?;
    unit.add_requester(requester).map_err(|source| Error::Attach { name: format!("pinblk {requester}"), source })?;
    Ok((PinBlk::new(requester, decoder, interrupts, reads.clone()), reads))
}
