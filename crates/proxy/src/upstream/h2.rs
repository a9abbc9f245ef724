//! HTTP/2 connections to an endpoint: one is shared by all requests, more are made when its streams are exhausted.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};

use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use orchestra_task::TaskKind;

use super::{Executor, SendError, Upstream, describe};
use crate::{exchange::replay::RequestBody, metrics::RetryKind};

/// Streams that one connection carries at most, whatever the instance allows: the flow control window of the
/// connection is shared, and one slow client must not hold up more than these.
const STREAMS: usize = 100;
/// Flow control window of a stream. Over loopback this is no limit; it bounds what a slow client makes us keep.
const STREAM_WINDOW: u32 = 128 << 10;
/// Window of a connection: all streams can be stalled at once without stalling another.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Connections per endpoint; beyond, requests wait for a stream.
const CONNECTIONS: usize = 64;

/// The connections to an endpoint.
#[derive(Debug, Default)]
pub(super) struct Pool {
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Held while connecting, so that a burst makes one connection and not one each.
    dialling: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Connection {
    sender: http2::SendRequest<RequestBody>,
    open: AtomicUsize,
    /// What the instance allows, as far as it said so.
    limit: AtomicUsize,
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
    fn take(&self, crowd: bool) -> Option<Lease> {
        let mut connections = self.connections();
        connections.retain(|c| !c.sender.is_closed());
        // `open` grows only under the lock.
        let free =
            |c: &&Arc<Connection>| c.open.load(Ordering::Acquire) < c.limit.load(Ordering::Acquire).clamp(1, STREAMS);
        let mut found = connections.iter().find(free);
        if found.is_none() && crowd && connections.len() >= CONNECTIONS {
            found = connections.iter().min_by_key(|c| c.open.load(Ordering::Acquire));
        }
        found.map(|connection| {
            connection.open.fetch_add(1, Ordering::AcqRel);
            Lease(Arc::clone(connection))
        })
    }
}

pub(super) async fn send(
    upstream: &Upstream,
    pool: &Pool,
    mut request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Lease), SendError> {
    for last in [false, false, true] {
        let lease = match pool.take(false) {
            Some(lease) => lease,
            None => dial(upstream, pool).await?,
        };
        let mut sender = lease.0.sender.clone();
        match sender.try_send_request(request).await {
            Ok(response) => return Ok((response, lease)),
            Err(mut error) => {
                let returned = error.take_message();
                let error = error.into_error();
                let text = describe(&error);
                return Err(match returned {
                    // The connection ended before the request was written.
                    Some(returned) if !last => {
                        upstream.series.load().retry(RetryKind::Stale);
                        request = returned;
                        continue;
                    }
                    Some(_) => SendError::Untouched(RetryKind::Stale, text),
                    None => match untouched(&error) {
                        Some(kind) => SendError::Untouched(kind, text),
                        None => SendError::Silent { reused: false, text },
                    },
                });
            }
        }
    }
    unreachable!("the last round returns")
}

/// Whether the instance said that it did nothing with the request: it refused the stream, or went away and named an
/// earlier stream as the last that it handled (RFC 9113 6.8 and 8.7). h2 gives the latter error only to streams behind
/// the last one; those before it end with an I/O error if the connection breaks.
fn untouched(error: &(dyn std::error::Error + 'static)) -> Option<RetryKind> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<::h2::Error>() {
            let refused = error.is_reset() && error.reason() == Some(::h2::Reason::REFUSED_STREAM);
            return match error.is_remote() {
                true if refused => Some(RetryKind::Refused),
                // Who goes away refuses nobody: it is the connection that was an old one.
                true if error.is_go_away() => Some(RetryKind::Stale),
                _ => None,
            };
        }
        cause = error.source();
    }
    None
}

async fn dial(upstream: &Upstream, pool: &Pool) -> Result<Lease, SendError> {
    let _alone = pool.dialling.lock().await;
    if let Some(lease) = pool.take(true) {
        return Ok(lease);
    }
    let stream = upstream.connect().await.map_err(SendError::Connect)?;
    let (sender, mut connection) = http2::Builder::new(Executor(upstream.tree.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(256 << 10)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| SendError::Connect(std::io::Error::other(e)))?;
    let limit = AtomicUsize::new(connection.current_max_send_streams());
    let shared = Arc::new(Connection { sender, open: AtomicUsize::new(1), limit });
    let weak = Arc::downgrade(&shared);
    upstream.tree.start(TaskKind::Connection, "http/2 instance connection", async move {
        std::future::poll_fn(|cx| {
            let result = Pin::new(&mut connection).poll(cx);
            if let Some(shared) = weak.upgrade() {
                shared.limit.store(connection.current_max_send_streams(), Ordering::Release);
            }
            match result {
                // Requests hear of the error themselves.
                Poll::Ready(_) => Poll::Ready(()),
                Poll::Pending => Poll::Pending,
            }
        })
        .await;
    });
    let lease = Lease(Arc::clone(&shared));
    let mut connections = pool.connections();
    // As in the HTTP/1.1 pool: a draining endpoint keeps no connection beyond this request.
    if !upstream.flight.is_closed() {
        connections.push(shared);
    }
    Ok(lease)
}
