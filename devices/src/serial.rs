//! The serial port: a 16550A at [`SerialPort::FIRST`], for the guest's console.

use std::convert::Infallible;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_superio::serial::{Error, SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::BusDevice;
use crate::host::IrqLine;
use crate::saved::{Saves, Unfit, decode, encode, fits, hex};

/// Bytes that were typed and not read, at most.
const INPUT: usize = 64;

/// COM1.
pub struct SerialPort {
    line: Pulse,
    drained: Drained,
    uart: Mutex<Uart>,
}

type Uart = Serial<Pulse, Drained, Box<dyn Write + Send>>;

/// An edge on the line for each interrupt: ISA interrupts are edge-triggered.
#[derive(Clone)]
struct Pulse {
    line: Arc<dyn IrqLine>,
    /// None is sent.
    silent: Arc<AtomicBool>,
}

impl Trigger for Pulse {
    type E = Infallible;
    fn trigger(&self) -> Result<(), Infallible> {
        if !self.silent.load(Ordering::Relaxed) {
            self.line.set_level(true);
            self.line.set_level(false);
        }
        Ok(())
    }
}

/// Says when the guest has read all that was typed.
#[derive(Clone)]
struct Drained(Option<Arc<EventFd>>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if let Some(Err(e)) = self.0.as_ref().map(|event| event.write(1)) {
            log::debug!("the serial port's event could not be signalled: {e}");
        }
    }
}

impl SerialPort {
    /// First port.
    pub const FIRST: u64 = 0x3f8;
    /// Last port.
    pub const LAST: u64 = 0x3ff;
    /// The global system interrupt, edge-triggered.
    pub const GSI: u8 = 4;

    /// A port that interrupts through `line`, writes what the guest sends to `out`, and signals `drained`, if there is
    /// one, when the guest has read all input: then [`SerialPort::enqueue`] takes more.
    pub fn new(line: Arc<dyn IrqLine>, out: Box<dyn Write + Send>, drained: Option<EventFd>) -> Self {
        let (line, drained) = (Pulse { line, silent: Arc::default() }, Drained(drained.map(Arc::new)));
        let uart = Mutex::new(Serial::with_events(line.clone(), drained.clone(), out));
        Self { line, drained, uart }
    }

    /// Every register to its state after power-on. What the guest has not read is lost, as on hardware; input goes on.
    pub fn reset(&self) {
        let mut uart = self.uart.lock().unwrap();
        let fresh = |out: Box<dyn Write + Send>| Serial::with_events(self.line.clone(), self.drained.clone(), out);
        let old = std::mem::replace(&mut *uart, fresh(Box::new(std::io::sink())));
        *uart = fresh(old.into_writer());
        self.drained.in_buffer_empty();
    }

    /// Gives the guest input; how many bytes of `input` fitted (64 at most). 0 as well while the guest tests the port
    /// in loop-back mode.
    pub fn enqueue(&self, input: &[u8]) -> usize {
        match self.uart.lock().unwrap().enqueue_raw_bytes(input) {
            Ok(taken) => taken,
            Err(Error::FullFifo) => 0,
            Err(e) => {
                log::debug!("input for the serial port was lost: {e:?}");
                0
            }
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    /// Divisor, low and high; enabled interrupts, their identification; line control and status; modem control and
    /// status; scratch.
    registers: [u8; 9],
    /// What was typed and not read.
    #[serde(with = "hex")]
    input: Vec<u8>,
}

impl Saves for SerialPort {
    fn save(&self) -> Value {
        let state = self.uart.lock().unwrap().state();
        let registers = [
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ];
        encode(1, &Saved { registers, input: state.in_buffer })
    }

    fn restore(&self, state: &Value) -> Result<(), Unfit> {
        let Saved { registers, input } = decode(1, state)?;
        let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] = registers;
        fits("enabled interrupts", enable & !0x0f == 0)?;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control: line,
            line_status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: input,
        };
        fits("input", state.in_buffer.len() <= INPUT)?;
        let mut uart = self.uart.lock().unwrap();
        let nowhere: Box<dyn Write + Send> = Box::new(std::io::sink());
        let fresh = Serial::with_events(self.line.clone(), self.drained.clone(), nowhere);
        let out = std::mem::replace(&mut *uart, fresh).into_writer();
        // An edge that was sent is in the processor's state, and none is sent again.
        self.line.silent.store(true, Ordering::Relaxed);
        let restored = Serial::from_state(&state, self.line.clone(), self.drained.clone(), out);
        self.line.silent.store(false, Ordering::Relaxed);
        *uart = restored.map_err(|_| Unfit::Value("input"))?;
        Ok(())
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut serial = self.uart.lock().unwrap();
        data[0] = serial.read(offset as u8);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Err(e) = self.uart.lock().unwrap().write(offset as u8, data[0]) {
            log::debug!("output of the serial port was lost: {e:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeLine;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);
    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn serial_output_goes_out_and_input_interrupts_and_comes_back() {
        let (line, screen) = (Arc::new(FakeLine::default()), Screen::default());
        let port = SerialPort::new(line.clone(), Box::new(screen.clone()), None);
        port.write(0, b"A");
        assert_eq!(*screen.0.lock().unwrap(), b"A");
        port.write(1, &[1]);
        assert_eq!(port.enqueue(b"xy"), 2);
        assert!(!line.is_high());
        assert_eq!(*line.rises.lock().unwrap(), 1);
        let mut bytes = [0; 2];
        port.read(0, &mut bytes);
        assert_eq!(bytes, [b'x', 0xff], "a port has one byte");
    }

    #[test]
    fn serial_a_full_buffer_takes_no_more_and_says_when_it_is_empty() {
        let drained = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(Arc::new(FakeLine::default()), Box::new(std::io::sink()), drained.try_clone().ok());
        let input = [0x61; 100];
        let taken = port.enqueue(&input);
        assert!(taken < 100);
        assert_eq!(port.enqueue(&input), 0);
        assert!(drained.read().is_err());
        let mut byte = [0];
        for _ in 0..taken {
            port.read(0, &mut byte);
        }
        assert!(drained.read().is_ok());
    }

    #[test]
    fn serial_a_reset_leaves_nothing_of_the_boot_before() {
        let drained = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let (line, screen) = (Arc::new(FakeLine::default()), Screen::default());
        let port = SerialPort::new(line.clone(), Box::new(screen.clone()), drained.try_clone().ok());
        let registers = || {
            (1..8u64).map(|offset| {
                let mut byte = [0];
                port.read(offset, &mut byte);
                byte[0]
            })
        };
        let power_on: Vec<u8> = registers().collect();
        port.write(1, &[3]);
        port.write(4, &[0x10]);
        port.write(7, &[0x55]);
        assert_eq!(port.enqueue(b"x"), 0, "loop-back mode");
        port.write(4, &[0x0b]);
        assert_eq!(port.enqueue(&[0x61; 64]), 64);
        // The divisor's registers take the place of the data register.
        port.write(3, &[0x83]);
        port.reset();
        assert!(drained.read().is_ok(), "there is room for input again");
        assert_eq!(registers().collect::<Vec<_>>(), power_on);
        let rises = *line.rises.lock().unwrap();
        assert_eq!(port.enqueue(b"y"), 1);
        assert_eq!(*line.rises.lock().unwrap(), rises, "no interrupt is enabled");
        let mut byte = [0];
        port.read(0, &mut byte);
        port.write(0, b"A");
        assert_eq!((byte, &**screen.0.lock().unwrap()), (*b"y", &b"A"[..]));
    }
}
