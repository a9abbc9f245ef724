//! Very small frames of DATA: each costs more than it carries, so h2 ends a connection on which too many are kept. What is
//! kept because somebody does not read, or because there is no instance, must not end what others have on it.

use std::sync::atomic::AtomicUsize;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};

use super::*;
use crate::hold::holding;

#[tokio::test]
async fn clients_that_do_not_read_end_nobody_elses_stream() {
    const STREAMS: usize = 4;
    const SENT: usize = 9_000;
    let world = World::new().await;
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    // As a model that streams its tokens.
    let instance = Instance::h2(move |request| {
        let counted = Arc::clone(&counted);
        async move {
            if request.uri().path() == "/short" {
                return text("short");
            }
            let tokens = (0_u64..).map(move |_| {
                counted.fetch_add(1, Ordering::Relaxed);
                Ok(Frame::data(Bytes::from_static(b"a short token\n")))
            });
            Response::new(StreamBody::new(futures_util::stream::iter(tokens)).boxed())
        }
    })
    .await;
    let address = world.serve(route("llm", Protocol::H2c, vec![endpoint(1, instance.address)])).await;
    let tcp = TcpStream::connect(address).await.unwrap();
    let handshake = h2::client::Builder::new().initial_window_size(0).handshake::<_, Bytes>(tcp);
    let (mut sender, connection) = handshake.await.unwrap();
    let tree = TaskTree::new();
    tree.start(TaskKind::Connection, "client", async move { connection.await.is_ok() });
    let mut bodies = Vec::new();
    for _ in 0..STREAMS {
        let request = Request::get("http://test.example/tokens").body(()).unwrap();
        let (response, _) = sender.send_request(request, true).unwrap();
        bodies.push(soon("a response", response).await.unwrap().into_body());
    }
    soon("full windows", async {
        while sent.load(Ordering::Relaxed) < STREAMS * SENT {
            for body in &mut bodies {
                let next = std::future::poll_fn(|cx| std::task::Poll::Ready(body.poll_data(cx))).await;
                assert!(next.is_pending(), "{next:?} after {} tokens", sent.load(Ordering::Relaxed));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(get(address, "/short").await.unwrap().text(), "short");
    assert_eq!(instance.connections(), 1, "all of them share it");
    tree.cancel();
}

#[tokio::test]
async fn messages_that_wait_for_an_instance_do_not_end_their_connection() {
    const MESSAGES: usize = 5_000;
    let world = World::new().await;
    let address = world.serve(route("rpc", Protocol::Http, vec![])).await;
    let mut peer = Peer::open(address).await;
    peer.send(&post_on(1)).await;
    let messages = frame(DATA, 0, 1, b"message\n").repeat(MESSAGES);
    peer.send(&messages).await;
    peer.send(&get_on(3)).await;
    holding(&world, 2).await;
    peer.send(&frame(DATA, END_STREAM, 1, &[])).await;
    let instance = Instance::http(|request| async move {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        text(format!("{} bytes", body.len()))
    })
    .await;
    world.serve(route("rpc", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut answers = HashMap::new();
    while answers.len() < 2 {
        let (kind, _, stream, payload) = soon("an answer", peer.next()).await.expect("the connection lives");
        assert!(kind != GOAWAY && kind != RST_STREAM, "{kind} on {stream}: {payload:?}");
        if kind == DATA {
            answers.insert(stream, String::from_utf8(payload).unwrap());
        }
    }
    assert_eq!((&*answers[&1], &*answers[&3]), (&*format!("{} bytes", MESSAGES * 8), "0 bytes"));
}
