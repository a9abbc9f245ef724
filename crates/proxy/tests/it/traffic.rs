//! What is reported of traffic: evidence and load.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use orchestra_model::{
    desired::Protocol,
    quantity::Timespan,
    route::{ProxyEvent, Route},
    traffic::{
        Arm, LatencyHistogram, LoadReport, Permille, PortPolicy, RequestKey, Split, TrafficCell, TrafficReport, Watch,
    },
};
use orchestra_provider::DataPlaneEvent;
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::*;

/// A watch that reports often.
pub(crate) fn watch(id: u64) -> Watch {
    Watch { id, every: Timespan::millis(50), slow: None, first_byte: None, first_token: None }
}

/// Evidence of several reports.
#[derive(Debug, Default)]
pub(crate) struct Collected {
    pub(crate) cells: Vec<TrafficCell>,
    pub(crate) latency: LatencyHistogram,
    pub(crate) sequences: Vec<u64>,
}

impl Collected {
    fn add(&mut self, report: TrafficReport) {
        self.cells.extend(report.cells);
        self.latency.merge(&report.stable_latency);
        self.sequences.push(report.sequence);
    }

    fn requests(&self) -> u32 {
        self.cells.iter().map(|cell| cell.requests).sum()
    }
}

/// The next report of evidence.
pub(crate) async fn report(world: &mut World) -> TrafficReport {
    let wanted = |event: &DataPlaneEvent| matches!(event, DataPlaneEvent::Proxy(ProxyEvent::Traffic(_)));
    match world.until(wanted).await {
        DataPlaneEvent::Proxy(ProxyEvent::Traffic(report)) => report,
        _ => unreachable!("asked for"),
    }
}

/// Reports of a watch until they speak of so many requests.
pub(crate) async fn collect(world: &mut World, watch: u64, requests: u32) -> Collected {
    let mut all = Collected::default();
    soon("evidence", async {
        while all.requests() < requests {
            let report = report(world).await;
            if report.watch == watch {
                all.add(report);
            }
        }
    })
    .await;
    all
}

/// Reports of a watch until one says that nothing ended.
pub(crate) async fn heartbeat(world: &mut World, watch: u64) -> Collected {
    let mut all = Collected::default();
    loop {
        let report = report(world).await;
        if report.watch == watch {
            let empty = report.cells.is_empty();
            all.add(report);
            if empty {
                return all;
            }
        }
    }
}

/// A route whose every request goes to a canary, watched closely.
fn watched(protocol: Protocol, canary: &Instance) -> Route {
    let watch = Watch {
        slow: Some(Timespan::millis(600)),
        first_byte: Some(Timespan::millis(300)),
        first_token: Some(Timespan::millis(400)),
        ..watch(3)
    };
    Route {
        split: Split { canary: Some(Permille::ALL), watch: Some(watch), ..Split::default() },
        backends: vec![backend(2, Arm::Canary, 1, vec![endpoint(1, canary.address)])],
        ..route("api", protocol, vec![])
    }
}

/// What one request left behind: (bad, server, broken, slow, first byte, first token, client).
async fn mark(world: &mut World) -> [u32; 7] {
    let evidence = collect(world, 3, 1).await;
    let [cell] = &evidence.cells[..] else { panic!("{evidence:?}") };
    assert_eq!((cell.arm, cell.canary, cell.requests), (Arm::Canary, Permille::ALL, 1));
    assert_ne!(cell.client, 0);
    [
        cell.bad,
        cell.server_errors,
        cell.broken,
        cell.slow,
        cell.slow_first_byte,
        cell.slow_first_token,
        cell.client_failed,
    ]
}

const FINE: [u32; 7] = [0; 7];
const SERVER: [u32; 7] = [1, 1, 0, 0, 0, 0, 0];
const BROKEN: [u32; 7] = [1, 0, 1, 0, 0, 0, 0];
const SLOW: [u32; 7] = [1, 0, 0, 1, 0, 0, 0];
const LATE_HEAD: [u32; 7] = [1, 0, 0, 0, 1, 0, 0];
const LATE_TOKEN: [u32; 7] = [1, 0, 0, 0, 0, 1, 0];
const CLIENT: [u32; 7] = [0, 0, 0, 0, 0, 0, 1];

async fn pause(millis: u64) {
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

#[tokio::test]
async fn http_responses_are_judged_as_documented() {
    let mut world = World::new().await;
    let instance = Instance::http(|request| async move {
        let (sender, body) = fed();
        let path = request.uri().path().to_owned();
        let status: u16 = path[1..].parse().unwrap_or(200);
        let events = path.starts_with("/sse");
        let wait = if path == "/late" { 350 } else { 0 };
        pause(wait).await;
        let feed = async move {
            let send = |text: &'static str| sender.send(Frame::data(Bytes::from_static(text.as_bytes())));
            match &*path {
                "/slow" => pause(650).await,
                "/sse-late" => {
                    let _ = send(": still here\n\n").await;
                    pause(450).await;
                    let _ = send("data: 1\n\n").await;
                }
                "/sse-long" => {
                    let _ = send("data: 1\n\n").await;
                    pause(900).await;
                    let _ = send("data: 2\n\n").await;
                }
                "/sse-silent" => pause(60_000).await,
                _ => {}
            }
            let _ = send("text").await;
        };
        orchestra_task::TaskTree::new().start(orchestra_task::TaskKind::Connection, "feed", feed);
        let kind = if events { "text/event-stream" } else { "text/plain" };
        Response::builder().status(status).header("content-type", kind).body(body).unwrap()
    })
    .await;
    let address = world.serve(watched(Protocol::Http, &instance)).await;
    let cases = [
        ("/200", FINE),
        ("/302", FINE),
        ("/404", CLIENT),
        ("/429", CLIENT),
        ("/500", SERVER),
        ("/503", SERVER),
        ("/slow", SLOW),
        ("/late", LATE_HEAD),
        ("/sse-long", FINE),
        ("/sse-late", LATE_TOKEN),
    ];
    for (path, expected) in cases {
        get(address, path).await.unwrap();
        assert_eq!(mark(&mut world).await, expected, "{path}");
    }
    // Clients that give up: before a bound it is their affair, after it the instance's.
    for (path, after, expected) in
        [("/slow", 100, CLIENT), ("/sse-silent", 500, LATE_TOKEN), ("/sse-long", 100, CLIENT)]
    {
        let mut client = Client::h1(address).await.unwrap();
        let response = client.send(Request::get(path).body(empty()).unwrap()).await.unwrap();
        pause(after).await;
        drop((response, client));
        assert_eq!(mark(&mut world).await, expected, "{path} left after {after} ms");
    }
}

#[tokio::test]
async fn a_client_that_gives_up_on_a_silent_instance_is_evidence() {
    let mut world = World::new().await;
    let instance = Instance::http(|_| std::future::pending::<Response<AnyBody>>()).await;
    let address = world.serve(watched(Protocol::Http, &instance)).await;
    let both = [1, 0, 0, 1, 1, 0, 0];
    for (accept, after, expected) in [
        ("*/*", 50, CLIENT),
        ("*/*", 350, LATE_HEAD),
        ("*/*", 650, both),
        // A stream has no bound as a whole, but its first event has.
        ("text/event-stream", 650, [1, 0, 0, 0, 1, 1, 0]),
    ] {
        let asked = instance.requests();
        let mut tcp = TcpStream::connect(address).await.unwrap();
        tcp.write_all(format!("GET / HTTP/1.1\r\nhost: a\r\naccept: {accept}\r\n\r\n").as_bytes()).await.unwrap();
        soon("the request", async {
            while instance.requests() == asked {
                pause(2).await;
            }
        })
        .await;
        pause(after).await;
        drop(tcp);
        assert_eq!(mark(&mut world).await, expected, "{accept} after {after} ms");
    }
}

#[tokio::test]
async fn instances_that_break_off_are_told_from_clients_that_do() {
    let mut world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        let mut request = Vec::new();
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            if tcp.read_buf(&mut request).await.unwrap_or(0) == 0 {
                return;
            }
        }
        if request.starts_with(b"GET /half") {
            tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await.unwrap();
        } else if request.starts_with(b"GET /nonsense") {
            tcp.write_all(b"what?\r\n\r\n").await.unwrap();
        } else if request.starts_with(b"POST") {
            // Waits for the rest of a body that never comes.
            let _ = tcp.read_to_end(&mut request).await;
        }
    })
    .await;
    let address = world.serve(watched(Protocol::Http, &instance)).await;
    for path in ["/half", "/nonsense", "/silence"] {
        let _ = get(address, path).await;
        assert_eq!(mark(&mut world).await, BROKEN, "{path}");
    }
    let before = instance.connections();
    assert_eq!(before, 5, "silence was tried three times, and counted once");
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nhalf").await.unwrap();
    soon("the request", async {
        while instance.connections() == before {
            pause(2).await;
        }
    })
    .await;
    drop(tcp);
    assert_eq!(mark(&mut world).await, CLIENT, "an upload that was broken off");
}

#[tokio::test]
async fn grpc_is_judged_by_its_status() {
    let mut world = World::new().await;
    let instance = Instance::h2(|request| async move {
        let path = request.uri().path()[1..].to_owned();
        let (sender, body) = fed();
        let mut response = Response::builder().header("content-type", "application/grpc");
        if let Some(status) = path.strip_prefix("only-") {
            // Without a message: the status is in the head.
            response = response.header("grpc-status", status.to_owned());
        } else {
            sender.send(Frame::data(Bytes::from_static(&[0, 0, 0, 0, 1, 9]))).await.unwrap();
            if let Ok(status) = path.parse::<u32>() {
                let mut trailers = HeaderMap::new();
                trailers.insert("grpc-status", HeaderValue::from(status));
                sender.send(Frame::trailers(trailers)).await.unwrap();
            }
        }
        response.body(body).unwrap()
    })
    .await;
    let address = world.serve(watched(Protocol::Grpc, &instance)).await;
    let mut client = Client::h2(address).await.unwrap();
    let server = [2, 4, 12, 13, 14, 15].map(|status| (status.to_string(), SERVER));
    let client_side = [1, 3, 5, 6, 7, 8, 9, 10, 11, 16].map(|status| (status.to_string(), CLIENT));
    let others = [("0", FINE), ("only-0", FINE), ("only-14", SERVER), ("only-5", CLIENT), ("none", BROKEN)];
    let others = others.map(|(path, expected)| (path.to_owned(), expected));
    for (path, expected) in server.into_iter().chain(client_side).chain(others) {
        let request = Request::post(format!("/{path}")).header("content-type", "application/grpc");
        let response = client.send(request.body(full(vec![0; 5])).unwrap()).await.unwrap();
        let _ = response.into_body().collect().await;
        assert_eq!(mark(&mut world).await, expected, "{path}");
    }
}

#[tokio::test]
async fn evidence_survives_a_server_and_a_proxy_that_leaves() {
    let mut world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let mut client_of = None;
    let address = world.serve(watched(Protocol::Http, &instance)).await;
    let mut before = collect_after(&mut world, &mut client_of, address, 5).await;
    // Without a server.
    let home = world.close();
    for _ in 0..25 {
        client_of.as_mut().unwrap().get("/").await.unwrap();
    }
    let mut world = home.open().await;
    let after = collect(&mut world, 3, 25).await;
    assert_eq!(after.requests(), 25);
    before.sequences.extend(&after.sequences);
    let steps = before.sequences.windows(2);
    assert!(steps.clone().all(|pair| pair[0] < pair[1]), "{before:?}");
    assert!(after.sequences.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{after:?}");
    // A proxy that leaves ends what it has, and says so beside its successor. HTTP/2 clients are told to go.
    let mut h2 = Client::h2(address).await.unwrap();
    h2.get("/").await.unwrap();
    assert_eq!(collect(&mut world, 3, 1).await.requests(), 1);
    let (sender, body) = fed();
    let body = std::sync::Mutex::new(Some(body));
    let slow = Instance::http(move |_| {
        let body = body.lock().unwrap().take().unwrap_or_else(empty);
        async move { Response::builder().header("content-type", "text/event-stream").body(body).unwrap() }
    })
    .await;
    world.serve(watched(Protocol::Http, &slow)).await;
    let response = h2.send(Request::get("/").body(empty()).unwrap()).await.unwrap();
    sender.send(Frame::data(Bytes::from("data: 1\n\n"))).await.unwrap();
    kill(world.handle.pid().unwrap(), Signal::TERM);
    world.until(|event| matches!(event, DataPlaneEvent::Serving { .. })).await;
    soon("GOAWAY", async { while h2.get("/").await.is_ok() {} }).await;
    heartbeat(&mut world, 3).await;
    let last = report(&mut world).await.sequence;
    sender.send(Frame::data(Bytes::from("data: 2\n\n"))).await.unwrap();
    drop(sender);
    let text = soon("the end", response.into_body().collect()).await.unwrap().to_bytes();
    assert_eq!(text, "data: 1\n\ndata: 2\n\n");
    let ended = collect(&mut world, 3, 1).await;
    assert_eq!((ended.requests(), ended.cells[0].bad), (1, 0));
    assert!(ended.sequences.iter().zip(last + 1..).all(|(is, expected)| *is == expected), "{last}, {ended:?}");
}

async fn collect_after(
    world: &mut World,
    client: &mut Option<Client>,
    address: std::net::SocketAddr,
    count: u32,
) -> Collected {
    let client = client.insert(Client::h1(address).await.unwrap());
    for _ in 0..count {
        client.get("/").await.unwrap();
    }
    let all = collect(world, 3, count).await;
    assert_eq!(all.requests(), count);
    all
}

fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Without a server to take it, evidence of any number of clients stays small, and none of it is lost. (A hundred thousand
/// clients are in a unit test, without the traffic.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_bounded_whatever_the_number_of_clients() {
    const CLIENTS: u32 = 32_000;
    const CONNECTIONS: u32 = 8;
    let world = World::new().await;
    // Answers each request of a connection with as little work as possible.
    let instance = Instance::raw(|mut tcp| async move {
        let mut bytes = vec![0; 64 << 10];
        let mut seen = 0_u32;
        while let Ok(count @ 1..) = tcp.read(&mut bytes).await {
            let mut answers = 0;
            for byte in &bytes[..count] {
                // The end of a head, wherever it was cut.
                seen = match (seen, byte) {
                    (0 | 2, b'\r') | (1, b'\n') => seen + 1,
                    (3, b'\n') => {
                        answers += 1;
                        0
                    }
                    _ => 0,
                };
            }
            for _ in 0..answers {
                tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            }
        }
    })
    .await;
    let sticky = Some(RequestKey::Header("x-session".into()));
    let mut route = watched(Protocol::Http, &instance);
    route.policy = PortPolicy { sticky, ..PortPolicy::default() };
    let address = world.serve(route).await;
    let pid = world.handle.pid().unwrap();
    let home = world.close();
    get(address, "/").await.unwrap();
    let before = resident(pid);
    let flood = |first: u32| async move {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        let sessions = first..first + CLIENTS / CONNECTIONS;
        // Some at a time, so that neither side waits for the other with full buffers.
        for some in sessions.collect::<Vec<_>>().chunks(100) {
            let requests: Vec<String> =
                some.iter().map(|s| format!("GET / HTTP/1.1\r\nhost: a\r\nx-session: {s}\r\n\r\n")).collect();
            tcp.write_all(requests.concat().as_bytes()).await.unwrap();
            let (mut answers, mut bytes) = (0, vec![0; 16 << 10]);
            let mut rest = String::new();
            while answers < some.len() {
                let count = soon("answers", tcp.read(&mut bytes)).await.unwrap();
                assert_ne!(count, 0);
                rest.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
                while let Some(end) = rest.find("\r\n\r\n") {
                    assert!(rest.starts_with("HTTP/1.1 200"), "{rest}");
                    rest.drain(..end + 4);
                    answers += 1;
                }
            }
        }
    };
    join_all((0..CONNECTIONS).map(|index| flood(index * (CLIENTS / CONNECTIONS)))).await;
    let grown = resident(pid).saturating_sub(before);
    println!("{CLIENTS} clients: {grown} KiB more");
    assert!(grown < 16 << 10, "{grown} KiB");
    let mut world = home.open().await;
    let evidence = collect(&mut world, 3, CLIENTS + 1).await;
    assert_eq!(evidence.requests(), CLIENTS + 1);
    let told_apart = evidence.cells.len();
    assert!((900..=1_001 * evidence.sequences.len()).contains(&told_apart), "{told_apart}");
}

/// The next load of the route.
async fn load(world: &mut World) -> LoadReport {
    let wanted = |event: &DataPlaneEvent| matches!(event, DataPlaneEvent::Proxy(ProxyEvent::Load(_)));
    match world.until(wanted).await {
        DataPlaneEvent::Proxy(ProxyEvent::Load(report)) => report,
        _ => unreachable!("asked for"),
    }
}

/// Loads until one is as wanted; returns the sums of requests and tokens on the way, and the last.
async fn load_until(world: &mut World, wanted: impl Fn(&LoadReport) -> bool) -> (u64, u64, LoadReport) {
    let (mut requests, mut tokens) = (0, 0);
    soon("a load", async {
        loop {
            let load = load(world).await;
            requests += load.requests;
            tokens += load.tokens;
            if wanted(&load) {
                return (requests, tokens, load);
            }
        }
    })
    .await
}

#[tokio::test]
async fn load_tells_requests_streams_tokens_and_who_waits() {
    let mut world = World::new().await;
    let (sender, body) = fed();
    let body = std::sync::Mutex::new(Some(body));
    let instance = Arc::new(
        Instance::http(move |request| {
            let body = (request.uri() == "/sse").then(|| body.lock().unwrap().take().unwrap());
            async move {
                match body {
                    Some(body) => Response::builder().header("content-type", "text/event-stream").body(body).unwrap(),
                    None => text("x"),
                }
            }
        })
        .await,
    );
    let metered = |endpoints| Route { metered: true, ..route("api", Protocol::Http, endpoints) };
    let only = endpoint(1, instance.address);
    let address = world.serve(metered(vec![only.clone()])).await;
    // Also when there is nothing to say.
    let idle = load(&mut world).await;
    assert_eq!((idle.requests, idle.in_flight, idle.held), (0, 0, 0));
    for _ in 0..7 {
        get(address, "/").await.unwrap();
    }
    let mut client = Client::h1(address).await.unwrap();
    let stream = client.send(Request::get("/sse").body(empty()).unwrap()).await.unwrap();
    for _ in 0..3 {
        sender.send(Frame::data(Bytes::from("data: a\n\n: comment\n\ndata: b\n\n"))).await.unwrap();
    }
    let (mut requests, mut tokens) = (0, 0);
    soon("all that was counted", async {
        while requests < 8 || tokens < 6 {
            let load = load(&mut world).await;
            requests += load.requests;
            tokens += load.tokens;
            if requests == 8 {
                assert_eq!((load.in_flight, load.streams, load.held), (1, 1, 0));
            }
        }
    })
    .await;
    assert_eq!((requests, tokens), (8, 6));
    // A new server hears at once what is in flight.
    let mut world = world.reopen().await;
    let again = load(&mut world).await;
    assert_eq!((again.in_flight, again.streams, again.tokens_in_flight), (1, 1, 6));
    drop(sender);
    stream.into_body().collect().await.unwrap();
    let (_, _, over) = load_until(&mut world, |load| load.in_flight == 0 && load.tokens_in_flight == 0).await;
    assert_eq!(over.streams, 0);
    // No instance: whoever waits is told of at once, long before the next second.
    world.serve(metered(vec![])).await;
    load(&mut world).await;
    let began = std::time::Instant::now();
    let held = async {
        let (_, _, held) = load_until(&mut world, |load| load.held > 0).await;
        assert_eq!((held.held, held.in_flight), (1, 0));
        let took = began.elapsed();
        world.serve(metered(vec![only.clone()])).await;
        took
    };
    let (reply, took) = tokio::join!(get(address, "/"), held);
    assert_eq!(reply.unwrap().text(), "x");
    println!("held, and told after {took:?}");
    assert!(took < Duration::from_millis(700), "{took:?}");
    load_until(&mut world, |load| load.held == 0).await;
}
