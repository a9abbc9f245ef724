//! A body on its way out over a stream of HTTP/2: a response to a client, or a request to an instance.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body::Body;

/// A stream, until all of its body was handed over or nobody wants it any more.
pub(crate) struct Outflow<B> {
    body: B,
    send: SendStream<Bytes>,
    /// A piece for which there is no room yet, and whether it is the last.
    waiting: Option<(Bytes, bool)>,
    begun: bool,
}

impl<B: Body<Data = Bytes> + Unpin> Outflow<B> {
    pub(crate) fn new(body: B, send: SendStream<Bytes>) -> Self {
        Self { body, send, waiting: None, begun: false }
    }

    /// Ready when everything was handed over, when the body failed, which resets the stream, or when the peer did.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        loop {
            if self.waiting.is_some() {
                while self.send.capacity() == 0 {
                    match ready!(self.send.poll_capacity(cx)) {
                        Some(room) => room?,
                        // The peer gave up.
                        None => return Poll::Ready(Ok(())),
                    };
                }
            }
            if let Some((data, last)) = self.waiting.take() {
                self.send.send_data(data, last)?;
                if last {
                    return Poll::Ready(Ok(()));
                }
            }
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(Some(Err(_))) => {
                    self.reset();
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(None) => return Poll::Ready(self.send.send_data(Bytes::new(), true)),
                Poll::Pending => return self.send.poll_reset(cx).map_ok(drop),
            };
            match frame.into_data() {
                Ok(data) => {
                    let last = self.body.is_end_stream();
                    // The first piece goes as it is, and h2 waits for room where there is none: mostly it is the only one.
                    // Others wait here, so that what a slow peer makes us keep is bounded. Room is asked for only with
                    // something in hand: other streams of the connection may need it.
                    if self.begun && !data.is_empty() {
                        self.send.reserve_capacity(1);
                        self.waiting = Some((data, last));
                        continue;
                    }
                    self.begun = true;
                    self.send.send_data(data, last)?;
                    if last {
                        return Poll::Ready(Ok(()));
                    }
                }
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        return Poll::Ready(self.send.send_trailers(trailers));
                    }
                }
            }
        }
    }

    /// The body, while the peer takes nothing of it, so that it is asked for nothing.
    pub(crate) fn stalled(&mut self) -> Option<&mut B> {
        self.waiting.is_some().then_some(&mut self.body)
    }

    /// Nothing more comes, and what came is not the whole.
    pub(crate) fn reset(&mut self) {
        self.send.send_reset(Reason::CANCEL);
    }
}
