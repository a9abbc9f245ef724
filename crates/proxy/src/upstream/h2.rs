//! HTTP/2 connections to an endpoint: one is shared by all requests, more are made when its streams are exhausted.
//!
//! On h2 and not through hyper's client, which passes over interim responses, takes a stream that was reset with `CANCEL`
//! for one that ended, and has two hand-overs between tasks per request. Here the task of the request does everything that
//! concerns its stream; only a request that is still being sent when its response begins gets another one.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use ::h2::{
    Reason, RecvStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body::{Body as _, Frame, SizeHint};
use orchestra_task::{TaskKind, TaskTree};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{SendError, Upstream, describe, h1::wants_length};
use crate::{
    exchange::{
        headers::Head,
        interim::Interim,
        replay::RequestBody,
        source::{self, length},
    },
    metrics::RetryKind,
    outflow::Outflow,
};

/// Streams that one connection carries at most, whatever the instance allows: the flow control window of the
/// connection is shared, and one slow client must not hold up more than these.
const STREAMS: usize = 100;
/// Flow control window of a stream. Over loopback this is no limit; it bounds what a slow client makes us keep.
const STREAM_WINDOW: u32 = 128 << 10;
/// Window of a connection: all streams can be stalled at once without stalling another.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Connections per endpoint; beyond, requests wait for a stream.
const CONNECTIONS: usize = 64;
/// What frames of DATA may cost that wait for slow clients, beyond what they carry: h2 counts up to 256 bytes for each
/// small one, and ends the connection beyond this, with everything that goes over it. All streams can be stalled at once
/// with tokens of 60 bytes, and 40 of them with tokens of 20.
const FRAMING: usize = 64 << 20;
/// Longest head of a response.
const MAX_HEAD: u32 = 256 << 10;
/// Times that a connection is tried that turns out to have ended.
const TRIES: u32 = 3;

/// The connections to an endpoint.
#[derive(Debug, Default)]
pub(super) struct Pool {
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Held while connecting, so that a burst makes one connection and not one each.
    dialling: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Bytes>,
    open: AtomicUsize,
}

impl Connection {
    /// Whether it takes another stream, as far as the instance said.
    fn has_room(&self) -> bool {
        let open = self.open.load(Ordering::Acquire);
        open < STREAMS && open < self.sender.current_max_send_streams().max(1)
    }

    /// A sender that may be used; `None` once the connection ended, or the instance announced its end.
    fn ready(&self) -> Option<SendRequest<Bytes>> {
        let mut sender = self.sender.clone();
        match sender.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Err(_)) => None,
            // Of one that sent nothing yet it is ready at once.
            Poll::Ready(Ok(())) | Poll::Pending => Some(sender),
        }
    }
}

/// A stream in use.
#[derive(Debug)]
pub(crate) struct Lease(Arc<Connection>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Pool {
    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clear(&self) {
        let connections = std::mem::take(&mut *self.connections());
        drop(connections);
    }

    /// A stream of a connection that has one left. With `crowd`, of the least used one otherwise.
    fn take(&self, crowd: bool) -> Option<(Lease, SendRequest<Bytes>)> {
        let mut connections = self.connections();
        loop {
            // `open` grows only under the lock.
            let mut found = connections.iter().position(|connection| connection.has_room());
            if found.is_none() && crowd && connections.len() >= CONNECTIONS {
                let open = |at: &usize| connections[*at].open.load(Ordering::Acquire);
                found = (0..connections.len()).min_by_key(open);
            }
            let found = found?;
            let Some(sender) = connections[found].ready() else {
                connections.remove(found);
                continue;
            };
            let connection = Arc::clone(&connections[found]);
            connection.open.fetch_add(1, Ordering::AcqRel);
            return Some((Lease(connection), sender));
        }
    }
}

/// The body of a response.
#[derive(Debug)]
pub(crate) struct Body {
    /// `None` if there is none, or nothing more of it is wanted.
    stream: Option<source::Stream>,
    /// Ends what is still being sent of the request, unless the response came to its end.
    sending: Option<DropGuard>,
}

impl Body {
    pub(super) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ::h2::Error>>> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(None) };
        let frame = ready!(stream.poll_frame(cx));
        if frame.is_none() {
            self.ended();
        }
        Poll::Ready(frame)
    }

    /// The response came to its end: what is still being sent goes on.
    fn ended(&mut self) {
        if let Some(sending) = self.sending.take() {
            sending.disarm();
        }
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.stream.as_ref().is_none_or(source::Stream::is_end_stream)
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.stream.as_ref().map_or_else(|| SizeHint::with_exact(0), source::Stream::size_hint)
    }
}

pub(super) async fn send(
    upstream: &Upstream,
    pool: &Pool,
    head: &Head,
    body: RequestBody,
    interim: Option<&mut Interim<'_>>,
) -> Result<(Response<Body>, Lease), SendError> {
    let ended = body.is_end_stream();
    let request = request(head, &body, ended);
    let mut tries = 0;
    let (lease, response, send) = loop {
        tries += 1;
        let (lease, mut sender) = match pool.take(false) {
            Some(taken) => taken,
            None => dial(upstream, pool).await?,
        };
        match sender.send_request(request.clone(), ended) {
            Ok((response, send)) => break (lease, response, send),
            // It ended since it was looked at.
            Err(_) if tries < TRIES => upstream.series.load().retry(RetryKind::Stale),
            Err(error) => return Err(SendError::Untouched(RetryKind::Stale, describe(&error))),
        }
    };
    let mut outflow = (!ended).then(|| Outflow::new(body, send));
    let response = answer(response, &mut outflow, interim).await.map_err(|error| match untouched(&error) {
        Some(kind) => SendError::Untouched(kind, describe(&error)),
        None => SendError::Silent { reused: false, text: describe(&error) },
    })?;
    let sending = outflow.map(|outflow| go_on(outflow, &upstream.tree).drop_guard());
    // The head says how long a body would be where there is none (RFC 9110 8.6).
    let length = Some(length(response.headers())).filter(|_| head.method != Method::HEAD).flatten();
    let response = response.map(|recv| {
        let stream = (!recv.is_end_stream()).then(|| source::Stream::new(recv, length));
        let mut body = Body { stream, sending };
        if body.stream.is_none() {
            body.ended();
        }
        body
    });
    Ok((response, lease))
}

/// The request without its body, whose length is announced where it is known.
fn request(head: &Head, body: &RequestBody, ended: bool) -> Request<()> {
    let mut request = head.request(());
    let length = if ended { Some(0) } else { body.size_hint().exact() };
    if let Some(length) = length.filter(|length| *length > 0 || wants_length(&head.method, head.headers())) {
        request.headers_mut().insert(header::CONTENT_LENGTH, length.into());
    }
    request
}

/// Sends a request until its response begins.
async fn answer(
    mut response: ResponseFuture,
    outflow: &mut Option<Outflow<RequestBody>>,
    mut interim: Option<&mut Interim<'_>>,
) -> Result<Response<RecvStream>, ::h2::Error> {
    poll_fn(|cx| {
        if outflow.as_mut().is_some_and(|outflow| outflow.poll(cx).is_ready()) {
            // If it failed, the response says so too.
            *outflow = None;
        }
        loop {
            if let Some(interim) = &interim {
                ready!(interim.poll_said(cx));
            }
            match ready!(response.poll_informational(cx)) {
                Some(Ok(said)) => {
                    // `100` the proxy did not ask for, and `101` is none here (RFC 9113 8.6).
                    let passes = ![StatusCode::CONTINUE, StatusCode::SWITCHING_PROTOCOLS].contains(&said.status());
                    if let (true, Some(interim)) = (passes, &mut interim) {
                        interim.say(said);
                    }
                }
                Some(Err(_)) | None => return Pin::new(&mut response).poll(cx),
            }
        }
    })
    .await
}

/// Sends the rest of a request beside its response; what is returned ends it.
fn go_on(mut outflow: Outflow<RequestBody>, tree: &TaskTree) -> CancellationToken {
    let ending = CancellationToken::new();
    let ended = ending.clone();
    tree.start(TaskKind::Connection, "rest of a request", async move {
        tokio::select! {
            // The instance hears of what went wrong by itself.
            _ = poll_fn(|cx| outflow.poll(cx)) => return,
            () = ended.cancelled() => {}
        }
        outflow.reset();
    });
    ending
}

/// Whether the instance said that it did nothing with the request: it refused the stream, or went away and named an
/// earlier stream as the last that it handled (RFC 9113 6.8 and 8.7). h2 gives the latter error only to streams behind
/// the last one; those before it end with an I/O error if the connection breaks.
fn untouched(error: &::h2::Error) -> Option<RetryKind> {
    match error.is_remote() {
        true if error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM) => Some(RetryKind::Refused),
        // Who goes away refuses nobody: it is the connection that was an old one.
        true if error.is_go_away() => Some(RetryKind::Stale),
        _ => None,
    }
}

async fn dial(upstream: &Upstream, pool: &Pool) -> Result<(Lease, SendRequest<Bytes>), SendError> {
    let _alone = pool.dialling.lock().await;
    if let Some(taken) = pool.take(true) {
        return Ok(taken);
    }
    let stream = upstream.connect().await.map_err(SendError::Connect)?;
    let (sender, connection) = Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .data_frame_budget(FRAMING)
        .max_header_list_size(MAX_HEAD)
        .handshake(stream)
        .await
        .map_err(|error| SendError::Connect(std::io::Error::other(error)))?;
    upstream.tree.start(TaskKind::Connection, "http/2 instance connection", async move {
        // Requests hear of the error themselves.
        let _ = connection.await;
    });
    let shared = Arc::new(Connection { sender: sender.clone(), open: AtomicUsize::new(1) });
    let lease = Lease(Arc::clone(&shared));
    let mut connections = pool.connections();
    // As in the HTTP/1.1 pool: a draining endpoint keeps no connection beyond this request.
    if !upstream.flight.is_closed() {
        connections.push(shared);
    }
    Ok((lease, sender))
}
