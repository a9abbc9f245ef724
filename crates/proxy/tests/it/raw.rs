//! Requests that no honest client sends. What reaches the instance is recorded byte by byte: a smuggled request would be
//! seen there, whatever the proxy answers.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use orchestra_model::desired::Protocol;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::*;

/// A proxied instance that records what arrives and answers each head with `200`, and its address.
async fn recorded() -> (World, Instance, std::net::SocketAddr, Arc<Mutex<String>>) {
    let world = World::new().await;
    let seen = Arc::new(Mutex::new(String::new()));
    let record = Arc::clone(&seen);
    let instance = Instance::raw(move |mut tcp| {
        let record = Arc::clone(&record);
        async move {
            let mut buffer = [0; 8192];
            while let Ok(count @ 1..) = tcp.read(&mut buffer).await {
                let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                record.lock().unwrap().push_str(&text);
                // One answer for the end of each message, also of one that came in pieces.
                let ends = record.lock().unwrap().ends_with("\r\n\r\n") || !text.contains("HTTP/1.1");
                if ends && tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    (world, instance, address, seen)
}

#[tokio::test]
async fn ambiguous_or_malformed_requests_are_refused_and_reach_nobody() {
    let (_world, _instance, address, seen) = recorded().await;
    let coded = |coding: &str| {
        format!("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: {coding}\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    };
    let cases: &[(&str, &str, &str)] = &[
        ("two lengths", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", "400"),
        ("a list of lengths", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3, 4\r\n\r\nabcd", "400"),
        ("a signed length", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\nabc", "400"),
        ("a folded header", "GET / HTTP/1.1\r\nhost: a\r\nx-a: b\r\n c\r\n\r\n", "400"),
        (
            "a folded transfer-encoding",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
            "400",
        ),
        (
            "an unknown transfer-encoding",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
            "400",
        ),
        ("identity", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: identity\r\n\r\nabc", "400"),
        (
            "chunked, identity",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
            "400",
        ),
        ("chunked in HTTP/1.0", "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", "400"),
        ("a space before the colon", "GET / HTTP/1.1\r\nhost : a\r\n\r\n", "400"),
        ("no host", "GET / HTTP/1.1\r\nx-a: b\r\n\r\n", "400"),
        ("two hosts", "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", "400"),
        ("a host with a space", "GET / HTTP/1.1\r\nhost: a b\r\n\r\n", "400"),
        ("a NUL", "GET / HTTP/1.1\r\nhost: a\r\nx-a: b\0c\r\n\r\n", "400"),
        ("a bare CR", "GET / HTTP/1.1\r\nhost: a\r\nx-a: b\rc: d\r\n\r\n", "400"),
        ("no version", "GET /\r\n\r\n", "400"),
        ("garbage", "\u{1}\u{2}\u{3}\u{4}\r\n\r\n", "400"),
        ("an empty length", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\nabc", "400"),
        ("a length in hexadecimal", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x3\r\n\r\nabc", "400"),
        (
            "a length beyond 64 bits",
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551617\r\n\r\nabc",
            "400",
        ),
        (
            "two transfer codings",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\ntransfer-encoding: x\r\n\r\n0\r\n\r\n",
            "400",
        ),
        ("a name with a space", "GET / HTTP/1.1\r\nhost: a\r\nx y: z\r\n\r\n", "400"),
        ("a name with a NUL", "GET / HTTP/1.1\r\nhost: a\r\nx\0y: z\r\n\r\n", "400"),
        ("an empty name", "GET / HTTP/1.1\r\nhost: a\r\n: z\r\n\r\n", "400"),
        ("a first header that is folded", "GET / HTTP/1.1\r\n host: a\r\n\r\n", "400"),
        ("a target with a space", "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("HTTP/3.0", "GET / HTTP/3.0\r\nhost: a\r\n\r\n", "400"),
        ("the old upgrade to HTTP/2", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", "400"),
        ("an absolute target with a user", "GET http://user@a/ HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("CONNECT", "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", "400"),
        ("a compressed body in chunks", &coded("gzip, chunked"), "400"),
        ("chunked after identity", &coded("identity, chunked"), "400"),
        ("chunked twice", &coded("chunked, chunked"), "400"),
        ("chunked in two lines", &coded("chunked\r\ntransfer-encoding: chunked"), "400"),
        ("nothing, and chunked", &coded(",chunked"), "400"),
        ("a host as the target", "GET example HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("an asterisk where none may be", "GET * HTTP/1.1\r\nhost: a\r\n\r\n", "400"),
        ("a port that is none", "GET / HTTP/1.1\r\nhost: a:99999\r\n\r\n", "400"),
    ];
    for (name, request, status) in cases {
        let answer = raw(address, request.to_string().as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{name}: {answer:?}");
    }
    assert_eq!(*seen.lock().unwrap(), "", "nothing of these may reach an instance");
}

#[tokio::test]
async fn a_length_beside_chunks_counts_for_nothing_and_ends_the_connection() {
    let (_world, instance, address, seen) = recorded().await;
    for request in [
        // The length says that the second request is a body, the chunks say that it is not.
        "POST /one HTTP/1.1\r\nhost: a\r\ncontent-length: 60\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
        "POST /one HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        seen.lock().unwrap().clear();
        let answer = raw(address, request.as_bytes()).await;
        let seen = seen.lock().unwrap().clone();
        assert!(seen.starts_with("POST /one HTTP/1.1\r\n"), "{seen}");
        assert!(seen.contains("transfer-encoding: chunked") && !seen.contains("content-length"), "{seen}");
        assert!(!seen.contains("smuggled") && answer.matches("HTTP/1.1").count() == 1, "{seen}\n{answer}");
    }
    assert!(instance.connections() >= 1);
}

#[tokio::test]
async fn trailers_say_nothing_of_framing_and_end_the_connection() {
    let (_world, _instance, address, seen) = recorded().await;
    // Lines that end with LF alone: hyper takes what follows for trailers, others take it for a request.
    for trailers in ["x-sum: 7\r\nContent-Length: 50\r\nhost: b\r\nforwarded: for=c\r\n\r\n", "x-sum: 7\n\n"] {
        seen.lock().unwrap().clear();
        let request = format!(
            "POST /one HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n{trailers}GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
        );
        let answer = raw(address, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
        let seen = seen.lock().unwrap().clone();
        assert!(seen.ends_with("0\r\nx-sum: 7\r\n\r\n"), "{seen}");
    }
}

#[tokio::test]
async fn a_query_behind_a_host_becomes_one_behind_a_path() {
    let (_world, _instance, address, seen) = recorded().await;
    let answer = raw(address, b"GET http://a?q=1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let seen = seen.lock().unwrap().clone();
    assert!(seen.starts_with("GET /?q=1 HTTP/1.1\r\n"), "{seen}");
}

#[tokio::test]
async fn an_upgrade_to_http2_cannot_hide_behind_another() {
    let (_world, _instance, address, seen) = recorded().await;
    let request = "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, HTTP2-Settings\r\nupgrade: x, h2c\r\nhttp2-settings: AAMAAABkAAQ\r\n\r\n";
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    soon("an answer", tcp.read_exact(&mut answer)).await.unwrap();
    let seen = seen.lock().unwrap().clone();
    assert!(seen.contains("upgrade: x\r\n") && !seen.contains("h2c") && !seen.contains("http2-settings"), "{seen}");
    // An instance that switches to what nobody asked for gets no tunnel.
    let world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        let _ = tcp.read(&mut [0; 4096]).await;
        let _ = tcp.write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n").await;
        let _ = tcp.read(&mut [0; 4096]).await;
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let answer = raw(
        address,
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nGET / HTTP/1.0\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
}

#[tokio::test]
async fn equal_lengths_become_one() {
    let world = World::new().await;
    let instance = Instance::http(crate::protocols::echo).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let request =
        "POST /one HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc";
    let answer = raw(address, request.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("body 3"), "{answer}");
    let (_, seen) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(seen.matches("content-length: 3").count(), 1, "{seen}");
}

#[tokio::test]
async fn chunks_are_taken_at_their_word_or_not_at_all() {
    let world = World::new().await;
    let instance = Instance::http(crate::protocols::echo).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let post = |body: &str| {
        format!("POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{body}")
    };
    let extended = format!("3;x={}\r\nabc\r\n0\r\n\r\n", "y".repeat(100_000));
    for (name, body) in [
        ("no size", "\r\nabc\r\n0\r\n\r\n"),
        ("a size that is none", "3g\r\nabc\r\n0\r\n\r\n"),
        ("a size beyond 64 bits", "10000000000000003\r\nabc\r\n0\r\n\r\n"),
        ("a negative size", "-3\r\nabc\r\n0\r\n\r\n"),
        ("a size that ends with LF alone", "3\nabc\r\n0\r\n\r\n"),
        ("a chunk that does not end", "3\r\nabcGET / HTTP/1.1\r\n\r\n"),
        ("extensions without an end", &extended),
    ] {
        let answer = raw(address, post(body).as_bytes()).await;
        assert!(!answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
    }
    let answer = raw(address, post("3;a=b\r\nabc\r\n0\r\n\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("body 3"), "{answer}");
    assert_eq!(get(address, "/").await.unwrap().status, 200);
}

#[tokio::test]
async fn a_body_without_an_end_is_the_last_of_its_connection() {
    let world = World::new().await;
    let instance = Instance::http(crate::protocols::echo).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    for (framing, body) in [
        ("content-length: 10", "abc"),
        ("transfer-encoding: chunked", "5\r\nabc"),
        ("transfer-encoding: chunked", "3\r\nabcX\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ] {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n{body}").as_bytes()).await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400") && answer.matches("HTTP/1.1").count() == 1, "{body}: {answer}");
        assert!(answer.contains("x-orchestra-error: client\r\n"), "{body}: {answer}");
        assert!(answer.contains("connection: close\r\n"), "{body}: {answer}");
    }
}

#[tokio::test]
async fn the_target_says_for_whom_a_request_is() {
    let world = World::new().await;
    let instance = Instance::http(crate::protocols::echo).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let request = "GET http://meant.example/a HTTP/1.1\r\nhost: other.example\r\nconnection: close\r\n\r\n";
    let answer = raw(address, request.as_bytes()).await;
    assert!(answer.contains("host: meant.example") && !answer.contains("other.example"), "{answer}");
    // Lines may end with LF alone (RFC 9112 2.2); they do not when they go on.
    let answer = raw(address, b"GET /a HTTP/1.1\nhost: a\nconnection: close\n\n").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let long = format!("GET /{} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", "b".repeat(40_000));
    let answer = raw(address, long.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 414") && answer.contains("target_too_long"), "{answer}");
}

#[tokio::test]
async fn who_drips_a_body_is_let_go_and_others_are_served() {
    let world = World::new().await;
    let instance = Instance::http(crate::protocols::echo).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n").await.unwrap();
    let began = std::time::Instant::now();
    let (mut read, mut write) = tcp.split();
    let drip = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(500));
        loop {
            ticks.tick().await;
            if write.write_all(b"x").await.is_err() {
                std::future::pending::<()>().await;
            }
            assert_eq!(get(address, "/").await.unwrap().status, 200);
        }
    };
    let mut answer = Vec::new();
    // Each byte counts: 30 seconds, and one more for each 64 bytes.
    tokio::time::timeout(Duration::from_secs(60), async {
        tokio::select! {
            () = drip => {}
            _ = read.read_to_end(&mut answer) => {}
        }
    })
    .await
    .expect("it is let go");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("client_timeout"), "{answer}");
    assert!(began.elapsed() >= Duration::from_secs(30), "{:?}", began.elapsed());
}

#[tokio::test]
async fn idle_connections_make_room_the_longest_idle_first() {
    // As many connections as 400 descriptors allow: 72.
    let limited = |home: &std::path::Path| {
        let program = env!("CARGO_BIN_EXE_orchestra-proxy");
        let mut options = options(home);
        options.proxy_program = "/bin/sh".into();
        options.proxy_args = ["-c", "ulimit -n 400; exec \"$0\" \"$@\"", program].map(Into::into).to_vec();
        options
    };
    let world = World::with(limited).await;
    let instance = Instance::http(|_| async { text("ok") }).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut idle = Vec::new();
    for _ in 0..60 {
        let mut client = Client::h1(address).await.unwrap();
        assert_eq!(client.get("/").await.unwrap().status, 200);
        idle.push(client);
    }
    // More than there is room for, all of whom are served.
    for _ in 0..60 {
        let mut client = Client::h1(address).await.unwrap();
        assert_eq!(soon("an answer", client.get("/")).await.unwrap().status, 200);
        idle.push(client);
    }
    let mut living = Vec::new();
    for (index, client) in idle.iter_mut().enumerate() {
        if client.get("/").await.is_ok() {
            living.push(index);
        }
    }
    assert!(living.iter().all(|index| *index > 40), "the oldest had to go: {living:?}");
    assert!(living.contains(&119) && living.len() > 40, "no more than necessary: {living:?}");
}

#[tokio::test]
async fn oversized_heads_are_refused() {
    let (_world, _instance, address, seen) = recorded().await;
    let huge = format!("GET / HTTP/1.1\r\nhost: a\r\nx-a: {}\r\n\r\n", "b".repeat(200_000));
    let answer = raw(address, huge.as_bytes()).await;
    // The rest of the head may still be on its way when the answer is sent: a reset may take it away.
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many = "x-a: y\r\n".repeat(500);
    let answer = raw(address, format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let long = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "b".repeat(200_000));
    let answer = raw(address, long.as_bytes()).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    assert_eq!(*seen.lock().unwrap(), "");
}

#[tokio::test]
async fn who_takes_too_long_for_a_head_is_let_go_and_others_are_served() {
    let (_world, _instance, address, _) = recorded().await;
    // A head that comes byte by byte, a connection that says nothing, and one that stops within the HTTP/2 preface.
    let mut slow = TcpStream::connect(address).await.unwrap();
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(b"PRI * HTTP").await.unwrap();
    slow.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n").await.unwrap();
    let began = std::time::Instant::now();
    let drip = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            if slow.write_all(b"x").await.is_err() {
                break;
            }
        }
    };
    let (mut a, mut b) = ([0; 64], [0; 64]);
    let ends = async { tokio::join!(silent.read(&mut a), half.read(&mut b)) };
    let ((), ends) = soon("all three are closed", async { tokio::join!(drip, ends) }).await;
    assert!(matches!(ends.0, Ok(0) | Err(_)) && matches!(ends.1, Ok(0) | Err(_)));
    let took = began.elapsed();
    assert!((Duration::from_secs(9)..Duration::from_secs(25)).contains(&took), "{took:?}");
    assert_eq!(get(address, "/").await.unwrap().status, 200);
}

#[tokio::test]
async fn rapid_resets_end_the_connection_and_not_the_proxy() {
    let (_world, _instance, address, _) = recorded().await;
    // HTTP/2 "rapid reset": open and cancel streams as fast as possible (CVE-2023-44487).
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for stream in (1..20_000_u32).step_by(2) {
        // :method GET, :scheme http, :path /, :authority a
        let head = [0x82, 0x86, 0x84, 0x41, 0x01, b'a'];
        bytes.extend([0, 0, u8::try_from(head.len()).unwrap(), 1, 5]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(head);
        bytes.extend([0, 0, 4, 3, 0]);
        bytes.extend(stream.to_be_bytes());
        bytes.extend(8_u32.to_be_bytes());
    }
    let (mut read, mut write) = tcp.split();
    let mut answer = Vec::new();
    let both = async { tokio::join!(write.write_all(&bytes), read.read_to_end(&mut answer)) };
    let _ = soon("the connection is ended", both).await;
    assert_eq!(get(address, "/").await.unwrap().status, 200);
}
