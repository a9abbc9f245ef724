//! Draws diagnostics for people, the way rustc does: code, message, place, source line, underline, notes, help.
//!
//! Everything that comes from outside is escaped first: a file (or a log line in a note) must not be able to drive the
//! terminal, hide text by writing right to left, or shift an underline with a tab or a wide character.

use std::fmt::Write as _;

use orchestra_model::diagnostic::{Diagnostic, Label, Severity};
use unicode_width::UnicodeWidthChar;

/// Columns that a tab takes in a drawing.
const TAB: usize = 4;

/// Widest excerpt of a source line, in columns. A longer line is drawn as a window around its label.
const EXCERPT: usize = 120;

/// Draws `diagnostics` one after the other with an empty line between them. `color` adds ANSI colours; nothing else
/// in the result is a control character except line feeds.
pub fn render_text(diagnostics: &[Diagnostic], color: bool) -> String {
    let mut drawing = Drawing { text: String::new(), color };
    for (index, diagnostic) in diagnostics.iter().enumerate() {
        if index > 0 {
            drawing.text.push('\n');
        }
        drawing.diagnostic(diagnostic);
    }
    drawing.text
}

#[derive(Clone, Copy)]
enum Paint {
    Error,
    Warning,
    Info,
    Frame,
    Strong,
}

impl Paint {
    const fn code(self) -> &'static str {
        match self {
            Self::Error => "\x1b[1;31m",
            Self::Warning => "\x1b[1;33m",
            Self::Info => "\x1b[1;36m",
            Self::Frame => "\x1b[1;34m",
            Self::Strong => "\x1b[1m",
        }
    }
}

struct Drawing {
    text: String,
    color: bool,
}

impl Drawing {
    fn paint(&mut self, paint: Paint, text: &str) {
        if self.color && !text.is_empty() {
            let _ = write!(self.text, "{}{text}\x1b[0m", paint.code());
        } else {
            self.text.push_str(text);
        }
    }

    fn diagnostic(&mut self, diagnostic: &Diagnostic) {
        let (word, paint) = match diagnostic.severity {
            Severity::Error => ("error", Paint::Error),
            Severity::Warning => ("warning", Paint::Warning),
        };
        self.paint(paint, &format!("{word}[{}]", diagnostic.code));
        self.paint(Paint::Strong, &format!(": {}", escape_line(&diagnostic.message)));
        self.text.push('\n');

        let gutter = diagnostic.labels.iter().map(|l| l.location.line.to_string().len()).max().unwrap_or(0);
        self.labels(&diagnostic.labels, gutter, paint);
        if !diagnostic.labels.is_empty() && (!diagnostic.notes.is_empty() || diagnostic.help.is_some()) {
            self.frame(gutter, "|");
            self.text.push('\n');
        }
        for note in &diagnostic.notes {
            self.remark(gutter, "note", note);
        }
        if let Some(help) = &diagnostic.help {
            self.remark(gutter, "help", help);
        }
    }

    /// Empty gutter and a piece of frame.
    fn frame(&mut self, gutter: usize, piece: &str) {
        let _ = write!(self.text, "{:gutter$} ", "");
        self.paint(Paint::Frame, piece);
    }

    fn remark(&mut self, gutter: usize, kind: &str, text: &str) {
        for (index, line) in text.lines().enumerate() {
            if index == 0 {
                self.frame(gutter, "=");
                self.text.push(' ');
                self.paint(Paint::Strong, kind);
                let _ = writeln!(self.text, ": {}", escape_line(line));
            } else {
                let _ = writeln!(self.text, "{:1$}{2}", "", gutter + 3 + kind.len() + 2, escape_line(line));
            }
        }
    }

    /// Files in order of their first label, lines of a file in order.
    fn labels(&mut self, labels: &[Label], gutter: usize, paint: Paint) {
        let mut files: Vec<&str> = Vec::new();
        for label in labels {
            if !files.contains(&label.location.file.as_str()) {
                files.push(&label.location.file);
            }
        }
        for (file_index, file) in files.into_iter().enumerate() {
            let mut here: Vec<(usize, &Label)> =
                labels.iter().enumerate().filter(|(_, l)| l.location.file == file).collect();
            let place = &here[0].1.location;
            let arrow = if file_index == 0 { "-->" } else { ":::" };
            let _ = write!(self.text, "{:gutter$}", "");
            self.paint(Paint::Frame, arrow);
            let _ = writeln!(self.text, " {}:{}:{}", escape_line(file), place.line, place.column);
            self.frame(gutter, "|");
            self.text.push('\n');

            here.sort_by_key(|(_, l)| (l.location.line, l.location.column));
            let mut last_line = None;
            for (index, label) in here {
                let location = &label.location;
                let excerpt = Excerpt::of(&location.source, location.column, location.length);
                if last_line != Some(location.line) {
                    if last_line.is_some_and(|last| last + 1 < location.line) {
                        self.paint(Paint::Frame, "...");
                        self.text.push('\n');
                    }
                    self.paint(Paint::Frame, &format!("{:>gutter$} |", location.line));
                    let _ = writeln!(self.text, " {}", excerpt.line);
                }
                last_line = Some(location.line);
                self.frame(gutter, "|");
                let (mark, paint) = if index == 0 { ("^", paint) } else { ("-", Paint::Info) };
                let _ = write!(self.text, " {:1$}", "", excerpt.start);
                let message = escape_line(&label.message);
                let gap = if message.is_empty() { "" } else { " " };
                self.paint(paint, &format!("{}{gap}{message}", mark.repeat(excerpt.width)));
                self.text.push('\n');
            }
        }
    }
}

/// A source line made safe, with the columns that a label takes in it.
struct Excerpt {
    line: String,
    start: usize,
    width: usize,
}

impl Excerpt {
    fn of(source: &str, column: u32, length: u32) -> Self {
        let first = column.saturating_sub(1) as usize;
        let last = first.saturating_add(length.max(1) as usize);
        // Columns at which each character begins, once escaped.
        let mut cells: Vec<String> = source.chars().map(escape_char).collect();
        while cells.last().is_some_and(|cell| cell.trim().is_empty()) && cells.len() > last {
            cells.pop();
        }
        let width = |cell: &String| cell.chars().map(|c| c.width().unwrap_or(0)).sum::<usize>();
        let widths: Vec<usize> = cells.iter().map(width).collect();
        let total: usize = widths.iter().sum();

        // A window of whole characters around the label.
        let (mut from, mut to) = (0, cells.len());
        let beyond = first > cells.len();
        if total > EXCERPT {
            let focus = first.min(cells.len());
            let mut room = EXCERPT;
            from = focus;
            while from > 0 && room > EXCERPT * 2 / 3 && widths[from - 1] <= room {
                from -= 1;
                room -= widths[from];
            }
            to = focus;
            while to < cells.len() && widths[to] <= room {
                room -= widths[to];
                to += 1;
            }
            while from > 0 && widths[from - 1] <= room {
                from -= 1;
                room -= widths[from];
            }
        }
        let mut line = String::new();
        let mut start = 0;
        if from > 0 {
            line.push('…');
            start = 1;
        }
        cells[from..to].iter().for_each(|cell| line.push_str(cell));
        if to < cells.len() || beyond {
            line.push('…');
        }
        start += widths[from..first.clamp(from, to)].iter().sum::<usize>();
        let marked: usize = widths[first.clamp(from, to)..last.clamp(from, to)].iter().sum();
        Self { line, start, width: marked.max(1) }
    }
}

/// One line of foreign text, safe to print.
fn escape_line(text: &str) -> String {
    if text.bytes().all(|b| (b' '..0x7F).contains(&b)) {
        text.to_owned()
    } else {
        text.chars().map(escape_char).collect()
    }
}

/// A character as it may be shown: tabs as spaces, what controls or reorders the terminal as its code point.
fn escape_char(c: char) -> String {
    match c {
        '\t' => " ".repeat(TAB),
        c if hidden(c) => format!("<U+{:04X}>", u32::from(c)),
        c => c.to_string(),
    }
}

/// Control characters, bidirectional overrides and characters without a glyph.
fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61C}' | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{FEFF}'
            | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E007F}')
}

#[cfg(test)]
mod tests;
