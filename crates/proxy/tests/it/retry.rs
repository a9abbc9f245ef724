//! What is sent again, and what never is.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use orchestra_model::desired::Protocol;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::*;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Reads one request; `None` at the end of the connection.
async fn request(tcp: &mut tokio::net::TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        if tcp.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length =
                head.lines().find_map(|l| l.strip_prefix("content-length: ")).map_or(0, |l| l.parse().unwrap());
            if body.len() >= length {
                return Some(text);
            }
        }
    }
}

/// An instance that answers the first request of each connection and hangs up on the second after reading it.
async fn hangs_up_on_the_second() -> (Instance, Arc<AtomicU32>) {
    let seen = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&seen);
    let instance = Instance::raw(move |mut tcp| {
        let count = Arc::clone(&count);
        async move {
            if request(&mut tcp).await.is_some() {
                count.fetch_add(1, Ordering::SeqCst);
                tcp.write_all(OK).await.unwrap();
                if request(&mut tcp).await.is_some() {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    })
    .await;
    (instance, seen)
}

/// An instance that says this to the first request of each connection and closes without having announced it.
async fn closes_after_one(answer: &'static [u8]) -> (Instance, Arc<AtomicU32>) {
    let seen = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&seen);
    let instance = Instance::raw(move |mut tcp| {
        let count = Arc::clone(&count);
        async move {
            if request(&mut tcp).await.is_some() {
                count.fetch_add(1, Ordering::SeqCst);
                // Whoever did not wait for it has gone.
                let _ = tcp.write_all(answer).await;
            }
        }
    })
    .await;
    (instance, seen)
}

#[tokio::test]
async fn a_get_on_a_connection_that_ends_silently_is_sent_again() {
    let world = World::new().await;
    let (instance, seen) = hangs_up_on_the_second().await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h1(address).await.unwrap();
    for _ in 0..10 {
        assert_eq!(client.get("/").await.unwrap().text(), "ok");
    }
    // Every second try was lost on a reused connection and made again on a new one.
    assert_eq!((seen.load(Ordering::SeqCst), instance.connections()), (19, 10));
}

#[tokio::test]
async fn a_post_is_never_sent_twice() {
    let world = World::new().await;
    let (instance, seen) = hangs_up_on_the_second().await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h1(address).await.unwrap();
    let mut statuses = Vec::new();
    for _ in 0..6 {
        let reply = client.post("/", full("once")).await.unwrap();
        if reply.status == 502 {
            assert_eq!(reply.headers["x-orchestra-error"], "upstream");
            assert!(reply.text().starts_with("api: instance api-r1-1 gave no answer"), "{}", reply.text());
        }
        statuses.push(reply.status);
    }
    assert_eq!(statuses, [200, 502, 200, 502, 200, 502]);
    assert_eq!(seen.load(Ordering::SeqCst), 6, "each arrived exactly once");
    // An empty one as well.
    let before = seen.load(Ordering::SeqCst);
    let mut sent = 0;
    for _ in 0..4 {
        client.post("/", empty()).await.unwrap();
        sent += 1;
    }
    assert_eq!(seen.load(Ordering::SeqCst) - before, sent);
}

#[tokio::test]
async fn a_get_that_gets_no_answer_is_tried_as_often_as_the_route_says() {
    let world = World::new().await;
    let (instance, seen) = closes_after_one(b"").await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    assert_eq!(get(address, "/").await.unwrap().status, 502);
    assert_eq!(seen.load(Ordering::SeqCst), 3, "the first, and two more");
}

#[tokio::test]
async fn idle_connections_that_the_instance_closed_are_not_used() {
    let world = World::new().await;
    // Answers one request per connection and closes, as an expired keep-alive does.
    let (instance, seen) = closes_after_one(OK).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h1(address).await.unwrap();
    let before = instance.connections();
    for index in 0..50 {
        // The close is in the proxy's socket before the next request begins.
        soon("the instance is done", async {
            while seen.load(Ordering::SeqCst) < index {
                tokio::task::yield_now().await;
            }
        })
        .await;
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        assert_eq!(client.post("/", full("x")).await.unwrap().status, 200, "{index}");
    }
    assert_eq!((seen.load(Ordering::SeqCst), instance.connections() - before), (50, 50));
}

/// Law: a request that may be sent again is answered, and handled once, however soon it meets the end of a connection.
#[tokio::test]
async fn gets_outrun_the_ends_of_connections_unharmed() {
    const CLIENTS: u32 = 8;
    const EACH: u32 = 100;
    let world = World::new().await;
    let (instance, seen) = closes_after_one(OK).await;
    let address = world.serve(route("api", Protocol::Http, vec![endpoint(1, instance.address)])).await;
    let clients = (0..CLIENTS).map(|client| async move {
        let mut connection = Client::h1(address).await.unwrap();
        for index in 0..EACH {
            assert_eq!(connection.get("/").await.unwrap().status, 200, "{client}: {index}");
        }
    });
    soon("all of them", futures_util::future::join_all(clients)).await;
    assert_eq!(seen.load(Ordering::SeqCst), CLIENTS * EACH);
}

/// HTTP/2 by hand: enough to refuse and to go away. `behave` gets the stream and whether it is the first connection.
async fn h2_instance(refuse: fn(u32) -> Vec<u8>) -> (Instance, Arc<AtomicU32>) {
    let answered = Arc::new(AtomicU32::new(0));
    let (first, count) = (Arc::new(AtomicU32::new(0)), Arc::clone(&answered));
    let instance = Instance::raw(move |mut tcp| {
        let (first, count) = (Arc::clone(&first), Arc::clone(&count));
        async move {
            let mut preface = [0; 24];
            tcp.read_exact(&mut preface).await.unwrap();
            tcp.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            loop {
                let mut head = [0; 9];
                if tcp.read_exact(&mut head).await.is_err() {
                    return;
                }
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
                let mut payload = vec![0; length];
                tcp.read_exact(&mut payload).await.unwrap();
                match (head[3], head[4] & 1) {
                    (4, 0) => tcp.write_all(&[0, 0, 0, 4, 1, 0, 0, 0, 0]).await.unwrap(),
                    // The end of the request.
                    (0 | 1, 1) => {
                        if first.fetch_add(1, Ordering::SeqCst) == 0 {
                            tcp.write_all(&refuse(stream)).await.unwrap();
                        } else {
                            count.fetch_add(1, Ordering::SeqCst);
                            // HEADERS with `:status: 200` and the end of the stream.
                            let mut answer = vec![0, 0, 1, 1, 5];
                            answer.extend(stream.to_be_bytes());
                            answer.push(0x88);
                            tcp.write_all(&answer).await.unwrap();
                        }
                    }
                    _ => {}
                }
            }
        }
    })
    .await;
    (instance, answered)
}

async fn refused_then_answered(refuse: fn(u32) -> Vec<u8>) -> (u16, u32) {
    let world = World::new().await;
    let (instance, answered) = h2_instance(refuse).await;
    let address = world.serve(route("rpc", Protocol::H2c, vec![endpoint(1, instance.address)])).await;
    let mut client = Client::h2(address).await.unwrap();
    let reply = soon("a response", client.post("/", full("a body"))).await.unwrap();
    (reply.status, answered.load(Ordering::SeqCst))
}

#[tokio::test]
async fn a_refused_stream_is_sent_again_with_its_body() {
    let refused = |stream: u32| {
        let mut frame = vec![0, 0, 4, 3, 0];
        frame.extend(stream.to_be_bytes());
        frame.extend(7_u32.to_be_bytes());
        frame
    };
    assert_eq!(refused_then_answered(refused).await, (200, 1));
}

#[tokio::test]
async fn a_stream_behind_the_last_of_a_goaway_is_sent_again() {
    let goaway = |_: u32| vec![0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(refused_then_answered(goaway).await, (200, 1));
}

#[tokio::test]
async fn a_stream_that_was_begun_is_not_sent_again() {
    let cancelled = |stream: u32| {
        let mut frame = vec![0, 0, 4, 3, 0];
        frame.extend(stream.to_be_bytes());
        frame.extend(2_u32.to_be_bytes());
        frame
    };
    assert_eq!(refused_then_answered(cancelled).await, (502, 0));
    // A connection that goes away and says that it has handled the stream.
    let goaway = |stream: u32| {
        let mut frame = vec![0, 0, 8, 7, 0, 0, 0, 0, 0];
        frame.extend(stream.to_be_bytes());
        frame.extend(0_u32.to_be_bytes());
        // And then resets it.
        frame.extend([0, 0, 4, 3, 0]);
        frame.extend(stream.to_be_bytes());
        frame.extend(2_u32.to_be_bytes());
        frame
    };
    assert_eq!(refused_then_answered(goaway).await, (502, 0));
}
