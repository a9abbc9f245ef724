//! HTTP/1.1 as far as a health check needs it (RFC 9110, RFC 9112), on a bare socket.
//!
//! The request is built once per target. Of the answer it reads the head, at most 16 KiB, and the body, at most 64 KiB;
//! what is beyond is not asked for. An answer must be complete, or reach that limit, within the check's timeout: a body
//! that ends early or never ends its first 64 KiB is a failure even after a good status. Redirects are not followed: the
//! status decides. Written here and not taken from hyper because a thousand of these run every second beside real work;
//! this one costs two buffers and five system calls.

use std::{collections::BTreeSet, net::SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    check::{Fault, Socket, clean},
    outside::Connection,
    target::HttpCheck,
};

/// Longest head of an answer, interim answers (1xx) included.
const HEAD: usize = 16 * 1024;
/// What is read of a body.
const BODY: usize = 64 * 1024;
/// Longest line that begins a chunk.
const CHUNK_LINE: usize = 256;
/// What may be received for [`BODY`] bytes of body; only hostile chunking needs more.
const RAW: usize = 8 * BODY;

/// A request that is ready to be sent, and what its answer must be.
pub(crate) struct Request {
    address: SocketAddr,
    bytes: Vec<u8>,
    is_head: bool,
    status: BTreeSet<u16>,
    contains: Option<String>,
}

// === impl Request ===

impl Request {
    /// Builds the request; refuses what would not be one request on the wire.
    pub(crate) fn new(check: &HttpCheck) -> Result<Self, String> {
        let is_token = |text: &str| {
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
        };
        if !is_token(&check.method) {
            return Err(format!("invalid method {:?}", check.method));
        }
        if !check.path.starts_with('/') || check.path.bytes().any(|b| b <= b' ' || b == 0x7f) {
            return Err(format!("invalid path {:?}", check.path));
        }
        let mut head = format!("{} {} HTTP/1.1\r\n", check.method, check.path);
        let mut field = |name: &str, value: &str| {
            head.push_str(name);
            head.push_str(": ");
            head.push_str(value);
            head.push_str("\r\n");
        };
        let given = |name: &str| check.headers.keys().any(|key| key.eq_ignore_ascii_case(name));
        if !given("host") {
            field("Host", &check.address.to_string());
        }
        if !given("user-agent") {
            field("User-Agent", concat!("orchestra-probe/", env!("CARGO_PKG_VERSION")));
        }
        if !given("accept") {
            field("Accept", "*/*");
        }
        field("Connection", "close");
        for (name, value) in &check.headers {
            if !is_token(name) || value.bytes().any(|b| (b < b' ' && b != b'\t') || b == 0x7f) {
                return Err(format!("invalid header field {name:?}"));
            }
            // These frame the message, and that is not the stack's to say.
            if ["connection", "content-length", "transfer-encoding"].iter().any(|own| name.eq_ignore_ascii_case(own)) {
                continue;
            }
            field(name, value);
        }
        if check.body.is_some() || check.method == "POST" {
            field("Content-Length", &check.body.as_ref().map_or(0, String::len).to_string());
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(check.body.as_deref().unwrap_or_default().as_bytes());
        Ok(Self {
            address: check.address,
            bytes,
            is_head: check.method == "HEAD",
            status: check.status.clone(),
            contains: check.contains.clone(),
        })
    }

    /// Asks once. `stage` always says what is being waited for.
    pub(crate) async fn ask(&self, stage: &mut &'static str) -> Result<String, Fault> {
        let mut socket = Socket::connect(self.address).await?;
        let (answer, complete) = self.ask_over(socket.stream(), stage).await?;
        if complete {
            socket.answered();
        }
        answer
    }

    /// Asks once over a connection that is there.
    pub(crate) async fn ask_through(&self, connection: Connection, stage: &mut &'static str) -> Result<String, Fault> {
        match connection {
            Connection::Plain(mut socket) => {
                let (answer, complete) = self.ask_over(socket.stream(), stage).await?;
                if complete {
                    socket.answered();
                }
                answer
            }
            Connection::Tls(mut stream) => self.ask_over(&mut *stream, stage).await?.0,
        }
    }

    /// The answer, and whether it was read to its end.
    async fn ask_over<S>(
        &self,
        stream: &mut S,
        stage: &mut &'static str,
    ) -> Result<(Result<String, Fault>, bool), Fault>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        *stage = "while sending the request";
        stream.write_all(&self.bytes).await?;
        stream.flush().await?;
        *stage = "while waiting for the answer";
        let mut reader = Reader::new(stream, RAW);
        let head = reader.final_head().await?;
        let wanted =
            if self.status.is_empty() { (200..400).contains(&head.status) } else { self.status.contains(&head.status) };
        if !wanted {
            return Err(Fault::Answer(format!("HTTP {}", head.status)));
        }
        *stage = "while reading the answer's body";
        let framing =
            if self.is_head || matches!(head.status, 101 | 204 | 304) { Framing::Length(0) } else { head.framing };
        let mut body = Body { kept: self.contains.as_ref().map(|_| Vec::new()), left: BODY };
        let complete = reader.body(framing, &mut body).await?;
        if let (Some(wanted), Some(kept)) = (&self.contains, &body.kept)
            && !contains(kept, wanted.as_bytes())
        {
            let missing = format!("HTTP {}, but the answer does not contain {wanted:?}", head.status);
            return Ok((Err(Fault::Answer(missing)), complete));
        }
        Ok((Ok(format!("HTTP {}", head.status)), complete))
    }

    /// Asks once for the whole body, which must be complete within `limit` bytes, whatever the status is.
    pub(crate) async fn fetch(&self, stage: &mut &'static str, limit: usize) -> Result<(u16, Vec<u8>), Fault> {
        let mut socket = Socket::connect(self.address).await?;
        let answer = self.fetch_over(socket.stream(), stage, limit).await?;
        socket.answered();
        Ok(answer)
    }

    /// The same over a connection that is there.
    pub(crate) async fn fetch_through(
        &self,
        connection: Connection,
        stage: &mut &'static str,
        limit: usize,
    ) -> Result<(u16, Vec<u8>), Fault> {
        match connection {
            Connection::Plain(mut socket) => {
                let answer = self.fetch_over(socket.stream(), stage, limit).await?;
                socket.answered();
                Ok(answer)
            }
            Connection::Tls(mut stream) => self.fetch_over(&mut *stream, stage, limit).await,
        }
    }

    async fn fetch_over<S>(
        &self,
        stream: &mut S,
        stage: &mut &'static str,
        limit: usize,
    ) -> Result<(u16, Vec<u8>), Fault>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        *stage = "while sending the request";
        stream.write_all(&self.bytes).await?;
        stream.flush().await?;
        *stage = "while waiting for the answer";
        let mut reader = Reader::new(stream, limit.saturating_mul(8));
        let head = reader.final_head().await?;
        *stage = "while reading the answer's body";
        let framing = if matches!(head.status, 101 | 204 | 304) { Framing::Length(0) } else { head.framing };
        let mut body = Body { kept: Some(Vec::new()), left: limit };
        if !reader.body(framing, &mut body).await? {
            return Err(Fault::Answer(format!("the answer is longer than {} KiB", limit / 1024)));
        }
        Ok((head.status, body.kept.unwrap_or_default()))
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || haystack.windows(needle.len()).any(|window| window == needle)
}

struct Head {
    status: u16,
    framing: Framing,
}

/// Where a body ends (RFC 9112, section 6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    Close,
}

/// What is wanted of a body.
struct Body {
    /// Its bytes, if anybody looks at them.
    kept: Option<Vec<u8>>,
    /// How much may still come.
    left: usize,
}

impl Body {
    /// Takes bytes; false once the limit is reached.
    fn take(&mut self, bytes: &[u8]) -> bool {
        let bytes = &bytes[..bytes.len().min(self.left)];
        self.left -= bytes.len();
        if let Some(kept) = &mut self.kept {
            kept.extend_from_slice(bytes);
        }
        self.left > 0
    }
}

// === impl Reader ===

struct Reader<'a, S> {
    stream: &'a mut S,
    buffer: Vec<u8>,
    /// What was consumed of `buffer`.
    at: usize,
    /// What was received in all, and the most that may be.
    raw: usize,
    most: usize,
}

impl<'a, S: AsyncRead + Unpin> Reader<'a, S> {
    fn new(stream: &'a mut S, most: usize) -> Self {
        Self { stream, buffer: Vec::with_capacity(1_024), at: 0, raw: 0, most }
    }

    /// The head that is not an interim one.
    async fn final_head(&mut self) -> Result<Head, Fault> {
        let mut budget = HEAD;
        loop {
            let head = self.head(&mut budget).await?;
            // 101 is final: the protocol would change after it, which was not asked for.
            if !(100..200).contains(&head.status) || head.status == 101 {
                return Ok(head);
            }
        }
    }

    /// Receives more; false at the end of the stream.
    async fn more(&mut self) -> Result<bool, Fault> {
        if self.at == self.buffer.len() {
            self.buffer.clear();
            self.at = 0;
        }
        if self.buffer.len() == self.buffer.capacity() {
            self.buffer.drain(..self.at);
            self.at = 0;
            self.buffer.reserve(4 * 1024);
        }
        let n = self.stream.read_buf(&mut self.buffer).await?;
        self.raw += n;
        Ok(n > 0)
    }

    fn unread(&self) -> &[u8] {
        &self.buffer[self.at..]
    }

    /// The next head, of what is left of the budget for heads.
    async fn head(&mut self, budget: &mut usize) -> Result<Head, Fault> {
        let mut scanned = 0;
        loop {
            let unread = self.unread();
            let sign = b"HTTP/1.";
            let seen = unread.len().min(sign.len());
            if unread[..seen] != sign[..seen] {
                return Err(not_http(unread));
            }
            // A line feed, then perhaps a carriage return, then a line feed. Looked at again are at most two bytes.
            let end = (scanned..unread.len()).find_map(|i| match unread[i..] {
                [b'\n', b'\n', ..] => Some(i + 2),
                [b'\n', b'\r', b'\n', ..] => Some(i + 3),
                _ => None,
            });
            if let Some(end) = end.filter(|end| end <= budget) {
                let head = parse_head(&unread[..end])?;
                self.at += end;
                *budget -= end;
                return Ok(head);
            }
            scanned = unread.len().saturating_sub(2);
            if unread.len() >= *budget {
                return Err(Fault::Answer("the head of the answer is longer than 16 KiB".to_owned()));
            }
            if !self.more().await? {
                return Err(Fault::Answer(if self.raw == 0 {
                    "connection closed without an answer".to_owned()
                } else {
                    "the answer ended early".to_owned()
                }));
            }
        }
    }

    /// Reads a body to its end (true) or to the limit (false).
    async fn body(&mut self, framing: Framing, body: &mut Body) -> Result<bool, Fault> {
        match framing {
            Framing::Length(length) => self.exactly(length, body).await,
            Framing::Chunked => loop {
                let size = self.chunk_size().await?;
                if size == 0 {
                    // The trailer section is of no interest.
                    return Ok(true);
                }
                if !self.exactly(size, body).await? {
                    return Ok(false);
                }
                let end = self.line().await?;
                if !end.is_empty() {
                    return Err(Fault::Answer("malformed chunk".to_owned()));
                }
            },
            Framing::Close => loop {
                if !body.take(&self.buffer[self.at..]) {
                    return Ok(false);
                }
                self.at = self.buffer.len();
                if !self.more().await? {
                    return Ok(true);
                }
            },
        }
    }

    /// Passes `length` bytes on; false if the limit came first.
    async fn exactly(&mut self, length: u64, body: &mut Body) -> Result<bool, Fault> {
        let mut left = length;
        while left > 0 {
            if self.unread().is_empty() && !self.more().await? {
                return Err(Fault::Answer("the answer ended early".to_owned()));
            }
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(self.unread().len());
            let within = body.take(&self.buffer[self.at..self.at + n]);
            self.at += n;
            left -= n as u64;
            if !within {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn chunk_size(&mut self) -> Result<u64, Fault> {
        let malformed = || Fault::Answer("malformed chunk".to_owned());
        let line = self.line().await?;
        let digits = line.split(|b| *b == b';').next().unwrap_or_default().trim_ascii_end();
        if digits.is_empty() || digits.len() > 16 || !digits.iter().all(u8::is_ascii_hexdigit) {
            return Err(malformed());
        }
        let digits = std::str::from_utf8(digits).map_err(|_| malformed())?;
        u64::from_str_radix(digits, 16).map_err(|_| malformed())
    }

    /// A line of the chunked framing, without its end.
    async fn line(&mut self) -> Result<Vec<u8>, Fault> {
        loop {
            let unread = self.unread();
            if let Some(end) = unread.iter().position(|b| *b == b'\n') {
                let line = unread[..end].strip_suffix(b"\r").unwrap_or(&unread[..end]).to_vec();
                self.at += end + 1;
                return Ok(line);
            }
            if unread.len() > CHUNK_LINE || self.raw > self.most {
                return Err(Fault::Answer("malformed chunk".to_owned()));
            }
            if !self.more().await? {
                return Err(Fault::Answer("the answer ended early".to_owned()));
            }
        }
    }
}

fn not_http(bytes: &[u8]) -> Fault {
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(32)]);
    Fault::Answer(format!("not an HTTP/1 answer: {}", clean(start.lines().next().unwrap_or_default())))
}

/// Status and framing of a head, which ends with its empty line.
fn parse_head(head: &[u8]) -> Result<Head, Fault> {
    let malformed = |what: &str| Fault::Answer(format!("malformed answer: {what}"));
    let mut lines = head.split(|b| *b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let first = lines.next().unwrap_or_default();
    // "HTTP/1.1 200" or "HTTP/1.1 200 OK".
    let status = match first {
        [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9', b' ', status @ ..]
            if status.len() >= 3
                && status[..3].iter().all(u8::is_ascii_digit)
                && matches!(status.get(3), None | Some(b' ')) =>
        {
            status[..3].iter().fold(0, |n, digit| n * 10 + u16::from(digit - b'0'))
        }
        _ => return Err(not_http(first)),
    };
    if status < 100 {
        return Err(malformed("status below 100"));
    }
    let mut length: Option<u64> = None;
    let mut encoding: Option<bool> = None;
    for line in lines.filter(|line| !line.is_empty()) {
        if matches!(line[0], b' ' | b'\t') {
            // The rest of a folded field; none of the fields that matter here is ever long enough.
            continue;
        }
        let colon = line.iter().position(|b| *b == b':').ok_or_else(|| malformed("header field without a colon"))?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            let text = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|b| b.is_ascii_digit()));
            let value = text.and_then(|text| text.parse().ok()).ok_or_else(|| malformed("content-length"))?;
            if length.is_some_and(|before| before != value) {
                return Err(malformed("two lengths"));
            }
            length = Some(value);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            let last = value.rsplit(|b| *b == b',').next().unwrap_or_default().trim_ascii();
            encoding = Some(last.eq_ignore_ascii_case(b"chunked"));
        }
    }
    let framing = match (encoding, length) {
        (Some(true), _) => Framing::Chunked,
        (Some(false), _) | (None, None) => Framing::Close,
        (None, Some(length)) => Framing::Length(length),
    };
    Ok(Head { status, framing })
}
