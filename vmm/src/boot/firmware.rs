//! What bare-metal images written for QEMU look for: isa-debug-exit, fw_cfg, pc-testdev.

use std::sync::Arc;

use devices::Bus;
use devices::bus::Overlap;
use devices::debug_exit::DebugExit;
use devices::fw_cfg::FwCfg;
use devices::ioapic::IoApic;
use devices::pc_testdev::{TestLines, TestMemory, TestPorts};
use devices::saved::Saves;

use crate::boot::memory_map;
use crate::machine::control::{Control, Stop};

/// These devices.
pub struct ImageDevices {
    ports: Arc<TestPorts>,
    lines: Arc<TestLines>,
    memory: Arc<TestMemory>,
    fw_cfg: Arc<FwCfg>,
}

impl ImageDevices {
    /// Puts them on the buses.
    pub fn add(
        ports: &Bus,
        mmio: &Bus,
        ioapic: &Arc<IoApic>,
        control: &Arc<Control>,
        ram: u64,
        cpus: u8,
    ) -> Result<Self, Overlap> {
        let control = control.clone();
        let exit = DebugExit::new(Box::new(move |value| control.request(Stop::DebugExit(value))));
        ports.insert(DebugExit::FIRST, DebugExit::LAST, Arc::new(exit))?;
        let mut map = Vec::new();
        for (addr, len, kind) in memory_map(ram) {
            map.extend_from_slice(&addr.to_le_bytes());
            map.extend_from_slice(&len.to_le_bytes());
            map.extend_from_slice(&kind.to_le_bytes());
        }
        let fw_cfg = Arc::new(FwCfg::new(ram, cpus.into(), &[("etc/e820", map)]));
        ports.insert(FwCfg::FIRST, FwCfg::LAST, fw_cfg.clone())?;
        let tests = Self {
            ports: Arc::new(TestPorts::new()),
            lines: Arc::new(TestLines::new(ioapic)),
            memory: Arc::new(TestMemory::new()),
            fw_cfg,
        };
        ports.insert(TestPorts::FIRST, TestPorts::LAST, tests.ports.clone())?;
        ports.insert(TestLines::FIRST, TestLines::LAST, tests.lines.clone())?;
        mmio.insert(TestMemory::FIRST, TestMemory::FIRST + TestMemory::LEN - 1, tests.memory.clone())?;
        Ok(tests)
    }

    /// The devices that are saved, by name.
    pub fn saves(&self) -> [(&'static str, &dyn Saves); 4] {
        let Self { ports, lines, memory, fw_cfg } = self;
        [("test-ports", &**ports), ("test-lines", &**lines), ("test-memory", &**memory), ("fw-cfg", &**fw_cfg)]
    }

    /// Back to power-on.
    pub fn reset(&self) {
        let Self { ports, lines, memory, fw_cfg: _ } = self;
        ports.reset();
        lines.reset();
        memory.reset();
    }
}
