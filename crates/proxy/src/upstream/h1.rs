//! HTTP/1.1 connections to an endpoint: each carries one request at a time, idle ones wait to be used again.
//!
//! An idle connection may be closed by the instance at any moment, and a request that crosses that close is lost
//! (hyper#2136). Three things keep that from being seen: idle connections are given up after less time than any common
//! server waits (Node and uvicorn: 5 s), the kernel is asked about a connection before it is used, and what can still be
//! lost in between is sent again only if that is safe. A request that must not be sent twice takes only a connection
//! that was in use a moment ago.

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use orchestra_task::{TaskKind, TaskTree};
use tokio::time::Instant;

use super::{SendError, Upstream, describe};
use crate::{exchange::replay::RequestBody, flight::Flight, metrics::RetryKind, stream::Socket};

/// How long a connection may be idle.
const IDLE: Duration = Duration::from_secs(4);
/// The same for a request that must not be sent twice.
const IDLE_UNSAFE: Duration = Duration::from_millis(500);
/// Idle connections per endpoint.
const IDLE_LIMIT: usize = 512;
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
    connection: Connection,
    since: Instant,
}

#[derive(Debug)]
struct Connection {
    sender: http1::SendRequest<RequestBody>,
    socket: Arc<Socket>,
}

/// A connection that carries a request.
#[derive(Debug)]
pub(crate) struct Lease {
    connection: Connection,
    pool: Arc<Pool>,
    flight: Arc<Flight>,
    tree: TaskTree,
}

impl Lease {
    pub(super) fn release(mut self) {
        // hyper may still have to finish the request's side, or to see that the connection is to be closed.
        if self.connection.sender.is_ready() {
            self.pool.put(self.connection, &self.flight, &self.tree);
            return;
        }
        if self.connection.sender.is_closed() {
            return;
        }
        self.tree.clone().start(TaskKind::Connection, "http/1.1 connection back to its pool", async move {
            if self.connection.sender.ready().await.is_ok() {
                self.pool.put(self.connection, &self.flight, &self.tree);
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
    fn take(&self, safe: bool) -> Option<Connection> {
        let limit = if safe { IDLE } else { IDLE_UNSAFE };
        loop {
            let connection = {
                let mut idle = self.idle();
                if idle.last()?.since.elapsed() >= limit {
                    return None;
                }
                idle.pop()?.connection
            };
            if connection.sender.is_ready() && connection.socket.is_quiet() {
                return Some(connection);
            }
        }
    }

    fn put(self: &Arc<Self>, connection: Connection, flight: &Flight, tree: &TaskTree) {
        {
            let mut idle = self.idle();
            // A draining endpoint is not used again. Looked at under the lock: whoever closes the gate clears the pool
            // afterwards, so one of the two sees the other.
            if flight.is_closed() || idle.len() >= IDLE_LIMIT {
                return;
            }
            idle.push(Idle { connection, since: Instant::now() });
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
    mut request: Request<RequestBody>,
    safe: bool,
) -> Result<(Response<Incoming>, Lease), SendError> {
    // A reused connection that turns out closed before anything was written gives the request back.
    loop {
        let (mut connection, reused) = match pool.take(safe) {
            Some(connection) => (connection, true),
            None => (dial(upstream).await?, false),
        };
        let (read, written) = (connection.socket.read(), connection.socket.written());
        match connection.sender.try_send_request(request).await {
            Ok(response) => {
                let (flight, tree) = (Arc::clone(&upstream.flight), upstream.tree.clone());
                return Ok((response, Lease { connection, pool: Arc::clone(pool), flight, tree }));
            }
            Err(mut error) => match error.take_message() {
                Some(returned) if reused => {
                    upstream.series.load().retry(RetryKind::Stale);
                    request = returned;
                }
                message => {
                    let text = describe(&error.into_error());
                    return Err(if message.is_some() || connection.socket.written() == written {
                        SendError::Untouched(RetryKind::Stale, text)
                    } else if reused && connection.socket.read() == read {
                        SendError::Silent(text)
                    } else {
                        SendError::Failed(text)
                    });
                }
            },
        }
    }
}

async fn dial(upstream: &Upstream) -> Result<Connection, SendError> {
    let stream = upstream.connect().await.map_err(SendError::Connect)?;
    let socket = Arc::clone(stream.socket());
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|e| SendError::Connect(std::io::Error::other(e)))?;
    upstream.tree.start(TaskKind::Connection, "http/1.1 instance connection", async move {
        // Whoever sent a request hears of the error; on an idle connection it is of no interest.
        let _ = connection.with_upgrades().await;
    });
    Ok(Connection { sender, socket })
}
