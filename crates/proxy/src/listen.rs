//! Accepting connections and driving them: which protocol is spoken, how long a client may take, how it is let go.
//!
//! hyper's own header timer also runs while a connection is merely idle, and its protocol detection has no timer at
//! all. So both are done here: the first bytes are read under a deadline ([`serve`]), and `drive` watches over what
//! follows. `http1` and `http2` each know one protocol; what they keep is in boxes of their own, since most connections
//! are idle most of the time and should cost only what they are.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use orchestra_model::desired::Protocol;
use orchestra_task::TaskKind;
use tokio::{
    io::{AsyncRead as _, ReadBuf},
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    exchange::{
        self,
        body::{ClientConnection, ResponseBody},
        source::Source,
    },
    flags,
    idle::{Awaits, Lull},
    state::{Arrival, Proxy},
    stream::Stream,
    tls::{self, stream::ClientStream},
    tunnel,
    wire::SocketId,
};

mod drive;
mod http1;
mod http2;

/// The first bytes of an HTTP/2 connection (RFC 9113 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Kind of the frame that follows it.
const SETTINGS: u8 = 4;
/// Time for the head of a request, and for the first bytes of a connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes that are taken at a time from a connection that nobody reads yet.
const PIECE: usize = 4 << 10;
/// Between two attempts to accept when descriptors or memory are used up.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// How long a new connection waits for a place before others make room.
const CROWDED: Duration = Duration::from_millis(50);
/// Idle connections that are let go at a time then.
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

    /// A place for a connection. If there is none and somebody knocks, connections that wait for their clients make room.
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
        // In a box: starting a task takes room for its future twice.
        let serve = Box::pin(async move {
            let _open = open;
            serve(proxy, arrival, Stream::new(tcp), drain).await;
        });
        self.proxy.tree.start(TaskKind::Connection, "client connection", serve);
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
    let lull = Arc::new(Lull::default());
    lull.begins(Awaits::Rest, Instant::now());
    let among = proxy.connections.enter(stream.socket(), &lull);
    let mut stream = match tls {
        None => ClientStream::Plain(stream),
        Some(tls) => {
            arrival.secure = true;
            // In a box of its own: a connection lives longer than its handshake.
            match Box::pin(tls::handshake::accept(&proxy, &tls, stream, &lull, &drain)).await {
                Some(stream) => stream,
                None => return,
            }
        }
    };
    if protocol == Some(Protocol::Tcp) {
        drop(among);
        return Box::pin(tunnel::tcp(&proxy, &arrival, stream)).await;
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
    let client = Arc::new(ClientConnection::new(Arc::clone(stream.socket()), lull, !h2));
    let answers = Answers { proxy: Arc::clone(&proxy), client: Arc::clone(&client), arrival, of_flags };
    if h2 {
        http2::serve(stream, answers, &client, &drain).await;
    } else {
        http1::serve(stream, answers, &client, &drain).await;
    }
}

/// A response in the making. In its place for good: hyper and the runtime move what they are given several times, and
/// this is thousands of bytes long.
type Answer = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Infallible>> + Send>>;

/// Answers the requests of a connection.
#[derive(Clone)]
struct Answers {
    proxy: Arc<Proxy>,
    client: Arc<ClientConnection>,
    arrival: Arrival,
    of_flags: bool,
}

impl Answers {
    /// Answers a request, of `stream` if the connection has several.
    fn answer(&self, request: Request<Source>, stream: u32) -> Answer {
        let Self { proxy, client, arrival, of_flags } = self.clone();
        // Two kinds, so that the longer one is no burden on the other.
        if of_flags {
            Box::pin(async move { Ok(flags::answer(&proxy, &arrival, &client, request).await) })
        } else {
            Box::pin(async move { Ok(exchange::answer(&proxy, &arrival, &client, stream, request).await) })
        }
    }
}

impl hyper::service::Service<Request<Incoming>> for Answers {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = Answer;

    fn call(&self, request: Request<Incoming>) -> Answer {
        self.answer(Source::h1(request), 0)
    }
}

/// What arrives next; nothing at the end. Holds no buffer while it waits.
async fn piece(stream: &mut ClientStream) -> io::Result<Bytes> {
    poll_fn(|cx| {
        let mut room = [std::mem::MaybeUninit::uninit(); PIECE];
        let mut piece = ReadBuf::uninit(&mut room);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut piece))?;
        Poll::Ready(Ok(Bytes::copy_from_slice(piece.filled())))
    })
    .await
}

/// Reads until it is clear whether the client speaks HTTP/2. Nothing at all means that it left.
async fn first_bytes(stream: &mut ClientStream) -> io::Result<(bool, Bytes)> {
    let mut bytes = piece(stream).await?;
    loop {
        let length = bytes.len().min(PREFACE.len());
        if bytes[..length] != PREFACE[..length] {
            return Ok((false, bytes));
        }
        // The preface ends with SETTINGS (RFC 9113 3.4), which h2 does not insist on: its kind is the fourth byte of the
        // frame's head, behind its length.
        if let Some(first) = bytes.get(PREFACE.len()..PREFACE.len() + 4) {
            return match first[3] {
                SETTINGS => Ok((true, bytes)),
                _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the client's preface is not whole")),
            };
        }
        let more = piece(stream).await?;
        if more.is_empty() {
            // What came is no request, but hyper knows how to say so.
            return Ok((false, bytes));
        }
        bytes = [bytes, more].concat().into();
    }
}

#[cfg(test)]
mod tests;
