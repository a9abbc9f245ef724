//! A strict server for tests: it answers exactly what its script says, in that order, over a real socket.
//!
//! A request that the script does not expect is answered with 500 and remembered; [`ScriptedServer::finish`] fails the
//! test for it, and for every exchange that did not happen. `GET /v1/version` may come at any time.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    path::Path,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use orchestra_task::{TaskKind, TaskTree};
use serde::Serialize;
use serde_json::Value;
use tokio::{net::UnixListener, sync::Notify};

use crate::{API_VERSION, EVENT_STREAM, IDEMPOTENCY_KEY, NDJSON, ShortPath, server::Version, sse::Frame};

/// One request that must come, and its answer.
pub struct Exchange {
    request: String,
    body: Option<Value>,
    last_event_id: Option<String>,
    reply: Reply,
}

struct Reply {
    status: u16,
    media: &'static str,
    chunks: Vec<Bytes>,
    /// Sent once the script has no more exchanges.
    last: Vec<Bytes>,
    end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Complete,
    Cut,
    Open,
}

impl Exchange {
    /// A request line such as `GET /v1/doctor`, answered with status 200 and this value.
    pub fn json(request: &str, value: &impl Serialize) -> Self {
        let json = serde_json::to_vec(value).expect("serializable");
        Self::new(
            request,
            Reply {
                status: 200,
                media: "application/json",
                chunks: vec![json.into()],
                last: Vec::new(),
                end: End::Complete,
            },
        )
    }

    /// Answered with server-sent events.
    pub fn events<'a>(request: &str, frames: impl IntoIterator<Item = &'a Frame>) -> Self {
        let chunks = frames.into_iter().map(Frame::encode).collect();
        Self::new(request, Reply { status: 200, media: EVENT_STREAM, chunks, last: Vec::new(), end: End::Complete })
    }

    /// Answered with lines of JSON.
    pub fn lines<T: Serialize>(request: &str, values: &[T]) -> Self {
        let line = |value| serde_json::to_string(value).expect("serializable") + "\n";
        let chunks = values.iter().map(|value| line(value).into()).collect();
        Self::new(request, Reply { status: 200, media: NDJSON, chunks, last: Vec::new(), end: End::Complete })
    }

    fn new(request: &str, reply: Reply) -> Self {
        Self { request: request.to_owned(), body: None, last_event_id: None, reply }
    }

    /// Answered with this status.
    #[must_use]
    pub fn status(mut self, status: u16) -> Self {
        self.reply.status = status;
        self
    }

    /// Answered with exactly these pieces.
    #[must_use]
    pub fn chunks(mut self, chunks: Vec<Bytes>) -> Self {
        self.reply.chunks = chunks;
        self
    }

    /// The request must have this body.
    #[must_use]
    pub fn expect_body(mut self, body: &impl Serialize) -> Self {
        self.body = Some(serde_json::to_value(body).expect("serializable"));
        self
    }

    /// The request must have this `Last-Event-ID`.
    #[must_use]
    pub fn expect_last_event_id(mut self, id: &str) -> Self {
        self.last_event_id = Some(id.to_owned());
        self
    }

    /// These events follow once every other exchange of the script has happened.
    #[must_use]
    pub fn then_at_the_end<'a>(mut self, frames: impl IntoIterator<Item = &'a Frame>) -> Self {
        self.reply.last = frames.into_iter().map(Frame::encode).collect();
        self
    }

    /// The connection breaks after the answer's last piece.
    #[must_use]
    pub fn cut(mut self) -> Self {
        self.reply.end = End::Cut;
        self
    }

    /// The answer stays open after its last piece.
    #[must_use]
    pub fn open(mut self) -> Self {
        self.reply.end = End::Open;
        self
    }
}

struct Script {
    version: Version,
    exchanges: VecDeque<Exchange>,
    surprises: Vec<String>,
    keys: Vec<Option<String>>,
    /// Told whenever an exchange has happened.
    happened: Arc<Notify>,
}

/// The server. Dropping it stops it.
pub struct ScriptedServer {
    script: Arc<Mutex<Script>>,
    tree: TaskTree,
}

impl ScriptedServer {
    /// Serves a script on the Unix socket `path`. Must be called within a runtime.
    pub fn start(path: &Path, exchanges: Vec<Exchange>) -> io::Result<Self> {
        let listener = UnixListener::bind(ShortPath::of(path)?)?;
        let version = Version {
            version: "0.0.0-test".into(),
            api: API_VERSION,
            pid: 4321,
            home: "/state".into(),
            listen: None,
            started_at: 1_795_232_980_123,
        };
        let script = Script {
            version,
            exchanges: exchanges.into(),
            surprises: Vec::new(),
            keys: Vec::new(),
            happened: Arc::default(),
        };
        let script = Arc::new(Mutex::new(script));
        let tree = TaskTree::new();
        let (connections, shared) = (tree.clone(), script.clone());
        tree.start(TaskKind::Loop, "scripted server", async move {
            while let Ok((stream, _)) = listener.accept().await {
                let script = shared.clone();
                connections.start(TaskKind::Connection, "scripted connection", async move {
                    let service = service_fn(move |request| answer(script.clone(), request));
                    // A cut answer ends the connection with an error: that is what it is for.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Ok(Self { script, tree })
    }

    /// Sets what `GET /v1/version` answers.
    pub fn version(&self, change: impl FnOnce(&mut Version)) {
        change(&mut self.script.lock().expect("no panic while locked").version);
    }

    /// Whether every exchange of the script has happened.
    pub fn is_exhausted(&self) -> bool {
        self.script.lock().expect("no panic while locked").exchanges.is_empty()
    }

    /// The idempotency keys of the requests to start runs, in their order.
    pub fn idempotency_keys(&self) -> Vec<Option<String>> {
        self.script.lock().expect("no panic while locked").keys.clone()
    }

    /// Stops it.
    ///
    /// # Panics
    ///
    /// If a request came that the script does not have, or one did not come.
    pub fn finish(self) {
        let script = self.script.lock().expect("no panic while locked");
        assert!(script.surprises.is_empty(), "not in the script:\n{}", script.surprises.join("\n"));
        let missing: Vec<&str> = script.exchanges.iter().map(|exchange| &exchange.request[..]).collect();
        assert!(missing.is_empty(), "these requests did not come:\n{}", missing.join("\n"));
    }
}

impl Drop for ScriptedServer {
    fn drop(&mut self) {
        self.tree.cancel();
    }
}

type Answer = http::Response<UnsyncBoxBody<Bytes, io::Error>>;

async fn answer(script: Arc<Mutex<Script>>, request: http::Request<Incoming>) -> Result<Answer, Infallible> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let line = format!("{} {}", head.method, head.uri);
    let header = |name: &str| head.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let shared = script.clone();
    let mut script = script.lock().expect("no panic while locked");
    if line == "GET /v1/version" {
        let json = serde_json::to_vec(&script.version).expect("serializable");
        return Ok(response(
            Reply {
                status: 200,
                media: "application/json",
                chunks: vec![json.into()],
                last: Vec::new(),
                end: End::Complete,
            },
            shared,
        ));
    }
    if line == "POST /v1/runs" {
        let key = header(IDEMPOTENCY_KEY);
        script.keys.push(key);
    }
    let Some(exchange) = script.exchanges.pop_front() else {
        return Ok(surprise(&mut script, line, shared));
    };
    script.happened.notify_waiters();
    let found: Option<Value> = serde_json::from_slice(&body).ok();
    let mut problems = Vec::new();
    if exchange.request != line {
        problems.push(format!("{line}, where {} was expected", exchange.request));
    }
    if header("host").is_none() {
        problems.push(format!("{line}: without Host"));
    }
    if exchange.body.is_some()
        && (exchange.body != found || header("content-type").as_deref() != Some("application/json"))
    {
        let (expected, found) = (exchange.body.unwrap_or_default(), found.unwrap_or_default());
        problems.push(format!("{line}: body {found}, where {expected} was expected"));
    }
    if exchange.last_event_id != header("last-event-id") {
        let (expected, found) = (exchange.last_event_id, header("last-event-id"));
        problems.push(format!("{line}: Last-Event-ID {found:?}, where {expected:?} was expected"));
    }
    if problems.is_empty() {
        return Ok(response(exchange.reply, shared));
    }
    Ok(surprise(&mut script, problems.join("; "), shared))
}

fn surprise(script: &mut Script, what: String, shared: Arc<Mutex<Script>>) -> Answer {
    let json = serde_json::json!({"errors": [{"code": "ORC0899", "severity": "error", "message": what}]});
    script.surprises.push(what);
    let chunks = vec![json.to_string().into()];
    response(Reply { status: 500, media: "application/json", chunks, last: Vec::new(), end: End::Complete }, shared)
}

/// Completes once the script has no more exchanges.
async fn exhausted(script: Arc<Mutex<Script>>) {
    loop {
        let happened = script.lock().expect("no panic while locked").happened.clone();
        let next = happened.notified();
        if script.lock().expect("no panic while locked").exchanges.is_empty() {
            return;
        }
        next.await;
    }
}

fn response(reply: Reply, script: Arc<Mutex<Script>>) -> Answer {
    let Reply { status, media, chunks, last, end } = reply;
    let last = stream::once(async move {
        if !last.is_empty() {
            exhausted(script).await;
        }
        stream::iter(last)
    })
    .flatten();
    let end = stream::once(async move {
        match end {
            End::Complete => None,
            End::Cut => {
                // A body that is not ready makes hyper send what it has.
                tokio::task::yield_now().await;
                Some(Err(io::Error::from(io::ErrorKind::ConnectionReset)))
            }
            End::Open => std::future::pending().await,
        }
    });
    let chunks = stream::iter(chunks).chain(last).map(|chunk| Some(Ok(http_body::Frame::data(chunk))));
    let body = StreamBody::new(chunks.chain(end).filter_map(std::future::ready));
    let builder = http::Response::builder().status(status).header(http::header::CONTENT_TYPE, media);
    builder.body(body.boxed_unsync()).expect("a valid response")
}
