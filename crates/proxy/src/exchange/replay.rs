//! Request bodies on their way to instances: sent again while nothing was done with them, bounded in size, read ahead
//! where a route says so, and given up where a client sends too slowly.
//!
//! An HTTP/2 instance may refuse a stream whose body is already on its way (`REFUSED_STREAM`, `GOAWAY`), which says
//! that it did nothing (RFC 9113 8.7). To send such a request elsewhere, what was taken from the client is kept until the
//! response begins, up to a limit; beyond it the body is only passed on. Frames are shared, not copied.
//!
//! A body that is read ahead ([`Replay::gather`]) binds no instance while its client is slow. What all of them keep is
//! bounded for the whole process; beyond that they are passed on as they come.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use orchestra_task::{TaskKind, TaskTree};
use tokio::time::{Instant, Sleep};

use super::{
    headers,
    source::{Source, SourceError},
};
use crate::metrics::Series;

/// Bytes of a body that are kept where nothing else is said.
const LIMIT: usize = 64 << 10;
/// Bytes that all bodies read ahead keep together.
const GATHERED: usize = 64 << 20;
/// A client may let us wait for its body for so long in all …
const PATIENCE: Duration = Duration::from_secs(30);
/// … and a second more for each so many bytes that it has sent.
const SLOWEST: u64 = 64;
/// What is still read of a body that nobody wants, so that its sender gets the answer and no reset.
const LINGER: (Duration, usize) = (Duration::from_secs(2), 4 << 20);

/// Bytes of bodies that were read ahead.
#[derive(Debug, Default)]
pub(crate) struct Memory(AtomicUsize);

/// A part of it; given back when dropped.
#[derive(Debug)]
struct Share(Arc<Memory>, usize);

impl Share {
    /// Grows by so many bytes if there is room.
    fn grow(&mut self, by: usize) -> bool {
        let step = |used: usize| used.checked_add(by).filter(|sum| *sum <= GATHERED);
        let room = self.0.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok();
        if room {
            self.1 += by;
        }
        room
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.0.fetch_sub(self.1, Ordering::AcqRel);
    }
}

/// The body of a request, over all attempts to send it.
#[derive(Debug)]
pub(crate) enum Replay {
    Empty,
    Shared(Arc<Shared>),
}

#[derive(Debug)]
pub(crate) struct Shared(Mutex<State>);

/// Why a body has no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The client failed.
    Client,
    /// It is longer than the route takes.
    TooLarge,
    /// The client sends too slowly.
    Slow,
}

#[derive(Debug)]
struct State {
    /// `None` for a copy, which has everything already.
    source: Option<Source>,
    hint: SizeHint,
    kept: Vec<Bytes>,
    /// Bytes that are kept.
    size: usize,
    /// What reading ahead has taken of the process's memory.
    share: Option<Share>,
    trailers: Option<HeaderMap>,
    /// The client sent trailers.
    trailed: bool,
    ended: bool,
    fault: Option<Fault>,
    /// Something was passed on that is not kept any more.
    gone: bool,
    /// Nothing is kept any more, since nobody will ask again.
    committed: bool,
    /// The attempt that may read; older ones are cut off.
    attempt: u32,
    /// That attempt is under way.
    reading: bool,
    series: Option<Arc<Series>>,
    /// Bytes that the client sent.
    taken: u64,
    /// Bytes that no series counted yet.
    uncounted: usize,
    /// Most bytes that the client may send.
    most: u64,
    /// How long the client has let us wait before; nothing is asked of streams.
    waited: Option<Duration>,
    waiting: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    /// When something was last sent, where somebody wants to know.
    moved: Option<Instant>,
    /// What a copy of the request would send, up to the limit.
    copy: Option<Vec<Bytes>>,
    copied: usize,
}

impl State {
    fn new(source: Option<Source>, hint: SizeHint) -> Self {
        Self {
            source,
            hint,
            kept: Vec::new(),
            size: 0,
            share: None,
            trailers: None,
            trailed: false,
            ended: false,
            fault: None,
            gone: false,
            committed: false,
            attempt: 0,
            reading: false,
            series: None,
            taken: 0,
            uncounted: 0,
            most: u64::MAX,
            waited: Some(Duration::ZERO),
            waiting: None,
            timer: None,
            moved: None,
            copy: None,
            copied: 0,
        }
    }

    fn fail(&mut self, fault: Fault, error: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.fault = Some(fault);
        self.forget();
        Poll::Ready(Some(Err(error)))
    }

    /// Nothing is kept any more.
    fn forget(&mut self) {
        self.kept = Vec::new();
        self.share = None;
        self.gone = true;
    }

    /// The next frame of the client.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.fault {
            None => {}
            Some(Fault::Client) => return Poll::Ready(Some(Err(BodyError::Broken))),
            Some(Fault::TooLarge) => return Poll::Ready(Some(Err(BodyError::TooLarge))),
            Some(Fault::Slow) => return Poll::Ready(Some(Err(BodyError::Slow))),
        }
        let Some(source) = &mut self.source else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(source).poll_frame(cx) else {
            ready!(self.poll_patience(cx));
            return self.fail(Fault::Slow, BodyError::Slow);
        };
        if let (Some(since), Some(waited)) = (self.waiting.take(), &mut self.waited) {
            *waited += since.elapsed();
        }
        match frame {
            None => Poll::Ready(None),
            Some(Err(error)) => self.fail(Fault::Client, BodyError::Client(error)),
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    headers::strip_trailers(trailers);
                    self.trailed = true;
                }
                if let Some(data) = frame.data_ref() {
                    self.taken += data.len() as u64;
                    if self.taken > self.most {
                        return self.fail(Fault::TooLarge, BodyError::TooLarge);
                    }
                    match &self.series {
                        Some(series) => series.received(data.len()),
                        None => self.uncounted += data.len(),
                    }
                }
                if let Some(moved) = &mut self.moved {
                    *moved = Instant::now();
                }
                Poll::Ready(Some(Ok(frame)))
            }
        }
    }

    /// Ready when the client has let us wait for too long. Not asked once the response began: then it is a conversation.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(waited) = self.waited.filter(|_| !self.committed) else { return Poll::Pending };
        let since = *self.waiting.get_or_insert_with(Instant::now);
        let allowed = PATIENCE + Duration::from_secs(self.taken / SLOWEST);
        let deadline = since + allowed.saturating_sub(waited);
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        timer.as_mut().poll(cx)
    }

    /// Reads ahead; ready when the body is whole or will not be kept whole.
    fn poll_gather(&mut self, cx: &mut Context<'_>, limit: usize) -> Poll<()> {
        while self.size <= limit {
            match ready!(self.poll_source(cx)) {
                None => {
                    self.ended = true;
                    self.hint = SizeHint::with_exact(self.size as u64);
                    return Poll::Ready(());
                }
                // Whoever asks next hears of it.
                Some(Err(_)) => return Poll::Ready(()),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let room = self.share.as_mut().is_some_and(|share| share.grow(data.len()));
                        self.size += data.len();
                        self.kept.push(data);
                        if !room {
                            return Poll::Ready(());
                        }
                    }
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        self.ended = true;
                        return Poll::Ready(());
                    }
                },
            }
        }
        Poll::Ready(())
    }
}

/// The body that a client sends, to ask later what became of it.
#[derive(Clone, Debug)]
pub(crate) struct Upload(Arc<Shared>);

impl Upload {
    /// Whether the client failed while its body was read.
    pub(crate) fn is_broken(&self) -> bool {
        self.0.lock().fault.is_some()
    }

    /// Whether the client sent it to its end, and all of it was taken from the connection.
    pub(crate) fn is_whole(&self) -> bool {
        let state = self.0.lock();
        state.fault.is_none() && state.source.as_ref().is_some_and(|source| state.ended || source.is_end_stream())
    }

    /// When something was last sent, if [`Replay::stream`] was asked for.
    pub(crate) fn moved(&self) -> Option<Instant> {
        self.0.lock().moved
    }
}

impl Replay {
    pub(crate) fn new(source: Source) -> Self {
        if source.is_end_stream() {
            return Self::Empty;
        }
        let hint = source.size_hint();
        Self::Shared(Arc::new(Shared(Mutex::new(State::new(Some(source), hint)))))
    }

    fn shared(&self) -> Option<&Arc<Shared>> {
        if let Self::Shared(shared) = self { Some(shared) } else { None }
    }

    /// Length that the client announced.
    pub(crate) fn announced(&self) -> Option<u64> {
        self.shared().map_or(Some(0), |shared| shared.lock().hint.exact())
    }

    /// Whether trailers came with it, or may still come.
    pub(crate) fn may_trail(&self) -> bool {
        self.shared().is_some_and(|shared| {
            let state = shared.lock();
            state.trailed || !state.ended && state.source.as_ref().is_some_and(Source::may_trail)
        })
    }

    /// From now on the client may send at most so many bytes in all.
    pub(crate) fn limit(&self, bytes: u64) {
        if let Some(shared) = self.shared() {
            shared.lock().most = bytes;
        }
    }

    /// It is a stream, on which silence is no fault; remembers when something was last sent.
    pub(crate) fn stream(&self) {
        if let Some(shared) = self.shared() {
            let mut state = shared.lock();
            state.waited = None;
            state.moved = Some(Instant::now());
        }
    }

    /// Reads the body before it is sent anywhere, if it has at most `limit` bytes and there is memory for it.
    pub(crate) async fn gather(&self, limit: usize, memory: &Arc<Memory>) {
        let Some(shared) = self.shared() else { return };
        if shared.lock().hint.lower() > limit as u64 {
            return;
        }
        shared.lock().share = Some(Share(Arc::clone(memory), 0));
        poll_fn(|cx| shared.lock().poll_gather(cx, limit)).await;
    }

    /// From now on keeps what a copy of the request would send. Before the first attempt.
    pub(crate) fn keep_copy(&self) {
        if let Some(shared) = self.shared() {
            let mut state = shared.lock();
            let (kept, size) = (state.kept.clone(), state.size);
            state.copied = size;
            if size <= LIMIT {
                state.copy.get_or_insert(kept);
            }
        }
    }

    /// The body of a copy; `None` if it is not whole, or too long.
    pub(crate) fn copy(&self) -> Option<Self> {
        let Some(shared) = self.shared() else { return Some(Self::Empty) };
        let mut original = shared.lock();
        let ended = original.ended || original.source.as_ref().is_none_or(Body::is_end_stream);
        if !ended || original.fault.is_some() {
            return None;
        }
        let kept = original.copy.take()?;
        let mut state = State::new(None, SizeHint::with_exact(original.copied as u64));
        (state.kept, state.size, state.ended) = (kept, original.copied, true);
        Some(Self::Shared(Arc::new(Shared(Mutex::new(state)))))
    }

    pub(crate) fn upload(&self) -> Option<Upload> {
        self.shared().map(|shared| Upload(Arc::clone(shared)))
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Self::Empty)
    }

    /// The body for the next attempt, counted for `series`.
    pub(crate) fn attempt(&self, series: &Arc<Series>) -> RequestBody {
        let Some(shared) = self.shared() else { return RequestBody { shared: None, attempt: 0, position: 0 } };
        let mut state = shared.lock();
        state.attempt += 1;
        state.reading = true;
        series.received(std::mem::take(&mut state.uncounted));
        state.series = Some(Arc::clone(series));
        RequestBody { shared: Some(Arc::clone(shared)), attempt: state.attempt, position: 0 }
    }

    /// Whether another attempt would send the whole body.
    pub(crate) fn is_whole(&self) -> bool {
        self.shared().is_none_or(|shared| {
            let state = shared.lock();
            !state.gone && state.fault.is_none()
        })
    }

    /// Whether the client has sent all of it.
    pub(crate) fn is_sent(&self) -> bool {
        self.shared().is_none_or(|shared| {
            let state = shared.lock();
            state.ended || state.source.as_ref().is_none_or(Body::is_end_stream)
        })
    }

    /// Why it has no end, if it has none.
    pub(crate) fn fault(&self) -> Option<Fault> {
        self.shared().and_then(|shared| shared.lock().fault)
    }

    /// The response began: nothing need be kept.
    pub(crate) fn commit(&self) {
        if let Some(shared) = self.shared() {
            let mut state = shared.lock();
            state.committed = true;
            if !state.reading {
                state.forget();
            }
        }
    }

    /// Reads on for a while what the client sends: closing a connection with unread bytes in it would reset it, and take
    /// the answer away.
    pub(crate) fn linger(self, tree: &TaskTree) {
        let Self::Shared(shared) = self else { return };
        if let Some(source) = shared.take_unread() {
            tree.start(TaskKind::Connection, "rest of a refused request", linger(source));
        }
    }
}

/// Reads what nobody wants.
async fn linger(mut source: Source) {
    let read = async {
        let mut size = 0;
        while let Some(Ok(frame)) = source.frame().await {
            size += frame.data_ref().map_or(0, Bytes::len);
            if size > LINGER.1 {
                return;
            }
        }
    };
    // Whoever still sends then is cut off.
    let _ = tokio::time::timeout(LINGER.0, read).await;
}

impl Shared {
    /// Where the rest of it would come from.
    fn take_unread(&self) -> Option<Source> {
        self.lock().source.take().filter(|source| !source.is_end_stream())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The body of one attempt.
#[derive(Debug)]
pub(crate) struct RequestBody {
    shared: Option<Arc<Shared>>,
    attempt: u32,
    position: usize,
}

impl RequestBody {
    /// Nobody takes the rest of it. A client of HTTP/1.1 is heard out for a while, as by [`Replay::linger`]; one of HTTP/2
    /// hears that its stream is over.
    pub(crate) async fn linger(self) {
        let source = self.shared.as_ref().and_then(|shared| shared.take_unread());
        if let Some(source @ Source::H1(_)) = source {
            linger(source).await;
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            let mut state = shared.lock();
            if state.attempt == self.attempt {
                state.reading = false;
                if state.committed {
                    state.forget();
                }
            }
        }
    }
}

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    /// The client's side failed.
    #[error("the client's request body ended early")]
    Client(#[source] SourceError),
    /// The same, and it was told before.
    #[error("the client's request body ended early")]
    Broken,
    /// It is longer than the route takes.
    #[error("the client's request body is too long")]
    TooLarge,
    /// The client sends too slowly.
    #[error("the client's request body comes too slowly")]
    Slow,
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
                state.forget();
                this.position = 0;
            }
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
        }
        if state.ended {
            let trailers = state.trailers.clone().filter(|_| this.position == state.kept.len());
            this.position += 1;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = ready!(state.poll_source(cx));
        Poll::Ready(match frame {
            None => {
                state.ended = true;
                this.position += 1;
                None
            }
            Some(Err(error)) => Some(Err(error)),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
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
                        state.forget();
                        this.position = 0;
                    }
                    Some(Ok(Frame::data(data)))
                }
                Err(frame) => {
                    // Trailers end a body. They are not kept: whoever sends them twice must have read twice.
                    state.ended = true;
                    state.gone = true;
                    state.copy = None;
                    this.position += 1;
                    Some(Ok(frame))
                }
            },
        })
    }

    fn is_end_stream(&self) -> bool {
        self.shared.as_ref().is_none_or(|shared| {
            let state = shared.lock();
            let unread = state.attempt == self.attempt
                && (self.position < state.kept.len() || state.trailers.is_some() && self.position == state.kept.len());
            !unread && state.fault.is_none() && (state.ended || state.source.as_ref().is_none_or(Body::is_end_stream))
        })
    }

    fn size_hint(&self) -> SizeHint {
        // Asked for once, before the first frame of an attempt.
        self.shared.as_ref().map_or_else(|| SizeHint::with_exact(0), |shared| shared.lock().hint)
    }
}
