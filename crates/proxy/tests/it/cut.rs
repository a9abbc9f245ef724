//! The end of the drain budget, in each protocol.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use orchestra_model::{
    desired::Protocol,
    route::{Endpoint, ProxyEvent},
};
use orchestra_provider::{DataPlane as _, DataPlaneEvent};
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::{Mutex, mpsc},
};
use tokio_tungstenite::tungstenite::Message;

use crate::{harness::*, protocols::websocket_echo};

/// Turns the endpoint draining, checks that it is not drained yet, cuts it, and sees it drained.
async fn drain_and_cut(world: &mut World, name: &str, protocol: Protocol, endpoint: &Endpoint, streams: u32) {
    world.apply(vec![route(name, protocol, vec![draining(endpoint)])]).await;
    let event = world.until(|event| matches!(event, DataPlaneEvent::Proxy(_))).await;
    let requests = 1 - streams;
    let expected = ProxyEvent::Draining { endpoint: key(endpoint), requests, streams };
    assert_eq!(event, DataPlaneEvent::Proxy(expected));
    world.handle.cut(key(endpoint)).await.unwrap();
}

/// Waits until the endpoint is drained, and checks that the metrics tell of exactly one cut, however it was announced.
async fn drained_and_counted(world: &mut World, endpoint: &Endpoint) {
    world.drained(&key(endpoint)).await;
    let errors = samples(&world.handle.metrics().await.unwrap(), "orchestra_proxy_errors_total");
    let cuts: Vec<f64> = errors.iter().filter(|(labels, _)| labels.contains("kind=\"cut\"")).map(|(_, n)| *n).collect();
    assert_eq!(cuts, [1.0], "{errors:?}");
}

#[tokio::test]
async fn an_event_stream_ends_with_an_event() {
    let mut world = World::new().await;
    let (instance, sender) = Instance::fed(false, "text/event-stream").await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let mut client = Client::h1(address).await.unwrap();
    let mut body = client.send(Request::get("/").body(empty()).unwrap()).await.unwrap().into_body();
    sender.send(Frame::data(Bytes::from("data: whole\n\ndata: ha"))).await.unwrap();
    assert!(soon("an event", body.frame()).await.unwrap().unwrap().into_data().unwrap().starts_with(b"data: whole"));
    drain_and_cut(&mut world, "api", Protocol::Http, &only, 1).await;
    // The half event gets the time to become whole; what comes after it is not passed on.
    sender.send(Frame::data(Bytes::from("lf\n\ndata: more\n\ndata: open"))).await.unwrap();
    let rest = soon("the end", body.collect()).await.unwrap().to_bytes();
    let farewell = "event: orchestra-drain\ndata: {\"reason\":\"the instance is being stopped\"}\n\n";
    assert_eq!(rest, format!("lf\n\ndata: more\n\n{farewell}"));
    drained_and_counted(&mut world, &only).await;
}

#[tokio::test]
async fn an_event_that_stays_half_is_not_completed_with_something_else() {
    let mut world = World::new().await;
    let (instance, sender) = Instance::fed(false, "text/event-stream").await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let mut client = Client::h1(address).await.unwrap();
    let body = client.send(Request::get("/").body(empty()).unwrap()).await.unwrap().into_body();
    sender.send(Frame::data(Bytes::from("data: ha"))).await.unwrap();
    drain_and_cut(&mut world, "api", Protocol::Http, &only, 1).await;
    assert_eq!(soon("the end", body.collect()).await.unwrap().to_bytes(), "data: ha");
    drained_and_counted(&mut world, &only).await;
    drop(sender);
}

#[tokio::test]
async fn a_plain_response_ends_visibly_incomplete() {
    let mut world = World::new().await;
    let (instance, sender) = Instance::fed(false, "application/json").await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    // An HTTP/1.0 client knows the end of a response only from the end of the connection.
    let mut old = TcpStream::connect(address).await.unwrap();
    old.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    sender.send(Frame::data(Bytes::from("[1, 2"))).await.unwrap();
    let mut head = Vec::new();
    soon("the first part", async {
        while !head.ends_with(b"[1, 2") {
            old.read_buf(&mut head).await.unwrap();
        }
    })
    .await;
    drain_and_cut(&mut world, "api", Protocol::Http, &only, 0).await;
    let error = soon("the end", old.read_to_end(&mut head)).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    drained_and_counted(&mut world, &only).await;
}

#[tokio::test]
async fn what_an_instance_sent_before_it_died_arrives() {
    let world = World::new().await;
    for (name, head, body) in [
        ("sized", "content-length: 100", "0123456789"),
        ("chunked", "transfer-encoding: chunked", "a\r\n0123456789\r\n5\r\nab"),
    ] {
        let instance = Instance::raw(move |mut tcp| async move {
            let _ = tcp.read(&mut [0; 4096]).await;
            let _ = tcp.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}").as_bytes()).await;
        })
        .await;
        let address = world.serve(route(name, Protocol::Http, vec![endpoint(1, instance.address)])).await;
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        // No reset, which would take away what was not read yet.
        soon("the end", tcp.read_to_end(&mut answer)).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.contains("0123456789") && !answer.ends_with("0\r\n\r\n"), "{name}: {answer}");
    }
}

#[tokio::test]
async fn a_request_without_an_answer_gets_503() {
    let mut world = World::new().await;
    let instance = Instance::http(|_| std::future::pending::<Response<AnyBody>>()).await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let cut = async {
        soon("the request", async {
            while instance.requests() == 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        drain_and_cut(&mut world, "api", Protocol::Http, &only, 0).await;
    };
    let (reply, ()) = tokio::join!(get(address, "/"), cut);
    let reply = reply.unwrap();
    assert_eq!((reply.status, &reply.headers["x-orchestra-error"]), (503, &http::HeaderValue::from_static("cut")));
    drained_and_counted(&mut world, &only).await;
}

#[tokio::test]
async fn an_http2_stream_is_reset_and_its_connection_lives() {
    let mut world = World::new().await;
    let (instance, sender) = Instance::fed(true, "application/grpc").await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("rpc", Protocol::Grpc, vec![only.clone()])).await;
    let mut client = Client::h2(address).await.unwrap();
    let request = Request::post("/s/c").header("content-type", "application/grpc").body(full("x")).unwrap();
    let mut body = client.send(request).await.unwrap().into_body();
    sender.send(Frame::data(Bytes::from("message"))).await.unwrap();
    assert!(soon("a message", body.frame()).await.unwrap().is_ok());
    drain_and_cut(&mut world, "rpc", Protocol::Grpc, &only, 1).await;
    let error = soon("the reset", body.frame()).await.unwrap().unwrap_err();
    assert!(format!("{error:?}").contains("CANCEL"), "{error:?}");
    drained_and_counted(&mut world, &only).await;
    let next = Instance::h2(|_| async { text("next") }).await;
    world.apply(vec![route("rpc", Protocol::Grpc, vec![endpoint(2, next.address)])]).await;
    assert_eq!(soon("a response", client.get("/")).await.unwrap().text(), "next");
}

/// An instance whose responses have no end, and how many pieces of them it sent.
async fn endless(kind: &'static str) -> (Instance, Arc<AtomicUsize>) {
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let instance = Instance::http(move |_| {
        let counted = Arc::clone(&counted);
        async move {
            let pieces = std::iter::repeat_with(move || {
                counted.fetch_add(1, Ordering::Relaxed);
                Ok(Frame::data(Bytes::from(vec![b'x'; 64 << 10])))
            });
            let body = StreamBody::new(futures_util::stream::iter(pieces));
            Response::builder().header("content-type", kind).body(BodyExt::boxed(body)).unwrap()
        }
    });
    (instance.await, sent)
}

/// Waits until nobody takes anything any more.
pub(crate) async fn stalled(sent: &AtomicUsize) {
    let mut before = 0;
    soon("a stall", async {
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = sent.load(Ordering::Relaxed);
            if now > 0 && now == before {
                return;
            }
            before = now;
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_holds_up_no_cut() {
    for (kind, streams) in [("text/plain", 0), ("text/event-stream", 1)] {
        let mut world = World::new().await;
        let (instance, sent) = endless(kind).await;
        let only = endpoint(1, instance.address);
        let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        stalled(&sent).await;
        drain_and_cut(&mut world, "api", Protocol::Http, &only, streams).await;
        drained_and_counted(&mut world, &only).await;
        let mut seen = Vec::new();
        let _ = soon("the end", tcp.read_to_end(&mut seen)).await;
        assert!(!seen.ends_with(b"0\r\n\r\n"), "visibly incomplete");
    }
}

#[tokio::test]
async fn a_client_of_http_2_that_takes_nothing_holds_up_no_cut() {
    for (kind, streams) in [("text/plain", 0), ("text/event-stream", 1)] {
        let mut world = World::new().await;
        let (instance, sent) = endless(kind).await;
        let only = endpoint(1, instance.address);
        let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
        let tcp = TcpStream::connect(address).await.unwrap();
        let handshake = h2::client::Builder::new().initial_window_size(0).handshake::<_, Bytes>(tcp);
        let (mut sender, connection) = handshake.await.unwrap();
        TaskTree::new().start(TaskKind::Connection, "client", async move { connection.await.is_ok() });
        let request = Request::get("http://test.example/").body(()).unwrap();
        let (response, _) = sender.send_request(request, true).unwrap();
        let mut body = soon("a response", response).await.unwrap().into_body();
        stalled(&sent).await;
        drain_and_cut(&mut world, "api", Protocol::Http, &only, streams).await;
        let error = soon("the reset", body.data()).await.expect("a reset is not the end").unwrap_err();
        assert_eq!(error.reason(), Some(h2::Reason::CANCEL));
        drained_and_counted(&mut world, &only).await;
    }
}

/// An instance that speaks HTTP/2, answers with a piece of a body, and resets the stream when it is told to.
async fn resets(reason: h2::Reason) -> (Instance, mpsc::Sender<()>) {
    let (go, went) = mpsc::channel(1);
    let went = Arc::new(Mutex::new(went));
    let instance = Instance::raw(move |tcp| {
        let went = Arc::clone(&went);
        async move {
            let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
            let mut went = went.lock().await;
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                send.send_data("part".into(), false).unwrap();
                tokio::select! {
                    go = went.recv() => go.unwrap(),
                    _ = connection.accept() => return,
                }
                send.send_reset(reason);
            }
        }
    })
    .await;
    (instance, go)
}

#[tokio::test]
async fn a_stream_that_an_instance_resets_is_no_whole_response() {
    let world = World::new().await;
    for reason in [h2::Reason::CANCEL, h2::Reason::NO_ERROR, h2::Reason::INTERNAL_ERROR] {
        let (instance, go) = resets(reason).await;
        let address = world.serve(route("rpc", Protocol::H2c, vec![endpoint(1, instance.address)])).await;
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut seen = vec![];
        while !seen.ends_with(b"part\r\n") {
            assert!(soon("a part", tcp.read_buf(&mut seen)).await.unwrap() > 0);
        }
        let before = seen.len();
        go.send(()).await.unwrap();
        let _ = soon("the end of the connection", tcp.read_to_end(&mut seen)).await;
        assert_eq!(seen.len(), before, "{reason}: no last chunk");
        let tcp = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = h2::client::handshake(tcp).await.unwrap();
        TaskTree::new().start(TaskKind::Connection, "client", async move { connection.await.is_ok() });
        let request = Request::get("http://test.example/").body(()).unwrap();
        let (response, _) = sender.send_request(request, true).unwrap();
        let mut body = soon("a response", response).await.unwrap().into_body();
        assert_eq!(soon("a part", body.data()).await.unwrap().unwrap(), "part");
        go.send(()).await.unwrap();
        let error = soon("the reset", body.data()).await.expect("a reset is not the end").unwrap_err();
        assert_eq!(error.reason(), Some(h2::Reason::CANCEL), "{reason}");
    }
}

/// An instance of HTTP/2 that answers at once hears when the client that still sends goes away.
#[tokio::test]
async fn an_upload_beside_its_response_ends_with_its_client() {
    let world = World::new().await;
    let (told, mut hears) = mpsc::channel(8);
    let instance = Instance::raw(move |tcp| {
        let told = told.clone();
        async move {
            let Ok(mut connection) = h2::server::handshake(tcp).await else { return };
            let mut reading = futures_util::stream::FuturesUnordered::new();
            loop {
                tokio::select! {
                    Some(()) = reading.next() => {}
                    accepted = connection.accept() => {
                        let Some(Ok((request, mut respond))) = accepted else { return };
                        let mut send = respond.send_response(http::Response::new(()), false).unwrap();
                        send.send_data("begun".into(), false).unwrap();
                        let told = told.clone();
                        reading.push(async move {
                            let mut body = request.into_body();
                            while let Some(data) = body.data().await {
                                let ended = data.is_err();
                                told.send(data.map_err(|error| error.reason())).await.unwrap();
                                if ended {
                                    break;
                                }
                            }
                            drop(send);
                        });
                    }
                }
            }
        }
    })
    .await;
    let address = world.serve(route("rpc", Protocol::H2c, vec![endpoint(1, instance.address)])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await.unwrap();
    assert_eq!(soon("a piece", hears.recv()).await.unwrap().unwrap(), "one");
    let mut seen = Vec::new();
    while !seen.ends_with(b"begun\r\n") {
        let mut buffer = [0; 1024];
        let count = soon("the response", tcp.read(&mut buffer)).await.unwrap();
        assert!(count > 0, "{seen:?}");
        seen.extend_from_slice(&buffer[..count]);
    }
    tcp.write_all(b"3\r\ntwo\r\n").await.unwrap();
    assert_eq!(soon("a piece", hears.recv()).await.unwrap().unwrap(), "two", "it goes on beside the response");
    drop(tcp);
    let ended = soon("the end", hears.recv()).await.unwrap();
    assert_eq!(ended, Err(Some(h2::Reason::CANCEL)), "a part is not taken for the whole");
}

#[tokio::test]
async fn a_websocket_gets_1012_on_both_sides() {
    let mut world = World::new().await;
    let instance = Instance::http(websocket_echo).await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("ws", Protocol::Http, vec![only.clone()])).await;
    let tcp = TcpStream::connect(address).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("ws://test.example/", tcp).await.unwrap();
    socket.send(Message::text("before")).await.unwrap();
    assert_eq!(soon("the echo", socket.next()).await.unwrap().unwrap(), Message::text("before"));
    drain_and_cut(&mut world, "ws", Protocol::Http, &only, 1).await;
    let Some(Ok(Message::Close(Some(frame)))) = soon("the close", socket.next()).await else { panic!("no close") };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1012, "the instance is being stopped"));
    drained_and_counted(&mut world, &only).await;
}

#[tokio::test]
async fn a_close_frame_does_not_tear_a_frame() {
    let mut world = World::new().await;
    let (go, wait) = tokio::sync::oneshot::channel::<()>();
    let wait = std::sync::Mutex::new(Some(wait));
    // Speaks WebSocket by hand: half a frame, and the other half when told.
    let instance = Instance::raw(move |mut tcp| {
        let wait = wait.lock().unwrap().take().unwrap();
        async move {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                tcp.read_buf(&mut request).await.unwrap();
            }
            let head = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
            tcp.write_all(head.as_bytes()).await.unwrap();
            tcp.write_all(&[0x82, 6, 1, 2, 3]).await.unwrap();
            wait.await.unwrap();
            tcp.write_all(&[4, 5, 6, 0x82, 1, 9]).await.unwrap();
            // The close from the client's side is masked and whole.
            let mut close = Vec::new();
            tcp.read_to_end(&mut close).await.unwrap();
            assert_eq!(close[0], 0x88);
            assert_eq!(usize::from(close[1]), 0x80 | (close.len() - 6));
            assert_eq!([close[6] ^ close[2], close[7] ^ close[3]], 1012_u16.to_be_bytes());
        }
    })
    .await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("ws", Protocol::Http, vec![only.clone()])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    soon("half a frame", async {
        while !bytes.ends_with(&[0x82, 6, 1, 2, 3]) {
            tcp.read_buf(&mut bytes).await.unwrap();
        }
    })
    .await;
    drain_and_cut(&mut world, "ws", Protocol::Http, &only, 1).await;
    go.send(()).unwrap();
    let mut rest = Vec::new();
    soon("the end", tcp.read_to_end(&mut rest)).await.unwrap();
    // The frame is completed, the next one is not begun, and the close is the last.
    assert_eq!(rest[..3], [4, 5, 6]);
    assert_eq!((rest[3], usize::from(rest[4])), (0x88, rest.len() - 5));
    assert_eq!(rest[5..7], 1012_u16.to_be_bytes());
    drained_and_counted(&mut world, &only).await;
}

#[tokio::test]
async fn a_tcp_connection_is_closed() {
    let mut world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        let mut buffer = [0; 16];
        while let Ok(count @ 1..) = tcp.read(&mut buffer).await {
            tcp.write_all(&buffer[..count]).await.unwrap();
        }
    })
    .await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("db", Protocol::Tcp, vec![only.clone()])).await;
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"ping").await.unwrap();
    let mut buffer = [0; 4];
    soon("the echo", tcp.read_exact(&mut buffer)).await.unwrap();
    drain_and_cut(&mut world, "db", Protocol::Tcp, &only, 1).await;
    assert_eq!(soon("the end", tcp.read(&mut buffer)).await.unwrap(), 0);
    drained_and_counted(&mut world, &only).await;
}

/// Types of the frames in what an HTTP/2 client sent (RFC 9113 4.1), behind its preface.
fn frame_types(bytes: &[u8]) -> Vec<u8> {
    let mut rest = bytes.get(24..).unwrap_or_default();
    let mut types = Vec::new();
    while let [a, b, c, kind, ..] = rest {
        types.push(*kind);
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    types
}

#[tokio::test]
async fn an_http2_instance_that_leaves_is_told_goaway() {
    const GOAWAY: u8 = 7;
    let mut world = World::new().await;
    let instance = Instance::h2(|_| async { text("x") }).await;
    let (ended, mut heard) = mpsc::channel(1);
    // Stands in between and keeps what the proxy sends.
    let behind = instance.address;
    let spy = Instance::raw(move |tcp| {
        let ended = ended.clone();
        async move {
            let (mut from, mut to) = tcp.into_split();
            let (mut back_from, mut back_to) = TcpStream::connect(behind).await.unwrap().into_split();
            let up = async {
                let mut all = Vec::new();
                let mut part = vec![0; 4096];
                while let Ok(count @ 1..) = from.read(&mut part).await {
                    all.extend_from_slice(&part[..count]);
                    if back_to.write_all(&part[..count]).await.is_err() {
                        break;
                    }
                }
                let _ = ended.send(all).await;
            };
            let down = async {
                let _ = tokio::io::copy(&mut back_from, &mut to).await;
            };
            tokio::join!(up, down);
        }
    })
    .await;
    let only = endpoint(1, spy.address);
    let address = world.serve(route("rpc", Protocol::H2c, vec![only.clone()])).await;
    let mut client = Client::h2(address).await.unwrap();
    assert_eq!(client.get("/").await.unwrap().text(), "x");
    world.apply(vec![route("rpc", Protocol::H2c, vec![draining(&only)])]).await;
    world.drained(&key(&only)).await;
    let sent = soon("the end of the connection", heard.recv()).await.unwrap();
    assert_eq!(frame_types(&sent).last(), Some(&GOAWAY), "{:?}", frame_types(&sent));
    // The client's connection is not the instance's.
    let next = Instance::h2(|_| async { text("next") }).await;
    world.apply(vec![route("rpc", Protocol::H2c, vec![endpoint(2, next.address)])]).await;
    assert_eq!(client.get("/").await.unwrap().text(), "next");
}
