//! Messages into the guest: the GSI routing table, irqfds, and single messages.
//!
//! GSIs 0 to 23 are the IOAPIC's pins. KVM delivers nothing by them (our IOAPIC sends messages itself), but it looks at their
//! routes to know which vectors are level-triggered and have to exit at their end of interrupt. GSIs from 24 on are message routes.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use devices::host::{Interrupts, IoapicRoutes, IrqRoute};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vtd::{Msi, MsiSink, Requester};

use crate::layout::IOAPIC_PINS;

/// Trigger mode of the data of a message: level.
const DATA_LEVEL: u32 = 1 << 15;
/// KVM takes this many routes (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: usize = 4096;

fn os_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

/// The GSI routing table as we want it.
#[derive(Default)]
struct Table {
    routes: BTreeMap<u32, Msi>,
    used: std::collections::BTreeSet<u32>,
}

impl Table {
    fn allocate(&mut self) -> io::Result<u32> {
        let gsi = (IOAPIC_PINS..MAX_ROUTES as u32)
            .find(|gsi| !self.used.contains(gsi))
            .ok_or_else(|| io::Error::other("all of KVM's interrupt routes are in use"))?;
        self.used.insert(gsi);
        Ok(gsi)
    }

    fn free(&mut self, gsi: u32) {
        self.used.remove(&gsi);
        self.routes.remove(&gsi);
    }

    /// Whether the table differs from before.
    fn set(&mut self, gsi: u32, msi: Msi) -> bool {
        self.routes.insert(gsi, msi) != Some(msi)
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        self.routes
            .iter()
            .map(|(gsi, msi)| {
                let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
                entry.u.msi.address_lo = msi.address as u32;
                entry.u.msi.address_hi = (msi.address >> 32) as u32;
                entry.u.msi.data = msi.data;
                entry
            })
            .collect()
    }
}

/// [`Interrupts`], [`IoapicRoutes`] and [`MsiSink`] over KVM.
pub struct KvmInterrupts {
    vm: Arc<VmFd>,
    table: Mutex<Table>,
    // So that a guest that sends messages into nowhere fills no log.
    complained: AtomicBool,
    this: Weak<Self>,
}

impl KvmInterrupts {
    /// For a virtual machine with a split interrupt chip.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            vm,
            table: Mutex::default(),
            complained: AtomicBool::new(false),
            this: this.clone(),
        })
    }

    fn commit(&self, table: &Table) -> io::Result<()> {
        let routing = KvmIrqRouting::from_entries(&table.entries()).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&routing).map_err(os_error)
    }

    fn deliver(&self, msi: Msi) {
        let message = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // 0 means that the guest blocks the interrupt, which is its right.
        if let Err(e) = self.vm.signal_msi(message)
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            let Msi { address, data } = msi;
            log::warn!("a message {data:#x} to {address:#x} reached no processor ({e}); further ones are not logged");
        }
    }
}

impl Interrupts for KvmInterrupts {
    fn route(&self, _requester: Requester) -> io::Result<Arc<dyn IrqRoute>> {
        let trigger = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let gsi = self.table.lock().unwrap().allocate()?;
        let owner = self.this.upgrade().ok_or_else(|| io::Error::other("the machine is going away"))?;
        Ok(Arc::new(Route { owner, gsi, trigger, attached: Mutex::new(false) }))
    }

    fn signal(&self, _requester: Requester, msi: Msi) {
        self.deliver(msi);
    }
}

impl MsiSink for KvmInterrupts {
    fn signal(&self, msi: Msi) {
        self.deliver(msi);
    }
}

impl IoapicRoutes for KvmInterrupts {
    fn set_pin(&self, pin: u8, route: Option<(Msi, bool)>) {
        // A masked pin keeps its route: a guest masks a pin while its interrupt is in service, and the end of that
        // interrupt must still come out.
        let Some((msi, level)) = route else { return };
        if u32::from(pin) >= IOAPIC_PINS {
            return;
        }
        let data = if level { msi.data | DATA_LEVEL } else { msi.data & !DATA_LEVEL };
        let mut table = self.table.lock().unwrap();
        if table.set(pin.into(), Msi { data, ..msi })
            && let Err(e) = self.commit(&table)
        {
            log::error!("the route of interrupt pin {pin} could not be set: {e}");
        }
    }
}

/// One message route. Masked, it has no irqfd, and signals stay counted in the eventfd.
struct Route {
    owner: Arc<KvmInterrupts>,
    gsi: u32,
    trigger: EventFd,
    attached: Mutex<bool>,
}

impl Route {
    fn detach(&self, attached: &mut bool) -> io::Result<()> {
        if *attached {
            self.owner.vm.unregister_irqfd(&self.trigger, self.gsi).map_err(os_error)?;
            *attached = false;
        }
        Ok(())
    }
}

impl IrqRoute for Route {
    fn trigger(&self) -> &EventFd {
        &self.trigger
    }

    fn set(&self, msi: Option<Msi>) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap();
        let Some(msi) = msi else {
            // The route stays in the table: a vector that is masked and unmasked costs no new table.
            return self.detach(&mut attached);
        };
        let mut table = self.owner.table.lock().unwrap();
        if table.set(self.gsi, msi) {
            self.owner.commit(&table)?;
        }
        drop(table);
        if !*attached {
            // A signal that is counted already is delivered by this call.
            self.owner.vm.register_irqfd(&self.trigger, self.gsi).map_err(os_error)?;
            *attached = true;
        }
        Ok(())
    }

    fn take_pending(&self) -> bool {
        let attached = self.attached.lock().unwrap();
        !*attached && self.trigger.read().is_ok_and(|count| count > 0)
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let mut attached = *self.attached.lock().unwrap();
        if let Err(e) = self.detach(&mut attached) {
            log::warn!("interrupt route {} could not be taken away: {e}", self.gsi);
        }
        let mut table = self.owner.table.lock().unwrap();
        table.free(self.gsi);
        if let Err(e) = self.owner.commit(&table) {
            log::warn!("the interrupt routes could not be updated: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm;
    use vtd::SourceId;

    const MSI: Msi = Msi { address: 0xfee0_1000, data: 0x41 };

    #[test]
    fn the_table_hands_out_gsis_above_the_pins_and_takes_them_back() {
        let mut table = Table::default();
        let (a, b) = (table.allocate().unwrap(), table.allocate().unwrap());
        assert_eq!((a, b), (24, 25));
        assert!(table.set(a, MSI));
        assert!(!table.set(a, MSI));
        assert!(table.set(a, Msi { data: 0x42, ..MSI }));
        table.free(a);
        assert!(table.entries().is_empty());
        assert_eq!(table.allocate().unwrap(), 24);
        while table.allocate().is_ok() {}
        assert_eq!(table.used.len(), MAX_ROUTES - IOAPIC_PINS as usize);
    }

    #[test]
    fn entries_carry_the_whole_message() {
        let mut table = Table::default();
        table.set(30, Msi { address: 0x1_fee0_2000, data: 0x55 });
        let entry = table.entries()[0];
        assert_eq!((entry.gsi, entry.type_), (30, KVM_IRQ_ROUTING_MSI));
        // SAFETY: the entry's type says that this is the member in use.
        let msi = unsafe { entry.u.msi };
        assert_eq!((msi.address_lo, msi.address_hi, msi.data), (0xfee0_2000, 1, 0x55));
    }

    #[test]
    fn a_masked_route_counts_signals_and_a_level_pin_says_so() {
        let Ok(kvm) = vm::open() else {
            eprintln!("no /dev/kvm: nothing to check");
            return;
        };
        let interrupts = KvmInterrupts::new(vm::create(&kvm).unwrap());
        let requester = Requester { segment: 0, sid: SourceId::new(0, 5, 0) };
        let route = interrupts.route(requester).unwrap();
        route.trigger().write(1).unwrap();
        assert!(route.take_pending());
        assert!(!route.take_pending());
        route.set(Some(MSI)).unwrap();
        route.set(Some(Msi { data: 0x43, ..MSI })).unwrap();
        route.set(None).unwrap();
        route.trigger().write(1).unwrap();
        assert!(route.take_pending());
        drop(route);

        interrupts.set_pin(9, Some((MSI, true)));
        assert_eq!(interrupts.table.lock().unwrap().routes[&9].data, 0x41 | DATA_LEVEL);
        interrupts.set_pin(9, None);
        interrupts.set_pin(200, Some((MSI, false)));
        assert_eq!(interrupts.table.lock().unwrap().routes.keys().collect::<Vec<_>>(), [&9]);
    }
}
