//! TLS with clients: everything that works without, certificates that change, and clients that are up to no good.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use orchestra_model::{
    desired::Protocol,
    route::{ProxyEvent, Route},
    traffic::{CertificateReport, PortPolicy, Tls},
};
use orchestra_provider::{DataPlane as _, DataPlaneEvent};
use orchestra_task::{TaskKind, TaskTree};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, HandshakeKind, RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    cut::stalled,
    harness::*,
    protocols::{echo, websocket_echo},
    rest::{back, pauses},
};

mod commands;
mod hostile;
mod reload;
mod survive;

/// An authority, and files of what it issued.
struct Certificates {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl Certificates {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "authority of a test");
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("root.pem"), root.pem()).unwrap();
        Self { folder, root: root.der().clone(), issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Certificate and key in PEM.
    fn issue(&self, names: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// Puts a new pair in the place of the old one, file by file, as people do.
    fn write(&self, names: &[&str]) {
        let (certificate, key) = self.issue(names);
        std::fs::write(self.path("cert.pem"), certificate).unwrap();
        std::fs::write(self.path("key.pem"), key).unwrap();
    }

    /// The TLS of a route with these files.
    fn files(&self) -> Tls {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        Tls::Files { certificate: text(self.path("cert.pem")), key: text(self.path("key.pem")), named: None }
    }

    /// What a client makes connections with: trusts the authority, and nobody else.
    fn client(&self, alpn: &[&str]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone()).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

/// A route with TLS.
fn secured(route: Route, tls: Tls) -> Route {
    Route { policy: PortPolicy { tls: Some(tls), ..PortPolicy::default() }, ..route }
}

async fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, String> {
    connect_as(address, config, "localhost").await
}

async fn connect_as(
    address: SocketAddr,
    config: &Arc<ClientConfig>,
    name: &str,
) -> Result<TlsStream<TcpStream>, String> {
    let tcp = TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))?;
    let connector = TlsConnector::from(Arc::clone(config));
    let name = ServerName::try_from(name.to_owned()).unwrap();
    soon("a handshake", connector.connect(name, tcp)).await.map_err(|error| error.to_string())
}

/// A client of the protocol that both agreed on.
async fn client(address: SocketAddr, config: &Arc<ClientConfig>) -> Result<Client, String> {
    let tls = connect(address, config).await?;
    let tree = TaskTree::new();
    if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
        let executor = Executor(tree.clone());
        let handshake = hyper::client::conn::http2::handshake(executor, TokioIo::new(tls)).await;
        let (sender, connection) = handshake.map_err(|error| error.to_string())?;
        tree.start(TaskKind::Connection, "client", async move { connection.await.is_ok() });
        return Ok(Client::H2(sender));
    }
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await;
    let (sender, connection) = handshake.map_err(|error| error.to_string())?;
    tree.start(TaskKind::Connection, "client", async move { connection.with_upgrades().await.is_ok() });
    Ok(Client::H1(sender))
}

/// The names in the certificate that a connection was made with.
fn shown(tls: &TlsStream<TcpStream>) -> Vec<String> {
    orchestra_certificate::Facts::read(&tls.get_ref().1.peer_certificates().unwrap()[0]).unwrap().names
}

/// Waits for what the proxy reports of certificates.
async fn report(world: &mut World, wanted: impl Fn(&CertificateReport) -> bool) -> CertificateReport {
    let event = world
        .until(|event| matches!(event, DataPlaneEvent::Proxy(ProxyEvent::Certificate(report)) if wanted(report)))
        .await;
    let DataPlaneEvent::Proxy(ProxyEvent::Certificate(report)) = event else { panic!("{event:?}") };
    report
}

/// A sample of a metric of the route `api`.
async fn sample(world: &World, name: &str, label: &str) -> f64 {
    let page = world.handle.metrics().await.unwrap();
    let labels = format!("{{stack=\"demo\",environment=\"dev\",service=\"api\",port=\"main\"{label}}}");
    samples(&page, name).get(&labels).copied().unwrap_or_else(|| panic!("{name}{labels} is not in\n{page}"))
}

#[tokio::test]
async fn both_versions_of_http_are_agreed_on_and_instances_hear_of_https() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let mut world = World::new().await;
    let instance = Instance::http(echo).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    for (offered, version) in [
        (&["h2", "http/1.1"][..], Some(&b"h2"[..])),
        (&["http/1.1"], Some(b"http/1.1")),
        (&["http/1.1", "h2"], Some(b"h2")),
        (&[], None),
    ] {
        let config = certificates.client(offered);
        let tls = connect(address, &config).await.unwrap();
        assert_eq!(tls.get_ref().1.alpn_protocol(), version);
        let mut client = client(address, &config).await.unwrap();
        for _ in 0..3 {
            let reply = client.get("/a?b=c").await.unwrap();
            assert_eq!(reply.status, 200);
            let lines: Vec<&str> = reply.text().lines().collect();
            assert_eq!(lines[0], "GET /a?b=c HTTP/1.1");
            assert!(lines.contains(&"x-forwarded-proto: https"), "{lines:?}");
        }
        let reply = client.post("/", full(vec![7; 300_000])).await.unwrap();
        assert_eq!(reply.text().lines().last().unwrap(), "body 300000");
    }
    // Nothing agreed on, and HTTP/2 spoken all the same.
    let tls = connect(address, &certificates.client(&[])).await.unwrap();
    let tree = TaskTree::new();
    let handshake = hyper::client::conn::http2::handshake(Executor(tree.clone()), TokioIo::new(tls)).await;
    let (sender, connection) = handshake.unwrap();
    tree.start(TaskKind::Connection, "client", async move { connection.await.is_ok() });
    assert_eq!(Client::H2(sender).get("/").await.unwrap().status, 200);
    let served = report(&mut world, |report| report.not_after.is_some()).await;
    assert_eq!((served.problem, served.names), (None, vec!["localhost".to_owned()]));
    assert_eq!(sample(&world, "orchestra_proxy_tls_handshakes_total", ",outcome=\"done\"").await, 9.0);
    let expiry = sample(&world, "orchestra_proxy_tls_certificate_expiry_seconds", "").await;
    assert!(
        (expiry - f64::from(u32::try_from(served.not_after.unwrap()).unwrap_or(u32::MAX))).abs() < 1.0 || expiry > 4e9
    );
}

/// What is said before a response goes around hyper: it must go through TLS all the same, in order.
#[tokio::test]
async fn hints_and_continue_come_before_the_response() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\n";
    let instance = Instance::raw(move |mut tcp| async move {
        let (mut buffer, mut seen) = ([0; 8192], String::new());
        while let Ok(count @ 1..) = tcp.read(&mut buffer).await {
            seen.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
            while let Some(end) = seen.find("\r\n\r\nbody") {
                seen.drain(..end + 8);
                tcp.write_all(hints.as_bytes()).await.unwrap();
                let long = "x".repeat(100_000);
                let answer = format!("{hints}HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{long}", long.len());
                tcp.write_all(answer.as_bytes()).await.unwrap();
            }
        }
    })
    .await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let mut tls = connect(address, &certificates.client(&["http/1.1"])).await.unwrap();
    for _ in 0..3 {
        let head = "POST / HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
        tls.write_all(head.as_bytes()).await.unwrap();
        let mut seen = vec![0; 25];
        soon("100", tls.read_exact(&mut seen)).await.unwrap();
        assert_eq!(seen, b"HTTP/1.1 100 Continue\r\n\r\n");
        tls.write_all(b"body").await.unwrap();
        let mut answer = vec![0; hints.len() * 2];
        soon("103", tls.read_exact(&mut answer)).await.unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), hints.repeat(2));
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon("the head", tls.read_u8()).await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", String::from_utf8_lossy(&head));
        let mut body = vec![0; 100_000];
        soon("the body", tls.read_exact(&mut body)).await.unwrap();
        assert!(body.iter().all(|byte| *byte == b'x'));
    }
}

#[tokio::test]
async fn a_client_does_not_notice_that_its_connection_rests() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::http(back).await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    pauses(&mut connect(address, &certificates.client(&["http/1.1"])).await.unwrap()).await;
}

#[tokio::test]
async fn what_is_behind_grpc_is_offered_in_http2_alone() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::h2(echo).await;
    let plain = route("api", Protocol::Grpc, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let mut client = client(address, &certificates.client(&["h2"])).await.unwrap();
    let reply = client.get("/").await.unwrap();
    assert_eq!(reply.text().lines().next().unwrap(), "GET http://test.example/ HTTP/2.0");
    let refused = connect(address, &certificates.client(&["http/1.1"])).await.unwrap_err();
    assert!(refused.contains("NoApplicationProtocol"), "{refused}");
    // The client may hear of it before it is counted.
    soon("it is counted", async {
        while sample(&world, "orchestra_proxy_tls_handshakes_total", ",outcome=\"failed\"").await < 1.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn events_websockets_and_large_bodies_pass() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let (events, sender) = Instance::fed(false, "text/event-stream").await;
    let sockets = Instance::http(websocket_echo).await;
    let large = Instance::http(|_| async { Response::new(full(vec![b'x'; 20 << 20])) }).await;
    let routes = [("events", events.address), ("sockets", sockets.address), ("large", large.address)];
    let routes = routes.into_iter().zip(1..).map(|((name, instance), ordinal)| {
        secured(route(name, Protocol::Http, vec![endpoint(ordinal, instance)]), certificates.files())
    });
    let applied = world.apply(routes.collect()).await;
    let at = |name: &str| applied.addresses[&format!("demo/dev/{name}:main")];

    for alpn in ["h2", "http/1.1"] {
        let mut client = client(at("large"), &certificates.client(&[alpn])).await.unwrap();
        let reply = soon("20 MiB", client.get("/")).await.unwrap();
        assert_eq!(reply.body.len(), 20 << 20);
    }

    let mut stream = client(at("events"), &certificates.client(&["h2"])).await.unwrap();
    let mut stream = stream.send(Request::get("/").body(empty()).unwrap()).await.unwrap().into_body();
    for round in 0..5 {
        let event = format!("data: {round}\n\n");
        sender.send(Frame::data(Bytes::from(event.clone()))).await.unwrap();
        let frame = soon("an event before the next is sent", stream.frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), event);
    }
    drop(sender);
    assert_eq!(soon("the end", stream.collect()).await.unwrap().to_bytes(), "");

    let tls = connect(at("sockets"), &certificates.client(&["http/1.1"])).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("wss://localhost/", tls).await.unwrap();
    for text in ["one", "two"] {
        socket.send(Message::text(text)).await.unwrap();
        assert_eq!(soon("an echo", socket.next()).await.unwrap().unwrap(), Message::text(text));
    }
    socket.close(None).await.unwrap();
    assert!(matches!(soon("the end", socket.next()).await, Some(Ok(Message::Close(_))) | None));
}

#[tokio::test]
async fn tcp_is_spliced_and_one_side_may_finish_first() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::raw(|mut tcp| async move {
        // Answers only after the client has finished sending.
        let mut all = Vec::new();
        tcp.read_to_end(&mut all).await.unwrap();
        all.reverse();
        tcp.write_all(&all).await.unwrap();
    })
    .await;
    let plain = route("api", Protocol::Tcp, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let mut tls = connect(address, &certificates.client(&["h2"])).await.unwrap();
    assert_eq!(tls.get_ref().1.alpn_protocol(), None, "nothing is agreed on about bytes");
    let sent: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    tls.write_all(&sent).await.unwrap();
    tls.shutdown().await.unwrap();
    let mut received = Vec::new();
    soon("the answer", tls.read_to_end(&mut received)).await.unwrap();
    received.reverse();
    assert!(received == sent);
}

#[tokio::test]
async fn a_websocket_that_reads_nothing_holds_up_no_cut() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let mut world = World::new().await;
    let sent = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    let instance = Instance::raw(move |mut tcp| {
        let counted = Arc::clone(&counted);
        async move {
            let head = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
            let _ = tcp.read(&mut [0; 4096]).await;
            tcp.write_all(head).await.unwrap();
            let message = [&[0x82, 126, 0x27, 0x10][..], &[b'x'; 10_000]].concat();
            while tcp.write_all(&message).await.is_ok() {
                counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
    })
    .await;
    let only = endpoint(1, instance.address);
    let secured = |endpoint| secured(route("ws", Protocol::Http, vec![endpoint]), certificates.files());
    let address = world.serve(secured(only.clone())).await;
    let mut silent = connect(address, &certificates.client(&[])).await.unwrap();
    let asked = b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n";
    silent.write_all(asked).await.unwrap();
    stalled(&sent).await;
    world.apply(vec![secured(draining(&only))]).await;
    world.handle.cut(key(&only)).await.unwrap();
    world.drained(&key(&only)).await;
    drop(silent);
}

#[tokio::test]
async fn a_response_that_breaks_off_does_not_look_whole() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    // Without a length: only the end of the connection says where the response ends.
    let instance = Instance::raw(|mut tcp| async move {
        let mut request = [0; 1024];
        let _ = tcp.read(&mut request).await;
        tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of it").await.unwrap();
    })
    .await;
    let plain = route("api", Protocol::Http, vec![endpoint(1, instance.address)]);
    let address = world.serve(secured(plain, certificates.files())).await;
    let mut tls = connect(address, &certificates.client(&["http/1.1"])).await.unwrap();
    tls.write_all(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let end = soon("the end", tls.read_to_end(&mut answer)).await;
    assert!(end.is_err(), "it ended with a goodbye: {}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn a_second_connection_resumes_the_session_of_the_first() {
    let certificates = Certificates::new();
    certificates.write(&["localhost"]);
    let world = World::new().await;
    let instance = Instance::http(|_| async { text("x") }).await;
    let one = |name| secured(route(name, Protocol::Http, vec![endpoint(1, instance.address)]), certificates.files());
    let applied = world.apply(vec![one("api"), one("other")]).await;
    let at = |name: &str| applied.addresses[&format!("demo/dev/{name}:main")];
    for versions in [&[&rustls::version::TLS13], &[&rustls::version::TLS12]] {
        let mut roots = RootCertStore::empty();
        roots.add(certificates.root.clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let config = Arc::new(config);
        let kind = async |address| {
            let mut tls = connect(address, &config).await.unwrap();
            // Tickets come with the first answer.
            tls.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            soon("an answer", tls.read_to_end(&mut answer)).await.unwrap();
            assert!(answer.starts_with(b"HTTP/1.1 200"));
            tls.get_ref().1.handshake_kind().unwrap()
        };
        let full = |kind| matches!(kind, HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest);
        assert!(full(kind(at("api")).await));
        assert_eq!(kind(at("api")).await, HandshakeKind::Resumed);
        assert!(full(kind(at("other")).await), "a session of one route means nothing to another");
    }
    assert_eq!(sample(&world, "orchestra_proxy_tls_resumed_total", "").await, 2.0);
}

/// Where a program is that this machine may not have.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| Path::is_file(path));
    if found.is_none() {
        eprintln!("SKIPPED: there is no `{name}` on this machine");
    }
    found
}
