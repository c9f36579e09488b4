//! What is said about the host and about assigned functions before the guest starts.

use std::collections::BTreeMap;
use std::sync::Arc;

use vfio_bridge::{Function, GroupId, Limits};

use super::open::Pinning;

/// Says what the host allows (B-13), and what it costs (B-12).
pub fn report(limits: &[(GroupId, Limits)], pinning: Pinning, ram: u64) {
    for (group, limits) in limits {
        let ranges: Vec<String> = limits.iova_ranges.iter().map(ToString::to_string).collect();
        let memlock = limits.memlock.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{} MiB", bytes >> 20));
        log::info!(
            "host group {group}: maps {} with pages of {}, {} mappings; locked memory {memlock}",
            ranges.join(" and "),
            page_sizes(limits.page_sizes),
            if limits.entries == u64::MAX { "any number of".to_owned() } else { limits.entries.to_string() }
        );
    }
    for line in pinned(pinning, ram >> 20) {
        log::info!("{line}");
    }
}

/// What guest memory of `mib` MiB costs, a sentence for each kind of host.
fn pinned(Pinning { type1, iommufd, once }: Pinning, mib: u64) -> Vec<String> {
    let by_type1 = format!(
        "{type1} host groups pin the guest's memory once each while they are untranslated: {} MiB in all",
        mib * type1 as u64
    );
    let by_iommufd = match once {
        true => format!("iommufd pins the guest's memory once for its {iommufd} host group(s): {mib} MiB"),
        false => format!("iommufd pins the guest's memory for each of its spaces: {mib} MiB or more"),
    };
    let said = [(type1 > 1, by_type1), (iommufd > 0, by_iommufd)];
    said.into_iter().filter_map(|(is_so, line)| is_so.then_some(line)).collect()
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

/// Says which functions share a group of the host (C-3) and are not where the guest groups them, too: each with its id,
/// its group, and the bus of the conventional bridge that it is behind.
pub fn report_groups(functions: &[(&str, GroupId, Option<u8>)]) {
    for line in apart(functions) {
        log::info!("{line}");
    }
}

fn apart(functions: &[(&str, GroupId, Option<u8>)]) -> Vec<String> {
    let mut groups: BTreeMap<GroupId, Vec<(&str, Option<u8>)>> = BTreeMap::new();
    for (id, group, bus) in functions {
        groups.entry(*group).or_default().push((id, *bus));
    }
    groups.retain(|_, members| {
        let together = members[0].1.is_some() && members.iter().all(|(_, bus)| *bus == members[0].1);
        members.len() > 1 && !together
    });
    let line = |(group, members): (GroupId, Vec<(&str, Option<u8>)>)| {
        let ids: Vec<&str> = members.into_iter().map(|(id, _)| id).collect();
        format!(
            "{} share a host group ({group}) and reach nothing while the guest has them in different domains; with bus= behind one pcie-pci-bridge the guest, too, has them in one group",
            ids.join(" and ")
        )
    };
    groups.into_iter().map(line).collect()
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
    fn c3_functions_of_one_group_that_the_guest_has_in_several_are_named() {
        let (one, other) = (GroupId::of_software(1), GroupId::of_software(2));
        assert!(apart(&[("a", one, None), ("b", other, None)]).is_empty());
        assert!(apart(&[("a", one, Some(2)), ("b", one, Some(2)), ("c", other, None)]).is_empty());
        for buses in [[None, None], [Some(2), None], [Some(2), Some(3)]] {
            let lines = apart(&[("a", one, buses[0]), ("b", one, buses[1])]);
            assert!(lines.len() == 1 && lines[0].starts_with("a and b share"), "{lines:?}");
        }
    }

    #[test]
    fn page_sizes_are_named() {
        assert_eq!(page_sizes(0x4020_1000), "4K, 2M, 1G");
    }

    #[test]
    fn b12_how_often_memory_is_pinned_is_said() {
        let said = |type1, iommufd, once| pinned(Pinning { type1, iommufd, once }, 512);
        assert_eq!(said(0, 0, false), [""; 0]);
        assert_eq!(said(1, 0, false), [""; 0]);
        assert!(said(2, 0, false)[0].contains("1024 MiB in all"));
        assert!(said(0, 2, true)[0].contains("once for its 2 host group(s): 512 MiB"));
        assert!(said(0, 1, false)[0].contains("each of its spaces"));
        assert_eq!(said(2, 1, true).len(), 2);
    }
}
