//! HTTP/1.1 connections to an endpoint: each carries one request at a time, idle ones wait to be used again.
//!
//! An idle connection may be closed by the instance at any moment, and a request that crosses that close is lost
//! (hyper#2136). Three things keep that from being seen: idle connections are given up after less time than any common
//! server waits (Node and uvicorn: 5 s), the kernel is asked about a connection before it is used, and what can still be
//! lost in between is sent again only if that is safe. A request that must not be sent twice takes only a connection
//! that was in use a moment ago. One that may be is spared the question where the connection has just answered: mostly
//! it is the next of many, and this is a system call for each.
//!
//! Written here and not with hyper's client, which gives each connection a task of its own: that is two hand-overs
//! between tasks per request, and two buffers of 8 KiB per stream that waits for its next event. Here the task of the
//! request does everything; only a request that is still being sent when its response begins gets another one.

use std::{
    future::poll_fn,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use orchestra_task::{TaskKind, TaskTree};
use tokio::time::Instant;

use super::{Incoming, SendError, Upstream};
use crate::{
    exchange::interim::Interim,
    flight::{Flight, InFlight},
    metrics::RetryKind,
    stream::Stream,
};

pub(super) mod body;
mod request;
mod response;

pub(super) use request::{Outgoing, wants_length};

use body::{Body, Sending, poll_receive};
use request::Fault;
use response::Parsed;

/// How long a connection may be idle.
const IDLE: Duration = Duration::from_secs(4);
/// The same for a request that must not be sent twice.
const IDLE_UNSAFE: Duration = Duration::from_millis(500);
/// More than so many bytes of a request may be too many to read for a program that has answered already. It closes the
/// connection then, though it said that it would not …
const HEAVY: u64 = 16 << 10;
/// … mostly within this time, in which no other request goes over it.
const SETTLING: Duration = Duration::from_millis(50);
/// Idle for so short a time, a connection is taken for what it was.
const FRESH: Duration = Duration::from_millis(1);
/// Idle connections per endpoint. Closing one blocks its local port for a minute, so a burst that comes again and again must
/// find those that it left.
const IDLE_LIMIT: usize = 4096;
/// Longest response head.
const MAX_HEAD: usize = 256 << 10;

/// Idle connections, the latest last.
#[derive(Debug, Default)]
pub(super) struct Pool {
    idle: Mutex<Vec<Idle>>,
    reaping: AtomicBool,
}

#[derive(Debug)]
struct Idle {
    stream: Stream,
    since: Instant,
}

/// Where a connection goes back to.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: Arc<Pool>,
    flight: Arc<Flight>,
    tree: TaskTree,
    /// Bytes that were written before the request.
    written: u64,
}

impl Lease {
    pub(super) fn release(self, body: &mut Body, flight: InFlight) {
        match body.reusable() {
            Some(stream) if stream.socket().written() - self.written > HEAVY => self.settle(stream),
            Some(stream) => self.pool.put(stream, &self.flight, &self.tree),
            None => body.leave(flight),
        }
    }

    /// Gives a connection back a little later, or closes it if it was closed meanwhile.
    fn settle(self, stream: Stream) {
        let Self { pool, flight, tree, .. } = self;
        let of_pool = tree.clone();
        tree.start(TaskKind::Connection, "connection after a long request", async move {
            let news = poll_fn(|cx| stream.socket().poll_news(cx));
            if tokio::time::timeout(SETTLING, news).await.is_err() {
                pool.put(stream, &flight, &of_pool);
            }
        });
    }
}

impl Pool {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn clear(&self) {
        let idle = std::mem::take(&mut *self.idle());
        drop(idle);
    }

    /// The latest idle connection that is fit for use: the others get the chance to grow old.
    fn take(&self, safe: bool) -> Option<Stream> {
        let limit = if safe { IDLE } else { IDLE_UNSAFE };
        loop {
            let (stream, age) = {
                let mut idle = self.idle();
                let age = idle.last()?.since.elapsed();
                if age >= limit {
                    return None;
                }
                (idle.pop()?.stream, age)
            };
            // Of one that answered a moment ago, what the runtime has heard is enough where a mistake is made good.
            let trusted = safe && age < FRESH && !stream.socket().has_news();
            if trusted || stream.socket().is_quiet() {
                return Some(stream);
            }
        }
    }

    fn put(self: &Arc<Self>, stream: Stream, flight: &Flight, tree: &TaskTree) {
        {
            let mut idle = self.idle();
            // A draining endpoint is not used again. Looked at under the lock: whoever closes the gate clears the pool
            // afterwards, so one of the two sees the other.
            if flight.is_closed() || idle.len() >= IDLE_LIMIT {
                return;
            }
            idle.push(Idle { stream, since: Instant::now() });
        }
        if !self.reaping.swap(true, Ordering::AcqRel) {
            tree.start(TaskKind::Connection, "idle connections", reap(Arc::downgrade(self)));
        }
    }
}

/// Closes connections that were idle too long; ends when there are none, so that an idle proxy does nothing.
async fn reap(pool: Weak<Pool>) {
    loop {
        tokio::time::sleep(IDLE / 4).await;
        let Some(pool) = pool.upgrade() else { return };
        let expired: Vec<Idle> = {
            let mut idle = pool.idle();
            let first_young = idle.partition_point(|i| i.since.elapsed() >= IDLE);
            let expired = idle.drain(..first_young).collect();
            if idle.is_empty() {
                // Under the lock: the next `put` starts a new one.
                pool.reaping.store(false, Ordering::Release);
                return;
            }
            expired
        };
        drop(expired);
    }
}

pub(super) async fn send(
    upstream: &Upstream,
    pool: &Arc<Pool>,
    mut outgoing: Outgoing,
    safe: bool,
    mut interim: Option<&mut Interim<'_>>,
) -> Result<(Response<Incoming>, Lease), SendError> {
    loop {
        let (mut stream, reused) = match pool.take(safe) {
            Some(stream) => (stream, true),
            None => (upstream.connect().await.map_err(SendError::Connect)?, false),
        };
        let (read, written) = (stream.socket().read(), stream.socket().written());
        match exchange(&mut stream, &mut outgoing, interim.as_deref_mut()).await {
            Ok(answer) => {
                let (flight, tree) = (Arc::clone(&upstream.flight), upstream.tree.clone());
                let response = answer.response(stream, outgoing, &tree);
                return Ok((response, Lease { pool: Arc::clone(pool), flight, tree, written }));
            }
            // A reused connection that turns out closed before anything was written: the request is still whole.
            Err(Ended { of_client: false, .. }) if reused && stream.socket().written() == written => {
                upstream.series.load().retry(RetryKind::Stale);
            }
            Err(Ended { text, of_client }) => {
                return Err(if stream.socket().written() == written {
                    SendError::Untouched(RetryKind::Stale, text)
                } else if !of_client && stream.socket().read() == read {
                    SendError::Silent { reused, text }
                } else {
                    SendError::Failed(text)
                });
            }
        }
    }
}

/// The head of a response, and how far things have come.
struct Answer {
    parsed: Parsed,
    /// What arrived behind the head.
    rest: Bytes,
    /// The whole request was sent.
    sent: bool,
}

/// Why there is no answer.
struct Ended {
    text: String,
    /// The client did not send its request to the end.
    of_client: bool,
}

impl Answer {
    /// The response; what is left of the request goes on beside it.
    fn response(self, stream: Stream, mut outgoing: Outgoing, tree: &TaskTree) -> Response<Incoming> {
        let sending = (!self.sent).then(|| {
            let (sending, socket) = (Arc::<Sending>::default(), Arc::clone(stream.socket()));
            let rest = Arc::clone(&sending);
            tree.start(TaskKind::Connection, "rest of a request", async move {
                let sent = tokio::select! {
                    biased;
                    sent = poll_fn(|cx| outgoing.poll(cx, &socket)) => sent.is_ok(),
                    () = rest.overdue() => false,
                };
                if sent {
                    rest.done();
                    rest.ended();
                } else {
                    // The instance must not take a part for the whole.
                    socket.shut();
                    rest.ended();
                    outgoing.give_up().await;
                }
            });
            sending
        });
        let Parsed { response, framing, kept, .. } = self.parsed;
        response.map(|()| Incoming::H1(Body::new(stream, self.rest, framing, kept, sending)))
    }
}

/// Sends a request until the response begins.
async fn exchange(
    stream: &mut Stream,
    outgoing: &mut Outgoing,
    mut interim: Option<&mut Interim<'_>>,
) -> Result<Answer, Ended> {
    let mut sent = false;
    // Sending failed; an answer may have arrived all the same.
    let mut failed: Option<std::io::Error> = None;
    let mut head = BytesMut::new();
    // What arrived behind an interim response.
    let mut behind = Bytes::new();
    let ended = |text: String| Err(Ended { text, of_client: false });
    poll_fn(|cx| {
        if !sent && failed.is_none() {
            match outgoing.poll(cx, stream.socket()) {
                Poll::Ready(Ok(())) => sent = true,
                Poll::Ready(Err(Fault::Socket(error))) => failed = Some(error),
                Poll::Ready(Err(Fault::Body(error))) => {
                    return Poll::Ready(Err(Ended { text: error.to_string(), of_client: true }));
                }
                Poll::Pending => {}
            }
        }
        loop {
            if let Some(interim) = &interim {
                std::task::ready!(interim.poll_said(cx));
            }
            let received =
                if behind.is_empty() { poll_receive(stream, cx) } else { Poll::Ready(Ok(std::mem::take(&mut behind))) };
            let arrived = match std::task::ready!(received) {
                Ok(bytes) if bytes.is_empty() => {
                    let cause = failed.take().map_or_else(
                        || "the connection ended".to_owned(),
                        |error| format!("the connection ended while sending: {error}"),
                    );
                    return Poll::Ready(ended(cause));
                }
                Ok(bytes) => bytes,
                Err(error) => return Poll::Ready(ended(error.to_string())),
            };
            // A head cannot end without the end of a line.
            let line = arrived.contains(&b'\n');
            let mut whole = if head.is_empty() {
                arrived
            } else {
                head.extend_from_slice(&arrived);
                if !line {
                    if head.len() > MAX_HEAD {
                        return Poll::Ready(ended("the head of its response is too long".to_owned()));
                    }
                    continue;
                }
                std::mem::take(&mut head).freeze()
            };
            match response::parse(&whole, &outgoing.method) {
                Ok(Some(parsed)) => {
                    let rest = whole.split_off(parsed.length);
                    match parsed.response.status() {
                        // The proxy did not ask for it: it sends a body or does not.
                        StatusCode::CONTINUE => behind = rest,
                        // Interim responses (RFC 9110 section 15.2) go before the one that counts.
                        status if status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS => {
                            behind = rest;
                            if let Some(interim) = &mut interim {
                                interim.say(parsed.response);
                            }
                        }
                        _ => return Poll::Ready(Ok(Answer { parsed, rest, sent })),
                    }
                }
                Ok(None) if whole.len() > MAX_HEAD => {
                    return Poll::Ready(ended("the head of its response is too long".to_owned()));
                }
                Ok(None) => head = BytesMut::from(&whole[..]),
                Err(what) => return Poll::Ready(ended(what.to_owned())),
            }
        }
    })
    .await
}
