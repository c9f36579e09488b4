//! What every PC has had since the AT: the interval timer, the clock, the keyboard controller's reset, and the
//! registers of the two 8259A. KVM has none of them where its interrupt chip is split.

use std::sync::Arc;

use devices::ioapic::IoApic;
use devices::legacy::I8042;
use devices::pic::Pic;
use devices::pit::{Pit, SystemPort};
use devices::pm::PmBlock;
use devices::rtc::Rtc;
use devices::saved::Saves;
use devices::timers::{Alarm, HostClock, Timed, Timers};
use devices::{Bus, BusDevice};

use super::Error;
use crate::machine::control::Control;

/// These devices, and the thread that makes their interrupts.
pub struct Legacy {
    pit: Arc<Pit>,
    rtc: Arc<Rtc>,
    pics: [Arc<Pic>; 2],
    timers: Timers,
}

impl Legacy {
    /// Puts them on the port bus. Their lines are pins of `ioapic`, which the ACPI tables name; the clock's is an event
    /// of `power`, too.
    pub fn add(ports: &Bus, ioapic: &Arc<IoApic>, power: &Arc<PmBlock>, control: &Arc<Control>) -> Result<Self, Error> {
        let (clock, alarm) = (Arc::new(HostClock::new()), Arc::new(Alarm::default()));
        let pit = Pit::new(clock.clone(), alarm.clone(), ioapic.line(Pit::GSI));
        let rtc = Rtc::new(clock.clone(), alarm.clone(), power.clock_line(ioapic.line(Rtc::GSI)));
        let pics = [Arc::new(Pic::new()), Arc::new(Pic::new())];
        let keyboard = I8042::new(control.clone(), SystemPort::new(pit.clone()));
        let [master, slave] = pics.clone();
        let placed: [(u64, u64, Arc<dyn BusDevice>); 5] = [
            (Pic::MASTER, Pic::MASTER + 1, master),
            (Pit::FIRST, Pit::LAST, pit.clone()),
            (I8042::FIRST, I8042::LAST, Arc::new(keyboard)),
            (Rtc::FIRST, Rtc::LAST, rtc.clone()),
            (Pic::SLAVE, Pic::SLAVE + 1, slave),
        ];
        for (first, last, device) in placed {
            ports.insert(first, last, device)?;
        }
        let timed: Vec<Arc<dyn Timed>> = vec![pit.clone(), rtc.clone()];
        let timers = Timers::start(clock, alarm, timed).map_err(Error::Thread)?;
        Ok(Self { pit, rtc, pics, timers })
    }

    /// The devices that are saved, by name.
    pub fn saves(&self) -> [(&'static str, &dyn Saves); 4] {
        let [master, slave] = &self.pics;
        [("pit", &*self.pit), ("rtc", &*self.rtc), ("pic-master", &**master), ("pic-slave", &**slave)]
    }

    /// When this returns they make no interrupt, until [`Legacy::go_on`].
    pub fn hold(&self) {
        self.timers.hold();
    }

    /// They make interrupts again.
    pub fn go_on(&self) {
        self.timers.go_on();
    }

    /// Back to power-on, but for what the clock's battery keeps.
    pub fn reset(&self) {
        self.pit.reset();
        self.rtc.reset();
        self.pics.iter().for_each(|pic| pic.reset());
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::time::{Duration, Instant};

    use devices::host::{Interrupts, IrqRoute};
    use vtd::{Msi, Requester};

    use super::*;
    use crate::kvm::irq;

    /// All pins are masked.
    struct Nobody;
    impl Interrupts for Nobody {
        fn route(&self, _: Requester) -> io::Result<Arc<dyn IrqRoute>> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn set_routes(&self, _: &[(Arc<dyn IrqRoute>, Option<Msi>)]) {}
        fn signal(&self, _: Requester, _: Msi) {}
    }

    #[test]
    fn an_interrupt_of_the_clock_is_an_event_of_power_management() {
        let (ports, control) = (Bus::default(), Arc::new(Control::new(1).unwrap()));
        let ioapic = IoApic::new(irq::ioapic_requester(), Arc::new(Nobody), None);
        let power = Arc::new(PmBlock::new(control.clone(), None));
        let _legacy = Legacy::add(&ports, &ioapic, &power, &control).unwrap();
        // Register B: periodic interrupts.
        ports.write(Rtc::FIRST, &[0x0b]);
        ports.write(Rtc::LAST, &[0x42]);
        let start = Instant::now();
        let mut event = [0; 2];
        // RTC_STS.
        while u16::from_le_bytes(event) & 1 << 10 == 0 {
            assert!(start.elapsed() < Duration::from_secs(30), "no event of the clock");
            std::thread::sleep(Duration::from_millis(1));
            power.read(PmBlock::EVENT, &mut event);
        }
    }
}
