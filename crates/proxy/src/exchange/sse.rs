//! Where an event of an event stream ends, so that a last event can be added without tearing another.
//!
//! Events end with an empty line; lines end with LF, CR LF or CR (HTML standard, "Parsing an event stream"). An event that
//! is not complete when the stream ends is discarded by the reader, so a stream may end anywhere, but text may be added
//! only between events.

/// Follows the bytes of an event stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tracker {
    /// Nothing of the current line was seen yet.
    line_start: bool,
    /// Nothing of the current event was seen yet.
    event_start: bool,
    /// The last byte was CR: a following LF belongs to it.
    after_cr: bool,
}

impl Default for Tracker {
    fn default() -> Self {
        Self { line_start: true, event_start: true, after_cr: false }
    }
}

impl Tracker {
    /// Whether text may be added here.
    pub(crate) fn between_events(self) -> bool {
        self.event_start
    }

    /// Follows `bytes`; returns after how many of them the last event that ends in them ends.
    pub(crate) fn advance(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut end = None;
        for (index, byte) in bytes.iter().enumerate() {
            match byte {
                b'\n' if self.after_cr => {
                    self.after_cr = false;
                    // The second half of a line end that was counted already.
                    if self.event_start {
                        end = Some(index + 1);
                    }
                }
                b'\n' | b'\r' => {
                    self.after_cr = *byte == b'\r';
                    if self.line_start {
                        self.event_start = true;
                        end = Some(index + 1);
                    }
                    self.line_start = true;
                }
                _ => *self = Self { line_start: false, event_start: false, after_cr: false },
            }
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(text: &str) -> (bool, Option<usize>) {
        let mut whole = Tracker::default();
        let end = whole.advance(text.as_bytes());
        // Law: how the bytes are cut into pieces makes no difference.
        let mut pieces = Tracker::default();
        for byte in text.as_bytes() {
            pieces.advance(&[*byte]);
        }
        assert_eq!(whole, pieces, "{text:?}");
        (whole.between_events(), end)
    }

    #[test]
    fn events_end_with_an_empty_line_in_every_notation() {
        assert_eq!(after(""), (true, None));
        assert_eq!(after("data: 1\n\n"), (true, Some(9)));
        assert_eq!(after("data: 1\r\n\r\n"), (true, Some(11)));
        assert_eq!(after("data: 1\r\r"), (true, Some(9)));
        assert_eq!(after("data: 1\n"), (false, None));
        assert_eq!(after("data: 1\r\n"), (false, None));
        assert_eq!(after("data: 1\n\ndata: {\"par"), (false, Some(9)));
        assert_eq!(after("a\n\nb\n\nc"), (false, Some(6)));
        assert_eq!(after(": ping\n\n"), (true, Some(8)));
    }
}
