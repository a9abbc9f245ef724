//! WebSocket frames in a byte stream (RFC 6455 5.2): just enough to know where one ends.
//!
//! A close frame is a control frame, which may stand between the fragments of a message but not inside a frame. Messages
//! compressed by an extension have the same frames.

use std::hash::{BuildHasher as _, RandomState};

/// "Service restart" (IANA WebSocket close code number registry).
const SERVICE_RESTART: u16 = 1012;
const REASON: &[u8] = b"the instance is being stopped";
/// "Going away" (RFC 6455 7.4.1).
const GOING_AWAY: u16 = 1001;
const SILENCE: &[u8] = b"nothing was sent for too long";
const OPCODE: u8 = 0x0F;
const CLOSE: u8 = 0x08;
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// Who sends the frames. A client masks them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

/// Follows the frames of one direction.
#[derive(Clone, Debug)]
pub(super) struct Frames {
    side: Side,
    /// The head of the current frame, as far as it came.
    head: [u8; 14],
    have: usize,
    /// Bytes of the payload that are still to come, once the head is whole.
    payload: u64,
    closed: bool,
}

impl Frames {
    pub(super) fn new(side: Side) -> Self {
        Self { side, head: [0; 14], have: 0, payload: 0, closed: false }
    }

    /// Whether nothing of a frame is outstanding.
    pub(super) fn is_between(&self) -> bool {
        self.have == 0 && self.payload == 0
    }

    /// Whether the sender closed by itself.
    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Follows all of `bytes`.
    pub(super) fn advance(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            rest = &rest[self.finish(rest)..];
        }
    }

    /// Follows `bytes` to the end of the current frame; returns how many bytes belong to it.
    pub(super) fn finish(&mut self, bytes: &[u8]) -> usize {
        let mut used = 0;
        while used < bytes.len() {
            if self.payload > 0 {
                let part = usize::try_from(self.payload).unwrap_or(usize::MAX).min(bytes.len() - used);
                used += part;
                self.payload -= part as u64;
            } else {
                self.head[self.have] = bytes[used];
                self.have += 1;
                used += 1;
                if self.have < self.head_length() {
                    continue;
                }
                self.closed |= self.head[0] & OPCODE == CLOSE;
                self.payload = self.payload_length();
                self.have = 0;
            }
            if self.payload == 0 {
                break;
            }
        }
        used
    }

    /// Bytes of the head, as far as those that came tell.
    fn head_length(&self) -> usize {
        if self.have < 2 {
            return 2;
        }
        let length = match self.head[1] & !MASKED {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        2 + length + if self.head[1] & MASKED != 0 { 4 } else { 0 }
    }

    fn payload_length(&self) -> u64 {
        let extended = |bytes: &[u8]| bytes.iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
        match self.head[1] & !MASKED {
            126 => extended(&self.head[2..4]),
            127 => extended(&self.head[2..10]),
            length => u64::from(length),
        }
    }

    /// A close frame as this side sends it, because its instance is stopped or because nothing was sent.
    pub(super) fn close(&self, stopped: bool) -> Vec<u8> {
        let (code, reason) = if stopped { (SERVICE_RESTART, REASON) } else { (GOING_AWAY, SILENCE) };
        let payload = [&code.to_be_bytes()[..], reason].concat();
        let length = u8::try_from(payload.len()).expect("a control frame is shorter than 126 bytes");
        match self.side {
            Side::Server => [&[FIN | CLOSE, length][..], &payload].concat(),
            Side::Client => {
                // The mask protects what a script can choose (RFC 6455 10.3), which this payload is not.
                let mask = RandomState::new().hash_one(length).to_be_bytes();
                let masked = payload.iter().zip(mask[..4].iter().cycle()).map(|(byte, mask)| byte ^ mask);
                [FIN | CLOSE, MASKED | length].into_iter().chain(mask[..4].iter().copied()).chain(masked).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(opcode: u8, payload: usize, masked: bool) -> Vec<u8> {
        let mut bytes = vec![FIN | opcode];
        let mask = if masked { MASKED } else { 0 };
        match payload {
            0..126 => bytes.push(mask | u8::try_from(payload).unwrap()),
            126..65_536 => {
                bytes.push(mask | 0x7e);
                bytes.extend(u16::try_from(payload).unwrap().to_be_bytes());
            }
            _ => {
                bytes.push(mask | 0x7f);
                bytes.extend((payload as u64).to_be_bytes());
            }
        }
        bytes.extend(std::iter::repeat_n(1, if masked { 4 } else { 0 }));
        // Payload bytes that look like heads of close frames.
        bytes.extend(std::iter::repeat_n(FIN | CLOSE, payload));
        bytes
    }

    #[test]
    fn frames_end_where_they_end_however_the_bytes_are_cut() {
        for masked in [false, true] {
            let sizes = [0, 1, 125, 126, 65_535, 65_536, 3];
            let all: Vec<u8> = sizes.iter().flat_map(|size| frame(2, *size, masked)).collect();
            for step in [1, 7, 4096, all.len()] {
                let mut frames = Frames::new(Side::Server);
                let mut ends = 0;
                for part in all.chunks(step) {
                    let mut rest = part;
                    while !rest.is_empty() {
                        rest = &rest[frames.finish(rest)..];
                        ends += usize::from(frames.is_between());
                    }
                }
                assert_eq!(ends, sizes.len(), "masked {masked}, step {step}");
                assert!(!frames.is_closed());
            }
        }
    }

    #[test]
    fn a_close_frame_is_seen_and_ours_is_one() {
        let mut frames = Frames::new(Side::Client);
        frames.advance(&frame(8, 2, true));
        assert!(frames.is_closed() && frames.is_between());
        for side in [Side::Client, Side::Server] {
            let close = Frames::new(side).close(side == Side::Client);
            let mut reader = Frames::new(side);
            assert_eq!(reader.finish(&close), close.len());
            assert!(reader.is_closed() && reader.is_between());
        }
        let ours = Frames::new(Side::Client).close(true);
        let code: Vec<u8> = (0..2).map(|i| ours[6 + i] ^ ours[2 + i]).collect();
        assert_eq!(code, 1012_u16.to_be_bytes());
    }
}
