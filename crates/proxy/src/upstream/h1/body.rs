//! The body of a response as it comes over an HTTP/1.1 connection (RFC 9112 sections 6 and 7.1).
//!
//! The body owns the connection while it lasts. Bytes arrive in memory that all connections of a thread share and are
//! copied out in their number, so that a stream that waits for its next event holds no buffer.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};
use tokio::{
    io::{AsyncRead as _, ReadBuf},
    sync::Notify,
};

use super::response::Framing;
use crate::{flight::InFlight, stream::Stream};

/// Most bytes that are received at a time.
const RECEIVED: usize = 64 << 10;
/// How long a request may be sent on after its response.
const ALONE: Duration = Duration::from_secs(30);
/// Longest line before a chunk, and longest trailer section.
const MAX_LINE: usize = 4 << 10;
const MAX_TRAILERS: usize = 64 << 10;

thread_local! {
    static ARRIVAL: RefCell<Box<[u8]>> = RefCell::new(vec![0; RECEIVED].into_boxed_slice());
}

/// Receives once.
pub(super) fn poll_receive(stream: &mut Stream, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    ARRIVAL.with_borrow_mut(|arrival| {
        let mut buf = ReadBuf::new(arrival);
        ready!(Pin::new(stream).poll_read(cx, &mut buf))?;
        Poll::Ready(Ok(Bytes::copy_from_slice(buf.filled())))
    })
}

/// The rest of a request, which still goes out beside its response or after it.
#[derive(Debug, Default)]
pub(super) struct Sending {
    sent: AtomicBool,
    /// What counts once the response has ended, and the end of all.
    after: Mutex<(Option<InFlight>, bool)>,
    alone: Notify,
}

impl Sending {
    fn after(&self) -> std::sync::MutexGuard<'_, (Option<InFlight>, bool)> {
        self.after.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it was sent.
    pub(super) fn done(&self) {
        self.sent.store(true, Ordering::Release);
    }

    /// Nothing more is sent.
    pub(super) fn ended(&self) {
        let flight = {
            let mut after = self.after();
            after.1 = true;
            after.0.take()
        };
        drop(flight);
    }

    /// The response has ended, whole, before the request: that goes on by itself, and counts as in flight.
    fn go_on(&self, flight: InFlight) {
        let mut after = self.after();
        if !after.1 {
            after.0 = Some(flight);
            self.alone.notify_one();
        }
    }

    /// Ready when the rest of the request has had its time after the response, or its instance is cut.
    pub(super) async fn overdue(&self) {
        self.alone.notified().await;
        let cut = self.after().0.as_ref().map(|flight| Arc::clone(flight.cut()));
        let Some(cut) = cut else { return };
        // It does not matter which.
        let _ = tokio::time::timeout(ALONE, cut.cancelled()).await;
    }
}

/// A body, with the connection that it comes over.
#[derive(Debug)]
pub(crate) struct Body {
    /// `None` once it was given back or closed.
    stream: Option<Stream>,
    /// What arrived and was not passed on.
    rest: Bytes,
    reading: Reading,
    kept: bool,
    sending: Option<Arc<Sending>>,
}

#[derive(Debug)]
enum Reading {
    Length(u64),
    ToEnd,
    Chunk(Chunk),
    Trailers(Vec<u8>),
    Done,
}

/// Place in a chunk.
#[derive(Debug)]
enum Chunk {
    /// In the line before its data.
    Line(Vec<u8>),
    Data(u64),
    /// In the line end behind its data, after so many of its two bytes.
    End(u8),
}

impl Body {
    pub(super) fn new(
        stream: Stream,
        rest: Bytes,
        framing: Framing,
        kept: bool,
        sending: Option<Arc<Sending>>,
    ) -> Self {
        let reading = match framing {
            Framing::Length(0) => Reading::Done,
            Framing::Length(length) => Reading::Length(length),
            Framing::Chunked => Reading::Chunk(Chunk::Line(Vec::new())),
            Framing::ToEnd => Reading::ToEnd,
        };
        Self { stream: Some(stream), rest, reading, kept, sending }
    }

    /// The connection, if another request may be sent over it.
    pub(super) fn reusable(&mut self) -> Option<Stream> {
        // Bytes behind the end belong to nothing that was asked.
        let sent = self.sending.as_ref().is_none_or(|sending| sending.sent.load(Ordering::Acquire));
        let whole = matches!(self.reading, Reading::Done) && self.rest.is_empty();
        if self.kept && sent && whole { self.stream.take() } else { None }
    }

    /// The connection after a switch of protocols, with what arrived behind the head.
    pub(crate) fn upgrade(&mut self) -> Option<Stream> {
        let mut stream = self.stream.take()?;
        stream.rewind(std::mem::take(&mut self.rest));
        Some(stream)
    }

    /// Leaves the connection to the rest of the request, if the response ended whole before that; else closes it.
    pub(super) fn leave(&mut self, flight: InFlight) {
        let whole = matches!(self.reading, Reading::Done) && self.rest.is_empty();
        match &self.sending {
            Some(sending) if whole => {
                self.stream = None;
                sending.go_on(flight);
            }
            _ => self.close(),
        }
    }

    /// Closes the connection.
    pub(crate) fn close(&mut self) {
        if let (Some(stream), Some(_)) = (self.stream.take(), &self.sending) {
            // Whoever still sends has the socket as well.
            stream.socket().shut();
        }
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        matches!(self.reading, Reading::Done)
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        match self.reading {
            Reading::Length(length) => SizeHint::with_exact(length),
            Reading::Done => SizeHint::with_exact(0),
            _ => SizeHint::default(),
        }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        loop {
            match self.read() {
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(None) if self.is_end_stream() => return Poll::Ready(None),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            let Some(stream) = &mut self.stream else { return Poll::Ready(Some(Err(early()))) };
            self.rest = ready!(poll_receive(stream, cx))?;
            if self.rest.is_empty() {
                if matches!(self.reading, Reading::ToEnd) {
                    self.reading = Reading::Done;
                    return Poll::Ready(None);
                }
                return Poll::Ready(Some(Err(early())));
            }
        }
    }

    /// The next frame of what arrived. `None`: all of it was used.
    fn read(&mut self) -> io::Result<Option<Frame<Bytes>>> {
        while !self.rest.is_empty() {
            match &mut self.reading {
                Reading::Done => return Ok(None),
                Reading::ToEnd => return Ok(Some(Frame::data(std::mem::take(&mut self.rest)))),
                Reading::Length(left) => {
                    let data = take(&mut self.rest, left);
                    if *left == 0 {
                        self.reading = Reading::Done;
                    }
                    return Ok(Some(Frame::data(data)));
                }
                Reading::Chunk(Chunk::Data(left)) => {
                    let data = take(&mut self.rest, left);
                    if *left == 0 {
                        self.reading = Reading::Chunk(Chunk::End(0));
                    }
                    return Ok(Some(Frame::data(data)));
                }
                Reading::Chunk(Chunk::End(seen)) => {
                    if self.rest.get_u8() != b"\r\n"[usize::from(*seen)] {
                        return Err(invalid("a chunk is longer than it says"));
                    }
                    *seen += 1;
                    if *seen == 2 {
                        self.reading = Reading::Chunk(Chunk::Line(Vec::new()));
                    }
                }
                Reading::Chunk(Chunk::Line(line)) => {
                    if !take_line(&mut self.rest, line, MAX_LINE)? {
                        continue;
                    }
                    self.reading = match size(line)? {
                        0 => Reading::Trailers(Vec::new()),
                        size => Reading::Chunk(Chunk::Data(size)),
                    };
                }
                Reading::Trailers(section) => {
                    // A line may come in parts: only one that is empty as a whole ends the section.
                    if !take_line(&mut self.rest, section, MAX_TRAILERS)? || !is_whole(section) {
                        continue;
                    }
                    let trailers = trailers(section)?;
                    self.reading = Reading::Done;
                    if !trailers.is_empty() {
                        return Ok(Some(Frame::trailers(trailers)));
                    }
                }
            }
        }
        Ok(None)
    }
}

/// As many bytes as are there and wanted.
fn take(rest: &mut Bytes, left: &mut u64) -> Bytes {
    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(rest.len());
    *left -= count as u64;
    if count == rest.len() { std::mem::take(rest) } else { rest.split_to(count) }
}

/// Moves bytes up to and with the next line feed; whether it came.
fn take_line(rest: &mut Bytes, line: &mut Vec<u8>, most: usize) -> io::Result<bool> {
    let end = rest.iter().position(|byte| *byte == b'\n');
    let count = end.map_or(rest.len(), |end| end + 1);
    if line.len() + count > most {
        return Err(invalid("a line between chunks is too long"));
    }
    line.extend_from_slice(&rest[..count]);
    rest.advance(count);
    if end.is_some() && !line.ends_with(b"\r\n") {
        return Err(invalid("a line between chunks ends without CR"));
    }
    Ok(end.is_some())
}

/// Whether a trailer section ended with an empty line.
fn is_whole(section: &[u8]) -> bool {
    section == b"\r\n" || section.ends_with(b"\r\n\r\n")
}

/// Size of a chunk; extensions are passed over (RFC 9112 section 7.1.1).
fn size(line: &[u8]) -> io::Result<u64> {
    let line = line.strip_suffix(b"\r\n").unwrap_or(line);
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let behind = line[digits..].trim_ascii_start();
    let number = std::str::from_utf8(&line[..digits]).ok().and_then(|digits| u64::from_str_radix(digits, 16).ok());
    match number {
        Some(number) if (1..=16).contains(&digits) && (behind.is_empty() || behind[0] == b';') => Ok(number),
        _ => Err(invalid("a chunk has no valid size")),
    }
}

fn trailers(section: &[u8]) -> io::Result<HeaderMap> {
    let mut lines = [httparse::EMPTY_HEADER; 64];
    let Ok(httparse::Status::Complete((_, lines))) = httparse::parse_headers(section, &mut lines) else {
        return Err(invalid("the trailers are malformed"));
    };
    let mut map = HeaderMap::with_capacity(lines.len());
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line.value)) else {
            return Err(invalid("the trailers are malformed"));
        };
        map.append(name, value);
    }
    Ok(map)
}

fn early() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended before the response did")
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Drop for Body {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use proptest::{
        collection,
        prelude::*,
        sample::{Index, select},
    };

    use super::*;

    /// The data of `bytes`, which arrive in pieces of `piece` bytes, and the trailers; the error's text if there is one.
    fn read(framing: Framing, bytes: &[u8], piece: usize) -> Result<(Vec<u8>, Option<HeaderMap>, bool), String> {
        let mut body = Body::closed(framing);
        let (mut data, mut trailers) = (Vec::new(), None);
        for part in bytes.chunks(piece) {
            body.rest = Bytes::copy_from_slice(&[&body.rest, part].concat());
            while let Some(frame) = body.read().map_err(|error| error.to_string())? {
                match frame.into_data() {
                    Ok(piece) => data.extend_from_slice(&piece),
                    Err(frame) => trailers = frame.into_trailers().ok(),
                }
            }
        }
        Ok((data, trailers, body.is_end_stream()))
    }

    impl Body {
        fn closed(framing: Framing) -> Self {
            let reading = match framing {
                Framing::Length(length) => Reading::Length(length),
                Framing::Chunked => Reading::Chunk(Chunk::Line(Vec::new())),
                Framing::ToEnd => Reading::ToEnd,
            };
            Self { stream: None, rest: Bytes::new(), reading, kept: true, sending: None }
        }
    }

    #[test]
    fn chunks_mean_the_same_however_they_arrive() {
        let sent = b"5\r\nhello\r\n1;name=\"v\"\r\n \r\n0A \t;x\r\nworld-wide\r\n0\r\nx-sum: 3\r\ny: z\r\n\r\n";
        for piece in 1..=sent.len() {
            let (data, trailers, ended) = read(Framing::Chunked, sent, piece).unwrap();
            assert_eq!((data.as_slice(), ended), (&b"hello world-wide"[..], true), "in pieces of {piece}");
            assert_eq!(trailers.unwrap()["x-sum"], "3");
        }
        let (data, trailers, ended) = read(Framing::Chunked, b"0\r\n\r\n", 1).unwrap();
        assert_eq!((data.len(), trailers, ended), (0, None, true));
    }

    #[test]
    fn half_a_body_has_no_end() {
        let sent = b"3\r\nabc\r\n0\r\na: b\r\n\r\n";
        for length in 0..sent.len() {
            assert!(!read(Framing::Chunked, &sent[..length], 7).unwrap().2, "{length}");
        }
        assert_eq!(read(Framing::Length(4), b"abc", 2).unwrap(), (b"abc".to_vec(), None, false));
        assert_eq!(read(Framing::ToEnd, b"abc", 2).unwrap(), (b"abc".to_vec(), None, false));
    }

    #[test]
    fn a_length_ends_where_it_says_and_the_rest_is_left() {
        let (data, _, ended) = read(Framing::Length(3), b"abcdef", 6).unwrap();
        assert_eq!((data, ended), (b"abc".to_vec(), true));
    }

    #[test]
    fn chunks_that_could_be_read_in_two_ways_are_refused() {
        for sent in [
            "\r\n",
            "x\r\n",
            "-1\r\n",
            "+1\r\na\r\n",
            "0x1\r\na\r\n",
            "1 a\r\na\r\n",
            "1\na\n",
            "1\r\nab\r\n",
            "1\r\na\n0\r\n\r\n",
            "11111111111111111\r\n",
            "0\r\nno colon\r\n\r\n",
            "0\r\na b: c\r\n\r\n",
        ] {
            assert!(read(Framing::Chunked, sent.as_bytes(), 3).is_err(), "{sent:?}");
        }
        let endless = format!("1;{}\r\na\r\n", "x".repeat(MAX_LINE));
        assert!(read(Framing::Chunked, endless.as_bytes(), 1000).is_err());
        let endless = format!("0\r\n{}", "a: b\r\n".repeat(MAX_TRAILERS));
        assert!(read(Framing::Chunked, endless.as_bytes(), 1000).is_err());
    }

    proptest! {
        /// What could be a body, or nearly.
        #[test]
        fn any_bytes_mean_the_same_however_they_arrive(
            parts in collection::vec(select(PARTS), 0..24),
            change in (any::<Index>(), select(b"\r\n\0;0aF:\xff".as_slice())),
            changed in any::<bool>(),
            piece in 1_usize..40,
        ) {
            let mut sent = parts.concat().into_bytes();
            if changed && !sent.is_empty() {
                let at = change.0.index(sent.len());
                sent[at] = change.1;
            }
            for framing in [Framing::Chunked, Framing::Length(17), Framing::ToEnd] {
                let whole = read(framing, &sent, sent.len().max(1));
                prop_assert_eq!(&read(framing, &sent, piece), &whole);
                prop_assert_eq!(&read(framing, &sent, 1), &whole);
                if let Ok((data, _, _)) = whole {
                    prop_assert!(data.len() <= sent.len());
                }
            }
        }
    }

    const PARTS: &[&str] = &[
        "0\r\n",
        "1\r\na\r\n",
        "03\r\nabc\r\n",
        "a\r\n0123456789\r\n",
        "2;x=\"\r\n\"",
        "\r\n",
        "\n",
        "\r",
        "x: y\r\n",
        "x",
        ":",
        " ",
        "ffffffffffffffff\r\n",
        "10000000000000000\r\n",
    ];
}
