//! Flags that the proxy answers itself, and its behaviour towards clients that ask oddly.

use std::{collections::BTreeMap, sync::Arc};

use orchestra_model::{
    desired::Protocol,
    flag::{Flag, FlagSet, ServedFlags},
    route::{Route, RouteId},
};
use orchestra_provider::DataPlaneEvent;
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
};

use crate::harness::{World, kill, route, soon};

/// A route with one flag.
fn served(value: bool) -> Route {
    let flag = json!({
        "kind": "boolean",
        "variants": {"it": value},
        "default": "it",
        "enabled": true,
        "off": "it",
        "rules": [],
    });
    let flag: Flag = serde_json::from_value(flag).unwrap();
    let flags = BTreeMap::from([("editor".parse().unwrap(), flag)]);
    let flags = ServedFlags { set: FlagSet { flags, ..FlagSet::default() }, changed_at: 7 };
    Route {
        id: RouteId::flags("demo/dev".parse().unwrap()),
        backends: Vec::new(),
        flags: Some(Arc::new(flags)),
        ..route("flags", Protocol::Http, vec![])
    }
}

async fn raw(address: std::net::SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    soon("the answer", stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

fn question(body: &str) -> Vec<u8> {
    let head = "POST /ofrep/v1/evaluate/flags/editor HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    format!("{head}content-length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

async fn value(address: std::net::SocketAddr) -> bool {
    let answer = raw(address, &question(r#"{"context": {}}"#)).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer.contains("\"value\":true")
}

type Events = tokio::io::Lines<BufReader<TcpStream>>;

async fn subscribe(address: std::net::SocketAddr) -> Events {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /ofrep/v1/events HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    BufReader::new(stream).lines()
}

/// The next announcement; `None` at the end of the stream.
async fn heard(events: &mut Events) -> Option<String> {
    while let Ok(Some(line)) = soon("an event", events.next_line()).await {
        if let Some(data) = line.strip_prefix("data: ") {
            return Some(data.to_owned());
        }
    }
    None
}

#[tokio::test]
async fn a_new_table_changes_values_and_tells_subscribers() {
    let world = World::new().await;
    let address = world.serve(served(false)).await;
    let mut events = subscribe(address).await;
    let first = heard(&mut events).await.unwrap();
    assert!(!value(address).await);

    assert_eq!(world.serve(served(true)).await, address, "the address moved");
    assert!(value(address).await);
    let second = heard(&mut events).await.unwrap();
    assert_ne!(first, second);

    // The same flags in another table are no change: the next thing that is told is the end.
    world.apply(vec![served(true), route("other", Protocol::Http, vec![])]).await;
    world.apply(vec![route("other", Protocol::Http, vec![])]).await;
    assert_eq!(heard(&mut events).await, None);
    assert!(TcpStream::connect(address).await.is_err());
}

/// Waits for the proxy that serves after another one.
async fn successor(world: &mut World, before: u32) -> u32 {
    let serving = |event: &DataPlaneEvent| matches!(event, DataPlaneEvent::Serving { pid } if *pid != before);
    let DataPlaneEvent::Serving { pid } = world.until(serving).await else { unreachable!("just checked") };
    pid
}

#[tokio::test]
async fn flags_outlive_the_server_and_the_proxy() {
    let mut world = World::new().await;
    let address = world.serve(served(true)).await;
    let home = world.close();
    assert!(value(address).await, "nobody answers without a server");
    world = home.open().await;
    let first = world.handle.pid().unwrap();
    kill(first, Signal::KILL);
    // The connection waits in the kernel's queue for the next proxy.
    assert!(value(address).await);

    // One that leaves ends its streams: the end of a subscription must not be waited for.
    let second = successor(&mut world, first).await;
    let mut events = subscribe(address).await;
    heard(&mut events).await.unwrap();
    kill(second, Signal::TERM);
    assert_eq!(heard(&mut events).await, None);
    assert!(value(address).await);
    successor(&mut world, second).await;
}

#[tokio::test]
async fn odd_requests_are_refused_and_disturb_nobody() {
    let world = World::new().await;
    let address = world.serve(served(true)).await;
    let long = "x".repeat(80 << 10);
    let chunked = format!(
        "POST /ofrep/v1/evaluate/flags HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    for (request, status) in [
        (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_vec(), "404"),
        (b"GET /ofrep/v1/evaluate/flags HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_vec(), "405"),
        (question("{"), "400"),
        (question(&long), "413"),
        (chunked.into_bytes(), "413"),
        (
            b"POST /ofrep/v1/evaluate/flags HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}"
                .to_vec(),
            "400",
        ),
        (b"nonsense\r\n\r\n".to_vec(), "400"),
    ] {
        let answer = raw(address, &request).await;
        let shown: String = answer.chars().take(300).collect();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{status}: {shown}");
        assert!(value(address).await);
    }
    // HTTP/2 speaks the same.
    let (mut client, connection) = hyper::client::conn::http2::handshake::<_, _, http_body_util::Full<bytes::Bytes>>(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(TcpStream::connect(address).await.unwrap()),
    )
    .await
    .unwrap();
    let driver = world.tree.start(orchestra_task::TaskKind::Connection, "client", async move {
        let _ = connection.await;
    });
    let request = http::Request::post(format!("http://{address}/ofrep/v1/evaluate/flags/editor"))
        .body(r#"{"context": {}}"#.into())
        .unwrap();
    assert_eq!(soon("HTTP/2", client.send_request(request)).await.unwrap().status(), 200);
    drop(client);
    drop(driver);
}
