//! BAR 0 on the bus: registers take 4 bytes, from 0x80 on 8 too.

use std::sync::Arc;

use super::Shared;
use crate::BusDevice;

/// BAR 0 on the bus.
pub(super) struct Bar(pub(super) Arc<Shared>);

fn is_access(offset: u64, len: usize) -> bool {
    len == 4 || (len == 8 && offset >= 0x80)
}

impl BusDevice for Bar {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if is_access(offset, data.len()) {
            let len = data.len();
            data.copy_from_slice(&self.0.read(offset).to_le_bytes()[..len]);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if !is_access(offset, data.len()) {
            return;
        }
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        if let Some(message) = self.0.write(offset, u64::from_le_bytes(value)) {
            self.0.interrupts.signal(self.0.requester, message);
        }
    }
}
