//! Instances that answer before they have read the request.

use std::time::Duration;

use orchestra_model::desired::Protocol;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};

use crate::harness::*;

/// More than the sockets on the way hold.
const LONG: usize = 32 << 20;

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// An instance that answers as soon as it has a head, and says how much came behind it.
async fn early() -> (Instance, mpsc::Receiver<usize>) {
    let (heard, says) = mpsc::channel(8);
    let instance = Instance::raw(move |mut tcp| {
        let heard = heard.clone();
        async move {
            let mut buffer = vec![0; 64 << 10];
            let mut size = 0;
            let first = tcp.read(&mut buffer).await.unwrap();
            let head = buffer[..first].windows(4).position(|end| end == b"\r\n\r\n").expect("a whole head") + 4;
            size += first - head;
            tcp.write_all(ANSWER).await.unwrap();
            while size < LONG {
                match tcp.read(&mut buffer).await {
                    Ok(count @ 1..) => size += count,
                    _ => break,
                }
            }
            heard.send(size).await.unwrap();
        }
    })
    .await;
    (instance, says)
}

async fn post(address: std::net::SocketAddr) -> TcpStream {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {LONG}\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.unwrap();
    tcp.write_all(&[b'x'; 100]).await.unwrap();
    tcp
}

/// Reads one answer, whose body is `ok`.
async fn answer(tcp: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nok") {
        assert_ne!(tcp.read_buf(&mut answer).await.unwrap(), 0, "{}", String::from_utf8_lossy(&answer));
    }
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn a_request_goes_on_after_its_response_and_counts_until_it_is_sent() {
    let mut world = World::new().await;
    let (instance, mut heard) = early().await;
    let only = endpoint(1, instance.address);
    let address = world.serve(route("api", Protocol::Http, vec![only.clone()])).await;
    let mut tcp = post(address).await;
    assert!(soon("the answer", answer(&mut tcp)).await.starts_with("HTTP/1.1 200"));
    world.apply(vec![route("api", Protocol::Http, vec![draining(&only)])]).await;
    // What is not sent yet holds the drain up.
    tokio::time::timeout(Duration::from_millis(100), world.drained(&key(&only))).await.unwrap_err();
    tcp.write_all(&vec![b'x'; LONG - 100]).await.unwrap();
    assert_eq!(soon("the whole request", heard.recv()).await, Some(LONG));
    soon("the drain", world.drained(&key(&only))).await;
    world.apply(vec![route("api", Protocol::Http, vec![endpoint(2, early().await.0.address)])]).await;
}

#[tokio::test]
async fn a_client_whose_request_nobody_reads_is_heard_out_for_a_while() {
    let world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        let mut buffer = [0; 100];
        let _ = tcp.read(&mut buffer).await;
        tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok").await.unwrap();
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    for _ in 0..20 {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        let size = 3 << 20;
        tcp.write_all(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {size}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        tcp.write_all(&[b'x'; 200]).await.unwrap();
        assert!(soon("the answer", answer(&mut tcp)).await.starts_with("HTTP/1.1 200"));
        // Many clients send all of it before they look for an answer, and take a reset for none.
        tcp.write_all(&vec![b'x'; size - 200]).await.unwrap();
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert!(soon("the next answer", answer(&mut tcp)).await.starts_with("HTTP/1.1 200"));
    }
}

/// As gunicorn does it: `Connection: keep-alive`, and closed a moment later, since too much of the request is unread.
#[tokio::test]
async fn a_connection_that_is_closed_behind_an_early_answer_gets_no_request_that_must_not_be_sent_twice() {
    let world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        let mut buffer = [0; 100];
        let _ = tcp.read(&mut buffer).await;
        tcp.write_all(ANSWER).await.unwrap();
        // What is tested is time: that the proxy does not reuse the connection at once.
        tokio::time::sleep(Duration::from_millis(5)).await;
    })
    .await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    for _ in 0..20 {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        let size = 50_000;
        tcp.write_all(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {size}\r\n\r\n").as_bytes())
            .await
            .unwrap();
        tcp.write_all(&vec![b'x'; size]).await.unwrap();
        assert!(soon("the answer", answer(&mut tcp)).await.starts_with("HTTP/1.1 200"));
    }
}
