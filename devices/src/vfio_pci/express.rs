//! The PCI Express capability of the host's function, as it must be where the function is in the guest (F-6): guests
//! look for the link of an endpoint, and for that of the port above it.

use super::capabilities::{Capability, Patch, Snapshot, list};
use crate::pci::config::CAP_EXPRESS;
use crate::pci::express::{ENDPOINT, INTEGRATED_ENDPOINT, LEGACY_ENDPOINT, SLOWEST_LINK, Upstream};

const LINK_CAPABILITIES: u16 = 0x0c;
const LINK_CONTROL: u16 = 0x10;
/// The registers of version 2: Link Capabilities 2, and Link Control 2 behind it.
const LINK_CAPABILITIES_2: u16 = 0x2c;
const END_OF_VERSION_2: u16 = 0x34;

/// What the guest sees of the capability.
#[derive(PartialEq, Eq, Debug)]
pub enum Seen {
    /// It is as the host has it, but for these.
    With(Vec<Patch>),
    /// It is not there.
    Hidden,
}

/// What a guest that has the function below `upstream` sees.
pub fn seen(config: &Snapshot, upstream: Upstream) -> Seen {
    let Some(Capability { at, .. }) = list(config).into_iter().find(|c| c.id == u16::from(CAP_EXPRESS)) else {
        return Seen::With(Vec::new());
    };
    let Some(wanted) = upstream.endpoint() else { return Seen::Hidden };
    // It does not go on into the extended capabilities.
    let Some(&[flags, high]) = config[..0x100].get(usize::from(at) + 2..usize::from(at) + 4) else {
        return Seen::Hidden;
    };
    let kind = flags >> 4;
    if kind == LEGACY_ENDPOINT && wanted == INTEGRATED_ENDPOINT {
        return Seen::Hidden;
    }
    if kind == wanted || !matches!(kind, ENDPOINT | INTEGRATED_ENDPOINT) {
        return Seen::With(Vec::new());
    }
    let mut patches = vec![Patch { at: at + 2, bytes: vec![flags & 0xf | wanted << 4, high] }];
    let mut put = |from: u16, bytes: Vec<u8>| {
        if at + from + bytes.len() as u16 <= 0x100 {
            patches.push(Patch { at: at + from, bytes });
        }
    };
    // Control and status are one dword.
    let link = if wanted == INTEGRATED_ENDPOINT { 0 } else { SLOWEST_LINK };
    put(LINK_CAPABILITIES, u32::from(link).to_le_bytes().to_vec());
    put(LINK_CONTROL, (u32::from(link) << 16).to_le_bytes().to_vec());
    if flags & 0xf >= 2 {
        put(LINK_CAPABILITIES_2, vec![0; usize::from(END_OF_VERSION_2 - LINK_CAPABILITIES_2)]);
    }
    Seen::With(patches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::config::CONFIG_SIZE;

    fn with_express(at: u8, flags: u8) -> Box<Snapshot> {
        let mut config = Box::new([0x77; CONFIG_SIZE]);
        (config[6], config[0x34]) = (0x10, at);
        config[usize::from(at)..][..4].copy_from_slice(&[CAP_EXPRESS, 0, flags, 0x12]);
        config
    }

    fn guests(config: &Snapshot, upstream: Upstream) -> Option<Box<Snapshot>> {
        let Seen::With(patches) = seen(config, upstream) else { return None };
        let mut seen = Box::new(*config);
        patches.iter().for_each(|p| seen[usize::from(p.at)..][..p.bytes.len()].copy_from_slice(&p.bytes));
        Some(seen)
    }

    #[test]
    fn f6_an_endpoint_on_the_root_bus_is_integrated_and_has_no_link() {
        let config = with_express(0x60, 0x02);
        let seen = guests(&config, Upstream::RootComplex).unwrap();
        assert_eq!(seen[0x62..0x64], [0x92, 0x12]);
        assert_eq!((&seen[0x6c..0x74], &seen[0x8c..0x94]), (&[0; 8][..], &[0; 8][..]));
        let changed = (0..CONFIG_SIZE).filter(|at| seen[*at] != config[*at]).collect::<Vec<_>>();
        let wanted = [0x62].into_iter().chain(0x6c..0x74).chain(0x8c..0x94);
        assert_eq!(changed, wanted.collect::<Vec<_>>(), "nothing else");
        // Version 1 ends before the second link.
        assert_eq!(guests(&with_express(0x60, 0x01), Upstream::RootComplex).unwrap()[0x8c..0x94], [0x77; 8]);
        // One that is integrated stays so.
        assert_eq!(seen_as(0x92, Upstream::RootComplex), Seen::With(vec![]));
    }

    fn seen_as(flags: u8, upstream: Upstream) -> Seen {
        seen(&with_express(0x60, flags), upstream)
    }

    #[test]
    fn f6_an_integrated_endpoint_behind_a_port_has_a_link() {
        let seen = guests(&with_express(0x60, 0x92), Upstream::Port).unwrap();
        assert_eq!(seen[0x62..0x64], [0x02, 0x12]);
        assert_eq!(seen[0x6c..0x74], [0x11, 0, 0, 0, 0, 0, 0x11, 0]);
        for flags in [0x02, 0x12] {
            assert_eq!(seen_as(flags, Upstream::Port), Seen::With(vec![]), "{flags:#x} is right there");
        }
    }

    #[test]
    fn f6_there_is_no_express_below_a_conventional_bus_and_no_legacy_endpoint_in_the_root_complex() {
        for flags in [0x02, 0x12, 0x92] {
            assert_eq!(seen_as(flags, Upstream::Bridge), Seen::Hidden);
        }
        assert_eq!(seen_as(0x12, Upstream::RootComplex), Seen::Hidden);
    }

    #[test]
    fn f6_a_capability_at_the_end_of_the_space_is_changed_as_far_as_it_goes() {
        assert_eq!(guests(&with_express(0xfc, 0x02), Upstream::RootComplex).unwrap()[0xfe], 0x92);
        let seen = guests(&with_express(0xf0, 0x02), Upstream::RootComplex).unwrap();
        assert_eq!((&seen[0xfc..0x100], seen[0x100]), (&[0; 4][..], 0x77));
    }
}
