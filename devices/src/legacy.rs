//! The keyboard controller's reset, which every PC guest looks for.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use vm_superio::{I8042Device, Trigger};

use crate::BusDevice;
use crate::host::PowerControl;
use crate::pit::SystemPort;

/// A keyboard controller without a keyboard: the guest can reset the machine through it. Port 0x61, which lies between
/// its two, is the timer's.
pub struct I8042 {
    controller: Mutex<I8042Device<ResetTrigger>>,
    system_port: SystemPort,
}

struct ResetTrigger(Arc<dyn PowerControl>);

impl Trigger for ResetTrigger {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        self.0.reset();
        Ok(())
    }
}

impl I8042 {
    /// First port.
    pub const FIRST: u64 = 0x60;
    /// Last port.
    pub const LAST: u64 = 0x64;

    /// Offset of the port between.
    const SYSTEM_PORT: u64 = 1;

    /// A controller whose reset command reaches `power`.
    pub fn new(power: Arc<dyn PowerControl>, system_port: SystemPort) -> Self {
        Self { controller: Mutex::new(I8042Device::new(ResetTrigger(power))), system_port }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == Self::SYSTEM_PORT {
            return self.system_port.read(0, data);
        }
        data.fill(0xff);
        data[0] = self.controller.lock().unwrap().read(offset as u8);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        if offset == Self::SYSTEM_PORT {
            return self.system_port.write(0, data);
        }
        let Ok(()) = self.controller.lock().unwrap().write(offset as u8, data[0]);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::pit::Pit;
    use crate::testing::{FakeClock, FakeLine, FakePower};

    fn controller(power: &Arc<FakePower>) -> I8042 {
        let pit = Pit::new(Arc::new(FakeClock::default()), Arc::default(), Arc::new(FakeLine::default()));
        I8042::new(power.clone(), SystemPort::new(pit))
    }

    #[test]
    fn i8042_reset_command_reaches_the_machine() {
        let power = Arc::new(FakePower::default());
        let device = controller(&power);
        device.write(4, &[0xff]);
        assert!(!power.reset.load(Ordering::SeqCst));
        device.write(4, &[0xfe]);
        assert!(power.reset.load(Ordering::SeqCst));
    }

    #[test]
    fn i8042_leaves_port_61_to_the_timer() {
        let device = controller(&Arc::default());
        device.write(1, &[0x03]);
        let mut data = [0];
        device.read(1, &mut data);
        assert_eq!(data[0] & 0x03, 0x03, "gate and speaker");
        device.read(4, &mut data);
        assert_eq!(data[0] & 0x03, 0, "no data is there");
        let mut word = [0; 4];
        device.read(4, &mut word);
        assert_eq!(word, [data[0], 0xff, 0xff, 0xff], "one port has one byte");
    }
}
