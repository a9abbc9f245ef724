//! HTTP/2 clients that break the rules, frame by frame (RFC 9113 sections 3 to 6 and 8, after the manner of h2spec).
//!
//! Each case has a connection of its own. Whatever it does, it is told so with the right code or let go, and a client
//! that keeps to the rules is served all the while.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use orchestra_model::desired::Protocol;
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::*;

mod small;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITISED: u8 = 0x20;

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A literal header field, never indexed and without Huffman coding (RFC 7541 6.2.3).
fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let text = |text: &[u8]| {
        assert!(text.len() < 127);
        [&[u8::try_from(text.len()).unwrap()][..], text].concat()
    };
    [&[0x10][..], &text(name), &text(value)].concat()
}

fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    fields.iter().flat_map(|(name, value)| field(name.as_bytes(), value.as_bytes())).collect()
}

const GET: [(&str, &str); 4] = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "a")];
const POST: [(&str, &str); 4] = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a")];

fn with(fields: &[(&'static str, &'static str)], more: &[(&'static str, &'static str)]) -> Vec<u8> {
    block(&[fields, more].concat())
}

/// A whole request without a body.
fn get_on(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &block(&GET))
}

/// The head of a request whose body is still to come.
fn post_on(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &block(&POST))
}

fn setting(id: u16, value: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// What the proxy did in answer.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    GoAway(u32),
    Reset(u32, u32),
    /// First byte of the header block of an answer: an indexed `:status`.
    Answered(u32, u8),
    Closed,
    /// The answer to a PING that was sent behind everything else.
    Alive,
}

struct Peer {
    tcp: TcpStream,
    unread: Vec<u8>,
}

impl Peer {
    /// A connection on which nothing was said.
    async fn silent(address: SocketAddr) -> Self {
        Self { tcp: TcpStream::connect(address).await.unwrap(), unread: Vec::new() }
    }

    /// A connection in good order.
    async fn open(address: SocketAddr) -> Self {
        let mut peer = Self::silent(address).await;
        peer.send(PREFACE).await;
        peer.send(&frame(SETTINGS, 0, 0, &[])).await;
        peer
    }

    async fn send(&mut self, bytes: &[u8]) {
        // It may have been let go already.
        let _ = self.tcp.write_all(bytes).await;
    }

    /// Kind, flags, stream and payload of the next frame.
    async fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        loop {
            if let Some(head) = self.unread.first_chunk::<9>() {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let (kind, flags) = (head[3], head[4]);
                let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7FFF_FFFF;
                if self.unread.len() >= 9 + length {
                    let payload = self.unread[9..9 + length].to_vec();
                    self.unread.drain(..9 + length);
                    return Some((kind, flags, stream, payload));
                }
            }
            if !matches!(self.tcp.read_buf(&mut self.unread).await, Ok(1..)) {
                return None;
            }
        }
    }

    /// Everything that the proxy said, until it is what is wanted or nothing more comes.
    async fn outcomes(&mut self, want: &Want) -> Vec<Outcome> {
        self.send(&frame(PING, 0, 0, b"the-end!")).await;
        let mut all = Vec::new();
        // An answer to a PING overtakes what streams have to say.
        let _ = tokio::time::timeout(Duration::from_secs(3), async {
            while !want.holds(&all) {
                let Some((kind, flags, stream, payload)) = self.next().await else {
                    all.push(Outcome::Closed);
                    return;
                };
                let code = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
                match kind {
                    GOAWAY => all.push(Outcome::GoAway(code(4))),
                    RST_STREAM => all.push(Outcome::Reset(stream, code(0))),
                    HEADERS => all.push(Outcome::Answered(stream, payload[0])),
                    PING if flags & ACK != 0 && payload == b"the-end!" => all.push(Outcome::Alive),
                    _ => {}
                }
            }
        })
        .await;
        all
    }
}

/// What the rules want.
enum Want {
    /// An error of the connection: GOAWAY with one of these, or closed.
    Connection(&'static [u32]),
    /// An error of the stream 1: `RST_STREAM` or GOAWAY with one of these, 400, or closed.
    Stream(&'static [u32]),
    /// No error, and an answer.
    Fine,
    /// So many streams are refused.
    Refused(usize),
}

const STATUS_400: u8 = 0x8c;
const STATUS_200: u8 = 0x88;

impl Want {
    fn holds(&self, outcomes: &[Outcome]) -> bool {
        let answered = outcomes.contains(&Outcome::Answered(1, STATUS_200));
        let gone = |codes: &[u32]| {
            let told = outcomes.iter().find_map(|o| if let Outcome::GoAway(code) = o { Some(*code) } else { None });
            // Where the RFC names a narrower code, h2 mostly gives the general one: what counts is that it ends.
            told.map_or(outcomes == [Outcome::Closed], |code| codes.contains(&code) || code == PROTOCOL_ERROR)
        };
        match self {
            Self::Connection(codes) => gone(codes) && outcomes.last() == Some(&Outcome::Closed),
            Self::Stream(codes) => {
                let reset = codes.iter().any(|code| outcomes.contains(&Outcome::Reset(1, *code)));
                (reset || outcomes.contains(&Outcome::Answered(1, STATUS_400)) || gone(codes)) && !answered
            }
            Self::Refused(count) => {
                outcomes.iter().filter(|o| matches!(o, Outcome::Reset(_, REFUSED_STREAM))).count() >= *count
            }
            Self::Fine => {
                let bad = |o: &Outcome| matches!(o, Outcome::GoAway(_) | Outcome::Reset(..) | Outcome::Closed);
                answered && outcomes.contains(&Outcome::Alive) && !outcomes.iter().any(bad)
            }
        }
    }
}

/// A case: its name, what is sent after the preface and SETTINGS, and what is wanted.
type Case = (&'static str, Vec<u8>, Want);

fn frames() -> Vec<Case> {
    use Want::{Connection, Fine, Stream};
    let one = |first: Vec<u8>, second: Vec<u8>| [first, second].concat();
    vec![
        // 4.1, 5.5: what is not known is ignored.
        ("an unknown kind of frame", one(frame(0x42, 0, 0, b"what"), get_on(1)), Fine),
        ("flags without a meaning", one(frame(PING, 0xF6, 0, &[0; 8]), get_on(1)), Fine),
        ("the reserved bit", one(frame(WINDOW_UPDATE, 0, 0x8000_0000, &1_u32.to_be_bytes()), get_on(1)), Fine),
        ("a setting without a meaning", one(frame(SETTINGS, 0, 0, &setting(0x99, 7)), get_on(1)), Fine),
        // 4.2
        ("a frame that is too long", one(post_on(1), frame(DATA, 0, 1, &[0; 16_385])), Stream(&[FRAME_SIZE_ERROR])),
        ("a long header block in one frame", frame(HEADERS, 5, 1, &[0; 20_000]), Connection(&[FRAME_SIZE_ERROR])),
        // 4.3
        ("an index of nothing", frame(HEADERS, 5, 1, &[0x80]), Connection(&[COMPRESSION_ERROR])),
        ("an index beyond the table", frame(HEADERS, 5, 1, &[0xFF, 0xFF, 0x03]), Connection(&[COMPRESSION_ERROR])),
        (
            "a table that grows too far",
            frame(HEADERS, 5, 1, &[0x3F, 0xE1, 0xFF, 0x03]),
            Connection(&[COMPRESSION_ERROR]),
        ),
        ("half a header block", frame(HEADERS, 5, 1, &[0x10, 0x05, b'a']), Connection(&[COMPRESSION_ERROR])),
        (
            "another stream within a header block",
            one(frame(HEADERS, 1, 1, &block(&GET)), get_on(3)),
            Connection(&[PROTOCOL_ERROR]),
        ),
        (
            "another kind within a header block",
            one(frame(HEADERS, 1, 1, &block(&GET)), frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 1])),
            Connection(&[PROTOCOL_ERROR]),
        ),
        (
            "an unknown kind within a header block",
            one(frame(HEADERS, 1, 1, &block(&GET)), frame(0x42, 0, 1, b"x")),
            Connection(&[PROTOCOL_ERROR]),
        ),
        // 5.1
        ("DATA on a stream that was never opened", frame(DATA, 0, 1, b"x"), Connection(&[PROTOCOL_ERROR])),
        ("RST_STREAM on one", frame(RST_STREAM, 0, 1, &8_u32.to_be_bytes()), Connection(&[PROTOCOL_ERROR])),
        ("WINDOW_UPDATE on one", frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()), Connection(&[PROTOCOL_ERROR])),
        ("CONTINUATION on one", frame(CONTINUATION, 4, 1, &block(&GET)), Connection(&[PROTOCOL_ERROR])),
        (
            "DATA behind the end of a stream",
            one(frame(HEADERS, 5, 1, &with(&GET, &[("x-slow", "1")])), frame(DATA, 0, 1, b"x")),
            Stream(&[STREAM_CLOSED]),
        ),
        (
            "HEADERS behind the end of a stream",
            one(frame(HEADERS, 5, 1, &with(&GET, &[("x-slow", "1")])), get_on(1)),
            Stream(&[STREAM_CLOSED, PROTOCOL_ERROR]),
        ),
        // 5.1.1
        ("an even stream", get_on(2), Connection(&[PROTOCOL_ERROR])),
        (
            "a stream with a number that was passed over",
            one(get_on(5), get_on(3)),
            Connection(&[PROTOCOL_ERROR, STREAM_CLOSED]),
        ),
        // 6.1
        ("DATA on the connection", frame(DATA, 0, 0, b"x"), Connection(&[PROTOCOL_ERROR])),
        (
            "padding longer than its frame",
            one(post_on(1), frame(DATA, PADDED, 1, &[9, 0, 0])),
            Connection(&[PROTOCOL_ERROR]),
        ),
        // 6.2
        ("HEADERS on the connection", get_on(0), Connection(&[PROTOCOL_ERROR])),
        (
            "padding longer than the header block",
            frame(HEADERS, 5 | PADDED, 1, &[&[250][..], &block(&GET)].concat()),
            Connection(&[PROTOCOL_ERROR]),
        ),
        // 6.3
        ("PRIORITY on the connection", frame(PRIORITY, 0, 0, &[0, 0, 0, 1, 1]), Connection(&[PROTOCOL_ERROR])),
        (
            "a PRIORITY of the wrong length",
            one(post_on(1), frame(PRIORITY, 0, 1, &[0; 4])),
            Stream(&[FRAME_SIZE_ERROR]),
        ),
        (
            "a stream that depends on itself",
            frame(HEADERS, 5 | PRIORITISED, 1, &[&[0, 0, 0, 1, 1][..], &block(&GET)].concat()),
            Stream(&[PROTOCOL_ERROR]),
        ),
        // 6.4
        ("RST_STREAM on the connection", frame(RST_STREAM, 0, 0, &8_u32.to_be_bytes()), Connection(&[PROTOCOL_ERROR])),
        (
            "a RST_STREAM of the wrong length",
            one(post_on(1), frame(RST_STREAM, 0, 1, &[0; 3])),
            Connection(&[FRAME_SIZE_ERROR]),
        ),
        // 6.5
        ("an acknowledgement with settings", frame(SETTINGS, ACK, 0, &setting(3, 1)), Connection(&[FRAME_SIZE_ERROR])),
        ("SETTINGS on a stream", frame(SETTINGS, 0, 1, &[]), Connection(&[PROTOCOL_ERROR])),
        ("half a setting", frame(SETTINGS, 0, 0, &[0; 3]), Connection(&[FRAME_SIZE_ERROR])),
        ("ENABLE_PUSH 2", frame(SETTINGS, 0, 0, &setting(2, 2)), Connection(&[PROTOCOL_ERROR])),
        ("a window of 2^31", frame(SETTINGS, 0, 0, &setting(4, 1 << 31)), Connection(&[FLOW_CONTROL_ERROR])),
        ("a frame size of 16383", frame(SETTINGS, 0, 0, &setting(5, 16_383)), Connection(&[PROTOCOL_ERROR])),
        ("a frame size of 2^24", frame(SETTINGS, 0, 0, &setting(5, 1 << 24)), Connection(&[PROTOCOL_ERROR])),
        // 6.6
        (
            "PUSH_PROMISE of a client",
            one(post_on(1), frame(PUSH_PROMISE, 4, 1, &[0, 0, 0, 2])),
            Connection(&[PROTOCOL_ERROR]),
        ),
        // 6.7
        ("PING on a stream", frame(PING, 0, 1, &[0; 8]), Connection(&[PROTOCOL_ERROR])),
        ("a PING of the wrong length", frame(PING, 0, 0, &[0; 7]), Connection(&[FRAME_SIZE_ERROR])),
        // 6.8
        ("GOAWAY on a stream", frame(GOAWAY, 0, 1, &[0; 8]), Connection(&[PROTOCOL_ERROR])),
        // 6.9
        ("a window that grows by nothing", frame(WINDOW_UPDATE, 0, 0, &[0; 4]), Connection(&[PROTOCOL_ERROR])),
        ("the same of a stream", one(post_on(1), frame(WINDOW_UPDATE, 0, 1, &[0; 4])), Stream(&[PROTOCOL_ERROR])),
        ("a WINDOW_UPDATE of the wrong length", frame(WINDOW_UPDATE, 0, 0, &[0; 3]), Connection(&[FRAME_SIZE_ERROR])),
        (
            "a window beyond 2^31",
            frame(WINDOW_UPDATE, 0, 0, &[0x7F, 0xFF, 0xFF, 0xFF]),
            Connection(&[FLOW_CONTROL_ERROR]),
        ),
        (
            "the same of a stream",
            one(post_on(1), frame(WINDOW_UPDATE, 0, 1, &[0x7F, 0xFF, 0xFF, 0xFF])),
            Stream(&[FLOW_CONTROL_ERROR]),
        ),
        // 6.10
        ("CONTINUATION on the connection", frame(CONTINUATION, 4, 0, &block(&GET)), Connection(&[PROTOCOL_ERROR])),
        (
            "CONTINUATION behind the end of the block",
            one(post_on(1), frame(CONTINUATION, 4, 1, &[])),
            Connection(&[PROTOCOL_ERROR]),
        ),
    ]
}

/// Heads that are malformed (8.1.1): an error of the stream, or 400.
fn heads() -> Vec<Case> {
    let head = |name, fields: Vec<u8>| {
        (name, frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields), Want::Stream(&[PROTOCOL_ERROR]))
    };
    let raw = |name: &[u8], value: &[u8]| [block(&GET), field(name, value)].concat();
    let without = |gone: &str| block(&GET.iter().filter(|(name, _)| *name != gone).copied().collect::<Vec<_>>());
    let instead = |name: &str, value: &str| {
        let fields = GET
            .iter()
            .map(|(known, old)| if *known == name { (*known, value.as_bytes()) } else { (*known, old.as_bytes()) });
        fields.flat_map(|(name, value)| field(name.as_bytes(), value)).collect::<Vec<u8>>()
    };
    let trailers = |trailers: &[(&'static str, &'static str)], flags| {
        [post_on(1), frame(DATA, 0, 1, b"x"), frame(HEADERS, END_HEADERS | flags, 1, &block(trailers))].concat()
    };
    let with_body = |length: &'static str, flags: u8| {
        let head = frame(HEADERS, END_HEADERS | flags, 1, &with(&POST, &[("content-length", length)]));
        if flags & END_STREAM != 0 { head } else { [head, frame(DATA, END_STREAM, 1, b"four")].concat() }
    };
    vec![
        head("a name in capitals", raw(b"X-Upper", b"1")),
        head("a name with a space", raw(b"x y", b"1")),
        head("a name with a line end", raw(b"x\r\ny", b"1")),
        head("an empty name", raw(b"", b"1")),
        head("a value with a line end", raw(b"x-a", b"1\r\nx-smuggled: 1")),
        head("a value with a NUL", raw(b"x-a", b"1\0")),
        head("connection", raw(b"connection", b"keep-alive")),
        head("transfer-encoding", raw(b"transfer-encoding", b"chunked")),
        head("upgrade", raw(b"upgrade", b"h2c")),
        head("keep-alive", raw(b"keep-alive", b"1")),
        head("proxy-connection", raw(b"proxy-connection", b"close")),
        head("te with another value", raw(b"te", b"gzip")),
        head("an unknown pseudo-header", raw(b":what", b"1")),
        head("a pseudo-header of responses", raw(b":status", b"200")),
        head("a pseudo-header behind a header", [field(b"x-a", b"1"), block(&GET)].concat()),
        head("two methods", raw(b":method", b"POST")),
        head("two paths", raw(b":path", b"/other")),
        head("two schemes", raw(b":scheme", b"https")),
        head("two authorities", raw(b":authority", b"b")),
        head("no method", without(":method")),
        head("no scheme", without(":scheme")),
        head("no path", without(":path")),
        head("no authority", without(":authority")),
        head("an empty path", instead(":path", "")),
        head("a path with a space", instead(":path", "/a HTTP/1.1")),
        head("a path with a line end", instead(":path", "/ HTTP/1.1\r\nx-smuggled: 1\r\n\r\n")),
        head("a path that is none", instead(":path", "a")),
        head("a method with a space", instead(":method", "GET / HTTP/1.1")),
        head("an authority with a user", instead(":authority", "user@a")),
        head("an authority with a line end", instead(":authority", "a\r\nx-smuggled: 1")),
        head("another host beside the authority", raw(b"host", b"b")),
        head("CONNECT", block(&[(":method", "CONNECT"), (":authority", "a:80")])),
        // h2 takes it out instead of refusing the request; nothing of it reaches anybody.
        ("a pseudo-header in trailers", trailers(&[(":method", "POST")], END_STREAM), Want::Fine),
        ("trailers in the middle", trailers(&[("x-a", "1")], 0), Want::Stream(&[PROTOCOL_ERROR])),
        ("more than the length", with_body("3", 0), Want::Stream(&[PROTOCOL_ERROR])),
        ("less than the length", with_body("5", 0), Want::Stream(&[PROTOCOL_ERROR])),
        ("a length and nothing", with_body("5", END_STREAM), Want::Stream(&[PROTOCOL_ERROR])),
        ("a length that is none", with_body("4, 4", 0), Want::Stream(&[PROTOCOL_ERROR])),
    ]
}

/// A client that keeps to the rules, all the while.
struct Witness {
    stop: Arc<AtomicBool>,
    good: Arc<AtomicU32>,
    bad: Arc<AtomicU32>,
    task: tokio::task::JoinHandle<Option<()>>,
    tree: TaskTree,
}

impl Witness {
    fn start(address: SocketAddr) -> Self {
        let (stop, good, bad) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicU32>::default(), Arc::<AtomicU32>::default());
        let (stopped, right, wrong) = (Arc::clone(&stop), Arc::clone(&good), Arc::clone(&bad));
        let tree = TaskTree::new();
        let task = tree.start(TaskKind::Connection, "witness", async move {
            let (mut h1, mut h2) = (Client::h1(address).await.unwrap(), Client::h2(address).await.unwrap());
            while !stopped.load(Ordering::SeqCst) {
                for reply in [h1.get("/").await, h2.post("/", full("fine")).await] {
                    let good = reply.is_ok_and(|reply| reply.status == 200);
                    if good { &right } else { &wrong }.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        Self { stop, good, bad, task, tree }
    }

    /// Ends it; every one of its requests was answered.
    async fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        soon("the witness", self.task).await.unwrap();
        let (good, bad) = (self.good.load(Ordering::SeqCst), self.bad.load(Ordering::SeqCst));
        assert!(good > 0 && bad == 0, "{good} answers, and {bad} that were none");
        drop(self.tree);
    }
}

/// An instance that says what it got; of requests with `x-slow` only after a while.
async fn instance() -> (Instance, Arc<std::sync::Mutex<Vec<String>>>) {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let record = Arc::clone(&seen);
    let instance = Instance::http(move |request| {
        let record = Arc::clone(&record);
        async move {
            let (parts, body) = request.into_parts();
            if parts.headers.contains_key("x-smuggled") {
                record.lock().unwrap().push(format!("{} {:?}", parts.uri, parts.headers));
            }
            if parts.headers.contains_key("x-slow") {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            let _ = http_body_util::BodyExt::collect(body).await;
            text("ok")
        }
    })
    .await;
    (instance, seen)
}

async fn play(cases: Vec<Case>) {
    let world = World::new().await;
    let (instance, smuggled) = instance().await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let witness = Witness::start(address);
    let mut wrong = Vec::new();
    for (name, bytes, want) in cases {
        let mut peer = Peer::open(address).await;
        peer.send(&bytes).await;
        let outcomes = peer.outcomes(&want).await;
        if !want.holds(&outcomes) {
            wrong.push(format!("{name}: {outcomes:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    witness.end().await;
    assert!(smuggled.lock().unwrap().is_empty(), "{smuggled:?}");
}

#[tokio::test]
async fn broken_frames_are_told_the_right_code_and_disturb_nobody() {
    play(frames()).await;
}

#[tokio::test]
async fn malformed_heads_are_refused_and_reach_nobody() {
    play(heads()).await;
}

#[tokio::test]
async fn who_does_not_begin_as_the_protocol_wants_is_let_go() {
    let world = World::new().await;
    let (instance, _) = instance().await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let witness = Witness::start(address);
    // Another frame before SETTINGS.
    let mut peer = Peer::silent(address).await;
    peer.send(PREFACE).await;
    peer.send(&get_on(1)).await;
    let want = Want::Connection(&[PROTOCOL_ERROR]);
    let outcomes = peer.outcomes(&want).await;
    assert!(want.holds(&outcomes), "{outcomes:?}");
    // Half of a preface and then something else is no HTTP/2.
    let answer = raw(address, b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 505"), "{answer}");
    // More streams at a time than are allowed.
    let mut peer = Peer::open(address).await;
    for stream in (1..=601).step_by(2) {
        peer.send(&frame(HEADERS, END_HEADERS, stream, &block(&POST))).await;
    }
    let outcomes = peer.outcomes(&Want::Refused(301 - 250)).await;
    let refused = outcomes.iter().filter(|o| matches!(o, Outcome::Reset(_, REFUSED_STREAM))).count();
    assert_eq!(refused, 301 - 250, "{outcomes:?}");
    witness.end().await;
}

/// h2spec looks for DATA here, which its own request never gets on a port of protocol `grpc`: what the proxy or a program
/// says of a call that does not exist is a head and nothing more. A response that has DATA shows the same.
#[tokio::test]
async fn a_half_closed_stream_takes_priority_and_windows_on_ports_of_all_protocols() {
    let world = World::new().await;
    let instances = [Instance::http(|_| async { text("ok") }).await, Instance::h2(|_| async { text("ok") }).await];
    for (protocol, instance) in [(Protocol::Http, 0), (Protocol::H2c, 1), (Protocol::Grpc, 1)] {
        let address = world.serve(route("api", protocol, vec![endpoint(1, instances[instance].address)])).await;
        for between in [vec![], frame(PRIORITY, 0, 1, &[0, 0, 0, 0, 255])] {
            let mut peer = Peer::silent(address).await;
            peer.send(PREFACE).await;
            // No window: the response cannot end before there is one.
            peer.send(&frame(SETTINGS, 0, 0, &setting(4, 0))).await;
            peer.send(&get_on(1)).await;
            peer.send(&between).await;
            peer.send(&frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes())).await;
            let mut seen: Vec<(u8, u32, Vec<u8>)> = Vec::new();
            soon("DATA", async {
                while !seen.iter().any(|(kind, ..)| *kind == DATA) {
                    let (kind, _, stream, payload) =
                        peer.next().await.unwrap_or_else(|| panic!("closed after {seen:?}"));
                    seen.push((kind, stream, payload));
                }
            })
            .await;
            assert_eq!(seen.last().unwrap(), &(DATA, 1, b"o".to_vec()), "{protocol:?}: {seen:?}");
            assert!(!seen.iter().any(|(kind, ..)| [GOAWAY, RST_STREAM].contains(kind)), "{protocol:?}: {seen:?}");
        }
    }
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Sends a flood for at most a few seconds, reading what comes back or nothing; returns the code of a GOAWAY.
async fn flood(address: SocketAddr, begin: Vec<u8>, part: impl Fn(u32) -> Vec<u8>, read: bool) -> Option<u32> {
    let mut peer = Peer::open(address).await;
    peer.send(&begin).await;
    let (mut from, mut to) = peer.tcp.split();
    let write = async {
        for turn in 0..200_000 {
            if to.write_all(&part(turn)).await.is_err() {
                return;
            }
        }
    };
    let mut heard = Vec::new();
    let both = async {
        if read {
            tokio::join!(write, from.read_to_end(&mut heard)).1.ok();
        } else {
            write.await;
        }
    };
    // One that does not read is held up, which is as good as an end.
    let _ = tokio::time::timeout(Duration::from_secs(4), both).await;
    let mut rest = &heard[..];
    while rest.len() >= 9 {
        let length = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]) as usize;
        let payload = rest.get(9..9 + length)?;
        if rest[3] == GOAWAY {
            return Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
        rest = &rest[9 + length..];
    }
    None
}

#[tokio::test]
async fn floods_end_their_connection_or_are_held_up_and_cost_little() {
    let world = World::new().await;
    let (instance, _) = instance().await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let pid = world.handle.pid().unwrap();
    get(address, "/").await.unwrap();
    let before = resident(pid);
    let witness = Witness::start(address);
    let cancel = |turn: u32| {
        let stream = turn * 2 + 1;
        [get_on(stream), frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())].concat()
    };
    // CVE-2023-44487.
    assert_eq!(flood(address, Vec::new(), cancel, true).await, Some(ENHANCE_YOUR_CALM), "rapid reset");
    // The same with streams that the proxy itself resets (CVE-2025-8671, "MadeYouReset").
    let provoke = |turn: u32| {
        let stream = turn * 2 + 1;
        frame(HEADERS, END_HEADERS | END_STREAM, stream, &with(&GET, &[("connection", "close")]))
    };
    assert_eq!(flood(address, Vec::new(), provoke, true).await, Some(ENHANCE_YOUR_CALM), "made to reset");
    // CVE-2024-27316: a header block without an end.
    let begin = frame(HEADERS, END_STREAM, 1, &block(&GET));
    let more = |_| frame(CONTINUATION, 0, 1, &field(b"x-a", &[b'y'; 100]).repeat(100));
    let code = flood(address, begin.clone(), more, true).await;
    assert!(matches!(code, Some(ENHANCE_YOUR_CALM | COMPRESSION_ERROR | PROTOCOL_ERROR)), "header block: {code:?}");
    let code = flood(address, begin, |_| frame(CONTINUATION, 0, 1, &[]), true).await;
    assert!(matches!(code, Some(ENHANCE_YOUR_CALM | PROTOCOL_ERROR)), "empty continuations: {code:?}");
    // CVE-2019-9512, 9515, 9518: answers that nobody reads, and frames that say nothing.
    for read in [false, true] {
        flood(address, Vec::new(), |_| frame(PING, 0, 0, &[0; 8]), read).await;
        flood(address, Vec::new(), |_| frame(SETTINGS, 0, 0, &setting(4, 65_535)), read).await;
        flood(address, post_on(1), |_| frame(DATA, 0, 1, &[]), read).await;
    }
    witness.end().await;
    let grown = resident(pid).saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB more");
}

/// The checker, checked.
#[test]
fn outcomes_are_told_apart() {
    let outcomes: HashMap<&str, Vec<Outcome>> = HashMap::from([
        ("gone", vec![Outcome::GoAway(PROTOCOL_ERROR), Outcome::Closed]),
        ("reset", vec![Outcome::Reset(1, PROTOCOL_ERROR), Outcome::Alive]),
        ("served", vec![Outcome::Answered(1, STATUS_200), Outcome::Alive]),
    ]);
    let holds = |want: Want| {
        let mut names: Vec<&str> = outcomes.iter().filter(|(_, o)| want.holds(o)).map(|(name, _)| *name).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(holds(Want::Connection(&[PROTOCOL_ERROR])), ["gone"]);
    assert_eq!(holds(Want::Stream(&[PROTOCOL_ERROR])), ["gone", "reset"]);
    assert_eq!(holds(Want::Fine), ["served"]);
    assert_eq!(holds(Want::Refused(0)), ["gone", "reset", "served"]);
    assert!(holds(Want::Refused(1)).is_empty());
}
