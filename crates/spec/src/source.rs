//! Texts that a stack is made of, and places in them.
//!
//! Everything downstream speaks of a place as a [`Span`] of bytes, three small numbers. Line, column and the source
//! line itself are worked out only for the places that end up in a message.

use orchestra_model::diagnostic::{Code, Diagnostic, Location};

/// Longest stack file that is read: room for far more than 10,000 services.
pub const MAX_BYTES: usize = 16 << 20;

/// Characters of a source line that a [`Location`] keeps.
const MAX_LINE: usize = 400;

/// The text of one file, as it was read.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Path as the user gave it; only for messages.
    pub path: &'a str,
    /// Content, not yet known to be text.
    pub bytes: &'a [u8],
}

/// Bytes `start..end` of one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Span {
    /// Index into [`Sources`].
    pub(crate) source: u16,
    pub(crate) start: u32,
    pub(crate) end: u32,
}

impl Span {
    /// The part of this span from `offset` on, `length` bytes long.
    pub(crate) fn part(self, offset: usize, length: usize) -> Self {
        let clamp = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let start = self.start.saturating_add(clamp(offset)).min(self.end);
        Self { start, end: start.saturating_add(clamp(length)).min(self.end), ..self }
    }
}

/// One text with an index of its lines.
#[derive(Debug)]
pub(crate) struct File<'a> {
    pub(crate) path: &'a str,
    pub(crate) text: &'a str,
    /// Byte offsets at which lines begin.
    lines: Vec<u32>,
}

impl<'a> File<'a> {
    /// Checks size and encoding, and drops a byte order mark.
    pub(crate) fn new(source: Source<'a>) -> Result<Self, Diagnostic> {
        let Source { path, bytes } = source;
        if bytes.len() > MAX_BYTES {
            let message = format!("`{path}` is larger than {MAX_BYTES} bytes (16 MiB), the most that is read");
            return Err(Diagnostic::error(Code::TOO_LARGE, message)
                .help("check that this is the stack file; data belongs into files that services read themselves"));
        }
        if let Some(encoding) = wide_encoding(bytes) {
            let message = format!("`{path}` is {encoding} text; a stack file is UTF-8");
            return Err(Diagnostic::error(Code::ENCODING, message)
                .help(format!("convert it: iconv -f {encoding} -t UTF-8 {path} > converted.yaml")));
        }
        let content = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
        let text = std::str::from_utf8(content).map_err(|error| {
            let at = error.valid_up_to();
            let message = format!("byte 0x{:02X} is not UTF-8 text", content[at]);
            Diagnostic::error(Code::ENCODING, message)
                .at(raw_location(path, content, at), "")
                .help(format!("if the file is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {path} > converted.yaml"))
        })?;
        let forbidden = |b: &u8| *b < 0x20 && !matches!(*b, b'\t' | b'\n' | b'\r') || *b == 0x7F;
        if let Some(at) = content.iter().position(forbidden) {
            let diagnostic = if content[at] == 0 {
                Diagnostic::error(Code::ENCODING, "a NUL byte is not text")
                    .help("the file may be damaged or binary; write it again as UTF-8 text")
            } else {
                let message = format!("the control character U+{:04X} is not allowed in YAML", content[at]);
                Diagnostic::error(Code::YAML_SYNTAX, message)
                    .help(format!("delete it, or write it as \"\\x{:02X}\" in double quotes", content[at]))
            };
            return Err(diagnostic.at(raw_location(path, content, at), ""));
        }
        Ok(Self::indexed(path, text))
    }

    fn indexed(path: &'a str, text: &'a str) -> Self {
        let breaks = text.bytes().enumerate().filter(|(_, b)| *b == b'\n');
        let starts = breaks.map(|(at, _)| u32::try_from(at + 1).expect("a source is shorter than 4 GiB"));
        Self { path, text, lines: std::iter::once(0).chain(starts).collect() }
    }

    /// Line of a byte offset, from 1.
    pub(crate) fn line(&self, offset: u32) -> u32 {
        u32::try_from(self.lines.partition_point(|start| *start <= offset)).unwrap_or(u32::MAX)
    }

    fn location(&self, start: u32, end: u32) -> Location {
        let line = self.line(start);
        let line_start = self.lines[line as usize - 1] as usize;
        let line_end = self.lines.get(line as usize).map_or(self.text.len(), |next| *next as usize - 1);
        let content = self.text[line_start..line_end].trim_end_matches('\r');
        let start = floor(self.text, start as usize).min(line_start + content.len());
        let end = floor(self.text, end as usize).clamp(start, line_start + content.len());
        let marked = self.text[start..end].trim_end();
        Location {
            file: self.path.to_owned(),
            line,
            column: count(&self.text[line_start..start]).saturating_add(1),
            length: count(marked).max(1),
            source: content.chars().take(MAX_LINE).collect(),
        }
    }
}

/// All sources of a load.
#[derive(Debug)]
pub(crate) struct Sources<'a>(pub(crate) Vec<File<'a>>);

impl<'a> Sources<'a> {
    pub(crate) fn file(&self, span: Span) -> &File<'a> {
        &self.0[usize::from(span.source)]
    }

    /// The characters of a span.
    pub(crate) fn text(&self, span: Span) -> &'a str {
        let text = self.file(span).text;
        text.get(span.start as usize..span.end as usize).unwrap_or("")
    }

    /// A span as a person reads it.
    pub(crate) fn location(&self, span: Span) -> Location {
        self.file(span).location(span.start, span.end)
    }
}

fn count(text: &str) -> u32 {
    u32::try_from(text.chars().count()).unwrap_or(u32::MAX)
}

fn floor(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// A place in bytes that are not known to be text.
fn raw_location(path: &str, bytes: &[u8], at: usize) -> Location {
    let line_start = bytes[..at].iter().rposition(|b| *b == b'\n').map_or(0, |n| n + 1);
    let window = &bytes[line_start..bytes.len().min(line_start + 4 * MAX_LINE)];
    let line_end = window.iter().position(|b| *b == b'\n').unwrap_or(window.len());
    let line = bytes[..at].split(|b| *b == b'\n').count();
    Location {
        file: path.to_owned(),
        line: u32::try_from(line).unwrap_or(u32::MAX),
        column: count(&String::from_utf8_lossy(&bytes[line_start..at])).saturating_add(1),
        length: 1,
        source: String::from_utf8_lossy(&window[..line_end]).trim_end_matches('\r').chars().take(MAX_LINE).collect(),
    }
}

/// The name of a two- or four-byte encoding, seen by its byte order mark or by the zero bytes of its first characters.
fn wide_encoding(bytes: &[u8]) -> Option<&'static str> {
    let zeros = bytes.first_chunk::<4>().map(|first| first.map(|byte| byte == 0));
    match (bytes, zeros) {
        ([0xFF, 0xFE, 0, 0, ..], _) | (_, Some([false, true, true, true])) => Some("UTF-32LE"),
        ([0, 0, 0xFE, 0xFF, ..], _) | (_, Some([true, true, true, false])) => Some("UTF-32BE"),
        ([0xFF, 0xFE, ..], _) | (_, Some([false, true, false, true])) => Some("UTF-16LE"),
        ([0xFE, 0xFF, ..], _) | (_, Some([true, false, true, false])) => Some("UTF-16BE"),
        _ => None,
    }
}
