//! Response bodies on their way to the client: counted while they last, ended in order when they are cut.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::WaitForCancellationFutureOwned;

use super::{headers, inspect::Inspection, leash::Leash, replay::Upload, sse};
use crate::{
    flags::Events,
    flight::InFlight,
    idle::Lull,
    metrics::{ErrorKind, Gauge, Series},
    seek::Origin,
    stream::Socket,
    upstream::{Incoming, Lease},
};

/// The last event of an event stream that had to be ended.
const FAREWELL: &[u8] = b"event: orchestra-drain\ndata: {\"reason\":\"the instance is being stopped\"}\n\n";

/// The same of one on which nothing was sent for too long.
const SILENCE: &[u8] = b"event: orchestra-drain\ndata: {\"reason\":\"nothing was sent for too long\"}\n\n";

/// How long a cut waits for the end of an event that is half sent.
const EVENT_GRACE: Duration = Duration::from_secs(1);

/// The client's connection, as far as a request concerns it.
#[derive(Debug)]
pub(crate) struct ClientConnection {
    /// Requests of it that are being answered.
    pub(crate) active: AtomicU32,
    /// Bytes that had arrived when the last answer ended: what comes after them begins a request.
    pub(crate) seen: AtomicU64,
    pub(crate) socket: Arc<Socket>,
    /// HTTP/1: an aborted response ends the connection.
    pub(crate) h1: bool,
    /// HTTP/1: the last request was read to its end.
    whole: AtomicBool,
    /// It asked in HTTP/1.0, where the end of the connection may be the end of a response.
    pub(crate) old: AtomicBool,
    /// What is awaited of the client.
    pub(crate) lull: Arc<Lull>,
    /// HTTP/2: interim responses to be sent, and on which stream.
    interims: Mutex<Vec<(u32, Response<()>)>>,
    /// HTTP/1: what ends the response that is being sent, if it is a longer one.
    leash: Mutex<Option<Leash>>,
}

impl ClientConnection {
    pub(crate) fn new(socket: Arc<Socket>, lull: Arc<Lull>, h1: bool) -> Self {
        Self {
            active: AtomicU32::new(0),
            seen: AtomicU64::new(0),
            socket,
            h1,
            old: AtomicBool::new(false),
            whole: AtomicBool::new(false),
            lull,
            interims: Mutex::default(),
            leash: Mutex::default(),
        }
    }

    fn leash(&self) -> std::sync::MutexGuard<'_, Option<Leash>> {
        self.leash.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// HTTP/1: ready when the response is to end that the client does not take.
    pub(crate) fn poll_leash(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.h1 || !self.socket.is_blocked() {
            return Poll::Pending;
        }
        self.leash().as_mut().map_or(Poll::Pending, |leash| leash.poll(cx))
    }

    /// HTTP/2: an interim response is to be sent on a stream.
    pub(crate) fn interim(&self, stream: u32, response: Response<()>) {
        self.interims.lock().unwrap_or_else(PoisonError::into_inner).push((stream, response));
    }

    /// Those that are to be sent on this stream.
    pub(crate) fn interims(&self, stream: u32) -> Vec<Response<()>> {
        let mut all = self.interims.lock().unwrap_or_else(PoisonError::into_inner);
        all.extract_if(.., |(of, _)| *of == stream).map(|(_, response)| response).collect()
    }

    /// Whether the last request was read to its end, and the response to it sent: then hyper knows nothing of an idle
    /// connection that is not in the socket.
    pub(crate) fn may_rest(&self) -> bool {
        self.h1 && self.whole.load(Ordering::Relaxed) && self.socket.is_flushed()
    }
}

/// Counts a request as being answered.
#[derive(Debug)]
pub(crate) struct Active {
    connection: Arc<ClientConnection>,
    /// Its body, if it has one.
    upload: Option<Upload>,
    /// It has none, or none that is still read.
    whole: bool,
}

impl Active {
    pub(crate) fn new<B: Body>(connection: &Arc<ClientConnection>, request: &Request<B>) -> Self {
        connection.active.fetch_add(1, Ordering::AcqRel);
        Self { connection: Arc::clone(connection), upload: None, whole: request.body().is_end_stream() }
    }

    pub(crate) fn connection(&self) -> &Arc<ClientConnection> {
        &self.connection
    }

    /// This is the body of the request.
    pub(crate) fn carry(&mut self, upload: Option<Upload>) {
        self.upload = upload;
    }

    /// The request was read to its end.
    pub(crate) fn is_whole(&mut self) {
        self.whole = true;
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let client = &self.connection;
        let whole = self.whole || self.upload.as_ref().is_some_and(Upload::is_whole);
        client.whole.store(whole, Ordering::Relaxed);
        client.seen.store(client.socket.read(), Ordering::Relaxed);
        client.active.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A response body.
#[derive(Debug)]
pub(crate) enum ResponseBody {
    /// Of the proxy itself.
    Full(Option<Bytes>, Option<Active>),
    /// Of an instance.
    Instance(Box<InstanceBody>),
    /// Changes of flags, told by the proxy itself.
    Events(Box<Events>, Option<Active>),
}

impl ResponseBody {
    pub(crate) fn full(bytes: Bytes) -> Self {
        Self::Full(Some(bytes).filter(|b| !b.is_empty()), None)
    }

    /// Ready when it has to end though nobody takes anything of it.
    pub(crate) fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Instance(body) => body.poll_end(cx),
            Self::Full(..) | Self::Events(..) => Poll::Pending,
        }
    }

    /// Keeps the connection busy until this body ends.
    pub(crate) fn hold(&mut self, active: Active) {
        match self {
            Self::Full(_, held) | Self::Events(_, held) => *held = Some(active),
            Self::Instance(body) => body.active = Some(active),
        }
    }
}

/// The body of an instance's response.
#[derive(Debug)]
pub(crate) struct InstanceBody {
    incoming: Incoming,
    state: State,
    /// What ends with the body, and only then.
    carried: Option<Carried>,
    /// Set when an event stream can be ended by an event.
    events: Option<sse::Tracker>,
    cut: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    grace: Option<Pin<Box<Sleep>>>,
    /// The last event, should one be needed.
    farewell: &'static [u8],
    series: Arc<Series>,
    /// Set when somebody wants to know about it.
    inspection: Option<Box<Inspection>>,
    /// Set when the time is bounded.
    patience: Option<Box<Patience>>,
    /// Whom a failure is told of; streams tell nobody.
    origin: Option<Origin>,
    active: Option<Active>,
    /// The connection knows what ends it.
    leashed: bool,
}

/// What a body keeps alive.
#[derive(Debug)]
struct Carried {
    lease: Lease,
    flight: InFlight,
    #[expect(dead_code, reason = "counts until dropped")]
    gauge: Gauge,
}

/// How long a body may take.
#[derive(Debug)]
pub(crate) struct Patience {
    timer: Pin<Box<Sleep>>,
    bound: Bound,
}

#[derive(Debug)]
enum Bound {
    /// To its end.
    Whole,
    /// From one piece to the next, in both directions.
    Silence { span: Duration, last: Instant, upload: Option<Upload> },
}

impl Patience {
    /// Until then.
    pub(crate) fn whole(end: Instant) -> Self {
        Self { timer: Box::pin(tokio::time::sleep_until(end)), bound: Bound::Whole }
    }

    /// As long as something is sent every so often.
    pub(crate) fn silence(span: Duration, upload: Option<Upload>) -> Self {
        let last = Instant::now();
        let timer = Box::pin(tokio::time::sleep_until(last + span));
        Self { timer, bound: Bound::Silence { span, last, upload } }
    }

    /// Something was sent.
    fn moved(&mut self) {
        if let Bound::Silence { last, .. } = &mut self.bound {
            *last = Instant::now();
        }
    }

    /// Ready when it is over. The timer is set anew only when it fires.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ErrorKind> {
        loop {
            std::task::ready!(self.timer.as_mut().poll(cx));
            let Bound::Silence { span, last, upload } = &self.bound else { return Poll::Ready(ErrorKind::Timeout) };
            let last = upload.as_ref().and_then(Upload::moved).map_or(*last, |moved| moved.max(*last));
            let end = last + *span;
            if end <= Instant::now() {
                return Poll::Ready(ErrorKind::Idle);
            }
            self.timer.as_mut().reset(end);
        }
    }
}

/// What a body of an instance takes along.
#[derive(Debug)]
pub(crate) struct Passage {
    pub(crate) lease: Lease,
    pub(crate) flight: InFlight,
    pub(crate) gauge: Gauge,
    pub(crate) series: Arc<Series>,
    pub(crate) inspection: Option<Box<Inspection>>,
    pub(crate) patience: Option<Patience>,
    pub(crate) origin: Option<Origin>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Flowing,
    /// Cut, and waiting for the end of the current event.
    Ending,
    /// It ends incomplete as soon as what came before was sent.
    Failing,
    Done,
}

/// Ends a response that is not whole.
#[derive(Debug, thiserror::Error)]
#[error("the response was cut")]
pub(crate) struct CutError(#[source] h2::Error);

impl InstanceBody {
    /// With `events`, it can be ended by one.
    pub(crate) fn new(incoming: Incoming, passage: Passage, events: bool) -> Self {
        let Passage { lease, flight, gauge, series, inspection, patience, origin } = passage;
        Self {
            incoming,
            state: State::Flowing,
            carried: Some(Carried { lease, flight, gauge }),
            events: events.then(sse::Tracker::default),
            cut: None,
            grace: None,
            farewell: FAREWELL,
            series,
            inspection,
            patience: patience.map(Box::new),
            origin,
            active: None,
            leashed: false,
        }
    }

    /// The body was read to its end.
    fn complete(&mut self) {
        self.state = State::Done;
        if let Some(inspection) = self.inspection.take() {
            inspection.complete();
        }
        if let Some(Carried { lease, flight, .. }) = self.carried.take() {
            // First the connection, then the count: who sees the count at zero finds the connection idle or closed.
            lease.release(&mut self.incoming, flight);
        }
    }

    /// The body ends here, whole or not: the connection to the instance is closed.
    fn abandon(&mut self) {
        self.state = State::Done;
        self.incoming.close();
        self.carried = None;
    }

    /// Ends it visibly incomplete: a length that is not kept, chunks without a last one, a reset stream.
    fn fail(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let failing = self.state == State::Failing;
        self.abandon();
        if let Some(active) = &self.active
            && active.connection().h1
        {
            if !failing {
                // hyper gives up what it did not send yet when a body fails: once around, so that the client gets what
                // the instance sent.
                self.state = State::Failing;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if active.connection().old.load(Ordering::Relaxed) {
                // Only a reset says that this is not the end. It may cost what the client has not read yet.
                active.connection().socket.abort_on_close();
            }
        }
        Poll::Ready(Some(Err(Box::new(CutError(h2::Reason::CANCEL.into())))))
    }

    /// Whether the cut has come; if not, whoever polls is woken when it does.
    fn poll_cut(&mut self, cx: &mut Context<'_>, register: bool) -> bool {
        let Some(carried) = &self.carried else { return false };
        if carried.flight.cut().is_cancelled() {
            return true;
        }
        if !register {
            return false;
        }
        let cut = self.cut.get_or_insert_with(|| Box::pin((**carried.flight.cut()).clone().cancelled_owned()));
        cut.as_mut().poll(cx).is_ready()
    }
}

/// What a body says when it is polled.
type Polled = Poll<Option<Result<Frame<Bytes>, BoxError>>>;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.get_mut() {
            Self::Full(bytes, _) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Instance(body) => body.poll_frame(cx),
            Self::Events(events, _) => events.poll(cx).map(|piece| piece.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes, _) => bytes.is_none(),
            Self::Instance(body) => match body.state {
                State::Flowing => body.incoming.is_end_stream(),
                State::Ending | State::Failing => false,
                State::Done => true,
            },
            Self::Events(..) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes, _) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Instance(body) => body.incoming.size_hint(),
            Self::Events(..) => SizeHint::default(),
        }
    }
}

impl InstanceBody {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.state {
            State::Done => return Poll::Ready(None),
            State::Failing => return self.fail(cx),
            State::Flowing | State::Ending => {}
        }
        // Looked at before each frame, so that an instance that never pauses cannot outrun a cut.
        if self.state == State::Flowing && self.poll_cut(cx, false) {
            self.note_cut();
            if self.events.is_none() {
                return self.fail(cx);
            }
            self.state = State::Ending;
        }
        // The same for one that has a time as a whole.
        if let Some(ended) = self.poll_patience(cx, false) {
            return ended;
        }
        if self.state == State::Ending && self.events.is_some_and(sse::Tracker::between_events) {
            self.abandon();
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(self.farewell)))));
        }
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(Ok(self.pass(frame)))),
            Poll::Ready(Some(Err(error))) => {
                self.series.error(ErrorKind::Upstream);
                if let Some(inspection) = self.inspection.take() {
                    inspection.broken();
                }
                if let Some(origin) = &self.origin {
                    origin.failed();
                }
                tracing::debug!(%error, "an instance's response ended early");
                self.fail(cx)
            }
            Poll::Ready(None) => {
                self.complete();
                Poll::Ready(None)
            }
            Poll::Pending if self.state == State::Ending => {
                let grace = self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(EVENT_GRACE)));
                std::task::ready!(grace.as_mut().poll(cx));
                // The half event will be discarded by the reader; nothing can be put behind it.
                self.abandon();
                Poll::Ready(None)
            }
            Poll::Pending if self.poll_cut(cx, true) => {
                // Once around: the cut is seen at the top.
                self.poll_frame(cx)
            }
            Poll::Pending => match self.poll_patience(cx, true) {
                None => Poll::Pending,
                // Once around, to end it in its own way.
                Some(Poll::Pending) if self.state == State::Ending => self.poll_frame(cx),
                Some(ended) => ended,
            },
        }
    }

    /// Its instance was cut before it ended.
    fn note_cut(&mut self) {
        self.series.error(ErrorKind::Cut);
        if let Some(inspection) = self.inspection.take() {
            inspection.cut();
        }
    }

    /// Ready when it has to end though nobody takes anything of it: its instance is cut, or its time is over.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let cut = self.state == State::Flowing && self.poll_cut(cx, true);
        match self.state {
            State::Done => return Poll::Pending,
            State::Ending | State::Failing => {}
            State::Flowing if cut => {
                self.note_cut();
            }
            State::Flowing => {
                let Some(patience) = &mut self.patience else { return Poll::Pending };
                let kind = std::task::ready!(patience.poll(cx));
                // Not the instance's fault: as if the client had left.
                self.series.error(kind);
                self.inspection = None;
            }
        }
        self.abandon();
        Poll::Ready(())
    }

    /// Tells the connection of HTTP/1 what ends it, if there is more of it to come.
    fn leash(&mut self) {
        let (Some(active), Some(carried)) = (&self.active, &self.carried) else { return };
        if !active.connection().h1 || self.incoming.is_end_stream() {
            return;
        }
        self.leashed = true;
        let deadline = self.patience.as_ref().filter(|patience| matches!(patience.bound, Bound::Whole));
        let deadline = deadline.map(|patience| patience.timer.deadline());
        *active.connection().leash() = Some(Leash::new((**carried.flight.cut()).clone(), deadline));
    }

    /// Ends it if its time is over. `Pending` says that it is to be ended by an event.
    fn poll_patience(&mut self, cx: &mut Context<'_>, silent: bool) -> Option<Polled> {
        let patience = self.patience.as_mut().filter(|_| self.state == State::Flowing)?;
        if !silent && !matches!(patience.bound, Bound::Whole) {
            return None;
        }
        let Poll::Ready(kind) = patience.poll(cx) else { return None };
        self.patience = None;
        self.series.error(kind);
        if let Some(inspection) = self.inspection.take() {
            match kind {
                ErrorKind::Timeout => inspection.broken(),
                _ => inspection.cut(),
            }
        }
        if self.events.is_none() {
            return Some(self.fail(cx));
        }
        self.farewell = SILENCE;
        self.state = State::Ending;
        Some(Poll::Pending)
    }

    /// A frame passes; if it completes the event that an end waits for, the last event is put behind it.
    fn pass(&mut self, mut frame: Frame<Bytes>) -> Frame<Bytes> {
        if let Some(trailers) = frame.trailers_mut() {
            headers::strip_trailers(trailers);
        }
        if let Some(inspection) = &mut self.inspection {
            inspection.pass(&frame);
        }
        if let Some(patience) = &mut self.patience {
            patience.moved();
        }
        if !self.leashed {
            self.leash();
        }
        let Some(data) = frame.data_ref() else { return frame };
        self.series.sent(data.len());
        let end = self.events.as_mut().and_then(|tracker| tracker.advance(data));
        match end {
            Some(end) if self.state == State::Ending => {
                let bytes = [&data[..end], self.farewell].concat();
                self.abandon();
                Frame::data(Bytes::from(bytes))
            }
            _ => frame,
        }
    }
}

impl Drop for InstanceBody {
    fn drop(&mut self) {
        if let Some(active) = self.active.as_ref().filter(|_| self.leashed) {
            *active.connection().leash() = None;
            if self.state == State::Flowing && self.carried.as_ref().is_some_and(|c| c.flight.cut().is_cancelled()) {
                // Its client did not even take the end.
                self.note_cut();
            }
        }
        // hyper does not ask again once it knows that nothing follows.
        if self.carried.is_some() && self.state == State::Flowing && self.incoming.is_end_stream() {
            self.complete();
        }
    }
}
