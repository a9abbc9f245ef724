//! Where a command writes: data on standard output, remarks on standard error.

use std::io::{self, Write};

use orchestra_model::Diagnostic;
use serde::Serialize;

use crate::{deps::Terminal, screen::Palette, text::printable};

/// Standard output and standard error, and how to write on them.
pub(crate) struct Output {
    pub(crate) stdout: Box<dyn Write + Send>,
    pub(crate) stderr: Box<dyn Write + Send>,
    pub(crate) terminal: Terminal,
    /// Colours of standard output.
    pub(crate) palette: Palette,
    /// Colours of standard error.
    pub(crate) error_palette: Palette,
    /// `--json`
    pub(crate) json: bool,
    /// `--quiet`
    pub(crate) quiet: bool,
    /// `--verbose`
    pub(crate) verbose: bool,
}

impl Output {
    /// Columns of the terminal, if standard output is one.
    pub(crate) fn columns(&self) -> Option<usize> {
        if self.terminal.stdout { (self.terminal.size)().map(|(columns, _)| columns.into()) } else { None }
    }

    /// Columns and rows, for drawing in place.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.terminal.size)().map_or((80, 24), |(columns, rows)| (columns.max(20).into(), rows.max(4).into()))
    }

    /// Writes text as it is.
    pub(crate) fn text(&mut self, text: &str) -> io::Result<()> {
        self.stdout.write_all(text.as_bytes())?;
        self.stdout.flush()
    }

    /// Writes text and a line feed.
    pub(crate) fn line(&mut self, text: &str) -> io::Result<()> {
        self.stdout.write_all(format!("{text}\n").as_bytes())?;
        self.stdout.flush()
    }

    /// Writes bytes as they are.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stdout.write_all(bytes)
    }

    /// Writes a value as readable JSON.
    pub(crate) fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        let json = serde_json::to_string_pretty(value)?;
        self.line(&json)
    }

    /// Writes a value as one line of JSON.
    pub(crate) fn ndjson(&mut self, value: &impl Serialize) -> io::Result<()> {
        let json = serde_json::to_string(value)?;
        self.line(&json)
    }

    /// Says something beside the data, unless told to be quiet. Nobody listening there is no reason to stop.
    pub(crate) fn note(&mut self, text: &str) {
        if !self.quiet {
            let _ = writeln!(self.stderr, "{}", printable(text));
            let _ = self.stderr.flush();
        }
    }

    /// Draws diagnostics on standard error.
    pub(crate) fn diagnostics(&mut self, diagnostics: &[Diagnostic]) {
        if diagnostics.is_empty() {
            return;
        }
        // It escapes whatever could drive the terminal.
        let text = orchestra_spec::render_text(diagnostics, self.error_palette.color);
        let _ = writeln!(self.stderr, "{}", text.trim_end());
        let _ = self.stderr.flush();
    }
}
