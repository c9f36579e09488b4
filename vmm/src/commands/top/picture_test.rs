//! What is drawn of a machine.

use super::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use serde_json::json;

fn sample(wall_ms: u64, maps: u64, faults: u64) -> Sample {
    let reply = json!({"version": 1, "state": "running", "wall_ms": wall_ms, "guest_resets": 1, "exit": null,
        "devices": [
            {"id": "vfio0", "kind": "vfio", "addr": "00:01.0", "backend": "type1",
             "host_maps": maps, "host_unmaps": maps / 2,
             "live_extents": 12, "live_bytes": 49152, "refused_maps": {"limit": 2, "memlock": 1}, "splits": 4,
             "unmaps_refused": 0, "quarantined": 0},
            {"id": "edu0", "kind": "edu", "addr": "00:02.0"}],
        "units": [{"id": "vtd0", "descriptors": {"iotlb": wall_ms / 1000 * 7, "wait": 5}, "register_invalidations": 0,
            "faults": {"0x05": faults}, "map_ops": maps, "unmap_ops": 0}],
        "spaces": [{"space": "unit0/domain2/root0x1000/48bit", "members": ["vfio0"], "mappings": 12},
            {"space": "unit0/domain3/root0x2000/48bit", "members": [], "mappings": null}],
        "attached": {"vfio0": "unit0/domain2/root0x1000/48bit"},
        "audit": {"checked": 3, "pending": 0, "differences": []}});
    serde_json::from_value(reply).unwrap()
}

/// What a terminal of this size shows, and in which colours.
fn drawn(picture: &Picture<'_>, width: u16, height: u16) -> (Vec<String>, Buffer) {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| frame.render_widget(picture, frame.area())).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let line = |y: u16| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    ((0..height).map(line).collect(), buffer)
}

#[test]
fn top_shows_counts_and_what_happened_since_the_last_picture() {
    let (before, now) = (sample(1000, 100, 0), sample(3000, 300, 0));
    let picture = Picture { machine: "/run/g", now: &now, before: Some(&before), history: &[1, 5, 150], note: "" };
    let (lines, _) = drawn(&picture, 130, 24);
    assert!(lines[0].starts_with("causeway /run/g  running  up 0:00:03  resets 1  audit: 3 compared, 0 differ"));
    assert!(
        lines[1]
            .starts_with("host operations 150/s  invalidations 7/s  maps 100/s  unmaps 0/s  faults 0 (0/s)  refused 3")
    );
    let function = lines.iter().find(|line| line.starts_with("vfio0")).unwrap();
    let cells: Vec<&str> = function.split_whitespace().collect();
    let space = "unit0/domain2/root0x1000/48bit";
    assert_eq!(cells, ["vfio0", "00:01.0", "vfio", "type1", space, "12", "48.0K", "150", "3", "4"]);
    let emulated = lines.iter().find(|line| line.starts_with("edu0")).unwrap();
    assert_eq!(emulated.split_whitespace().filter(|cell| *cell == "-").count(), 7);
    assert!(lines.iter().any(|line| line.starts_with("unit0/domain3/") && line.contains("blocked")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("iotlb 21 (7/s) wait 5 (0/s)")), "{lines:?}");
    assert!(lines[23].starts_with("q leaves"));
}

#[test]
fn top_marks_what_should_not_be_and_nothing_else() {
    let red = |buffer: &Buffer| buffer.content().iter().filter(|cell| cell.fg == Color::Red).count();
    let mut quiet = sample(1000, 1, 0);
    quiet.devices[0].refused_maps.clear();
    quiet.units[0].faults.clear();
    let picture = Picture { machine: "", now: &quiet, before: None, history: &[], note: "" };
    assert_eq!(red(&drawn(&picture, 120, 30).1), 0);
    let faulty = sample(1000, 1, 4);
    let picture = Picture { machine: "", now: &faulty, before: None, history: &[], note: "" };
    let (lines, buffer) = drawn(&picture, 120, 30);
    assert!(
        red(&buffer) > 0 && lines.iter().any(|line| line.contains("faults: 4 of 0x05 write not permitted")),
        "{lines:?}"
    );
}

#[test]
fn top_names_the_reasons_of_faults() {
    for (code, name) in
        [("0x05", " write not permitted"), ("0x22", " entry not present"), ("0xff", ""), ("0x105", ""), ("", "")]
    {
        assert_eq!(reason(code), name, "{code}");
    }
}

#[test]
fn top_leaves_out_invalidations_that_there_were_none_of_and_says_how_high_the_bars_are() {
    let mut now = sample(3000, 300, 0);
    now.units[0].descriptors.insert("device_tlb".to_owned(), 0);
    let picture = Picture { machine: "g", now: &now, before: None, history: &[1, 150, 7], note: "" };
    let (lines, _) = drawn(&picture, 130, 24);
    assert!(lines.iter().any(|line| line.starts_with("vtd0: iotlb")) && !lines.concat().contains("device tlb"));
    assert!(lines[2].starts_with("host operations a second, the highest bar 150 ─"), "{}", lines[2]);
}

#[test]
fn top_draws_at_any_size_whatever_a_machine_says() {
    let mut now = sample(u64::MAX, u64::MAX, u64::MAX);
    now.devices[0].id = "\x1b[2Jevil\n\x07\u{202e}".repeat(50);
    now.devices[0].live_bytes = u64::MAX;
    now.spaces = vec![now.spaces[0].clone(); 2000];
    let before = sample(0, 5, 0);
    for (width, height) in [(1, 1), (3, 2), (20, 5), (80, 24), (300, 100)] {
        let picture =
            Picture { machine: "\x1b[31m", now: &now, before: Some(&before), history: &[u64::MAX, 0], note: "" };
        let (_, buffer) = drawn(&picture, width, height);
        assert!(buffer.content().iter().all(|cell| !cell.symbol().contains(char::is_control)), "{width}x{height}");
    }
    let picture = Picture { machine: "g", now: &now, before: None, history: &[], note: "" };
    let said = text(&picture, 120);
    assert!(said.lines().count() < 1000 && !said.contains('\x1b'));
    let small = sample(5000, 10, 0);
    let said = text(&Picture { now: &small, ..picture }, 120);
    assert!(
        said.contains("vfio0") && said.ends_with("0 of 0x05 write not permitted\n") && !said.contains("q leaves"),
        "{said}"
    );
}

#[test]
fn top_rates_are_a_second_and_never_negative() {
    assert_eq!((rate(10, 30, 2000), rate(30, 10, 1000), rate(0, 5, 0), rate(0, u64::MAX, 1)), (10, 0, 0, 0));
    assert_eq!(
        (bytes(0), bytes(1023), bytes(1536), bytes(512 << 20)),
        ("0B".into(), "1023B".into(), "1.5K".into(), "512M".into())
    );
    assert_eq!(bytes(u64::MAX), "16383P");
}
