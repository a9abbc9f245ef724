//! HTTP and TCP checks: answers of every framing, refusals, and peers that mean harm.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use orchestra_probe::{HttpCheck, Leaf};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::world::{Server, ask, ask_within};

fn get(address: SocketAddr) -> HttpCheck {
    HttpCheck {
        address,
        method: "GET".to_owned(),
        path: "/ready".to_owned(),
        headers: BTreeMap::new(),
        body: None,
        status: BTreeSet::new(),
        contains: None,
    }
}

/// Reads a request head, and its body if it has a length.
async fn request(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap_or("0");
            if body.len() >= length.parse().unwrap() {
                return text;
            }
        }
        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return text;
        }
    }
}

/// A server that reads a request, writes these bytes, and closes.
async fn answering(answer: impl Into<Vec<u8>>) -> Server {
    let answer: Arc<[u8]> = answer.into().into();
    Server::start(move |mut stream| {
        let answer = answer.clone();
        async move {
            request(&mut stream).await;
            let _ = stream.write_all(&answer).await;
        }
    })
    .await
}

async fn detail(answer: impl Into<Vec<u8>>) -> (bool, String) {
    let server = answering(answer).await;
    let outcome = ask(Leaf::Http(get(server.address))).await;
    (outcome.passed, outcome.detail)
}

async fn containing(answer: impl Into<Vec<u8>>, text: &str) -> (bool, String) {
    let server = answering(answer).await;
    let outcome = ask(Leaf::Http(HttpCheck { contains: Some(text.to_owned()), ..get(server.address) })).await;
    (outcome.passed, outcome.detail)
}

fn passed(detail: &str) -> (bool, String) {
    (true, detail.to_owned())
}

fn failed(detail: &str) -> (bool, String) {
    (false, detail.to_owned())
}

#[tokio::test]
async fn statuses() {
    for (status, ok) in [(200, true), (204, true), (302, true), (399, true), (400, false), (503, false), (101, false)] {
        let (passed, text) = detail(format!("HTTP/1.1 {status} Whatever\r\nContent-Length: 0\r\n\r\n")).await;
        assert_eq!((passed, text), (ok, format!("HTTP {status}")));
    }
    let server = answering("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n").await;
    let check = HttpCheck { status: BTreeSet::from([429, 503]), ..get(server.address) };
    assert!(ask(Leaf::Http(check)).await.passed, "the accepted statuses replace the usual ones");
}

#[tokio::test]
async fn the_request_is_what_was_asked_for() {
    let seen = Arc::new(Mutex::new(String::new()));
    let writer = seen.clone();
    let server = Server::start(move |mut stream| {
        let writer = writer.clone();
        async move {
            let text = request(&mut stream).await;
            *writer.lock().unwrap() = text;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
        }
    })
    .await;
    let check = HttpCheck {
        method: "POST".to_owned(),
        path: "/v1/complete?a=b".to_owned(),
        headers: BTreeMap::from([
            ("content-type".to_owned(), "application/json".to_owned()),
            ("host".to_owned(), "model.internal".to_owned()),
            ("Transfer-Encoding".to_owned(), "chunked".to_owned()),
        ]),
        body: Some("{\"n\":1}".to_owned()),
        ..get(server.address)
    };
    assert!(ask(Leaf::Http(check)).await.passed);
    let text = seen.lock().unwrap().clone();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut lines: Vec<_> = head.lines().collect();
    assert_eq!(lines.remove(0), "POST /v1/complete?a=b HTTP/1.1");
    lines.sort_unstable();
    let agent = format!("User-Agent: orchestra-probe/{}", env!("CARGO_PKG_VERSION"));
    let wanted = [
        "Accept: */*",
        "Connection: close",
        "Content-Length: 7",
        &agent,
        "content-type: application/json",
        "host: model.internal",
    ];
    assert_eq!(lines, wanted);
    assert_eq!(body, "{\"n\":1}");
}

#[tokio::test]
async fn a_request_that_would_be_two_is_never_sent() {
    let address = "127.0.0.1:9".parse().unwrap();
    for check in [
        HttpCheck { path: "/a HTTP/1.1\r\nX: y".to_owned(), ..get(address) },
        HttpCheck { path: "ready".to_owned(), ..get(address) },
        HttpCheck { method: "GE T".to_owned(), ..get(address) },
        HttpCheck { headers: BTreeMap::from([("a".to_owned(), "b\r\nc: d".to_owned())]), ..get(address) },
        HttpCheck { headers: BTreeMap::from([("a:".to_owned(), "b".to_owned())]), ..get(address) },
    ] {
        let outcome = ask(Leaf::Http(check)).await;
        assert!(!outcome.passed && outcome.detail.starts_with("invalid "), "{}", outcome.detail);
    }
}

#[tokio::test]
async fn bodies_of_every_framing() {
    let missing = "HTTP 200, but the answer does not contain \"needle\"";
    let length = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n..needle..";
    assert_eq!(containing(length, "needle").await, passed("HTTP 200"));
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n..needle..";
    assert_eq!(containing(cut, "needle").await, failed(missing), "what follows the body is not the body");
    let chunked =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5;x=y\r\n..nee\r\n5\r\ndle..\r\n0\r\nA: b\r\n\r\n";
    assert_eq!(containing(chunked, "needle").await, passed("HTTP 200"), "across two chunks");
    let both = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nneedle\r\n0\r\n\r\n";
    assert_eq!(containing(both, "needle").await, passed("HTTP 200"), "chunked wins over a length");
    let close = "HTTP/1.0 200 OK\r\n\r\n..needle..";
    assert_eq!(containing(close, "needle").await, passed("HTTP 200"), "until the end of the connection");
    assert_eq!(containing(close, "nail").await.1, missing.replace("needle", "nail"));
    let bare = "HTTP/1.1 200\nContent-Length: 6\n\nneedle";
    assert_eq!(containing(bare, "needle").await, passed("HTTP 200"), "line feeds without carriage returns");
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nneedle";
    assert_eq!(containing(interim, "needle").await, passed("HTTP 200"));
    assert!(!containing("HTTP/1.1 204 No\r\nContent-Length: 6\r\n\r\nneedle", "needle").await.0);
}

#[tokio::test]
async fn head_has_no_body_and_the_connection_may_stay_open() {
    let server = Server::start(|mut stream| async move {
        request(&mut stream).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n").await;
        // Until the prober closes.
        let _ = stream.read(&mut [0]).await;
    })
    .await;
    let outcome = ask(Leaf::Http(HttpCheck { method: "HEAD".to_owned(), ..get(server.address) })).await;
    assert_eq!((outcome.passed, outcome.detail), passed("HTTP 200"));
}

#[tokio::test]
async fn truncated_and_malformed_answers() {
    let early = failed("the answer ended early");
    assert_eq!(detail("").await, failed("connection closed without an answer"));
    assert_eq!(detail("HTTP/1.1 20").await, early);
    assert_eq!(detail("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort").await, early);
    assert_eq!(detail("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab").await, early);
    assert_eq!(detail("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await, early);
    for chunk in ["zz\r\n", "-1\r\n", "\r\n", "11111111111111111\r\n", "2\r\nabc\r\n0\r\n\r\n", &"1".repeat(300)] {
        let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}");
        assert_eq!(detail(answer).await, failed("malformed chunk"), "{chunk:?}");
    }
    for head in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
        "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        "HTTP/1.1 099 Low\r\n\r\n",
    ] {
        let (ok, text) = detail(head).await;
        assert!(!ok && text.starts_with("malformed answer: "), "{head:?}: {text}");
    }
    for garbage in ["SSH-2.0-OpenSSH_9.2\r\n", "\0\x01\x02\x1b[2J", "HTTP/2 200\r\n\r\n", "HTTP/1.1 2xx\r\n\r\n"] {
        let (ok, text) = detail(garbage).await;
        assert!(!ok && text.starts_with("not an HTTP/1 answer: "), "{garbage:?}: {text}");
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }
}

#[tokio::test]
async fn a_peer_of_another_protocol_is_told_before_it_ends_its_line() {
    let server = Server::start(|mut stream| async move {
        let _ = stream.write_all(b"SSH-2.0").await;
        let _ = stream.read_to_end(&mut Vec::new()).await;
    })
    .await;
    let outcome = ask(Leaf::Http(get(server.address))).await;
    assert_eq!((outcome.passed, outcome.detail), failed("not an HTTP/1 answer: SSH-2.0"));
}

#[tokio::test]
async fn endless_heads_and_bodies_are_cut_off() {
    async fn endless(first: &'static [u8], then: &'static [u8], contains: Option<&str>) -> (bool, String) {
        let server = Server::start(move |mut stream| async move {
            request(&mut stream).await;
            let _ = stream.write_all(first).await;
            // Ends by the prober closing: a prober that reads on makes the test time out.
            while stream.write_all(then).await.is_ok() {}
        })
        .await;
        let check = HttpCheck { contains: contains.map(str::to_owned), ..get(server.address) };
        let outcome = ask(Leaf::Http(check)).await;
        (outcome.passed, outcome.detail)
    }
    let long = failed("the head of the answer is longer than 16 KiB");
    assert_eq!(endless(b"HTTP/1.1 200 OK\r\n", b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n", None).await, long);
    assert_eq!(endless(b"HTTP/1.1 200 OK\r\nX: ", b"yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy", None).await, long);
    assert_eq!(endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", None).await, long, "endless interim answers");
    let body = [b'x'; 1_024];
    let body: &'static [u8] = Box::leak(Box::new(body));
    assert_eq!(endless(b"HTTP/1.1 200 OK\r\n\r\n", body, None).await, passed("HTTP 200"));
    assert!(!endless(b"HTTP/1.1 200 OK\r\n\r\n", body, Some("needle")).await.0);
    let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(endless(chunked, b"1\r\nx\r\n", None).await, passed("HTTP 200"));
    let padded = b"1;xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\nx\r\n";
    assert_eq!(endless(chunked, padded, None).await, failed("malformed chunk"), "mostly framing");
    let (ok, text) = endless(b"HTTP/1.1 500 No\r\n\r\n", body, None).await;
    assert_eq!((ok, text), failed("HTTP 500"), "a bad status needs no body");
}

#[tokio::test]
async fn the_first_64_kib_are_searched_and_no_more() {
    async fn at(position: usize) -> bool {
        let mut answer = b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n".to_vec();
        let start = answer.len();
        answer.resize(start + 200_000, b'.');
        (&mut answer[start + position..]).write_all(b"needle").unwrap();
        containing(answer, "needle").await.0
    }
    assert!(at(65_536 - 6).await);
    assert!(!at(65_536 - 5).await);
}

/// A server that sends these bytes again and again, each after a pause.
async fn drip(bytes: &'static [u8]) -> Server {
    Server::start(move |mut stream| async move {
        for byte in bytes.iter().cycle() {
            if stream.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
}

#[tokio::test]
async fn silence_and_slow_drips_end_at_the_timeout() {
    let short = Duration::from_millis(300);
    // A full accept queue: nobody accepts, so that the connection is made and never answered.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let outcome = ask_within(Leaf::Http(get(silent.local_addr().unwrap())), short).await;
    assert_eq!(outcome.detail, "timeout after 300ms while waiting for the answer");
    assert!(outcome.took >= short && outcome.took < Duration::from_secs(5), "{:?}", outcome.took);

    let server =
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nX-Padding: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\r\n").await;
    let outcome = ask_within(Leaf::Http(get(server.address)), short).await;
    assert_eq!((outcome.passed, outcome.detail), failed("timeout after 300ms while waiting for the answer"));
    let server =
        drip(b"HTTP/1.1 200 OK\r\n\r\nxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx").await;
    let outcome = ask_within(Leaf::Http(get(server.address)), Duration::from_millis(700)).await;
    assert_eq!((outcome.passed, outcome.detail), failed("timeout after 700ms while reading the answer's body"));
}

#[tokio::test]
async fn refusals() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for leaf in [Leaf::Http(get(closed)), Leaf::Tcp { address: closed }] {
        let outcome = ask(leaf).await;
        assert_eq!((outcome.passed, outcome.detail), failed("connection refused"));
    }
    let resetting = Server::start(|stream| async move {
        stream.set_zero_linger().unwrap();
    })
    .await;
    let outcome = ask(Leaf::Http(get(resetting.address))).await;
    assert!(!outcome.passed && outcome.detail.starts_with("connection "), "{}", outcome.detail);
}

#[tokio::test]
async fn tcp_passes_when_accepted() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let outcome = ask(Leaf::Tcp { address }).await;
    assert_eq!((outcome.passed, outcome.detail), passed("connected"));
    let (mut stream, _) = listener.accept().await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "closed in the ordinary way, not reset");
}
