//! The ports that bare-metal images look for.

use std::sync::Arc;

use devices::Bus;
use devices::bus::Overlap;
use devices::debug_exit::DebugExit;
use devices::fw_cfg::FwCfg;

use crate::boot::memory_map;
use crate::cli::RunArgs;
use crate::control::{Control, Stop};

/// Adds isa-debug-exit and fw_cfg.
pub fn add_ports(ports: &Bus, control: &Arc<Control>, args: &RunArgs) -> Result<(), Overlap> {
    let control = control.clone();
    let exit = DebugExit::new(Box::new(move |value| control.request(Stop::DebugExit(value))));
    ports.insert(DebugExit::FIRST, DebugExit::LAST, Arc::new(exit))?;
    let mut map = Vec::new();
    for (addr, len, kind) in memory_map(args.memory) {
        map.extend_from_slice(&addr.to_le_bytes());
        map.extend_from_slice(&len.to_le_bytes());
        map.extend_from_slice(&kind.to_le_bytes());
    }
    let fw_cfg = FwCfg::new(args.memory, args.cpus.into(), &[("etc/e820", map)]);
    ports.insert(FwCfg::FIRST, FwCfg::LAST, Arc::new(fw_cfg))
}
