//! Interim responses of an instance (RFC 9110 15.2), on their way to the client before the response itself.
//!
//! `103 Early Hints` and others pass. `100 Continue` does not: the proxy asks for bodies itself. `101` is no interim
//! response here, but the end of HTTP.

use std::{
    fmt::Write as _,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response, Version, header};

use super::{body::ClientConnection, headers};

/// Interim responses that pass for one request.
const MOST: u32 = 16;

/// The client's ear, while it waits for a response.
#[derive(Debug)]
pub(crate) struct Interim<'a> {
    client: &'a ClientConnection,
    /// Of HTTP/2.
    stream: Option<u32>,
    left: u32,
}

impl<'a> Interim<'a> {
    /// Of the client of a request; over HTTP/1.0 it would take them for the response.
    pub(crate) fn of<B>(request: &Request<B>, client: &'a ClientConnection, stream: u32) -> Self {
        let left = if request.version() >= Version::HTTP_11 { MOST } else { 0 };
        Self { client, stream: (!client.h1).then_some(stream), left }
    }

    /// Says it, if it is to be said. Over HTTP/1.1 the caller waits for [`Self::poll_said`] before anything else is.
    pub(crate) fn say(&mut self, mut response: Response<()>) {
        let Some(left) = self.left.checked_sub(1) else { return };
        self.left = left;
        headers::strip(response.headers_mut());
        response.headers_mut().remove(header::CONTENT_LENGTH);
        match self.stream {
            Some(stream) => {
                *response.version_mut() = Version::HTTP_2;
                self.client.interim(stream, response);
            }
            None => self.client.socket.interjection.put(lines(&response)),
        }
    }

    /// Ready when everything that was said is on its way.
    pub(crate) fn poll_said(&self, cx: &Context<'_>) -> Poll<()> {
        match self.stream {
            // In order by itself.
            Some(_) => Poll::Ready(()),
            None => self.client.socket.interjection.poll(cx),
        }
    }
}

impl Drop for Interim<'_> {
    fn drop(&mut self) {
        // What was not said by now would come in between.
        if self.stream.is_none() && self.left < MOST {
            self.client.socket.interjection.withdraw();
        }
    }
}

fn lines(response: &Response<()>) -> Bytes {
    let status = response.status();
    let mut head = format!("HTTP/1.1 {} ", status.as_str());
    // Writing to memory cannot fail.
    let _ = write!(head, "{}\r\n", status.canonical_reason().unwrap_or_default());
    let mut head = head.into_bytes();
    for (name, value) in response.headers() {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(part);
        }
    }
    head.extend_from_slice(b"\r\n");
    head.into()
}
