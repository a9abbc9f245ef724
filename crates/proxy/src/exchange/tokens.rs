//! Events of a stream, counted as they pass: where a model answers, tokens.
//!
//! An event of an event stream counts if it has data (HTML standard, "Dispatch the event": others are dropped); a comment
//! that only keeps the connection alive is none. In gRPC each message is one.

/// Counts in one response.
#[derive(Debug)]
pub(super) enum Tokens {
    /// The response is no stream.
    None,
    /// It is, but its content cannot be read: bytes are all that is seen.
    Opaque {
        begun: bool,
    },
    Events(Events),
    Messages(Messages),
}

impl Tokens {
    /// Follows `bytes`; returns how many events end in them.
    pub(super) fn advance(&mut self, bytes: &[u8]) -> u32 {
        match self {
            Self::None => 0,
            Self::Opaque { begun } => u32::from(!bytes.is_empty() && !std::mem::replace(begun, true)),
            Self::Events(events) => events.advance(bytes),
            Self::Messages(messages) => messages.advance(bytes),
        }
    }
}

/// Follows an event stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Events {
    line: Line,
    /// The current event has data.
    data: bool,
    /// The last byte was CR: a following LF belongs to it.
    after_cr: bool,
}

/// What was seen of the current line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// So many bytes of the field name `data`.
    Name(usize),
    Other,
}

impl Default for Line {
    fn default() -> Self {
        Self::Name(0)
    }
}

const DATA: &[u8] = b"data";

impl Events {
    fn advance(&mut self, bytes: &[u8]) -> u32 {
        let mut count = 0;
        for byte in bytes {
            if *byte == b'\n' && std::mem::take(&mut self.after_cr) {
                continue;
            }
            self.after_cr = *byte == b'\r';
            match (self.line, byte) {
                (line, b'\n' | b'\r') => {
                    if line == Line::Name(0) {
                        count += u32::from(std::mem::take(&mut self.data));
                    }
                    self.data |= line == Line::Name(DATA.len());
                    self.line = Line::default();
                }
                (Line::Name(4), b':') => {
                    self.data = true;
                    self.line = Line::Other;
                }
                (Line::Name(seen), byte) if DATA.get(seen) == Some(byte) => self.line = Line::Name(seen + 1),
                _ => self.line = Line::Other,
            }
        }
        count
    }
}

/// Follows length-prefixed messages ("gRPC over HTTP2", Length-Prefixed-Message).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Messages {
    prefix: [u8; 5],
    have: usize,
    /// Bytes of the message that are still to come.
    rest: usize,
}

impl Messages {
    fn advance(&mut self, mut bytes: &[u8]) -> u32 {
        let mut count = 0;
        while let Some((first, others)) = bytes.split_first() {
            if self.have < self.prefix.len() {
                self.prefix[self.have] = *first;
                self.have += 1;
                bytes = others;
                if self.have < self.prefix.len() {
                    continue;
                }
                let [_, length @ ..] = self.prefix;
                self.rest = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
            } else {
                let part = self.rest.min(bytes.len());
                self.rest -= part;
                bytes = &bytes[part..];
            }
            if self.rest == 0 {
                self.have = 0;
                count += 1;
            }
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count<T: Copy + PartialEq + std::fmt::Debug>(
        new: T,
        advance: impl Fn(&mut T, &[u8]) -> u32,
        bytes: &[u8],
    ) -> u32 {
        let mut whole = new;
        let counted = advance(&mut whole, bytes);
        // Law: how the bytes are cut into pieces makes no difference.
        for size in [1, 2, 3, 7] {
            let mut pieces = new;
            let sum: u32 = bytes.chunks(size).map(|piece| advance(&mut pieces, piece)).sum();
            assert_eq!((sum, pieces), (counted, whole), "{size}");
        }
        counted
    }

    #[test]
    fn events_with_data_count_and_others_do_not() {
        let events = |text: &str| count(Events::default(), Events::advance, text.as_bytes());
        assert_eq!(events("data: 1\n\ndata: 2\ndata: 3\n\n"), 2);
        assert_eq!(events("data: 1\r\n\r\ndata:2\r\rdata\n\n"), 3);
        assert_eq!(events(": ping\n\nevent: x\n\nid: 1\n\n\n\n"), 0);
        assert_eq!(events("dat: 1\n\ndatax: 1\n\n data: 1\n\n"), 0);
        assert_eq!(events("event: token\ndata: 1\nid: 7\n\ndata: unfinished\n"), 1);
    }

    #[test]
    fn messages_count_when_they_are_whole() {
        let messages = |bytes: &[u8]| count(Messages::default(), Messages::advance, bytes);
        assert_eq!(messages(&[0, 0, 0, 0, 0, 1, 0, 0, 0, 3, 7, 7, 7, 0, 0, 0, 0, 0]), 3);
        assert_eq!(messages(&[0, 0, 0, 0, 3, 7, 7]), 0);
        assert_eq!(messages(&[]), 0);
    }
}
