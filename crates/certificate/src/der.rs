//! Reading DER (ITU-T X.690): values of one tag after the other, as far as certificates need it.
//!
//! Bytes come from files that users name, so nothing is believed: every length is checked, nothing recurses, nothing
//! panics.

pub(crate) const BOOLEAN: u8 = 0x01;
pub(crate) const INTEGER: u8 = 0x02;
pub(crate) const OCTET_STRING: u8 = 0x04;
pub(crate) const OID: u8 = 0x06;
pub(crate) const UTC_TIME: u8 = 0x17;
pub(crate) const GENERALIZED_TIME: u8 = 0x18;
pub(crate) const SEQUENCE: u8 = 0x30;
pub(crate) const SET: u8 = 0x31;

/// What is left to be read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// The next value with its tag.
    pub(crate) fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, mut rest) = rest.split_first()?;
        let length = if first < 0x80 {
            usize::from(first)
        } else {
            let count = usize::from(first & 0x7F);
            // Four bytes of length are more than any file that is read; none means "indefinite", which DER has not.
            if !(1..=4).contains(&count) || rest.len() < count {
                return None;
            }
            let (bytes, after) = rest.split_at(count);
            rest = after;
            bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte))
        };
        if rest.len() < length {
            return None;
        }
        let (value, after) = rest.split_at(length);
        self.0 = after;
        Some((tag, value))
    }

    /// The next value, which must have this tag.
    pub(crate) fn value(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.any().and_then(|(found, value)| (found == tag).then_some(value))
    }

    /// The values within the next one, which must have this tag.
    pub(crate) fn within(&mut self, tag: u8) -> Option<Self> {
        self.value(tag).map(Reader)
    }

    /// The next value if it has this tag; otherwise nothing is read.
    pub(crate) fn optional(&mut self, tag: u8) -> Option<&'a [u8]> {
        if self.0.first() == Some(&tag) { self.value(tag) } else { None }
    }
}
