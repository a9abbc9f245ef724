//! A client's HTTP/1 connection, and how it rests.
//!
//! hyper keeps 8 KiB to read into and 8 KiB for the head of a response for as long as it has a connection. So an idle one
//! is taken from it: what rests is a socket, a timer and little more, until the client says something.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::server::conn::http1::{Builder, UpgradeableConnection};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{io::AsyncWriteExt as _, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Answers,
    drive::{Connection, GOODBYE, IDLE_TIMEOUT, drive},
    piece,
};
use crate::{exchange::body::ClientConnection, idle::Awaits, tls::stream::ClientStream};

/// Longest head of a request, and what is read ahead of a body.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 128;

type Http1 = UpgradeableConnection<TokioIo<ClientStream>, Answers>;

impl Connection for Box<Http1> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // Whoever is concerned by an error hears of it elsewhere.
        Pin::new(&mut **self).poll(cx).map(drop)
    }

    fn graceful_shutdown(&mut self) {
        Pin::new(&mut **self).graceful_shutdown();
    }
}

/// Serves a connection to its end.
pub(super) async fn serve(
    mut stream: ClientStream,
    answers: Answers,
    client: &ClientConnection,
    drain: &CancellationToken,
) {
    loop {
        let mut connection = begin(stream, answers.clone());
        let Some(since) = drive(&mut connection, client, drain).await else { return };
        // There are none of one that became another protocol's.
        let Some(parts) = connection.into_parts() else { return };
        stream = parts.io.into_inner();
        let Some(bytes) = rest(&mut stream, parts.read_buf, since, drain).await else {
            // A client that does not take its leave is left.
            let _ = tokio::time::timeout(GOODBYE, stream.shutdown()).await;
            return;
        };
        client.lull.begins(Awaits::Rest, Instant::now());
        stream.rewind(bytes);
    }
}

fn begin(stream: ClientStream, answers: Answers) -> Box<Http1> {
    let mut builder = Builder::new();
    // No header timer of hyper's: see `drive`.
    builder.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    Box::new(builder.serve_connection(TokioIo::new(stream), answers).with_upgrades())
}

/// Waits for the next request, and returns its first bytes; `None` if there will be none. `read` are those that hyper
/// had read already.
async fn rest(stream: &mut ClientStream, read: Bytes, since: Instant, drain: &CancellationToken) -> Option<Bytes> {
    if !read.is_empty() {
        return Some(read);
    }
    drop(read);
    let arrived: io::Result<Bytes> = tokio::select! {
        biased;
        arrived = piece(stream) => arrived,
        () = drain.cancelled() => return None,
        () = tokio::time::sleep_until(since + IDLE_TIMEOUT) => return None,
    };
    arrived.ok().filter(|bytes| !bytes.is_empty())
}
