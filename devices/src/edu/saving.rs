//! The state of the function. What the worker took is done before it is saved, and what it did not take is a command in
//! the registers, which is carried out where the state is put back.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vtd::Pasid;

use super::{
    BUFFER_SIZE, DMA_IRQ, DMA_START, DMA_TO_MEMORY, Edu, PASID_VALID, Registers, STATUS_COMPUTING, STATUS_DMA_FAILED,
    STATUS_IRQ_FACTORIAL, State,
};
use crate::pci::config::{STATUS, STATUS_INTX};
use crate::saved::{CannotSave, Saves, Unfit, decode, encode, fits, hex};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(with = "hex")]
    config: Vec<u8>,
    registers: Registers,
    #[serde(with = "hex")]
    buffer: Vec<u8>,
}

impl Saves for Edu {
    fn hold(&self) -> Result<(), CannotSave> {
        let mut state = self.shared.lock();
        state.held = true;
        drop(self.shared.changed.wait_while(state, |state| state.busy || state.signalling).unwrap());
        Ok(())
    }

    fn go_on(&self) {
        self.shared.lock().held = false;
        self.shared.changed.notify_all();
    }

    fn save(&self) -> Value {
        let State { config, registers, buffer, .. } = &*self.shared.lock();
        let Registers { liveness, factorial, status, irq_status, source, destination, count, command, pasid, ats } =
            *registers;
        let registers =
            Registers { liveness, factorial, status, irq_status, source, destination, count, command, pasid, ats };
        encode(1, &Saved { config: config.bytes().to_vec(), registers, buffer: buffer.to_vec() })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { config, registers, buffer } = decode(1, state)?;
        let buffer: Box<[u8; BUFFER_SIZE]> = buffer.try_into().map_err(|_| Unfit::Value("buffer"))?;
        let mut state = self.shared.lock();
        fits("status", registers.status & !(STATUS_COMPUTING | STATUS_IRQ_FACTORIAL | STATUS_DMA_FAILED) == 0)?;
        fits("command", registers.command & !(DMA_START | DMA_TO_MEMORY | DMA_IRQ) == 0)?;
        let of_pasid = if state.capabilities.has_pasid() { PASID_VALID | Pasid::MAX.0 } else { 0 };
        fits("PASID register", registers.pasid & !of_pasid == 0)?;
        fits("ATS register", registers.ats == 0)?;
        state.config.restore(&config, &[(STATUS, STATUS_INTX)])?;
        (state.registers, state.buffer) = (registers, buffer);
        self.decoder.set(self.shared.requester, 0, state.config.decoded(0), &self.bar);
        self.shared.update_line(&mut state);
        Ok(())
    }
}
