//! Server-sent events: the frames of `text/event-stream` and an incremental parser.
//!
//! After the [HTML standard, section 9.2](https://html.spec.whatwg.org/multipage/server-sent-events.html), for bytes that
//! arrive cut anywhere. Fields that we never send (`retry`) are skipped.

use bytes::Bytes;
use orchestra_model::Event;

use crate::run::RunEvent;

/// Longest frame that the parser collects, in bytes: the `done` of a run over 10,000 resources is about a tenth of it.
const LIMIT: usize = 256 << 20;

/// One event of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// `id:`; what a reconnect sends as `Last-Event-ID`.
    pub id: Option<String>,
    /// `event:`; `message` if missing.
    pub event: Option<String>,
    /// `data:`, its lines joined by line feeds.
    pub data: String,
}

impl Frame {
    /// Bytes that keep a silent stream alive; a parser drops them.
    pub const KEEP_ALIVE: &'static [u8] = b":\n\n";

    /// The frame of an event of `GET …/events?follow=true`.
    pub fn event(event: &Event) -> Self {
        let data = serde_json::to_string(event).expect("events serialize to JSON");
        Self { id: Some(event.sequence.to_string()), event: Some("event".to_owned()), data }
    }

    /// The frame of an event of `GET /v1/runs/{id}/events`; `data` is what the variant holds.
    pub fn run_event(event: &RunEvent) -> Self {
        let data = match event {
            RunEvent::Event(event) => serde_json::to_string(event),
            RunEvent::Progress(progress) => serde_json::to_string(progress),
            RunEvent::Done(run) => serde_json::to_string(run),
        };
        Self {
            id: event.id().map(|id| id.to_string()),
            event: Some(event.name().to_owned()),
            data: data.expect("run events serialize to JSON"),
        }
    }

    /// The frame as it is sent.
    pub fn encode(&self) -> Bytes {
        let mut text = String::with_capacity(self.data.len() + 64);
        for (field, value) in [("id", &self.id), ("event", &self.event)] {
            if let Some(value) = value {
                text.push_str(field);
                text.push_str(": ");
                // A line end would begin another field.
                text.extend(value.chars().filter(|c| !matches!(c, '\r' | '\n' | '\0')));
                text.push('\n');
            }
        }
        // The standard knows three line ends; sent is always LF, so each of them splits the data.
        for line in self.data.split('\n').flat_map(|line| line.split('\r')) {
            text.push_str("data: ");
            text.push_str(line);
            text.push('\n');
        }
        text.push('\n');
        text.into()
    }
}

/// Why a stream cannot be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a server-sent event is larger than {LIMIT} bytes")]
pub struct TooLong;

/// Turns bytes into frames.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    /// The last byte was CR, so that an LF belongs to it.
    after_cr: bool,
    /// A line was seen, so that no byte order mark can follow.
    begun: bool,
    frame: Frame,
    has_data: bool,
}

impl SseParser {
    /// A parser at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes, and hands over the frames that they complete.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<Vec<Frame>, TooLong> {
        let mut frames = Vec::new();
        if self.after_cr && !bytes.is_empty() {
            self.after_cr = false;
            bytes = bytes.strip_prefix(b"\n").unwrap_or(bytes);
        }
        while let Some(end) = bytes.iter().position(|b| matches!(b, b'\r' | b'\n')) {
            self.line.extend_from_slice(&bytes[..end]);
            let was_cr = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            if was_cr {
                match bytes.first() {
                    Some(b'\n') => bytes = &bytes[1..],
                    Some(_) => {}
                    None => self.after_cr = true,
                }
            }
            frames.extend(self.end_line());
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() + self.frame.data.len() > LIMIT { Err(TooLong) } else { Ok(frames) }
    }

    fn end_line(&mut self) -> Option<Frame> {
        let line = std::mem::take(&mut self.line);
        let line = if self.begun { &line[..] } else { line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&line) };
        self.begun = true;
        if line.is_empty() {
            let mut frame = std::mem::take(&mut self.frame);
            if std::mem::take(&mut self.has_data) {
                frame.data.pop();
                return Some(frame);
            }
            return None;
        }
        let text = String::from_utf8_lossy(line);
        let (field, value) = text.split_once(':').unwrap_or((&text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                self.has_data = true;
                self.frame.data.push_str(value);
                self.frame.data.push('\n');
            }
            "event" => self.frame.event = Some(value.to_owned()),
            "id" if !value.contains('\0') => self.frame.id = Some(value.to_owned()),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(chunks: &[&[u8]]) -> Vec<Frame> {
        let mut parser = SseParser::new();
        chunks.iter().flat_map(|chunk| parser.push(chunk).unwrap()).collect()
    }

    fn data(text: &str) -> Frame {
        Frame { data: text.to_owned(), ..Frame::default() }
    }

    #[test]
    fn examples_of_the_standard() {
        assert_eq!(parse(&[b"data: YHOO\ndata: +2\ndata: 10\n\n"]), [data("YHOO\n+2\n10")]);
        let parsed =
            parse(&[b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"]);
        assert_eq!(
            parsed,
            [
                Frame { id: Some("1".into()), ..data("first event") },
                Frame { id: Some(String::new()), ..data("second event") },
                data(" third event")
            ]
        );
        assert_eq!(parse(&[b"data\n\ndata\ndata\n\ndata:"]), [data(""), data("\n")]);
        assert_eq!(parse(&[b"data:test\n\ndata: test\n\n"]), [data("test"), data("test")]);
    }

    #[test]
    fn line_ends_marks_and_unknown_fields() {
        assert_eq!(
            parse(&[b"\xEF\xBB\xBFdata: a\r\n\r\ndata: b\r\rretry: 3\ndata: c\n\n"]),
            [data("a"), data("b"), data("c")]
        );
        assert_eq!(parse(&[b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n"]), [data("a\nb")]);
        assert_eq!(parse(&[Frame::KEEP_ALIVE, b"event: x\n\n", b"data: y\n\n"]), [data("y")]);
        assert_eq!(parse(&[b"data: cut off"]), []);
    }

    fn frames() -> impl Strategy<Value = Vec<Frame>> {
        let word = "[a-z0-9 :]{0,6}";
        // Line ends within data come back as LF, so none but LF is generated.
        let frame = (proptest::option::of(word), proptest::option::of(word), "[\\PC\n:é]{0,30}")
            .prop_map(|(id, event, data)| Frame { id, event, data });
        proptest::collection::vec(frame, 0..6)
    }

    proptest! {
        #[test]
        fn frames_survive_however_the_bytes_are_cut(frames in frames(), cuts in proptest::collection::vec(1usize..9, 1..40)) {
            let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().to_vec()).collect();
            let mut rest = &bytes[..];
            let mut chunks = Vec::new();
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                let (chunk, tail) = rest.split_at((*cut).min(rest.len()));
                chunks.push(chunk);
                rest = tail;
            }
            prop_assert_eq!(parse(&chunks), frames.clone());
            prop_assert_eq!(parse(&[&bytes]), frames);
        }

        #[test]
        fn any_bytes_parse_the_same_whole_or_one_by_one(bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b':'), Just(b'd'), any::<u8>()], 0..200)) {
            let bytes = [b"data: x\n".as_slice(), &bytes].concat();
            let one_by_one: Vec<&[u8]> = bytes.chunks(1).collect();
            prop_assert_eq!(parse(&one_by_one), parse(&[&bytes]));
        }
    }
}
