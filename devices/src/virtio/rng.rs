//! The entropy device (section 5.4): buffers filled with what a source gives.

use std::io::Read;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::ring::{Broken, slice, total, write};
use super::{Device, Dma, Kind, Work};
use crate::told::Told;

/// Bytes that a buffer gets at most: a driver that wants more asks again.
const MOST: u64 = 1 << 16;

/// The device.
pub struct Rng<R> {
    source: R,
    told: Told,
}

impl<R: Read> Rng<R> {
    /// Gives out what `source` has.
    pub fn new(source: R) -> Self {
        Self { source, told: Told::default() }
    }

    /// `len` bytes, or as many as the source had.
    fn bytes(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Err(e) = self.source.by_ref().take(len).read_to_end(&mut bytes) {
            self.told.once(|| log::error!("a virtio-rng has less entropy than the guest asks for: {e}"));
        }
        bytes
    }
}

impl<R: Read + Send + 'static, D: Dma> Device<D> for Rng<R> {
    fn kind(&self) -> Kind {
        let device = VIRTIO_ID_RNG as u16;
        Kind { device, class: 0x00_ff_00, features: 0, queues: &[64], config: Vec::new() }
    }

    fn work(&mut self, work: &mut Work<'_, D>) -> Result<(), Broken> {
        while work.goes_on() {
            let Some(chain) = work.next(0)? else { break };
            let bytes = self.bytes(total(&chain.writable).min(MOST));
            let parts = slice(&chain.writable, 0, bytes.len() as u64);
            work.with(0, |ring, memory| {
                write(memory, &parts, &bytes)?;
                ring.push(memory, chain.head, bytes.len() as u32)
            })?;
            work.interrupt(0)?;
        }
        Ok(())
    }
}
