//! `isa-debug-exit`, as QEMU has it: a port by which a bare-metal image ends its run with a value.

use crate::BusDevice;

/// Called with the value that the guest wrote.
type OnExit = Box<dyn Fn(u32) + Send + Sync>;

/// The port. Reads are 0.
pub struct DebugExit(OnExit);

impl DebugExit {
    /// The first port.
    pub const FIRST: u64 = 0xf4;
    /// The last port.
    pub const LAST: u64 = 0xf7;

    /// `on_exit` gets what the guest writes. Called from a vCPU thread; it must return.
    pub fn new(on_exit: OnExit) -> Self {
        Self(on_exit)
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == 0 && data.len() <= 4 {
            let mut value = [0; 4];
            value[..data.len()].copy_from_slice(data);
            (self.0)(u32::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn debug_exit_takes_values_of_every_width_at_its_first_port() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let device = DebugExit::new(Box::new({
            let seen = seen.clone();
            move |value| seen.lock().unwrap().push(value)
        }));
        device.write(0, &[0x10]);
        device.write(0, &[0x34, 0x12]);
        device.write(0, &[1, 2, 3, 4]);
        device.write(1, &[0xff]);
        device.write(0, &[0; 8]);
        let mut data = [0xaa; 2];
        device.read(0, &mut data);
        assert_eq!(data, [0; 2]);
        assert_eq!(*seen.lock().unwrap(), [0x10, 0x1234, 0x0403_0201]);
    }
}
