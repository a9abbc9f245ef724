//! Accepting connections and driving them: which protocol is spoken, how long a client may take, how it is let go.
//!
//! hyper's own header timer also runs while a connection is merely idle, and its protocol detection has no timer at
//! all. So both are done here: the first bytes are read under a deadline, a begun head has [`HEAD_TIMEOUT`] to become
//! whole, and an idle connection is closed in good order after [`IDLE_TIMEOUT`]. One timer per connection is set anew
//! only when it fires or when a shorter deadline begins; an idle connection costs one wake-up in [`IDLE_TIMEOUT`].

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use orchestra_model::desired::Protocol;
use orchestra_task::TaskKind;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    exchange::{self, body::ClientConnection},
    flags,
    state::{Arrival, Proxy},
    stream::Stream,
    tls::{self, stream::ClientStream},
    tunnel,
    upstream::Executor,
    wire::SocketId,
};

/// The first bytes of an HTTP/2 connection (RFC 9113 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Kind of the frame that follows it.
const SETTINGS: u8 = 4;
/// Time for the head of a request, and for the first bytes of a connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between requests of a connection. Longer than that of common clients (90 s in Go and reqwest), so that they close
/// first: a request that crosses our close would be lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Time for an idle connection that was asked to end to do so.
const GOODBYE: Duration = Duration::from_secs(5);
/// Longest head of a request, and what is read ahead of a body.
const MAX_HEAD: usize = 64 << 10;
const MAX_HEADERS: usize = 128;
/// Between two attempts to accept when descriptors or memory are used up.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// How long a new connection waits for a place before idle ones make room.
const CROWDED: Duration = Duration::from_millis(50);
/// Connections that are let go at a time then.
const EVICTED: usize = 16;

/// How a listener is asked to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ending {
    /// Stop accepting.
    pub(crate) stop: CancellationToken,
    /// End connections in good order.
    pub(crate) drain: CancellationToken,
    /// First take in what the kernel has accepted already: nobody else will.
    pub(crate) last: CancellationToken,
}

/// A listener of a route.
pub(crate) struct Listener {
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) socket: SocketId,
    pub(crate) tcp: TcpListener,
    pub(crate) ending: Ending,
    /// Connections of the whole process.
    pub(crate) connections: Arc<Semaphore>,
}

impl Listener {
    /// Accepts until asked to end.
    pub(crate) async fn run(self) {
        loop {
            // A connection that cannot be served stays in the kernel's queue.
            let accept = async {
                let permit = self.permit().await;
                self.tcp.accept().await.map(|(tcp, peer)| (tcp, peer, permit))
            };
            let accepted = tokio::select! {
                biased;
                () = self.ending.stop.cancelled() => break,
                accepted = accept => accepted,
            };
            match accepted {
                Ok((tcp, peer, permit)) => self.take(tcp, peer, Some(permit)),
                Err(error) => self.failed(&error).await,
            }
        }
        if self.ending.last.is_cancelled() {
            // One look without waiting for each that is in the queue.
            while let Poll::Ready(Ok((tcp, peer))) =
                std::future::poll_fn(|cx| Poll::Ready(self.tcp.poll_accept(cx))).await
            {
                self.take(tcp, peer, None);
            }
        }
    }

    /// A place for a connection. If there is none and somebody knocks, connections that are idle longest make room.
    async fn permit(&self) -> OwnedSemaphorePermit {
        loop {
            let permit = Arc::clone(&self.connections).acquire_owned();
            match tokio::time::timeout(CROWDED, permit).await {
                Ok(permit) => return permit.expect("the semaphore is never closed"),
                Err(_crowded) if self.is_knocked_at() => {
                    let evicted = self.proxy.connections.evict(EVICTED);
                    self.proxy.metrics.evicted.fetch_add(evicted as u64, Ordering::Relaxed);
                }
                Err(_quiet) => {}
            }
        }
    }

    /// Whether a connection waits in the kernel's queue.
    fn is_knocked_at(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut queue = [PollFd::new(&self.tcp, PollFlags::IN)];
        let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut queue, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    async fn failed(&self, error: &io::Error) {
        use rustix::io::Errno;
        let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
        if Errno::from_io_error(error).is_some_and(|errno| exhausted.contains(&errno)) {
            tracing::warn!(%error, "cannot accept connections; they wait");
            tokio::time::sleep(EXHAUSTED).await;
        }
        // Everything else concerns the one connection that was to be accepted (accept(2), "Error handling").
    }

    fn take(&self, tcp: tokio::net::TcpStream, peer: std::net::SocketAddr, permit: Option<OwnedSemaphorePermit>) {
        // Fails only for a connection that is gone already.
        let Ok(local) = tcp.local_addr() else { return };
        let _ = tcp.set_nodelay(true);
        let arrival = Arrival { socket: self.socket, peer, local, secure: false };
        let (proxy, drain) = (Arc::clone(&self.proxy), self.ending.drain.clone());
        self.proxy.metrics.accepted.fetch_add(1, Ordering::Relaxed);
        self.proxy.metrics.connections.fetch_add(1, Ordering::Relaxed);
        let open = Open(Arc::clone(&self.proxy), permit);
        self.proxy.tree.start(TaskKind::Connection, "client connection", async move {
            let _open = open;
            serve(proxy, arrival, Stream::new(tcp), drain).await;
        });
    }
}

/// Counts an open connection until dropped.
struct Open(Arc<Proxy>, #[expect(dead_code, reason = "held until dropped")] Option<OwnedSemaphorePermit>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.metrics.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(proxy: Arc<Proxy>, mut arrival: Arrival, stream: Stream, drain: CancellationToken) {
    let (protocol, of_flags, tls) = {
        let table = proxy.table.load();
        let socket = &arrival.socket;
        let protocol = table.routes.get(socket).map(|plan| plan.protocol);
        (protocol, table.flags.contains_key(socket), table.tls.get(socket).cloned())
    };
    let mut stream = match tls {
        None => ClientStream::Plain(stream),
        Some(tls) => {
            arrival.secure = true;
            // In a box of its own: a connection lives longer than its handshake.
            match Box::pin(tls::handshake::accept(&proxy, &tls, stream, &drain)).await {
                Some(stream) => stream,
                None => return,
            }
        }
    };
    if protocol == Some(Protocol::Tcp) {
        return tunnel::tcp(&proxy, &arrival, stream).await;
    }
    let begun = tokio::select! {
        begun = tokio::time::timeout(HEAD_TIMEOUT, first_bytes(&mut stream)) => begun,
        // Nothing was asked on it yet.
        () = drain.cancelled() => return,
    };
    let Ok(Ok((h2, prefix))) = begun else { return };
    if prefix.is_empty() {
        return;
    }
    let h2 = stream.agreed_on_h2().unwrap_or(h2);
    stream.rewind(prefix);
    let socket = Arc::clone(stream.socket());
    let client = Arc::new(ClientConnection::new(socket, !h2));
    let _among = proxy.connections.enter(&client);
    let service = service_fn({
        let (proxy, client) = (Arc::clone(&proxy), Arc::clone(&client));
        move |request: hyper::Request<Incoming>| {
            let (proxy, client) = (Arc::clone(&proxy), Arc::clone(&client));
            // In its place for good: hyper and the runtime move what they are given several times, and this is thousands
            // of bytes long.
            Box::pin(async move {
                Ok::<_, Infallible>(if of_flags {
                    flags::answer(&proxy, &arrival, &client, request).await
                } else {
                    exchange::answer(&proxy, &arrival, &client, request).await
                })
            })
        }
    });
    let io = TokioIo::new(stream);
    if h2 {
        client.socket.gather();
        let mut builder = http2::Builder::new(Executor(proxy.tree.clone()));
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
        let connection = builder.serve_connection(io, service);
        drive(connection, &client, &drain, http2::Connection::graceful_shutdown).await;
    } else {
        let mut builder = http1::Builder::new();
        // No header timer of hyper's: see above.
        builder.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
        let connection = builder.serve_connection(io, service).with_upgrades();
        drive(connection, &client, &drain, http1::UpgradeableConnection::graceful_shutdown).await;
    }
}

/// Reads until it is clear whether the client speaks HTTP/2. Nothing at all means that it left.
async fn first_bytes(stream: &mut ClientStream) -> io::Result<(bool, Bytes)> {
    let mut bytes = BytesMut::with_capacity(1024);
    loop {
        if stream.read_buf(&mut bytes).await? == 0 {
            // What came is no request, but hyper knows how to say so.
            return Ok((false, bytes.freeze()));
        }
        let length = bytes.len().min(PREFACE.len());
        if bytes[..length] != PREFACE[..length] {
            return Ok((false, bytes.freeze()));
        }
        // The preface ends with SETTINGS (RFC 9113 3.4), which h2 does not insist on: its kind is the fourth byte of the
        // frame's head, behind its length.
        if let Some(first) = bytes.get(PREFACE.len()..PREFACE.len() + 4) {
            return match first[3] {
                SETTINGS => Ok((true, bytes.freeze())),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the client's preface is not whole")),
            };
        }
    }
}

/// What a connection is doing, as far as its deadline goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A request is being answered: no deadline.
    Busy,
    /// Nothing is asked.
    Idle,
    /// A head has begun.
    Head,
    /// It was asked to end and has nothing more to do.
    Goodbye,
}

impl Phase {
    fn allowance(self) -> Option<Duration> {
        match self {
            Self::Busy => None,
            Self::Idle => Some(IDLE_TIMEOUT),
            Self::Head => Some(HEAD_TIMEOUT),
            Self::Goodbye => Some(GOODBYE),
        }
    }
}

/// Runs a connection to its end.
async fn drive<C: Future>(
    connection: C,
    client: &ClientConnection,
    drain: &CancellationToken,
    graceful_shutdown: impl Fn(Pin<&mut C>),
) {
    let mut connection = pin!(connection);
    let mut draining = pin!(drain.cancelled());
    let mut asked_to_end = false;
    let mut phase = Phase::Head;
    let mut since = Instant::now();
    let mut timer = pin!(tokio::time::sleep_until(since + HEAD_TIMEOUT));
    let mut stood_back = false;
    std::future::poll_fn(|cx| {
        // Many requests of one HTTP/2 connection are answered at about the same time. Those that are ready to go on do so
        // first, so that one write carries what all of them have to say and not one each.
        stood_back = !stood_back && !client.h1 && client.active.load(Ordering::Relaxed) > 1;
        if stood_back {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            if matches!(client.socket.poll_push(cx), Poll::Ready(Err(_))) {
                // Nobody is there any more.
                return Poll::Ready(());
            }
            if !asked_to_end && draining.as_mut().poll(cx).is_ready() {
                asked_to_end = true;
                graceful_shutdown(connection.as_mut());
                continue;
            }
            let now_in = if client.active.load(Ordering::Acquire) > 0 {
                Phase::Busy
            } else if asked_to_end {
                Phase::Goodbye
            } else if client.h1 && client.socket.read() > client.seen.load(Ordering::Relaxed) {
                Phase::Head
            } else {
                Phase::Idle
            };
            if now_in != phase {
                // A head that begins where one is awaited keeps the deadline of the first byte.
                phase = now_in;
                since = Instant::now();
                client.rests((phase == Phase::Idle).then_some(since));
            }
            if phase == Phase::Idle {
                client.socket.rest();
            }
            let Some(allowance) = phase.allowance() else { return Poll::Pending };
            let deadline = since + allowance;
            if timer.deadline() > deadline || timer.is_elapsed() {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if Instant::now() < deadline {
                continue;
            }
            if phase == Phase::Idle {
                asked_to_end = true;
                graceful_shutdown(connection.as_mut());
                continue;
            }
            // A head that does not come, or a client that does not take its leave.
            return Poll::Ready(());
        }
    })
    .await;
}
