//! The server: small endpoints that show what a data plane does to requests, streams and sockets.

use std::{
    convert::Infallible,
    fs::File,
    io::{self, Write},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::{conn::auto, graceful::GracefulShutdown},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use crate::{exit_code, number, text};

type Body = UnsyncBoxBody<Bytes, Infallible>;

struct App {
    instance: String,
    version: String,
    unready_file: Option<String>,
    never_ready: bool,
    handled: Option<File>,
    count: AtomicU64,
    /// Requests that are no checks.
    served: AtomicU64,
    /// Those that raised a counter.
    errors: AtomicU64,
    /// `WebSocket` sessions in progress: hyper does not see them any more once they are upgraded.
    sockets: watch::Sender<u32>,
}

pub(crate) fn run() -> io::Result<ExitCode> {
    // One thread: tests run many of these on few cores.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(serve());
    runtime.shutdown_background();
    code
}

async fn serve() -> io::Result<ExitCode> {
    // Before anything else: a stop during the start must not be lost.
    let mut term = signal(SignalKind::terminate())?;
    let crash = async {
        match number("CRASH_AFTER_MS") {
            Some(after) => sleep(Duration::from_millis(after)).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(crash);
    let ignore = text("IGNORE_TERM").is_some();
    // Every arm is the end of the process or does not return.
    tokio::select! {
        result = start(&mut term, ignore) => result,
        () = &mut crash => {
            writeln!(io::stdout(), "about to crash")?;
            writeln!(io::stderr(), "fatal: this program was told to crash")?;
            Ok(exit_code(1))
        }
    }
}

async fn start(term: &mut tokio::signal::unix::Signal, ignore: bool) -> io::Result<ExitCode> {
    if let Some(delay) = number("START_DELAY_MS") {
        tokio::select! {
            () = sleep(Duration::from_millis(delay)) => {}
            _ = term.recv(), if !ignore => return Ok(ExitCode::SUCCESS),
        }
    }
    let handled = match text("HANDLED") {
        Some(path) => Some(File::options().create(true).append(true).open(path)?),
        None => None,
    };
    let app = Arc::new(App {
        instance: text("ORCHESTRA_INSTANCE").unwrap_or_else(|| "none".to_owned()),
        version: text("VERSION").unwrap_or_default(),
        unready_file: text("UNREADY_FILE"),
        never_ready: text("NEVER_READY").is_some(),
        handled,
        count: AtomicU64::new(0),
        served: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        sockets: watch::Sender::new(0),
    });
    let port = number("PORT").and_then(|port| u16::try_from(port).ok());
    let port = port.ok_or_else(|| io::Error::other("PORT is not set to a port"))?;
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    if !app.never_ready {
        if let Some(line) = text("LOG_READY") {
            writeln!(io::stdout(), "{line}")?;
        }
        if text("NOTIFY").is_some() {
            notify("READY=1\nSTATUS=serving")?;
        }
    }
    writeln!(io::stdout(), "serving on {port}, version {}", app.version)?;
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        // Every arm is cancel-safe; none awaits in its body.
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let _ = stream.set_nodelay(true);
                let app = Arc::clone(&app);
                let service = service_fn(move |request| handle(Arc::clone(&app), request));
                let builder = auto::Builder::new(TokioExecutor::new());
                let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
                let connection = graceful.watch(connection);
                connections.spawn(async move { drop(connection.await) });
                while connections.try_join_next().is_some() {}
            }
            _ = term.recv() => {
                writeln!(io::stdout(), "SIGTERM after {} requests", app.count.load(Ordering::Relaxed))?;
                if !ignore {
                    break;
                }
            }
        }
    }
    drop(listener);
    graceful.shutdown().await;
    let mut sockets = app.sockets.subscribe();
    let _ = sockets.wait_for(|open| *open == 0).await;
    writeln!(io::stdout(), "done")?;
    Ok(ExitCode::SUCCESS)
}

fn notify(message: &str) -> io::Result<()> {
    use std::os::{linux::net::SocketAddrExt, unix::net};
    // As sd_notify(3) has it: whoever does not listen is not told.
    let Some(path) = text("NOTIFY_SOCKET") else { return Ok(()) };
    let address = match path.strip_prefix('@') {
        Some(name) => net::SocketAddr::from_abstract_name(name)?,
        None => net::SocketAddr::from_pathname(path)?,
    };
    net::UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(drop)
}

impl App {
    fn write(&self, what: &str, id: &str) {
        if let Some(mut file) = self.handled.as_ref() {
            // One write of one line to a file opened for appending: lines of several processes do not mix.
            let _ = file.write_all(format!("{what} {id} {} {}\n", self.instance, std::process::id()).as_bytes());
        }
    }

    /// What it exports, in the text format of Prometheus.
    fn metrics(&self) -> String {
        let (served, errors) = (self.served.load(Ordering::Relaxed), self.errors.load(Ordering::Relaxed));
        let queue = text("QUEUE_FILE").and_then(|path| std::fs::read_to_string(path).ok());
        let queue = queue.as_deref().map_or("0", str::trim);
        format!(
            "# HELP app_requests_total Requests.\n# TYPE app_requests_total counter\n\
             app_requests_total{{version=\"{}\"}} {served}\n\
             # TYPE app_errors_total counter\napp_errors_total {errors}\n\
             # TYPE app_queue_depth gauge\napp_queue_depth {queue}\n",
            self.version
        )
    }

    fn is_ready(&self) -> bool {
        !self.never_ready && self.unready_file.as_ref().is_none_or(|path| !std::path::Path::new(path).exists())
    }
}

/// Writes the end of a request whatever becomes of it.
struct Entry {
    app: Arc<App>,
    id: String,
    done: bool,
}

impl Entry {
    fn end(mut self) {
        self.done = true;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.app.write(if self.done { "end" } else { "cut" }, &self.id);
    }
}

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

fn query(request: &Request<Incoming>, name: &str) -> Option<u64> {
    let pairs = request.uri().query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.filter(|(key, _)| *key == name).find_map(|(_, value)| value.parse().ok())
}

async fn handle(app: Arc<App>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
    app.count.fetch_add(1, Ordering::Relaxed);
    let entry = id.map(|id| {
        app.write("begin", &id);
        Entry { app: Arc::clone(&app), id, done: false }
    });
    let mut response = answer(&app, request, entry).await;
    let headers = response.headers_mut();
    for (name, value) in [("x-instance", &app.instance), ("x-version", &app.version)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    Ok(response)
}

async fn answer(app: &Arc<App>, request: Request<Incoming>, entry: Option<Entry>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    if !matches!(&*path, "/ready" | "/health" | "/metrics") {
        if let Some(slow) = number("SLOW_MS") {
            sleep(Duration::from_millis(slow)).await;
        }
        let served = app.served.fetch_add(1, Ordering::Relaxed);
        let one_of = |share: u64| (served + 1) * share / 1000 > served * share / 1000;
        if number("COUNT_PERMILLE").is_some_and(one_of) {
            app.errors.fetch_add(1, Ordering::Relaxed);
        }
        // Who sends the request draws the lot, so that a seed repeats what fails.
        let lot = || request.headers().get("x-lot").and_then(|lot| lot.to_str().ok()).and_then(|lot| lot.parse().ok());
        let drawn = number("FAIL_LOT").is_some_and(|bound| lot().is_some_and(|lot: u64| lot < bound));
        let broken = std::env::var_os("FAIL_FILE").is_some_and(|path| std::path::Path::new(&path).exists());
        let fails = drawn || broken || number("FAIL_PERMILLE").is_some_and(one_of);
        if fails {
            let mut response = Response::new(full("told to fail"));
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            if let Some(entry) = entry {
                entry.end();
            }
            return response;
        }
    }
    let mut response = match (request.method(), path.as_str()) {
        (_, "/stream") => return stream(&request, entry),
        (_, "/ws") => return websocket(app, request, entry),
        (&Method::POST, "/grpc.health.v1.Health/Check") => grpc_health(app),
        (&Method::POST, "/echo") => {
            if let Ok(body) = request.into_body().collect().await {
                Response::new(full(body.to_bytes()))
            } else {
                let mut response = Response::new(full("the request broke off"));
                *response.status_mut() = StatusCode::BAD_REQUEST;
                return response;
            }
        }
        (_, "/work") => {
            sleep(Duration::from_millis(query(&request, "ms").unwrap_or(0))).await;
            Response::new(full("worked"))
        }
        (_, "/version") => Response::new(full(app.version.clone())),
        (_, "/count") => Response::new(full(app.count.load(Ordering::Relaxed).to_string())),
        (_, "/metrics") => Response::new(full(app.metrics())),
        (_, "/health") => Response::new(full("healthy")),
        (_, "/ready") if app.is_ready() => Response::new(full("ready")),
        (_, "/ready") => {
            let mut response = Response::new(full("not ready"));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response
        }
        _ => {
            let mut response = Response::new(full("not found"));
            *response.status_mut() = StatusCode::NOT_FOUND;
            response
        }
    };
    if let Some(entry) = entry {
        entry.end();
    }
    response.headers_mut().entry("content-type").or_insert(HeaderValue::from_static("text/plain"));
    response
}

/// Numbered tokens, then an event that says that they are complete.
fn stream(request: &Request<Incoming>, entry: Option<Entry>) -> Response<Body> {
    let count = query(request, "n").unwrap_or(10);
    let every = Duration::from_millis(query(request, "ms").unwrap_or(50));
    let tokens = futures_util::stream::unfold((0, entry), move |(index, entry)| async move {
        if index > count {
            return None;
        }
        if index > 0 {
            sleep(every).await;
        }
        if index == count {
            if let Some(entry) = entry {
                entry.end();
            }
            let last = format!("event: done\ndata: {count}\n\n");
            return Some((Ok(Frame::data(Bytes::from(last))), (index + 1, None)));
        }
        let token = format!("id: {index}\ndata: token {index}\n\n");
        Some((Ok(Frame::data(Bytes::from(token))), (index + 1, entry)))
    });
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(tokens)));
    response.headers_mut().insert("content-type", HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert("cache-control", HeaderValue::from_static("no-store"));
    response
}

/// Echoes every text and sends numbered ticks in between, until the client closes.
fn websocket(app: &Arc<App>, mut request: Request<Incoming>, entry: Option<Entry>) -> Response<Body> {
    let every = Duration::from_millis(query(&request, "ms").unwrap_or(50).max(1));
    let Some(key) = request.headers().get("sec-websocket-key").map(|key| derive_accept_key(key.as_bytes())) else {
        let mut response = Response::new(full("a WebSocket handshake is expected"));
        *response.status_mut() = StatusCode::UPGRADE_REQUIRED;
        return response;
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let app = Arc::clone(app);
    app.sockets.send_modify(|open| *open += 1);
    let session = async move {
        if let Ok(upgraded) = upgrade.await {
            let socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
            if converse(socket, every).await.is_some()
                && let Some(entry) = entry
            {
                entry.end();
            }
        }
        app.sockets.send_modify(|open| *open -= 1);
    };
    SESSIONS.with_borrow_mut(|sessions| {
        while sessions.try_join_next().is_some() {}
        sessions.spawn(session);
    });
    let mut response = Response::new(full(""));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert("connection", HeaderValue::from_static("upgrade"));
    headers.insert("upgrade", HeaderValue::from_static("websocket"));
    if let Ok(key) = HeaderValue::from_str(&key) {
        headers.insert("sec-websocket-accept", key);
    }
    response
}

thread_local! {
    /// Owner of the sessions; there is one thread.
    static SESSIONS: std::cell::RefCell<JoinSet<()>> = std::cell::RefCell::new(JoinSet::new());
}

/// Until the client closes. `None` if the connection was lost before.
async fn converse(mut socket: WebSocketStream<TokioIo<hyper::upgrade::Upgraded>>, every: Duration) -> Option<()> {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0_u64;
    loop {
        // Cancel-safe: the interval keeps its place, the socket what it has read.
        let message = tokio::select! {
            _ = ticks.tick() => {
                number += 1;
                Message::text(format!("tick {}", number - 1))
            }
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => Message::Text(text),
                Some(Ok(Message::Close(_))) => {
                    // The answer to the close goes out with the flush.
                    while let Some(Ok(_)) = socket.next().await {}
                    return Some(());
                }
                Some(Ok(_)) => continue,
                Some(Err(_)) | None => return None,
            },
        };
        socket.send(message).await.ok()?;
    }
}

/// `grpc.health.v1.HealthCheckResponse{status: SERVING or NOT_SERVING}` with the trailers of gRPC.
fn grpc_health(app: &App) -> Response<Body> {
    let status = if app.is_ready() { 1 } else { 2 };
    let message = Bytes::from(vec![0, 0, 0, 0, 2, 0x08, status]);
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok::<_, Infallible>(Frame::data(message)), Ok(Frame::trailers(trailers))];
    let mut response = Response::new(BodyExt::boxed_unsync(StreamBody::new(futures_util::stream::iter(frames))));
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}
