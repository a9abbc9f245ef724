//! What goes through the proxy, in every protocol.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use orchestra_model::desired::Protocol;
use orchestra_provider::DataPlane as _;
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_tungstenite::tungstenite::{Message, protocol::Role};

use crate::harness::*;

/// Answers with what it was asked.
pub(crate) async fn echo(request: Request<hyper::body::Incoming>) -> Response<AnyBody> {
    let mut lines = vec![format!("{} {} {:?}", request.method(), request.uri(), request.version())];
    lines.extend(request.headers().iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())));
    let body = request.into_body().collect().await.unwrap();
    lines.push(format!("body {}", body.to_bytes().len()));
    text(lines.join("\n"))
}

#[tokio::test]
async fn http1_and_http2_clients_reach_an_http1_instance() {
    let world = World::new().await;
    let instance = Instance::http(echo).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut h1 = Client::h1(address).await.unwrap();
    for _ in 0..3 {
        let reply = h1.get("/a?b=c").await.unwrap();
        assert_eq!(reply.status, 200);
        let lines: Vec<&str> = reply.text().lines().collect();
        assert_eq!(lines[0], "GET /a?b=c HTTP/1.1");
        assert!(lines.contains(&"host: test.example") && lines.contains(&"x-forwarded-for: 127.0.0.1"), "{lines:?}");
    }
    let mut h2 = Client::h2(address).await.unwrap();
    let request = Request::post("/x").header("cookie", "a=1").header("cookie", "b=2").body(full("hello")).unwrap();
    let reply = whole(h2.send(request).await.unwrap()).await.unwrap();
    let lines: Vec<&str> = reply.text().lines().collect();
    assert_eq!(lines[0], "POST /x HTTP/1.1");
    assert!(lines.contains(&"host: test.example") && lines.contains(&"cookie: a=1; b=2"), "{lines:?}");
    assert_eq!(*lines.last().unwrap(), "body 5");
    // Connections to the instance are used again.
    assert_eq!((instance.requests(), instance.connections()), (4, 1));
}

#[tokio::test]
async fn http2_instances_are_spoken_to_in_http2_over_one_connection() {
    let world = World::new().await;
    let instance = Instance::h2(echo).await;
    let address = world.serve(route("api", Protocol::H2c, vec![endpoint(1, instance.address)])).await;
    for mut client in [Client::h1(address).await.unwrap(), Client::h2(address).await.unwrap()] {
        let reply = client.get("/a").await.unwrap();
        let first = reply.text().lines().next().unwrap().to_owned();
        assert_eq!(first, "GET http://test.example/a HTTP/2.0");
        assert!(!reply.text().contains("\nhost:") && !reply.text().contains("\nconnection:"), "{}", reply.text());
    }
    let clients = (0..50).map(|_| async {
        let mut client = Client::h2(address).await.unwrap();
        client.post("/many", full(vec![1; 1000])).await.unwrap().status
    });
    let statuses = soon("50 requests", futures_util::future::join_all(clients)).await;
    assert!(statuses.iter().all(|s| *s == 200));
    assert_eq!(instance.connections(), 1);
}

#[tokio::test]
async fn head_no_content_and_large_uploads_keep_their_framing() {
    let world = World::new().await;
    let instance = Instance::http(|request| async move {
        if request.method() == "HEAD" {
            return Response::builder().header("content-length", "1234").body(empty()).unwrap();
        }
        if request.uri() == "/none" {
            return Response::builder().status(204).body(empty()).unwrap();
        }
        echo(request).await
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h1(address).await.unwrap();
    let head = client.send(Request::head("/").body(empty()).unwrap()).await.unwrap();
    assert_eq!(head.headers()["content-length"], "1234");
    drop(whole(head).await.unwrap());
    assert_eq!(client.get("/none").await.unwrap().status, 204);
    let upload = Bytes::from(vec![7; 20 << 20]);
    let reply = soon("20 MiB", client.post("/upload", full(upload.clone()))).await.unwrap();
    assert!(reply.text().ends_with("body 20971520") && reply.text().contains("content-length: 20971520"));
    let mut h2 = Client::h2(address).await.unwrap();
    let reply = soon("20 MiB over HTTP/2", h2.post("/upload", full(upload))).await.unwrap();
    assert!(reply.text().ends_with("body 20971520"));
    // Without a length: chunked on both sides.
    let (sender, body) = fed();
    let feed = async {
        for _ in 0..3 {
            sender.send(Frame::data(Bytes::from_static(b"12345"))).await.unwrap();
        }
        drop(sender);
    };
    let (reply, ()) = tokio::join!(client.post("/chunks", body), feed);
    let reply = reply.unwrap();
    assert!(reply.text().ends_with("body 15") && reply.text().contains("transfer-encoding: chunked"), "{reply:?}");
}

#[tokio::test]
async fn expect_continue_is_answered_by_the_proxy() {
    let world = World::new().await;
    let instance = Instance::http(echo).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let head = "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\nconnection: close\r\n\r\n";
    tcp.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 25];
    soon("100 Continue", tcp.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    tcp.write_all(b"abc").await.unwrap();
    let mut rest = String::new();
    soon("the response", tcp.read_to_string(&mut rest)).await.unwrap();
    assert!(rest.starts_with("HTTP/1.1 200 OK\r\n") && rest.ends_with("body 3"), "{rest}");
    assert!(!rest.contains("expect:"));
}

#[tokio::test]
async fn grpc_messages_and_trailers_pass_one_by_one() {
    let world = World::new().await;
    let instance = Instance::h2(|request| async move {
        assert_eq!(request.headers()["te"], "trailers");
        assert_eq!(request.version(), http::Version::HTTP_2);
        let (sender, body) = fed();
        let mut incoming = request.into_body();
        TaskTree::new().start(TaskKind::Connection, "bidirectional", async move {
            while let Some(frame) = incoming.frame().await {
                sender.send(Frame::data(frame.unwrap().into_data().unwrap())).await.unwrap();
            }
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            sender.send(Frame::trailers(trailers)).await.unwrap();
        });
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await;
    let address = world.serve(route("rpc", Protocol::Grpc, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h2(address).await.unwrap();
    let (sender, body) = fed();
    let request = Request::post("/pkg.Svc/Call")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap();
    let response = soon("the head", client.send(request)).await.unwrap();
    let mut body = response.into_body();
    for message in ["one", "two", "three"] {
        // Each message comes back before the next one is sent: nothing is kept back.
        sender.send(Frame::data(Bytes::from(message))).await.unwrap();
        let frame = soon("the echo", body.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), message);
    }
    drop(sender);
    let trailers = soon("trailers", body.frame()).await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
}

#[tokio::test]
async fn events_pass_as_they_are_sent() {
    let world = World::new().await;
    let (instance, sender) = Instance::fed(false, "text/event-stream").await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h1(address).await.unwrap();
    let mut body = soon("the head", client.send(Request::get("/").body(empty()).unwrap())).await.unwrap().into_body();
    for token in ["data: a\n\n", "data: b\n\n"] {
        sender.send(Frame::data(Bytes::from(token))).await.unwrap();
        assert_eq!(soon("the event", body.frame()).await.unwrap().unwrap().into_data().unwrap(), token);
    }
    let page = world.handle.metrics().await.unwrap();
    let streams = samples(&page, "orchestra_proxy_in_flight");
    assert_eq!(streams.iter().find(|(l, _)| l.contains("release=\"1\"") && l.contains("stream")).unwrap().1, &1.0);
    drop(sender);
    assert!(soon("the end", body.frame()).await.is_none());
}

#[tokio::test]
async fn websockets_are_spliced() {
    let world = World::new().await;
    let instance = Instance::http(websocket_echo).await;
    let address = world.serve(route("ws", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let tcp = TcpStream::connect(address).await.unwrap();
    let (mut socket, response) =
        soon("the upgrade", tokio_tungstenite::client_async("ws://test.example/chat", tcp)).await.unwrap();
    assert_eq!(response.status(), 101);
    for size in [1, 126, 70_000] {
        let message = Message::binary(vec![9; size]);
        socket.send(message.clone()).await.unwrap();
        assert_eq!(soon("the echo", socket.next()).await.unwrap().unwrap(), message);
    }
    socket.close(None).await.unwrap();
    assert!(matches!(soon("the close", socket.next()).await, Some(Ok(Message::Close(_)))));
}

/// Upgrades and sends every message back.
pub(crate) async fn websocket_echo(mut request: Request<hyper::body::Incoming>) -> Response<AnyBody> {
    assert_eq!(request.headers()["connection"], "upgrade");
    let accept =
        tokio_tungstenite::tungstenite::handshake::derive_accept_key(request.headers()["sec-websocket-key"].as_bytes());
    let upgrade = hyper::upgrade::on(&mut request);
    TaskTree::new().start(TaskKind::Connection, "websocket", async move {
        let io = TokioIo::new(upgrade.await.unwrap());
        let mut socket = tokio_tungstenite::WebSocketStream::from_raw_socket(io, Role::Server, None).await;
        // Reading on after a close sends the answer to it.
        while let Some(Ok(message)) = socket.next().await {
            if !message.is_close() && socket.send(message).await.is_err() {
                break;
            }
        }
    });
    Response::builder()
        .status(101)
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-accept", accept)
        .body(empty())
        .unwrap()
}

#[tokio::test]
async fn tcp_is_spliced_and_one_side_may_finish_first() {
    let world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        // Answers only after the client has finished sending.
        let mut all = Vec::new();
        tcp.read_to_end(&mut all).await.unwrap();
        tcp.write_all(format!("got {}", all.len()).as_bytes()).await.unwrap();
    })
    .await;
    let address = world.serve(route("db", Protocol::Tcp, vec![endpoint(1, instance.address)])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(&vec![1; 3 << 20]).await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut answer = String::new();
    soon("the answer", tcp.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "got 3145728");
}

/// Closes with a reset, as a program does that gives up in the middle.
fn reset(tcp: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&tcp, Some(Duration::ZERO)).unwrap();
    drop(tcp);
}

/// What was sent before, and how it ended.
async fn end(tcp: &mut TcpStream) -> (usize, Result<(), std::io::ErrorKind>) {
    let (mut count, mut buffer) = (0, [0; 4096]);
    loop {
        match soon("the end", tcp.read(&mut buffer)).await {
            Ok(0) => return (count, Ok(())),
            Ok(received) => count += received,
            Err(error) => return (count, Err(error.kind())),
        }
    }
}

#[tokio::test]
async fn half_a_message_of_tcp_does_not_look_whole() {
    const BROKEN: Result<(), std::io::ErrorKind> = Err(std::io::ErrorKind::ConnectionReset);
    let world = World::new().await;
    let (ended, mut ends) = tokio::sync::mpsc::channel(1);
    let instance = Instance::raw(move |mut tcp| {
        let ended = ended.clone();
        async move {
            let mut byte = [0];
            tcp.read_exact(&mut byte).await.unwrap();
            tcp.write_all(b"half").await.unwrap();
            match &byte {
                // Gives up once the client has read that much.
                b"i" => {
                    tcp.read_exact(&mut byte).await.unwrap();
                    reset(tcp);
                }
                _ => ended.send(end(&mut tcp).await).await.unwrap(),
            }
        }
    })
    .await;
    let address = world.serve(route("db", Protocol::Tcp, vec![endpoint(1, instance.address)])).await;
    let begin = async |who: &[u8]| {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(who).await.unwrap();
        tcp.read_exact(&mut [0; 4]).await.unwrap();
        tcp
    };
    let mut tcp = begin(b"i").await;
    tcp.write_all(b".").await.unwrap();
    assert_eq!(end(&mut tcp).await, (0, BROKEN), "the instance gave up");
    reset(begin(b"c").await);
    assert_eq!(soon("the end at the instance", ends.recv()).await, Some((0, BROKEN)), "the client gave up");
    // Whoever only has no more to say ends in order.
    let mut tcp = begin(b"c").await;
    tcp.shutdown().await.unwrap();
    assert_eq!(end(&mut tcp).await, (0, Ok(())));
    assert_eq!(soon("the end at the instance", ends.recv()).await, Some((0, Ok(()))));
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_instance() {
    let mut world = World::new().await;
    let instance = Instance::http(|_| std::future::pending::<Response<AnyBody>>()).await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    soon("the request", async {
        while instance.requests() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    world.serve(route("api", Protocol::Http, vec![draining(&only)])).await;
    let event = world.until(|e| matches!(e, orchestra_provider::DataPlaneEvent::Proxy(_))).await;
    let expected = orchestra_model::route::ProxyEvent::Draining { endpoint: key(&only), requests: 1, streams: 0 };
    assert_eq!(event, orchestra_provider::DataPlaneEvent::Proxy(expected));
    drop(tcp);
    world.drained(&key(&only)).await;
}

#[tokio::test]
async fn metrics_tell_service_release_method_and_class() {
    let world = World::new().await;
    let instance = Instance::http(|request| async move {
        if request.uri() == "/missing" { Response::builder().status(404).body(empty()).unwrap() } else { text("x") }
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h1(address).await.unwrap();
    for path in ["/", "/", "/missing"] {
        client.get(path).await.unwrap();
    }
    let admin = world.handle.admin_address().unwrap();
    let page = get(admin, "/metrics").await.unwrap();
    assert_eq!(page.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let requests = samples(page.text(), "orchestra_proxy_requests_total");
    let labels = r#"stack="demo",environment="dev",service="api",release="1",arm="stable",method="GET""#;
    assert_eq!(requests[&format!("{{{labels},code=\"2xx\"}}")], 2.0);
    assert_eq!(requests[&format!("{{{labels},code=\"4xx\"}}")], 1.0);
    let counts = samples(page.text(), "orchestra_proxy_response_seconds_count");
    assert!(counts.iter().any(|(l, v)| l.contains("release=\"1\"") && *v == 3.0));
    assert_eq!(get(admin, "/healthz").await.unwrap().text(), "serving\n");
    assert_eq!(get(admin, "/").await.unwrap().status, 404);
    assert!(samples(&world.handle.metrics().await.unwrap(), "orchestra_proxy_requests_total").len() >= 2);
}
