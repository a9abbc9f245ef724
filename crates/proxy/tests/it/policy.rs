//! What a stack says of a port: limits, times, reading ahead, retries, ejection, breaker, fallback.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _, future::join_all};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use orchestra_model::{
    desired::Protocol,
    id::Name,
    quantity::{ByteSize, Timespan},
    route::{Endpoint, Route},
    traffic::{Arm, Breaker, Fallback, Outlier, Permille, PortPolicy, Retry, RouteLimits, RouteTimeouts, Split},
};
use orchestra_provider::DataPlane as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
};

use crate::harness::*;

fn with(policy: PortPolicy, route: Route) -> Route {
    Route { policy, ..route }
}

/// Sum of the samples of a metric that have all these parts in their labels.
async fn counted(world: &World, name: &str, parts: &[&str]) -> f64 {
    let page = world.handle.metrics().await.unwrap();
    let samples = samples(&page, name);
    samples.iter().filter(|(labels, _)| parts.iter().all(|part| labels.contains(part))).map(|(_, value)| value).sum()
}

/// An instance that answers with its own name.
async fn named(name: &'static str) -> Instance {
    Instance::http(move |_| async move { text(name) }).await
}

/// One that takes the whole body and says how long it was.
async fn counting() -> Instance {
    Instance::http(|request| async move {
        let size = request.into_body().collect().await.map(|body| body.to_bytes().len());
        size.map_or_else(|_| text("broken"), |size| text(format!("{size}")))
    })
    .await
}

/// An instance that holds every request until told to go on, and counts those under way.
async fn holding() -> (Instance, Arc<Notify>, Arc<AtomicU32>, Arc<AtomicU32>) {
    let (go, now, most) = (Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let shared = (Arc::clone(&go), Arc::clone(&now), Arc::clone(&most));
    let instance = Instance::http(move |_| {
        let (go, now, most) = shared.clone();
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            go.notified().await;
            now.fetch_sub(1, Ordering::SeqCst);
            text("done")
        }
    })
    .await;
    (instance, go, now, most)
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    soon(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

// === limits ===

#[tokio::test]
async fn a_body_that_is_too_long_is_refused_by_its_length_or_when_it_has_come() {
    let world = World::new().await;
    let instance = counting().await;
    let limits = RouteLimits { body: Some(ByteSize::bytes(100_000)), ..RouteLimits::default() };
    let policy = PortPolicy { limits, ..PortPolicy::default() };
    let address = world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(1, instance.address)]))).await;

    // Announced: before a byte of it was read, and without asking for it.
    let head = "POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 100001\r\n\r\n";
    let answer = raw(address, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("connection: close"), "{answer}");
    assert!(!answer.contains("100 Continue") && instance.requests() == 0, "{answer}");

    // Chunked: counted. All of it is sent though the answer comes early, and the answer arrives whole.
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
    for _ in 0..300 {
        tcp.write_all(b"400\r\n").await.unwrap();
        tcp.write_all(&[b'x'; 1024]).await.unwrap();
        tcp.write_all(b"\r\n").await.unwrap();
    }
    let mut answer = Vec::new();
    soon("the end", tcp.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("too_large"), "{answer}");
    assert!(answer.contains("api: the request's body is longer than 100000 bytes"), "{answer}");

    // HTTP/2: the stream ends, its connection lives.
    let mut h2 = Client::h2(address).await.unwrap();
    let (body, fed) = fed();
    let send = async {
        for _ in 0..200 {
            if body.send(Frame::data(Bytes::from(vec![0; 1024]))).await.is_err() {
                break;
            }
        }
        drop(body);
    };
    let (reply, ()) = tokio::join!(h2.post("/", fed), send);
    assert_eq!(reply.unwrap().status, 413);
    assert_eq!(h2.post("/", full(vec![0; 100_000])).await.unwrap().text(), "100000");
    assert_eq!(counted(&world, "orchestra_proxy_errors_total", &["too_large"]).await, 3.0);
}

#[tokio::test]
async fn one_client_gets_its_share_per_second_and_others_theirs() {
    let world = World::new().await;
    let instance = named("yes").await;
    let limits = RouteLimits { requests_per_second: Some(5), ..RouteLimits::default() };
    let policy = PortPolicy { limits, ..PortPolicy::default() };
    let address = world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(1, instance.address)]))).await;
    let mut client = Client::h1(address).await.unwrap();
    let began = Instant::now();
    let mut statuses = Vec::new();
    for _ in 0..20 {
        let reply = client.get("/").await.unwrap();
        if reply.status == 429 {
            assert_eq!(reply.headers["retry-after"], "1");
            assert_eq!(reply.headers["x-orchestra-error"], "rate_limited");
        }
        statuses.push(reply.status);
    }
    let passed = statuses.iter().filter(|status| **status == 200).count();
    let most = 5 + usize::try_from(began.elapsed().as_millis() * 5 / 1000).unwrap() + 1;
    assert!((5..=most).contains(&passed), "{statuses:?}");
    // Another connection of the same client is the same client; what a proxy on this machine says is another one.
    let other = Request::get("/").header("x-forwarded-for", "203.0.113.7").body(empty()).unwrap();
    assert_eq!(whole(client.send(other).await.unwrap()).await.unwrap().status, 200);
    let mut h2 = Client::h2(address).await.unwrap();
    let mut codes = Vec::new();
    for _ in 0..10 {
        let grpc = Request::post("/s/m").header("content-type", "application/grpc").body(empty()).unwrap();
        codes.push(h2.send(grpc).await.unwrap().headers().get("grpc-status").cloned());
    }
    assert!(codes.iter().flatten().any(|code| code == "8"), "{codes:?}");
    // Tokens come back.
    soon("a token", async {
        while get(address, "/").await.unwrap().status != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

// === times ===

#[tokio::test]
async fn a_silent_instance_is_given_up_and_cancelled() {
    let world = World::new().await;
    let cancelled = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&cancelled);
    let instance = Instance::http(move |_| {
        struct Told(Arc<AtomicBool>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let told = Told(Arc::clone(&seen));
        async move {
            let _told = told;
            std::future::pending::<Response<AnyBody>>().await
        }
    })
    .await;
    let timeouts = RouteTimeouts { first_byte: Timespan::millis(200), ..RouteTimeouts::default() };
    let policy = PortPolicy { timeouts, ..PortPolicy::default() };
    let address = world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(1, instance.address)]))).await;
    let began = Instant::now();
    let reply = get(address, "/").await.unwrap();
    assert_eq!((reply.status, &reply.headers["x-orchestra-error"]), (504, &http::HeaderValue::from_static("timeout")));
    assert_eq!(reply.text(), "api: instance api-r1-1 did not answer within 200ms\n");
    assert!(began.elapsed() >= Duration::from_millis(200));
    until("the instance hears of it", || cancelled.load(Ordering::SeqCst)).await;
    assert_eq!(instance.requests(), 1, "a timeout is not tried again");
}

#[tokio::test]
async fn a_response_that_takes_too_long_is_cut_and_a_stream_is_not() {
    let world = World::new().await;
    let instance = Instance::http(|request| async move {
        let stream = request.uri().path() == "/events";
        let (sender, body) = fed();
        orchestra_task::TaskTree::new().start(orchestra_task::TaskKind::Connection, "drip", async move {
            for _ in 0..8 {
                if sender.send(Frame::data(Bytes::from_static(b"data: x\n\n"))).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        let kind = if stream { "text/event-stream" } else { "text/plain" };
        Response::builder().header("content-type", kind).body(body).unwrap()
    })
    .await;
    let timeouts = RouteTimeouts { response: Timespan::millis(300), ..RouteTimeouts::default() };
    let policy = PortPolicy { timeouts, ..PortPolicy::default() };
    let address = world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(1, instance.address)]))).await;
    let began = Instant::now();
    get(address, "/").await.unwrap_err();
    assert!((300..800).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    assert_eq!(get(address, "/events").await.unwrap().text().matches("data: x").count(), 8);
    assert_eq!(counted(&world, "orchestra_proxy_errors_total", &["kind=\"timeout\""]).await, 1.0);
}

#[tokio::test]
async fn silence_ends_streams_in_their_own_way() {
    let world = World::new().await;
    let events = Instance::http(|request| async move {
        if request.uri().path() == "/ws" {
            return crate::protocols::websocket_echo(request).await;
        }
        let (sender, body) = fed();
        orchestra_task::TaskTree::new().start(orchestra_task::TaskKind::Connection, "a while", async move {
            for _ in 0..6 {
                sender.send(Frame::data(Bytes::from_static(b"data: x\n\n"))).await.unwrap();
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
            sender.closed().await;
        });
        Response::builder().header("content-type", "text/event-stream").body(body).unwrap()
    })
    .await;
    let timeouts = RouteTimeouts { idle: Timespan::millis(400), ..RouteTimeouts::default() };
    let policy = PortPolicy { timeouts, ..PortPolicy::default() };
    let address =
        world.serve(with(policy.clone(), route("api", Protocol::Http, vec![endpoint(1, events.address)]))).await;
    let began = Instant::now();
    let reply = get(address, "/events").await.unwrap();
    // What moves is no silence: it went on for longer than the bound.
    assert!(began.elapsed() >= Duration::from_millis(1_100), "{:?}", began.elapsed());
    assert_eq!(reply.text().matches("data: x").count(), 6);
    assert!(
        reply.text().ends_with("event: orchestra-drain\ndata: {\"reason\":\"nothing was sent for too long\"}\n\n"),
        "{}",
        reply.text()
    );
    // A WebSocket: one side is enough to keep it, then it is closed.
    let (mut socket, _) =
        tokio_tungstenite::client_async("ws://a/ws", TcpStream::connect(address).await.unwrap()).await.unwrap();
    for _ in 0..4 {
        socket.send("hello".into()).await.unwrap();
        socket.next().await.unwrap().unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let close = soon("a close frame", async {
        loop {
            if let Some(Ok(tokio_tungstenite::tungstenite::Message::Close(frame))) = socket.next().await {
                return frame.unwrap();
            }
        }
    })
    .await;
    assert_eq!((u16::from(close.code), close.reason.as_str()), (1001, "nothing was sent for too long"));
    // The other side of the goodbye is waited for, and counted then.
    soon("both are counted", async {
        while counted(&world, "orchestra_proxy_errors_total", &["kind=\"idle\""]).await < 2.0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

// === reading ahead ===

#[tokio::test]
async fn a_slow_upload_binds_no_instance() {
    let world = World::new().await;
    let instance = counting().await;
    let policy = PortPolicy { buffer: Some(ByteSize::bytes(64 << 10)), ..PortPolicy::default() };
    let address = world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(1, instance.address)]))).await;
    let mut slow = TcpStream::connect(address).await.unwrap();
    let head =
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 1000\r\n\r\n";
    slow.write_all(head.as_bytes()).await.unwrap();
    // Asked for at once.
    let mut line = [0; 25];
    soon("100 Continue", slow.read_exact(&mut line)).await.unwrap();
    assert_eq!(&line, b"HTTP/1.1 100 Continue\r\n\r\n");
    slow.write_all(&[b'x'; 500]).await.unwrap();
    assert_eq!(get(address, "/").await.unwrap().text(), "0");
    assert_eq!((instance.requests(), instance.connections()), (1, 1), "only the other request reached it");
    assert_eq!(counted(&world, "orchestra_proxy_in_flight", &[]).await, 0.0);
    slow.write_all(&[b'x'; 500]).await.unwrap();
    let mut answer = String::new();
    soon("the answer", slow.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("1000"), "{answer}");
    // Without a length as well, which it has then; and what is longer passes as it comes.
    let mut client = Client::h1(address).await.unwrap();
    for size in [10_usize, 70_000, 500_000] {
        let (body, fed) = fed();
        let send = async {
            for piece in vec![0_u8; size].chunks(10_000) {
                body.send(Frame::data(Bytes::copy_from_slice(piece))).await.unwrap();
            }
            drop(body);
        };
        let (reply, ()) = tokio::join!(client.post("/", fed), send);
        assert_eq!(reply.unwrap().text(), size.to_string());
    }
    assert_eq!(client.post("/", full(vec![1; 300_000])).await.unwrap().text(), "300000");
}

#[tokio::test]
async fn a_client_that_leaves_or_sends_too_much_while_it_is_read_ahead_reaches_nobody() {
    let world = World::new().await;
    let instance = counting().await;
    let limits = RouteLimits { body: Some(ByteSize::bytes(1_000)), ..RouteLimits::default() };
    let policy = PortPolicy { buffer: Some(ByteSize::bytes(64 << 10)), limits, ..PortPolicy::default() };
    let address = world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(1, instance.address)]))).await;
    let mut gone = TcpStream::connect(address).await.unwrap();
    gone.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nabc").await.unwrap();
    drop(gone);
    let long = format!(
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n7d0\r\n{}\r\n0\r\n\r\n",
        "x".repeat(2_000)
    );
    let answer = raw(address, long.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(get(address, "/").await.unwrap().text(), "0");
    assert_eq!(instance.requests(), 1);
}

// === retries ===

/// An instance that reads a request and closes.
async fn silent() -> (Instance, Arc<AtomicU32>) {
    let seen = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&seen);
    let instance = Instance::raw(move |mut tcp| {
        let count = Arc::clone(&count);
        async move {
            let mut buffer = [0; 4096];
            if tcp.read(&mut buffer).await.is_ok_and(|read| read > 0) {
                count.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await;
    (instance, seen)
}

fn no_ejection() -> Outlier {
    Outlier { failures: 0, ..Outlier::default() }
}

#[tokio::test]
async fn idempotent_requests_go_to_another_instance_and_others_fail_once() {
    let world = World::new().await;
    let (bad, seen) = silent().await;
    let good = counting().await;
    let policy = PortPolicy {
        retry: Retry { attempts: 1, budget_percent: 100 },
        outlier: no_ejection(),
        ..PortPolicy::default()
    };
    let endpoints = vec![endpoint(1, bad.address), endpoint(2, good.address)];
    let address = world.serve(with(policy, route("api", Protocol::Http, endpoints))).await;
    let mut client = Client::h1(address).await.unwrap();
    for _ in 0..40 {
        assert_eq!(client.get("/").await.unwrap().status, 200);
        let put = Request::put("/").body(full("again")).unwrap();
        assert_eq!(whole(client.send(put).await.unwrap()).await.unwrap().text(), "5");
    }
    let tried = seen.load(Ordering::SeqCst);
    assert!(tried > 10, "{tried} went to the bad one first");
    assert_eq!(counted(&world, "orchestra_proxy_retries_total", &["no_answer"]).await, f64::from(tried));
    let mut failed = 0;
    for _ in 0..40 {
        failed += u32::from(client.post("/", full("once")).await.unwrap().status == 502);
    }
    assert!(failed > 5 && seen.load(Ordering::SeqCst) == tried + failed, "{failed}");
}

#[tokio::test]
async fn retries_end_with_the_attempts_and_with_the_budget() {
    let world = World::new().await;
    let (bad, seen) = silent().await;
    let policy = |attempts| PortPolicy {
        retry: Retry { attempts, budget_percent: 0 },
        outlier: no_ejection(),
        ..PortPolicy::default()
    };
    let endpoints = vec![endpoint(1, bad.address)];
    let address = world.serve(with(policy(3), route("api", Protocol::Http, endpoints.clone()))).await;
    assert_eq!(get(address, "/").await.unwrap().status, 502);
    assert_eq!(seen.load(Ordering::SeqCst), 4);
    // Ten in ten seconds, whatever the share is.
    for _ in 0..10 {
        assert_eq!(get(address, "/").await.unwrap().status, 502);
    }
    assert_eq!(seen.load(Ordering::SeqCst), 4 + 10 + 7);
    assert!(counted(&world, "orchestra_proxy_retry_budget_exhausted_total", &[]).await >= 7.0);
    world.serve(with(policy(0), route("api", Protocol::Http, endpoints))).await;
    get(address, "/").await.unwrap();
    assert_eq!(seen.load(Ordering::SeqCst), 4 + 10 + 7 + 1);
}

// === ejection ===

/// An instance that fails as long as it is told to.
async fn failing(name: &'static str) -> (Instance, Arc<AtomicBool>) {
    let bad = Arc::new(AtomicBool::new(true));
    let shared = Arc::clone(&bad);
    let instance = Instance::http(move |_| {
        let status = if shared.load(Ordering::SeqCst) { 500 } else { 200 };
        async move { Response::builder().status(status).body(full(name)).unwrap() }
    })
    .await;
    (instance, bad)
}

#[tokio::test]
async fn an_instance_that_fails_is_left_out_for_a_while_and_comes_back() {
    let world = World::new().await;
    let (sick, bad) = failing("sick").await;
    let well = named("well").await;
    let outlier = Outlier { failures: 3, eject_for: Timespan::millis(700), ..Outlier::default() };
    let policy = PortPolicy { outlier, ..PortPolicy::default() };
    let endpoints = vec![endpoint(1, sick.address), endpoint(2, well.address)];
    let address = world.serve(with(policy, route("api", Protocol::Http, endpoints))).await;
    let mut client = Client::h1(address).await.unwrap();
    let mut failed = 0;
    for _ in 0..200 {
        failed += u32::from(client.get("/").await.unwrap().status == 500);
    }
    // Two round robins of luck apart, three failures are seen in each ejection.
    assert!((3..=9).contains(&failed), "{failed}");
    assert!(counted(&world, "orchestra_proxy_ejections_total", &["release=\"1\""]).await >= 1.0);
    let ejected = soon("the first to be out", async {
        loop {
            client.get("/").await.unwrap();
            if let Some(ejection) = world.handle.standing().await.unwrap().ejected.pop() {
                break ejection;
            }
        }
    })
    .await;
    assert_eq!(ejected.instance.to_string(), "api-r1-1");
    assert!(ejected.route.port.as_str() == "main" && ejected.left > Timespan::default(), "{ejected:?}");
    bad.store(false, Ordering::SeqCst);
    let before = sick.requests();
    soon("it is back", async {
        while sick.requests() < before + 20 {
            client.get("/").await.unwrap();
        }
    })
    .await;
    assert_eq!(counted(&world, "orchestra_proxy_ejected", &["api-r1-1"]).await, 0.0);
}

#[tokio::test]
async fn not_more_than_the_share_is_ejected_and_one_alone_never() {
    let world = World::new().await;
    let (one, _) = failing("one").await;
    let (two, _) = failing("two").await;
    let outlier = Outlier { failures: 2, eject_for: Timespan::seconds(60), ..Outlier::default() };
    let policy = PortPolicy { outlier, ..PortPolicy::default() };
    let both = vec![endpoint(1, one.address), endpoint(2, two.address)];
    let address = world.serve(with(policy.clone(), route("api", Protocol::Http, both))).await;
    for _ in 0..30 {
        assert_eq!(get(address, "/").await.unwrap().status, 500);
    }
    assert_eq!(counted(&world, "orchestra_proxy_ejected", &[]).await, 1.0);
    // What is said of them says which.
    let status = get(world.handle.admin_address().unwrap(), "/status").await.unwrap();
    let status: serde_json::Value = serde_json::from_slice(&status.body).unwrap();
    let ejected = &status["routes"][0]["ejected"];
    assert!(ejected[0]["instance"].as_str().unwrap().starts_with("api-r1-"), "{status}");
    assert!(ejected[0]["for_ms"].as_u64().unwrap() > 50_000, "{status}");
    // The one that is left leaves: then the ejected one answers rather than nobody.
    let left = if ejected[0]["instance"] == "api-r1-1" { &one } else { &two };
    let ordinal = if ejected[0]["instance"] == "api-r1-1" { 1 } else { 2 };
    let before = left.requests();
    world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(ordinal, left.address)]))).await;
    assert_eq!(get(address, "/").await.unwrap().status, 500);
    assert_eq!(left.requests(), before + 1);
}

#[tokio::test]
async fn ejection_moves_nothing_from_one_arm_to_the_other() {
    let world = World::new().await;
    let stable = named("stable").await;
    let (sick, _) = failing("sick").await;
    let well = named("canary").await;
    let outlier = Outlier { failures: 2, eject_for: Timespan::seconds(60), ..Outlier::default() };
    let canaries = vec![
        Endpoint { instance: "api-r2-1".parse().unwrap(), ..endpoint(1, sick.address) },
        Endpoint { instance: "api-r2-2".parse().unwrap(), ..endpoint(1, well.address) },
    ];
    let both = Route {
        policy: PortPolicy { outlier, ..PortPolicy::default() },
        split: Split { canary: Some(Permille::new(500)), ..Split::default() },
        backends: vec![
            backend(1, Arm::Stable, 1000, vec![endpoint(1, stable.address)]),
            backend(2, Arm::Canary, 1000, canaries),
        ],
        ..route("api", Protocol::Http, vec![])
    };
    let address = world.serve(both).await;
    let mut client = Client::h1(address).await.unwrap();
    let mut of_canary = 0;
    for _ in 0..1_000 {
        let reply = client.get("/").await.unwrap();
        of_canary += u32::from(reply.headers["orchestra-release"] == "2");
    }
    assert_eq!(counted(&world, "orchestra_proxy_ejected", &["release=\"2\""]).await, 1.0);
    assert!((420..580).contains(&of_canary), "{of_canary}");
    assert!(sick.requests() < 10, "{}", sick.requests());
    // Both canaries gone bad: only one may be out, and the arm keeps its share.
    assert!((420..580).contains(&(1_000 - stable.requests())), "{}", stable.requests());
}

// === breaker ===

#[tokio::test]
async fn full_instances_let_requests_wait_in_order_and_bounded() {
    let world = World::new().await;
    let (instance, go, under_way, most) = holding().await;
    let breaker = Breaker { per_instance: 2, total: 0 };
    let policy = PortPolicy { breaker, ..PortPolicy::default() };
    let small = Route { hold_limit: 6, ..route("api", Protocol::Http, vec![endpoint(1, instance.address)]) };
    let address = world.serve(with(policy, small)).await;
    let requests = join_all((0..12).map(|_| get(address, "/")));
    let open = async {
        until("two are under way", || under_way.load(Ordering::SeqCst) == 2).await;
        soon("six wait", async {
            while counted(&world, "orchestra_proxy_service_holding", &[]).await < 6.0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        let began = Instant::now();
        for done in 0..8 {
            go.notify_one();
            let left = (8 - done - 1).min(2);
            until("the next one begins", || {
                under_way.load(Ordering::SeqCst) == left && instance.requests() == (done + 3).min(8)
            })
            .await;
        }
        // Woken by the end of another, and not by looking.
        assert!(began.elapsed() < Duration::from_millis(1_500), "{:?}", began.elapsed());
    };
    let (replies, ()) = tokio::join!(requests, open);
    let statuses: Vec<u16> = replies.iter().map(|reply| reply.as_ref().unwrap().status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 8, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|status| **status == 503).count(), 4, "{statuses:?}");
    let refused = replies.iter().flatten().find(|reply| reply.status == 503).unwrap();
    assert!(refused.text().contains("every instance has 2 requests in flight"), "{}", refused.text());
    assert_eq!(most.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn the_total_refuses_at_once() {
    let world = World::new().await;
    let (instance, go, under_way, _) = holding().await;
    let breaker = Breaker { per_instance: 0, total: 3 };
    let policy = PortPolicy { breaker, ..PortPolicy::default() };
    let address = world.serve(with(policy, route("api", Protocol::Http, vec![endpoint(1, instance.address)]))).await;
    let three = join_all((0..3).map(|_| get(address, "/")));
    let check = async {
        until("three are under way", || under_way.load(Ordering::SeqCst) == 3).await;
        let reply = get(address, "/").await.unwrap();
        assert_eq!((reply.status, &reply.headers["retry-after"]), (503, &http::HeaderValue::from_static("1")));
        assert_eq!(reply.headers["x-orchestra-error"], "breaker");
        (0..3).for_each(|_| go.notify_one());
    };
    let (replies, ()) = tokio::join!(three, check);
    assert!(replies.into_iter().all(|reply| reply.unwrap().status == 200));
    go.notify_one();
    assert_eq!(get(address, "/").await.unwrap().status, 200, "places come back");
}

// === fallback ===

fn falls_back(to: &str) -> PortPolicy {
    let fallback = Fallback { service: to.parse::<Name>().unwrap(), port: "main".parse().unwrap() };
    PortPolicy { fallback: Some(fallback), ..PortPolicy::default() }
}

fn at(ordinal: u32, service: &str, instance: &Instance) -> Endpoint {
    let instance_id = format!("{service}-r1-{ordinal}").parse().unwrap();
    Endpoint { instance: instance_id, ..endpoint(ordinal, instance.address) }
}

#[tokio::test]
async fn another_service_answers_while_there_is_no_instance() {
    let world = World::new().await;
    let (main, spare) = (named("main").await, named("spare").await);
    let api = |endpoints| with(falls_back("static"), route("api", Protocol::Http, endpoints));
    let other = route("static", Protocol::Http, vec![at(1, "static", &spare)]);
    let id = api(vec![]).id;
    let address = world.apply(vec![api(vec![]), other.clone()]).await.address(&id).unwrap();
    let began = Instant::now();
    let reply = get(address, "/").await.unwrap();
    assert_eq!(
        (reply.text(), &reply.headers["orchestra-fallback"]),
        ("spare", &http::HeaderValue::from_static("static"))
    );
    assert!(began.elapsed() < Duration::from_secs(2), "at once");
    assert_eq!(counted(&world, "orchestra_proxy_fallbacks_total", &["service=\"api\""]).await, 1.0);
    // As soon as there is one, it answers; and one that refuses connections is none.
    world.apply(vec![api(vec![at(1, "api", &main)]), other.clone()]).await;
    let reply = get(address, "/").await.unwrap();
    assert_eq!((reply.text(), reply.headers.get("orchestra-fallback")), ("main", None));
    main.stop();
    soon("its listener is closed", async { while TcpStream::connect(main.address).await.is_ok() {} }).await;
    assert_eq!(get(address, "/").await.unwrap().text(), "spare");
}

#[tokio::test]
async fn fallbacks_make_no_chains_and_no_circles() {
    let world = World::new().await;
    let third = named("third").await;
    let hold = |route: Route| Route { hold: Timespan::millis(300), ..route };
    let api = hold(with(falls_back("static"), route("api", Protocol::Http, vec![])));
    // It falls back itself: to a third one, and to the first.
    for to in ["third", "api", "static", "nobody"] {
        let middle = hold(with(falls_back(to), route("static", Protocol::Http, vec![])));
        let last = route("third", Protocol::Http, vec![at(1, "third", &third)]);
        let id = api.id.clone();
        let address = world.apply(vec![api.clone(), middle, last]).await.address(&id).unwrap();
        let reply = get(address, "/").await.unwrap();
        assert_eq!(
            (reply.status, &reply.headers["x-orchestra-error"]),
            (503, &http::HeaderValue::from_static("hold_timeout")),
            "{to}"
        );
    }
    assert_eq!(third.requests(), 0);
}

#[tokio::test]
async fn a_paused_or_busy_service_does_not_fall_back() {
    let world = World::new().await;
    let (main, spare) = (named("main").await, named("spare").await);
    let other = route("static", Protocol::Http, vec![at(1, "static", &spare)]);
    let paused = Route {
        split: Split { paused: true, ..Split::default() },
        hold: Timespan::millis(200),
        ..with(falls_back("static"), route("api", Protocol::Http, vec![at(1, "api", &main)]))
    };
    let id = paused.id.clone();
    let address = world.apply(vec![paused, other.clone()]).await.address(&id).unwrap();
    assert_eq!(get(address, "/").await.unwrap().status, 503);
    let (busy, go, under_way, _) = holding().await;
    let policy = PortPolicy { breaker: Breaker { per_instance: 1, total: 0 }, ..falls_back("static") };
    let full = with(policy, route("api", Protocol::Http, vec![at(2, "api", &busy)]));
    world.apply(vec![full, other]).await;
    let both = join_all((0..2).map(|_| get(address, "/")));
    let open = async {
        until("one is under way", || under_way.load(Ordering::SeqCst) == 1).await;
        go.notify_one();
        until("the other one", || busy.requests() == 2 && under_way.load(Ordering::SeqCst) == 1).await;
        go.notify_one();
    };
    let (replies, ()) = tokio::join!(both, open);
    assert!(replies.into_iter().all(|reply| reply.unwrap().text() == "done"));
    assert_eq!(spare.requests(), 0);
}
