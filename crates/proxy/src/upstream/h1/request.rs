//! The request of an exchange on its way to the instance (RFC 9112 sections 3 and 6 to 7.1).
//!
//! Head and first piece of the body leave together. A body of announced length is sent with that length, any other one in
//! chunks. Nothing of what was not yet taken by the kernel is given up, so that a request of which nothing left this
//! machine can be sent again over another connection.

use std::{
    io::{self, IoSlice, Write as _},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, HeaderName, Method, header};
use http_body::Body as _;

use crate::{
    exchange::{
        headers::Head,
        replay::{BodyError, RequestBody},
    },
    stream::Socket,
};

/// Why a request does not get through.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The instance's side failed.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// The client's side failed: what the instance got is not the whole.
    #[error(transparent)]
    Body(#[from] BodyError),
}

/// A request that is being sent.
#[derive(Debug)]
pub(in crate::upstream) struct Outgoing {
    pub(super) method: Method,
    body: Option<RequestBody>,
    framing: Framing,
    /// The head, or the line before a chunk.
    head: Vec<u8>,
    sent: usize,
    data: Bytes,
    /// The end of a chunk.
    tail: &'static [u8],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// So many bytes are still to come.
    Length(u64),
    Chunked,
}

impl Outgoing {
    pub(in crate::upstream) fn new(to: &Head, body: RequestBody) -> Self {
        let body = Some(body).filter(|body| !body.is_end_stream());
        let length = body.as_ref().map_or(Some(0), |body| body.size_hint().exact());
        let framing = length.map_or(Framing::Chunked, Framing::Length);
        let mut head = Vec::with_capacity(1 << 10);
        for part in [to.method.as_str(), " ", to.target(), " HTTP/1.1\r\n"] {
            head.extend_from_slice(part.as_bytes());
        }
        // Writing to memory cannot fail.
        match framing {
            Framing::Chunked => head.extend_from_slice(b"transfer-encoding: chunked\r\n"),
            // RFC 9110 section 8.6: no length where the method gives a body no meaning and there is none.
            Framing::Length(0) if !wants_length(&to.method, to.headers()) => {}
            Framing::Length(length) => {
                let _ = write!(head, "content-length: {length}\r\n");
            }
        }
        let framed = |name: &HeaderName| name == header::CONTENT_LENGTH || name == header::TRANSFER_ENCODING;
        write_lines(&mut head, to.lines().filter(|(name, _)| !framed(name)));
        head.extend_from_slice(b"\r\n");
        Self { method: to.method.clone(), body, framing, head, sent: 0, data: Bytes::new(), tail: b"" }
    }

    /// Sends as much as can be sent; ready when everything was.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, socket: &Socket) -> Poll<Result<(), Fault>> {
        let mut waits = false;
        loop {
            if self.data.is_empty() && self.tail.is_empty() && !waits {
                match self.poll_body(cx) {
                    Poll::Ready(result) => result?,
                    Poll::Pending => waits = true,
                }
            }
            let bufs = [&self.head[self.sent..], &self.data, self.tail].map(IoSlice::new);
            if bufs.iter().all(|buf| buf.is_empty()) {
                if self.body.is_none() {
                    return Poll::Ready(Ok(()));
                }
                if waits {
                    return Poll::Pending;
                }
                continue;
            }
            let count = ready!(socket.poll_send(cx, &bufs))?;
            self.advance(count);
        }
    }

    /// Takes the next piece of the body, if there is one to take.
    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
        let frame = ready!(Pin::new(body).poll_frame(cx)).transpose()?;
        let mut trailers = None;
        match frame.map(http_body::Frame::into_data) {
            Some(Ok(data)) if data.is_empty() => return Poll::Ready(Ok(())),
            Some(Ok(data)) => {
                match &mut self.framing {
                    // Writing to memory cannot fail.
                    Framing::Chunked => {
                        let _ = write!(self.head, "{:x}\r\n", data.len());
                        self.tail = b"\r\n";
                    }
                    Framing::Length(left) => {
                        *left = left.checked_sub(data.len() as u64).ok_or(BodyError::Broken)?;
                    }
                }
                self.data = data;
                return Poll::Ready(Ok(()));
            }
            Some(Err(frame)) => trailers = frame.into_trailers().ok(),
            None => {}
        }
        self.body = None;
        match self.framing {
            Framing::Chunked => {
                self.head.extend_from_slice(b"0\r\n");
                let lines = trailers.iter().flatten();
                write_lines(&mut self.head, lines.map(|(name, value)| (name, value.as_bytes())));
                self.head.extend_from_slice(b"\r\n");
            }
            // A length leaves no place for trailers.
            Framing::Length(0) => {}
            Framing::Length(_) => return Poll::Ready(Err(BodyError::Broken.into())),
        }
        Poll::Ready(Ok(()))
    }

    /// Nothing more of it can be sent.
    pub(super) async fn give_up(self) {
        if let Some(body) = self.body {
            body.linger().await;
        }
    }

    fn advance(&mut self, mut count: usize) {
        let of_head = count.min(self.head.len() - self.sent);
        self.sent += of_head;
        count -= of_head;
        let of_data = count.min(self.data.len());
        self.data.advance(of_data);
        self.tail = &self.tail[count - of_data..];
        if self.sent == self.head.len() && self.body.is_some() {
            self.head.clear();
            self.sent = 0;
        }
    }
}

/// Writes a line for each header.
fn write_lines<'a>(to: &mut Vec<u8>, headers: impl Iterator<Item = (&'a HeaderName, &'a [u8])>) {
    for (name, value) in headers {
        for part in [name.as_str().as_bytes(), b": ", value, b"\r\n"] {
            to.extend_from_slice(part);
        }
    }
}

/// Whether an empty body is announced as such: where one is expected, or where the client did.
pub(in crate::upstream) fn wants_length(method: &Method, headers: &HeaderMap) -> bool {
    [Method::POST, Method::PUT, Method::PATCH].contains(method) || headers.contains_key(header::CONTENT_LENGTH)
}
