//! Tables: columns as wide as what is in them, the last one cut to the width of the terminal.

use crate::{
    screen::Palette,
    text::{cut, printable, width},
};

/// How a cell is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Tone {
    #[default]
    Plain,
    Good,
    Busy,
    Bad,
    Dim,
}

impl Tone {
    pub(crate) fn paint(self, palette: Palette, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Good => palette.good(text),
            Self::Busy => palette.busy(text),
            Self::Bad => palette.bad(text),
            Self::Dim => palette.dim(text),
        }
    }
}

/// A cell. Its text is made printable when it is added.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn new(text: impl AsRef<str>, tone: Tone) -> Self {
        Self { text: printable(text.as_ref()), tone }
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::new(text, Tone::Plain)
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::new(text, Tone::Plain)
    }
}

/// A table with a heading line.
pub(crate) struct Table {
    rows: Vec<Vec<Cell>>,
}

const GAP: usize = 2;
/// A column is never made narrower than this while another can give way.
const NARROW: usize = 8;

impl Table {
    pub(crate) fn new<const N: usize>(heading: [&str; N]) -> Self {
        Self { rows: vec![heading.map(|text| Cell::new(text, Tone::Dim)).into()] }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        self.rows.push(cells.into());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }

    /// The table as lines; `columns` is the width of the terminal, if there is one. Columns without content vanish.
    pub(crate) fn render(&self, palette: Palette, columns: Option<usize>) -> String {
        let count = self.rows[0].len();
        let content =
            |at: usize| self.rows[1..].iter().filter_map(move |row| row.get(at)).map(|cell| width(&cell.text));
        let mut widths: Vec<usize> = (0..count)
            .map(|at| match content(at).max().unwrap_or(0) {
                0 => 0,
                widest => widest.max(width(&self.rows[0][at].text)),
            })
            .collect();
        if let Some(columns) = columns {
            fit(&mut widths, columns);
        }
        let last = widths.iter().rposition(|width| *width > 0).unwrap_or(0);
        let mut text = String::new();
        for row in &self.rows {
            for (at, (cell, room)) in row.iter().zip(&widths).enumerate() {
                if *room == 0 {
                    continue;
                }
                let shown = cut(&cell.text, *room);
                text.push_str(&cell.tone.paint(palette, &shown));
                if at != last {
                    text.push_str(&" ".repeat(room - width(&shown) + GAP));
                }
            }
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
        text
    }
}

/// Takes from the widest column until all fit, or until all are narrow.
fn fit(widths: &mut [usize], columns: usize) {
    let gaps = GAP * widths.iter().filter(|width| **width > 0).count().saturating_sub(1);
    let mut excess = (widths.iter().sum::<usize>() + gaps).saturating_sub(columns);
    while excess > 0 {
        // The last of the widest: what stands on the right is a remark more often than a name.
        let Some(widest) = (0..widths.len()).rev().max_by_key(|at| (widths[*at], *at)) else { return };
        if widths[widest] <= NARROW {
            return;
        }
        let second = widths.iter().filter(|width| **width < widths[widest]).max().copied().unwrap_or(0);
        let take = excess.min(widths[widest] - second.max(NARROW)).max(1);
        widths[widest] -= take;
        excess -= take;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(["SERVICE", "STATE", "EMPTY", "NOTE"]);
        table.row(["api".into(), Cell::new("ready", Tone::Good), "".into(), "".into()]);
        table.row([
            "worker-with-a-name".into(),
            Cell::new("degraded", Tone::Bad),
            "".into(),
            "its ready check (HTTP 503)\x1b[2J and a rather long remark".into(),
        ]);
        table
    }

    #[test]
    fn columns_align_and_empty_ones_vanish() {
        insta::assert_snapshot!(table().render(Palette::PLAIN, None));
    }

    #[test]
    fn wide_tables_are_cut() {
        let text = table().render(Palette::PLAIN, Some(50));
        insta::assert_snapshot!(text);
        for columns in 30..90 {
            let text = table().render(Palette::PLAIN, Some(columns));
            assert!(text.lines().all(|line| width(line) <= columns), "{columns}\n{text}");
        }
    }

    #[test]
    fn colour_does_not_move_columns() {
        let colored = table().render(Palette { color: true }, Some(50));
        let mut plain = colored;
        for code in ["\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[0m"] {
            plain = plain.replace(code, "");
        }
        assert_eq!(plain, table().render(Palette::PLAIN, Some(50)));
    }
}
