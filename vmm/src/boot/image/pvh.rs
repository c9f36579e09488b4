//! The start information of the PVH boot protocol (Xen's `start_info.h`, version 1), which EBX points at.

use linux_loader::loader::start_info::XEN_HVM_START_MAGIC_VALUE;

use super::StartInfo;
use crate::boot::layout;

const INFO: u64 = layout::BOOT_PARAMS;
const MODULES: u64 = INFO + 0x100;
const MEMORY_MAP: u64 = INFO + 0x200;

/// The start information and what it points at: (address, bytes). The first is what EBX points at.
pub fn information(start: &StartInfo) -> Vec<(u64, Vec<u8>)> {
    let words = |values: &[u64]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()).collect() };
    let memory: Vec<u8> =
        start.memory.iter().flat_map(|(addr, len, kind)| words(&[*addr, *len, u64::from(*kind)])).collect();
    let module = start.module.map_or_else(Vec::new, |(at, len)| words(&[at, len, start.module_name, 0]));
    let modules = u64::from(start.module.is_some());
    let info = words(&[
        u64::from(XEN_HVM_START_MAGIC_VALUE) | 1 << 32,
        modules << 32,
        if modules == 0 { 0 } else { MODULES },
        start.cmdline,
        start.rsdp,
        MEMORY_MAP,
        start.memory.len() as u64,
    ]);
    vec![(INFO, info), (MODULES, module), (MEMORY_MAP, memory)]
}
