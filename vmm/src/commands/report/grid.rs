//! What a container held over time: columns of time and rows of addresses, in bands with what is never used left out.

use std::collections::BTreeMap;

use vtd::IovaRange;

use super::line::Line;

/// Columns of a picture.
pub const COLUMNS: usize = 160;
/// Rows of a picture, for all bands together.
pub const ROWS: usize = 80;
/// Mappings that are followed at a time.
const MOST_LIVE: usize = 1 << 20;

/// A band of addresses, and the rows that it has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Band {
    /// The addresses.
    pub range: IovaRange,
    /// The first row.
    pub row: usize,
    /// How many.
    pub rows: usize,
}

impl Band {
    /// What its row of this number stands for, counted from the band's first.
    pub fn addresses(&self, row: usize) -> IovaRange {
        let size = u128::from(self.range.last - self.range.first) + 1;
        let begin = |row: usize| (size * row as u128).div_ceil(self.rows as u128);
        // A band may have fewer addresses than rows.
        let first = begin(row).min(size - 1);
        let last = (begin(row + 1) - 1).max(first);
        IovaRange::new(self.range.first + first as u64, self.range.first + last as u64)
    }
}

/// The picture of one container.
pub struct Grid {
    /// Ascending.
    pub bands: Vec<Band>,
    /// By row, then column: whether something was mapped there.
    pub cells: Vec<[bool; COLUMNS]>,
    /// By first IOVA: the last one, and the column since which it is there.
    live: BTreeMap<u64, (u64, usize)>,
    /// Mappings that were not followed.
    pub lost: u64,
    /// When the trace ends, in nanoseconds.
    end: u64,
}

impl Grid {
    /// Of a trace that ends at `end`, with these bands.
    pub fn new(used: &[IovaRange], end: u64) -> Self {
        // A large band has more rows than a small one, but not as many more.
        let weight = |range: &IovaRange| 64 - u64::from((range.last - range.first).max(0xfff).leading_zeros()) - 8;
        let whole: u64 = used.iter().map(weight).sum::<u64>().max(1);
        let mut bands = Vec::with_capacity(used.len());
        let mut row = 0;
        for range in used {
            let rows = ((weight(range) * ROWS as u64 / whole) as usize).max(1);
            bands.push(Band { range: *range, row, rows });
            row += rows;
        }
        Self { bands, cells: vec![[false; COLUMNS]; row], live: BTreeMap::new(), lost: 0, end: end.max(1) }
    }

    fn column(&self, time: u64) -> usize {
        let column = u128::from(time) * COLUMNS as u128 / u128::from(self.end);
        (column as usize).min(COLUMNS - 1)
    }

    /// Follows a line about this container.
    pub fn add(&mut self, line: &Line<'_>) {
        let (Some(range), true) = (line.iova(), line.is_ok()) else { return };
        let column = self.column(line.time);
        if line.what.1 == "map" {
            if self.live.len() < MOST_LIVE {
                self.live.insert(range.first, (range.last, column));
            } else {
                self.lost += 1;
            }
            return;
        }
        let before = self.live.range(..range.first).next_back().filter(|(_, (last, _))| *last >= range.first);
        let from = before.map_or(range.first, |(first, _)| *first);
        let gone: Vec<u64> = self.live.range(from..=range.last).map(|(first, _)| *first).collect();
        for first in gone {
            if let Some((last, since)) = self.live.remove(&first) {
                self.fill(IovaRange::new(first, last), since, column);
            }
        }
    }

    /// The trace is over: what is there stays to the end.
    pub fn finish(&mut self) {
        for (first, (last, since)) in std::mem::take(&mut self.live) {
            self.fill(IovaRange::new(first, last), since, COLUMNS - 1);
        }
    }

    fn fill(&mut self, range: IovaRange, from: usize, to: usize) {
        for band in &self.bands {
            let Some(part) = band.range.intersection(range) else { continue };
            let size = u128::from(band.range.last - band.range.first) + 1;
            let row = |address: u64| (u128::from(address - band.range.first) * band.rows as u128 / size) as usize;
            for row in row(part.first)..=row(part.last) {
                self.cells[band.row + row][from..=to].fill(true);
            }
        }
    }
}
