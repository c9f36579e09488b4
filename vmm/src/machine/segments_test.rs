use std::sync::Mutex;

use devices::pci::config::{BAR0, COMMAND, COMMAND_IO, COMMAND_MEMORY};
use devices::pci::{BarKind, ConfigSpace, Identity};
use vtd::SourceId;

use super::*;

/// What happened to which function, by its segment.
type Happened = Arc<Mutex<Vec<(&'static str, u16)>>>;

/// A function whose device id is its segment, with a BAR of memory and one of ports.
struct Fake {
    segment: u16,
    config: Mutex<ConfigSpace>,
    happened: Happened,
}

impl PciFunction for Fake {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap().write(offset, data);
    }
    fn quiesce(&self) {
        self.happened.lock().unwrap().push(("quiet", self.segment));
    }
    fn reset(&self) {
        self.happened.lock().unwrap().push(("reset", self.segment));
    }
}

/// Each has such a function at one address.
const SEGMENTS: [u16; 4] = [0, 1, 4, 7];
const AT: SourceId = SourceId::new(0, 3, 0);

fn segments(mmio: &Arc<Bus>) -> (Segments, Happened) {
    let happened = Happened::default();
    let segments = Segments::new(PciRoot::new(mmio.clone()), &SEGMENTS.into(), mmio).unwrap();
    for segment in SEGMENTS {
        let id = Identity { vendor: 1, device: segment, revision: 0, class: 0xff_00_00, subsystem: (0, 0) };
        let mut config = ConfigSpace::new(&id);
        config.add_bar(0, BarKind::Memory32, 0x1000);
        config.add_bar(1, BarKind::Io, 0x20);
        let function = Fake { segment, config: Mutex::new(config), happened: happened.clone() };
        segments.of(segment).unwrap().insert(AT, Arc::new(function)).unwrap();
    }
    (segments, happened)
}

fn read(root: &PciRoot, offset: u16) -> u32 {
    let mut data = [0; 4];
    root.config_read(AT, offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a13_configuration_space_of_each_segment_is_at_its_own_place_and_has_its_own_functions() {
    let mmio = Arc::new(Bus::default());
    let (segments, _) = segments(&mmio);
    for segment in SEGMENTS {
        assert_eq!(read(segments.of(segment).unwrap(), 0), u32::from(segment) << 16 | 1);
        let mut data = [0; 4];
        let at = layout::ecam_of(segment) + (u64::from(AT.0) << 12);
        // That of segment 0 is put there by the machine.
        assert_eq!(mmio.read(at, &mut data), segment != 0, "segment {segment}");
        assert!(segment == 0 || u32::from_le_bytes(data) == u32::from(segment) << 16 | 1, "segment {segment}");
    }
    assert!(matches!(segments.of(2), Err(Error::NoSegment(2))));
    let names: Vec<Requester> = segments.functions().into_iter().map(|(name, _)| name).collect();
    let of_segment = |segment| [SourceId::new(0, 0, 0), AT].map(|sid| Requester { segment, sid });
    assert_eq!(names, SEGMENTS.map(of_segment).concat(), "the host bridge of each, and the function");
}

#[test]
fn a13_functions_of_all_segments_are_quiet_before_the_first_is_reset() {
    let (segments, happened) = segments(&Arc::new(Bus::default()));
    segments.quiesce();
    let quiet = SEGMENTS.map(|segment| ("quiet", segment));
    assert_eq!(std::mem::take(&mut *happened.lock().unwrap()), quiet);
    segments.reset();
    let all = std::mem::take(&mut *happened.lock().unwrap());
    assert_eq!(all[..quiet.len()], quiet);
    let resets: Vec<_> = all.into_iter().filter(|(what, _)| *what == "reset").collect();
    assert_eq!(resets, SEGMENTS.map(|segment| ("reset", segment)));
}

#[test]
fn a13_bars_of_each_segment_get_an_address_in_its_window_and_ports_are_of_the_first() {
    let (segments, _) = segments(&Arc::new(Bus::default()));
    let windows = segments.fitting(1 << 30, 46).unwrap();
    segments.assign(&windows);
    for (segment, windows) in SEGMENTS.into_iter().zip(&windows) {
        let root = segments.of(segment).unwrap();
        assert_eq!(windows.segment, segment);
        let at = u64::from(read(root, BAR0) & !0xf);
        assert!((windows.low.first..=windows.low.last).contains(&at), "segment {segment}: {at:#x}");
        let enabled = if segment == 0 { COMMAND_MEMORY | COMMAND_IO } else { COMMAND_MEMORY };
        assert_eq!(read(root, COMMAND) as u16, enabled, "segment {segment}");
        assert_eq!(read(root, BAR0 + 4) & !3 != 0, segment == 0, "segment {segment}");
    }
}

#[test]
fn a14_windows_of_a_machine_with_other_segments_are_refused() {
    let (segments, _) = segments(&Arc::new(Bus::default()));
    let fitting = || segments.fitting(1 << 30, 46).unwrap();
    let high = [Some([1 << 40, (1 << 41) - 1]), None, Some([1 << 41, (1 << 42) - 1]), None];
    let saved = segments.as_saved(fitting(), &high).unwrap();
    let places: Vec<_> = saved.iter().map(|it| it.high.map(|window| [window.first, window.last])).collect();
    assert_eq!(places, high);
    for other in [&high[..3], &[&high[..], &[None]].concat()] {
        let refused = segments.as_saved(fitting(), other);
        assert!(matches!(refused, Err(Error::OtherSegments { here: 4, saved }) if saved == other.len()));
    }
}
