//! Request bodies that can be sent again while nothing was done with them.
//!
//! An HTTP/2 instance may refuse a stream whose body is already on its way (`REFUSED_STREAM`, `GOAWAY`), which says
//! that it did nothing (RFC 9113 8.7). To send such a request elsewhere, what was taken from the client is kept until the
//! response begins, up to a limit; beyond it the body is only passed on. Frames are shared, not copied.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::metrics::Series;

/// Bytes of a body that are kept.
const LIMIT: usize = 64 << 10;

/// The body of a request, over all attempts to send it.
#[derive(Debug)]
pub(crate) enum Replay {
    Empty,
    Shared(Arc<Shared>),
}

#[derive(Debug)]
pub(crate) struct Shared {
    hint: SizeHint,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` for a copy, which has everything already.
    source: Option<Incoming>,
    kept: Vec<Bytes>,
    size: usize,
    trailers: Option<HeaderMap>,
    ended: bool,
    /// The client failed.
    broken: bool,
    /// Something was passed on that is not kept any more.
    gone: bool,
    /// Nothing is kept any more, since nobody will ask again.
    committed: bool,
    /// The attempt that may read; older ones are cut off.
    attempt: u32,
    series: Option<Arc<Series>>,
    /// What a copy of the request would send, up to the limit.
    copy: Option<Vec<Bytes>>,
    copied: usize,
}

/// The body that a client sends, to ask later what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Upload(Arc<Shared>);

impl Upload {
    /// Whether the client failed while its body was read.
    pub(crate) fn is_broken(&self) -> bool {
        self.0.lock().broken
    }
}

impl Replay {
    pub(crate) fn new(source: Incoming) -> Self {
        if source.is_end_stream() {
            return Self::Empty;
        }
        let hint = source.size_hint();
        let state = State {
            source: Some(source),
            kept: Vec::new(),
            size: 0,
            trailers: None,
            ended: false,
            broken: false,
            gone: false,
            committed: false,
            attempt: 0,
            series: None,
            copy: None,
            copied: 0,
        };
        Self::Shared(Arc::new(Shared { hint, state: Mutex::new(state) }))
    }

    /// From now on keeps what a copy of the request would send. Before the first attempt.
    pub(crate) fn keep_copy(&self) {
        if let Self::Shared(shared) = self {
            shared.lock().copy.get_or_insert_default();
        }
    }

    /// The body of a copy; `None` if it is not whole, or too long.
    pub(crate) fn copy(&self) -> Option<Self> {
        let Self::Shared(shared) = self else { return Some(Self::Empty) };
        let mut original = shared.lock();
        let ended = original.ended || original.source.as_ref().is_none_or(Body::is_end_stream);
        if !ended || original.broken {
            return None;
        }
        let kept = original.copy.take()?;
        let (hint, size) = (SizeHint::with_exact(original.copied as u64), original.copied);
        let state = State {
            source: None,
            kept,
            size,
            trailers: None,
            ended: true,
            broken: false,
            gone: false,
            committed: false,
            attempt: 0,
            series: None,
            copy: None,
            copied: 0,
        };
        Some(Self::Shared(Arc::new(Shared { hint, state: Mutex::new(state) })))
    }

    pub(crate) fn upload(&self) -> Option<Upload> {
        if let Self::Shared(shared) = self { Some(Upload(Arc::clone(shared))) } else { None }
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// The body for the next attempt, counted for `series`.
    pub(crate) fn attempt(&self, series: &Arc<Series>) -> RequestBody {
        let Self::Shared(shared) = self else { return RequestBody { shared: None, attempt: 0, position: 0 } };
        let mut state = shared.lock();
        state.attempt += 1;
        state.series = Some(Arc::clone(series));
        RequestBody { shared: Some(Arc::clone(shared)), attempt: state.attempt, position: 0 }
    }

    /// Whether another attempt would send the whole body.
    pub(crate) fn is_whole(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Shared(shared) => {
                let state = shared.lock();
                !state.gone && !state.broken
            }
        }
    }

    /// Whether the client failed while its body was read.
    pub(crate) fn is_broken(&self) -> bool {
        matches!(self, Self::Shared(shared) if shared.lock().broken)
    }

    /// The response began: nothing need be kept.
    pub(crate) fn commit(&self) {
        if let Self::Shared(shared) = self {
            let mut state = shared.lock();
            state.committed = true;
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The body of one attempt.
#[derive(Debug)]
pub(crate) struct RequestBody {
    shared: Option<Arc<Shared>>,
    attempt: u32,
    position: usize,
}

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The client's side failed.
    #[error("the client's request body ended early")]
    Client(#[source] hyper::Error),
    /// A newer attempt reads the body.
    #[error("the request is sent elsewhere")]
    Superseded,
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let Some(shared) = &this.shared else { return Poll::Ready(None) };
        let mut state = shared.lock();
        let state = &mut *state;
        if state.attempt != this.attempt {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        if let Some(chunk) = state.kept.get(this.position) {
            let chunk = chunk.clone();
            this.position += 1;
            if state.committed && this.position == state.kept.len() {
                state.kept = Vec::new();
                state.gone = true;
                this.position = 0;
            }
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if state.ended {
            return Poll::Ready(state.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let Some(source) = &mut state.source else { return Poll::Ready(None) };
        let frame = std::task::ready!(Pin::new(source).poll_frame(cx));
        Poll::Ready(match frame {
            None => {
                state.ended = true;
                None
            }
            Some(Err(error)) => {
                state.broken = true;
                Some(Err(BodyError::Client(error)))
            }
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    if let Some(series) = &state.series {
                        series.received(data.len());
                    }
                    state.copied += data.len();
                    if state.copied > LIMIT {
                        state.copy = None;
                    } else if let Some(copy) = &mut state.copy {
                        copy.push(data.clone());
                    }
                    if !state.committed && !state.gone && state.size + data.len() <= LIMIT {
                        state.size += data.len();
                        state.kept.push(data.clone());
                        this.position += 1;
                    } else {
                        state.kept = Vec::new();
                        this.position = 0;
                        state.gone = true;
                    }
                    Some(Ok(Frame::data(data)))
                }
                Err(frame) => {
                    // Trailers end a body. They are not kept: whoever sends them twice must have read twice.
                    state.ended = true;
                    state.gone = true;
                    state.copy = None;
                    Some(Ok(frame))
                }
            },
        })
    }

    fn is_end_stream(&self) -> bool {
        self.shared.as_ref().is_none_or(|shared| {
            let state = shared.lock();
            let unread = state.attempt == self.attempt && self.position < state.kept.len();
            !unread
                && state.trailers.is_none()
                && (state.ended || state.source.as_ref().is_none_or(Body::is_end_stream))
        })
    }

    fn size_hint(&self) -> SizeHint {
        // Asked for once, before the first frame of an attempt.
        self.shared.as_ref().map_or_else(|| SizeHint::with_exact(0), |shared| shared.hint)
    }
}
