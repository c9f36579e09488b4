//! The page of a trace: what is in it, that it is whole, and that no trace makes it large or puts markup into it.

use super::*;
use proptest::prelude::*;
use std::fmt::Write as _;
use std::io::Cursor;
use vtd::IovaRange;

const TRACE: &str = "\
0.000001000 host memory gpa=0x0-0x1fffffff hva=0x7f0000000000
0.000100000 notify attach device=0000:00:01.0 space=identity
0.000200000 host map container=3 iova=0x0-0x1fffffff gpa=0x0 perm=rw ns=100000 result=ok
0.000300000 notify attached device=0000:00:01.0 space=identity result=ok
1.000000000 notify attach device=0000:00:01.0 space=unit0/domain2/root0x1000/48bit
1.000100000 host unmap container=3 iova=0x0-0xffffffffffffffff bytes=0x20000000 ns=5000 result=ok
1.000200000 notify attached device=0000:00:01.0 space=unit0/domain2/root0x1000/48bit result=ok
1.100000000 notify map space=unit0/domain2/root0x1000/48bit iova=0xfffe0000-0xfffeffff gpa=0x10000 perm=rw
1.100100000 host map container=3 iova=0xfffe0000-0xfffeffff gpa=0x10000 perm=rw ns=7000 result=ok
1.100200000 notify applied space=unit0/domain2/root0x1000/48bit ops=1 refused=0
1.200000000 notify unmap space=unit0/domain2/root0x1000/48bit iova=0xfffe4000-0xfffe4fff
1.200100000 host unmap container=3 iova=0xfffe0000-0xfffeffff bytes=0x10000 ns=9000 result=ok
1.200200000 host map container=3 iova=0xfffe0000-0xfffe3fff gpa=0x10000 perm=rw ns=7000 result=ok
1.200300000 host map container=3 iova=0xfffe5000-0xfffeffff gpa=0x15000 perm=rw ns=7000 result=ok
1.200400000 notify applied space=unit0/domain2/root0x1000/48bit ops=1 refused=0
1.300000000 notify map space=unit0/domain2/root0x1000/48bit iova=0x1000-0x1fff gpa=0x9000 perm=rw
1.300100000 host map container=3 iova=0x1000-0x1fff gpa=0x9000 perm=rw ns=7000 result=No_space_left
1.300200000 notify refused space=unit0/domain2/root0x1000/48bit device=0000:00:01.0 iova=0x1000-0x1fff cause=limit
1.300300000 notify applied space=unit0/domain2/root0x1000/48bit ops=1 refused=1
2.000000000 host ledger container=3 extents=2 bytes=0xf000
";

fn made(trace: &[u8]) -> String {
    make("a.trace", &mut Cursor::new(trace)).unwrap()
}

fn summary(trace: &str) -> Summary {
    let mut summary = Summary::default();
    trace.lines().for_each(|line| summary.add(line));
    summary
}

/// The names of the open elements at each place where one begins; panics where one is closed that is not open.
fn elements(page: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut open: Vec<&str> = Vec::new();
    for part in page.split('<').skip(1) {
        let (tag, _) = part.split_once('>').expect("a tag without an end");
        let name = tag.split([' ', '\n']).next().unwrap();
        match name.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name)),
            None if tag.ends_with('/') || matches!(name, "!DOCTYPE" | "meta") => names.push(name.to_owned()),
            None => {
                open.push(name);
                names.push(name.to_owned());
            }
        }
    }
    assert!(open.is_empty(), "{open:?} are not closed");
    names
}

#[test]
fn report_counts_what_a_trace_says() {
    let found = summary(TRACE);
    let container = &found.containers.0["3"];
    assert_eq!((container.maps, container.unmaps, container.failed), (4, 2, 1));
    // The two pieces beside the page that went, and not the map that was asked for, nor the fill of identity.
    assert_eq!(container.remainders, 2);
    assert_eq!(container.used, [IovaRange::new(0, 0x1fff_ffff), IovaRange::new(0xfffe_0000, 0xfffe_ffff)]);
    let function = &found.functions.0["0000:00:01.0"];
    assert_eq!((function.attaches, function.failed, function.space.as_str()), (2, 0, "unit0/domain2/root0x1000/48bit"));
    assert_eq!(function.refused, [("limit", 1)].into());
    let space = &found.spaces.0["unit0/domain2/root0x1000/48bit"];
    assert_eq!((space.maps, space.unmaps, space.refused), (2, 1, 1));
    assert_eq!((found.lines, found.others, found.batches, found.refused), (20, 0, 3, 1));
    assert_eq!(found.slowest[0].ns, 100_000);
    let spans = found.spans.iter().fold((0, 0, 0, 0), |(maps, unmaps, refused, remainders), span| {
        (maps + span.maps, unmaps + span.unmaps, refused + span.refused, remainders + span.remainders)
    });
    assert_eq!(spans, (5, 2, 1, 2));
}

#[test]
fn report_pictures_show_when_addresses_are_mapped() {
    let found = summary(TRACE);
    let mut grid = Grid::new(&found.containers.0["3"].used, found.end);
    for line in TRACE.lines().filter_map(Line::parse).filter(|line| matches!(line.what, ("host", "map" | "unmap"))) {
        grid.add(&line);
    }
    grid.finish();
    let columns = |row: usize| {
        let mapped = |column: &usize| grid.cells[row][*column];
        ((0..grid::COLUMNS).find(mapped), (0..grid::COLUMNS).rfind(mapped))
    };
    // RAM for the first half, which is one second of two.
    assert_eq!(columns(0), (Some(0), Some(grid::COLUMNS / 2)));
    // The page from 1.1 s to the end.
    assert_eq!(columns(grid.bands[1].row), (Some(grid::COLUMNS * 11 / 20), Some(grid::COLUMNS - 1)));
    assert_eq!(grid.lost, 0);
}

#[test]
fn report_is_one_page_of_its_own() {
    let page = made(TRACE.as_bytes());
    let names = elements(&page);
    let count = |name: &str| names.iter().filter(|other| *other == name).count();
    assert_eq!((count("html"), count("svg"), count("table"), count("h1"), count("script")), (1, 2, 5, 1, 0));
    assert_eq!((count("dl"), count("dd")), (1, 8));
    assert!(count("rect") > 10);
    for outside in ["http:", "https:", "//", "url(", "src=", "href=", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("default-src &#39;none&#39;") || page.contains("default-src 'none'"));
    for part in ["0000:00:01.0", "limit 1", "unit0/domain2/root0x1000/48bit", "Container 3"] {
        assert!(page.contains(part), "{part}");
    }
}

#[test]
fn report_of_nothing_and_of_garbage_is_a_page() {
    for trace in
        [&b""[..], b"\n\n", b"hello\nworld\n", &[0xff; 10_000], b"0.000000000 host map\n", b"1.0 host map a=b\n"]
    {
        elements(&made(trace));
    }
    let page = made(
        b"18446744073.709551615 host map container=1 iova=0x0-0xffffffffffffffff ns=18446744073709551615 result=ok\n",
    );
    assert!(page.contains("18446744073.709"));
}

#[test]
fn report_puts_no_markup_of_a_trace_into_the_page() {
    let evil = "</td><script>alert(1)</script>&\"'\u{202e}";
    let trace =
        TRACE.replace("0000:00:01.0", evil).replace("container=3", &format!("container={evil}")).replace("unit0", evil);
    let page = make(evil, &mut Cursor::new(trace)).unwrap();
    let names = elements(&page);
    assert!(!names.iter().any(|name| name == "script") && !page.contains('\u{202e}'));
    assert!(page.contains("&lt;script&gt;"));
}

#[test]
fn report_of_a_large_trace_is_bounded() {
    let mut trace = String::new();
    for number in 0..60_000u64 {
        let (first, seconds) = (number * 0x1_0000_0000 + 0x1000, number / 10);
        let _ = writeln!(
            trace,
            "{seconds}.{:09} host map container={} iova={first:#x}-{:#x} gpa=0x0 perm=rw ns={number} result=ok\n\
             {seconds}.{:09} notify refused space=s{number} device=d{number} iova={first:#x}-{:#x} cause=limit",
            number % 10 * 1000,
            number % 300,
            first + 0xfff,
            number % 10 * 1000 + 1,
            first + 0xfff,
        );
    }
    let page = made(trace.as_bytes());
    assert!(page.len() < 4 << 20, "{} bytes", page.len());
    elements(&page);
    assert!(page.contains("(others)"));
    let found = summary(&trace);
    assert!(found.containers.0.len() <= 65 && found.spaces.0.len() <= 65 && found.functions.0.len() <= 65);
    assert_eq!(found.containers.0.values().map(|of| of.maps).sum::<u64>(), 60_000);
}

#[test]
fn report_of_what_comes_and_goes_everywhere_is_bounded() {
    // In each picture each row changes as often as can be seen.
    let mut trace = String::new();
    for second in (0..grid::COLUMNS as u64).filter(|second| second % 3 != 2) {
        for container in 0..9 {
            let (what, more) = if second % 3 == 0 { ("map", "gpa=0x0") } else { ("unmap", "bytes=0x10000000") };
            let _ = writeln!(
                trace,
                "{second}.000000000 host {what} container={container} iova=0x0-0xfffffff {more} ns=1 result=ok"
            );
        }
    }
    let page = made(trace.as_bytes());
    let marks = page.matches("<rect").count();
    assert!(marks > grid::ROWS * PICTURES * grid::COLUMNS / 3, "{marks}");
    assert!(page.len() < 4 << 20, "{} bytes", page.len());
}

#[test]
fn report_names_the_addresses_of_each_row() {
    let rows = |range: IovaRange, rows: usize| {
        let band = grid::Band { range, row: 0, rows };
        (0..rows).map(move |row| band.addresses(row)).collect::<Vec<_>>()
    };
    let thirds = [IovaRange::new(0x1000, 0x1005), IovaRange::new(0x1006, 0x100a), IovaRange::new(0x100b, 0x100f)];
    assert_eq!(rows(IovaRange::new(0x1000, 0x100f), 3), thirds);
    let all = rows(IovaRange::new(0, u64::MAX), 80);
    assert_eq!((all[0].first, all[79].last), (0, u64::MAX));
    assert!(all.windows(2).all(|pair| pair[0].last + 1 == pair[1].first));
    // Fewer addresses than rows, at the very end.
    let few = rows(IovaRange::new(u64::MAX - 1, u64::MAX), 7);
    assert!(few.iter().all(|range| range.first >= u64::MAX - 1 && range.first <= range.last));
}

#[test]
fn report_has_numbers_for_people() {
    assert_eq!(
        [0, 1023, 1024, 1536 << 20, u64::MAX].map(text::bytes),
        ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 GiB", "15.9 EiB"]
    );
    assert_eq!([999, 14_150_000, 12_000_000_000].map(text::duration), ["0.9 us", "14.15 ms", "12.00 s"]);
    assert_eq!(text::moment(1_234_000, 9_000_000), "1.23 ms");
    assert_eq!(text::moment(1_234_000_000, 9_000_000_000), "1.23 s");
    assert_eq!(text::moment(61_234_000_000, 90_000_000_000), "61.2 s");
    for (number, kind) in [
        ("3", "a group of the host"),
        ("1073741824", "a space of the host"),
        ("2147483648", "a vfio-user process"),
        ("3221225472", "an emulated function"),
        ("4294967296", ""),
        ("?", ""),
    ] {
        assert_eq!(text::kind_of_container(number), kind, "{number}");
    }
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("host map".to_owned()),
        Just("host unmap".to_owned()),
        Just("notify map".to_owned()),
        Just("notify applied".to_owned()),
        "iova=0x[0-9a-f]{1,17}-0x[0-9a-f]{1,17}",
        "(container|space|device|ns|bytes|cause)=[0-9a-z<>&]{0,9}",
        Just("result=ok".to_owned()),
        "[0-9]{1,20}\\.[0-9]{9}",
        "\\PC{0,10}",
    ]
}

proptest! {
    /// Whatever the file has.
    #[test]
    fn report_takes_any_file(lines in prop::collection::vec(prop::collection::vec(piece(), 0..7), 0..40)) {
        let lines = lines.iter().enumerate().map(|(at, line)| format!("{at}.000000000 {}", line.join(" ")));
        elements(&made(lines.collect::<Vec<_>>().join("\n").as_bytes()));
    }

    #[test]
    fn report_takes_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        elements(&made(&bytes));
    }
}
