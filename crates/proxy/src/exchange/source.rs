//! The body of a request as it comes from the client's connection, whichever protocol that speaks; and what a stream of
//! HTTP/2 carries, which may as well be a response.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, HeaderValue, Request, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

/// A body on its way in.
#[derive(Debug)]
pub(crate) enum Source {
    /// There is none.
    Empty,
    H1(Incoming),
    H2(Stream),
}

/// What a stream of HTTP/2 carries.
#[derive(Debug)]
pub(crate) struct Stream {
    recv: RecvStream,
    /// Bytes that were announced and did not come yet.
    left: Option<u64>,
    /// Nothing but trailers can follow.
    drained: bool,
}

/// Why a body does not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error(transparent)]
    H1(#[from] hyper::Error),
    #[error(transparent)]
    H2(#[from] h2::Error),
}

impl Source {
    /// Of a request over HTTP/1.
    pub(crate) fn h1(request: Request<Incoming>) -> Request<Self> {
        request.map(Self::H1)
    }

    /// Of a request over HTTP/2.
    pub(crate) fn h2(request: Request<RecvStream>) -> Request<Self> {
        let left = length(request.headers());
        request.map(|recv| if recv.is_end_stream() { Self::Empty } else { Self::H2(Stream::new(recv, left)) })
    }

    /// Whether trailers may still come.
    pub(crate) fn may_trail(&self) -> bool {
        // Over HTTP/1 only behind chunks.
        !self.is_end_stream() && self.size_hint().exact().is_none()
    }
}

/// The length that is announced. h2 sees to it that it is kept.
pub(crate) fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH).map(HeaderValue::to_str)?.ok()?.parse().ok()
}

impl Stream {
    /// With the length that was announced, if the stream keeps to it.
    pub(crate) fn new(recv: RecvStream, left: Option<u64>) -> Self {
        Self { recv, left, drained: false }
    }

    /// A reset is no end, whatever its reason: h2 tells of one only if it came before the end.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.drained {
            match ready!(self.recv.poll_data(cx)) {
                Some(Ok(data)) => {
                    // It was taken from the connection: there is room for as much again.
                    let _ = self.recv.flow_control().release_capacity(data.len());
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => self.drained = true,
            }
        }
        let trailers = ready!(self.recv.poll_trailers(cx)).transpose();
        Poll::Ready(trailers.map(|trailers| trailers.map(Frame::trailers)))
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.recv.is_end_stream()
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Body for Source {
    type Data = Bytes;
    type Error = SourceError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, SourceError>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::H1(incoming) => Pin::new(incoming).poll_frame(cx).map_err(SourceError::H1),
            Self::H2(stream) => stream.poll_frame(cx).map_err(SourceError::H2),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::H1(incoming) => incoming.is_end_stream(),
            Self::H2(stream) => stream.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::H1(incoming) => incoming.size_hint(),
            Self::H2(stream) => stream.size_hint(),
        }
    }
}
