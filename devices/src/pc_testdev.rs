//! What bare-metal images written for QEMU drive as `pc-testdev`: ports and memory that keep what is written, and ports
//! that are lines of the IOAPIC.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::BusDevice;
use crate::host::IrqLine;
use crate::ioapic::{IoApic, PINS};
use crate::saved::{Saves, Unfit, decode, encode, fits, hex};

/// Ports that keep four bytes, and show any part of them.
pub struct TestPorts(Mutex<[u8; 4]>);

impl TestPorts {
    /// First port of the register, of four.
    pub const FIRST: u64 = 0xe0;
    /// First of four ports that take a page of the guest away and give it back at once: nothing that the guest could
    /// see.
    pub const FLUSH: u64 = 0xe4;
    /// First port of the same register, for accesses of any length.
    pub const BYTES: u64 = 0xe8;
    /// Last port of all.
    pub const LAST: u64 = 0xeb;

    /// The register is 0.
    pub fn new() -> Self {
        Self(Mutex::default())
    }

    /// Back to power-on.
    pub fn reset(&self) {
        *self.0.lock().unwrap() = [0; 4];
    }
}

impl Saves for TestPorts {
    fn save(&self) -> Value {
        encode(1, &*self.0.lock().unwrap())
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        *self.0.lock().unwrap() = decode(1, state)?;
        Ok(())
    }
}

impl Default for TestPorts {
    fn default() -> Self {
        Self::new()
    }
}

/// Which bytes of the register an access at `offset` reaches; `None`: those of the flush.
fn part(offset: u64) -> Option<usize> {
    let at = TestPorts::FIRST + offset;
    (!(TestPorts::FLUSH..TestPorts::BYTES).contains(&at)).then_some((offset % 4) as usize)
}

impl BusDevice for TestPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let register = self.0.lock().unwrap();
        if let Some(first) = part(offset) {
            data.iter_mut().zip(&register[first..]).for_each(|(to, from)| *to = *from);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut register = self.0.lock().unwrap();
        if let Some(first) = part(offset) {
            register[first..].iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        }
    }
}

/// A port for each pin of the IOAPIC: a value but 0 raises its line, 0 lowers it.
pub struct TestLines {
    lines: Vec<Arc<dyn IrqLine>>,
    /// One bit for each line that is high.
    high: Mutex<u32>,
}

impl TestLines {
    /// The port of pin 0.
    pub const FIRST: u64 = 0x2000;
    /// The port of the last pin.
    pub const LAST: u64 = Self::FIRST + PINS as u64 - 1;

    /// Lines of `ioapic`, all low.
    pub fn new(ioapic: &Arc<IoApic>) -> Self {
        Self { lines: (0..PINS).map(|pin| ioapic.line(pin)).collect(), high: Mutex::default() }
    }

    fn set(&self, high: u32) {
        let mut before = self.high.lock().unwrap();
        for (line, bit) in self.lines.iter().zip(0..).filter(|(_, bit)| (*before ^ high) & (1 << *bit) != 0) {
            line.set_level(high & (1 << bit) != 0);
        }
        *before = high;
    }

    /// Back to power-on: all low.
    pub fn reset(&self) {
        self.set(0);
    }
}

impl Saves for TestLines {
    fn save(&self) -> Value {
        encode(1, &*self.high.lock().unwrap())
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let high: u32 = decode(1, state)?;
        fits("lines", high < 1 << PINS)?;
        self.set(high);
        Ok(())
    }
}

impl BusDevice for TestLines {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(line) = self.lines.get(offset as usize) {
            let (mut high, bit, is_high) = (self.high.lock().unwrap(), 1 << offset, data.iter().any(|byte| *byte != 0));
            *high = if is_high { *high | bit } else { *high & !bit };
            line.set_level(is_high);
        }
    }
}

/// Memory whose every access leaves the guest.
pub struct TestMemory(Mutex<Box<[u8; Self::LEN as usize]>>);

impl TestMemory {
    /// Where it is.
    pub const FIRST: u64 = 0xff00_0000;
    /// Its bytes.
    pub const LEN: u64 = 0x1_0000;

    /// All zeros.
    pub fn new() -> Self {
        Self(Mutex::new(Box::new([0; Self::LEN as usize])))
    }

    /// Back to power-on.
    pub fn reset(&self) {
        self.0.lock().unwrap().fill(0);
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    #[serde(with = "hex")]
    bytes: Vec<u8>,
}

/// Without the zeros behind what was written.
impl Saves for TestMemory {
    fn save(&self) -> Value {
        let bytes = self.0.lock().unwrap();
        let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        encode(1, &Saved { bytes: bytes[..len].to_vec() })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { mut bytes } = decode(1, state)?;
        fits("memory", bytes.len() as u64 <= Self::LEN)?;
        bytes.resize(Self::LEN as usize, 0);
        self.0.lock().unwrap().copy_from_slice(&bytes);
        Ok(())
    }
}

impl Default for TestMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for TestMemory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let memory = self.0.lock().unwrap();
        let bytes = memory.get(offset as usize..).unwrap_or_default();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut memory = self.0.lock().unwrap();
        let bytes = memory.get_mut(offset as usize..).unwrap_or_default();
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
    }
}

#[cfg(test)]
mod tests {
    use vtd::{Requester, SourceId};

    use super::*;
    use crate::testing::FakeInterrupts;

    fn read<const N: usize>(device: &dyn BusDevice, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        device.read(offset, &mut data);
        data
    }

    #[test]
    fn testdev_ports_keep_every_part_of_what_is_written() {
        let ports = TestPorts::new();
        ports.write(0, &[1, 2, 3, 4]);
        ports.write(2, &[9]);
        assert_eq!(read(&ports, 0), [1, 2, 9, 4]);
        assert_eq!(read(&ports, 1), [2, 9]);
        assert_eq!(read(&ports, TestPorts::BYTES - TestPorts::FIRST + 3), [4]);
        ports.write(3, &[7, 8]);
        assert_eq!(read(&ports, 0), [1, 2, 9, 7], "nothing wraps");
        ports.write(4, &[0, 0, 0, 0]);
        assert_eq!((read(&ports, 0), read(&ports, 4)), ([1, 2, 9, 7], [0; 4]), "the flush is not the register");
        ports.reset();
        assert_eq!(read(&ports, 8), [0; 4]);
    }

    #[test]
    fn testdev_memory_keeps_what_is_written_to_its_end() {
        let memory = TestMemory::new();
        memory.write(0x1234, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(read(&memory, 0x1236), [3, 4, 5, 6]);
        memory.write(TestMemory::LEN - 1, &[5]);
        assert_eq!(read(&memory, TestMemory::LEN - 1), [5]);
        memory.write(TestMemory::LEN - 1, &[6, 7]);
        assert_eq!(read(&memory, TestMemory::LEN - 1), [6, 0]);
        assert_eq!(read(&memory, u64::MAX), [0; 2]);
        memory.write(TestMemory::LEN, &[8]);
        assert_eq!(read(&memory, 0), [0], "nothing wraps");
        memory.reset();
        assert_eq!(read(&memory, 0x1236), [0; 4]);
    }

    #[test]
    fn testdev_lines_are_the_pins_of_the_ioapic() {
        let interrupts = Arc::new(FakeInterrupts::default());
        let requester = Requester { segment: 0, sid: SourceId(0) };
        let ioapic = IoApic::new(requester, interrupts.clone(), None);
        let lines = TestLines::new(&ioapic);
        for pin in [0u8, 5, PINS - 1] {
            // Vector 0x40 + pin, edge-triggered, unmasked.
            ioapic.write(0, &[0x10 + 2 * pin]);
            ioapic.write(0x10, &u32::from(0x40 + pin).to_le_bytes());
            for (value, messages) in [(1u8, 1), (1, 0), (0, 0), (0x80, 1), (0, 0)] {
                lines.write(pin.into(), &[value]);
                let data: Vec<u32> = interrupts.take().iter().map(|msi| msi.data).collect();
                assert_eq!(data, vec![u32::from(0x40 + pin); messages], "pin {pin}, value {value:#x}");
            }
            lines.write(pin.into(), &[0, 0, 0, 1]);
            assert_eq!(interrupts.take().len(), 1);
            lines.reset();
            lines.write(pin.into(), &[1]);
            assert_eq!(interrupts.take().len(), 1, "pin {pin}: the reset lowered it");
        }
        assert_eq!(TestLines::LAST - TestLines::FIRST, 23);
        lines.write(u64::from(PINS), &[1]);
        assert_eq!(read(&lines, 0), [0; 4]);
    }
}
