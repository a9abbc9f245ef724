//! A client's HTTP/2 connection with all its streams, in one task.
//!
//! hyper wants a task for each request. Tasks of the runtime are made to run anywhere, and cost accordingly: to start
//! one, to hand over from it to the connection's and back. The streams of a connection share its socket and its locks
//! anyhow, so they run within its task: those that are ready have their turn, then what all of them have to say goes out
//! at once.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_util::sync::CancellationToken;

use super::{
    Answers,
    drive::{Connection, drive},
};
use crate::{exchange::body::ClientConnection, tls::stream::ClientStream};

type Http2 = http2::Connection<TokioIo<ClientStream>, Answers, Begun>;

/// A stream of a connection: a request and its response.
type Exchange = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Streams that have begun since they were last looked for.
#[derive(Clone, Default)]
struct Begun(Arc<Mutex<Vec<Exchange>>>);

impl Begun {
    fn list(&self) -> std::sync::MutexGuard<'_, Vec<Exchange>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Begun {
    fn execute(&self, stream: F) {
        self.list().push(Box::pin(stream));
    }
}

/// A connection and its streams.
struct Streams {
    connection: Pin<Box<Http2>>,
    begun: Begun,
    running: FuturesUnordered<Exchange>,
}

impl Streams {
    fn run(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(())) = self.running.poll_next_unpin(cx) {}
    }
}

impl Connection for Streams {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.run(cx);
        // Whoever is concerned by an error hears of it elsewhere.
        if self.connection.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let begun = std::mem::take(&mut *self.begun.list());
        if !begun.is_empty() {
            self.running.extend(begun);
            // h2 wakes this task for what they have to say at once.
            self.run(cx);
        }
        Poll::Pending
    }

    fn graceful_shutdown(&mut self) {
        self.connection.as_mut().graceful_shutdown();
    }
}

/// Serves a connection to its end.
pub(super) async fn serve(
    stream: ClientStream,
    answers: Answers,
    client: &ClientConnection,
    drain: &CancellationToken,
) {
    client.socket.gather();
    let mut streams = Box::new(begin(stream, answers));
    drive(&mut *streams, client, drain).await;
}

fn begin(stream: ClientStream, answers: Answers) -> Streams {
    let begun = Begun::default();
    let mut builder = http2::Builder::new(begun.clone());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(250)
        .max_header_list_size(64 << 10)
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(200)
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
        .max_send_buf_size(256 << 10)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    let connection = Box::pin(builder.serve_connection(TokioIo::new(stream), answers));
    Streams { connection, begun, running: FuturesUnordered::new() }
}
