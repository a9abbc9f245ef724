//! A client's HTTP/2 connection with all its streams, in one task.
//!
//! Not through hyper, which wants a task for each request and can send no interim responses. The streams of a connection
//! share its socket and its locks anyhow, so they run within its task: those that are ready have their turn, then what all
//! of them have to say goes out at once. What one of them does to the connection from within the task is no reason to
//! look at the task again: see [`bell`].

use std::{
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt as _};
use h2::{
    Ping, PingPong, Reason,
    server::{Builder, Connection as Http2, Handshake},
};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Answers,
    drive::{Connection, drive},
};
use crate::{exchange::body::ClientConnection, tls::stream::ClientStream};

mod bell;
mod exchange;

use bell::Bell;
use exchange::Exchange;

/// Silence of a client before it is asked whether it is still there …
const ASK_AFTER: Duration = Duration::from_secs(30);
/// … and how long it has to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// What frames of DATA may cost that nobody has taken yet, beyond what they carry: 8,000 small messages, for which there may
/// be no instance at the moment, and as little as that for what a hostile client makes us keep.
const FRAMING: usize = 2 << 20;
/// Turns that streams get before the task lets others have theirs.
const TURNS: u32 = 4;

/// A connection and its streams.
struct Streams {
    stage: Stage,
    answers: Answers,
    running: FuturesUnordered<Exchange>,
    /// Rings when the connection is to be looked at.
    outer: Bell,
    /// Rings when a stream is.
    inner: Bell,
    ending: bool,
}

enum Stage {
    Greeting(Box<Handshake<ClientStream, Bytes>>),
    Open(Box<Open>),
}

struct Open {
    http2: Http2<ClientStream, Bytes>,
    presence: Presence,
}

impl Streams {
    /// Lets the streams have their turn, and the connection after them; ready when it has ended.
    fn turn(&mut self, cx: &mut Context<'_>, of_streams: &Waker) -> Poll<()> {
        let open = match &mut self.stage {
            Stage::Open(open) => open,
            Stage::Greeting(handshake) => {
                let Ok(mut http2) = ready!(Pin::new(&mut **handshake).poll(cx)) else { return Poll::Ready(()) };
                if self.ending {
                    http2.graceful_shutdown();
                }
                let presence = Presence::new(http2.ping_pong().expect("nobody else asks for it"));
                self.stage = Stage::Open(Box::new(Open { http2, presence }));
                return self.turn(cx, of_streams);
            }
        };
        for turn in 0..TURNS {
            self.inner.hush();
            while let Poll::Ready(Some(())) = self.running.poll_next_unpin(&mut Context::from_waker(of_streams)) {}
            if turn > 0 && !self.outer.has_rung() {
                break;
            }
            self.outer.hush();
            let before = self.running.len();
            // Reads what came, and writes what the streams said.
            while let Poll::Ready(accepted) = open.http2.poll_accept(cx) {
                // Whoever is concerned by an error hears of it elsewhere.
                let Some(Ok((request, respond))) = accepted else { return Poll::Ready(()) };
                self.running.push(Exchange::new(&self.answers, request, respond));
            }
            if self.running.len() == before {
                break;
            }
            self.inner.ring();
        }
        if open.presence.poll(cx, &self.answers.client).is_ready() {
            open.http2.abrupt_shutdown(Reason::NO_ERROR);
            self.outer.ring();
        }
        Poll::Pending
    }
}

impl Connection for Streams {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let (of_connection, of_streams) = (self.outer.enter(cx), self.inner.enter(cx));
        let polled = self.turn(&mut Context::from_waker(&of_connection), &of_streams);
        self.outer.leave(cx);
        self.inner.leave(cx);
        polled
    }

    fn graceful_shutdown(&mut self) {
        self.ending = true;
        if let Stage::Open(open) = &mut self.stage {
            open.http2.graceful_shutdown();
        }
    }
}

/// Whether a client that says nothing is still there.
struct Presence {
    pings: PingPong,
    timer: Pin<Box<Sleep>>,
    /// Bytes that had arrived when it was last looked at.
    seen: u64,
    asked: bool,
}

impl Presence {
    fn new(pings: PingPong) -> Self {
        Self { pings, timer: Box::pin(tokio::time::sleep(ASK_AFTER)), seen: 0, asked: false }
    }

    /// Ready when it is not.
    fn poll(&mut self, cx: &mut Context<'_>, client: &ClientConnection) -> Poll<()> {
        if self.asked && self.pings.poll_pong(cx).is_ready() {
            self.asked = false;
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let read = client.socket.read();
            let silent = std::mem::replace(&mut self.seen, read) == read;
            if silent && self.asked {
                return Poll::Ready(());
            }
            // Refused while an answer is awaited.
            self.asked |= silent && self.pings.send_ping(Ping::opaque()).is_ok();
            let wait = if self.asked { ANSWER_WITHIN } else { ASK_AFTER };
            self.timer.as_mut().reset(Instant::now() + wait);
        }
        Poll::Pending
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
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(250)
        .max_header_list_size(64 << 10)
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(Some(200))
        .initial_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
        .data_frame_budget(FRAMING)
        .max_frame_size(16 << 10)
        .max_send_buffer_size(256 << 10);
    let stage = Stage::Greeting(Box::new(builder.handshake(stream)));
    Streams {
        stage,
        answers,
        running: FuturesUnordered::new(),
        outer: Bell::default(),
        inner: Bell::default(),
        ending: false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use orchestra_model::{
        desired::{Drain, Protocol},
        quantity::Timespan,
        route::{Route, RouteId, RouteTable},
        traffic::{PortPolicy, Split},
    };
    use orchestra_task::{TaskKind, TaskTree};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::{super::drive::GOODBYE, *};
    use crate::{
        listen,
        state::{Arrival, Proxy},
        stream::Stream,
        wire::{Snapshot, SocketId, SocketInfo, SocketUse},
    };

    /// Kinds of frames (RFC 9113 6).
    const SETTINGS: u8 = 4;
    const PING: u8 = 6;
    const ACK: u8 = 1;
    /// `GET / HTTP/2` to `a`, whole, on stream 1 (RFC 7541 appendix A).
    const GET: &[u8] = b"\x00\x00\x06\x01\x05\x00\x00\x00\x01\x82\x86\x84\x41\x01a";

    /// A connection to a proxy of whose one route a request waits for as long as can be.
    async fn connected(tree: &TaskTree) -> (Arc<Proxy>, TcpStream) {
        let proxy = Arc::new(Proxy::new(tree.clone()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let route = Route {
            id: RouteId {
                environment: "demo/dev".parse().unwrap(),
                service: "api".parse().unwrap(),
                port: "http".parse().unwrap(),
            },
            listen: address,
            protocol: Protocol::Http,
            hold: Timespan::seconds(1_000_000),
            hold_limit: 10,
            drain: Drain { requests: Timespan::seconds(1), streams: Timespan::seconds(1) },
            policy: PortPolicy::default(),
            split: Split::default(),
            metered: false,
            backends: vec![],
            flags: None,
        };
        let socket =
            SocketInfo { id: SocketId(1), requested: address, address, purpose: SocketUse::Route(route.id.clone()) };
        let table = Some(RouteTable { version: 1, routes: vec![route] });
        proxy.apply(&Snapshot { table, sockets: vec![socket], chosen: vec![] });
        let client = TcpStream::connect(address).await.unwrap();
        let (tcp, peer) = listener.accept().await.unwrap();
        let arrival = Arrival { socket: SocketId(1), peer, local: address, secure: false };
        let serve = listen::serve(Arc::clone(&proxy), arrival, Stream::new(tcp), CancellationToken::new());
        tree.start(TaskKind::Connection, "connection", serve);
        (proxy, client)
    }

    /// The next frame's kind, flags and payload; `None` at the end.
    async fn frame(tcp: &mut TcpStream) -> Option<(u8, u8, Vec<u8>)> {
        let mut head = [0; 9];
        tcp.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        tcp.read_exact(&mut payload).await.ok()?;
        Some((head[3], head[4], payload))
    }

    async fn greet(tcp: &mut TcpStream) {
        let settings = [0, 0, 0, SETTINGS, 0, 0, 0, 0, 0];
        tcp.write_all(&[&listen::PREFACE[..], &settings, GET].concat()).await.unwrap();
    }

    /// A client whose machine was switched off: its connection has no end that anybody could see.
    #[tokio::test(start_paused = true)]
    async fn a_client_that_is_silently_gone_is_asked_and_then_left() {
        let tree = TaskTree::new();
        let (proxy, mut tcp) = connected(&tree).await;
        let begun = Instant::now();
        greet(&mut tcp).await;
        let mut asked = None;
        while let Some((kind, flags, _)) = frame(&mut tcp).await {
            if kind == PING && flags & ACK == 0 {
                assert_eq!(proxy.metrics.holding.load(std::sync::atomic::Ordering::Relaxed), 1, "the request waits");
                assert_eq!(asked.replace(begun.elapsed()), None, "asked once");
            }
        }
        // Silence is noticed at the second look.
        let (asked, gone) = (asked.expect("it was asked"), begun.elapsed());
        assert!(asked >= ASK_AFTER && asked <= 2 * ASK_AFTER + Duration::from_secs(1), "asked after {asked:?}");
        assert!(gone >= asked + ANSWER_WITHIN && gone <= asked + ANSWER_WITHIN + GOODBYE, "gone after {gone:?}");
        assert_eq!(proxy.metrics.holding.load(std::sync::atomic::Ordering::Relaxed), 0, "nobody waits any more");
        tree.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_answers_is_there_however_long_it_waits() {
        let tree = TaskTree::new();
        let (proxy, mut tcp) = connected(&tree).await;
        let begun = Instant::now();
        greet(&mut tcp).await;
        let mut asked = 0;
        while begun.elapsed() < Duration::from_secs(7200) {
            let (kind, flags, payload) = frame(&mut tcp).await.expect("the connection lives");
            if kind == PING && flags & ACK == 0 {
                asked += 1;
                let answer = [&[0, 0, 8, PING, ACK, 0, 0, 0, 0][..], &payload].concat();
                tcp.write_all(&answer).await.unwrap();
            }
        }
        assert!((60..=240).contains(&asked), "asked {asked} times in two hours");
        assert_eq!(proxy.metrics.holding.load(std::sync::atomic::Ordering::Relaxed), 1);
        tree.cancel();
    }
}
