//! What is said about the host and about assigned functions before the guest starts.

use std::sync::Arc;

use vfio_bridge::{Function, GroupId, Limits};

/// Says what the host allows (B-13), and what it costs (B-12).
pub fn report(limits: &[(GroupId, Limits)], ram: u64) {
    for (group, limits) in limits {
        let ranges: Vec<String> = limits.iova_ranges.iter().map(ToString::to_string).collect();
        let memlock = limits.memlock.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        log::info!(
            "host group {group}: maps {} with pages of {}, {} mappings; locked memory {memlock}",
            ranges.join(" and "),
            page_sizes(limits.page_sizes),
            limits.entries
        );
    }
    if limits.len() > 1 {
        log::info!(
            "{} host groups pin the guest's memory once each while they are untranslated: {} MiB in all",
            limits.len(),
            (ram >> 20) * limits.len() as u64
        );
    }
}

/// Says how each function is reset (F-4); a warning where what the guest told it can outlive a reset of the guest. And
/// who is trusted.
pub fn report_functions(functions: &[Arc<dyn Function>]) {
    for function in functions {
        let (name, way) = (function.name(), function.reset_way());
        if function.is_confined() {
            log::info!("{name}: its process is given no memory, and asks for each access by message");
        } else if function.is_emulated() {
            log::info!("{name}: its process is given the guest's memory and trusted to use only what is mapped");
        }
        if way.is_sure() {
            log::info!("{name} {way}");
        } else {
            log::warn!(
                "{name} {way}: DMA that the guest began before a reset may go on when its next driver enables bus mastering"
            );
        }
    }
}

fn page_sizes(mask: u64) -> String {
    let names: Vec<String> = (12..64u32)
        .filter(|bit| mask >> bit & 1 != 0)
        .map(|bit| match bit {
            0..20 => format!("{}K", 1u64 << (bit - 10)),
            20..30 => format!("{}M", 1u64 << (bit - 20)),
            _ => format!("{}G", 1u64 << (bit - 30)),
        })
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_named() {
        assert_eq!(page_sizes(0x4020_1000), "4K, 2M, 1G");
    }
}
