//! The capabilities of the host's function: which there are, and which the guest does not see.

use crate::pci::config::CONFIG_SIZE;

/// A snapshot of the host's configuration space.
pub type Snapshot = [u8; CONFIG_SIZE];

/// A capability, and the one before it in the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capability {
    /// Capability id.
    pub id: u16,
    /// Where it is.
    pub at: u16,
    /// The next one; 0 at the end.
    pub next: u16,
}

/// Enhanced Allocation fixes BARs where the host has them: the guest's are elsewhere.
const ENHANCED_ALLOCATION: u16 = 0x14;

const ARI: u16 = 0x0e;
const ATS: u16 = 0x0f;
const SRIOV: u16 = 0x10;
const PRI: u16 = 0x13;
const RESIZABLE_BAR: u16 = 0x15;
const PASID: u16 = 0x1b;
const VF_RESIZABLE_BAR: u16 = 0x24;

fn u16_at(config: &Snapshot, at: u16) -> u16 {
    let at = usize::from(at);
    u16::from_le_bytes([config[at], config[at + 1]])
}

fn u32_at(config: &Snapshot, at: u16) -> u32 {
    u32::from(u16_at(config, at)) | (u32::from(u16_at(config, at + 2)) << 16)
}

/// The capabilities of the first 256 bytes, in the list's order. A list that runs in a circle ends.
pub fn list(config: &Snapshot) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    if u16_at(config, 0x06) & 0x10 == 0 {
        return found;
    }
    let mut at = u16::from(config[0x34] & 0xfc);
    while at >= 0x40 && found.iter().all(|c| c.at != at) {
        let next = u16::from(config[usize::from(at) + 1] & 0xfc);
        found.push(Capability { id: u16::from(config[usize::from(at)]), at, next });
        at = next;
    }
    found
}

/// The extended capabilities, in the list's order. A list that runs in a circle ends.
pub fn extended(config: &Snapshot) -> Vec<Capability> {
    let mut found: Vec<Capability> = Vec::new();
    let mut at = 0x100;
    while at >= 0x100 && found.iter().all(|c| c.at != at) {
        let header = u32_at(config, at);
        if header == 0 || header == u32::MAX {
            break;
        }
        let next = (header >> 20) as u16 & 0xffc;
        found.push(Capability { id: header as u16, at, next });
        at = next;
    }
    found
}

/// Bytes that the guest sees instead of the host's.
#[derive(PartialEq, Eq, Debug)]
pub struct Patch {
    /// Where.
    pub at: u16,
    /// What the guest reads; it cannot write there.
    pub bytes: Vec<u8>,
}

/// What must change so that the guest does not find the hidden capabilities (F-6), nor those of the first 256 bytes
/// whose ids are `unusable`.
pub fn hide(config: &Snapshot, unusable: &[u8]) -> Vec<Patch> {
    let mut patches = Vec::new();
    // Where the link to the next capability that is seen has to go.
    let mut link = 0x34;
    let mut relink = false;
    for capability in list(config) {
        let hidden = capability.id == ENHANCED_ALLOCATION || unusable.contains(&(capability.id as u8));
        if hidden {
            relink = true;
            continue;
        }
        if relink {
            patches.push(Patch { at: link, bytes: vec![capability.at as u8] });
        }
        (link, relink) = (capability.at + 1, false);
    }
    if relink {
        patches.push(Patch { at: link, bytes: vec![0] });
    }
    hide_extended(config, &mut patches);
    patches
}

fn hide_extended(config: &Snapshot, patches: &mut Vec<Patch>) {
    let all = extended(config);
    let is_hidden = |c: &Capability| matches!(c.id, ARI | ATS | SRIOV | PRI | RESIZABLE_BAR | PASID | VF_RESIZABLE_BAR);
    let end_of_list = all.last().map_or(0, |c| c.next);
    for (index, capability) in all.iter().enumerate() {
        // The list starts at 0x100 whatever is there, so what is there keeps a header; a hidden one gets the null id.
        let is_first = index == 0;
        if is_hidden(capability) {
            let len = length(config, capability).min(CONFIG_SIZE as u16 - capability.at);
            let skip = if is_first { 4 } else { 0 };
            patches.push(Patch { at: capability.at + skip, bytes: vec![0; usize::from(len - skip)] });
            if !is_first {
                continue;
            }
        }
        let next_seen = all[index + 1..].iter().find(|c| !is_hidden(c)).map_or(0, |c| c.at);
        let circle = end_of_list != 0 && next_seen == 0;
        if is_hidden(capability) || next_seen != capability.next || circle {
            let header = u32_at(config, capability.at);
            let id = if is_hidden(capability) { 0 } else { header & 0xf_ffff };
            let header = id | (u32::from(next_seen) << 20);
            patches.push(Patch { at: capability.at, bytes: header.to_le_bytes().to_vec() });
        }
    }
}

/// Bytes of a hidden capability.
fn length(config: &Snapshot, capability: &Capability) -> u16 {
    match capability.id {
        SRIOV => 0x40,
        PRI => 0x10,
        RESIZABLE_BAR | VF_RESIZABLE_BAR if usize::from(capability.at) + 12 <= CONFIG_SIZE => {
            // Bits 7:5 of the first control register: how many resizable BARs there are, 6 at most.
            let count = (u32_at(config, capability.at + 8) >> 5 & 7).clamp(1, 6) as u16;
            4 + 8 * count
        }
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_extended(chain: &[(u16, u16)]) -> Box<Snapshot> {
        let mut config = Box::new([0u8; CONFIG_SIZE]);
        for (index, (at, id)) in chain.iter().enumerate() {
            let next = chain.get(index + 1).map_or(0, |(at, _)| *at);
            let header = u32::from(*id) | 1 << 16 | u32::from(next) << 20;
            config[usize::from(*at)..usize::from(*at) + 4].copy_from_slice(&header.to_le_bytes());
            config[usize::from(*at) + 4..usize::from(*at) + 8].fill(0x77);
        }
        config
    }

    fn ids_seen(config: &Snapshot) -> Vec<(u16, u16)> {
        let mut seen = *config;
        for patch in hide(config, &[]) {
            let at = usize::from(patch.at);
            seen[at..at + patch.bytes.len()].copy_from_slice(&patch.bytes);
        }
        extended(&seen).iter().map(|c| (c.at, c.id)).collect()
    }

    #[test]
    fn f6_hidden_capabilities_are_unlinked_wherever_they_stand() {
        let config = with_extended(&[(0x100, 1), (0x140, ARI), (0x150, ATS), (0x200, 3), (0x300, SRIOV)]);
        assert_eq!(ids_seen(&config), [(0x100, 1), (0x200, 3)]);
    }

    #[test]
    fn f6_a_hidden_first_capability_leaves_a_null_header_that_links_on() {
        let config = with_extended(&[(0x100, SRIOV), (0x200, 3)]);
        assert_eq!(ids_seen(&config), [(0x100, 0), (0x200, 3)]);
        assert_eq!(ids_seen(&with_extended(&[(0x100, PASID)])), []);
    }

    #[test]
    fn f6_nothing_of_a_hidden_capability_can_be_read() {
        let config = with_extended(&[(0x100, 1), (0x140, RESIZABLE_BAR)]);
        let patches = hide(&config, &[]);
        assert!(patches.iter().any(|p| p.at == 0x140 && p.bytes.len() >= 12 && p.bytes.iter().all(|b| *b == 0)));
    }

    #[test]
    fn f6_lists_that_run_in_circles_end() {
        let mut config = with_extended(&[(0x100, 1), (0x140, 3)]);
        config[0x143] = 0x10;
        assert_eq!(extended(&config).len(), 2);
        config[6] = 0x10;
        config[0x34] = 0x40;
        config[0x40..0x42].copy_from_slice(&[5, 0x50]);
        config[0x50..0x52].copy_from_slice(&[0x14, 0x40]);
        assert_eq!(list(&config).iter().map(|c| c.id).collect::<Vec<_>>(), [5, 0x14]);
        assert_eq!(hide(&config, &[])[0], Patch { at: 0x41, bytes: vec![0] });
        assert_eq!(ids_seen(&config), [(0x100, 1), (0x140, 3)]);
    }

    #[test]
    fn f6_each_hidden_capability_goes_with_all_of_its_bytes_and_no_more() {
        // Id, and bytes; the resizable BARs have one, and six, and more than there can be.
        let all = [(ARI, 0x08), (ATS, 0x08), (SRIOV, 0x40), (PRI, 0x10), (PASID, 0x08)];
        let resizable = [(0x20, 0x0c), (0xc0, 0x34), (0xe0, 0x34), (0x00, 0x0c)];
        let cases = all.into_iter().map(|(id, len)| (id, 0, len));
        let cases = cases.chain(resizable.map(|(control, len)| (RESIZABLE_BAR, control, len)));
        for (id, control, len) in cases.chain(resizable.map(|(control, len)| (VF_RESIZABLE_BAR, control, len))) {
            let mut config = with_extended(&[(0x100, 1), (0x140, id), (0x300, 3)]);
            config[0x144..0x200].fill(0x77);
            config[0x148] = control;
            let patches = hide(&config, &[]);
            let zeroed: Vec<_> = patches.iter().filter(|p| p.bytes.iter().all(|b| *b == 0)).collect();
            assert_eq!(zeroed.len(), 1, "{id:#x}");
            assert_eq!((zeroed[0].at, zeroed[0].bytes.len()), (0x140, len), "{id:#x} {control:#x}");
            assert_eq!(ids_seen(&config), [(0x100, 1), (0x300, 3)]);
        }
        // What a guest may see stays as it is.
        assert_eq!(hide(&with_extended(&[(0x100, 1), (0x140, 3), (0x160, 0x0d)]), &[]), []);
    }

    #[test]
    fn f6_a_hidden_capability_at_the_end_of_the_space_ends_there() {
        let config = with_extended(&[(0x100, 1), (0xff8, SRIOV)]);
        let patches = hide(&config, &[]);
        assert!(patches.iter().all(|patch| usize::from(patch.at) + patch.bytes.len() <= CONFIG_SIZE));
        assert_eq!(ids_seen(&config), [(0x100, 1)]);
        assert_eq!(ids_seen(&with_extended(&[(0x100, 1), (0xff8, RESIZABLE_BAR)])), [(0x100, 1)]);
    }

    #[test]
    fn f6_the_first_capabilities_are_listed_if_the_function_says_that_it_has_some() {
        let mut config = Box::new([0u8; CONFIG_SIZE]);
        config[0x34] = 0x43;
        config[0x40..0x42].copy_from_slice(&[9, 0x53]);
        config[0x50..0x52].copy_from_slice(&[5, 0x30]);
        assert_eq!(list(&config), []);
        config[6] = 0x10;
        let listed = [Capability { id: 9, at: 0x40, next: 0x50 }, Capability { id: 5, at: 0x50, next: 0x30 }];
        assert_eq!(list(&config), listed, "a link into the header is no capability");
    }

    #[test]
    fn f6_hidden_ones_of_the_first_capabilities_are_passed_by() {
        let mut config = Box::new([0u8; CONFIG_SIZE]);
        (config[6], config[0x34]) = (0x10, 0x40);
        for (at, id, next) in [(0x40, 0x14, 0x50), (0x50, 5, 0x60), (0x60, 1, 0x70), (0x70, 0x11, 0)] {
            config[at..at + 2].copy_from_slice(&[id, next]);
        }
        let patch = |at, byte| Patch { at, bytes: vec![byte] };
        assert_eq!(hide(&config, &[]), [patch(0x34, 0x50)]);
        assert_eq!(hide(&config, &[5]), [patch(0x34, 0x60)]);
        assert_eq!(hide(&config, &[1]), [patch(0x34, 0x50), patch(0x51, 0x70)]);
        assert_eq!(hide(&config, &[1, 0x11]), [patch(0x34, 0x50), patch(0x51, 0)]);
    }

    #[test]
    fn f6_extended_lists_end_at_what_is_no_header() {
        for end in [0, u32::MAX] {
            let mut config = with_extended(&[(0x100, 1), (0x140, 3), (0x200, 4)]);
            config[0x140..0x144].copy_from_slice(&end.to_le_bytes());
            assert_eq!(extended(&config), [Capability { id: 1, at: 0x100, next: 0x140 }]);
        }
    }
}
