//! The state of a virtio function: its registers, how far its rings are, and what its device has besides. No request is
//! under way: what the device took and did not use is in the rings again.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::function::VirtioPci;
use super::ring::Ring;
use super::{registers, vectors, worker};
use crate::pci::config::COMMAND_MASTER;
use crate::saved::{CannotSave, Saves, Unfit, decode, encode, fits, hex};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(with = "hex")]
    config: Vec<u8>,
    registers: registers::Saved,
    vectors: vectors::Saved,
    device: worker::Saved,
}

impl Saves for VirtioPci {
    fn hold(&self) -> Result<(), CannotSave> {
        if self.shared.link.hold() {
            return Ok(());
        }
        let limit = worker::DEADLINE.as_secs();
        Err(CannotSave(format!("a request of it did not end in the host within {limit} s; try again when it has")))
    }

    fn go_on(&self) {
        self.shared.link.go_on_again();
    }

    fn save(&self) -> Value {
        let state = self.shared.lock();
        let link = &self.shared.link;
        encode(
            1,
            &Saved {
                config: state.space.bytes().to_vec(),
                registers: state.registers.save(),
                vectors: link.vectors.save(),
                device: link.save(),
            },
        )
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { config, registers, vectors, device } = decode(1, state)?;
        device.check()?;
        let mut state = self.shared.lock();
        let link = &self.shared.link;
        let registers = state.registers.restored(registers)?;
        fits("driver", registers.is_started() || !device.running)?;
        let features = registers.features();
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut rings = Vec::new();
        if device.running {
            let setup = registers.queues();
            let used = |(queue, positions): (&registers::QueueSetup, &_)| queue.enabled == Option::is_some(positions);
            let of_each = device.rings.len() == setup.len();
            fits("rings", of_each && setup.iter().zip(&device.rings).all(used))?;
            for ((queue, positions), most) in setup.iter().zip(&device.rings).zip(self.shared.most) {
                let ring = positions.map(|positions| Ring::restored(*most, &queue.place, event_idx, positions));
                rings.push(ring.transpose().map_err(|_| Unfit::Value("rings"))?);
            }
        }
        let before = state.space.bytes().to_vec();
        state.space.restore(&config, &[])?;
        let is_master = state.space.command() & COMMAND_MASTER != 0;
        if let Err(e) = link.vectors.restore(vectors, state.space.u16(state.msix + 2), is_master) {
            // What was there before fits.
            state.space.restore(&before, &[])?;
            return Err(e);
        }
        state.registers = registers;
        link.restore(device, rings, features, is_master);
        self.decode(&state);
        Ok(())
    }
}
