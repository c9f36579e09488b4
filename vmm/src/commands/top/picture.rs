//! A moment of a machine, drawn. What is drawn comes from the machine and is text: the cells take no control
//! characters.

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Row, Sparkline, Table, Widget};

use vtd::spec::fault::{FaultReason, InterruptFaultReason};

use super::sample::{Sample, rate};

/// What there is to draw.
pub struct Picture<'a> {
    /// The path of the socket.
    pub machine: &'a str,
    /// The last moment.
    pub now: &'a Sample,
    /// The one before it.
    pub before: Option<&'a Sample>,
    /// Operations of the host a second, the last one last.
    pub history: &'a [u64],
    /// What is to be known besides.
    pub note: &'a str,
}

/// Bytes, for people.
fn bytes(bytes: u64) -> String {
    let units = ["B", "K", "M", "G", "T", "P"];
    let mut unit = 0;
    while unit + 1 < units.len() && bytes >> (10 * (unit + 1)) != 0 {
        unit += 1;
    }
    let tenths = (u128::from(bytes) * 10) >> (10 * unit);
    if unit == 0 || tenths >= 1000 {
        format!("{}{}", tenths / 10, units[unit])
    } else {
        format!("{}.{}{}", tenths / 10, tenths % 10, units[unit])
    }
}

/// A time, for people.
fn time(ms: u64) -> String {
    let seconds = ms / 1000;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// What is 0 when all is well.
fn alarm(text: String, is_bad: bool) -> Span<'static> {
    let style = if is_bad { Style::new().fg(Color::Red).add_modifier(Modifier::BOLD) } else { Style::new() };
    Span::styled(text, style)
}

/// The name of a fault reason that is given as `0x05`: of a function's DMA or of an interrupt, with blanks.
fn reason(code: &str) -> String {
    let Some(code) = code.strip_prefix("0x").and_then(|digits| u8::from_str_radix(digits, 16).ok()) else {
        return String::new();
    };
    let of_dma = FaultReason::ALL.iter().find(|reason| reason.code() == code).map(|reason| format!("{reason:?}"));
    let of_interrupt = || InterruptFaultReason::ALL.iter().find(|reason| reason.code() == code);
    let Some(name) = of_dma.or_else(|| of_interrupt().map(|reason| format!("{reason:?}"))) else {
        return String::new();
    };
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() {
            words.push(' ');
        }
        words.push(letter.to_ascii_lowercase());
    }
    words
}

fn heading(names: &'static [&'static str]) -> Row<'static> {
    Row::new(names.iter().copied()).style(Style::new().add_modifier(Modifier::DIM))
}

fn block(title: String) -> Block<'static> {
    let style = Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD).remove_modifier(Modifier::DIM);
    let title = Span::styled(title + " ", style);
    Block::new().borders(Borders::TOP).border_style(Style::new().add_modifier(Modifier::DIM)).title(title)
}

impl Picture<'_> {
    fn ms(&self) -> u64 {
        self.before.map_or(0, |before| self.now.wall_ms.saturating_sub(before.wall_ms))
    }

    fn rate_of(&self, count: impl Fn(&Sample) -> u64) -> u64 {
        self.before.map_or(0, |before| rate(count(before), count(self.now), self.ms()))
    }

    fn head(&self) -> Vec<Line<'static>> {
        let now = self.now;
        let differences = now.audit.differences.len();
        let (faults, refused) = (now.faults(), now.refused());
        let splits = now.devices.iter().map(|device| device.splits).fold(0, u64::saturating_add);
        vec![
            Line::from(vec![
                Span::styled(format!("causeway {}", self.machine), Style::new().add_modifier(Modifier::BOLD)),
                Span::raw(format!("  {}  up {}  resets {}  ", now.state, time(now.wall_ms), now.guest_resets)),
                alarm(format!("audit: {} compared, {differences} differ", now.audit.checked), differences != 0),
            ]),
            Line::from(vec![
                Span::raw(format!(
                    "host operations {}/s  invalidations {}/s  maps {}/s  unmaps {}/s  ",
                    self.rate_of(Sample::operations),
                    self.rate_of(Sample::invalidations),
                    self.rate_of(|sample| sample.units.iter().map(|unit| unit.map_ops).fold(0, u64::saturating_add)),
                    self.rate_of(|sample| sample.units.iter().map(|unit| unit.unmap_ops).fold(0, u64::saturating_add)),
                )),
                alarm(format!("faults {faults} ({}/s)  ", self.rate_of(Sample::faults)), faults != 0),
                alarm(format!("refused {refused}  "), refused != 0),
                Span::raw(format!("splits {splits}")),
            ]),
        ]
    }

    fn functions(&self) -> Table<'static> {
        let names = &["id", "addr", "kind", "held by", "space", "mappings", "bytes", "ops/s", "refused", "splits"];
        let rows = self.now.devices.iter().map(|device| {
            let before = self.before.and_then(|before| before.device(&device.id));
            let rate = before.map_or(0, |before| rate(before.operations(), device.operations(), self.ms()));
            let held = device.backend.is_some();
            let count = |count: u64| if held { count.to_string() } else { "-".to_owned() };
            let row = Row::new([
                device.id.clone(),
                device.addr.clone(),
                device.kind.clone(),
                device.backend.clone().unwrap_or_else(|| "-".to_owned()),
                self.now.attached.get(&device.id).cloned().unwrap_or_else(|| "-".to_owned()),
                count(device.live_extents),
                if held { bytes(device.live_bytes) } else { "-".to_owned() },
                count(rate),
                count(device.refused()),
                count(device.splits),
            ]);
            let is_bad = device.quarantined != 0 || device.unmaps_refused != 0;
            row.style(if is_bad { Style::new().fg(Color::Red) } else { Style::new() })
        });
        let widths = [
            Constraint::Max(12),
            Constraint::Length(7),
            Constraint::Max(14),
            Constraint::Length(9),
            Constraint::Min(12),
            Constraint::Length(8),
            Constraint::Length(7),
            Constraint::Length(7),
            Constraint::Length(7),
            Constraint::Length(6),
        ];
        Table::new(rows, widths).header(heading(names)).block(block(format!("functions ({})", self.now.devices.len())))
    }

    fn spaces(&self) -> Table<'static> {
        let rows = self.now.spaces.iter().map(|space| {
            let mappings = space.mappings.map_or_else(|| "blocked".to_owned(), |count| count.to_string());
            Row::new([space.space.clone(), mappings, space.members.join(" ")])
        });
        let widths = [Constraint::Min(34), Constraint::Length(9), Constraint::Min(20)];
        let names = &["space", "mappings", "functions"];
        Table::new(rows, widths).header(heading(names)).block(block(format!("spaces ({})", self.now.spaces.len())))
    }

    fn units(&self) -> Vec<Line<'static>> {
        let mut lines = Vec::new();
        for unit in &self.now.units {
            let before = self.before.and_then(|before| before.units.iter().find(|other| other.id == unit.id));
            let mut text = format!("{}:", unit.id);
            // Those that there were: there are more kinds than a line has room for.
            for (kind, count) in unit.descriptors.iter().filter(|(_, count)| **count != 0) {
                let then = before.and_then(|before| before.descriptors.get(kind)).copied();
                let rate = then.map_or(0, |then| rate(then, *count, self.ms()));
                text += &format!(" {} {count} ({rate}/s)", kind.replace('_', " "));
            }
            lines.push(Line::from(text));
            if !unit.faults.is_empty() {
                let each: Vec<String> =
                    unit.faults.iter().map(|(code, count)| format!("{count} of {code}{}", reason(code))).collect();
                lines.push(Line::from(alarm(format!("  faults: {}", each.join(", ")), true)));
            }
        }
        lines
    }
}

impl Widget for &Picture<'_> {
    fn render(self, area: Rect, buf: &mut Buffer) {
        let units = self.units();
        let rows = |count: usize| u16::try_from(count).unwrap_or(u16::MAX).saturating_add(2);
        let parts = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(4),
            Constraint::Max(rows(self.now.devices.len())),
            Constraint::Max(rows(self.now.spaces.len())),
            Constraint::Max(rows(units.len()).saturating_sub(1)),
            Constraint::Min(0),
            Constraint::Length(1),
        ]);
        let [head, history, functions, spaces, of_units, _, foot] = parts.areas(area);
        Paragraph::new(self.head()).render(head, buf);
        let shown = self.history.len().saturating_sub(history.width.into());
        let most = self.history[shown..].iter().max().copied().unwrap_or(0);
        Sparkline::default()
            .block(block(format!("host operations a second, the highest bar {most}")))
            .style(Style::new().fg(Color::Blue))
            .data(&self.history[shown..])
            .render(history, buf);
        self.functions().render(functions, buf);
        self.spaces().render(spaces, buf);
        Paragraph::new(units).block(block("invalidations and faults by unit".to_owned())).render(of_units, buf);
        Paragraph::new(format!("q leaves  {}", self.note)).render(foot, buf);
    }
}

/// The picture as text of `width` columns: as many lines as it needs.
pub fn text(picture: &Picture<'_>, width: u16) -> String {
    let of_units: usize = picture.now.units.iter().map(|unit| 1 + usize::from(!unit.faults.is_empty())).sum();
    let lines = 12 + picture.now.devices.len() + picture.now.spaces.len() + of_units;
    let area = Rect::new(0, 0, width, u16::try_from(lines).unwrap_or(u16::MAX).min(1000));
    let mut buffer = Buffer::empty(area);
    picture.render(area, &mut buffer);
    let mut text = String::new();
    // The foot is for those who can press a key.
    for y in 0..area.height.saturating_sub(1) {
        let line: String = (0..area.width).map(|x| buffer[(x, y)].symbol()).collect();
        text += line.trim_end();
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

#[cfg(test)]
#[path = "picture_test.rs"]
mod picture_test;
