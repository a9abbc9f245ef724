//! A home with a proxy, tables made in one line, instances made of closures, and clients that say what they saw.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use orchestra_model::{
    desired::{Drain, Protocol},
    id::ReleaseNumber,
    quantity::Timespan,
    route::{Backend, Endpoint, EndpointKey, EndpointState, ProxyEvent, Route, RouteId, RouteTable},
    traffic::{Arm, PortPolicy, Split},
};
use orchestra_provider::{Applied, DataPlane as _, DataPlaneError, DataPlaneEvent};
use orchestra_proxy::{Options, ProxyHandle};
use orchestra_task::{TaskKind, TaskTree};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

/// Everything that must happen happens within this time, also on a loaded machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Waits, but not for ever.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("not within {DEADLINE:?}: {what}"))
}

/// A home with a proxy.
pub(crate) struct World {
    home: Arc<tempfile::TempDir>,
    pub(crate) tree: TaskTree,
    pub(crate) handle: ProxyHandle,
    events: mpsc::Receiver<DataPlaneEvent>,
    version: AtomicU64,
    pids: Arc<Pids>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tree.cancel();
        // Also one whose report was never read.
        self.pids.0.lock().unwrap().extend(self.handle.pid());
    }
}

/// A home without a server.
pub(crate) struct Home(Arc<tempfile::TempDir>, Arc<Pids>);

impl Home {
    /// Opens a new server on it.
    pub(crate) async fn open(self) -> World {
        World::at(self.0, self.1, options).await
    }
}

/// Proxies that were started, killed when the last world of a home is dropped.
#[derive(Default)]
struct Pids(std::sync::Mutex<Vec<u32>>);

impl Drop for Pids {
    fn drop(&mut self) {
        for pid in self.0.lock().unwrap().drain(..) {
            // Only our own: the command line names this program, and nobody else got the number since.
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if command.starts_with(env!("CARGO_BIN_EXE_orchestra-proxy").as_bytes()) {
                kill(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

pub(crate) fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, signal);
}

pub(crate) fn options(home: &Path) -> Options {
    Options::new(home, env!("CARGO_BIN_EXE_orchestra-proxy"))
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::at(Arc::new(tempfile::tempdir().unwrap()), Arc::default(), options).await
    }

    /// With other options for a home.
    pub(crate) async fn with(options: impl Fn(&Path) -> Options) -> Self {
        Self::at(Arc::new(tempfile::tempdir().unwrap()), Arc::default(), options).await
    }

    async fn at(home: Arc<tempfile::TempDir>, pids: Arc<Pids>, options: impl Fn(&Path) -> Options) -> Self {
        let tree = TaskTree::new();
        let handle = soon("open", ProxyHandle::open(options(home.path()), &tree)).await.unwrap();
        pids.0.lock().unwrap().push(handle.pid().unwrap());
        let events = handle.take_events().unwrap();
        assert!(handle.take_events().is_none());
        let version = handle.table().await.unwrap().map_or(0, |(table, _)| table.version);
        Self { home, tree, handle, events, version: AtomicU64::new(version), pids }
    }

    /// Drops the handle as a killed server would; what is returned keeps the home.
    pub(crate) fn close(self) -> Home {
        Home(Arc::clone(&self.home), Arc::clone(&self.pids))
    }

    /// Drops the handle as a killed server would, and opens a new one.
    pub(crate) async fn reopen(self) -> Self {
        self.close().open().await
    }

    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// Applies routes as the next version.
    pub(crate) async fn try_apply(&self, routes: Vec<Route>) -> Result<Applied, DataPlaneError> {
        let version = self.version.fetch_add(1, Ordering::SeqCst) + 1;
        soon("apply", self.handle.apply(RouteTable { version, routes })).await
    }

    pub(crate) async fn apply(&self, routes: Vec<Route>) -> Applied {
        self.try_apply(routes).await.unwrap()
    }

    /// Applies one route and returns where it listens.
    pub(crate) async fn serve(&self, route: Route) -> SocketAddr {
        let id = route.id.clone();
        self.apply(vec![route]).await.address(&id).unwrap()
    }

    /// The next report.
    pub(crate) async fn event(&mut self) -> DataPlaneEvent {
        let event = soon("an event", self.events.recv()).await.unwrap();
        if let DataPlaneEvent::Serving { pid } = event {
            self.pids.0.lock().unwrap().push(pid);
        }
        event
    }

    /// A report that is there already.
    pub(crate) fn event_now(&mut self) -> Option<DataPlaneEvent> {
        self.events.try_recv().ok()
    }

    /// Waits for a report, passing over others.
    pub(crate) async fn until(&mut self, wanted: impl Fn(&DataPlaneEvent) -> bool) -> DataPlaneEvent {
        loop {
            let event = self.event().await;
            if wanted(&event) {
                return event;
            }
        }
    }

    pub(crate) async fn drained(&mut self, endpoint: &EndpointKey) {
        let wanted = DataPlaneEvent::Proxy(ProxyEvent::Drained { endpoint: endpoint.clone() });
        self.until(|event| *event == wanted).await;
    }
}

/// A route of service `name` that holds for five seconds.
pub(crate) fn route(name: &str, protocol: Protocol, endpoints: Vec<Endpoint>) -> Route {
    Route {
        id: RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: name.parse().unwrap(),
            port: "main".parse().unwrap(),
        },
        listen: ([127, 0, 0, 1], 0).into(),
        protocol,
        hold: Timespan::seconds(5),
        hold_limit: 100,
        drain: Drain { requests: Timespan::seconds(30), streams: Timespan::seconds(30) },
        policy: PortPolicy::default(),
        split: Split::default(),
        metered: false,
        backends: vec![backend(1, Arm::Stable, 1000, endpoints)],
        flags: None,
    }
}

/// A group of instances of this release on this arm.
pub(crate) fn backend(release: u64, arm: Arm, weight: u32, endpoints: Vec<Endpoint>) -> Backend {
    Backend { release: ReleaseNumber(release), arm, weight, endpoints }
}

/// Instance `ordinal` of release 1, active.
pub(crate) fn endpoint(ordinal: u32, address: SocketAddr) -> Endpoint {
    let instance = format!("api-r1-{ordinal}").parse().unwrap();
    Endpoint { instance, attempt: 1, address, state: EndpointState::Active }
}

pub(crate) fn draining(endpoint: &Endpoint) -> Endpoint {
    Endpoint { state: EndpointState::Draining, ..endpoint.clone() }
}

pub(crate) fn key(endpoint: &Endpoint) -> EndpointKey {
    EndpointKey {
        environment: "demo/dev".parse().unwrap(),
        instance: endpoint.instance.clone(),
        attempt: endpoint.attempt,
    }
}

pub(crate) type AnyBody = BoxBody<Bytes, io::Error>;
type Handler = Arc<dyn Fn(Request<Incoming>) -> Pin<Box<dyn Future<Output = Response<AnyBody>> + Send>> + Send + Sync>;

/// An instance in this process.
pub(crate) struct Instance {
    pub(crate) address: SocketAddr,
    /// Requests that it got.
    pub(crate) requests: Arc<AtomicU32>,
    /// Connections that it accepted.
    pub(crate) connections: Arc<AtomicU32>,
    tree: TaskTree,
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.tree.cancel();
    }
}

impl Instance {
    pub(crate) async fn http<F, R>(handler: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
        R: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        Self::start(false, handler).await
    }

    pub(crate) async fn h2<F, R>(handler: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
        R: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        Self::start(true, handler).await
    }

    /// Answers its first request with a body that is fed by hand, and every other one with `short`.
    pub(crate) async fn busy() -> (Self, mpsc::Sender<Frame<Bytes>>) {
        let (sender, body) = fed();
        let body = std::sync::Mutex::new(Some(body));
        let instance = Self::http(move |_| {
            let body = body.lock().unwrap().take();
            async move { body.map_or_else(|| text("short"), Response::new) }
        });
        (instance.await, sender)
    }

    /// Answers one request, with a body of this type that is fed by hand.
    pub(crate) async fn fed(h2: bool, kind: &'static str) -> (Self, mpsc::Sender<Frame<Bytes>>) {
        let (sender, body) = fed();
        let body = std::sync::Mutex::new(Some(body));
        let handler = move |_| {
            let body = body.lock().unwrap().take().unwrap();
            async move { Response::builder().header("content-type", kind).body(body).unwrap() }
        };
        (Self::start(h2, handler).await, sender)
    }

    async fn start<F, R>(h2: bool, handler: F) -> Self
    where
        F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
        R: Future<Output = Response<AnyBody>> + Send + 'static,
    {
        let requests = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&requests);
        let handler: Handler = Arc::new(move |request| {
            counted.fetch_add(1, Ordering::SeqCst);
            Box::pin(handler(request))
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tree = TaskTree::new();
        let connections = Arc::new(AtomicU32::new(0));
        let (accepted, children) = (Arc::clone(&connections), tree.clone());
        tree.start(TaskKind::Connection, "instance", async move {
            while let Ok((tcp, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::SeqCst);
                tcp.set_nodelay(true).unwrap();
                children.start(
                    TaskKind::Connection,
                    "instance connection",
                    serve(tcp, h2, Arc::clone(&handler), children.clone()),
                );
            }
        });
        Self { address, requests, connections, tree }
    }

    /// Instance that speaks raw bytes on each connection.
    pub(crate) async fn raw<F, R>(handler: F) -> Self
    where
        F: Fn(TcpStream) -> R + Send + Sync + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tree = TaskTree::new();
        let connections = Arc::new(AtomicU32::new(0));
        let (accepted, children) = (Arc::clone(&connections), tree.clone());
        tree.start(TaskKind::Connection, "raw instance", async move {
            while let Ok((tcp, _)) = listener.accept().await {
                accepted.fetch_add(1, Ordering::SeqCst);
                children.start(TaskKind::Connection, "raw connection", handler(tcp));
            }
        });
        Self { address, requests: Arc::default(), connections, tree }
    }

    pub(crate) fn requests(&self) -> u32 {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn connections(&self) -> u32 {
        self.connections.load(Ordering::SeqCst)
    }

    /// Ends it at once, with everything that it is doing.
    pub(crate) fn stop(&self) {
        self.tree.cancel();
    }
}

async fn serve(tcp: TcpStream, h2: bool, handler: Handler, tree: TaskTree) {
    let service = service_fn(move |request| {
        let response = handler(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    if h2 {
        let builder = hyper::server::conn::http2::Builder::new(Executor(tree));
        let _ = builder.serve_connection(TokioIo::new(tcp), service).await;
    } else {
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder.timer(TokioTimer::new());
        let _ = builder.serve_connection(TokioIo::new(tcp), service).with_upgrades().await;
    }
}

#[derive(Clone)]
pub(crate) struct Executor(pub(crate) TaskTree);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.start(TaskKind::Connection, "test http", future);
    }
}

pub(crate) fn text(text: impl Into<String>) -> Response<AnyBody> {
    Response::new(full(text.into()))
}

pub(crate) fn full(bytes: impl Into<Bytes>) -> AnyBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

pub(crate) fn empty() -> AnyBody {
    full(Bytes::new())
}

/// A body that is fed through a channel; dropping the sender ends it.
pub(crate) fn fed() -> (mpsc::Sender<Frame<Bytes>>, AnyBody) {
    let (sender, receiver) = mpsc::channel(16);
    let frames = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|frame| (Ok(frame), receiver))
    });
    (sender, StreamBody::new(frames).boxed())
}

/// A response that was read whole.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Reads a response whole.
pub(crate) async fn whole<B>(response: Response<B>) -> Result<Reply, String>
where
    B: Body<Data = Bytes>,
    B::Error: std::fmt::Debug,
{
    let (parts, body) = response.into_parts();
    let body = body.collect().await.map_err(|e| format!("{e:?}"))?;
    Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body: body.to_bytes() })
}

/// A client connection.
pub(crate) enum Client {
    H1(hyper::client::conn::http1::SendRequest<AnyBody>),
    H2(hyper::client::conn::http2::SendRequest<AnyBody>),
}

impl Client {
    pub(crate) async fn h1(address: SocketAddr) -> Result<Self, String> {
        let tcp = TcpStream::connect(address).await.map_err(|e| format!("connect: {e}"))?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await.map_err(|e| e.to_string())?;
        TaskTree::new().start(TaskKind::Connection, "client", async move {
            let _ = connection.with_upgrades().await;
        });
        Ok(Self::H1(sender))
    }

    pub(crate) async fn h2(address: SocketAddr) -> Result<Self, String> {
        let tcp = TcpStream::connect(address).await.map_err(|e| format!("connect: {e}"))?;
        let tree = TaskTree::new();
        let (sender, connection) = hyper::client::conn::http2::handshake(Executor(tree.clone()), TokioIo::new(tcp))
            .await
            .map_err(|e| e.to_string())?;
        tree.start(TaskKind::Connection, "client", async move {
            let _ = connection.await;
        });
        Ok(Self::H2(sender))
    }

    /// Sends a request; a path becomes a full target as the protocol wants it.
    pub(crate) async fn send(&mut self, mut request: Request<AnyBody>) -> Result<Response<Incoming>, String> {
        match self {
            Self::H1(sender) => {
                if !request.headers().contains_key("host") {
                    request.headers_mut().insert("host", "test.example".parse().unwrap());
                }
                sender.ready().await.map_err(|e| format!("{e:?}"))?;
                sender.send_request(request).await.map_err(|e| format!("{e:?}"))
            }
            Self::H2(sender) => {
                *request.uri_mut() = format!("http://test.example{}", request.uri()).parse().unwrap();
                sender.ready().await.map_err(|e| format!("{e:?}"))?;
                sender.send_request(request).await.map_err(|e| format!("{e:?}"))
            }
        }
    }

    pub(crate) async fn get(&mut self, path: &str) -> Result<Reply, String> {
        whole(self.send(Request::get(path).body(empty()).unwrap()).await?).await
    }

    pub(crate) async fn post(&mut self, path: &str, body: AnyBody) -> Result<Reply, String> {
        whole(self.send(Request::post(path).body(body).unwrap()).await?).await
    }
}

/// One request on a connection of its own.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Result<Reply, String> {
    soon("a response", async { Client::h1(address).await?.get(path).await }).await
}

/// Sends raw bytes and reads until the proxy closes.
pub(crate) async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    // A reset after the answer is as good as an end.
    let _ = soon("the end of the connection", tcp.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Samples of a metric, by their labels.
pub(crate) fn samples(page: &str, name: &str) -> BTreeMap<String, f64> {
    page.lines()
        .filter_map(|line| {
            let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
            labels.starts_with('{').then(|| (labels.to_owned(), value.parse().unwrap()))
        })
        .collect()
}
