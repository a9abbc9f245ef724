//! Interim responses of instances, and what they must not do to the responses behind them.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use orchestra_model::desired::Protocol;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Semaphore,
};

use crate::harness::*;

const HINTS: &str = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nconnection: x-hop\r\nx-hop: 1\r\n\r\n";

/// An instance that says `interim` for each request, and the rest of its response for each permit.
async fn hinting(interim: String) -> (World, Instance, SocketAddr, Arc<Semaphore>) {
    let world = World::new().await;
    let go = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&go);
    let instance = Instance::raw(move |mut tcp| {
        let (gate, interim) = (Arc::clone(&gate), interim.clone());
        async move {
            let (mut buffer, mut seen) = ([0; 8192], String::new());
            while let Ok(count @ 1..) = tcp.read(&mut buffer).await {
                seen.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
                while let Some(end) = seen.find("\r\n\r\n") {
                    seen.drain(..end + 4);
                    tcp.write_all(interim.as_bytes()).await.unwrap();
                    let permit = gate.acquire().await.unwrap();
                    permit.forget();
                    let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                }
            }
        }
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    (world, instance, address, go)
}

/// Reads until what came ends with `end`.
async fn read_to(tcp: &mut TcpStream, seen: &mut String, end: &str) {
    soon(end, async {
        while !seen.ends_with(end) {
            let mut buffer = [0; 1024];
            let count = tcp.read(&mut buffer).await.unwrap();
            assert!(count > 0, "it ended after {seen:?}");
            seen.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
        }
    })
    .await;
}

#[tokio::test]
async fn hints_reach_a_client_of_http_1_before_the_response() {
    let (_world, _instance, address, go) = hinting(format!("HTTP/1.1 100 Continue\r\n\r\n{HINTS}{HINTS}")).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n";
    for _ in 0..3 {
        let request = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
        let mut seen = String::new();
        tcp.write_all(request.as_bytes()).await.unwrap();
        read_to(&mut tcp, &mut seen, &hints.repeat(2)).await;
        assert_eq!(seen, hints.repeat(2), "what the proxy did not ask for is not passed on, the rest is");
        go.add_permits(1);
        read_to(&mut tcp, &mut seen, "\r\n\r\nok").await;
        assert!(seen[hints.len() * 2..].starts_with("HTTP/1.1 200 OK\r\n"), "{seen}");
    }
}

#[tokio::test]
async fn a_client_of_http_1_0_hears_the_response_alone() {
    let (_world, _instance, address, go) = hinting(HINTS.to_owned()).await;
    go.add_permits(1);
    let answer = raw(address, b"GET / HTTP/1.0\r\nhost: a\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("ok"), "{answer}");
    assert!(!answer.contains("103"), "{answer}");
}

/// Law: however responses and hints meet, and however slowly they are read, each is whole and they come in order.
#[tokio::test]
async fn hints_never_cut_a_response_in_two() {
    const REQUESTS: usize = 40;
    const SIZE: usize = 300_000;
    let world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        let (mut buffer, mut seen) = ([0; 8192], String::new());
        let whole = format!("{HINTS}HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n{}", "x".repeat(SIZE));
        while let Ok(count @ 1..) = tcp.read(&mut buffer).await {
            seen.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
            while let Some(end) = seen.find("\r\n\r\n") {
                seen.drain(..end + 4);
                if tcp.write_all(whole.as_bytes()).await.is_err() {
                    return;
                }
            }
        }
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    // All at once: the hints of one come while the client has not read the response before it.
    let last = "GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let all = format!("{}{last}", "GET / HTTP/1.1\r\nhost: a\r\n\r\n".repeat(REQUESTS - 1));
    tcp.write_all(all.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon("all responses", tcp.read_to_end(&mut answer)).await.unwrap();
    let mut rest = std::str::from_utf8(&answer).unwrap();
    for number in 0..REQUESTS {
        let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n";
        rest = rest.strip_prefix(hints).unwrap_or_else(|| panic!("{number}: {:?}", &rest[..100.min(rest.len())]));
        let (head, body) = rest.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("content-length: 300000"), "{head}");
        assert!(body.len() >= SIZE && body.as_bytes()[..SIZE].iter().all(|byte| *byte == b'x'), "{number}");
        rest = &body[SIZE..];
    }
    assert_eq!(rest, "");
}

#[tokio::test]
async fn hints_reach_a_client_of_http_2_before_the_response() {
    let (_world, _instance, address, go) = hinting(HINTS.to_owned()).await;
    let tcp = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = soon("a handshake", h2::client::handshake(tcp)).await.unwrap();
    let world = orchestra_task::TaskTree::new();
    world.start(orchestra_task::TaskKind::Connection, "client", async move {
        let _ = connection.await;
    });
    for _ in 0..3 {
        let request = http::Request::get("http://test.example/").body(()).unwrap();
        let (mut response, _) = sender.send_request(request, true).unwrap();
        let hints = soon("hints", std::future::poll_fn(|cx| response.poll_informational(cx))).await.unwrap().unwrap();
        assert_eq!(hints.status(), 103);
        assert_eq!(hints.headers()["link"], "</a.css>; rel=preload");
        assert!(!hints.headers().contains_key("x-hop") && !hints.headers().contains_key("connection"));
        go.add_permits(1);
        let response = soon("the response", response).await.unwrap();
        assert_eq!(response.status(), 200);
        let mut body = response.into_body();
        assert_eq!(soon("the body", body.data()).await.unwrap().unwrap(), "ok");
    }
}

/// An instance that speaks HTTP/2: says a hint of each kind, and the rest of its response for each permit.
async fn hinting_in_http_2() -> (World, Instance, SocketAddr, Arc<Semaphore>) {
    let world = World::new().await;
    let go = Arc::new(Semaphore::new(0));
    let gate = Arc::clone(&go);
    let instance = Instance::raw(move |tcp| {
        let gate = Arc::clone(&gate);
        async move {
            let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
            let mut answering = futures_util::stream::FuturesUnordered::new();
            loop {
                let (_, mut respond) = tokio::select! {
                    Some(()) = futures_util::StreamExt::next(&mut answering) => continue,
                    accepted = connection.accept() => match accepted {
                        Some(Ok(accepted)) => accepted,
                        _ => return,
                    },
                };
                for status in [100, 103, 110, 103] {
                    let said = http::Response::builder().status(status).header("link", "</a.css>; rel=preload");
                    respond.send_informational(said.body(()).unwrap()).unwrap();
                }
                let gate = Arc::clone(&gate);
                answering.push(async move {
                    gate.acquire().await.unwrap().forget();
                    let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                    send.send_data("ok".into(), true).unwrap();
                });
            }
        }
    })
    .await;
    let address = world.serve(route("api", Protocol::H2c, vec![endpoint(1, instance.address)])).await;
    (world, instance, address, go)
}

#[tokio::test]
async fn hints_of_an_instance_that_speaks_http_2_reach_a_client_of_http_1() {
    let (_world, instance, address, go) = hinting_in_http_2().await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let said = |status: &str| format!("HTTP/1.1 {status}\r\nlink: </a.css>; rel=preload\r\n\r\n");
    let hints = [said("103 Early Hints"), said("110 "), said("103 Early Hints")].concat();
    for body in ["", "body"] {
        let request = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let mut seen = String::new();
        tcp.write_all(request.as_bytes()).await.unwrap();
        read_to(&mut tcp, &mut seen, &hints).await;
        assert_eq!(seen, hints, "what the proxy did not ask for is not passed on, the rest is");
        go.add_permits(1);
        read_to(&mut tcp, &mut seen, "ok\r\n0\r\n\r\n").await;
        assert!(seen[hints.len()..].starts_with("HTTP/1.1 200 OK\r\n"), "{seen}");
    }
    assert_eq!(instance.connections(), 1);
}

#[tokio::test]
async fn hints_of_an_instance_that_speaks_http_2_reach_a_client_of_http_2() {
    let (_world, _instance, address, go) = hinting_in_http_2().await;
    let tcp = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = soon("a handshake", h2::client::handshake(tcp)).await.unwrap();
    let tree = orchestra_task::TaskTree::new();
    tree.start(orchestra_task::TaskKind::Connection, "client", async move {
        let _ = connection.await;
    });
    for _ in 0..2 {
        let request = http::Request::get("http://test.example/").body(()).unwrap();
        let (mut response, _) = sender.send_request(request, true).unwrap();
        for status in [103, 110, 103] {
            let hints = soon("hints", std::future::poll_fn(|cx| response.poll_informational(cx))).await;
            let hints = hints.unwrap().unwrap();
            assert_eq!((hints.status().as_u16(), hints.headers()["link"].as_bytes().len()), (status, 21));
        }
        go.add_permits(1);
        let mut body = soon("the response", response).await.unwrap().into_body();
        assert_eq!(soon("the body", body.data()).await.unwrap().unwrap(), "ok");
    }
}

/// An instance that answers before it has read the request: trailers come behind the head of the response, which cannot
/// be told any more that the connection ends.
#[tokio::test]
async fn a_response_before_the_trailers_of_its_request_ends_the_connection() {
    let world = World::new().await;
    let told = Arc::new(Mutex::new(String::new()));
    let record = Arc::clone(&told);
    let instance = Instance::raw(move |mut tcp| {
        let told = Arc::clone(&record);
        async move {
            let (mut buffer, mut seen) = ([0; 8192], String::new());
            let mut answered = false;
            while let Ok(count @ 1..) = tcp.read(&mut buffer).await {
                seen.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
                told.lock().unwrap().clone_from(&seen);
                if !std::mem::replace(&mut answered, true) {
                    tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n").await.unwrap();
                }
                if seen.contains("\r\n0\r\n") && seen.ends_with("\r\n\r\n") {
                    tcp.write_all(b"0\r\n\r\n").await.unwrap();
                }
            }
        }
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"POST /one HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await.unwrap();
    let mut answer = String::new();
    read_to(&mut tcp, &mut answer, "2\r\nok\r\n").await;
    assert!(answer.to_ascii_lowercase().contains("connection: close\r\n"), "{answer}");
    tcp.write_all(b"0\r\nx-sum: 7\r\nhost: b\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = soon("the end of the connection", tcp.read_to_end(&mut rest)).await;
    assert_eq!(String::from_utf8_lossy(&rest), "0\r\n\r\n", "one response to one request");
    let seen = told.lock().unwrap().clone();
    assert!(seen.contains("x-sum: 7\r\n") && !seen.contains("host: b") && !seen.contains("smuggled"), "{seen}");
}
