//! The host bridge, 00:00.0: it only says that there is a root bus.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ConfigSpace, Identity, PciFunction};
use crate::saved::{Saves, Unfit, decode, encode, hex};

/// A host bridge without registers of its own. Its id (1b36:0008, a generic PCI Express host bridge) makes no guest
/// look for chipset quirks.
pub struct HostBridge(Mutex<ConfigSpace>);

impl Default for HostBridge {
    fn default() -> Self {
        let id =
            Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: 0x06_00_00, subsystem: (0x1af4, 0x1100) };
        Self(Mutex::new(ConfigSpace::new(&id)))
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.0.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.0.lock().unwrap().write(offset, data);
    }
    fn reset(&self) {
        self.0.lock().unwrap().reset();
    }
    fn saves(&self) -> Option<&dyn Saves> {
        Some(self)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(with = "hex")]
    config: Vec<u8>,
}

impl Saves for HostBridge {
    fn save(&self) -> Value {
        encode(1, &Saved { config: self.0.lock().unwrap().bytes().to_vec() })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { config } = decode(1, state)?;
        self.0.lock().unwrap().restore(&config, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f6_the_host_bridge_says_what_it_is_and_keeps_what_a_guest_may_write() {
        let bridge = HostBridge::default();
        let read = |offset| {
            let mut data = [0; 4];
            bridge.config_read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        bridge.config_write(0x00, &[0; 4]);
        assert_eq!([0x00, 0x08, 0x2c, 0x34].map(read), [0x0008_1b36, 0x0600_0000, 0x1100_1af4, 0]);
        bridge.config_write(0x04, &[0x06, 0]);
        assert_eq!(read(0x04), 0x0006);
        bridge.reset();
        assert_eq!(read(0x04), 0);
    }
}
